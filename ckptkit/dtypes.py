"""ONE table of element types: torch name, storage class, safetensors name, numpy name, width.

Sources: ``torch.storage._dtype_to_storage_type_map`` and ``_new_dtypes`` (which types are saved
with a typed storage class and which as untyped bytes with an explicit dtype), the safetensors
format's ``Dtype`` enumeration, and the ml_dtypes package for what numpy lacks.

ckptkit calls a dtype by torch's name without the prefix: ``"float32"``, ``"bfloat16"``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ckptkit.errors import DTypeError
from ckptkit.nearness import did_you_mean

__all__ = ["BY_SAFETENSORS", "BY_STORAGE_CLASS", "DTYPES", "DType", "dtype", "meant_dtype"]


class DType(NamedTuple):
    """One element type."""

    name: str
    """torch's name without ``torch.``."""
    itemsize: int
    """Bytes of one element as torch counts elements (``float4_e2m1fn_x2`` packs two values in one); 1 for one of
    ``bits`` smaller than a byte, which is not used to count bytes."""
    kind: str
    """``"float"``, ``"complex"``, ``"int"``, ``"bool"``, ``"quantized"`` or ``"bits"``."""
    storage_class: str | None
    """Name in module ``torch`` of the typed storage; ``None``: saved as ``UntypedStorage``."""
    safetensors: str | None
    """Name in a safetensors header; ``None``: safetensors cannot store it."""
    numpy: str | None
    """Name in numpy, or ``ml_dtypes.NAME``; ``None``: values cannot be computed."""
    bits: int = 0
    """Bits of one element smaller than a byte, for which torch has no type; 0: it has ``itemsize`` bytes."""

    @property
    def is_floating(self) -> bool:
        """Whether torch calls it a floating point type (complex is not)."""
        return self.kind == "float"

    def nbytes(self, numel: int) -> int:
        """Bytes of that many elements one after another, the last one filled up."""
        return -(-numel * self.bits // 8) if self.bits else numel * self.itemsize


DTYPES: dict[str, DType] = {
    row[0]: DType(*row)
    for row in (
        ("float64", 8, "float", "DoubleStorage", "F64", "float64"),
        ("float32", 4, "float", "FloatStorage", "F32", "float32"),
        ("float16", 2, "float", "HalfStorage", "F16", "float16"),
        ("bfloat16", 2, "float", "BFloat16Storage", "BF16", "ml_dtypes.bfloat16"),
        ("int64", 8, "int", "LongStorage", "I64", "int64"),
        ("int32", 4, "int", "IntStorage", "I32", "int32"),
        ("int16", 2, "int", "ShortStorage", "I16", "int16"),
        ("int8", 1, "int", "CharStorage", "I8", "int8"),
        ("uint8", 1, "int", "ByteStorage", "U8", "uint8"),
        ("bool", 1, "bool", "BoolStorage", "BOOL", "bool"),
        ("complex64", 8, "complex", "ComplexFloatStorage", "C64", "complex64"),
        ("complex128", 16, "complex", "ComplexDoubleStorage", None, "complex128"),
        ("quint8", 1, "quantized", "QUInt8Storage", None, None),
        ("qint8", 1, "quantized", "QInt8Storage", None, None),
        ("qint32", 4, "quantized", "QInt32Storage", None, None),
        ("quint4x2", 1, "quantized", "QUInt4x2Storage", None, None),
        ("quint2x4", 1, "quantized", "QUInt2x4Storage", None, None),
        ("uint16", 2, "int", None, "U16", "uint16"),
        ("uint32", 4, "int", None, "U32", "uint32"),
        ("uint64", 8, "int", None, "U64", "uint64"),
        ("float8_e4m3fn", 1, "float", None, "F8_E4M3", "ml_dtypes.float8_e4m3fn"),
        ("float8_e5m2", 1, "float", None, "F8_E5M2", "ml_dtypes.float8_e5m2"),
        ("float8_e4m3fnuz", 1, "float", None, "F8_E4M3FNUZ", "ml_dtypes.float8_e4m3fnuz"),
        ("float8_e5m2fnuz", 1, "float", None, "F8_E5M2FNUZ", "ml_dtypes.float8_e5m2fnuz"),
        ("float8_e8m0fnu", 1, "float", None, "F8_E8M0", "ml_dtypes.float8_e8m0fnu"),
        ("float4_e2m1fn", 1, "float", None, "F4", None, 4),  # of an odd last dimension, which torch cannot pack
        ("float4_e2m1fn_x2", 1, "float", None, "F4", None),
        ("float6_e2m3fn", 1, "float", None, "F6_E2M3", None, 6),
        ("float6_e3m2fn", 1, "float", None, "F6_E3M2", None, 6),
        ("complex32", 4, "complex", None, None, None),
        ("bcomplex32", 4, "complex", None, None, None),
        ("bits8", 1, "bits", None, None, None),
        ("bits16", 2, "bits", None, None, None),
        ("bits1x8", 1, "bits", None, None, None),
        ("bits2x4", 1, "bits", None, None, None),
        ("bits4x2", 1, "bits", None, None, None),
    )
}
"""Every dtype by its torch name."""

BY_STORAGE_CLASS: dict[str, DType] = {d.storage_class: d for d in DTYPES.values() if d.storage_class}
"""Every dtype that has a typed storage class, by that class's name."""

BY_SAFETENSORS: dict[str, DType] = {d.safetensors: d for d in DTYPES.values() if d.safetensors}
"""Every dtype that safetensors can store, by its name there; of the two for F4, torch's."""


def dtype(name: str) -> DType:
    """The table's row for a torch name such as ``"float32"``.

    Raises:
        DTypeError: no such dtype; the message lists the known ones.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise DTypeError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}{meant_dtype(name)}") from None


_CALLED = {
    "half": "float16", "float": "float32", "single": "float32", "double": "float64", "bfloat": "bfloat16",
    "fp16": "float16", "fp32": "float32", "fp64": "float64", "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn",
    "f8": "float8_e4m3fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "fp8-e4m3": "float8_e4m3fn",
    "fp8-e5m2": "float8_e5m2", "float8-e4m3": "float8_e4m3fn", "short": "int16", "int": "int32", "long": "int64",
    "char": "int8", "byte": "uint8", "boolean": "bool", "chalf": "complex32", "cfloat": "complex64",
    "cdouble": "complex128", **{name.lower().replace("_", "-"): each.name for name, each in BY_SAFETENSORS.items()},
}  # fmt: skip
"""Other names of dtypes: torch's (``torch.half``), those in safetensors headers, and common ones."""


def meant_dtype(given: str, known: Collection[str] = DTYPES) -> str:
    """The end of a message about an unknown dtype: ``"; did you mean float16?"``, or nothing."""
    name = given.removeprefix("torch.")
    return did_you_mean(name, known, called={name: of for name, of in _CALLED.items() if of in known})
