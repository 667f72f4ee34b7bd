"""What a command says last: the one command that does what its findings advise, and what it went through.

The combined fix is part of the document, and is below its findings.  The summary is a line on stderr, after everything
else: how much was read or written, what was proven, how long it took.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckptkit.cli.tables import wrapped
from ckptkit.report import CONVERT, count_of, printable

if TYPE_CHECKING:
    from ckptkit.report import CombinedFix, FindingDocument

__all__ = ["combined_lines", "combined_title"]


def combined_title(fix: CombinedFix | None, findings: Sequence[FindingDocument]) -> str | None:
    """What is above the combined fix; ``None``: it is the only fix there is, or there is none.

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
