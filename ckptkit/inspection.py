"""The inspect document: one file's `Checkpoint` as the JSON that ``ckptkit inspect --json`` prints.

The document is the single source of every output: text and markdown are rendered from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from ckptkit.checkpoint import Checkpoint, Section, TensorEntry
from ckptkit.diagnose import diagnose
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.pickling.inert import InertDict, Object, attributes, children, mapping_items

__all__ = ["describe", "describe_error", "tensor_role", "training_state"]

_BUFFER_NAMES = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq"})
"""Last segments of names that are buffers in the modules everybody uses."""

_MAX_SCALARS = 400
"""Scalars of the training state that are listed; argument namespaces have about a hundred."""

_MAX_TEXT = 200
"""Characters of a string scalar that are shown."""

Role = Literal["parameter", "buffer", "unknown"]


@dataclass(frozen=True, slots=True)
class _Named:
    section: str
    name: str
    entry: TensorEntry


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
    named = list(_named_tensors(checkpoint))
    tied_to = _ties(named)
    tensors = [
        _tensor(item, tied_to.get((item.section, item.name)), checkpoint, stats=stats)
        for item in _ordered([n for n in named if _wanted(n.name, filters)], sort)
    ]
    origin = checkpoint.origin
    return {
        "path": origin.path,
        "size": origin.size,
        "format": origin.format,
        "kind": origin.kind,
        "state_dict": _summary(checkpoint),
        "sections": [_section(section) for section in checkpoint.sections],
        "tensors": tensors,
        "metadata": {**checkpoint.metadata, **training_state(checkpoint.rest)},
        "trust": checkpoint.trust,
        "globals": [{"name": u.name, "verdict": u.verdict, "count": u.count} for u in checkpoint.globals],
        "modules": list(_modules(checkpoint.module)),
        "architecture": [],
        "findings": [finding.to_dict() for finding in diagnose(checkpoint)],
        "error": None,
    }


def describe_error(path: str, error: CkptkitError) -> dict[str, Any]:
    """The element of ``files`` for a file that could not be read."""
    message = error.message if isinstance(error, FormatError) else str(error)
    return {
        "path": path,
        "size": None,
        "format": None,
        "kind": None,
        "state_dict": None,
        "sections": [],
        "tensors": [],
        "metadata": {},
        "trust": None,
        "globals": [],
        "modules": [],
        "architecture": [],
        "findings": [],
        "error": {"type": type(error).__name__, "message": message},
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "path": section.path,
        "kind": section.kind,
        "tensors": section.tensors,
        "nbytes": section.nbytes,
        "selected": section.selected,
    }


# Tensors.


def _named_tensors(checkpoint: Checkpoint) -> Iterator[_Named]:
    """Every tensor with the section it lies in and its name there: the state_dict's first."""
    seen: set[int] = set()
    selected = checkpoint.origin.state_path or ""
    for name, value in checkpoint.state_dict.everything.items():
        for steps, entry in _below(value):
            seen.add(id(entry))
            yield _Named(selected, ".".join([name, *steps]), entry)
    others = [section.path for section in checkpoint.sections if not section.selected]
    for steps, entry in _below(checkpoint.rest):
        if id(entry) in seen:
            continue
        path = ".".join(steps)
        inside = [section for section in others if path == section or path.startswith(section + ".") or not section]
        section = max(inside, key=len, default="")
        yield _Named(section, path[len(section) :].lstrip(".") or section, entry)


def _below(root: object) -> Iterator[tuple[list[str], TensorEntry]]:
    """Every tensor at or below a node, with the keys that lead to it; each node is entered once."""
    seen: set[int] = set()
    stack: list[tuple[list[str], object]] = [([], root)]
    while stack:
        steps, node = stack.pop()
        if node is None or isinstance(node, (str, int, float, bytes)):
            continue
        if isinstance(node, TensorEntry):
            yield steps, node
        if id(node) in seen:
            continue
        seen.add(id(node))
        stack.extend(([*steps, step] if step else steps, child) for step, child in reversed(_steps(node)))


def _steps(node: object) -> list[tuple[str, object]]:
    """A node's children, each with the key or index that leads to it (``""``: none)."""
    pairs = mapping_items(node)
    state = attributes(node)
    if pairs is not None:
        return [(key if isinstance(key, str) else str(key)[:40], value) for key, value in pairs]
    if state is not None and isinstance(node, Object) and not node.items and not node.pairs:
        return [("", node.args), *((key if isinstance(key, str) else "?", value) for key, value in state.pairs)]
    if isinstance(node, (list, tuple)):
        return [(str(index), item) for index, item in enumerate(node)]
    return [("", child) for child in children(node)]


def _ties(named: list[_Named]) -> dict[tuple[str, str], str]:
    """For each tensor that stands elsewhere already: the name it is tied to."""
    first: dict[tuple[object, ...], str] = {}
    tied: dict[tuple[str, str], str] = {}
    for item in named:
        if item.entry.nbytes:
            kept = first.setdefault(item.entry.view, item.name)
            if kept != item.name:
                tied[item.section, item.name] = kept
    return tied


def _wanted(name: str, filters: Sequence[str]) -> bool:
    return not filters or any(fnmatchcase(name, pattern) for pattern in filters)


def _ordered(named: list[_Named], sort: str) -> list[_Named]:
    if sort == "name":
        return sorted(named, key=lambda item: (item.section, natural_key(item.name)))
    if sort == "size":
        return sorted(named, key=lambda item: -item.entry.nbytes)
    return named


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts ``layer10`` after ``layer2``."""
    import re

    return [(0, int(p)) if p.isdigit() and len(p) < 19 else (1, p) for p in re.split(r"([0-9]+)", name) if p]


def _tensor(item: _Named, tied_to: str | None, checkpoint: Checkpoint, *, stats: bool) -> dict[str, Any]:
    entry = item.entry
    in_weights = checkpoint.origin.state_path is not None and item.section == checkpoint.origin.state_path
    role, inferred = (
        tensor_role(item.name, entry, known=checkpoint.module is not None) if in_weights else ("unknown", False)
    )
    document: dict[str, Any] = {
        "section": item.section,
        "name": item.name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "stride": list(entry.stride),
        "nbytes": entry.nbytes,
        "location": entry.location,
        "storage": entry.storage.key,
        "role": role,
        "role_inferred": inferred,
        "tied_to": tied_to,
    }
    if stats:
        from ckptkit.stats import tensor_stats

        document["stats"] = tensor_stats(entry)
    return document


def tensor_role(name: str, entry: TensorEntry, *, known: bool) -> tuple[Role, bool]:
    """Parameter or buffer, and whether that is inferred.

    Args:
        name: in the state_dict.
        entry: the tensor.
        known: whether the file says it (whole models do; a state_dict saves both alike, and then
            customary names and whole-number dtypes tell buffers).
    """
    if entry.is_parameter:
        return "parameter", False
    if known:
        return "buffer", False
    is_buffer = name.rpartition(".")[2] in _BUFFER_NAMES or DTYPES[entry.dtype].kind in ("int", "bool")
    return ("buffer" if is_buffer else "parameter"), True


def _summary(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Totals of the selected weights; parameters and buffers in elements, tied tensors once."""
    if checkpoint.origin.state_path is None:
        return None
    totals = {"parameter": 0, "buffer": 0, "unknown": 0}
    nbytes = 0
    counted: set[tuple[object, ...]] = set()
    for name, entry in checkpoint.state_dict.items():
        if entry.view in counted and entry.nbytes:
            continue
        counted.add(entry.view)
        role, _ = tensor_role(name, entry, known=checkpoint.module is not None)
        totals[role] += entry.numel
        nbytes += entry.nbytes
    return {
        "path": checkpoint.origin.state_path,
        "tensors": len(checkpoint.state_dict),
        "parameters": totals["parameter"],
        "buffers": totals["buffer"],
        "nbytes": nbytes,
    }


# What is not tensors.


def training_state(rest: object) -> dict[str, Any]:
    """Scalars beside the weights: of the file's own dict, and one level into what it holds.

    ``{"epoch": 3, "args.lr": 0.1}``; long strings are cut.
    """
    scalars: dict[str, Any] = {}
    for key, value in mapping_items(rest) or []:
        if not isinstance(key, str):
            continue
        inner = attributes(value) if isinstance(value, Object) else value
        if _is_shown(value):
            scalars[key] = _shown(value)
        elif isinstance(inner, InertDict):
            scalars.update(
                (f"{key}.{name}", _shown(part))
                for name, part in inner.pairs
                if isinstance(name, str) and _is_shown(part)
            )
        if len(scalars) > _MAX_SCALARS:
            break
    return dict(list(scalars.items())[:_MAX_SCALARS])


def _is_shown(node: object) -> bool:
    return node is None or isinstance(node, (bool, int, float, str))


def _shown(node: object) -> object:
    if isinstance(node, str) and len(node) > _MAX_TEXT:
        return node[:_MAX_TEXT] + "…"
    if isinstance(node, float) and (node != node or node in (float("inf"), float("-inf"))):
        return str(node)  # JSON has no such numbers
    return node


def _modules(root: object) -> Iterator[dict[str, Any]]:
    """A whole model's modules: path, class, settings (its scalar attributes) and children's paths."""
    if root is None:
        return
    stack: list[tuple[str, object]] = [("", root)]
    while stack:
        path, node = stack.pop()
        state = attributes(node)
        if state is None or not isinstance(node, Object):
            continue
        below = [
            (f"{path}.{name}" if path else name, child)
            for name, child in mapping_items(state.get("_modules")) or []
            if isinstance(name, str) and child is not None
        ]
        yield {
            "path": path,
            "class": node.class_name,
            "settings": {
                key: _shown_setting(value)
                for key, value in state.pairs
                if isinstance(key, str) and not key.startswith("_") and key != "training" and _is_setting(value)
            },
            "children": [child_path for child_path, _ in below],
        }
        stack.extend(reversed(below))


def _is_setting(node: object) -> bool:
    return _is_shown(node) or (isinstance(node, tuple) and all(_is_shown(item) for item in node))


def _shown_setting(node: object) -> object:
    return [_shown(item) for item in node] if isinstance(node, tuple) else _shown(node)
