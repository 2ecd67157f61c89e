"""What code from a file calls, and how: functions of the table, layers, those of Core itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from gpustore import flux, limits
from gpustore.allowlist import BY_TWIN, TABLE
from gpustore.arithmetic import converted, settled
from gpustore.broadcasting import Function, Held, Row, materialize, whole
from gpustore.errors import OpaqueCodeError
from gpustore.julia import JuliaType, NamedTuple, OpaqueFunction, Struct
from gpustore.semantics import Value, array, getindex, items

_OUTSIDE_STEPS = 100  # that a call of a layer or of a supplied function counts for
_LEGACY = {"W": "weight", "b": "bias", "over": "layers", "α": "scale", "β": "bias", "σ²": "σ2",
           "ϵ": "ε"}  # fmt: skip
_LAZY = ("*", "adjoint", "transpose", "'", "materialize", "tuple")  # take an adjoint as it is
_WITHOUT_READING = (
    "size", "length", "ndims", "axes", "getindex", "iterate", "indexed_iterate", "firstindex",
    "lastindex", "eachindex", "first", "last", "tuple", "===", "!==", "isa", "eltype", "isnothing",
    "broadcasted", "Ref", "=>", "zero", "oftype",
)  # fmt: skip  # what these take does not grow with their arguments


class Supplied(Exception):
    """Carries what a function that the user supplied raised: it comes out as it is."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def outside(value: Any) -> Any:
    """Return a result as a caller in Python expects it, without what Julia leaves undone."""
    if isinstance(value, tuple) and type(value) is tuple:
        limits.take_steps(len(value))
        return tuple(map(outside, value))
    if isinstance(value, Held):
        return value.value
    return settled(value.array if isinstance(value, Row) else materialize(value))


def supplied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's function such that its own errors come out as they are."""

    @functools.wraps(function, assigned=())
    def call(*args: Any, **options: Any) -> Any:
        limits.take_steps(_OUTSIDE_STEPS)
        try:
            return function(*map(outside, args), **options)
        except Exception as error:
            raise Supplied(error) from error

    return call


def called(function: Any, args: tuple[Any, ...], options: Any) -> Any:
    """Call a function of the table, of the file or of the user, or a layer."""
    function = twin_of(function)
    if isinstance(function, Function):
        if function.name not in _LAZY:
            args = tuple(whole(arg) if isinstance(arg, Row) else arg for arg in args)
        value = function(*args, **options)
        read = () if function.name in _WITHOUT_READING else args
        limits.take_elements(sum(map(_weight, (*read, value))))
        return value
    if function is None or not callable(function) or isinstance(function, type):
        raise OpaqueCodeError(f"the code in this file calls {function!r}, which is no function")
    limits.take_steps(_OUTSIDE_STEPS if flux.kind_of(function) is not None else 1)
    if isinstance(function, OpaqueFunction) or flux.kind_of(function) is not None:
        args = tuple(map(outside, args))
    return function(*args, **options)


def twin_of(function: Any) -> Any:
    """Return the table's function for what stands for it in a model: a Python one, or a type."""
    if isinstance(function, JuliaType) and not function.params:
        return (
            TABLE.get(function.path[-1], function)
            if function.path[-2:-1] == ("Core",)
            else function
        )
    if not callable(function):
        return function
    try:
        return BY_TWIN.get(function, function)
    except TypeError:  # not hashable: a layer
        return function


def _weight(value: Any) -> int:
    """Return how many elements a value counts for."""
    if isinstance(value, (tuple, list)):
        return 8 * len(value)
    size = getattr(value, "size", 0)
    return size if isinstance(size, int) else 0


class _NamedTupleOf:
    """NamedTuple{names}: called with a tuple of values."""

    def __init__(self, names: Any) -> None:
        self.names = tuple(map(str, names))

    def __call__(self, values: Any) -> NamedTuple:
        return NamedTuple(zip(self.names, values, strict=True))


def _apply_type(base: Any, *params: Any) -> Any:
    if base is _VAL:
        return lambda: Value(params[0])
    if base is _NAMED_TUPLE:
        return _NamedTupleOf(params[0])
    if getattr(base, "name", None) in _ARRAYS and getattr(params[0], "dtype", None) is not None:
        kind = params[0]
        convert = lambda x: converted(kind, array(x))  # noqa: E731
        return Function(base.name, convert, convert, kind.dtype)
    raise OpaqueCodeError(
        "the code in this file makes a type; only Val, NamedTuple and arrays of numbers are known"
    )


def _keyword_function(function: Any) -> Callable[..., Any]:
    return lambda options, _, *args: called(function, args, dict(options))


def _keyword_call(options: Any, function: Any, *args: Any) -> Any:
    return called(function, args, dict(options))


def _splat(function: Any, *parts: Any) -> Any:
    args: list[Any] = []
    for part in parts:
        limits.take_elements(8 * (len(part) if hasattr(part, "__len__") else 1))
        args.extend(items(part))
        if len(args) > 10_000:
            raise OpaqueCodeError("the code in this file calls with too many arguments")
    return called(function, tuple(args), {})


def getfield(value: Any, name: Any, *order: Any) -> Any:
    """Return a field by name, or by position of a tuple: only what the file itself could say."""
    if isinstance(name, int) and isinstance(value, (tuple, list)):
        return getindex(value, name)
    name = str(name)
    if isinstance(value, dict) and name in value:
        return value[name]
    if isinstance(value, Struct) and value.fields is not None and name in value.fields:
        return value.data[value.fields.index(name)]
    if isinstance(value, Struct) and name == "contents" and repr(value.type) == "Core.Box":
        return value.data[0]
    if isinstance(value, Held) and name == "x":
        return value.value
    if dataclasses.is_dataclass(value) and flux.kind_of(value) is not None:
        names = [field.name for field in dataclasses.fields(value)]
        known = name if name in names else _LEGACY.get(name, "")
        if known in names and not known.startswith("julia_"):
            return getattr(value, known)
    raise OpaqueCodeError(
        f"the code in this file reads .{name}, which a {type(value).__name__} does not have"
    )


_VAL, _NAMED_TUPLE = Function("Val", Value), object()
_ARRAYS = ("Array", "Vector", "Matrix")
SPECIAL: dict[str, Any] = {
    "Val": _VAL,
    "NamedTuple": _NAMED_TUPLE,
    "apply_type": _apply_type,
    "kwfunc": _keyword_function,
    "kwcall": _keyword_call,
    "_apply": _splat,
    "_apply_iterate": lambda iterate, function, *parts: _splat(function, *parts),
    "Tuple": lambda xs: tuple(items(xs)),
}
