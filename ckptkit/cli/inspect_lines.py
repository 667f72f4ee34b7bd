"""Tells in a line which known model a file looks like.

What a file says about its making, in a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit.cli.options import printable
from ckptkit.normalize.selection import KEY, earlier
from ckptkit.report import count_of

__all__ = ["architecture_line", "receipt_line"]

_MAX_ALIKE_SHOWN = 3


def architecture_line(known: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Which known model it is, or which are closest, after the line's label; empty where none is.

    Args:
        known: the document's ``architecture``, best first.
    """
    if not known:
        return "looks like", ""
    best, *others = known
    if not best["exact"] and not best["differs"]:
        return "closest", "; ".join(f"{printable(item['label'])} ({item['similarity']:.0%} alike)" for item in known)
    line = printable(best["label"])
    if others:
        shown = [_short(item, best) for item in others[:_MAX_ALIKE_SHOWN]]
        more = [f"{len(others) - len(shown)} more"] * (len(others) > len(shown))
        also = "fits alike" if others[-1]["similarity"] == best["similarity"] else "or"
        line += f" ({also}: {', '.join([*shown, *more])})"
    if best["others"]:
        line += f"; {best['others']:,} other tensor{'' if best['others'] == 1 else 's'} beside it"
    return "looks like", line


def _short(item: dict[str, Any], best: dict[str, Any]) -> str:
    """The label without what it has in common with the best."""
    _, comma, changes = best["label"].partition(", ")
    return printable(item["label"].removesuffix(f"{comma}{changes}"))


_MAX_OPERATIONS = 160
"""Characters."""

_SHOWN_DIGITS = 12
"""Of a SHA-256: enough to tell files apart."""


def receipt_line(metadata: Mapping[str, Any]) -> str:
    """The last of the receipts (`ckptkit.conversion`); empty where there is none."""
    receipts = [receipt for receipt in earlier(metadata) if isinstance(receipt, dict)]
    if not receipts:
        return ""
    last = receipts[-1]
    text = f"ckptkit {_shown(last.get('ckptkit'))} from {_shown(last.get('format'))}"
    digest = last.get("sha256")
    if isinstance(digest, dict):
        text += f" of {count_of(len(digest), 'file')}"
    elif isinstance(digest, str):
        text += f", sha256 {_shown(digest[:_SHOWN_DIGITS])}…"
    operations = last.get("operations")
    if isinstance(operations, list) and operations:
        listed = ", ".join(map(str, operations))
        text += f": {printable(listed[:_MAX_OPERATIONS])}{'…' if len(listed) > _MAX_OPERATIONS else ''}"
    before = len(receipts) - 1
    return text + (f"; {before:,} earlier (--json shows all under {KEY})" if before else "")


def _shown(value: object) -> str:
    return printable(f"{value}"[:40]) if isinstance(value, str) else "?"
