"""The inspect document: one file's `Checkpoint` as the JSON that ``ckptkit inspect --json`` prints.

The document is the single source of every output: text and markdown are rendered from it.
`ckptkit.inspection.document` explains its fields.

`survey` makes it with the tensors as rows (`ckptkit.inspection.listing.TensorRow`), of which a file may have 100,000;
`describe` makes it with the tensors as dicts, as in JSON; `json_chunks` writes the result of `survey`, and `surveyed`
reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from ckptkit import places
from ckptkit.architectures import Architecture, identify
from ckptkit.checkpoint import STATE_DICT, Checkpoint, GlobalUse, Part, Section, Spread, Storage
from ckptkit.diagnose import diagnose, everything_in, hostile_finding
from ckptkit.errors import AmbiguousError, CkptkitError, CorruptError, FormatError
from ckptkit.formats import judged
from ckptkit.inspection.listing import (
    Listing,
    Rows,
    TensorRow,
    every_tensor,
    list_tensors,
    natural_key,
    ordered,
    other_rows,
    rows_of,
    wanted,
)
from ckptkit.inspection.state import list_modules, training_document, training_state
from ckptkit.normalize.adapters import adapter_in
from ckptkit.normalize.modules import tensor_role, unwrapped, wrapper_of
from ckptkit.normalize.selection import BESIDE, other_parts
from ckptkit.normalize.tensors import FoundTensor, other_tensors, storage_names
from ckptkit.pickling.inert import InertDict
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import CONVERT, Finding, count_of, human_size, listed
from ckptkit.tensor import unused_nbytes

if TYPE_CHECKING:
    from ckptkit.inspection.document import (
        ArchitectureDocument,
        GlobalDocument,
        InspectedFile,
        PartDocument,
        SectionDocument,
        SpreadDocument,
        StatsDocument,
        StorageDocument,
        UnreadFile,
        WeightsDocument,
    )
    from ckptkit.inspection.listing import Survey as Survey
    from ckptkit.report import CombinedFix

__all__ = [
    "Totals",
    "describe",
    "describe_error",
    "html_screen",
    "json_chunks",
    "natural_key",
    "plain_document",
    "section_documents",
    "storage_document",
    "survey",
    "surveyed",
    "tensor_role",
    "totals",
    "training_state",
]

_ROWS_AT_A_TIME = 2000
"""Tensors whose JSON is joined before it is written."""

_MAX_PLACES = 8
"""Places listed where a name occurs in a pickle."""

_MAX_TREE = 40
"""Lines of a tree whose top level is more than a notebook folds."""


def describe(
    checkpoint: Checkpoint, *, filters: Sequence[str] = (), sort: str = "file", stats: bool = False
) -> InspectedFile:
    """One element of the document's ``files``.

    Args:
        checkpoint: the file.
        filters: glob patterns; tensors whose name matches none are left out of ``tensors``.
        sort: ``"file"`` (file order), ``"name"`` or ``"size"`` (largest first).
        stats: whether to read the data and add ``stats`` to each tensor listed.
    """
    return plain_document(survey(checkpoint, filters=filters, sort=sort, stats=stats))


def survey(
    checkpoint: Checkpoint,
    *,
    filters: Sequence[str] = (),
    sort: str = "file",
    stats: bool = False,
    histograms: bool = False,
) -> Survey:
    """As `describe`, with the tensors as rows; ``histograms`` adds that of its values to the ``stats`` of each."""
    checkpoint = judged(checkpoint) if stats else checkpoint
    everything = other_tensors(checkpoint, values=True)
    listing = list_tensors(checkpoint, everything)
    beside = [found for found in everything if not found.is_value]
    sums, storage = totals(listing.rows, listing.several), storage_document(listing)
    contents = everything_in(checkpoint, beside, storage["unused_nbytes"])
    whole: Sequence[TensorRow] = [*listing.rows, *other_rows(listing)] if listing.others else listing.rows
    shown = [row for row in whole if wanted(row.name, filters)] if filters else whole
    rows = ordered(shown, sort)
    origin = checkpoint.origin
    kept = checkpoint
    if BESIDE in checkpoint.metadata:
        from ckptkit.rewrite.beside import restored  # most files have none

        kept = restored(checkpoint)
    among = InertDict(list(kept.state_dict.extra.items()) if kept is not checkpoint else [])
    training = training_document(kept.rest, checkpoint.sections)
    damages: list[Finding] = []
    if stats:
        rows, damages = _with_stats(checkpoint, rows, histograms)
    findings = (*damages, *diagnose(checkpoint, contents))
    return {
        "path": origin.path,
        "size": origin.size,
        "format": origin.format,
        "writer": origin.writer,
        "kind": origin.kind,
        "state_dict": _summary(checkpoint, sums),
        "sections": section_documents(checkpoint.sections, sums, origin.size),
        "storage": storage,
        "every_tensor": every_tensor(whole, origin.state_path),
        "tensors": rows,
        "metadata": {**kept.metadata, **training_state(kept.rest), **training_state(among)},
        "training": training,
        "has_pickle": origin.has_pickle,
        "trust": checkpoint.trust,
        "globals": _globals(checkpoint.globals),
        "modules": list_modules(checkpoint.module),
        "part": None if checkpoint.part is None else _part(checkpoint.part),
        "architecture": [_architecture(found) for found in identify(checkpoint.state_dict)],
        "adapter": adapter_in(checkpoint, contents.names),
        "quantization": contents.quantization,
        "layout": _layout(origin.spread),
        "findings": [finding.to_dict() for finding in findings],
        "combined_fix": _combined_fix(checkpoint, findings, everything),
        "error": None,
    }


_PARTLY = ("not-a-plain-tensor", "foreign-objects", "other-system")
"""Codes of findings about values among the weights, which stay there where no tensor can be made of them."""


def _combined_fix(
    checkpoint: Checkpoint, findings: Sequence[Finding], everything: Sequence[FoundTensor]
) -> CombinedFix | None:
    """The command that does what the findings advise.

    Args:
        checkpoint: as it was read.
        findings: all about it.
        everything: what `other_tensors` finds in it, values too.
    """
    if not any((finding.fix or "").startswith(CONVERT) for finding in findings):
        return None
    from ckptkit.fixes import combined_fix  # few files need one, and the others are shown sooner without

    def are_dense(values: Iterable[tuple[str, object]]) -> bool:
        from ckptkit.normalize.not_plain import can_be_dense  # the same

        return all(can_be_dense(name, value) for name, value in values)

    def needs(section: str) -> Iterator[str]:
        if section == checkpoint.origin.state_path:
            return
        inside = [found for found in everything if found.section == section]
        names = [found.name for found in inside if found.is_own]
        if any(map(wrapper_of, names)) and len(set(map(unwrapped, names))) == len(names):
            yield "--strip-module"
        values = [(found.name, found.node) for found in inside if found.is_value]
        if values and are_dense(values):
            yield "--densify"

    extra = checkpoint.state_dict.extra
    return combined_fix(
        findings,
        other_parts(checkpoint),
        is_model=checkpoint.module is not None and checkpoint.rest is STATE_DICT,
        partly=() if not extra or are_dense(extra.items()) else _PARTLY,
        needs=needs,
    )


def _part(part: Part) -> PartDocument:
    return {
        "layout": part.layout,
        "piece": part.piece,
        "lacks": part.lacks,
        "instead": part.instead,
        "opens": part.opens,
    }


def _layout(spread: Spread | None) -> SpreadDocument | None:
    if spread is None:
        return None
    mesh = None if spread.mesh is None else dict(spread.mesh)
    return {"world_size": spread.world_size, "mesh": mesh, "files": spread.files, "tag": spread.tag}


def _architecture(found: Architecture) -> ArchitectureDocument:
    return {
        "reference": found.reference,
        "args": dict(found.args),
        "exact": found.exact,
        "similarity": round(found.similarity, 3),
        "prefix": found.prefix,
        "others": found.others,
        "differs": found.differs,
        "label": found.label,
    }


def describe_error(path: str, error: CkptkitError) -> UnreadFile:
    """The element of ``files`` for a file that could not be read."""
    message = error.message if isinstance(error, FormatError) else str(error)
    if isinstance(error, FormatError) and error.where and places.isdir(path):  # in which of its files
        message = f"{error.where}: {message}"
    names = _globals(merge_uses(error.globals), error.where or "") if isinstance(error, FormatError) else []
    dangerous = [name["name"] for name in names if name["verdict"] == "dangerous"]
    hostile = isinstance(error, AmbiguousError) or bool(dangerous)
    findings = [hostile_finding(name).to_dict() for name in dangerous] if error.is_hostile else []
    return {
        "path": path,
        "size": None,
        "format": None,
        "writer": None,
        "kind": None,
        "state_dict": None,
        "sections": [],
        "storage": None,
        "every_tensor": None,
        "tensors": [],
        "metadata": {},
        "training": None,
        "has_pickle": None,
        "trust": "hostile" if hostile else None,
        "globals": names,
        "modules": [],
        "part": None,
        "architecture": [],
        "adapter": None,
        "quantization": None,
        "layout": None,
        "findings": findings,
        "combined_fix": None,
        "error": {"type": type(error).__name__, "message": message},
    }


def _globals(uses: Sequence[GlobalUse], where: str = "") -> list[GlobalDocument]:
    """The names with their verdicts; ``where`` is the place of those without one."""
    return [
        {
            "name": use.name,
            "verdict": use.verdict,
            "count": use.count,
            "where": [*use.where[:_MAX_PLACES]] or [where] * bool(where),
            "reason": use.reason,
        }
        for use in uses
    ]


def plain_document(document: Survey) -> InspectedFile:
    """What `survey` made, as JSON has it."""
    return {**document, "tensors": [row.to_dict() for row in document["tensors"]]}


def surveyed(document: InspectedFile | Survey) -> Survey:
    """The same as `survey` made it, where it comes out of a JSON document."""
    rows, weights = rows_of(document["tensors"]), document["state_dict"]
    every = document.get("every_tensor") or every_tensor(rows, weights and weights["path"])  # earlier ones have none
    return {**document, "tensors": rows, "every_tensor": every}


def html_screen(checkpoint: Checkpoint) -> str:
    """For notebooks: what a checkpoint is, its findings, and the head of the module tree."""
    from ckptkit.display import MOST_LINES, TreeLine, html_block
    from ckptkit.inspection.outline import outline_of
    from ckptkit.normalize.adapters import adapter_text

    document = survey(checkpoint)
    weights, adapter, quantization = document["state_dict"], document["adapter"], document["quantization"]
    kind, trust = document["kind"].replace("_", " "), document["trust"].replace("_", " ")
    lines = [f"{document['format']}, {kind}, {human_size(document['size'])}, {trust}"]
    if weights is not None:
        counts = f"{count_of(weights['parameters'], 'parameter')}, {weights['buffers']:,} in buffers"
        lines.append(f"{count_of(weights['tensors'], 'tensor')}, {counts}, {human_size(weights['nbytes'])}")
    if len(document["sections"]) > 1:
        paths = [f"{section['path']!r:.60}" + " (selected)" * section["selected"] for section in document["sections"]]
        lines.append(f"sections: {listed(paths, _MAX_PLACES)}")
    if adapter is not None:
        lines.append(adapter_text(adapter))
    if quantization is not None:
        from ckptkit.normalize.quantized import quantized_text

        lines.append(quantized_text(quantization))
    found = document["findings"]
    for each in found[:_MAX_PLACES]:
        lines += [f"{each['severity']}: {each['message']} [{each['code']}]"]
        lines += [f"    fix: {each['fix']}"] if each["fix"] else []
    lines += [f"and {count_of(len(found) - _MAX_PLACES, 'more finding')}"] * (len(found) > _MAX_PLACES)
    tree, left_out = outline_of(document, most=MOST_LINES) if document["tensors"] else ([], 0)
    left_out += len(tree[_MAX_TREE:]) if left_out else 0
    rows = [
        TreeLine(
            line.level,
            (line.label or "(tensor)") + f"  {line.copies:,} x" * (line.copies > 1),
            0 if line.is_tensor else line.tensors,
            line.parameters + line.buffers + line.others,
            line.nbytes,
            line.note,
        )
        for line in (tree[:_MAX_TREE] if left_out else tree)
    ]
    state = next((each for each in ("error", "warning") if any(f["severity"] == each for f in found)), "ok")
    return html_block(document["path"], lines, state=state, tree=rows, tree_left_out=left_out)


def json_chunks(document: Survey | UnreadFile) -> Iterator[str]:
    """The JSON text of what `survey` or `describe_error` made, on one line, a piece at a time; non-ASCII is escaped."""
    rows = document["tensors"]
    head, tail = json.dumps({**document, "tensors": []}).split('"tensors": []', 1)
    yield f'{head}"tensors": ['
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        texts = rows.to_json(part) if isinstance(rows, Rows) else [row.to_json() for row in rows[part]]
        yield ", " * (start > 0) + ", ".join(texts)
    yield f"]{tail}"


def _with_stats(
    checkpoint: Checkpoint, rows: Sequence[TensorRow], histograms: bool
) -> tuple[list[TensorRow], list[Finding]]:
    """The rows with the statistics of their data, of tied tensors read once; and what recorded checksums show of it."""
    from ckptkit.computed import files_of
    from ckptkit.stats import NO_STATS, Histogram, tensor_stats
    from ckptkit.transfer.checksums import Checksums, damage_text
    from ckptkit.transfer.values import will_read

    checksums = Checksums()
    checksums.want(row.entry.storage for row in rows if row.entry is not None)
    will_read((row.entry for row in rows if row.entry is not None), checksums.along_file)
    known: dict[tuple[object, ...], StatsDocument] = {}
    nothing = cast("StatsDocument", NO_STATS)
    result = []
    for row in rows:
        if row.entry is None:
            result.append(row._replace(stats=nothing.copy()))
            continue
        view = row.entry.view
        if view not in known:
            try:
                bins = Histogram(row.entry.dtype) if histograms else None
                known[view] = cast("StatsDocument", tensor_stats(row.entry, checksums, bins))
                if bins is not None:
                    known[view]["histogram"] = bins.to_list()
            except CorruptError:
                if not checksums.is_broken(row.entry.storage):
                    raise
                known[view] = nothing.copy()
        result.append(row._replace(stats=known[view]))
    damages = checksums.damages()
    for file in {id(file): file for row in rows if row.entry for file in files_of(row.entry.storage.source)}.values():
        file.settle()
    if not damages:
        return result, []
    message = damage_text(damages, storage_names(checkpoint))
    return result, [Finding(code="damaged", severity="error", message=message)]


def _summary(checkpoint: Checkpoint, sums: dict[str, Totals]) -> WeightsDocument | None:
    """Totals of the selected weights; parameters and buffers in elements, tied tensors once."""
    path = checkpoint.origin.state_path
    if path is None:
        return None
    total = sums.get(path) or Totals()
    return {
        "path": path,
        "tensors": len(checkpoint.state_dict),
        "parameters": total.parameters,
        "buffers": total.buffers,
        "nbytes": total.nbytes,
    }


class Totals:
    """Sums over the parameters and buffers of a section, tied ones counted once.

    Attributes:
        tensors: names, tied ones too.
        parameters, buffers: elements.
        nbytes: bytes.
    """

    __slots__ = ("buffers", "nbytes", "parameters", "tensors")

    def __init__(self) -> None:
        self.tensors = self.parameters = self.buffers = self.nbytes = 0


def totals(rows: Rows, several: set[int]) -> dict[str, Totals]:
    """The sums for each section that has parameters or buffers; what is tied across sections counts in each.

    Args:
        rows: every tensor of a file.
        several: the storages that several of them view, by ``id``.
    """
    sums: dict[str, Totals] = {}

    def count(row: TensorRow, times: int) -> None:
        total = sums.setdefault(row.section or "", Totals())
        total.nbytes += row.nbytes * times
        if row.role == "parameter":
            total.parameters += row.numel * times
        else:
            total.buffers += row.numel * times

    for kind, times in rows.counts():
        if kind.role != "unknown":
            count(kind, times)
            sums[kind.section or ""].tensors += times
    counted: set[tuple[str | None, tuple[object, ...]]] = set()
    for section, entry, number in zip(rows.sections, rows.entries, rows.kind_of, strict=True) if several else ():
        kind = rows.kinds[number]
        if kind.role != "unknown" and kind.nbytes and id(entry.storage) in several:
            if (section, entry.view) in counted:
                count(kind, -1)
            counted.add((section, entry.view))
    return sums


def section_documents(sections: Sequence[Section], sums: dict[str, Totals], size: int) -> list[SectionDocument]:
    """The elements of the document's ``sections``; parameters and buffers are ``None`` for what is not weights."""
    documents: list[SectionDocument] = []
    for section in sections:
        total = sums.get(section.path) if section.is_weights else None
        documents.append(
            {
                "path": section.path,
                "kind": section.kind,
                "tensors": section.tensors,
                "parameters": None if total is None else total.parameters,
                "buffers": None if total is None else total.buffers,
                "nbytes": section.nbytes,
                "share": round(min(section.nbytes / size, 1.0), 6) if size else 0.0,
                "selected": section.selected,
            }
        )
    return documents


def storage_document(listing: Listing) -> StorageDocument:
    """How the bytes of a file are used: storages, tensors that share them, and unused bytes."""
    rows, several, bare = listing.rows, listing.several, listing.bare
    views: dict[int, set[tuple[object, ...]]] = {}
    for at, entry in enumerate(rows.entries) if several else ():
        if id(entry.storage) in several and at not in rows.tied_to:
            views.setdefault(id(entry.storage), set()).add(entry.view)
    storages: Collection[Storage] = [*[entry.storage for entry in rows.entries], *bare]
    if several or bare:
        storages = dict(zip(map(id, storages), storages, strict=True)).values()
    # A tensor that is its whole storage leaves nothing.
    others = [entry for entry in rows.entries if id(entry.storage) in several] if several else []
    return {
        "storages": len(storages),
        "nbytes": sum([storage.nbytes for storage in storages]),
        "unique_tensor_nbytes": sum(kind.nbytes * times for kind, times in rows.counts())
        - sum(rows.kinds[rows.kind_of[at]].nbytes for at in rows.tied_to),
        "tied": len(rows.tied_to),
        "shared": sum(len(seen) for seen in views.values() if len(seen) > 1),
        "unused_nbytes": unused_nbytes([*listing.partial, *others], bare),
    }
