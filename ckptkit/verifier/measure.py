"""How a state_dict fits a model: every name accounted for, nothing judged yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ckptkit.checkpoint import StateDict
from ckptkit.errors import VerifyError
from ckptkit.pickling.layouts import Jagged, Nested, Quantized, Sparse, rebuilt
from ckptkit.rewrite.like import Like
from ckptkit.startup import dataclass
from ckptkit.verifier.foreign import foreign
from ckptkit.verifier.load_trial import is_extra_state, try_load
from ckptkit.verifier.references import ModelLike, build

__all__ = [
    "Fit",
    "ShapeMismatch",
    "identity",
    "is_counter",
    "like_model",
    "like_reference",
    "measure_fit",
    "model_values",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeMismatch:
    """One name, two shapes."""

    name: str
    checkpoint: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Every name of the model and of the file, sorted by what happens to it.

    Attributes:
        sources: names of the model that get a value: from which name of the file, or ``None`` where
            the model's own loading code computes it.
        missing: names of the model that the file lacks, less those in the fields below.
        unexpected: names of the file that the model lacks, less those in the fields below.
        mismatches: names of both with different shapes.
        recast: names that change dtype: name, the file's dtype, the model's.
        tied: names that the file lacks, whose container stores a tensor once, and the model has as the same tensor
            as one the file has.
        twins: missing names that the model has as the same tensor as one the file has: by that one's name.
        counters: names of BatchNorm's ``num_batches_tracked`` that the file lacks and torch sets itself, as it does
            where a state_dict records no version of the layer.
        allowed_missing, allowed_unexpected: names the caller allows to be so.
        special: names of tensors that are not plain ones in the file (quantized, sparse), and likewise in the model; or
            a number where it has a zero-dimensional tensor.
        opaque: names whose value is not a tensor in the model; it is made from the file where no code is needed for it.
        unloadable: names of plain tensors whose value in the file is not one, or of another layout or shape.
        tensors, of: how many of the model's tensors get a value from the file.
        parameters_share: share of the parameters' elements among them, 0 to 1.
    """

    sources: Mapping[str, str | None]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatches: tuple[ShapeMismatch, ...]
    recast: tuple[tuple[str, str, str], ...]
    tied: Mapping[str, str]
    twins: Mapping[str, str]
    counters: tuple[str, ...]
    allowed_missing: tuple[str, ...]
    allowed_unexpected: tuple[str, ...]
    special: tuple[str, ...]
    opaque: tuple[str, ...]
    unloadable: tuple[str, ...]
    tensors: int
    of: int
    parameters_share: float

    @property
    def renamed(self) -> tuple[str, ...]:
        """Names of the model filled from another name, or computed, by the model's own loading code."""
        return tuple(name for name, source in self.sources.items() if name != source)

    @property
    def is_strict(self) -> bool:
        """Whether ``load_state_dict(strict=True)`` accepts the state_dict unchanged."""
        return not (self.tied or self.allowed_missing or self.allowed_unexpected)


def is_counter(name: str) -> bool:
    """Whether it is BatchNorm's count of batches, which evaluation does not use."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def model_values(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict with its parameters unchanged.

    Raises:
        VerifyError: the model cannot give it, or its tensors have no shapes yet.
    """
    with foreign("the reference's state_dict() failed"):
        values = dict(model.state_dict(keep_vars=True))
    for name, value in values.items():
        if torch.nn.parameter.is_lazy(value):
            raise VerifyError(f"the reference's {name!r} is not initialized; run its lazy modules once in the factory")
    return values


def like_reference(model: ModelLike, args: Mapping[str, object]) -> Like:
    """The tensors of a reference, for a checkpoint to be like; see `ckptkit.verifier.references.build`.

    Raises:
        As `build` and `model_values`; RewriteError: it has none.
    """
    with foreign(), torch.random.fork_rng(devices=[]):
        built, reference = build(model, args)
        return like_model(model_values(built), reference.label)


def like_model(expected: Mapping[str, Any], label: str) -> Like:
    """The tensors of a model, by `model_values`."""
    shapes = {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) and not is_extra_state(name) else None
        for name, value in expected.items()
    }
    tied: dict[object, list[str]] = {}
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            tied.setdefault(identity(value), []).append(name)
    return Like(shapes, tied=[names for names in tied.values() if len(names) > 1], label=label)


def measure_fit(
    model: nn.Module,
    state_dict: StateDict,
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    ties_once: bool = False,
) -> Fit:
    """How a state_dict fits a model.

    Args:
        model: the model; it does not change.
        state_dict: the weights; their values are not read.
        allow_missing: patterns (``fnmatch``) of names the file may lack.
        allow_unexpected: patterns of names the model may lack.
        ties_once: whether the file's container stores tied tensors under one name only.

    Raises:
        VerifyError: see `model_values`.
    """
    expected = model_values(model)
    probed = try_load(model, expected, state_dict)
    sources = dict(probed.sources)
    not_plain = _not_plain(state_dict, expected)
    counters = tuple(n for n, source in sources.items() if source is None and n not in state_dict and is_counter(n))
    missing = [n for n in dict.fromkeys(probed.missing) if n not in state_dict.everything]  # torch may say it twice
    twins = _tied(missing, sources, expected)
    tied = twins if ties_once else {}
    missing_left = _Sieve(missing, tied.__contains__)
    allowed_missing = missing_left.take(_matcher(allow_missing))
    unexpected_left = _Sieve(probed.unexpected, lambda name: False)
    allowed_unexpected = unexpected_left.take(_matcher(allow_unexpected))
    wanted = [n for n, v in expected.items() if isinstance(v, torch.Tensor) and not is_extra_state(n)]
    filled = {n for n in wanted if n in tied or n in not_plain["special"] or n in sources} - {*counters}
    return Fit(
        sources=sources,
        missing=tuple(missing_left.names),
        unexpected=tuple(unexpected_left.names),
        mismatches=tuple(_mismatches(sources, expected, state_dict)),
        recast=tuple(_recast(sources, expected, state_dict)),
        tied=tied,
        twins={name: twins[name] for name in missing_left.names if name in twins},
        counters=counters,
        allowed_missing=allowed_missing,
        allowed_unexpected=allowed_unexpected,
        **not_plain,
        tensors=len(filled),
        of=len(wanted),
        parameters_share=_share(filled, wanted, expected),
    )


def _not_plain(state_dict: StateDict, expected: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The values that are not plain tensors: those like the model's, those it accepts unchanged, those it cannot.

    By the names that a `Fit` has for them.
    """
    opaque = tuple(n for n in state_dict.extra if n in expected and not isinstance(expected[n], torch.Tensor))
    others = {n: v for n, v in state_dict.extra.items() if isinstance(expected.get(n), torch.Tensor)}
    special = tuple(n for n, value in others.items() if _is_alike(expected[n], value))
    return {"special": special, "opaque": opaque, "unloadable": tuple(n for n in others if n not in special)}


def _is_alike(ours: torch.Tensor, node: object) -> bool:
    """Whether a value of a file is of the layout and the shape that a tensor of the model has."""
    found = rebuilt(node)
    layout = None if found is None else found.layout
    if isinstance(layout, Quantized):
        return ours.is_quantized and tuple(ours.shape) == layout.numbers.shape
    if isinstance(layout, Sparse):
        return str(ours.layout) == f"torch.{layout.layout}" and tuple(ours.shape) == layout.size
    if isinstance(node, (int, float)):  # a quantized module's scale
        return not ours.dim()
    return isinstance(layout, (Nested, Jagged)) and ours.is_nested


class _Sieve:
    """Names that are taken away in groups, each once."""

    def __init__(self, names: Iterable[str], without: Callable[[str], bool]) -> None:
        self.names = [name for name in names if not without(name)]

    def take(self, chosen: Callable[[str], bool]) -> tuple[str, ...]:
        taken = tuple(name for name in self.names if chosen(name))
        self.names = [name for name in self.names if not chosen(name)]
        return taken


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool]:
    given = tuple(patterns)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in given)


def _differs(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and tuple(value.shape) != shape


def identity(value: torch.Tensor) -> object:
    """Equal for tensors that are the same view of the same memory."""
    if value.numel() == 0 or value.layout != torch.strided:
        return id(value)
    if value.is_meta:  # its storage has no address, but is one object
        return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def _tied(missing: Iterable[str], sources: Mapping[str, object], expected: Mapping[str, Any]) -> dict[str, str]:
    """For each missing name that is the same tensor as one that is not: that one's name."""
    present = {identity(expected[n]): n for n in reversed(list(sources)) if isinstance(expected[n], torch.Tensor)}
    found = ((n, present.get(identity(expected[n]))) for n in missing if isinstance(expected.get(n), torch.Tensor))
    return {name: twin for name, twin in found if twin is not None}


def _mismatches(
    sources: Mapping[str, str | None], expected: Mapping[str, Any], state_dict: StateDict
) -> Iterator[ShapeMismatch]:
    """The names whose tensors have another shape in the checkpoint."""
    for name, value in expected.items():
        if name in state_dict and name not in sources and not is_extra_state(name):
            shape = state_dict[name].shape
            if _differs(value, shape):
                yield ShapeMismatch(name=name, checkpoint=shape, reference=tuple(value.shape))


def _recast(
    sources: Mapping[str, str | None], expected: Mapping[str, Any], state_dict: StateDict
) -> Iterable[tuple[str, str, str]]:
    for name, source in sources.items():
        if source is not None and isinstance(expected[name], torch.Tensor):
            wanted = str(expected[name].dtype).removeprefix("torch.")
            if wanted != state_dict[source].dtype:
                yield name, state_dict[source].dtype, wanted


def _share(filled: set[str], wanted: Iterable[str], expected: Mapping[str, Any]) -> float:
    """Share of parameter elements that get a value; of tensors, in a model without parameters."""
    sizes: dict[object, int] = {}
    got: set[object] = set()
    for name in wanted:
        if isinstance(expected[name], nn.Parameter):
            key = identity(expected[name])
            sizes[key] = expected[name].numel()
            if name in filled:
                got.add(key)
    total = sum(sizes.values())
    if total:
        return sum(sizes[key] for key in got) / total
    count = len(list(wanted))
    return len(filled) / count if count else 0.0
