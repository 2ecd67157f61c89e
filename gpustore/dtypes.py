"""NumPy's dtypes <-> the Julia types of an array's elements."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gpustore.julia import JuliaType

_NATIVE = {
    "Core.Bool": "?", "Core.Int8": "i1", "Core.Int16": "<i2", "Core.Int32": "<i4",
    "Core.Int64": "<i8", "Core.UInt8": "u1", "Core.UInt16": "<u2", "Core.UInt32": "<u4",
    "Core.UInt64": "<u8", "Core.Float16": "<f2", "Core.Float32": "<f4", "Core.Float64": "<f8",
}  # fmt: skip
# the same by the parts of the name, for documents of types
NATIVE_DTYPES = {tuple(name.split(".")): np.dtype(code) for name, code in _NATIVE.items()}
_COMPLEX = {"Core.Float32": "<c8", "Core.Float64": "<c16"}
_FOREIGN = {  # read under these names, of the packages that define them
    "Core.BFloat16": "bfloat16", "BFloat16s.BFloat16": "bfloat16",
    "DLFP8Types.Float8_E4M3FN": "float8_e4m3fn", "DLFP8Types.Float8_E5M2": "float8_e5m2",
    "DLFP8Types.Float8_E4M3FNUZ": "float8_e4m3fnuz",
    "DLFP8Types.Float8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_ELEMENT_TYPES = {np.dtype(code): JuliaType.named(name) for name, code in _NATIVE.items()}
_ELEMENT_TYPES |= {
    np.dtype(code): JuliaType.named("Base.Complex", JuliaType.named(name))
    for name, code in _COMPLEX.items()
}
_CARRIERS = {1: "Core.UInt8", 2: "Core.UInt16", 8: "Core.Int64"}  # by bytes of an element


# NumPy's own parser divides by the 0 of `timedelta64[s/0]`, which ends the process
_TIME = r"(datetime|timedelta)64\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|[munpfa]s)\]"


def extension_dtype(name: str) -> np.dtype[Any] | None:
    """Return the dtype of this name that Julia has no type for: of ml_dtypes, or a time's."""
    if name.startswith(("datetime64", "timedelta64")):
        return np.dtype(name) if re.fullmatch(_TIME, name) else None
    import ml_dtypes

    scalar = getattr(ml_dtypes, name, None)
    if isinstance(scalar, type) and issubclass(scalar, np.generic):
        return np.dtype(scalar)
    return None


def dtype_of(element_type: Any) -> np.dtype[Any] | None:
    """Return the NumPy dtype whose memory is that of this Julia element type, or None.

    >>> dtype_of(JuliaType.named("Core.Float32"))
    dtype('float32')
    """
    if not isinstance(element_type, JuliaType):
        return None
    name, params = element_type.name, element_type.params
    if not params:
        code = _NATIVE.get(name)
        if code is not None:
            return np.dtype(code)
        return extension_dtype(_FOREIGN[name]) if name in _FOREIGN else None
    if name == "Base.Complex" and len(params) == 1 and isinstance(params[0], JuliaType):
        code = None if params[0].params else _COMPLEX.get(params[0].name)
        return None if code is None else np.dtype(code)
    return None


def element_type_of(dtype: np.dtype[Any]) -> tuple[JuliaType, str | None] | None:
    """Return the Julia element type a dtype is written as, and the dtype's name where that is lost.

    bfloat16, the float8 kinds and datetime64 are written as integers of the same size beside
    their name, so that a Julia without the package that defines them still reads the file. None
    where the dtype cannot be saved.
    """
    dtype = dtype.newbyteorder("<")
    known = _ELEMENT_TYPES.get(dtype)
    if known is not None:
        return known, None
    if dtype.kind in "mM":
        return JuliaType.named("Core.Int64"), dtype.name
    if extension_dtype(dtype.name) == dtype and dtype.itemsize in _CARRIERS:
        return JuliaType.named(_CARRIERS[dtype.itemsize]), dtype.name
    return None
