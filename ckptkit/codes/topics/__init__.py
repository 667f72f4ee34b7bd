"""What ``ckptkit explain TOPIC`` tells: a markdown file a topic, of at most 60 lines, which anybody can read as it is.

A file's first line is ``# NAME: TITLE``.  Its prose keeps to 80 columns; a comment ``<!-- table: NAME -->`` is where a
table stands that is made from the code.  The commands in it run in the tests, in a clone, after the README's first.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["TOPICS", "topic"]

TOPICS = (
    *("trust", "formats", "sections", "converting", "names", "ties", "dtypes", "devices", "shards", "training"),
    *("guarantees", "verifying", "comparing", "manifest", "ci", "remote", "fleets", "python", "loading"),
    *("exit-codes", "shell"),
)
"""In the order in which they are listed.  No code of a finding has the name of one."""


def topic(name: str) -> tuple[str, str]:
    """The title of one of `TOPICS`, and its text with the first line, as markdown."""
    text = (Path(__file__).parent / f"{name}.md").read_text(encoding="utf-8")
    return text.partition("\n")[0].partition(": ")[2], text
