"""What arguments mean: checked here, once, for the command line, configurations and Python.

A string where several are taken is one, not its letters.  A tolerance is a number that something can be within.
A device is one that torch has.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from typing import Any

from ckptkit.errors import VerifyError

__all__ = ["DEVICE_TYPES", "device_problem", "several", "shapes", "tolerance"]

DEVICE_TYPES = (
    "cpu", "cuda", "mps", "xpu", "meta", "hip", "xla", "hpu", "mtia", "maia", "ipu", "ve", "lazy", "vulkan", "metal",
    "fpga", "mkldnn", "opengl", "opencl", "ideep", "privateuseone",
)  # fmt: skip
"""Every type of device that torch has (``c10/core/DeviceType.h``)."""

_ELSEWHERE = ("npu", "musa", "mlu", "gcu", "dml", "ort", "msnpu", "vsi", "rbln", "spyre", "openreg")
"""What packages beside torch call theirs (``torch.utils.rename_privateuse1_backend``), and torch did before 2.3."""

_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "tpu": "xla", "apple": "mps", "intel": "xpu"}
"""What people call devices."""

_DEVICE = re.compile(r"([a-z][a-z0-9_]*)(?::(0|[1-9][0-9]{0,2}))?\Z")

_MAX_INDEX = 127
"""torch keeps the index in a signed byte (``c10/core/Device.h``)."""


def device_problem(given: str) -> str | None:
    """What is wrong with a device such as ``"cpu"`` or ``"cuda:1"``; ``None``: torch has it, on some machine."""
    found = _DEVICE.match(given)
    kind = found[1] if found else given.partition(":")[0].strip().lower()
    types = (*DEVICE_TYPES, *_ELSEWHERE)
    if kind not in types:
        from difflib import get_close_matches  # every command starts faster without

        near = _MEANT.get(kind) or next(iter(get_close_matches(kind, DEVICE_TYPES, n=1)), None)
        meant = f"did you mean {near!r}?" if near else "expected 'cpu', 'cuda:0', 'mps' or the like"
        return f"{given!r:.80} is not a device location; {meant}"
    if found is None or int(found[2] or 0) > _MAX_INDEX:
        return f"{given!r:.80} is not a device location; expected {kind!r} or '{kind}:N', N from 0 to {_MAX_INDEX}"
    return None


def tolerance(name: str, given: Any) -> float | None:
    """The tolerance, ``None`` where none is given.

    Raises:
        VerifyError: it is NaN, negative, infinite or no number: nothing, or everything, would be within it.
    """
    if given is None:
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise VerifyError(f"{name} {given!s:.80}: expected a finite number of at least 0")
    return value


def several(given: Any) -> tuple[Any, ...]:
    """What was given where several can be: one string or path is one."""
    return (given,) if isinstance(given, (str, bytes, os.PathLike)) else tuple(given)


def shapes(name: str, given: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of inputs.

    Raises:
        VerifyError: one is none.
    """
    found = several(given) if isinstance(given, Iterable) else (given,)
    made = []
    for shape in found:
        sizes = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, (str, bytes)) else ()
        if not sizes or not all(hasattr(size, "__index__") and size is not True and size >= 0 for size in sizes):
            raise VerifyError(
                f"{name}: {shape!r:.80} is not a shape; expected a list of shapes of whole numbers, "
                "as [[1, 3, 224, 224]]"
            )
        made.append(tuple(map(int, sizes)))
    return tuple(made)
