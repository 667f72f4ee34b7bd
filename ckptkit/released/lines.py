"""Results of a check as JSON Lines: one as it comes, for runs that resume or combine it.

A run is a first line (`CheckHead`), a line for each file (`CheckLine`) and a last line (`CheckEnd`).  One without its
last line, or with fewer files than that says, is not complete.  A file may contain several runs, one after the other:
what ``ckptkit check --json-lines >> FILE`` appends.  A line that the end of its run cut short does not count.

A result is taken over by a later run (``--resume``) where the file has the `stamp` that it had, and all else that the
result depends on (`against`) is what it was: version, policy, the manifest's record, and of a policy that needs a model
the packages that compute.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field, fields
from types import NoneType
from typing import IO, TYPE_CHECKING, Any, cast

from ckptkit.errors import FileAccessError, FormatError, MissingFileError
from ckptkit.formats import STDIN
from ckptkit.nearness import meant_file
from ckptkit.released.file_check import Task, stamp_of
from ckptkit.released.policy import Policy
from ckptkit.released.results import FileResult, Tally
from ckptkit.report import SCHEMA_VERSION
from ckptkit.startup import dataclass, sha256

if TYPE_CHECKING:
    from ckptkit.documents import CheckDocument, CheckFindingDocument
    from ckptkit.released.document import CheckEnd, CheckHead, CheckLine

__all__ = [
    "Earlier", "Stream", "digest_of", "digest_of_policy", "end_of", "line_of", "read_streams", "text_of",
]  # fmt: skip


def line_of(result: FileResult) -> CheckLine:
    """A result as a line has it."""
    return {
        **result.to_dict(),
        "findings": [finding.to_dict() for finding in result.findings],
        "seconds": round(result.seconds, 6),
        "stamp": result.stamp,
        "against": result.against,
    }


def end_of(tally: Tally, passed_over: Mapping[str, int], *, may_be_empty: bool, part: str | None) -> CheckEnd:
    """The last line, of what the results came to."""
    ok = tally.ok and bool(tally.files or may_be_empty or part)
    return {
        "ok": ok,
        "exit_code": tally.exit_code(ok),
        "verdict": tally.verdict(ok, part),
        "results": tally.files,
        "checked": tally.checked,
        "passed_over": dict(passed_over),
        "may_be_empty": may_be_empty,
    }


def text_of(line: CheckHead | CheckLine | CheckEnd) -> str:
    """A line's text; non-ASCII is escaped."""
    return json.dumps(line) + "\n"


# What a result depends on.


def digest_of(*values: object) -> str:
    """A digest of values as JSON has them."""
    text = json.dumps(values, sort_keys=True, default=str)
    return "sha256:" + sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_policy(policy: Policy) -> str:
    """A digest of what a policy says, of the files that it names and, where a model is needed, of what computes."""
    said = {each.name: getattr(policy, each.name) for each in fields(policy)}
    files = [policy.tp_rules, *([policy.fits.rpartition(":")[0]] if policy.fits is not None else [])]
    contents = [_content_digest(file) for file in files if file is not None and os.path.isfile(file)]
    packages = _packages(policy.fits) if policy.needs_model else {}
    return digest_of(said, policy.every_pickle, contents, packages)


def _content_digest(file: str) -> str | None:
    try:
        with open(file, "rb") as stream:  # noqa: PTH123 - no checkpoint
            return sha256(stream.read()).hexdigest()
    except OSError:
        return None


def _packages(reference: str | None) -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {}
    for name in ("torch", "torchvision", (reference or "").partition(":")[0].partition(".")[0]):
        try:
            found[name] = version(name) if name else None
        except (PackageNotFoundError, ValueError):
            found[name] = None
    return found


# Reading.

_HEAD = b'{"schema_version": 1, "ckptkit": "'
"""How a first line begins."""


@dataclass(slots=True, kw_only=True)
class Stream:
    """One run, as far as a file holds it.

    Attributes:
        file: the file.
        head: its first line; ``None``: it is a JSON document, which does not say as much.
        part: the share of the files that it is of; ``None``: all.
        results: those that can be read.
        end: its last line; ``None``: it was cut short.
    """

    file: str
    head: CheckHead | None = None
    part: str | None = None
    results: list[FileResult] = field(default_factory=list)
    end: CheckEnd | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it has reported on all files."""
        return self.end is not None and self.end["results"] == len(self.results)


def read_streams(file: str) -> Iterator[Stream]:
    """The runs that a file holds: JSON Lines, or one JSON document of ``ckptkit check --json``.

    Args:
        file: its path; ``"-"``: standard input.

    Raises:
        MissingFileError, FileAccessError: it cannot be read.
        FormatError: it is neither.
    """
    with _opened(file) as stream:
        first = stream.readline()
        document = _parsed(first) if first.strip() != b"{" else _parsed(first + stream.read())
        if document is not None and ("files" in document or "error" in document):
            yield _stream_of(cast("CheckDocument", document), file)
            return
        found = None
        for line in (document, *map(_parsed, stream)):
            if line is None:
                continue
            if "run" in line and "ckptkit" in line:
                if found is not None:
                    yield found
                found = Stream(file=file, head=_sound(line, file), part=line["part"])
            elif found is None:
                continue
            elif "verdict" in line:
                found.end = cast("CheckEnd", line)
            elif found.end is None and (result := _result(line)) is not None:
                found.results.append(result)
        if found is None:
            raise FormatError(
                "contains no results of ckptkit check: it was not written by --json-lines or --json", path=file
            )
        yield found


def _sound(line: dict[str, Any], file: str) -> CheckHead:
    """A first line.

    Raises:
        FormatError: it does not say what it must.
    """
    texts = [line.get(name) for name in ("run", "started", "ckptkit", "policy")]
    if (
        line.get("schema_version") != SCHEMA_VERSION
        or not all(isinstance(text, str) for text in texts)
        or not isinstance(line.get("resumed"), int)
        or not isinstance(line.get("part"), (str, NoneType))
    ):
        raise FormatError(
            "was written by a version of ckptkit that this one does not understand; use that version", path=file
        )
    return cast("CheckHead", line)


def _stream_of(document: CheckDocument, file: str) -> Stream:
    """A JSON document as a run."""
    stream = Stream(file=file, part=document.get("part"))
    if "error" in document:
        return stream
    findings: dict[str, list[CheckFindingDocument]] = {}
    for finding in document["findings"]:
        findings.setdefault(finding["path"], []).append(finding)
    tally = Tally()
    try:
        for each in document["files"]:
            result = FileResult.from_dict(each, findings.pop(each["path"], []))
            stream.results.append(result)
            tally.add(result)
        may_be_empty = document["ok"] and not document["files"] and stream.part is None
        if not findings:
            stream.end = end_of(tally, document["passed_over"], may_be_empty=may_be_empty, part=stream.part)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"is not a document of ckptkit check: {error}", path=file) from None
    return stream


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line's value; ``None``: it is empty, or was cut short."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _result(line: Mapping[str, Any]) -> FileResult | None:
    try:
        others = {"seconds": float(line["seconds"]), "stamp": line["stamp"], "against": line["against"]}
        return FileResult.from_dict(cast("CheckLine", line), line["findings"], **others)
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def _opened(file: str) -> Iterator[IO[bytes]]:
    """A file of results.

    Raises:
        MissingFileError, FileAccessError: it cannot be read.
    """
    if file == STDIN:
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb")  # noqa: PTH123, SIM115 - no checkpoint; closed below
    except FileNotFoundError:
        raise MissingFileError(f"{file}: no such file{meant_file(file)}", path=file) from None
    except OSError as error:
        raise FileAccessError(f"{file}: cannot be read: {error.strerror or error}", path=file) from error
    with stream:
        yield stream


class Earlier:
    """The results of an earlier run, each read when it is asked for.

    Args:
        file: its JSON Lines; what is appended to it from now on is not looked at.

    Raises:
        MissingFileError, FileAccessError: it cannot be read.
        FormatError: it holds something else.
    """

    def __init__(self, file: str) -> None:
        self.run: str | None = None
        self.resumed = 0
        self._file = file
        self._places: dict[str, int] = {}
        """Where the last line about each path begins."""
        offset = 0
        with _opened(file) as stream:
            for line in stream:
                found = _parsed(line)
                if found is not None and "run" in found and "ckptkit" in found:
                    head = _sound(found, file)
                    self.run, self.resumed = head["run"], head["resumed"] + 1
                elif self.run is None and line.strip() and not _HEAD.startswith(line.strip()[: len(_HEAD)]):
                    told = "contains no results that a check can resume from; --json-lines writes them"
                    raise FormatError(told, path=file)
                elif found is not None and isinstance(found.get("path"), str):
                    self._places[found["path"]] = offset
                offset += len(line)

    def kept(self, tasks: list[Task]) -> Iterator[tuple[Task, bool]]:
        """Each task, and whether its result can be taken over."""
        with _opened(self._file) as stream:
            for task in tasks:
                yield task, self._is_same(task, stream)

    def _is_same(self, task: Task, stream: IO[bytes]) -> bool:
        result = self._read(task.path, stream)
        if result is None or result.stamp is None or result.against != task.against or result.against is None:
            return False
        return result.stamp == stamp_of(task.path)

    def results(self, paths: list[str]) -> Iterator[FileResult]:
        """The results of these paths, which are among those that can be taken over."""
        with _opened(self._file) as stream:
            for path in paths:
                result = self._read(path, stream)
                if result is None:
                    raise FileAccessError(f"{self._file}: was changed while it was being read", path=self._file)
                yield result

    def _read(self, path: str, stream: IO[bytes]) -> FileResult | None:
        if path not in self._places:
            return None
        stream.seek(self._places[path])
        line = _parsed(stream.readline())
        return _result(line) if line is not None and line.get("path") == path else None
