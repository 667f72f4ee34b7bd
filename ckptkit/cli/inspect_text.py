"""Renders the inspect document as text for a terminal, or as one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.cli.closing import combined_lines
from ckptkit.cli.options import COLORS, Style, View, finding_lines, printable
from ckptkit.cli.tables import Cell, bar, columns, count_cell, wrapped
from ckptkit.cli.tensor_tables import BAR, PARAMETERS, TIMES, shape, styled_table, tensor_lines
from ckptkit.formats import format_named
from ckptkit.inspection import surveyed
from ckptkit.normalize.adapters import adapter_text
from ckptkit.normalize.selection import EMBEDDINGS, KEY, earlier
from ckptkit.report import count_of, human_size, listed
from ckptkit.startup import pattern

if TYPE_CHECKING:
    from ckptkit.inspection import Survey
    from ckptkit.inspection.document import (
        ArchitectureDocument,
        InspectedFile,
        OptimizerDocument,
        QuantizationDocument,
        SchedulerDocument,
        SpreadDocument,
    )

__all__ = ["TIMES", "brief", "fact_lines", "facts", "section_table", "text", "training_lines", "what_it_is"]

_MAX_SCALARS_SHOWN = 20
_MAX_SECTIONS_SHOWN = 20
_MAX_NAMES_SHOWN = 5
_MAX_ALIKE_SHOWN = 3

_MAX_OPERATIONS = 160
"""Characters."""

_SHOWN_DIGITS = 12
"""Of a SHA-256: enough to tell files apart."""

_TELLING = frozenset({
    "arch", "architecture", "batch", "batch_size", "d_model", "data", "dataset", "dataset_type", "dropout", "epochs",
    "fp16", "hidden_size", "learning_rate", "lr", "max_epochs", "model", "model_name", "num_classes", "num_layers",
    "optimizer", "precision", "seed", "task", "weight_decay",
})  # fmt: skip
"""Arguments that are told first: what was trained on what, and how."""

_MAX_VALUE = 80
"""Characters of a scalar of the training state, on a terminal."""

_GRAVITY = {"error": 0, "warning": 1, "info": 2}

_WIDEST = (
    "-" * 12, "whole model", "9,999 tensors", Cell("999,999,999 parameters", "99.9 M"),
    "bfloat16 +1", "99.9 MB", "needs trust",
    Cell("warning: torchscript-program", "torchscript-program"),
)  # fmt: skip
"""What takes most of the fields of a file on one line, so that those of several are below one another."""

_WORD = pattern(r"[a-z]+")
_PROGRESS = frozenset({"epoch", "step", "iter", "iteration", "updates"})
"""Words in the names of values that say how far training had come; ``epochs`` and ``steps`` are settings."""

_KINDS = {
    "state_dict": "a state_dict: names and tensors, without a model around them",
    "resume": "a training checkpoint: weights, and what is needed to resume training",
    "collection": "tensors, but not the state_dict of a model",
    "other": "no tensors: only plain values or objects",
}


def text(document: InspectedFile | Survey, view: View) -> Iterator[str]:
    """The lines of one file; tensors that have statistics, or are the largest, are listed in place of the tree."""
    document = surveyed(document)
    style, width = view.style, view.width
    yield from wrapped(headline(document, style), width)
    yield from (style(line, dim=True) for line in wrapped(what_it_is(document), width))
    rows, headers, align = section_table(document, bars=width is not None)
    if rows:
        yield ""
        yield from styled_table(rows, headers, align, style, width, first=range(8, len(align)), last=(2, 5, 4, 3))
        if width is not None and len(document["sections"]) > len(rows):
            yield from (style(line, dim=True) for line in wrapped(f"  {_more_sections(document)}", width))
    lines = [(label, line) for label, line in fact_lines(document) if line]
    if lines:
        yield ""
    for label, line in lines:
        yield from wrapped(f"{style(label, bold=True)}: {line}", width)
    if document["tensors"]:
        yield ""
        yield from tensor_lines(document, view)
    for line in training_lines(document, style, None if width is None else _MAX_VALUE):
        yield from wrapped(line, width)
    if document["findings"]:
        yield ""
    yield from finding_lines(document["findings"], style, width)
    combined = [*combined_lines(document.get("combined_fix"), document["findings"], width)]
    yield from ["", style(combined[0], bold=True), *combined[1:]] if combined else ()


def brief(document: InspectedFile | Survey, view: View) -> Iterator[str]:
    """One line: path, container, kind, tensors, parameters, dtype, bytes, trust, and the most severe finding."""
    document = surveyed(document)
    weights, every = document["state_dict"], document["every_tensor"]
    main, *others = every["dtypes"] or ["-"]
    finding = next(iter(sorted(document["findings"], key=lambda each: _GRAVITY[each["severity"]])), None)
    cells = [
        printable(document["path"]),
        document["format"],
        document["kind"].replace("_", " "),
        count_of(every["tensors"], "tensor"),
        _parameters(0 if weights is None else weights["parameters"]),
        main + (f" +{len(others)}" if others else ""),
        human_size(document["size"]),
        document["trust"].replace("_", " ") if document["trust"] != "hostile" else "HOSTILE",
        "" if finding is None else Cell(f"{finding['severity']}: {finding['code']}", finding["code"]),
    ]
    widest = ["x" * view.paths, *_WIDEST]
    *lines, line = columns([cells], widest, "pllrrlrll", view.width, first=(3,), last=(1, 2, 5, 4))[1:]
    yield from lines
    before, gap, told = line.rpartition("  ")
    yield line if finding is None else before + gap + view.style(told, fg=COLORS[finding["severity"]])


def _parameters(count: int) -> str:
    cell = count_cell(count)
    return Cell(count_of(count, "parameter"), *(cell.forms if isinstance(cell, Cell) else (cell,))) if count else "-"


def headline(document: Survey, style: Style) -> str:
    """The file and what it is in a line."""
    return f"{style(printable(document['path']), bold=True)}: {facts(document)}"


def facts(document: Survey) -> str:
    """Container, kind, size, devices, writer and trust."""
    parts = [document["format"], document["kind"].replace("_", " "), human_size(document["size"])]
    holds_pickle = document["has_pickle"]
    locations = document["every_tensor"]["locations"]
    if locations and (holds_pickle or locations != ["cpu"]):
        shown = ", ".join(printable(location) for location in locations[:4])
        parts.append(f"saved on {shown}{', ...' if len(locations) > 4 else ''}")
    if document["writer"]:
        parts.append(f"written by {printable(document['writer'])}")
    if document["layout"] is not None:
        parts += _spread(document["layout"])
    trust = {"safe": "safe", "needs_trust": "needs trust", "hostile": "HOSTILE"}[document["trust"]]
    if holds_pickle or document["trust"] != "safe":
        parts.append(f"pickle {trust}" if holds_pickle else trust)
    return ", ".join(parts)


def _spread(layout: SpreadDocument) -> Iterator[str]:
    """In how many files a folder's checkpoint lies, who wrote them, and which step it is."""
    ranks = layout["world_size"]
    by = f" of {count_of(ranks, 'rank')}" if ranks is not None else ""
    yield f"{count_of(layout['files'], 'file')}{by}"
    if layout["mesh"]:
        sizes = (
            f"{size:,}" if name.isdigit() else f"{printable(name)} {size:,}" for name, size in layout["mesh"].items()
        )
        yield "mesh " + f" {TIMES} ".join(sizes)
    if layout["tag"] is not None:
        yield f"step {printable(layout['tag'])}"


def what_it_is(document: Survey) -> str:
    """A sentence for whoever meets such a file for the first time."""
    kind, rows, part = document["kind"], document["tensors"], document["part"]
    if part is not None:
        return f"{printable(part['piece']) or 'a part'} of {part['layout']}, not the whole"
    if words := format_named(document["format"]).words:
        cls = next((node["class"] for node in document["modules"]), None) or _script_class(document)
        return words.format(f" of class {printable(cls)}" if cls else "")
    if kind == "whole_model":
        cls = printable(document["modules"][0]["class"]) if document["modules"] else "unknown class"
        return f"a pickled model of class {cls}: torch.load needs its code, ckptkit does not"
    if kind == "tensor":
        every = document["every_tensor"]
        told = f" {shape(rows[0])}" if rows else ""
        return f"one tensor, {every['dtypes'][0]}{told}, without a name" if every["tensors"] == 1 else "one storage"
    if kind == "resume":
        return _what_resume_is(document)
    return _KINDS.get(kind or "", f"{kind}")


def _what_resume_is(document: Survey) -> str:
    """The same of what training is resumed from, or looks like it."""
    weights = [section for section in document["sections"] if section["parameters"] is not None]
    path = (document["state_dict"] or {"path": ""})["path"]
    if path:
        said = _KINDS["resume"]
        said = said if _is_training(document) else "weights, with settings or a description beside them"
        others = [repr(printable(section["path"])) for section in weights if not section["selected"]]
        more = f", others under {listed(others, 3)}" if others else ""
        return f"{said}; the weights are under {printable(path)!r}{more}"
    more = "; and what is needed to resume training" if _is_training(document) else ""
    return f"{count_of(len(weights), 'set')} of weights, none of which is taken as the model's{more}"


def _script_class(document: Survey) -> str | None:
    """The class of a program whose modules are not what is shown."""
    return next((value for key, value in document["metadata"].items() if _is_script_class(key)), None)


def _is_script_class(key: str) -> bool:
    return key.rpartition(".")[2] == "_script_class"


def _is_training(document: Survey) -> bool:
    """Whether anything is there that training needs to go on."""
    training, sections = document["training"], document["sections"]
    if document["state_dict"] is not None and document["state_dict"]["path"] == EMBEDDINGS:
        return False
    words = {word for key in training["scalars"] for word in _WORD.findall(str(key).lower())}
    optimized = any(section["kind"] == "optimizer" for section in sections)
    return bool(optimized or training["optimizers"] or training["schedulers"] or words & _PROGRESS)


def section_table(document: Survey, *, bars: bool = False) -> tuple[list[list[str]], list[str], str]:
    """Rows, headers and alignment of the sections; no rows where the file is one section.

    Args:
        document: of the file.
        bars: whether shares are bars too, and how many are not shown is told elsewhere.
    """
    sections = document["sections"]
    if len(sections) == 1 and not sections[0]["path"]:
        return [], [], ""
    rows = [
        [
            "*" if section["selected"] else "",
            printable(section["path"]) or "(whole file)",
            section["kind"].replace("_", " "),
            f"{section['tensors']:,}",
            "" if section["parameters"] is None else count_cell(section["parameters"]) or "0",
            "" if section["buffers"] is None else count_cell(section["buffers"]) or "0",
            human_size(section["nbytes"]),
            f"{section['share']:.1%}",
            *([bar(section["share"])] if bars else ()),
        ]
        for section in sections[:_MAX_SECTIONS_SHOWN]
    ]
    if len(sections) > _MAX_SECTIONS_SHOWN and not bars:
        rows.append(["", _more_sections(document), *[""] * 6])
    headers = ["", "section", "kind", "tensors", PARAMETERS, "buffers", "bytes", "share", *([BAR] if bars else ())]
    return rows, headers, "lnlrrrrr" + "l" * bars


def _more_sections(document: Survey) -> str:
    return f"and {len(document['sections']) - _MAX_SECTIONS_SHOWN:,} more (--json shows all)"


def fact_lines(document: Survey) -> Iterator[tuple[str, str]]:
    """The totals, each with its label; lines that have nothing to say are empty."""
    yield "weights", weights_line(document)
    yield "storage", storage_line(document)
    yield "adapter", "" if document["adapter"] is None else adapter_text(document["adapter"])
    yield "quantized", quantized_line(document["quantization"])
    yield architecture_line(document["architecture"])
    yield "names", names_line(document)
    yield "made by", receipt_line(document["metadata"])


def weights_line(document: Survey) -> str:
    """Totals of the selected weights; empty where there are none."""
    summary = document["state_dict"]
    if summary is None:
        return ""
    if not summary["tensors"]:
        return "none: it contains no named plain tensors"
    inferred = document["every_tensor"]["roles_inferred"]
    return (
        f"{count_of(summary['tensors'], 'tensor')}, {count_of(summary['parameters'], 'parameter')}, "
        f"{summary['buffers']:,} in buffers{' (inferred from name and dtype)' if inferred else ''}, "
        f"{human_size(summary['nbytes'])}"
    )


def storage_line(document: Survey) -> str:
    """What storages hold, where that is more than one tensor each; empty where it is not."""
    storage = document["storage"]
    parts = []
    if storage["tied"]:
        parts.append(f"{count_of(storage['tied'], 'tensor')} tied to another name")
    if storage["shared"]:
        parts.append(f"{storage['shared']:,} are views of shared storages")
    if storage["unused_nbytes"]:
        parts.append(f"{human_size(storage['unused_nbytes'])} that no tensor uses")
    if not parts:
        return ""
    return f"{count_of(storage['storages'], 'storage')} of {human_size(storage['nbytes'])}; {', '.join(parts)}"


def quantized_line(found: QuantizationDocument | None) -> str:
    """How the weights are quantized, and which names belong together; empty where they are not."""
    if found is None:
        return ""
    from ckptkit.normalize.quantized import quantized_text  # few files are

    return quantized_text(found)


def architecture_line(known: Sequence[ArchitectureDocument]) -> tuple[str, str]:
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
        also = "fits equally well" if others[-1]["similarity"] == best["similarity"] else "or"
        line += f" ({also}: {', '.join([*shown, *more])})"
    if best["others"]:
        line += f"; {best['others']:,} other tensor{'' if best['others'] == 1 else 's'} beside it"
    return "looks like", line


def _short(item: ArchitectureDocument, best: ArchitectureDocument) -> str:
    """The label without what it has in common with the best."""
    _, comma, changes = best["label"].partition(", ")
    return printable(item["label"].removesuffix(f"{comma}{changes}"))


def names_line(document: Survey) -> str:
    """The names in the pickle that a loader would have to trust, the dangerous first; empty where there are none."""
    order = {"dangerous": 0, "unknown": 1}
    uses = [use for use in document["globals"] if use["verdict"] in order]
    uses.sort(key=lambda use: (order[use["verdict"]], use["name"].startswith("torch.")))
    if not uses:
        return ""
    shown = []
    for use in uses[:_MAX_NAMES_SHOWN]:
        where = f" in {printable(use['where'][0])}" if use["where"] else ""
        times = f", {use['count']:,} {TIMES}" if use["count"] > 1 else ""
        danger = "DANGEROUS " if use["verdict"] == "dangerous" else ""
        shown.append(f"{danger}{printable(use['name'])}" + (f" ({where.strip()}{times})" if where or times else ""))
    told = listed([text.replace(" (, ", " (") for text in shown], _MAX_NAMES_SHOWN, total=len(uses))
    return f"{told}; ckptkit imports none of them"


def receipt_line(metadata: Mapping[str, Any]) -> str:
    """The last of the receipts (`ckptkit.conversion`); empty where there is none."""
    receipts = [receipt for receipt in earlier(metadata) if isinstance(receipt, dict)]
    if not receipts:
        return ""
    last = receipts[-1]
    text = f"ckptkit {_receipt_text(last.get('ckptkit'))} from {_receipt_text(last.get('format'))}"
    digest = last.get("sha256")
    if isinstance(digest, dict):
        text += f" of {count_of(len(digest), 'file')}"
    elif isinstance(digest, str):
        text += f", sha256 {_receipt_text(digest[:_SHOWN_DIGITS])}…"
    operations = last.get("operations")
    if isinstance(operations, list) and operations:
        listed = ", ".join(map(str, operations))
        text += f": {printable(listed[:_MAX_OPERATIONS])}{'…' if len(listed) > _MAX_OPERATIONS else ''}"
    before = len(receipts) - 1
    return text + (f"; {before:,} earlier (--json shows all under {KEY})" if before else "")


def _receipt_text(value: object) -> str:
    return printable(f"{value}"[:40]) if isinstance(value, str) else "?"


def training_lines(document: Survey, style: Style, most: int | None = _MAX_VALUE) -> Iterator[str]:
    """Optimizers, schedulers and scalars, of which so many characters are shown, with a heading."""
    training = document["training"]
    told = tuple(f"{item['path']}." for item in (*training["optimizers"], *training["schedulers"]))
    merged = {**document["metadata"], **training["scalars"]}
    merged.pop(KEY, None)  # which has a line of its own
    scalars = [(key, value) for key, value in merged.items() if value is not None and not key.startswith(told)]
    scalars = [(key, value) for key, value in scalars if not _is_script_class(key)]
    scalars.sort(key=lambda item: ("." in item[0], item[0].rpartition(".")[2] not in _TELLING))
    if not scalars and not training["optimizers"] and not training["schedulers"]:
        return
    yield ""
    title = "training state" if _is_training(document) else "settings" if any(training.values()) else "metadata"
    yield style(title, bold=True)
    for optimizer in training["optimizers"]:
        yield f"  {_path(optimizer)}  optimizer, {_looks(optimizer)}{_optimizer(optimizer)}"
    for scheduler in training["schedulers"]:
        epoch = "" if scheduler["last_epoch"] is None else f", at {scheduler['last_epoch']}"
        yield f"  {_path(scheduler)}  scheduler, {_looks(scheduler)}{epoch}{_rates(scheduler['lr'])}"
    for key, value in scalars[:_MAX_SCALARS_SHOWN]:
        shown = str(value) if most is None or len(str(value)) <= most else str(value)[:most] + "…"
        yield f"  {printable(str(key))}  {printable(shown)}"
    if len(scalars) > _MAX_SCALARS_SHOWN:
        yield f"  and {len(scalars) - _MAX_SCALARS_SHOWN} more (--json shows all)"


def _path(item: OptimizerDocument | SchedulerDocument) -> str:
    return printable(item["path"]) or "(whole file)"


def _looks(item: OptimizerDocument | SchedulerDocument) -> str:
    if item["kind"] is None:
        return "of unknown class"
    return f"looks like {item['kind']}" if item["inferred"] else printable(item["kind"])


def _optimizer(item: OptimizerDocument) -> str:
    groups = f", {item['groups']:,} parameter groups" if item["groups"] != 1 else ""
    steps = "" if item["steps"] is None else f", after {count_of(int(item['steps']), 'step')}"
    size = f", {count_of(item['tensors'], 'tensor')}, {human_size(item['nbytes'])}" if item["tensors"] else ""
    return f"{groups}{_rates(item['lr'])}{steps}{size}"


def _rates(rates: Sequence[float | str | None]) -> str:
    distinct = list(dict.fromkeys(rate for rate in rates if rate is not None))
    shown = ", ".join(f"{rate:.6g}" if isinstance(rate, (int, float)) else str(rate) for rate in distinct[:4])
    return f", lr {shown}{', …' if len(distinct) > 4 else ''}" if shown else ""
