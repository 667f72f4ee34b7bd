"""What stands beside the weights of two checkpoints: metadata, training state, other sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ckptkit.checkpoint import Checkpoint, StateDict, TensorEntry, as_tensor
from ckptkit.differences.work import Work
from ckptkit.inspection.listing import list_tensors
from ckptkit.inspection.training import training_document
from ckptkit.pickling.inert import mapping_items

__all__ = ["header", "metadata_rows", "named_tensors", "other_sections", "section_rows", "training_rows"]

_Value = TypeVar("_Value")

_MAX_LOCATIONS = 64
"""Device tags that are listed."""


def header(checkpoint: Checkpoint) -> dict[str, Any]:
    """The file and what it is, as the document's ``a`` and ``b``."""
    origin = checkpoint.origin
    entries = checkpoint.state_dict.values()
    return {
        "path": origin.path,
        "size": origin.size,
        "format": origin.format,
        "kind": origin.kind,
        "writer": origin.writer,
        "section": origin.state_path,
        "tensors": len(checkpoint.state_dict),
        "nbytes": sum(entry.nbytes for entry in entries),
        "locations": sorted({entry.location for entry in entries})[:_MAX_LOCATIONS],
        "trust": checkpoint.trust,
    }


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The keys whose values differ."""
    keys = dict.fromkeys((*a, *b))
    return tuple(
        {"key": key, "a": a.get(key), "b": b.get(key)}
        for key in keys
        if (key in a) != (key in b) or type(a[key]) is not type(b[key]) or a[key] != b[key]
    )


def metadata_rows(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, Any], ...]:
    """The container's own strings that differ, and torch's module versions where both files have them."""
    versions = _versions(a.state_dict), _versions(b.state_dict)
    if a.state_dict.versions is None or b.state_dict.versions is None:
        versions = {}, {}
    return _rows({**a.metadata, **versions[0]}, {**b.metadata, **versions[1]})


def _versions(state_dict: StateDict) -> dict[str, Any]:
    found = {}
    for path, node in (state_dict.versions or {}).items():
        version = next((value for key, value in mapping_items(node) or [] if key == "version"), None)
        if isinstance(version, int):
            found[f"_metadata[{path!r}].version"] = version
    return found


def training_rows(a: Checkpoint, b: Checkpoint) -> tuple[dict[str, Any], ...]:
    """Scalars beside the weights, learning rates and step counts that differ."""
    return _rows(_training(a), _training(b))


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    document = training_document(checkpoint.rest, checkpoint.sections)
    found = dict(document["scalars"])
    for each in (*document["optimizers"], *document["schedulers"]):
        path = each["path"] or "(whole file)"
        facts = ("kind", "groups", "lr", "steps", "last_epoch")
        found.update({f"{path}.{fact}": each[fact] for fact in facts if each.get(fact) is not None})
    return found


def named_tensors(checkpoint: Checkpoint) -> dict[str, object]:
    """Every tensor of a file without weights, every bare storage and array, each under a name of its own."""
    listing = list_tensors(checkpoint)
    names = _Names[object]()
    for row in listing.rows:
        is_whole = not row.section or row.name == row.section
        names.add(row.name if is_whole else f"{row.section}.{row.name}", row.tensor)
    for number, storage in enumerate(listing.bare):
        names.add(f"(storage {number})", as_tensor(storage))
    for found, array in listing.arrays:
        names.add(found.path, array)
    return names.found


class _Names(Generic[_Value]):
    """Values by name, ``#2`` and so on after the names of those whose name is taken."""

    def __init__(self) -> None:
        self.found: dict[str, _Value] = {}
        self._taken: dict[str, int] = {}

    def add(self, name: str, entry: _Value) -> None:
        unique = name
        while unique in self.found:
            self._taken[name] = self._taken.get(name, 1) + 1
            unique = f"{name}#{self._taken[name]}"
        self.found[unique] = entry


def other_sections(checkpoint: Checkpoint) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of other sections, by section and name; those of none are told where they are."""
    selected = checkpoint.origin.state_path
    sections: dict[str, _Names[TensorEntry]] = {}
    for row in list_tensors(checkpoint).rows:
        if row.section is not None and row.section != selected:
            sections.setdefault(row.section, _Names()).add(row.name, row.tensor)
    return {path: names.found for path, names in sections.items()}


def section_rows(
    a: Checkpoint,
    b: Checkpoint,
    ours: Mapping[str, Mapping[str, TensorEntry]],
    theirs: Mapping[str, Mapping[str, TensorEntry]],
    work: Work,
) -> tuple[dict[str, Any], ...]:
    """One row for each part beside the weights.

    Args:
        a: the first checkpoint.
        b: the second.
        ours: what `other_sections` found in the first.
        theirs: what it found in the second.
        work: what compares.
    """
    kinds = {section.path: section.kind for section in (*b.sections, *a.sections)}
    keys = {
        (path, name): work.add(left, right[name])
        for path in ours
        if (right := theirs.get(path)) is not None
        for name, left in ours[path].items()
        if name in right and _alike(left, right[name])
    }
    work.run()
    rows = []
    for path in dict.fromkeys((*ours, *theirs)):
        left, right = ours.get(path), theirs.get(path)
        differing = None
        if left is not None and right is not None:
            equal = sum((path, name) in keys and work.same(keys[path, name]) is True for name in left)
            differing = len({*left, *right}) - equal
        rows.append(
            {
                "path": path,
                "kind": kinds.get(path, "collection"),
                "a": None if left is None else len(left),
                "b": None if right is None else len(right),
                "differing": differing,
                "equal": None if differing is None else differing == 0,
            }
        )
    return tuple(rows)


def _alike(a: TensorEntry, b: TensorEntry) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)
