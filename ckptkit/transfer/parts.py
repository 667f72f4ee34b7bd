"""One sharded output, written by several processes: each writes some of its shards, and one gives all their names.

All of them make the same plan (`ckptkit.transfer.part_records`).  A part writes its shards, under the names that they
will have, into a folder beside the destination (`staging_of`), whose own name says that what is in it is not complete.
There it is a complete checkpoint: like any other it is compared and gets its names at the end
(`ckptkit.transfer.writing`), so nothing of an interrupted part counts.  Its record is written last:
``part-00002-of-00004.json``.  `Parts.finish` holds the records against its own plan and the shards against the records,
moves the shards to their places and writes the index: until then a reader sees the old checkpoint, or none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

from ckptkit.bytesource import Source, SourceFile, flush_to_disk
from ckptkit.errors import CorruptError, FileAccessError, RewriteError
from ckptkit.fleet.shares import Share
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.plan import Digest, IndexFile, LiteralBytes, Plan
from ckptkit.report import SCHEMA_VERSION, listed
from ckptkit.transfer.names import (
    Output,
    beside,
    created,
    fcntl,
    has_name,
    locked,
    no_folder,
    overwrite,
    publish,
    remove_folder,
    this_host,
)
from ckptkit.transfer.part_records import (
    PartRecord,
    PlanIdentity,
    differences,
    hashed_by,
    identity_of,
    late_fields,
    losses_of,
    modified_of,
    read_record,
    shard_digest,
    shares_of,
    staging_of,
    tally_of,
)
from ckptkit.transfer.passing import DigestsInPassing, Passed
from ckptkit.transfer.steps import Tally, digested, fill_file
from ckptkit.transfer.workers import Progress, in_parallel, uninterrupted
from ckptkit.transfer.writing import Check, index_bytes, places, remove_stale_shards, status_of, write_atomically

__all__ = ["Parts"]

F = TypeVar("F", bound=Callable[..., Any])

_RECORD = re.compile(r"part-([0-9]{5,9})-of-([0-9]{5,9})\.json")


@contextlib.contextmanager
def _access_told(shown: str) -> Iterator[None]:
    """System errors in the block are reported for the output."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileAccessError):
            raise
        raise FileAccessError(f"{shown}: cannot be written: {error.strerror}", path=shown) from error


def _with_errors(method: F) -> F:
    """The method of `Parts`, with system errors reported for the output."""

    @functools.wraps(method)
    def called(self: Parts, *given: Any, **named: Any) -> Any:
        with _access_told(self._shown):
            return method(self, *given, **named)

    return cast(F, called)


class Parts:
    """The parts of one output, in their folder.

    Args:
        destination: the index to write.
        plan: of it.
        files: of the source, by name.
        options: those that change the output, as text.
        staging: the folder the parts are put into, which is there, and not ours to remove; ``None``: `staging_of`.

    Attributes:
        plan, identity, files: of the output and its source.
        staging: the folder.
    """

    def __init__(
        self,
        destination: str,
        plan: Plan,
        *,
        files: Mapping[str, Source],
        options: Mapping[str, str],
        staging: str | None = None,
    ) -> None:
        above, name = os.path.split(destination)
        self.plan = plan
        self.identity = identity_of(plan, files, options)
        self.staging = staging_of(os.path.join(os.path.realpath(above), name)) if staging is None else staging
        self._is_ours = staging is None
        self._shown = destination
        self.files = files
        self._hashed: dict[int, list[list[str]]] = {}

    @property
    def _folder(self) -> str:
        return os.path.realpath(os.path.dirname(self._shown))

    @_with_errors
    def write(
        self,
        share: Share,
        *,
        force: bool,
        check: Check | None,
        hashed: bool,
        source: Source,
        passed: Passed | None = None,
        progress: Progress | None = None,
    ) -> tuple[PartRecord, Tally | None]:
        """Write one part; one that is there already and whole is kept.

        Args:
            share: which.
            force: whether an output that exists may be replaced, and a part that is there is written again.
            check: as in `write_atomically`, with an index of only this part's shards.
            hashed: whether to record, or to check against the record, the SHA-256 of the shards.
            source: of the plan.
            passed: as in `write_atomically`.
            progress: called as bytes are written, and again as they are compared.

        Returns:
            Its record, and what conversions lost; ``None``: it was kept.

        Raises:
            RewriteError: another part is there that is not of this plan.
            DestinationExistsError, FileAccessError, CorruptError: as `write_atomically`; of the part nothing counts.
        """
        replaced = status_of(places(self.plan, self._shown, force=force)[-1][1])
        known = self.records()
        self.require_same(known.values(), share.count)
        own = known.get(share.index)
        if own is not None and not force and self._problem(own, hashed=hashed) is None:
            return own, None
        names = shares_of(self.plan, share.count)[share.index - 1]
        digests, tally, stop = None, Tally(), threading.Event()
        try:
            if self._is_ours:
                self._make_folder(0o777 if replaced is None else 0o700)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._record_path(share))
            with uninterrupted():
                hashes = self._digested(share)
                digests = DigestsInPassing(hashes.values(), stop)
            if names:
                index = self._record_path(share).removesuffix("json") + "index.json"
                tally = write_atomically(
                    index,
                    self._part(names),
                    force=True,
                    check=check,
                    source=source,
                    passed=passed,
                    digests=digests,
                    progress=progress,
                )
                os.unlink(index)
            sums = self._sums(names) if hashed else {}
            record: PartRecord = {
                "schema_version": SCHEMA_VERSION,
                "plan": self.identity,
                "part": share.index,
                "of": share.count,
                "checked": check is not None,
                "shards": {n: {"nbytes": self.plan.shards[n].nbytes, "sha256": sums.get(n)} for n in names},
                "digests": {name: digests.of(file).decode() for name, file in hashes.items()},
                "modified": modified_of(self.files),
                "losses": losses_of(self.plan, tally),
            }
            for file in hashes.values():
                if file.changed():
                    raise CorruptError("the file was changed while it was being converted", path=file.path)
            data = json.dumps(record, indent=1).encode()
            literal = Plan(format="json", nbytes=len(data), steps=(LiteralBytes(0, data),), tensors=0, aliases={})
            waits = None if check is None else lambda _path, _compared: None
            write_atomically(self._record_path(share), literal, force=True, check=waits)
            return record, tally
        finally:
            stop.set()
            if digests is not None:
                digests.join()

    def _make_folder(self, mode: int) -> None:
        try:
            os.mkdir(self.staging, mode)
        except FileExistsError:
            pass
        except FileNotFoundError as error:
            raise no_folder(self._shown) from error

    def _part(self, names: Iterable[str]) -> Plan:
        """The plan of these shards and of an index of them; digests are left for the end."""
        shards = {name: _without_digests(self.plan.shards[name]) for name in names}
        whole = cast(IndexFile, self.plan.index)
        index = replace(whole, weight_map={key: at for key, at in whole.weight_map.items() if at in shards})
        data = index.to_bytes()
        return replace(
            self.plan, nbytes=len(data), steps=(LiteralBytes(0, data),), aliases={}, shards=shards, index=index
        )

    def _digested(self, share: Share) -> dict[str, Source]:
        """The source files whose digests are wanted, and which this part computes."""
        if self._hashed.get(share.count) is None:
            wanted = {id(file) for file in digested(self.plan)}
            files = {name: file for name, file in self.files.items() if id(file) in wanted}
            self._hashed[share.count] = hashed_by(self.plan, files, share.count)
        return {name: self.files[name] for name in self._hashed[share.count][share.index - 1]}

    def _record_path(self, share: Share) -> str:
        return os.path.join(self.staging, f"part-{share.index:05d}-of-{share.count:05d}.json")

    def _sums(self, names: Iterable[str]) -> dict[str, str]:
        """The SHA-256 of shards that are there, by name."""
        found: dict[str, str] = {}

        def add(name: str) -> None:
            found[name] = shard_digest(os.path.join(self.staging, name), self.plan.shards[name])

        names = list(names)
        in_parallel((partial(add, name) for name in names), nbytes=sum(self.plan.shards[n].nbytes for n in names))
        return found

    def records(self) -> dict[int, PartRecord]:
        """The records of the parts that are there, by number.

        Raises:
            CorruptError: one cannot be read.
            RewriteError: they are of as many parts as others are not.
        """
        found: dict[int, PartRecord] = {}
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = sorted(os.listdir(self.staging))
        for match in filter(None, map(_RECORD.fullmatch, names)):
            path = os.path.join(self.staging, match[0])
            record = read_record(path)
            if (record["part"], record["of"]) != (int(match[1]), int(match[2])):
                raise CorruptError("the record is for a different part than its name says", path=path)
            known = found.setdefault(record["part"], record)
            if known["of"] != record["of"]:
                raise self._refused(record, f"part {known['part']} is one of {known['of']}")
        return found

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The block finishes, and no other process does at the same time, where the file system has locks.

        Raises:
            FileAccessError: another one does.
        """
        path = os.path.join(self.staging, "finish.lock")
        with contextlib.ExitStack() as stack:
            if fcntl is not None and os.path.isdir(self.staging):  # on Windows it would block the folder
                with _access_told(self._shown):
                    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                stack.callback(os.close, fd)
                is_alone = True
                with contextlib.suppress(OSError):  # there are no locks here
                    is_alone = locked(fd) and has_name(os.fstat(fd), path)
                if not is_alone:
                    told = "another process is combining the parts into a checkpoint, or has done so"
                    raise FileAccessError(f"{self._shown}: {told}", path=self._shown)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def require_same(self, records: Iterable[PartRecord], count: int) -> None:
        """Check that parts belong to this very plan, and to the same number of parts.

        Raises:
            RewriteError: one is not; the message says what differs.
        """
        for record in records:
            if record["of"] != count:
                raise self._refused(record, f"this is one of {count} parts")
            if differing := [*differences(self.identity, record["plan"])]:
                raise self._refused(record, listed(differing, 4, between="; ", characters=400))

    def require_agreed(self, identity: PlanIdentity) -> None:
        """See that another process has made the same plan.

        Raises:
            RewriteError: it has not; the message says what differs.
        """
        if differing := [*differences(identity, self.identity)]:
            told = listed(differing, 4, between="; ", characters=400)
            raise RewriteError(f"{self._shown}: a worker's plan is different: {told}", path=self._shown)

    def _refused(self, record: PartRecord, what: str) -> RewriteError:
        return RewriteError(
            f"{self._shown}: part {record['part']} of {record['of']} already exists and belongs to another "
            f"conversion: {what}; to start again, remove the folder {self.staging}",
            path=self._shown,
        )

    @_with_errors
    def missing(self, *, hashed: bool) -> tuple[int, dict[int, str]]:
        """How many parts there will be (0: there are none yet), and what is wrong with incomplete ones.

        Args:
            hashed: whether to check shards against the recorded SHA-256; otherwise only their sizes.

        Raises:
            As `records` and `require_same`.
        """
        records = self.records()
        count = next((record["of"] for record in records.values()), 0)
        self.require_same(records.values(), count)
        found: dict[int, str] = {}
        if count and len(records) == count and self._is_published(self._digests(records)):
            return count, found
        for number in range(1, count + 1):
            record = records.get(number)
            problem = "is missing" if record is None else self._problem(record, hashed=hashed)
            if problem is not None:
                found[number] = problem
        return count, found

    def _problem(self, record: PartRecord, *, hashed: bool) -> str | None:
        """The problem with the shards of a part; ``None``: they are complete."""
        names = shares_of(self.plan, record["of"])[record["part"] - 1]
        if names != [*record["shards"]]:
            return "has shards that belong to another part"
        if record["digests"].keys() != self._digested(Share(record["part"], record["of"])).keys():
            return "has digests of files that belong to another part"
        for name in names:
            path, nbytes = os.path.join(self.staging, name), self.plan.shards[name].nbytes
            self._taken_back(name, record)
            if not os.path.isfile(path):
                return f"has no {name}"
            if os.path.getsize(path) != nbytes:
                return f"has {os.path.getsize(path):,} of the {nbytes:,} bytes of {name}"
        sums = {name: each["sha256"] for name, each in record["shards"].items() if each["sha256"] is not None}
        found = self._sums(sums) if hashed else sums
        damaged = [name for name in sums if found[name] != sums[name]]
        return f"has different bytes than were recorded: {listed(damaged, 4)}" if damaged else None

    def _taken_back(self, name: str, record: PartRecord) -> None:
        """Put a shard where its part had it, if it was given its place by a run of `finish` that was killed."""
        path, final = os.path.join(self.staging, name), os.path.join(self._folder, name)
        if os.path.lexists(path) or not os.path.isfile(final) or json.dumps(name).encode() in self._index():
            return
        nbytes, sha256 = record["shards"][name]["nbytes"], record["shards"][name]["sha256"]
        if sha256 and os.path.getsize(final) == nbytes and shard_digest(final, self.plan.shards[name]) == sha256:
            os.replace(final, path)

    def _index(self) -> bytes:
        """The index that is there."""
        try:
            with contextlib.closing(SourceFile(os.path.join(self._folder, os.path.basename(self._shown)))) as file:
                return file.read(0, min(file.size, DEFAULT_LIMITS.index_nbytes))
        except FileAccessError:
            return b""

    def _digests(self, records: Mapping[int, PartRecord]) -> DigestsInPassing:
        """Those of the source, as the parts computed them."""
        hexes = {name: digest for record in records.values() for name, digest in record["digests"].items()}
        wanted = {id(file) for file in digested(self.plan)}
        known = {id(file): hexes.get(name, "").encode() for name, file in self.files.items() if id(file) in wanted}
        return DigestsInPassing((), threading.Event(), known)

    def _is_published(self, digests: DigestsInPassing) -> bool:
        """Whether these very shards have their places and the index says so: a run was killed after that."""
        if self._index() != index_bytes(self.plan, digests):
            return False
        for name, shard in self.plan.shards.items():
            path, final = os.path.join(self.staging, name), os.path.join(self._folder, name)
            if not os.path.isfile(final) or os.path.getsize(final) != shard.nbytes:
                return False
            if os.path.lexists(path) and not os.path.samefile(path, final):
                return False
        return True

    @_with_errors
    def finish(
        self,
        *,
        force: bool,
        flush: bool,
        opened: Callable[[str], object],
        replaces: tuple[str, ...],
        source: Source | None,
    ) -> Tally:
        """Give the complete shards of all parts their places, and write the index.

        Args:
            force: whether an output that exists may be replaced.
            flush: whether to wait for the disk.
            opened: called with the path of an index that opens the output as it will be; whatever it raises stops it.
            replaces: as in `write_atomically`.
            source: as in `write_atomically`.

        Returns:
            What conversions lost in all parts.

        Raises:
            DestinationExistsError: the output exists, and ``force`` is false.
            FileAccessError: it cannot be written; the parts stay.
        """
        records = self.records()
        digests = self._digests(records)
        files: list[Output] = []
        try:
            if not self._is_published(digests):
                self._remove_links()
                wanted = places(self.plan, self._shown, force=force)
                old = [wanted[-1][1], *(os.path.join(self._folder, name) for name in replaces)]
                like = next(filter(None, map(status_of, old)), None)
                with uninterrupted():
                    for name, (shard, path, shown) in zip(self.plan.shards, wanted, strict=False):
                        files.append(self._opened(name, shard, path, shown, status_of(path) or like))
                    files.append(created(*wanted[-1], like))
                for file in files[:-1]:
                    if late_fields(file.plan):
                        fill_file(file.plan, file.fd, digests, checksums=False)
                now = {name: f"{os.path.basename(self.staging)}/{name}" for name in self.plan.shards}
                overwrite(files[-1].fd, index_bytes(self.plan, digests, now))
                opened(files[-1].temporary)
                for file in files if flush else ():
                    flush_to_disk(file.fd)
                publish(files, index_bytes(self.plan, digests), force=force, flush=flush, source=source)
                remove_stale_shards(self._folder, replaces, source)
            if self._is_ours:
                self._remove()
        finally:
            with uninterrupted():
                for file in files:
                    file.is_ours = file.is_ours and os.path.dirname(file.temporary) != self.staging
                    file.close()
        return tally_of(self.plan, records.values())

    def _remove_links(self) -> None:
        """Take away second names of shards, which a run that was killed gave them: no index has these yet."""
        for name in self.plan.shards:
            final = os.path.join(self._folder, name)
            if os.path.isfile(final) and os.path.samefile(final, os.path.join(self.staging, name)):
                os.unlink(final)

    def _opened(self, name: str, plan: Plan, path: str, shown: str, replaced: os.stat_result | None) -> Output:
        """A shard that is in the folder of parts, to be given its place."""
        temporary = os.path.join(self.staging, name)
        fd = os.open(temporary, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
        return Output(
            plan=plan,
            path=path,
            shown=shown,
            temporary=temporary,
            fd=fd,
            host=this_host(),
            replaced=replaced,
            is_ours=False,
        )

    def _remove(self) -> None:
        """Remove the folder of parts, first renaming it so that the next run can remove what is left of it."""
        gone = beside(self.staging, this_host())
        with contextlib.suppress(OSError):
            os.rename(self.staging, gone)
        remove_folder(gone)

    def is_named(self) -> bool:
        """Whether the index that is there names shards where parts put them: `finish` failed at the very end."""
        return os.path.basename(self.staging).encode() in self._index()


def _without_digests(plan: Plan) -> Plan:
    return replace(plan, steps=tuple(step for step in plan.steps if not isinstance(step, Digest)))
