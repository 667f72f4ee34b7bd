"""The inputs of a model, and their values: generated from a seed, or read from a file.

Two batches are made of the same values.  The first is the documented or requested input; the other contains one row if
that has several, and two different ones if it has one: this shows whether a row's result depends on the rows beside it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any

import torch

from ckptkit import formats
from ckptkit.checkpoint import StateDict, TensorEntry
from ckptkit.errors import VerifyError
from ckptkit.normalize.parts import require_whole
from ckptkit.startup import dataclass
from ckptkit.torch_bridge import tensors

__all__ = ["Batch", "Input", "Inputs", "drawn_inputs", "read_inputs", "wanted_inputs"]

_POSITION = re.compile(r"(?:input)?_?(\d{1,4})\Z")
"""Names of positional inputs in a file: ``0``, ``input0``, ``input_0``."""

_MAX_NUMEL = 1 << 31
"""Elements of one input: 8 GiB of float32, which no forward check has use for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a model.

    Attributes:
        shape: with the batch first, but for a list of single images.
        name: the keyword it is given by; ``None``: by its position.
        below: whole numbers (int64) from 0 to one less than this, such as token ids; ``None``: numbers in
            [0, 1) of the model's floating point type.
        is_list: whether the model takes a list of single images (torchvision's detection models).
    """

    shape: tuple[int, ...]
    name: str | None = None
    below: int | None = None
    is_list: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inputs:
    """Values for a model, on the CPU, before they are cast to its floating point type.

    Attributes:
        inputs: each input's description.
        values: of each, in the same order.
        others: values of the same shapes and different content, for a second row.
        seed: of the generated values; ``None``: they were read from ``path``.
        path: the file they were read from.
    """

    inputs: tuple[Input, ...]
    values: tuple[torch.Tensor, ...]
    others: tuple[torch.Tensor, ...]
    seed: int | None = None
    path: str | None = None

    @property
    def is_list(self) -> bool:
        """Whether the model takes single images in a list."""
        return any(each.is_list for each in self.inputs)

    @property
    def rows(self) -> int | None:
        """Rows of the batch; ``None``: the inputs' first dimensions differ, so they are not a batch."""
        if self.is_list:
            return len(self._images(self.values))
        sizes = {value.shape[0] if value.dim() else None for value in self.values}
        return sizes.pop() if len(sizes) == 1 else None

    def batch(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The documented batch, on a device, floating point values cast to ``dtype``."""
        return self._given(self.values, device, dtype)

    def rebatched(self, device: torch.device, dtype: torch.dtype) -> Batch | None:
        """Only row 0 if the batch has several rows, otherwise it and another one; ``None``: it is not a batch."""
        rows = self.rows
        if rows is None or self.is_list:
            return None
        if rows > 1:
            return self._given([value[:1] for value in self.values], device, dtype)
        pairs = [torch.cat([a, b]) for a, b in zip(self.values, self.others, strict=True)]
        return self._given(pairs, device, dtype)

    @property
    def rows_differ(self) -> bool:
        """Whether some input's first two rows, in the batch or its pair, were drawn and are different ones."""
        if self.seed is None or self.rows is None or self.is_list:
            return False
        if self.rows == 1:
            return any(not torch.equal(a, b) for a, b in zip(self.values, self.others, strict=True))
        return any(not torch.equal(value[0], value[1]) for value in self.values)

    def digest(self) -> str:
        """SHA-256 of names, shapes, types and values."""
        made = hashlib.sha256()
        for each, value in zip(self.inputs, self.values, strict=True):
            made.update(f"{each.name}|{tuple(value.shape)}|{value.dtype}|".encode())
            made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return made.hexdigest()

    def __str__(self) -> str:
        shown = ("x".join(str(size) for size in value.shape) or "scalar" for value in self.values)
        named = (
            text if each.name is None else f"{each.name} {text}" for each, text in zip(self.inputs, shown, strict=True)
        )
        return " and ".join(named)

    def _images(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [image for value in values for image in (value.unbind(0) if value.dim() == 4 else (value,))]

    def _given(self, values: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> Batch:
        if self.is_list:
            return Batch(args=([_on(image, device, dtype) for image in self._images(values)],))
        pairs = list(zip(self.inputs, (_on(value, device, dtype) for value in values), strict=True))
        return Batch(
            args=tuple(value for each, value in pairs if each.name is None),
            kwargs={each.name: value for each, value in pairs if each.name is not None},
        )


def _on(value: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def wanted_inputs(known: Sequence[Input], shapes: Sequence[Sequence[int]], label: str) -> tuple[Input, ...]:
    """The inputs to draw: those the reference documents, in the shapes asked for.

    Args:
        known: the reference's documented inputs; empty: unknown.
        shapes: asked for, by position; a shape keeps the kind of the input it is for.  One shape is
            for all inputs that are documented alike; of a model that takes a list each is for more images.
        label: the reference, for messages.

    Raises:
        VerifyError: neither says, or one is not a shape.
    """
    for shape in shapes:
        if not shape or any(size < 1 for size in shape):
            raise VerifyError(f"input shape {tuple(shape)}: expected sizes of at least 1, such as 1,3,224,224")
        if math.prod(shape) > _MAX_NUMEL:
            raise VerifyError(f"input shape {tuple(shape)}: {math.prod(shape):,} elements are more than {_MAX_NUMEL:,}")
    if not shapes and not known:
        raise VerifyError(
            f"the input of {label} is unknown; give --input-shape 1,3,224,224 (once for each input), "
            "--input FILE or --no-forward"
        )
    if not shapes:
        return tuple(known)
    given = [tuple(shape) for shape in shapes]
    if any(each.is_list for each in known):
        return tuple(Input(shape=shape, is_list=True) for shape in given)
    if len(given) == 1 and len({each.shape for each in known}) == 1:
        given *= len(known)
    kinds = [*known[: len(given)], *(Input(shape=shape) for shape in given[len(known) :])]
    return (*(replace(kind, shape=shape) for kind, shape in zip(kinds, given, strict=True)), *known[len(given) :])


def drawn_inputs(inputs: Sequence[Input], seed: int) -> Inputs:
    """Values from a seed, the same on every machine and device.

    Raises:
        VerifyError: there is no memory for them, or the seed is invalid.
    """
    try:
        return Inputs(inputs=tuple(inputs), values=_drawn(inputs, seed), others=_drawn(inputs, seed + 1), seed=seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VerifyError(f"the inputs cannot be made from seed {seed}: {reason}") from error


def _drawn(inputs: Sequence[Input], seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.rand(each.shape, generator=generator, dtype=torch.float32)
        if each.below is None
        else torch.randint(0, each.below, each.shape, generator=generator)
        for each in inputs
    )


def read_inputs(path: str, known: Sequence[Input]) -> Inputs:
    """Values from a file: any container, never executed.

    Tensors named ``0``, ``1`` or ``input0``, ``input1`` are given by position, in that order, others by
    their name; a bare tensor is the one input, and of a list of tensors each is one.

    Args:
        path: the file.
        known: the reference's documented inputs; a list of images stays one.

    Raises:
        VerifyError: it contains no tensors, or their positions have gaps.
        FormatError, FileAccessError: it cannot be read.
    """
    checkpoint, file = formats.read(path)
    try:
        require_whole(checkpoint)
        entries: Mapping[str, TensorEntry] = checkpoint.state_dict
        rest = checkpoint.rest
        if isinstance(rest, TensorEntry):
            entries = {"0": rest}
        elif not entries and isinstance(rest, (list, tuple)):
            entries = {str(i): entry for i, entry in enumerate(rest) if isinstance(entry, TensorEntry)}
            entries = entries if len(entries) == len(rest) else {}
        if not entries:
            raise VerifyError(
                f"{path}: contains no inputs (its kind is {checkpoint.origin.kind!r}); expected tensors named 0, "
                "1 … or by the keywords of the model's forward, or a bare tensor",
                path=path,
            )
        values = {
            name: value.detach().clone()
            for name, value in tensors(StateDict(dict(entries)), map_location="cpu", checksums=True).items()
        }
    finally:
        file.close()
    return inputs_of(values, known, path)


def inputs_of(values: Mapping[str, torch.Tensor], known: Sequence[Input], path: str) -> Inputs:
    """Values by name as inputs; see `read_inputs`.

    Raises:
        VerifyError: their positions have gaps, or a list of images is given something else.
    """
    positions = {name: int(found[1]) for name in values if (found := _POSITION.match(name))}
    if sorted(positions.values()) != list(range(len(positions))):
        raise VerifyError(
            f"{path}: its inputs {', '.join(sorted(positions))} leave gaps; expected 0, 1, 2 …", path=path
        )
    is_list = any(each.is_list for each in known)
    names = [*sorted(positions, key=positions.__getitem__), *(name for name in values if name not in positions)]
    if is_list and (len(names) > len(positions) or any(v.dim() not in (3, 4) for v in values.values())):
        raise VerifyError(
            f"{path}: the model takes a list of images; expected tensors of 3 or 4 dimensions, by position", path=path
        )
    made = tuple(
        Input(shape=tuple(values[name].shape), name=None if name in positions else name, is_list=is_list)
        for name in names
    )
    given = tuple(values[name] for name in names)
    # A second row that any model takes: the first one, backwards.
    others = tuple(value.flip(tuple(range(1 if value.dim() > 1 else 0, value.dim()))) for value in given)
    return Inputs(inputs=made, values=given, others=others, path=path)
