"""The inspect document: one file's `Checkpoint` as the JSON that ``ckptkit inspect --json`` prints.

The document is the single source of every output: text and markdown are rendered from it.

`survey` makes it with the tensors as rows (`ckptkit.inspection.listing.TensorRow`), of which a file may have 100,000;
`describe` with the tensors as the dicts they are in JSON; `json_chunks` writes what `survey` made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ckptkit.architectures import identify
from ckptkit.checkpoint import Checkpoint, GlobalUse
from ckptkit.diagnose import diagnose
from ckptkit.errors import AmbiguousError, CkptkitError, CorruptError, FormatError
from ckptkit.inspection.accounting import Totals, section_documents, storage_document, totals
from ckptkit.inspection.listing import TensorRow, list_tensors, natural_key, ordered, other_rows, storage_names, wanted
from ckptkit.inspection.module_list import list_modules
from ckptkit.inspection.training import training_document, training_state
from ckptkit.normalize.roles import tensor_role
from ckptkit.normalize.tensors import tensors_beside
from ckptkit.pickling.trust import merge_uses
from ckptkit.report import Finding

__all__ = [
    "describe",
    "describe_error",
    "json_chunks",
    "natural_key",
    "plain_document",
    "survey",
    "tensor_role",
    "training_state",
]

_ROWS_AT_A_TIME = 2000
"""Tensors whose JSON is joined before it is written."""

_MAX_PLACES = 8
"""Places listed where a name occurs in a pickle."""


def describe(
    checkpoint: Checkpoint, *, filters: Sequence[str] = (), sort: str = "file", stats: bool = False
) -> dict[str, Any]:
    """One element of the document's ``files``.

    Args:
        checkpoint: the file.
        filters: glob patterns; tensors whose name matches none are left out of ``tensors``.
        sort: ``"file"`` (file order), ``"name"`` or ``"size"`` (largest first).
        stats: whether to read the data and add ``stats`` to each tensor listed.
    """
    return plain_document(survey(checkpoint, filters=filters, sort=sort, stats=stats))


def survey(
    checkpoint: Checkpoint, *, filters: Sequence[str] = (), sort: str = "file", stats: bool = False
) -> dict[str, Any]:
    """As `describe`, with the tensors as rows."""
    beside = tensors_beside(checkpoint)
    listing = list_tensors(checkpoint, beside)
    sums = totals(listing.rows, listing.several)
    shown = [*listing.rows, *other_rows(listing)] if listing.others else listing.rows
    if filters:
        shown = [row for row in shown if wanted(row.name, filters)]
    rows = ordered(shown, sort)
    origin = checkpoint.origin
    training = training_document(checkpoint.rest, checkpoint.sections)
    damages: list[Finding] = []
    if stats:
        rows, damages = _with_stats(checkpoint, rows)
    return {
        "path": origin.path,
        "size": origin.size,
        "format": origin.format,
        "writer": origin.writer,
        "kind": origin.kind,
        "state_dict": _summary(checkpoint, sums),
        "sections": section_documents(checkpoint.sections, sums, origin.size),
        "storage": storage_document(listing),
        "tensors": rows,
        "metadata": {**checkpoint.metadata, **training_state(checkpoint.rest)},
        "training": training,
        "has_pickle": origin.has_pickle,
        "trust": checkpoint.trust,
        "globals": _globals(checkpoint.globals),
        "modules": list_modules(checkpoint.module),
        "part": None if checkpoint.part is None else asdict(checkpoint.part),
        "architecture": [architecture.to_dict() for architecture in identify(checkpoint.state_dict)],
        "findings": [finding.to_dict() for finding in (*damages, *diagnose(checkpoint, beside))],
        "error": None,
    }


def describe_error(path: str, error: CkptkitError) -> dict[str, Any]:
    """The element of ``files`` for a file that could not be read."""
    message = error.message if isinstance(error, FormatError) else str(error)
    names = _globals(merge_uses(error.globals), error.where or "") if isinstance(error, FormatError) else []
    hostile = isinstance(error, AmbiguousError) or any(name["verdict"] == "dangerous" for name in names)
    return {
        "path": path,
        "size": None,
        "format": None,
        "writer": None,
        "kind": None,
        "state_dict": None,
        "sections": [],
        "storage": None,
        "tensors": [],
        "metadata": {},
        "training": None,
        "has_pickle": None,
        "trust": "hostile" if hostile else None,
        "globals": names,
        "modules": [],
        "part": None,
        "architecture": [],
        "findings": [],
        "error": {"type": type(error).__name__, "message": message},
    }


def _globals(uses: Sequence[GlobalUse], where: str = "") -> list[dict[str, Any]]:
    """The names with their verdicts; ``where`` is the place of those that do not tell theirs."""
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


def plain_document(document: dict[str, Any]) -> dict[str, Any]:
    """What `survey` made, as JSON has it."""
    return {**document, "tensors": [row.to_dict() for row in document["tensors"]]}


def json_chunks(document: dict[str, Any]) -> Iterator[str]:
    """The JSON text of what `survey` made, on one line, a piece at a time; non-ASCII is escaped."""
    rows: list[TensorRow] = document["tensors"]
    head, tail = json.dumps({**document, "tensors": []}).split('"tensors": []', 1)
    yield f'{head}"tensors": ['
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        yield ", " * (start > 0) + ", ".join([row.to_json() for row in rows[start : start + _ROWS_AT_A_TIME]])
    yield f"]{tail}"


def _with_stats(checkpoint: Checkpoint, rows: list[TensorRow]) -> tuple[list[TensorRow], list[Finding]]:
    """The rows with the statistics of their data, of tied tensors read once; and what recorded checksums show of it."""
    from ckptkit.stats import NO_STATS, tensor_stats
    from ckptkit.transfer.checksums import Checksums, damage_text

    checksums = Checksums()
    checksums.want(row.entry.storage for row in rows if row.entry is not None)
    known: dict[tuple[object, ...], dict[str, Any]] = {}
    result = []
    for row in rows:
        if row.entry is None:
            result.append(row._replace(stats=dict(NO_STATS)))
            continue
        view = row.entry.view
        if view not in known:
            try:
                known[view] = tensor_stats(row.entry, checksums)
            except CorruptError:
                if not checksums.is_broken(row.entry.storage):
                    raise
                known[view] = dict(NO_STATS)
        result.append(row._replace(stats=known[view]))
    damages = checksums.damages()
    if not damages:
        return result, []
    message = damage_text(damages, storage_names(checkpoint))
    return result, [Finding(code="damaged", severity="error", message=message)]


def _summary(checkpoint: Checkpoint, sums: dict[str, Totals]) -> dict[str, Any] | None:
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
