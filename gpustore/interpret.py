"""A small interpreter of Julia's lowered code, for the anonymous functions that models hold.

Only the functions of `allowlist.py`, layers, values that the function captured, other functions of
the file and those that the user supplies are ever called: a name outside is an error that says so.
Steps, depth and the memory of what is made are limited (`limits.py`). Arguments are never changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpustore import flux, limits
from gpustore.allowlist import BY_TWIN, CONSTANTS, MODULES, QUALIFIED, TABLE
from gpustore.arithmetic import converted, is_array, number, settled
from gpustore.broadcasting import Function, Held, Row, materialize, whole
from gpustore.code import (
    SSA,
    Code,
    Constant,
    Expr,
    Global,
    Goto,
    Label,
    Method,
    Module,
    Slot,
    read_code,
)  # fmt: skip
from gpustore.errors import GpustoreError, OpaqueCodeError
from gpustore.julia import JuliaType, NamedTuple, OpaqueFunction, Struct
from gpustore.layers import plain
from gpustore.semantics import Value, array, getindex, items

_OUTSIDE_STEPS = 100  # that a call of a layer or of a supplied function counts for
_LEGACY = {"W": "weight", "b": "bias", "over": "layers", "α": "scale", "β": "bias", "σ²": "σ2",
           "ϵ": "ε"}  # fmt: skip
_GETTERS = ("getfield", "getproperty")
_LAZY = (
    "*",
    "adjoint",
    "transpose",
    "'",
    "materialize",
    "tuple",
)  # take a vector's adjoint as it is
_WITHOUT_READING = (
    "size", "length", "ndims", "axes", "getindex", "iterate", "indexed_iterate", "firstindex",
    "lastindex", "eachindex", "first", "last", "tuple", "===", "!==", "isa", "eltype", "isnothing",
    "broadcasted", "Ref", "=>", "zero", "oftype",
)  # fmt: skip  # what these take does not grow with their arguments
_FAILURES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, MemoryError)
Functions = Mapping[str, Callable[..., Any]]


class _Supplied(Exception):
    """Carries what a function that the user supplied raised: it comes out as it is."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class Runner:
    """What calls an OpaqueFunction: its code is read on the first call."""

    def __init__(self, lift: Callable[[Any, str], Any], functions: Functions) -> None:
        self.lift, self.functions = lift, functions
        self.code: Code | None = None

    def __call__(self, function: OpaqueFunction, args: tuple[Any, ...], options: Any) -> Any:
        """Return what the function gives for these arguments.

        Raises OpaqueCodeError, naming it, for a Julia function that is not on the list.
        """
        own = self.functions.get(function.__name__)
        if own is not None:
            return own(*args, **options)
        inputs = sum(getattr(arg, "size", 0) for arg in (*args, *function.captured))
        try:
            with limits.limited(inputs), np.errstate(all="ignore"):
                return self.run(function, args, options)
        except _Supplied as carrier:
            if limits.is_inside():
                raise
            raise carrier.error from None
        except _FAILURES as error:
            if isinstance(error, GpustoreError):
                raise
            raise OpaqueCodeError(
                f"{function.__name__}: {type(error).__name__}: {error}"
            ) from error
        except RecursionError as error:
            raise OpaqueCodeError(f"{function.__name__}: its calls are nested too deep") from error

    def run(self, function: OpaqueFunction, args: tuple[Any, ...], options: Any) -> Any:
        if isinstance(function.type, JuliaType):
            return outside(self.named(function, args, options))
        if self.code is None:
            self.code = read_code(function, self.lift)
        method = _method(function.__name__, self.code.methods, len(args))
        if options:
            raise OpaqueCodeError(f"{function.__name__}: no method takes keywords")
        return outside(_Frame(self, function, self.code, method, args).run())

    def named(self, function: OpaqueFunction, args: tuple[Any, ...], options: Any) -> Any:
        """Call a function that the file holds by name, or one composed of others."""
        assert isinstance(function.type, JuliaType)
        name, parts = function.type.name, function.captured
        if name == "Base.Fix1" and len(parts) == 2:
            return _called(parts[0], (parts[1], *args), options)
        if name == "Base.Fix2" and len(parts) == 2:
            return _called(parts[0], (*args, parts[1]), options)
        if name == "Base.ComposedFunction" and len(parts) == 2:
            return _called(parts[0], (_called(parts[1], args, options),), {})
        module, _, bare = name.rpartition(".")
        return _called(self.resolved(Global(module, bare.removeprefix("#"))), args, options)

    def resolved(self, name: Global) -> Any:
        """Return what a global name stands for."""
        plain_name = str(name).replace(".#", ".")  # as `functions` are keyed
        for spelling in (plain_name, f"Main.{name.name}", name.name):
            if spelling in self.functions:
                found = self.functions[spelling]
                return Function(name.name, _supplied(found)) if callable(found) else found
        known = flux.FUNCTIONS.get(f"{name.module}.#{name.name}")
        in_table = TABLE.get(name.name)
        package = name.module.partition(".")[0]
        is_package = package in MODULES and name.module != "Main"
        if in_table is not None and (is_package or name.name not in QUALIFIED):
            return in_table
        if known is not None:
            return Function(name.name, known, known)
        if name.name in CONSTANTS:
            return CONSTANTS[name.name]
        if name.name in _SPECIAL:
            return _SPECIAL[name.name]
        if name.name in MODULES:
            return Module(name.name)
        if name.name.startswith("#"):
            raise OpaqueCodeError(
                f"the code in this file makes a {name}, an inner function whose code the file does "
                "not hold; give a Python function for the whole: load(..., functions={name: f})"
            )
        raise OpaqueCodeError(
            f"the code in this file uses {name}, which is not known here; supply it as "
            f"load(..., functions={{{str(name)!r}: function}}); a value may stand there too"
        )


def outside(value: Any) -> Any:
    """Return a result as a caller in Python expects it, without what Julia leaves undone."""
    if isinstance(value, tuple) and type(value) is tuple:
        limits.take_steps(len(value))
        return tuple(map(outside, value))
    if isinstance(value, Held):
        return value.value
    return settled(value.array if isinstance(value, Row) else materialize(value))


def _method(name: str, methods: tuple[Method, ...], count: int) -> Method:
    """Return the method for so many arguments; one without `...` goes before one with."""
    fitting = [method for method in methods if method.takes(count)]
    exact = [method for method in fitting if not method.is_vararg] or fitting
    if len(exact) == 1:
        return exact[0]
    if not methods:
        raise OpaqueCodeError(f"{name}: the file holds no code of it; it may be a generated one")
    if exact:
        raise OpaqueCodeError(
            f"{name}: {len(exact)} methods take {count} arguments and differ by their types, which "
            f"are not looked at here; give load(..., functions={{{name!r}: function}})"
        )
    raise OpaqueCodeError(f"{name}: no method takes {count} arguments")


def _supplied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the user's function such that its own errors come out as they are."""

    @functools.wraps(function, assigned=())
    def call(*args: Any, **options: Any) -> Any:
        limits.take_steps(_OUTSIDE_STEPS)
        try:
            return function(*map(outside, args), **options)
        except Exception as error:
            raise _Supplied(error) from error

    return call


def _called(function: Any, args: tuple[Any, ...], options: Any) -> Any:
    """Call a function of the table, of the file or of the user, or a layer."""
    function = _known(function)
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


def _known(function: Any) -> Any:
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
    return lambda options, _, *args: _called(function, args, dict(options))


def _keyword_call(options: Any, function: Any, *args: Any) -> Any:
    return _called(function, args, dict(options))


def _splat(function: Any, *parts: Any) -> Any:
    args: list[Any] = []
    for part in parts:
        limits.take_elements(8 * (len(part) if hasattr(part, "__len__") else 1))
        args.extend(items(part))
        if len(args) > 10_000:
            raise OpaqueCodeError("the code in this file calls with too many arguments")
    return _called(function, tuple(args), {})


def _getfield(value: Any, name: Any, *order: Any) -> Any:
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
_SPECIAL: dict[str, Any] = {
    "Val": _VAL,
    "NamedTuple": _NAMED_TUPLE,
    "apply_type": _apply_type,
    "kwfunc": _keyword_function,
    "kwcall": _keyword_call,
    "_apply": _splat,
    "_apply_iterate": lambda iterate, function, *parts: _splat(function, *parts),
    "Tuple": lambda xs: tuple(items(xs)),
}


class _Frame:
    """One call: slots, values of statements, and the place in the code."""

    def __init__(
        self, runner: Runner, function: OpaqueFunction, code: Code, method: Method, args: Any
    ) -> None:
        self.runner, self.function, self.method = runner, function, method
        self.captured = dict(zip(code.captured, function.captured, strict=False))
        fixed = method.nargs - 1 - method.is_vararg
        given = [*args[:fixed], *([tuple(args[fixed:])] if method.is_vararg else [])]
        self.slots: dict[int, Any] = dict(enumerate((_known(number(value)) for value in given), 2))
        self.values: dict[int, Any] = {}
        self.labels = {
            part.number: index
            for index, part in enumerate(method.statements)
            if isinstance(part, Label)
        }

    def run(self) -> Any:
        place = 0
        while place < len(self.method.statements):
            statement = self.method.statements[place]
            limits.take_steps()
            place += 1
            if isinstance(statement, Goto):
                place = self.target(statement.target)
            elif isinstance(statement, Expr) and statement.head == "return":
                return self.evaluated(statement.args[0])
            elif isinstance(statement, Expr) and statement.head == "gotoifnot":
                if not self.condition(statement.args[0]):
                    place = self.target(self.evaluated(statement.args[1]))
            else:
                value = self.evaluated(statement)
                if not self.method.is_nested:
                    self.values[place] = value
        raise OpaqueCodeError("the code in this file ends without a return")

    def condition(self, part: Any) -> bool:
        value = self.evaluated(part)
        is_truth = isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == np.bool_
        if is_array(value) or not is_truth:
            raise OpaqueCodeError(
                f"the code in this file takes a {type(value).__name__} for a condition"
            )
        return bool(value)

    def target(self, number: Any) -> int:
        """Return the place of a jump: a statement from 1, or a label of Julia 0.6."""
        place = self.labels.get(number) if self.labels else int(number) - 1
        if place is None or not 0 <= place < len(self.method.statements):
            raise OpaqueCodeError("the code in this file jumps out of itself")
        return place

    def evaluated(self, part: Any) -> Any:
        if isinstance(part, Constant):
            return number(part.value) if not isinstance(part.value, Module) else part.value
        if isinstance(part, SSA):
            return self.values[part.number]
        if isinstance(part, Slot):
            return self.function if part.number == 1 else self.slots[part.number]
        if isinstance(part, Global):
            return self.runner.resolved(part)
        if isinstance(part, Expr):
            return self.expression(part)
        if isinstance(part, Label):
            return None
        raise OpaqueCodeError(f"the code in this file has a form that is not known: {part!r}")

    def expression(self, part: Expr) -> Any:
        limits.take_steps()
        if part.head == "call" and part.args:
            return self.call(part)
        if part.head == "=" and len(part.args) == 2:
            value, place = self.evaluated(part.args[1]), part.args[0]
            if isinstance(place, Slot) and place.number > 1:
                self.slots[place.number] = value
            elif isinstance(place, SSA):
                self.values[place.number] = value
            else:
                raise OpaqueCodeError("the code in this file assigns to a global variable")
            return value
        if part.head == "new" and part.args and isinstance(part.args[0], Global):
            raise OpaqueCodeError(
                f"the code in this file has an expression `new`: it makes a {part.args[0]}, an "
                f"inner function or a struct, whose code the file does not hold; give a Python "
                f"function for the whole: load(..., functions={{{self.function.__name__!r}: f}})"
            )
        raise OpaqueCodeError(
            f"the code in this file has an expression `{part.head}`, which is not run here; give a "
            f"Python function: load(..., functions={{{self.function.__name__!r}: f}})"
        )

    def call(self, part: Expr) -> Any:
        first = part.args[0]
        if isinstance(first, Global) and first.name in _GETTERS and len(part.args) >= 3:
            args = [self.evaluated(arg) for arg in part.args[1:]]
            return self.field(*args[:2])
        function = self.evaluated(first)
        return _called(function, tuple(self.evaluated(arg) for arg in part.args[1:]), {})

    def field(self, value: Any, name: Any) -> Any:
        if value is self.function:
            if str(name) not in self.captured:
                raise OpaqueCodeError(f"the function captures no {name}")
            return _known(number(plain(self.captured[str(name)])))
        if isinstance(value, Module):
            return self.runner.resolved(Global(value.path, str(name)))
        return _getfield(value, name)
