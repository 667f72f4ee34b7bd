"""Tells in a line which known model a file looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptkit.cli.options import printable

__all__ = ["architecture_line"]

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
