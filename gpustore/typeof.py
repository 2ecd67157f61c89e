"""The Julia type of a Python value, and its document: what `typeof` answers in Julia.

Flux's structs need their full type parameters in the file, so types are worked out from values.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import numpy as np

from gpustore import devices, dictionaries, flux
from gpustore.document import int64
from gpustore.dtypes import element_type_of, extension_dtype
from gpustore.errors import UnsupportedValueError
from gpustore.julia import JuliaType, LostArray, NamedTuple, OpaqueFunction, Struct, Symbol
from gpustore.kinds import StructKind
from gpustore.model_state import named_layers
from gpustore.tree import TrackedArray
from gpustore.values import (
    Char,
    DataFrame,
    Entries,
    Int128,
    JuliaArray,
    JuliaDict,
    JuliaSet,
    UInt128,
    missing,
    origin_of,
    range_parts,
)

_named = JuliaType.named
_ANY = _named("Core.Any")
_SYMBOL_DICT = _named("Base.Dict", _named("Core.Symbol"), _ANY)
_TYPES: dict[type, JuliaType] = {
    type(None): _named("Core.Nothing"),
    bool: _named("Core.Bool"),
    float: _named("Core.Float64"),
    complex: _named("Base.Complex", _named("Core.Float64")),
    str: _named("Core.String"),
    bytes: _named("Core.Array", _named("Core.UInt8"), 1),
    bytearray: _named("Core.Array", _named("Core.UInt8"), 1),
    Symbol: _named("Core.Symbol"),
    list: _named("Core.Array", _ANY, 1),
    set: dictionaries.SET,
    frozenset: dictionaries.SET,
    datetime.date: _named("Dates.Date"),
    datetime.datetime: _named("Dates.DateTime"),
    Char: _named("Core.Char"),
    Int128: _named("Core.Int128"),
    UInt128: _named("Core.UInt128"),
    type(missing): _named("Base.Missing"),
    JuliaType: _named("Core.DataType"),
}


def type_of(value: Any) -> Any:
    """Return the JuliaType (or OpaqueDocument of a type) that `value` is written as.

    >>> type_of(np.zeros((2, 3), np.float32))
    Core.Array{Core.Float32, 2}
    """
    if type(value) is np.ndarray:
        return array_type(value)
    known = _TYPES.get(type(value))
    if known is not None:
        return known
    kind = flux.kind_of(value)
    if kind is not None and kind.is_layer and type(value) is not TrackedArray:
        return _instance_type(value)
    if isinstance(value, FunctionType):
        function = flux.function_name(value)
        return _instance_type(value) if function is None else _function_type(function)
    if devices.is_array(value):
        return array_type(value)
    if isinstance(value, (int, np.generic, range)) and not isinstance(value, (str, bytes)):
        return _number_type(value)
    if isinstance(value, NamedTuple):
        return named_tuple_type(value)
    if type(value) in (dict, Entries):
        return _SYMBOL_DICT if dictionaries.is_document(value) else dictionaries.DICT
    if type(value) is tuple:
        return _tuple_type(value)
    if isinstance(value, (JuliaDict, JuliaSet)):
        return value.julia_type
    if isinstance(value, DataFrame):
        return value.struct.type
    if isinstance(value, (Struct, OpaqueFunction, LostArray)):
        return value.type
    if isinstance(value, JuliaArray):
        return _named("Core.Array", value.element_type, len(value.shape))
    if isinstance(value, TrackedArray):
        return _tracked_type(value)
    function = flux.function_name(value)
    return _instance_type(value) if function is None else _function_type(function)


def _tuple_type(value: tuple[Any, ...]) -> JuliaType:
    known, forms = _remembered.types or {}, _remembered.forms
    own = (known.get(forms.get(id(part))) for part in value)
    parts = zip(own, value, strict=True)
    return _named(
        "Core.Tuple", *[type_of(part) if found is None else found[1] for found, part in parts]
    )


def _number_type(value: Any) -> JuliaType:
    if isinstance(value, range):
        return range_parts(value)[0]
    if isinstance(value, np.generic):
        known = element_type_of(value.dtype)
        return known[0] if known else _ANY
    if -(2**63) <= value < 2**63:
        return _named("Core.Int64")
    return _named("Core.Int128" if value < 2**127 else "Core.UInt128")


def _tracked_type(value: TrackedArray) -> Any:
    """Return TrackedArray{T, N, A} of the Flux era it was read from, for the data it holds now."""
    inner = type_of(value.data)
    if not isinstance(inner, JuliaType) or len(inner.params) < 2:
        return value.julia_type or _named("Tracker.TrackedArray")
    era = value.julia_type.path if value.julia_type else ("Tracker", "TrackedArray")
    return JuliaType(era, (*inner.params[:2], inner))


class _Remembered(threading.local):
    """What a thread has asked for while `remembering`: objects and their types, by form or id."""

    types: dict[Any, tuple[Any, Any]] | None = None
    forms: Mapping[int, Any] = {}


_remembered = _Remembered()


@contextlib.contextmanager
def remembering(forms: Mapping[int, Any]) -> Iterator[None]:
    """Work out the type of each object once while this lasts: a Chain's has those of its layers.

    And of those that have a form, by id, once for all of one form: they are alike.
    """
    outer = _remembered.types, _remembered.forms
    _remembered.types, _remembered.forms = {}, forms
    try:
        yield
    finally:
        _remembered.types, _remembered.forms = outer


def _instance_type(value: Any) -> Any:
    known = _remembered.types
    if known is None:
        return _type_today(value)
    key = _remembered.forms.get(id(value), id(value))
    found = known.get(key)
    if found is None:
        found = known[key] = value, _type_today(value)
    return found[1]


def _type_today(value: Any) -> Any:
    """Return the type of an object: that of its file, with the parameters of its fields today."""
    own, kind = getattr(value, "julia_type", None), flux.kind_of(value)
    if kind is None:
        return _named(f"Main.{type(value).__name__}") if own is None else own
    if kind.becomes is not None:
        return type_of(kind.becomes(value))
    if isinstance(own, JuliaType) and len(own.params) == len(kind.params):
        params = (
            _param(name, value, kind)
            if callable(name) or "." in name
            else retyped(old, field_of(value, name, kind))
            for old, name in zip(own.params, kind.params, strict=True)
        )
        return JuliaType(own.path, tuple(params))
    if own is not None:
        return own
    given = tuple([_param(name, value, kind) for name in kind.params])
    are_types = all(type(param) is JuliaType for param in given)  # 1 would be taken for true
    return _known_type(kind.name, given) if are_types else _named(kind.name, *given)


@functools.lru_cache(1024)
def _known_type(name: str, params: tuple[Any, ...]) -> JuliaType:
    """Return the same object for the same type: those that write it look it up by identity."""
    return _named(name, *params)


def _param(name: Any, value: Any, kind: StructKind) -> Any:
    """Return a type parameter of an object: a function of it, or the type of a field."""
    if callable(name):
        return name(value)
    if "." not in name:
        return type_of(field_of(value, name, kind))
    first, _, inner = name.partition(".")
    return type_of(getattr(field_of(value, first, kind), inner))


def retyped(recorded: Any, value: Any) -> Any:
    """Return the type recorded for a value, brought up to date where the value says another.

    A list does not tell its element type, so for it, and for whatever else keeps no type of its
    own, the record stands.
    """
    if not isinstance(recorded, JuliaType):
        return type_of(value) if recorded is None else recorded
    if type(value) is tuple and recorded.name == "Core.Tuple":
        if len(recorded.params) == len(value):
            return JuliaType(recorded.path, tuple(map(retyped, recorded.params, value)))
    elif type(value) is list:
        return recorded
    now = type_of(value)
    return recorded if recorded.is_same(now) else now


def named_tuple_type(value: dict[str, Any]) -> JuliaType:
    """Return the type of a NamedTuple: names and types are its parameters."""
    names = tuple(Symbol(name) for name in value)
    own = getattr(value, "julia_type", None)
    if own is not None and len(own.params) == 2 and own.params[0] == names:
        return JuliaType(own.path, (own.params[0], retyped(own.params[1], tuple(value.values()))))
    return _named("Core.NamedTuple", names, _named("Core.Tuple", *map(type_of, value.values())))


def array_type(array: Any) -> Any:
    """Return the type of an array on any device."""
    twin = origin_of(array)
    if isinstance(twin, Struct):
        return twin.type
    is_plain = type(array) is np.ndarray
    return _array_type(array.dtype if is_plain else numpy_dtype(array), len(array.shape))


@functools.lru_cache(256)
def _array_type(dtype: np.dtype[Any], rank: int) -> JuliaType:
    known = element_type_of(dtype)
    return _named("Core.Array", known[0] if known else _ANY, rank)


@functools.lru_cache(256)
def _function_type(name: str) -> JuliaType:
    return _named(name)


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


def _is_unset(part: Any) -> bool:
    """Whether a field holds nothing that a file can: None, or a generator of random numbers."""
    return part is None or hasattr(part, "bit_generator")  # numpy.random takes 8 ms to import


def field_of(value: Any, name: str, kind: StructKind | None) -> Any:
    """Return a field as it is written, by its row of the table: named layers are a NamedTuple."""
    if kind is None or not (kind.written or kind.turned):
        return named_layers(name, getattr(value, name))  # as below, for most kinds
    for field, work_out in kind.written:
        if field == name and _is_unset(value.__dict__.get(name)):
            return _worked_out(value, name, work_out, value)
    part = getattr(value, name)
    for field, turn in kind.turned:
        part = _worked_out(value, name, turn, part) if field == name else part
    return named_layers(name, part)


def _worked_out(value: Any, name: str, make: Callable[[Any], Any], given: Any) -> Any:
    try:
        return make(given)
    except (AttributeError, TypeError, ValueError, LookupError) as error:
        raise UnsupportedValueError(
            f"{type(value).__name__}.{name}: what is written cannot be worked out ({error}); set "
            "the layer's fields to what Flux has there"
        ) from error


def is_plain(value: Any) -> bool:
    """Whether a type (or a parameter of one) holds nothing that needs an identity."""
    if isinstance(value, JuliaType):
        return all(map(is_plain, value.params))
    if type(value) is tuple:
        return all(map(is_plain, value))
    return type(value) in (int, bool, float, str, Symbol, type(None), np.int32)


def type_document(value: Any, spelling: frozenset[str] = frozenset()) -> Any:
    """Return the document of a plain type, or of a parameter of one.

    `spelling` are those of Core and Base that are written as parts of Main.
    """
    if isinstance(value, JuliaType):
        params = [type_document(param, spelling) for param in value.params]
        return {
            "tag": "datatype",
            "name": names_of(value, spelling),
            "params": params_document(params, spelling),
        }
    if isinstance(value, tuple):
        return {"tag": "tuple", "data": [type_document(part, spelling) for part in value]}
    if isinstance(value, Symbol):
        return {"tag": "symbol", "name": str(value)}
    if type(value) is np.int32:
        return int(value)
    return int64()(value) if type(value) is int else value


def names_of(value: JuliaType, spelling: frozenset[str]) -> list[str]:
    main = ["Main"] if value.path[:1] and value.path[0] in spelling else []
    return main + list(value.path)


def params_document(params: list[Any], spelling: frozenset[str]) -> Any:
    """Return type parameters as BSON.jl writes them: an array where all are of one bits type."""
    kinds = {type(param) for param in params}
    if len(kinds) != 1 or not kinds <= {bool, int, float, int64()}:
        return params
    kind = kinds.pop()
    name, code = _PACKED.get(kind, ("Core.Int64", "<i8"))
    return {
        "tag": "array",
        "type": type_document(_named(name), spelling),
        "size": [int64()(len(params))],
        "data": np.array(params, code).tobytes(),
    }


_PACKED = {bool: ("Core.Bool", "?"), int: ("Core.Int32", "<i4"), float: ("Core.Float64", "<f8")}
