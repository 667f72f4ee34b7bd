"""What the bytes of a file are used for: storages, tensors that share them, and bytes nothing uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptkit.checkpoint import Section, Storage
from ckptkit.inspection.listing import Listing, TensorRow

__all__ = ["Totals", "section_documents", "storage_document", "totals"]


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


def totals(rows: Sequence[TensorRow], several: set[int]) -> dict[str, Totals]:
    """The sums for each section that has parameters or buffers; what is tied across sections counts in each.

    Args:
        rows: every tensor of a file.
        several: the storages that several of them view, by ``id``.
    """
    counted: set[tuple[str | None, tuple[object, ...]]] = set()
    sums: dict[str, Totals] = {}
    for row in rows:
        if row.role == "unknown" or row.section is None:
            continue
        total = sums.get(row.section)
        if total is None:
            total = sums[row.section] = Totals()
        total.tensors += 1
        entry = row.tensor
        if id(entry.storage) in several and row.nbytes:
            key = (row.section, entry.view)
            if key in counted:
                continue
            counted.add(key)
        total.nbytes += row.nbytes
        if row.role == "parameter":
            total.parameters += row.numel
        else:
            total.buffers += row.numel
    return sums


def section_documents(sections: Sequence[Section], sums: dict[str, Totals], size: int) -> list[dict[str, Any]]:
    """The elements of the document's ``sections``; parameters and buffers are ``None`` for what is no weights."""
    documents = []
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


def storage_document(listing: Listing) -> dict[str, int]:
    """``storages``, their ``nbytes``, and how tensors use them.

    ``unique_tensor_nbytes`` are the bytes of all tensors, tied ones once; ``tied`` tensors stand under another
    name too; ``shared`` tensors are different views of a storage that others view; ``unused_nbytes`` belong to
    storages but to no tensor.
    """
    several = listing.several
    storages: dict[int, Storage] = {id(storage): storage for storage in listing.bare}
    used_whole = set(storages)
    extents: dict[int, list[tuple[int, int]]] = {}
    views: dict[int, set[tuple[object, ...]]] = {}
    unique = tied = 0
    for row in listing.rows:
        entry = row.tensor
        key = id(entry.storage)
        storages[key] = entry.storage
        if row.tied_to is not None:
            tied += 1
            continue
        unique += row.nbytes
        if key in several:
            views.setdefault(key, set()).add(entry.view)
        if row.nbytes == entry.storage.nbytes and 0 not in entry.stride:
            used_whole.add(key)
        elif key not in used_whole:
            extents.setdefault(key, []).append(entry.span())
    unused = 0
    for key, spans in extents.items():
        if key not in used_whole:
            covered = end = 0
            for start, stop in sorted(spans):
                covered += max(0, stop - max(start, end))
                end = max(end, stop)
            unused += storages[key].nbytes - covered
    return {
        "storages": len(storages),
        "nbytes": sum(storage.nbytes for storage in storages.values()),
        "unique_tensor_nbytes": unique,
        "tied": tied,
        "shared": sum(len(seen) for seen in views.values() if len(seen) > 1),
        "unused_nbytes": unused,
    }
