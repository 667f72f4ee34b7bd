"""The inspect document: one file's `Checkpoint` as the JSON that ``ckptkit inspect --json`` prints.

The document is the single source of every output: text and markdown are rendered from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, NamedTuple

from ckptkit.checkpoint import Checkpoint, Section, TensorEntry, shared_storages
from ckptkit.diagnose import diagnose
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CkptkitError, FormatError
from ckptkit.modules import module_state, walk_module
from ckptkit.pickling.inert import Object, attributes, children, mapping_items
from ckptkit.sections import MAX_SECTION_DEPTH, is_plain, join, step

__all__ = ["describe", "describe_error", "tensor_role", "training_state"]

_BUFFER_NAMES = frozenset({"running_mean", "running_var", "num_batches_tracked", "position_ids", "inv_freq"})
"""Last segments of names that are buffers in the modules everybody uses."""

_MAX_SCALARS = 400
"""Scalars of the training state that are listed; argument namespaces have about a hundred."""

_MAX_TEXT = 200
"""Characters of a string scalar that are shown."""

_MAX_STEPS = 32
"""Steps of a name inside a section that are shown; what is deeper keeps the name of what is above."""

_MAX_NAME = 1000
"""Characters of a name that is made of such steps; names of a state_dict are shown whole."""

_NO_STEP: Final = object()
"""What leads to a node that has no key or index."""

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
        _tensor(item, tied_to.get(id(item)), checkpoint, stats=stats)
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
        if isinstance(value, TensorEntry) and is_plain(value):
            yield _Named(selected, name, value)
        else:
            yield from _below(value, _Place(selected, (None, name, 1), 0, None), frozenset(), seen)
    others = frozenset(section.path for section in checkpoint.sections if not section.selected)
    yield from _below(checkpoint.rest, _Place("", None, 0, ""), others, seen)


_Steps = tuple[Any, str, int] | None
"""The steps that lead to a node: those above, the last one, and how many they are.  Sharing what
is above keeps 100,000 nested lists from taking 100,000 lists of steps."""


class _Place(NamedTuple):
    section: str
    steps: _Steps
    depth: int
    path: str | None
    """Whole path from the root; ``None`` below the depth at which sections begin."""

    def name(self) -> str:
        parts: list[str] = []
        steps = self.steps
        while steps is not None:
            parts.append(steps[1])
            steps = steps[0]
        return ".".join(reversed(parts))[:_MAX_NAME] or self.section

    def below(self, key: object, sections: frozenset[str]) -> _Place:
        path = None if self.path is None or self.depth >= MAX_SECTION_DEPTH else join(self.path, key)
        if path is not None and path in sections:
            return _Place(path, None, self.depth + 1, path)
        above = 0 if self.steps is None else self.steps[2]
        steps = (self.steps, step(key), above + 1) if above < _MAX_STEPS else self.steps
        return _Place(self.section, steps, self.depth + 1, path)


def _below(root: object, place: _Place, sections: frozenset[str], seen: set[int]) -> Iterator[_Named]:
    """Every tensor at or below a node, under every name it has; what is above it is entered once.

    Of a section that is a whole model the state_dict's tensors come first, under the names they have there.
    """
    listed: dict[int, object] = {}
    stack: list[tuple[_Place, object]] = [(place, root)]
    while stack:
        place, node = stack.pop()
        if node is None or isinstance(node, (str, int, float, bytes)):
            continue
        if isinstance(node, TensorEntry) and id(node) not in listed:
            yield _Named(place.section, place.name(), node)
        if id(node) in seen:
            continue
        seen.add(id(node))
        if place.path in sections and place.steps is None and module_state(node) is not None:
            for name, value in walk_module(node):
                if isinstance(value, TensorEntry):
                    listed[id(value)] = value
                    yield _Named(place.section, name, value)
        stack.extend(
            (place if key is _NO_STEP else place.below(key, sections), child) for key, child in reversed(_steps(node))
        )


def _steps(node: object) -> list[tuple[object, object]]:
    """A node's children, each with the key or index that leads to it, or `_NO_STEP`."""
    pairs = mapping_items(node)
    if pairs is not None:
        return pairs
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, Object):
        state = attributes(node)
        given = [(_NO_STEP, part) for part in (*node.args, node.kwargs)]
        filled = state.pairs if state is not None else [(_NO_STEP, node.state)]
        return [*given, *enumerate(node.items), *node.pairs, *filled]
    return [(_NO_STEP, child) for child in children(node)]


def _ties(named: list[_Named]) -> dict[int, str]:
    """For each tensor that stands elsewhere already, by ``id`` of its item: the name it is tied to."""
    first: dict[tuple[object, ...], _Named] = {}
    tied: dict[int, str] = {}
    several = shared_storages(item.entry for item in named)
    for item in named:
        if id(item.entry.storage) in several and item.entry.nbytes:
            kept = first.setdefault(item.entry.view, item)
            if kept is not item:
                inside = kept.section == item.section or not kept.section
                tied[id(item)] = kept.name if inside else f"{kept.section}.{kept.name}"
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

    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Only these digits: there are characters that are digits and no numbers.
    return [(0, int(part)) if "0" <= part[0] <= "9" and len(part) < 19 else (1, part) for part in parts]


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
    several = shared_storages(checkpoint.state_dict.values())
    for name, entry in checkpoint.state_dict.items():
        if id(entry.storage) in several and entry.nbytes:
            if entry.view in counted:
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
        if _is_shown(value):
            scalars[step(key)] = _shown(value)
            continue
        state = attributes(value)
        inner = mapping_items(value) or (state.pairs if state is not None else [])
        scalars.update((join(step(key), name), _shown(part)) for name, part in inner if _is_named_scalar(name, part))
        if len(scalars) >= _MAX_SCALARS:
            break
    return dict(list(scalars.items())[:_MAX_SCALARS])


def _is_named_scalar(name: object, node: object) -> bool:
    return isinstance(name, str) and _is_shown(node)


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
        state = module_state(node)
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
