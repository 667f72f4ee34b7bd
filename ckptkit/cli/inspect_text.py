"""Renders the inspect document: text for a terminal, markdown, and flat lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptkit.cli.options import Style, columns, printable
from ckptkit.report import human_size

__all__ = ["flat", "markdown", "text"]

_STATS = ("min", "max", "mean", "std", "zeros", "nan", "inf")
_COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}
_MAX_SCALARS_SHOWN = 24


def text(document: dict[str, Any], style: Style, *, depth: int, stats: bool) -> Iterator[str]:
    """The lines of the text output."""
    yield _headline(document, style)
    if document["sections"]:
        yield ""
        yield from columns(_section_rows(document), ["", "section", "kind", "tensors", "bytes", "share"], "lllrrr")
    yield from _weights_line(document, style)
    if stats:
        yield ""
        rows = [
            [_full_name(t, document), t["dtype"], *(_figure(t["stats"][k]) for k in _STATS)]
            for t in document["tensors"]
        ]
        yield from columns(rows, ["tensor", "dtype", *_STATS], "ll" + "r" * len(_STATS))
    elif document["tensors"]:
        yield ""
        yield from columns(list(_tree_rows(document, depth)), ["tensors of", "", "elements", "bytes", "dtype"], "lrrrl")
    yield from _scalars(document, style)
    if document["findings"]:
        yield ""
    for finding in document["findings"]:
        severity = finding["severity"]
        label = style(severity, fg=_COLORS[severity], bold=severity == "error")
        yield f"{label}: {printable(finding['message'])} [{finding['code']}]"
        if finding["fix"]:
            yield f"    {printable(finding['fix'])}"


def markdown(document: dict[str, Any]) -> Iterator[str]:
    """The lines of the markdown output: a heading and tables."""
    from tabulate import tabulate  # a fifth of the start-up time, and only needed here

    yield f"## `{printable(document['path'])}`"
    yield ""
    yield f"{_facts(document)}"
    if document["sections"]:
        yield ""
        rows = [[_code(cell) if i == 1 else cell for i, cell in enumerate(row)] for row in _section_rows(document)]
        yield tabulate(rows, ["", "section", "kind", "tensors", "bytes", "share"], "github", disable_numparse=True)
    if document["tensors"]:
        yield ""
        headers = ["tensor", "dtype", "shape", "bytes", "device"]
        extra = _STATS if "stats" in document["tensors"][0] else ()
        rows = [
            [_code(_full_name(t, document)), t["dtype"], _shape(t), human_size(t["nbytes"]), t["location"]]
            + [_figure(t["stats"][key]) for key in extra]
            for t in document["tensors"]
        ]
        yield tabulate(rows, [*headers, *extra], "github", disable_numparse=True)
    if document["findings"]:
        yield ""
        for finding in document["findings"]:
            fix = f" Fix: `{printable(finding['fix'])}`" if finding["fix"] else ""
            yield f"- **{finding['severity']}** `{finding['code']}`: {printable(finding['message'])}.{fix}"


def flat(document: dict[str, Any]) -> Iterator[str]:
    """One line a tensor: name, dtype, shape, bytes, device, section, then statistics where asked for."""
    for t in document["tensors"]:
        fields = [printable(t["name"]), t["dtype"], _shape(t), str(t["nbytes"]), t["location"], printable(t["section"])]
        if "stats" in t:
            fields += [f"{key}={_figure(t['stats'][key])}" for key in _STATS]
        yield "\t".join(fields)


def _headline(document: dict[str, Any], style: Style) -> str:
    return f"{style(printable(document['path']), bold=True)}: {_facts(document)}"


def _facts(document: dict[str, Any]) -> str:
    locations = sorted({t["location"] for t in document["tensors"]})
    shown = ", ".join(printable(location) for location in locations[:4]) + (", ..." if len(locations) > 4 else "")
    saved = f", saved on {shown}" if locations else ""
    trust = {"safe": "safe", "needs_trust": "needs trust", "hostile": "HOSTILE"}[document["trust"]]
    facts = f"{document['format']}, {document['kind'].replace('_', ' ')}, {human_size(document['size'])}"
    return facts if document["format"] == "safetensors" else f"{facts}{saved}, pickle {trust}"


def _section_rows(document: dict[str, Any]) -> list[list[str]]:
    size = max(document["size"], 1)
    return [
        [
            "*" if section["selected"] else "",
            printable(section["path"]) or "(whole file)",
            section["kind"].replace("_", " "),
            f"{section['tensors']:,}",
            human_size(section["nbytes"]),
            f"{section['nbytes'] / size:.1%}",
        ]
        for section in document["sections"]
    ]


def _weights_line(document: dict[str, Any], style: Style) -> Iterator[str]:
    summary = document["state_dict"]
    if summary is None:
        return
    inferred = any(t["role_inferred"] for t in document["tensors"])
    yield ""
    yield (
        f"{style('weights', bold=True)}: {summary['tensors']:,} tensors, {summary['parameters']:,} parameters, "
        f"{summary['buffers']:,} in buffers{' (told apart by name and dtype)' if inferred else ''}, "
        f"{human_size(summary['nbytes'])}"
    )


def _tree_rows(document: dict[str, Any], depth: int) -> Iterator[list[str]]:
    """Modules with totals, ``depth`` levels below the last one that all names share."""
    summary = document["state_dict"]
    classes = {module["path"]: module["class"] for module in document["modules"]}
    chosen = [t for t in document["tensors"] if summary is None or t["section"] == summary["path"]]
    names = [_full_name(t, document).split(".") for t in chosen]
    common = 0
    while names and all(len(n) > common + 1 and n[common] == names[0][common] for n in names):
        common += 1
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for segments, t in zip(names, chosen, strict=True):
        for level in range(1, min(len(segments), common + depth) + 1):
            groups.setdefault(tuple(segments[:level]), []).append(t)
    if len(names) > 1:
        yield _tree_row("(all)", chosen, classes.get("", ""))
    for path, members in groups.items():
        if len(path) < common:
            continue
        label = ".".join(path) if len(path) == max(common, 1) else "  " * (len(path) - common) + path[-1]
        leaf = len(members) == 1 and _full_name(members[0], document).split(".") == list(path)
        note = f"{members[0]['dtype']} {_shape(members[0])}" if leaf else classes.get(".".join(path), "")
        if leaf and members[0]["tied_to"]:
            note += f" = {printable(members[0]['tied_to'])}"
        yield _tree_row(printable(label) or "(tensor)", members, note, leaf=leaf)


def _tree_row(label: str, members: list[dict[str, Any]], note: str, *, leaf: bool = False) -> list[str]:
    unique = [t for t in members if not t["tied_to"]]
    elements = sum(_numel(t) for t in unique)
    kinds = sorted({t["dtype"] for t in members})
    dtypes = "/".join(kinds) if len(kinds) < 3 else f"{len(kinds)} dtypes"
    return [
        label,
        "" if leaf else f"{len(members):,}",
        f"{elements:,}",
        human_size(sum(t["nbytes"] for t in unique)),
        note or dtypes,
    ]


def _scalars(document: dict[str, Any], style: Style) -> Iterator[str]:
    if not document["metadata"]:
        return
    yield ""
    yield style("metadata" if document["format"] == "safetensors" else "training state", bold=True)
    items = list(document["metadata"].items())
    for key, value in items[:_MAX_SCALARS_SHOWN]:
        yield f"  {printable(str(key))}  {printable(str(value))}"
    if len(items) > _MAX_SCALARS_SHOWN:
        yield f"  and {len(items) - _MAX_SCALARS_SHOWN} more (--json shows all)"


def _full_name(t: dict[str, Any], document: dict[str, Any]) -> str:
    """The name in the state_dict; with its section where none was selected."""
    name = printable(t["name"])
    return name if document["state_dict"] is not None or not t["section"] else f"{printable(t['section'])}.{name}"


def _numel(t: dict[str, Any]) -> int:
    count = 1
    for size in t["shape"]:
        count *= size
    return count


def _shape(t: dict[str, Any]) -> str:
    return "[" + ", ".join(str(size) for size in t["shape"]) + "]"


def _figure(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _code(cell: str) -> str:
    return "`" + cell.replace("`", "'").replace("|", "\\|") + "`"
