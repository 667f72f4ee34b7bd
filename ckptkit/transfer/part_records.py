"""Facts that parts of one output share: the plan of each, and which shards are its own.

All parts make the same plan, from which each knows its own shards (`shares_of`).  A plan's identity
(`PlanIdentity`) contains only facts that two machines share: no path, no time, no inode.  A part's record
(`PartRecord`) names its plan and describes each of its shards; it is a JSON object in a separate file.

The SHA-256 of source files, which are in receipts, are each computed by one part, recorded, and filled in at the end; a
shard's recorded SHA-256 (`shard_digest`) is that of its bytes with zeros in these fields and in the checksums over them
(`late_fields`).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict, cast

from ckptkit.bytesource import ByteRange, Source, SourceFile
from ckptkit.computed import ByteSource, ConvertedRange, DTypeConversion, files_of
from ckptkit.errors import CorruptError
from ckptkit.extras import __version__
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.plan import Cast, Checksum, Copy, Digest, Gather, LiteralBytes, Plan, Step
from ckptkit.report import SCHEMA_VERSION
from ckptkit.startup import sha256
from ckptkit.transfer.steps import Tally

__all__ = [
    "PartRecord",
    "PlanIdentity",
    "balanced",
    "differences",
    "hashed_by",
    "identity_of",
    "late_fields",
    "losses_of",
    "modified_of",
    "read_record",
    "shard_digest",
    "shares_of",
    "staging_of",
    "tally_of",
]

_CHUNK_NBYTES = 1 << 20
"""Bytes hashed at a time: they fit into a core's own cache."""

_END_NBYTES, _SAMPLE_NBYTES, _SAMPLES = 64 << 10, 4 << 10, 32
"""Samples that identify a source file: both ends, where headers, pickles and directories are, and so many pieces in
between, which differ in a later state of the same training."""

_DIGEST = re.compile("[0-9a-f]{64}")

_LOSSES = 5
"""Numbers of what one cast lost."""

_RECORD_NBYTES = 64 << 20
"""A record has some 150 bytes per shard and source file, of which there are at most ten thousand."""


class ShardRecord(TypedDict):
    """A shard: its size in bytes, and the SHA-256 of it (`shard_digest`); ``None``: it was not computed."""

    nbytes: int
    sha256: str | None


class SourceRecord(TypedDict):
    """A file of the source: its size in bytes, and the SHA-256 of parts of it, or of what a server calls its state."""

    nbytes: int
    sample: str


class PlanIdentity(TypedDict):
    """The inputs of a plan, and the SHA-256 of its steps.

    Attributes:
        ckptkit: the version.
        source: its files, by name.
        options: those that were given and change the output, as text.
        steps: of all files.
    """

    ckptkit: str
    source: dict[str, SourceRecord]
    options: dict[str, str]
    steps: str


class PartRecord(TypedDict):
    """A written part.

    Attributes:
        plan: it is a part of.
        part, of: which, from 1; and how many there are.
        checked: whether it was compared with the source.
        shards: its shards, by name.
        digests: SHA-256 of source files, by name.
        modified: when the source's files had been written to, by name (`modified_of`).
        losses: what casts lost: the place of each among those of the plan, then the fields of `ckptkit.casting.Losses`.
    """

    schema_version: int
    plan: PlanIdentity
    part: int
    of: int
    checked: bool
    shards: dict[str, ShardRecord]
    digests: dict[str, str]
    modified: dict[str, str]
    losses: list[list[int]]


def staging_of(index: str) -> str:
    """The folder for parts: its name follows from the index's, and is that of a temporary file.

    Args:
        index: path of the index to write.
    """
    folder, name = os.path.split(index)
    name = name.removesuffix(".index.json")
    stem, ending = os.path.splitext(name)
    digits = f"{zlib.crc32(name.encode('utf-8', 'surrogateescape')):08x}"  # and no host's: no other run removes it
    return os.path.join(folder, f".{stem[:40]}.{digits}.tmp{ending[:16]}")


def shares_of(plan: Plan, count: int) -> list[list[str]]:
    """The shards of each of so many parts, in their order: the largest first, always to the part that has least."""
    order = {name: place for place, name in enumerate(plan.shards)}
    sizes = {name: shard.nbytes for name, shard in plan.shards.items()}
    return [sorted(names, key=order.__getitem__) for names in balanced(sizes, count)]


def hashed_by(plan: Plan, files: Mapping[str, Source], count: int) -> list[list[str]]:
    """The source files that each of so many parts hashes: the part that reads most of a file does.

    Args:
        plan: of the index.
        files: those whose digests are wanted, by name.
        count: how many parts there are.
    """
    names = {id(file): name for name, file in files.items()}
    read: dict[str, Counter[int]] = {name: Counter() for name in files}
    for number, share in enumerate(shares_of(plan, count)):
        for step in (step for shard in share for step in plan.shards[shard].steps):
            for file in files_of(source) if (source := _source_of(step)) is not None else ():
                if id(file) in names:
                    read[names[id(file)]][number] += step.nbytes
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        number = max(range(count), key=lambda number: (read[name][number], -loads[number], -number))
        shares[number].append(name)
        loads[number] += files[name].size
    return shares


def _source_of(step: Step) -> ByteSource | None:
    """The sources that a step reads."""
    if isinstance(step, Gather):
        return step.entry.storage.source
    return step.source if isinstance(step, (Copy, Cast)) else None


def balanced(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The names of what has these sizes, in so many shares: the largest first, always to the share that has least."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, number = loads[0]
        shares[number].append(name)
        heapq.heapreplace(loads, (load + sizes[name], number))
    return shares


# What a plan is.


def identity_of(plan: Plan, files: Mapping[str, Source], options: Mapping[str, str]) -> PlanIdentity:
    """The inputs of the plan.

    Args:
        plan: of the index.
        files: the source's, by name.
        options: those that change the output, as text.

    Raises:
        CkptkitError: a file cannot be read.
    """
    return {
        "ckptkit": __version__,
        "source": {name: {"nbytes": file.size, "sample": _sample(file)} for name, file in sorted(files.items())},
        "options": dict(sorted(options.items())),
        "steps": _steps_digest(plan, files),
    }


def _sample(file: Source) -> str:
    digest = sha256()
    if file.is_far and isinstance(file.identity, str):  # an ETag is the same for all who ask
        digest.update(file.identity.encode())
        return digest.hexdigest()
    size, end = file.size, _END_NBYTES
    wanted = [(0, size)]
    if size > 2 * end:
        step = max(1, (size - 2 * end) // _SAMPLES)
        inside = () if file.is_far else range(end, size - end - _SAMPLE_NBYTES, step)
        wanted = [(0, end), *((at, _SAMPLE_NBYTES) for at in inside), (size - end, end)]
    for data in file.ranges(wanted):
        digest.update(data)
    return digest.hexdigest()


def modified_of(files: Mapping[str, Source]) -> dict[str, str]:
    """When files of the source on a disk were last written to, by name; a sample does not show every difference."""
    found = {}
    for name, file in files.items():
        stamp: Any = file.identity
        if isinstance(stamp, tuple) and not file.is_far:  # of a file, or of each in a folder
            found[name] = ",".join(str(each[-1]) for each in (stamp if isinstance(stamp[0], tuple) else (stamp,)))
    return found


def _steps_digest(plan: Plan, files: Mapping[str, Source]) -> str:
    names = {id(file): name for name, file in files.items()}
    digest = sha256()
    for name, each in (*plan.shards.items(), ("", plan)):
        digest.update(f"{name!r} {each.format} {each.nbytes} {len(each.steps)}\n".encode("utf-8", "surrogatepass"))
        fields = late_fields(each)
        for step in each.steps:
            digest.update(f"{type(step).__name__} {step.target} {step.nbytes}".encode())
            if isinstance(step, LiteralBytes):
                digest.update(_without(fields, bytearray(step.data), step.target))
            elif (source := _source_of(step)) is not None:
                at = source.offset if isinstance(source, ByteRange) else 0
                of = ",".join(names.get(id(file), os.path.basename(file.path)) for file in files_of(source))
                digest.update(f" {at} {source.nbytes} {of}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def late_fields(plan: Plan) -> list[tuple[int, int]]:
    """The fields of a file, position and size in bytes, that are filled in at the end: digests, checksums over them."""
    digests = [step for step in plan.steps if isinstance(step, Digest)]
    literals = {step.target for step in plan.steps if isinstance(step, LiteralBytes)}
    over = [step for step in plan.steps if isinstance(step, Checksum) and step.start in literals and digests]
    fields: list[Step] = [*digests, *over]
    return sorted((step.target, step.nbytes) for step in fields)


def _without(fields: Iterable[tuple[int, int]], data: bytearray, start: int) -> bytearray:
    """Bytes that begin at a position of a file, with zeros in these fields."""
    for target, nbytes in fields:
        first, last = max(target - start, 0), min(target - start + nbytes, len(data))
        if first < last:
            data[first:last] = bytes(last - first)
    return data


def shard_digest(path: str, plan: Plan) -> str:
    """The SHA-256 of a shard, as records have it.

    Args:
        path: the file.
        plan: of it.

    Raises:
        CkptkitError: it cannot be read.
    """
    fields, digest = late_fields(plan), sha256()
    with contextlib.closing(SourceFile(path)) as file:
        for start in range(0, file.size, _CHUNK_NBYTES):
            data = file.read(start, min(_CHUNK_NBYTES, file.size - start))
            met = [field for field in fields if field[0] < start + len(data) and sum(field) > start]
            digest.update(_without(met, bytearray(data), start) if met else data)
    return digest.hexdigest()


def differences(ours: PlanIdentity, theirs: PlanIdentity) -> Iterator[str]:
    """In what two plans differ, ours first; nothing: they are the same."""
    if ours["ckptkit"] != theirs["ckptkit"]:
        yield f"ckptkit {theirs['ckptkit']} wrote it, but this is {ours['ckptkit']}: use one version on all machines"
    here, there = ours["source"], theirs["source"]
    for name in sorted({*here, *there}):
        if name not in here or name not in there:
            yield f"the source's file {name} is missing {'here' if name not in here else 'for it'}"
        elif here[name]["nbytes"] != there[name]["nbytes"]:
            yield f"the source's file {name} had {there[name]['nbytes']:,} bytes and now has {here[name]['nbytes']:,}"
        elif here[name] != there[name]:
            yield f"the source's file {name} has different content"
    asked, known = ours["options"], theirs["options"]
    for name in sorted({*asked, *known}):
        if asked.get(name) != known.get(name):
            yield f"{name} was {known.get(name, 'not given')} and is now {asked.get(name, 'not given')}"
    if ours == {**theirs, "steps": ours["steps"]} and ours["steps"] != theirs["steps"]:
        yield "the same options made different shards from the same source"


# Records.


def tally_of(plan: Plan, records: Iterable[PartRecord]) -> Tally:
    """What conversions lost in these parts of the plan."""
    tally = Tally()
    found = sorted(each for record in records for each in record["losses"])
    if found:
        from ckptkit.casting import Losses

        conversions = _conversions(plan)
        for place, *counts in found if found[-1][0] < len(conversions) else ():
            tally.put(conversions[place], Losses(*counts))
    return tally


def _conversions(plan: Plan) -> list[DTypeConversion]:
    """Those that the plan carries out, each once, in its order."""
    found: dict[int, DTypeConversion] = {}
    for step in plan.all_steps():
        source = _source_of(step)
        if isinstance(source, ConvertedRange):
            found.setdefault(id(source.whole), source.whole)
    return list(found.values())


def losses_of(plan: Plan, tally: Tally) -> list[list[int]]:
    """The losses of conversions, in a record of the plan."""
    place = {id(conversion): number for number, conversion in enumerate(_conversions(plan))}
    counted = ((place[id(conversion)], losses) for conversion, losses in tally)
    return sorted([at, each.values, each.overflowed, each.rounded, each.underflowed] for at, each in counted)


def read_record(path: str) -> PartRecord:
    """The record of a part in a file.

    Raises:
        CorruptError: it is not one.
    """
    with contextlib.closing(SourceFile(path)) as file:
        data = file.read(0, min(file.size, _RECORD_NBYTES))
    try:
        record = json.loads(data)
        is_one = _is_record(record)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_one = False
    if not is_one:
        raise CorruptError("is not the record of a part, or is damaged; remove it and write that part again", path=path)
    return cast(PartRecord, record)


def _is_record(record: Any) -> bool:
    """Whether a JSON value is a `PartRecord`; what is not there, or is of another type, raises."""
    plan, shards, losses = record["plan"], record["shards"], record["losses"]
    numbers = [
        record["part"],
        record["of"],
        *(each["nbytes"] for each in shards.values()),
        *(n for e in losses for n in e),
    ]
    texts = [
        *(each["sample"] for each in plan["source"].values()),
        plan["ckptkit"],
        plan["steps"],
        *plan["options"].values(),
        *record["digests"].values(),
        *record["modified"].values(),
    ]
    return (
        record["schema_version"] == SCHEMA_VERSION
        and all(type(number) is int and number >= 0 for number in numbers)
        and 1 <= record["part"] <= record["of"] <= DEFAULT_LIMITS.shards
        and all(isinstance(text, str) for text in texts)
        and all(_DIGEST.fullmatch(digest) for digest in record["digests"].values())
        and all(each["sha256"] is None or _DIGEST.fullmatch(each["sha256"]) for each in shards.values())
        and all(len(each) == _LOSSES for each in losses)
    )
