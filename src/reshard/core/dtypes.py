"""Element types: one table with each type's name in every format. Nothing else knows dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from reshard.errors import UnsupportedError, brief

if TYPE_CHECKING:
    import numpy as np


class DType(Struct, frozen=True):
    """An element type.

    `name` is torch's name without `torch.`, `itemsize` is bytes an element, `safetensors` the
    code in a safetensors header, `storage` torch's legacy storage class (None: since torch 2.1
    such a tensor is pickled over an `UntypedStorage`), `floating` whether casts to and from it
    round values rather than reinterpret them.
    """

    name: str
    itemsize: int
    safetensors: str
    storage: str | None
    floating: bool

    def rounds_to(self, other: DType) -> bool:
        """Whether a conversion may write it as `other`; to 8 bits it would be no rounding."""
        return self == other or (self.floating and other.floating and other.itemsize > 1)

    @property
    def is_code(self) -> bool:
        """Whether weights of it are codes, which a scale makes numbers of: floats of 8 bits."""
        return self.floating and self.itemsize == 1

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype with the same bytes (ml_dtypes supplies those numpy lacks)."""
        import numpy

        if self.name == "float4_e2m1fn_x2":
            # No numpy type packs two values in a byte; such tensors only pass through, as bytes.
            return numpy.dtype("uint8")
        if self.name in _ML_DTYPES:
            import ml_dtypes

            scalar: type = getattr(ml_dtypes, _ML_DTYPES[self.name])
            return numpy.dtype(scalar)
        return numpy.dtype(self.name)

    def __str__(self) -> str:
        return self.name


# float4_e2m1fn_x2 follows torch: one element is one byte that packs two 4-bit values. safetensors
# counts the 4-bit values instead; its room halves and doubles the last dimension.
_ML_DTYPES = {
    "bfloat16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
    "float8_e8m0fnu": "float8_e8m0fnu",
}

# safetensors/src/tensor.rs (0.8.0) and torch/storage.py (2.13.0).
_TABLE = (
    DType("float64", 8, "F64", "DoubleStorage", True),
    DType("float32", 4, "F32", "FloatStorage", True),
    DType("float16", 2, "F16", "HalfStorage", True),
    DType("bfloat16", 2, "BF16", "BFloat16Storage", True),
    DType("float8_e4m3fn", 1, "F8_E4M3", None, True),
    DType("float8_e5m2", 1, "F8_E5M2", None, True),
    DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ", None, True),
    DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ", None, True),
    DType("float8_e8m0fnu", 1, "F8_E8M0", None, True),
    DType("float4_e2m1fn_x2", 1, "F4", None, False),
    DType("complex64", 8, "C64", "ComplexFloatStorage", False),
    DType("int64", 8, "I64", "LongStorage", False),
    DType("int32", 4, "I32", "IntStorage", False),
    DType("int16", 2, "I16", "ShortStorage", False),
    DType("int8", 1, "I8", "CharStorage", False),
    DType("uint64", 8, "U64", None, False),
    DType("uint32", 4, "U32", None, False),
    DType("uint16", 2, "U16", None, False),
    DType("uint8", 1, "U8", "ByteStorage", False),
    DType("bool", 1, "BOOL", "BoolStorage", False),
)
_BY_NAME = {d.name: d for d in _TABLE}
_BY_SAFETENSORS = {d.safetensors: d for d in _TABLE}
_BY_STORAGE = {d.storage: d for d in _TABLE if d.storage is not None}
# torch's other spellings of the same types.
_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64",
            "int": "int32", "short": "int16", "cfloat": "complex64"}  # fmt: skip

ALL: tuple[DType, ...] = _TABLE


def parse(name: str) -> DType:
    """The type that torch calls `name`, with or without `torch.`.

    >>> parse("torch.bfloat16").itemsize
    2

    Raises `UnsupportedError` for a type that reshard does not know.
    """
    short = name.removeprefix("torch.")
    dtype = _BY_NAME.get(_ALIASES.get(short, short))
    if dtype is None:
        raise UnsupportedError(
            f"dtype {name!r} is not supported; supported are {', '.join(_BY_NAME)}."
        )
    return dtype


def from_safetensors(code: str) -> DType:
    """The type that a safetensors header calls `code`, e.g. `"BF16"`."""
    dtype = _BY_SAFETENSORS.get(code)
    if dtype is None:
        raise UnsupportedError(
            f"safetensors dtype {brief(code)} is not supported; supported are "
            f"{', '.join(_BY_SAFETENSORS)}."
        )
    return dtype


def from_storage(class_name: str) -> DType | None:
    """The type of torch's legacy storage class, e.g. `"BFloat16Storage"`; None if there is none."""
    return _BY_STORAGE.get(class_name)


FLOAT32 = _BY_NAME["float32"]
INT32 = _BY_NAME["int32"]
INT64 = _BY_NAME["int64"]
BFLOAT16 = _BY_NAME["bfloat16"]
FLOAT16 = _BY_NAME["float16"]
UINT8 = _BY_NAME["uint8"]
