"""Golden files: a model's outputs on known inputs, for machines that do not have the original.

A golden is a safetensors file.  Its metadata ``ckptkit.golden`` is one JSON object::

    {"version": 1, "reference": {"spec": str | null, "label": str, "args": str},
     "inputs": {"seed": int | null, "sha256": hex,
                "items": [{"shape": [int], "name": str | null, "below": int | null, "is_list": bool,
                           "tensor": str | null}]},
     "outputs": [{"path": str, "shape": [int], "dtype": str, "tensor": str, "step": int, "noise": float}],
     "weights": {"content_digest": "sha256:…" | null, "tensors": {str: "DTYPE [SIZES] sha256:…"}},
     "dtype": str, "device": str, "tolerance": {"atol": float, "rtol": float}, "versions": {str: str}}

``noise`` is the largest difference between runs that differ only in rounding, on the machine that wrote it
(`ckptkit.verifier.forward.measured_noise`).  ``tensors`` are those of the file, by their names in the model, with the
digests of `ckptkit.digests`.  Files of the first releases have neither, and an ``atol`` that goes by the dtype.

``args`` is a Python literal.  Inputs drawn from a seed are a recipe, and the hash says whether it still
gives the same values; inputs that came from a file are kept as tensors.  Of an output of more than 1 MiB
every ``step``-th element is kept, in C order.

A reader accepts what the above says and nothing else.  The reference is taken from a golden file only if it is a
library's by name: a golden file never decides which of a user's files are run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ckptkit import formats
from ckptkit.dtypes import DTYPES
from ckptkit.errors import CorruptError, VerifyError
from ckptkit.formats.json_text import parse
from ckptkit.formats.safetensors import NAME
from ckptkit.limits import DEFAULT_LIMITS
from ckptkit.normalize.parts import require_whole
from ckptkit.startup import dataclass
from ckptkit.torch_bridge import tensors
from ckptkit.verifier.inputs import Input, Inputs, drawn_inputs
from ckptkit.verifier.outputs import OutputTolerance, dtype_name

__all__ = ["KEY", "VERSION", "Golden", "Recorded", "read_golden", "told_args"]

KEY = "ckptkit.golden"
"""The metadata's name."""

VERSION = 1
"""The version of its content."""

_ATOL_BY_DTYPE = (2.3e-16, 1.2e-7, 9.8e-4, 7.9e-3)
"""The value that the first releases recorded if no ``atol`` was given; it hid any change of outputs of that size."""

_SOURCES = ("torchvision", "timm", "transformers")
"""Libraries whose models a golden may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One recorded output: every ``step``-th of its elements, and its noise; ``None``: that was not recorded."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    step: int
    sample: torch.Tensor
    noise: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """A golden file that was read, and found to be whole.

    Attributes:
        path: the file.
        spec: the reference's name; ``None``: it had none.
        label: the reference, for messages.
        args: its arguments.
        inputs: of the model.
        outputs: of the model.
        dtype, device: of the computation.
        tolerance: recorded along.
        weights: for each tensor in the model: dtype, sizes and digest of the file's; empty: not recorded.
        versions: of the packages that computed it.
    """

    path: str
    spec: str | None
    label: str
    args: Mapping[str, object]
    inputs: Inputs
    outputs: tuple[Recorded, ...]
    dtype: str
    device: str
    tolerance: OutputTolerance
    weights: Mapping[str, str]
    versions: Mapping[str, str]

    def model(self) -> str:
        """The reference to build if none is given.

        Raises:
            VerifyError: it is not a library's model.
        """
        if self.spec is None or self.spec.partition(":")[0] not in _SOURCES:
            raise VerifyError(
                f"{self.path}: was recorded with {self.label}, which is your own code; name it with --model",
                path=self.path,
            )
        return self.spec

    def require_model(self, spec: str | None, args: Mapping[str, object]) -> None:
        """Make sure that the model which is verified is the one recorded.

        Raises:
            VerifyError: it is another one, or has other arguments.
        """
        if spec is not None and self.spec is not None and spec != self.spec:
            raise VerifyError(
                f"{self.path}: is the golden file of {self.spec}, not of {spec}; omit --model, or correct it",
                path=self.path,
            )
        if dict(args) != dict(self.args):
            raise VerifyError(
                f"{self.path}: was recorded with the arguments {told_args(self.args)}, not {told_args(args)}; "
                "give the same --model-arg",
                path=self.path,
            )


def told_args(args: Mapping[str, object]) -> str:
    """Arguments in a message."""
    return ", ".join(f"{name}={value!r}" for name, value in args.items()) or "none"


def read_golden(path: str) -> Golden:
    """A golden file, with everything in it checked.

    Raises:
        CorruptError: it is not a golden file, or damaged.
        VerifyError: its recipe gives other inputs with this torch.
        FormatError, FileAccessError: it cannot be read.
    """
    checkpoint, file = formats.read(path)
    try:
        require_whole(checkpoint)
        text = checkpoint.metadata.get(KEY)
        if text is None or checkpoint.origin.format != NAME:
            raise CorruptError(
                f"is not a golden file: expected safetensors with metadata {KEY!r} (--write-golden)", path=path
            )
        values = {n: v.detach().clone() for n, v in tensors(checkpoint.state_dict, map_location="cpu").items()}
    finally:
        file.close()
    document = parse(text.encode(), DEFAULT_LIMITS, "the description in the golden file")
    return _golden(_Fields(document, path, "golden"), values, path)


class _Fields:
    """The fields of a JSON object, each of the type it must have."""

    def __init__(self, value: object, path: str, place: str) -> None:
        self.path, self.place = path, place
        if not isinstance(value, dict):
            raise self.wrong(place, value, "an object")
        self._value: dict[str, object] = value

    def wrong(self, name: str, value: object, expected: str) -> CorruptError:
        return CorruptError(f"{name} is {value!r:.60}; expected {expected}", path=self.path, where=self.place)

    def get(self, name: str, *kinds: type) -> Any:
        value = self._value.get(name)
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if name not in self._value or not fits:
            raise self.wrong(repr(name), value, " or ".join(kind.__name__ for kind in kinds))
        return value

    def has(self, name: str) -> bool:
        return name in self._value

    def inner(self, name: str) -> _Fields:
        return _Fields(self.get(name, dict), self.path, f"{self.place}.{name}")

    def each(self, name: str) -> Iterator[_Fields]:
        for i, value in enumerate(self.get(name, list)):
            yield _Fields(value, self.path, f"{self.place}.{name}[{i}]")

    def number(self, name: str) -> float:
        value = float(self.get(name, int, float))
        if not 0 <= value < float("inf"):
            raise self.wrong(repr(name), value, "a number of at least 0")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = self.get(name, list)
        if len(sizes) > DEFAULT_LIMITS.dimensions or not all(type(s) is int and 0 <= s < 1 << 40 for s in sizes):
            raise self.wrong(repr(name), sizes, "a list of sizes")
        return tuple(sizes)

    def tensor(self, name: str, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found: str = self.get(name, str)
        if found not in values:
            raise self.wrong(repr(name), found, "the name of a tensor in the file")
        return values[found]

    def texts(self, name: str) -> dict[str, str]:
        found: dict[object, object] = self.get(name, dict)
        texts = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, str)}
        if len(texts) != len(found):
            raise self.wrong(repr(name), found, "strings by name")
        return texts


def _golden(fields: _Fields, values: Mapping[str, torch.Tensor], path: str) -> Golden:
    if fields.get("version", int) != VERSION:
        raise fields.wrong("'version'", fields.get("version", int), f"{VERSION}; a newer ckptkit may read it")
    reference = fields.inner("reference")
    try:
        args = ast.literal_eval(reference.get("args", str))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        args = None
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise reference.wrong("'args'", reference.get("args", str), "a dict, as a Python literal")
    dtype: str = fields.get("dtype", str)
    if dtype not in DTYPES or not DTYPES[dtype].is_floating:
        raise fields.wrong("'dtype'", dtype, "a floating-point type")
    tolerance = fields.inner("tolerance")
    outputs = tuple(_output(each, values) for each in fields.each("outputs"))
    atol = tolerance.number("atol")
    if atol in _ATOL_BY_DTYPE and any(each.noise is None for each in outputs):
        atol = 0.0
    return Golden(
        path=path,
        spec=reference.get("spec", str, type(None)),
        label=reference.get("label", str),
        args=args,
        inputs=_inputs(fields.inner("inputs"), values, path),
        outputs=outputs,
        dtype=dtype,
        device=fields.get("device", str),
        tolerance=OutputTolerance(atol=atol, rtol=tolerance.number("rtol")),
        weights=fields.inner("weights").texts("tensors") if fields.has("weights") else {},
        versions=fields.texts("versions"),
    )


def _inputs(fields: _Fields, values: Mapping[str, torch.Tensor], path: str) -> Inputs:
    seed: int | None = fields.get("seed", int, type(None))
    made, given = [], []
    for item in fields.each("items"):
        below: int | None = item.get("below", int, type(None))
        shape = item.shape("shape")
        if (below is not None and below < 1) or 0 in shape or _numel(shape) > DEFAULT_LIMITS.header_nbytes:
            raise item.wrong("the input", (shape, below), "a shape without zeros, and whole numbers below at least 1")
        made.append(
            Input(shape=shape, name=item.get("name", str, type(None)), below=below, is_list=item.get("is_list", bool))
        )
        if seed is None:
            given.append(item.tensor("tensor", values))
            if tuple(given[-1].shape) != shape:
                raise item.wrong("the tensor's shape", tuple(given[-1].shape), str(shape))
    if not made:
        raise fields.wrong("'items'", made, "at least one input")
    if seed is None:
        others = tuple(value.flip(tuple(range(1, value.dim()))) for value in given)
        inputs = Inputs(inputs=tuple(made), values=tuple(given), others=others, path=path)
    else:
        inputs = drawn_inputs(made, seed)
    if inputs.digest() != fields.get("sha256", str):
        if seed is None:
            raise CorruptError("its inputs are not those it was written with (SHA-256)", path=path)
        raise VerifyError(
            f"{path}: seed {seed} gives different inputs with torch {torch.__version__} than those recorded; "
            "write it again with --input FILE, which keeps the values",
            path=path,
        )
    return inputs


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _output(fields: _Fields, values: Mapping[str, torch.Tensor]) -> Recorded:
    shape, step, sample = fields.shape("shape"), fields.get("step", int), fields.tensor("tensor", values)
    dtype: str = fields.get("dtype", str)
    numel = _numel(shape)
    if step < 1 or sample.dim() != 1 or sample.numel() != -(-numel // step) or dtype_name(sample) != dtype:
        raise fields.wrong(
            "the tensor", f"{tuple(sample.shape)} {dtype_name(sample)}", f"every {step}th of {numel} of {dtype}"
        )
    noise = fields.number("noise") if fields.has("noise") else None
    return Recorded(path=fields.get("path", str), shape=shape, dtype=dtype, step=step, sample=sample, noise=noise)
