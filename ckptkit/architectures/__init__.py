"""Which known model has these names and shapes: `identify`, without torch.

Shipped indexes of torchvision's and timm's models (`ckptkit.architectures.index`) contain digests of names and shapes,
and the dimensions that an argument decides, so a model with another number of classes is identified like the original,
together with that number.  If none fits, sketches find the most similar ones.

This is a hint, never proof: tensors' values are not read, and models that compute differently may have the same names
and shapes (``resnet18`` and ``quantized_resnet18`` before it is quantized).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Literal, NamedTuple

from ckptkit.architectures.index import (
    LIBRARIES,
    Dimension,
    Free,
    Row,
    Shapes,
    load,
    names_digest,
    shapes_digest,
    similarity,
    sketch,
    weights_of,
)
from ckptkit.checkpoint import StateDict
from ckptkit.normalize.modules import unwrapped

__all__ = ["Architecture", "identify"]

_MIN_TENSORS = 8
"""Fewer are what any two small models may have in common.  The smallest model of the index has 16."""

_MAX_TENSORS = 6_000
"""More are not a model of the index, whose largest has some 2,700, nor two of them together."""

_MAX_SKETCHED = 4_000
"""Tensors of what is compared with models that do not fit: hashing each is most of the work."""

_MAX_CHARACTERS = 1_000_000
"""Of all names.  Those of the index have under 150,000."""

_MAX_LEVELS = 4
"""Prefixes in prefixes that are tried: ``model.encoder.backbone.``."""

_MAX_ALIKE = 12
"""Architectures that are listed if more fit."""

_MAX_CLOSEST = 3
"""Architectures that are listed if none fits."""

_MAX_CANDIDATES = 12
"""Rows whose sketches are compared, of those that have most in common with the file."""

_MIN_SIMILARITY = 0.3
"""Below this, nothing is reported."""

_BELOW_ONE = 0.99
"""An inexact fit is never complete, whatever the estimate."""

Deviation = Literal["no head", "another head", "other shapes"]

_SAID: Mapping[Deviation, str] = {
    "no head": "without its head",
    "another head": "with another head",
    "other shapes": "with other shapes",
}


class Architecture(NamedTuple):
    """A known model that a state_dict is of, or is like.

    Attributes:
        reference: what `ckptkit.verify` takes: ``"torchvision:resnet18"``.
        args: the arguments it has to be built with.
        exact: every name and every shape is the model's (``num_batches_tracked`` aside).
        similarity: 1.0 if it is exact; otherwise an estimate of how much of the two is the same.
        prefix: before the model's own names, apart from wrappers (``module.``).
        others: tensors that are not under the prefix.
        differs: the one thing in which it is not exact; ``None``: it is exact, or there is no such thing.
        defaults: of the arguments in `args` that are numbers read off the shapes, the library's own values.
    """

    reference: str
    args: Mapping[str, object]
    exact: bool
    similarity: float
    prefix: str
    others: int
    differs: Deviation | None
    defaults: Mapping[str, int]

    @property
    def label(self) -> str:
        """``"torchvision resnet18, head 1000 → 10"``."""
        parts = [self.reference.replace(":", " ", 1)]
        for name, value in self.args.items():
            if name not in self.defaults:
                parts.append(f"{name}={value}")
            else:
                parts.append(f"{'head' if name == 'num_classes' else name} {self.defaults[name]} → {value}")
        if self.differs:
            parts.append(_SAID[self.differs])
        if self.prefix:
            parts.append(f"under {self.prefix!r}")
        return ", ".join(parts)


class _View(NamedTuple):
    """Names under a prefix, without it, sorted."""

    prefix: str
    others: int
    shapes: Shapes


def identify(state_dict: StateDict) -> tuple[Architecture, ...]:
    """The architectures with these names and shapes, best first; if there are none, the most similar.

    If several fit equally well, torchvision's come before timm's and models before their quantizable twins, and within
    a library only those that need the fewest arguments are listed.  Nothing is reported for a few tensors, or for very
    many.

    Args:
        state_dict: the weights; dtypes and values do not matter.
    """
    if not _MIN_TENSORS <= len(state_dict) <= _MAX_TENSORS or sum(map(len, state_dict)) > _MAX_CHARACTERS:
        return ()
    shapes = weights_of((unwrapped(name), entry.shape) for name, entry in state_dict.items())
    whole = _View(prefix="", others=0, shapes=shapes)
    if found := _fitting(whole, "names"):
        return found
    views = [whole, *_under_prefixes(whole)]
    for view in views[1:]:
        if found := _fitting(view, "names"):
            return found
    for view in views:
        if found := _fitting(view, "trunk"):
            return found
    return _closest(views)


def _under_prefixes(whole: _View) -> Iterator[_View]:
    """What most names have in front, and what most of those have, and so on."""
    prefix, shapes = "", whole.shapes
    for _ in range(_MAX_LEVELS):
        counts = Counter(name.partition(".")[0] for name in shapes if "." in name)
        segment, number = counts.most_common(1)[0] if counts else ("", 0)
        if number < max(_MIN_TENSORS, len(shapes) / 2):
            return
        start = f"{segment}."
        prefix += start
        shapes = {name[len(start) :]: shape for name, shape in shapes.items() if name.startswith(start)}
        yield _View(prefix=prefix, others=len(whole.shapes) - len(shapes), shapes=shapes)


def _fitting(view: _View, key: Literal["names", "trunk"]) -> tuple[Architecture, ...]:
    """The rows that have these names, and with the right arguments these shapes."""
    digest, shapes = names_digest(view.shapes), [*view.shapes.values()]
    known: dict[frozenset[Dimension], str | None] = {}
    found: list[tuple[tuple[object, ...], Architecture]] = []
    for order, library in enumerate(LIBRARIES):
        fits = []
        for _, row in load(library).having(key, digest):
            args = _arguments(row, shapes, known, trunk=key == "trunk")
            if args is not None:
                fits.append((row, args))
        fewest = min((len(args) for _, args in fits), default=0)
        for row, args in fits:
            if len(args) == fewest:
                alike = len(shapes) / row.tensors
                differs: Deviation | None = "no head" if key == "trunk" else None
                found.append((
                    (order, row.name.startswith("quantized_"), len(row.name)),
                    _architecture(library, row, args, view, similarity=alike, differs=differs),
                ))  # fmt: skip
    found.sort(key=lambda item: item[0])
    return tuple(architecture for _, architecture in found[:_MAX_ALIKE])


def _arguments(
    row: Row, shapes: list[tuple[int, ...]], known: dict[frozenset[Dimension], str | None], *, trunk: bool
) -> dict[str, int] | None:
    """The free arguments that give a row these shapes, those with other values than by default; ``None``: none do."""
    free = row.trunk_free if trunk else row.free
    masked = frozenset((tensor, axis) for facts in free.values() for tensor, axis, _, _ in facts.at)
    if masked not in known:
        known[masked] = shapes_digest(shapes, masked)
    if known[masked] != (row.trunk_shapes if trunk else row.shapes):
        return None
    return _solved(free, shapes)


def _solved(free: Mapping[str, Free], shapes: list[tuple[int, ...]]) -> dict[str, int] | None:
    values = {}
    for name, facts in free.items():
        value = facts.solve(shapes)
        if value is None:
            return None
        if value != facts.default:
            values[name] = value
    return values


def _architecture(
    library: str, row: Row, args: Mapping[str, int], view: _View, *, similarity: float, differs: Deviation | None
) -> Architecture:
    return Architecture(
        reference=f"{library}:{row.name}",
        args={**row.args, **args},
        exact=similarity == 1.0,
        similarity=similarity,
        prefix=view.prefix,
        others=view.others,
        differs=differs,
        defaults={name: row.free[name].default for name in args if name not in row.args},
    )


def _closest(views: list[_View]) -> tuple[Architecture, ...]:
    """The models with most in common with any of the views, once for the same names and shapes.

    A model with everything except the head, or with every name in common, stands alone: models with less are left out.
    """
    found: dict[Deviation | None, list[Architecture]] = {"another head": [], "other shapes": [], None: []}
    seen = set()
    for alike, view, library, number, row in _candidates(views):
        same = (*load(library).sketch(number),)
        if same in seen:
            continue
        seen.add(same)
        args: Mapping[str, int] = {}
        differs: Deviation | None = None
        if row.names == names_digest(view.shapes):
            differs = "other shapes"
        elif (beheaded := _with_another_head(row, view)) is not None:
            differs, (args, alike) = "another head", beheaded
        elif alike < _MIN_SIMILARITY:
            continue
        alike = min(alike, _BELOW_ONE)
        found[differs].append(_architecture(library, row, args, view, similarity=alike, differs=differs))
    return tuple(next((some for some in found.values() if some), [])[:_MAX_CLOSEST])


def _candidates(views: list[_View]) -> list[tuple[float, _View, str, int, Row]]:
    """The rows most like the views, and those with their names, best first.

    Similarity, view, library, the row's number, the row.
    """
    found = []
    sketched = [(view, sketch(view.shapes)) for view in views if len(view.shapes) <= _MAX_SKETCHED]
    every = [*chain.from_iterable(hashes for _, hashes in sketched)]
    known = {library: load(library).known(every) for library in LIBRARIES if sketched}
    for view, hashes in sketched:
        digest = names_digest(view.shapes)
        for library in LIBRARIES:
            index = load(library)
            sharing = index.sharing(known[library].intersection(hashes))
            shared = sorted(sharing.items(), key=lambda item: (-item[1], item[0]))
            rows = {number: index.row(number) for number, _ in shared[:_MAX_CANDIDATES]}
            rows.update(index.having("names", digest))
            found += [(similarity(hashes, index.sketch(n)), view, library, n, rows[n]) for n in sorted(rows)]
    return sorted(found, key=lambda item: -item[0])


def _with_another_head(row: Row, view: _View) -> tuple[dict[str, int], float] | None:
    """Where a view is the row but for its head: the arguments of the rest, and how much of the two is the same.

    What takes the head's place has its name (``fc.0.weight`` for ``fc.weight``), or that of the module the head
    is in (``classifier.2.weight`` for ``classifier.1.weight``).
    """
    for head in (row.head, tuple(module.rpartition(".")[0] for module in row.head)):
        if not all(head):
            continue
        under = tuple(f"{module}." for module in head)
        trunk = {name: shape for name, shape in view.shapes.items() if not name.startswith(under)}
        if names_digest(trunk) == row.trunk:
            args = _arguments(row, [*trunk.values()], {}, trunk=True)
            if args is not None:
                return args, len(trunk) / (row.tensors + len(view.shapes) - len(trunk))
    return None
