"""The Julia type of a Python value, and its document: what `typeof` answers in Julia.

Flux's structs need their full type parameters in the file, so types are worked out from values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpustore import devices, flux
from gpustore.document import int64
from gpustore.julia import (
    JuliaType,
    LostArray,
    NamedTuple,
    OpaqueFunction,
    Struct,
    Symbol,
    element_type_of,
    extension_dtype,
)
from gpustore.tree import TrackedArray

_named = JuliaType.named
_ANY = _named("Core.Any")
_SCALAR_TYPES: dict[type, JuliaType] = {
    type(None): _named("Core.Nothing"),
    bool: _named("Core.Bool"),
    int: _named("Core.Int64"),
    float: _named("Core.Float64"),
    str: _named("Core.String"),
    Symbol: _named("Core.Symbol"),
    list: _named("Core.Array", _ANY, 1),
    dict: _named("Base.Dict", _named("Core.Symbol"), _ANY),
}


def type_of(value: Any) -> Any:
    """Return the JuliaType (or OpaqueDocument of a type) that `value` is written as.

    >>> type_of(np.zeros((2, 3), np.float32))
    Core.Array{Core.Float32, 2}
    """
    known = _SCALAR_TYPES.get(type(value))
    if known is not None:
        return known
    if devices.is_array(value):
        return array_type(value)
    if isinstance(value, NamedTuple):
        return named_tuple_type(value)
    if type(value) is tuple:
        return _named("Core.Tuple", *map(type_of, value))
    if isinstance(value, (Struct, OpaqueFunction, LostArray)):
        return value.type
    if isinstance(value, TrackedArray):
        return _tracked_type(value)
    function = flux.function_name(value)
    return _instance_type(value) if function is None else _named(function)


def _tracked_type(value: TrackedArray) -> Any:
    """Return TrackedArray{T, N, A} of the Flux era it was read from, for the data it holds now."""
    inner = type_of(value.data)
    if not isinstance(inner, JuliaType) or len(inner.params) < 2:
        return value.julia_type or _named("Tracker.TrackedArray")
    era = value.julia_type.path if value.julia_type else ("Tracker", "TrackedArray")
    return JuliaType(era, (*inner.params[:2], inner))


def _instance_type(value: Any) -> Any:
    own = getattr(value, "julia_type", None)
    if own is not None:
        return own
    kind = flux.kind_of(value)
    if kind is None:
        return _named(f"Main.{type(value).__name__}")
    return _named(kind.name, *(type_of(field_of(value, name)) for name in kind.params))


def named_tuple_type(value: dict[str, Any]) -> JuliaType:
    """Return the type of a NamedTuple: names and types are its parameters."""
    names = tuple(Symbol(name) for name in value)
    return _named("Core.NamedTuple", names, _named("Core.Tuple", *map(type_of, value.values())))


def array_type(array: Any) -> JuliaType:
    """Return the type of an array on any device."""
    known = element_type_of(numpy_dtype(array))
    return _named("Core.Array", known[0] if known else _ANY, len(array.shape))


def numpy_dtype(array: Any) -> np.dtype[Any]:
    """Return an array's dtype as NumPy's; another library's by its name (`torch.float32`)."""
    dtype = array.dtype
    if isinstance(dtype, np.dtype):
        return dtype
    name = str(dtype).rpartition(".")[2]
    try:
        return np.dtype(name)
    except TypeError:
        return extension_dtype(name) or np.dtype(object)


def field_of(value: Any, name: str) -> Any:
    """Return a field as it is written: the layers of a Chain with names are a NamedTuple."""
    part = getattr(value, name)
    return NamedTuple(part) if name == "layers" and type(part) is dict else part


def is_plain(value: Any) -> bool:
    """Whether a type (or a parameter of one) holds nothing that needs an identity."""
    if isinstance(value, JuliaType):
        return all(map(is_plain, value.params))
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in (int, bool, float, str, Symbol, type(None))


def type_document(value: Any) -> Any:
    """Return the document of a plain type, or of a parameter of one."""
    if isinstance(value, JuliaType):
        params = list(map(type_document, value.params))
        return {"tag": "datatype", "name": list(value.path), "params": params}
    if isinstance(value, tuple):
        return {"tag": "tuple", "data": list(map(type_document, value))}
    if isinstance(value, Symbol):
        return {"tag": "symbol", "name": str(value)}
    return int64()(value) if type(value) is int else value
