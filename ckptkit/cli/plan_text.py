"""The plan of a conversion as text: every rename, drop, cast and gather, bytes and shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ckptkit.cli.options import columns, echo, printable
from ckptkit.report import count_of, human_size

__all__ = ["show_plan"]

_WAYS = ("copies", "casts", "gathers", "literals")

_SHOWN = 10
"""Lines of each kind; ``--json`` has them all."""


def show_plan(details: Mapping[str, Any]) -> None:
    """Print what would be done."""
    plan = details["plan"]
    echo(
        f"{printable(details['destination'])}: {plan['format']}, {count_of(plan['tensors'], 'tensor')}, "
        f"{plan['nbytes']:,} bytes"
    )
    rows = [[way, f"{plan[way]['count']:,}", f"{plan[way]['nbytes']:,}"] for way in _WAYS]
    for line in columns(rows, ["moved as", "steps", "bytes"], "lrr"):
        echo(line)
    for line in _changes(details, plan):
        echo(line)
    echo("dry run: nothing was written")


def _changes(details: Mapping[str, Any], plan: Mapping[str, Any]) -> Iterator[str]:
    name = printable
    yield from _some(
        "shard",
        plan["shards"],
        lambda s: f"{name(s['name'])}  {count_of(s['tensors'], 'tensor')}, {s['nbytes']:,} bytes",
    )
    yield from _some("tied", list(plan["aliases"].items()), lambda pair: f"{name(pair[0])} = {name(pair[1])}")
    yield from _some("rename", details["renames"], lambda r: f"{name(r['from'])} -> {name(r['to'])}")
    yield from _some("drop", details["dropped"], name)
    yield from _some("cast", details["casts"], lambda c: f"{name(c['name'])}  {c['from']} -> {c['to']}")
    yield from _some("gather", details["gathered"], name)
    cut = details["compacted"]
    if cut["storages"]:
        yield f"compact: {count_of(cut['storages'], 'storage')}, {human_size(cut['nbytes'])} that no tensor views"


def _some(kind: str, items: Sequence[Any], line: Callable[[Any], str]) -> Iterator[str]:
    """A line for each of the first items, and how many more there are."""
    for item in items[:_SHOWN]:
        yield f"{kind}: {line(item)}"
    if len(items) > _SHOWN:
        yield f"{kind}: and {len(items) - _SHOWN:,} more (--json lists all)"
