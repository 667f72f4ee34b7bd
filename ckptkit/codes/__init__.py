"""What ``ckptkit explain`` shows: topics, and every finding code with its meaning and how to fix it.

Codes are stable: scripts match on them.  They are listed with the commands that report them.

A topic is a markdown file in ``topics`` of at most 60 lines, which is readable as plain text.  Its first line is
``# NAME: TITLE``.  Its prose keeps to 80 columns; a comment ``<!-- table: NAME -->`` marks the place of a table that is
made from the code.  The commands in it run in the tests, in a clone, after the README's first.
"""

from __future__ import annotations

from pathlib import Path

from ckptkit.codes import of_commands, of_files, of_verification
from ckptkit.report import Explanation

__all__ = ["CODES", "TOPICS", "Explanation", "topic"]

_PARTS = (of_files.CODES, of_commands.CONVERSION, of_verification.CODES, of_commands.DIFFERENCES, of_commands.CHECKS)

CODES: dict[str, Explanation] = {code: explanation for part in _PARTS for code, explanation in part.items()}
"""By code.  No code is in two parts; a test counts them."""

TOPICS = (
    *("trust", "formats", "sections", "converting", "names", "ties", "dtypes", "devices", "shards", "training"),
    *("guarantees", "verifying", "comparing", "manifest", "ci", "remote", "fleets", "python", "loading"),
    *("exit-codes", "shell"),
)
"""In the order in which they are listed.  No code of a finding has the name of one."""


def topic(name: str) -> str:
    """The text of one of `TOPICS`, as markdown."""
    return (Path(__file__).parent / "topics" / f"{name}.md").read_text(encoding="utf-8")
