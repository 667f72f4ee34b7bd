"""numpy's arrays in pickles, as far as their bytes are understood; nothing is executed, and numpy is not needed.

An array is ``_reconstruct(class, (0,), b"b")`` and BUILD with ``(version, shape, dtype, is_fortran, bytes)``
(``numpy/_core/src/multiarray/methods.c``, ``array_reduce``; before version 1 without the number), a masked one the same
with more at the end (``numpy/ma/core.py``), of protocol 5 ``_frombuffer(bytes, dtype, shape, order)``
(``numpy/_core/numeric.py``), and a scalar ``scalar(dtype, bytes)``.  A dtype is ``dtype("f4", False, True)`` and BUILD
with ``(3, byteorder, subdtype, names, fields, …)``.  The modules were called ``numpy.core`` before numpy 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeGuard

from ckptkit.bytesource import ByteRange
from ckptkit.dtypes import DTYPES
from ckptkit.pickling.inert import Global, Object, is_global
from ckptkit.pickling.tensors import shape_of
from ckptkit.startup import pattern

__all__ = [
    "Array",
    "ArrayLayout",
    "LocatedBytes",
    "array_of",
    "bytes_reversed",
    "is_array",
    "is_numpy_scalar",
    "itemsize_of",
    "layout_of",
    "names_arrays",
    "parts_of",
]

_FLOATS = {"f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"}
"""The floating point types of numpy that torch has, by their codes."""

_OTHERS = {
    "b1": "bool", "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
    "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
}  # fmt: skip
"""The other types of numpy that torch has."""

_WITHOUT_NAN = "biuSUMmO"
"""First letters of the codes of types without NaN: bool, whole numbers, text, times, objects (they are in the tree)."""

_NDARRAY = ("numpy", "ndarray")
_MADE = pattern(r"(?:f[248]|c8|c16|[iu][1248]|b1|[SU][0-9]{1,6})\Z")
"""Codes of the types that numpy makes of bytes."""

_MOST_DIMENSIONS = 32
"""Of an array; numpy 2 takes 64."""

_MAKERS = ("_reconstruct", "_mareconstruct", "scalar", "_frombuffer")


class Array(NamedTuple):
    """The bytes of an array.

    Attributes:
        dtype: torch name of a floating or complex type; ``"uint8"`` represents all types without NaN; ``None``: the
            values cannot be interpreted.
        data: the bytes, in some order of the elements, each element little-endian.
    """

    dtype: str | None
    data: bytes


class LocatedBytes(bytes):
    """The bytes of an array that were left in place: it is empty, and equal only to itself.

    Attributes:
        source: of the bytes.
    """

    source: ByteRange

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class ArrayLayout(NamedTuple):
    """The kind of an array or a scalar, with its bytes.

    Attributes:
        code: of its type, as numpy writes it (``"f4"``), or a name of ml_dtypes; empty: it is not understood.
        swapped: whether its bytes are big-endian.
        shape: in elements; ``None``: it is a scalar, or not understood.
        is_fortran: whether elements along the first dimension are consecutive.
        data: its bytes; ``None``: they are not there.
        subclass: name of its class, if that is not numpy's own ``ndarray``.
        is_plain: whether numpy alone makes it: it has no subclass, and a type of plain values.
    """

    code: str
    swapped: bool
    shape: tuple[int, ...] | None
    is_fortran: bool
    data: bytes | bytearray | None
    subclass: str | None
    is_plain: bool

    @property
    def dtype(self) -> str | None:
        """The type's name in torch; ``None``: torch has none like it."""
        return self.code if self.code in DTYPES else _FLOATS.get(self.code) or _OTHERS.get(self.code)


def is_array(node: object) -> TypeGuard[Object]:
    """Whether a node makes a numpy array or scalar."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.cls.name not in _MAKERS:
        return False
    return node.cls.module.partition(".")[0] == "numpy"


def is_numpy_scalar(node: object) -> bool:
    """Whether an array is but a number."""
    return is_array(node) and node.class_name.endswith(".scalar")


def names_arrays(names: Iterable[str]) -> bool:
    """Whether a pickle with these names may contain an array."""
    return any(name.startswith("numpy.") and name.endswith(("._reconstruct", "._frombuffer")) for name in names)


def layout_of(node: Object) -> ArrayLayout:
    """The facts about a node that `is_array`."""
    dtype, data, sizes, order = parts_of(node)
    code, swapped = _code_of(dtype)
    shape = None if is_numpy_scalar(node) else shape_of(sizes)
    if min(shape or (), default=0) < 0:
        shape = None
    found = data if isinstance(data, (bytes, bytearray)) else None
    subclass = None
    if node.class_name.endswith("reconstruct"):  # of a masked array, too
        cls = node.args[0] if node.args else None
        subclass = None if is_global(cls, *_NDARRAY) else cls.name if isinstance(cls, Global) else "?"
    is_shaped = is_numpy_scalar(node) or (shape is not None and len(shape) <= _MOST_DIMENSIONS)
    is_typed = _MADE.match(code) is not None or code in DTYPES
    is_plain = is_typed and is_shaped and found is not None and subclass is None
    return ArrayLayout(code, swapped, shape, order in (True, "F"), found, subclass, is_plain)


def array_of(node: Object) -> Array:
    """The bytes of what `is_array`."""
    layout = layout_of(node)
    name = layout.dtype or ("uint8" if layout.code[:1] in (*_WITHOUT_NAN,) else None)
    if name is not None and DTYPES[name].kind not in ("float", "complex"):
        return Array("uint8", b"")
    if name is None or layout.data is None:
        return Array(None, b"")
    data = bytes(layout.data)
    return Array(name, bytes_reversed(data, name) if layout.swapped else data)


def parts_of(node: Object) -> tuple[object, object, object, object]:
    """The dtype, bytes, shape and order of an array, as the pickle gives them."""
    shape: object = None
    order: object = False
    if is_numpy_scalar(node):
        dtype, data = (*node.args, None, None)[:2]
    elif node.class_name.endswith("._frombuffer"):
        data, dtype, shape, order = (*node.args, None, None, None, None)[:4]
    else:
        state = node.state if isinstance(node.state, tuple) else ()
        if len(state) == 4:  # written before there were versions
            state = (0, *state)
        _, shape, dtype, order, data = (*state, None, None, None, None, None)[:5]
    if isinstance(data, Object) and data.class_name in ("builtins.bytes", "__builtin__.bytes") and not data.args:
        data = b""  # as protocol 2 has it
    return dtype, data, shape, order


def _code_of(node: object) -> tuple[str, bool]:
    """The code of a dtype, of ml_dtypes' its name, and whether its elements are big-endian; ``""``: not understood."""
    if not isinstance(node, Object) or not isinstance(node.cls, Global) or node.cls.qualified != "numpy.dtype":
        return "", False
    code = node.args[0] if node.args else None
    state = node.state if isinstance(node.state, tuple) else ()
    if any(part is not None for part in state[2:5]):  # of several fields, or of arrays
        return "", False
    swapped = state[1:2] == (">",)
    if isinstance(code, Global):  # bfloat16 and the like
        return (code.name if code.module == "ml_dtypes" and code.name in DTYPES else ""), swapped
    return (code if isinstance(code, str) else ""), swapped


def itemsize_of(code: str) -> int | None:
    """Bytes of an element of a type, by its code; ``None``: it is not of plain values, or not understood."""
    if code in DTYPES:
        return DTYPES[code].itemsize
    return int(code[1:]) * (4 if code[0] == "U" else 1) if _MADE.match(code) else None


def bytes_reversed(data: bytes, name: str) -> bytes:
    """The bytes of each element reversed, or for a complex one those of each part."""
    row = DTYPES[name]
    width = row.itemsize // 2 if row.kind == "complex" else row.itemsize
    out = bytearray(len(data) // width * width)
    for i in range(width):
        out[i::width] = data[width - 1 - i : len(out) : width]
    return bytes(out)
