"""What a command says: messages on stderr, the one command that does what its findings advise, what it went through.

The combined fix is part of the document, and is below its findings.  The summary is a line on stderr, after everything
else: how much was read or written, what was proven, how long it took.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ckptkit.cli import ending
from ckptkit.cli.tables import wrapped
from ckptkit.report import CONVERT, count_of, human_size, listed, printable, share_of

if TYPE_CHECKING:
    from ckptkit.conversion.document import ConvertFolderDocument
    from ckptkit.documents import ConvertDocument, VerifyDocument
    from ckptkit.report import CombinedFix, FindingDocument

__all__ = [
    "begin", "combined_lines", "combined_title", "converted", "elapsed", "lasted", "proven", "read", "say",
    "sum_up", "summary", "verified",
]  # fmt: skip

_LEAST_SECONDS = 0.1
"""Of a shorter time it is told that it was."""

_TENTHS_SECONDS = 9.95
"""Before that it is told in tenths how long something took."""


class _Closing:
    """What is told at the end.

    Attributes:
        summary: what the command went through, in a line.
        began: when it began (`time.monotonic`).
    """

    summary: str = ""
    began: float = 0.0


_closing = _Closing()


def combined_title(fix: CombinedFix | None, findings: Sequence[FindingDocument]) -> str | None:
    """The line above the combined fix; ``None`` if there is nothing to combine.

    Args:
        fix: of the document; saved ones may lack it.
        findings: those that advise it.
    """
    if fix is None:
        return None
    advised = [each for each in findings if (each["fix"] or "").startswith(CONVERT)]
    fixed = [each for each in advised if each["code"] in fix["codes"]]
    if len(advised) == 1 and fix["command"] == advised[0]["fix"]:
        return None
    return f"To fix {count_of(len(fixed), 'finding')}{' at once' if len(fixed) > 1 else ''}:"


def combined_lines(
    fix: CombinedFix | None, findings: Sequence[FindingDocument], width: int | None = None, indent: str = ""
) -> Iterator[str]:
    """The combined fix as text: what it is for, the command, which is never broken, and what it keeps."""
    title = combined_title(fix, findings)
    if fix is not None and title is not None:
        yield f"{indent}{title}"
        yield f"{indent}    {printable(fix['command'])}"
        yield from wrapped(f"{indent}    {printable(fix['keeps'])}", width)


def say(text: str) -> None:
    """A message on stderr, wrapped to the width of a terminal; elsewhere its lines are whole, for who searches them."""
    width = ending.message_width()
    ending.say("\n".join(part for line in text.split("\n") for part in wrapped(line, width)))


def begin() -> None:
    """A command begins."""
    _closing.summary, _closing.began = "", time.monotonic()


def summary(text: str) -> None:
    """What the command went through; it is told when all else has been (`sum_up`)."""
    _closing.summary = text


def sum_up() -> None:
    """Tell the summary on stderr, if there is one."""
    if _closing.summary:
        say(f"ckptkit: {_closing.summary}")


def elapsed() -> str:
    """How long the command has been at work, as `lasted` tells it."""
    return lasted(time.monotonic() - _closing.began)


def lasted(seconds: float) -> str:
    """A time as it follows "in": ``"under 0.1 s"``, ``"0.4 s"``, ``"2 min 5 s"``."""
    if seconds < _LEAST_SECONDS:
        return f"under {_LEAST_SECONDS} s"
    if seconds < _TENTHS_SECONDS:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def read(files: int, nbytes: int, unread: int = 0) -> str:
    """``"3 files, 144 MB, in 0.4 s; 1 could not be read"``."""
    told = f"{count_of(files, 'file')}, {human_size(nbytes)}, in {elapsed()}"
    return f"{told}; {unread:,} could not be read" if unread else told


def converted(document: ConvertDocument | ConvertFolderDocument) -> str:
    """The sizes before and after, how long it took, and what was proven; nothing where nothing was written."""
    files: Sequence[ConvertDocument]
    if "files" in document:
        every = cast("ConvertFolderDocument", document)["files"]
        files = [each for each in every if each["error"] is None and each["written"]]
    else:
        files = [document] if document["written"] and "part" not in document else []
    if not files:
        return ""
    before, after = sum(each["source_nbytes"] for each in files), sum(each["plan"]["nbytes"] for each in files)
    tensors = count_of(sum(each["plan"]["tensors"] for each in files), "tensor")
    inside = f" in {count_of(len(files), 'file')}" if "files" in document else ""
    return f"{human_size(before)} to {human_size(after)} in {elapsed()}; {tensors}{inside} {proven(files)}"


def proven(files: Sequence[ConvertDocument]) -> str:
    """What is known of outputs: whether they were compared with their sources, or with these after a cast."""
    casts = " after the cast" if any(each["casts"] for each in files) else ""
    return f"compared byte for byte{casts}" if all(each["checked"] for each in files) else "not compared"


def verified(document: VerifyDocument) -> str:
    """What was loaded, run and compared, where, and how long it took."""
    coverage, device = document["coverage"], listed(document["devices"], 8)
    has = "loaded and compared" if document["loaded"] else "found"
    parts = [f"{share_of(coverage['tensors'], coverage['of'], 'tensor')} {has}"]
    if document["passes"]:
        parts.append(f"{count_of(document['passes'], 'forward pass')} on {device} in {document['dtype']}")
    against = [each["name"] for each in document["checks"] if each["run"] and each["name"] in _COMPARING]
    parts += [f"outputs compared with {listed(map(_COMPARING.__getitem__, against), 4, last=' and ')}"] * bool(against)
    return f"{', '.join(parts)}, in {elapsed()}"


_COMPARING = {
    "behaviour": "those of other batches",
    "devices": "those of other devices",
    "golden": "the golden's",
    "against": "the other checkpoint's",
}
"""Checks that hold outputs against others, and these."""
