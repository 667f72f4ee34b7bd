"""Everything beside the weights of two checkpoints: metadata, training state, other sections.

What differs in the whole trees of two checkpoints: beside the weights, around them, and in what hangs on them.

Trees are compared part by part (`ckptkit.normalize.trees`), by their meaning: values, names of classes, keys and their
order, and every tensor, wherever it is.  Containers and devices do not count.  For a container that stores only
weights, its findings say what it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ckptkit.checkpoint import STATE_DICT, Checkpoint, StateDict, Storage, TensorEntry, as_tensor, tied_groups
from ckptkit.differences.figures import Sums, Tolerance
from ckptkit.differences.pairs import Pair, PairReader, all_sums
from ckptkit.inspection.listing import list_tensors
from ckptkit.inspection.state import training_document
from ckptkit.normalize import lower_state_dict
from ckptkit.normalize.sections import brief, is_plain_value
from ckptkit.normalize.tensors import other_tensors
from ckptkit.normalize.trees import FLAGS, Met, Place, SameContent, shown, side_by_side
from ckptkit.pickling.inert import ABSENT, holds, mapping_items, tensors_in

if TYPE_CHECKING:
    from ckptkit.differences.difference import DiffFile, ScalarRow, SectionRow, TreeRow

__all__ = [
    "TreeComparison",
    "ValueComparison",
    "header",
    "metadata_rows",
    "named_tensors",
    "other_sections",
    "section_rows",
    "training_rows",
]

_Value = TypeVar("_Value")

_MAX_LOCATIONS = 64
"""Device tags that are listed."""


def header(checkpoint: Checkpoint) -> DiffFile:
    """The file and what it is, as the document's ``a`` and ``b``."""
    origin = checkpoint.origin
    state_dict = checkpoint.state_dict
    repeated = [state_dict[name] for names in tied_groups(state_dict) for name in names[1:]]
    return {
        "path": origin.path,
        "size": origin.size,
        "format": origin.format,
        "kind": origin.kind,
        "writer": origin.writer,
        "section": origin.state_path,
        "tensors": len(state_dict),
        "nbytes": sum(entry.nbytes for entry in state_dict.values()) - sum(entry.nbytes for entry in repeated),
        "locations": sorted({entry.location for entry in state_dict.values()})[:_MAX_LOCATIONS],
        "trust": checkpoint.trust,
    }


def _rows(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[ScalarRow, ...]:
    """The keys whose values differ."""
    keys = dict.fromkeys((*a, *b))
    return tuple(
        {"key": key, "a": a.get(key), "b": b.get(key)}
        for key in keys
        if (key in a) != (key in b) or type(a[key]) is not type(b[key]) or a[key] != b[key]
    )


def metadata_rows(a: Checkpoint, b: Checkpoint) -> tuple[ScalarRow, ...]:
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


def training_rows(a: Checkpoint, b: Checkpoint) -> tuple[ScalarRow, ...]:
    """Scalars beside the weights, learning rates and step counts that differ."""
    return _rows(_training(a), _training(b))


def _training(checkpoint: Checkpoint) -> dict[str, Any]:
    document = training_document(checkpoint.rest, checkpoint.sections)
    found = dict(document["scalars"])
    states: list[Mapping[str, Any]] = [*document["optimizers"], *document["schedulers"]]
    for each in states:
        path = each["path"] or "(whole file)"
        facts = ("kind", "groups", "lr", "steps", "last_epoch")
        found.update({f"{path}.{fact}": each[fact] for fact in facts if each.get(fact) is not None})
    return found


def named_tensors(checkpoint: Checkpoint) -> dict[str, object]:
    """Every tensor of a file without weights, every bare storage and array, each under its own name."""
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
    """The tensors of other sections, by section and name; tensors in no section are reported by place."""
    selected = checkpoint.origin.state_path
    sections: dict[str, _Names[TensorEntry]] = {}
    if not other_tensors(checkpoint):
        return {}
    for row in list_tensors(checkpoint).rows:
        if row.section is not None and row.section != selected:
            sections.setdefault(row.section, _Names()).add(row.name, row.tensor)
    return {path: names.found for path, names in sections.items()}


def section_rows(
    a: Checkpoint,
    b: Checkpoint,
    ours: Mapping[str, Mapping[str, TensorEntry]],
    theirs: Mapping[str, Mapping[str, TensorEntry]],
    work: PairReader,
) -> tuple[SectionRow, ...]:
    """One row for each part beside the weights.

    Args:
        a: the first checkpoint.
        b: the second.
        ours: what `other_sections` found in the first.
        theirs: the corresponding value in the second.
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
    rows: list[SectionRow] = []
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


_MOST_ROWS = 1000
"""Differences that are listed."""

_MOST_MEASURED = 100
"""Tensors whose largest difference is computed."""


class TreeComparison:
    """Two trees, processed when it is made; their tensors are read by the next run of the work.

    Args:
        a: the first checkpoint.
        b: the second.
        pairs: the weights that are compared by name, which this leaves out.
        beside: whether what is beside the weights is compared, or only what hangs on them.
        sections: the tensors of other sections, which are counted there.
        work: what compares tensors.
    """

    def __init__(
        self,
        a: Checkpoint,
        b: Checkpoint,
        pairs: Sequence[tuple[str, str, TensorEntry, TensorEntry]],
        *,
        beside: bool,
        sections: Iterable[TensorEntry],
        work: PairReader,
    ) -> None:
        self._work = work
        self._in_sections = {id(entry) for entry in sections}
        is_alone = not (a.origin.has_pickle and b.origin.has_pickle)
        flags = not is_alone and (a.module is None) is (b.module is None)
        rule = SameContent(flags=flags)
        place = Place().below(b.origin.state_path) if b.origin.state_path else Place()
        # Where both have state_dicts the pairs are of these, and most are plain: nothing hangs on any tensor.
        are_plain = all(each.origin.state_path is not None and each.state_dict.is_plain for each in (a, b))
        asked = pairs if flags or not are_plain else ()
        hanging = [(place.below(name), x, y) for _, name, x, y in asked if _may_differ(x, y, flags=flags)]
        self._found: list[tuple[Met, Pair | None]] = []
        self._count = 0
        self._take(side_by_side(hanging, rule), pairs)
        if beside:
            self._take(_whole(a, b, rule, is_alone=is_alone), pairs)

    def _take(self, found: Iterator[Met], pairs: Sequence[tuple[str, str, TensorEntry, TensorEntry]]) -> None:
        compared: set[tuple[int, int]] = set()
        for met in found:
            if isinstance(met.a, TensorEntry) and isinstance(met.b, TensorEntry):
                compared = compared or {(id(x), id(y)) for _, _, x, y in pairs}
                if (id(met.a), id(met.b)) in compared:
                    continue
            key = self._work.add(*_tensors(met)) if met.how == "bytes" else None
            self._count += key is None
            if key is not None or met.is_tensor or met.how == "kinds" or self._count <= _MOST_ROWS:
                self._found.append((met, key))

    def told(self, tolerance: Tolerance | None) -> tuple[tuple[TreeRow, ...], int, list[str]]:
        """The rows that are listed, those of tensors first; how many there are; and what could not be compared."""
        differing = [(met, key) for met, key in self._found if key is None or self._work.same(key) is False]
        lost = [str(met.place) for met, key in self._found if key is not None and self._work.same(key) is None]
        measured = [(met, key) for met, key in differing if key is not None and not self._is_in_section(met)]
        wanted = measured if tolerance is not None else measured[:_MOST_MEASURED]
        sums = all_sums((_tensors(met) for met, _ in wanted), tolerance or Tolerance(), self._work) if wanted else {}
        rows: list[TreeRow] = []
        within = 0
        tensors = {id(met) for met in _of_tensors(met for met, _ in differing)}
        for met, key in sorted(differing, key=lambda pair: (id(pair[0]) not in tensors, self._is_in_section(pair[0]))):
            found = sums.get(_views(met)) if sums and key is not None else None
            if found is not None and tolerance is not None and not found.outside:
                within += 1
                continue
            rows.append(_row(met, found, is_tensor=id(met) in tensors))
        bits = sum(key is not None for _, key in differing)
        return tuple(rows[:_MOST_ROWS]), self._count + bits - within, lost

    def _is_in_section(self, met: Met) -> bool:
        return id(met.a) in self._in_sections and id(met.b) in self._in_sections


def _row(met: Met, found: Sums | None, *, is_tensor: bool) -> TreeRow:
    a, b = shown(met.a, met.b)
    if met.how == "order":
        b = f"{b}, the same keys in another order"
    figure = None if found is None else found.to_dict()["max_abs"]
    what: Literal["tensor", "order", "value"] = "order" if met.how == "order" else "value"
    return {"path": str(met.place), "what": "tensor" if is_tensor else what, "a": a, "b": b, "max_abs": figure}


def _of_tensors(found: Iterable[Met]) -> Iterator[Met]:
    """The differences that are about tensors both have, or may be: in what cannot be compared part for part."""
    looked_into = 0
    for met in found:
        is_tensor = met.is_tensor
        if not is_tensor and met.how == "kinds":
            looked_into += 1
            is_tensor = looked_into > _MOST_ROWS or (any(tensors_in(met.a)) and any(tensors_in(met.b)))
        if is_tensor:
            yield met


def _may_differ(a: TensorEntry, b: TensorEntry, *, flags: bool) -> bool:
    """Whether there is more to two tensors than their values."""
    if not is_plain_value(a) or not is_plain_value(b):
        return True
    return flags and any(getattr(a, name) is not getattr(b, name) for name in FLAGS)


def _whole(a: Checkpoint, b: Checkpoint, rule: SameContent, *, is_alone: bool) -> Iterator[Met]:
    """Everything beside the weights, and around them."""
    has_weights = a.origin.state_path is not None and b.origin.state_path is not None
    one_module = (a.module is None) is not (b.module is None)
    if not has_weights:
        yield from side_by_side([(Place(), a.rest, b.rest)], rule, (_lowered(a), _lowered(b)))
    elif not is_alone and (a.rest is STATE_DICT) is (b.rest is STATE_DICT):
        around = [(c.module or STATE_DICT) if one_module or c.module is not None else _shell(c) for c in (a, b)]
        yield from side_by_side([(Place(), a.rest, b.rest)], rule, (around[0], around[1]))
        yield from side_by_side([(Place().below("(discarded)"), a.discarded, b.discarded)], rule)
    else:
        # One has only weights: what the other is, and has beside them.
        if one_module or not is_alone:
            yield Met(Place(), a.module or a.rest, b.module or b.rest)
        for place, node in () if a.origin.is_program else _beside(a.rest):
            yield Met(place, node, ABSENT)
        for place, node in () if b.origin.is_program else _beside(b.rest):
            yield Met(place, ABSENT, node)


def _lowered(checkpoint: Checkpoint) -> object:
    return lower_state_dict(checkpoint.state_dict) if checkpoint.module is None else checkpoint.module


def _shell(checkpoint: Checkpoint) -> object:
    """The weights' mapping without its values: its class, what hangs on it, the versions of modules."""
    state = checkpoint.state_dict
    return lower_state_dict(StateDict(versions=state.versions, container=state.container))


def _beside(root: object) -> Iterator[tuple[Place, object]]:
    """The content of a tree beside the path to the weights."""
    seen: set[int] = set()
    stack = [(Place(), root)]
    while stack:
        place, node = stack.pop()
        pairs = mapping_items(node)
        if pairs is None or id(node) in seen or not holds(node, STATE_DICT):
            yield from [(place, node)] * (node is not STATE_DICT and id(node) not in seen)
            continue
        seen.add(id(node))
        stack.extend((place.below(key), value) for key, value in reversed(pairs))


def _views(met: Met) -> Pair:
    """What `all_sums` knows two tensors by."""
    a, b = _tensors(met)
    return (*a.view, *b.view)


def _tensors(met: Met) -> tuple[TensorEntry, TensorEntry]:
    if not isinstance(met.a, (TensorEntry, Storage)) or not isinstance(met.b, (TensorEntry, Storage)):
        raise TypeError("tensors alone have bytes")
    return as_tensor(met.a), as_tensor(met.b)


class ValueComparison:
    """The values of two state_dicts that are not plain tensors, processed when it is made.

    Args:
        ours, theirs: the values by name.
        names: those to compare.
        work: what compares tensors.
    """

    def __init__(
        self, ours: Mapping[str, object], theirs: Mapping[str, object], names: Iterable[str], work: PairReader
    ) -> None:
        self._work = work
        self._found = {
            name: [
                (met, work.add(*_tensors(met)) if met.how == "bytes" else None)
                for met in side_by_side([(Place().below(name), ours[name], theirs[name])], SameContent(flags=False))
            ]
            for name in names
        }

    def same(self, name: str) -> bool | None:
        """Whether the two values of a name are the same; ``None``: unknown."""
        same = [False if key is None else self._work.same(key) for _, key in self._found[name]]
        return False if False in same else None if None in same else True

    def row(self, name: str, a: object, b: object) -> dict[str, Any]:
        """What differs in it, as a row of `Difference.values`."""
        first = next(met for met, key in self._found[name] if key is None or self._work.same(key) is False)
        told = [brief(a), brief(b)]
        if told[0] == told[1] and not first.is_tensor:
            told = [f"{what}: {value}" for what, value in zip(told, shown(first.a, first.b), strict=True)]
        return {"name": name, "a": told[0], "b": told[1], "at": str(first.place)}
