"""The tensors of outputs, the model's and its leaf modules': their content, and how far those of two runs are apart.

The first leaf modules whose outputs differ show where two checkpoints diverge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ckptkit.startup import dataclass

if TYPE_CHECKING:
    from ckptkit.documents import OutputDocument

__all__ = [
    "TOLERANCES",
    "OutputDifference",
    "OutputTolerance",
    "Parting",
    "Trace",
    "broken_values",
    "compare_outputs",
    "compared",
    "described",
    "dtype_name",
    "is_finite",
    "leaf_modules",
    "output_tensors",
    "shown",
    "tolerance_of",
]

_CHUNK = 1 << 20
"""Elements compared at a time, as float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTolerance:
    """How far apart two outputs may be and still agree.

    They agree if no element differs by more than ``atol + rtol * s``, where ``s`` is the largest magnitude in either
    output: an element near zero is as uncertain as the sums it came from, which its own size does not show.  If no
        ``atol`` is given it is 0, and if that is not enough, the measured noise: see `above`.
    """

    atol: float
    rtol: float

    def bound(self, scale: float) -> float:
        """The largest difference allowed in outputs of this magnitude."""
        return self.atol + self.rtol * scale

    def above(self, noise: float) -> OutputTolerance:
        """With room for noise: the remainder where terms cancel is as uncertain as the terms, whatever its size.

        Args:
            noise: the largest difference between runs that differ only in rounding, on one machine; another may be off
                by several times as much.
        """
        return dataclasses.replace(self, atol=max(self.atol, 4 * noise))

    def to_dict(self) -> dict[str, float]:
        """For JSON documents."""
        return {"atol": self.atol, "rtol": self.rtol}


TOLERANCES: dict[str, OutputTolerance] = {
    "float64": OutputTolerance(atol=0.0, rtol=1.5e-8),
    "float32": OutputTolerance(atol=0.0, rtol=3.5e-4),
    "float16": OutputTolerance(atol=0.0, rtol=3.2e-2),
    "bfloat16": OutputTolerance(atol=0.0, rtol=8.9e-2),
}
"""By the least precise type among weights and outputs, from the best to the worst.  ``rtol`` is the root of the type's
spacing at 1 (``torch.finfo(dtype).eps``), rounded up: half of its digits, which leaves room for the order in which a
deep network adds up.  ``torch.testing.assert_close`` is stricter (1.3e-6 for float32), because it is made for a single
operation.  There is no ``atol``: outputs may be as small as 1e-10."""


def tolerance_of(dtypes: Iterable[str], atol: float | None = None, rtol: float | None = None) -> OutputTolerance:
    """The tolerance for results of these types; what is given counts.

    Args:
        dtypes: names of the weights' and outputs' types; the least precise decides.
        atol: asked for.
        rtol: asked for.
    """
    order = list(TOLERANCES)
    widened = {"complex128": "float64", "complex64": "float32"}
    known = {widened.get(name, name) for name in dtypes}
    # Types below 16 bits count as being as imprecise as the last one.
    ranks = [order.index(n) if n in order else len(order) - 1 for n in known if n in order or n.startswith("float")]
    default = TOLERANCES[order[max(ranks, default=order.index("float32"))]]
    return OutputTolerance(atol=default.atol if atol is None else atol, rtol=default.rtol if rtol is None else rtol)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """How far two outputs are apart.

    Attributes:
        path: where both are in the output.
        is_equal: bit for bit.
        is_close: within the tolerance; whole numbers and truth values only if they are equal.
        max_abs: largest absolute difference; infinite where one side is not a number.
        max_rel: the same, as a share of the largest magnitude in either.
        allowed: the largest absolute difference that is close.
        reason: why they cannot be compared; ``""``: they were.
    """

    path: str
    is_equal: bool
    is_close: bool
    max_abs: float = 0.0
    max_rel: float = 0.0
    allowed: float = 0.0
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON documents; anything but a finite number is ``None``."""
        return {
            "path": self.path,
            "equal": self.is_equal,
            "close": self.is_close,
            "max_abs": self.max_abs if math.isfinite(self.max_abs) and not self.reason else None,
            "max_rel": self.max_rel if math.isfinite(self.max_rel) and not self.reason else None,
            "allowed": None if self.is_equal or self.reason else self.allowed,
            "reason": self.reason or None,
        }

    def __str__(self) -> str:
        name = f"`{self.path}`" if self.path else "the output"
        if self.reason:
            return f"{name}: {self.reason}"
        if self.is_equal:
            return f"{name} is bit-equal"
        return f"{name} differs by up to {self.max_abs:.2g} ({self.max_rel:.2g} of its largest value)"


def compared(path: str, a: torch.Tensor, b: torch.Tensor, tolerance: OutputTolerance) -> OutputDifference:
    """How far two tensors are apart; both on the CPU."""
    if a.shape != b.shape:
        reason = f"shape {_sizes(a)} against {_sizes(b)}"
        return OutputDifference(path=path, is_equal=False, is_close=False, reason=reason)
    if same_bits(a, b):
        return OutputDifference(path=path, is_equal=True, is_close=True)
    inexact = _is_inexact(a) or _is_inexact(b)
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    # The largest number there is stands for infinity, in masks.
    largest_number = min((torch.finfo(t.dtype).max for t in (a, b) if _is_inexact(t)), default=math.inf)
    largest = scale = 0.0
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.numel(), _CHUNK):
        ours, theirs = (flat[start : start + _CHUNK].to(wide) for flat in (flat_a, flat_b))
        same = (ours == theirs) | (torch.isnan(ours) & torch.isnan(theirs))
        apart = torch.where(same, 0.0, (ours - theirs).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(apart.max()))
        for part in (ours, theirs):
            finite = part.abs()[part.abs() < largest_number]
            scale = max(scale, float(finite.max()) if finite.numel() else 0.0)
    allowed = tolerance.bound(scale) if inexact else 0.0
    return OutputDifference(
        path=path,
        is_equal=False,
        is_close=largest <= allowed,
        max_abs=largest,
        max_rel=largest / scale if scale else largest,
        allowed=allowed,
    )


def compare_outputs(
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    tolerance: OutputTolerance,
    noise: Callable[[], Mapping[str, float]] | None = None,
) -> list[OutputDifference]:
    """Every output of either side, compared with the other side's.

    Args:
        ours: outputs by path.
        theirs: others.
        tolerance: how far they may be apart.
        noise: called for each output's if some are further apart; ``None``: the result is final.
    """
    found = []
    for path in dict.fromkeys((*ours, *theirs)):
        if path in ours and path in theirs:
            found.append(compared(path, ours[path], theirs[path], tolerance))
        else:
            side = "first" if path in ours else "second"
            found.append(
                OutputDifference(path=path, is_equal=False, is_close=False, reason=f"only the {side} run has it")
            )
    if noise is None or all(difference.is_close or difference.reason for difference in found):
        return found
    floors = noise()
    return [
        d if d.is_close or d.reason
        else compared(d.path, ours[d.path], theirs[d.path], tolerance.above(floors.get(d.path, 0.0)))
        for d in found
    ]  # fmt: skip


def output_tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in an output, with the keys that lead to it joined by dots."""
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    parts: list[tuple[object, object]] = []
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (list, tuple)):
        parts = list(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    for key, part in parts:
        yield from output_tensors(part, f"{path}.{key}" if path else str(key))


def dtype_name(tensor: torch.Tensor) -> str:
    """Name of its type, without the prefix."""
    return str(tensor.dtype).removeprefix("torch.")


def _is_inexact(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all are numbers; so are whole ones."""
    return not _is_inexact(tensor) or bool(torch.isfinite(tensor).all())


def described(path: str, tensor: torch.Tensor) -> OutputDocument:
    """Figures of one output, as in JSON documents; those of values are of the finite ones."""
    figures: OutputDocument = {
        "path": path,
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor),
        "finite": is_finite(tensor),
        "min": None,
        "max": None,
        "mean": None,
    }
    if not tensor.is_complex():
        values = tensor.to(torch.float64)
        values = values[torch.isfinite(values)]
        if values.numel():
            low, high = torch.aminmax(values)
            figures["min"], figures["max"], figures["mean"] = float(low), float(high), float(values.mean())
    return figures


def shown(path: str, tensor: torch.Tensor) -> str:
    """An output in a message: where, shape, type."""
    return f"{path + ' ' if path else ''}{_sizes(tensor)} {dtype_name(tensor)}"


def broken_values(path: str, tensor: torch.Tensor) -> str:
    """How many of an output's values are not numbers, for a message."""
    nan, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{path or 'the output'} ({nan:,} NaN, {infinite:,} Inf of {tensor.numel():,})"


def _sizes(tensor: torch.Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape) or "scalar"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    left, right = (t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


_CALL_NUMEL = 1 << 20
"""Elements kept of one call's output."""

_ALL_NBYTES = 1 << 30
"""Bytes kept of all calls; those after are not compared."""

_Key = tuple[str, int, str]
"""The module's name, which of its calls, and where in its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """The first leaf modules, in the order they are called, whose outputs are not the same.

    Attributes:
        differs: the first that is not bit-equal; ``None``: all are.
        parts: the first beyond the tolerance; ``None``: there is none.
        calls: how many calls were compared.
        is_whole: whether those are all: ``False`` where memory for samples ran out.
    """

    differs: str | None
    parts: str | None
    calls: int
    is_whole: bool


class Trace:
    """Evenly spaced samples of what each leaf module gave in one run.

    Large outputs are sampled, so a module is only said to part where one of the sampled elements does.
    """

    def __init__(self) -> None:
        self._samples: dict[_Key, torch.Tensor] = {}
        self._shapes: dict[_Key, torch.Size] = {}
        self._left = _ALL_NBYTES
        self._is_whole = True

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Keep samples of what runs inside the block."""

        def keep(key: _Key, tensor: torch.Tensor) -> None:
            sample = _sample(tensor)
            self._left -= sample.nbytes
            if self._left < 0:
                self._is_whole = False
                return
            self._samples[key], self._shapes[key] = sample, tensor.shape

        with _watched(model, keep):
            yield

    @contextmanager
    def comparing(self, model: nn.Module, tolerance: OutputTolerance) -> Iterator[Callable[[], Parting]]:
        """Compare what runs inside the block with the recording; the result is in the object that it returns."""
        differs: list[str] = []
        parts: list[str] = []
        calls: set[tuple[str, int]] = set()

        def compare(key: _Key, tensor: torch.Tensor) -> None:
            if key not in self._samples:
                return
            calls.add(key[:2])
            if parts:
                return
            same_shape = self._shapes[key] == tensor.shape
            found = compared(key[2], self._samples[key], _sample(tensor), tolerance) if same_shape else None
            if found is None or not found.is_equal:
                differs.append(key[0])
            if found is None or not found.is_close:
                parts.append(key[0])

        with _watched(model, compare):
            yield lambda: Parting(
                differs=next(iter(differs), None),
                parts=next(iter(parts), None),
                calls=len(calls),
                is_whole=self._is_whole,
            )


def leaf_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, with their names; compiled ones take no hooks."""
    for name, module in model.named_modules():
        if next(module.children(), None) is None and not isinstance(module, torch.jit.ScriptModule):
            yield name or "(the model)", module


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU of evenly spaced elements."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _CALL_NUMEL))].to("cpu", copy=True)


@contextmanager
def _watched(model: nn.Module, note: Callable[[_Key, torch.Tensor], None]) -> Iterator[None]:
    """Call ``note`` with every tensor that a leaf module returns."""
    counts: dict[str, int] = {}
    handles: list[Any] = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            call = counts[name] = counts.get(name, 0) + 1
            for path, tensor in output_tensors(output):
                note((name, call, path), tensor)

        handles.append(module.register_forward_hook(hook))

    try:
        for name, module in leaf_modules(model):
            watch(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
