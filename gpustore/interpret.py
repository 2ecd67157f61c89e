"""A small interpreter of Julia's lowered code, for the anonymous functions that models hold.

Only the functions of `allowlist.py`, layers, values that the function captured, other functions of
the file and those that the user supplies are ever called: a name outside is an error that says so.
Steps, depth and the memory of what is made are limited. Arguments are never changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from gpustore.allowlist import CONSTANTS, MODULES, QUALIFIED, TABLE
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
    render,
)
from gpustore.errors import GpustoreError, OpaqueCodeError
from gpustore.flux import FUNCTIONS
from gpustore.julia import JuliaType, NamedTuple, OpaqueFunction, Struct
from gpustore.layers import plain
from gpustore.semantics import COLON, Function, Value, bounded, getindex, number

MAX_STEPS = 100_000
MAX_DEPTH = 40
MAX_TOTAL_NBYTES = 2**32  # of all arrays that one call makes
_LEGACY = {"W": "weight", "b": "bias", "over": "layers", "α": "scale", "β": "bias", "σ²": "σ2",
           "ϵ": "ε"}  # fmt: skip
_GETTERS = ("getfield", "getproperty")
Functions = Mapping[str, Callable[..., Any]]


class _Budget:
    """What is left of the limits of one call from outside."""

    def __init__(self) -> None:
        self.steps, self.nbytes, self.depth = MAX_STEPS, MAX_TOTAL_NBYTES, 0

    def step(self, value: Any = None) -> None:
        self.steps -= 1
        nbytes = getattr(value, "nbytes", 0)
        if isinstance(nbytes, int):
            bounded((nbytes,), 1)
            self.nbytes -= nbytes
        if self.steps < 0:
            raise OpaqueCodeError(f"code from the file ran for more than {MAX_STEPS} steps")
        if self.nbytes < 0:
            raise OpaqueCodeError(f"code from the file made more than {MAX_TOTAL_NBYTES} bytes")


_running: ContextVar[_Budget | None] = ContextVar("_running", default=None)


_FAILURES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, MemoryError)


class Runner:
    """What calls an OpaqueFunction: its code is read on the first call."""

    def __init__(self, lift: Callable[[Any, str], Any], functions: Functions) -> None:
        self.lift, self.functions = lift, functions
        self.code: Code | None = None

    def __call__(self, function: OpaqueFunction, args: tuple[Any, ...], options: Any) -> Any:
        """Return what the function gives for these arguments, within the limits.

        Those of the call from outside hold for all calls inside. Raises OpaqueCodeError, naming it,
        for a Julia function that is not on the list.
        """
        own = self.functions.get(function.__name__)
        if own is not None:
            return own(*args, **options)
        if _running.get() is not None:
            return self.called(function, args, options)
        token = _running.set(_Budget())
        try:
            return self.called(function, args, options)
        except GpustoreError:
            raise
        except _FAILURES as error:
            what = f"{type(error).__name__}: {error}"
            raise OpaqueCodeError(f"{function.__name__}: {what}") from error
        except RecursionError as error:
            raise OpaqueCodeError(f"{function.__name__}: its calls are nested too deep") from error
        finally:
            _running.reset(token)

    def called(self, function: OpaqueFunction, args: tuple[Any, ...], options: Any) -> Any:
        """Call a function by its name or its code; `_running` is set."""
        budget = _running.get()
        assert budget is not None
        budget.depth += 1
        if budget.depth > MAX_DEPTH:
            raise OpaqueCodeError(
                f"{function.__name__}: its calls are nested deeper than {MAX_DEPTH}"
            )
        try:
            if isinstance(function.type, JuliaType):
                return self.named(function, args, options)
            if self.code is None:
                self.code = read_code(function, self.lift)
            method = next((m for m in self.code.methods if m.takes(len(args))), None)
            if method is None or options:
                raise OpaqueCodeError(
                    f"{function.__name__}: no method takes {len(args)} arguments"
                    + (" and keywords" if options else "")
                )
            captured = dict(zip(self.code.captured, function.captured, strict=False))
            return _Frame(self, method, captured, args, budget).run()
        finally:
            budget.depth -= 1

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
        return self.resolved(Global(module, bare.removeprefix("#")))(*args, **options)

    def resolved(self, name: Global) -> Any:
        """Return what a global name stands for."""
        for spelling in (str(name), f"Main.{name.name}", name.name):
            if spelling in self.functions:
                return Function(name.name, self.functions[spelling])
        known = FUNCTIONS.get(f"{name.module}.#{name.name}")
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
        if name.name in MODULES or (name.module == "Flux" and name.name == "Losses"):
            return Module(name.name)
        raise OpaqueCodeError(
            f"the code in this file uses {name}, which is not known here; supply it as "
            f"load(..., functions={{{str(name)!r}: function}})"
        )


def rendered(function: OpaqueFunction) -> str:
    """Return a function's code in one line, or its name where the file holds no code of it."""
    if not isinstance(function.run, Runner) or isinstance(function.type, JuliaType):
        return function.__name__
    try:
        lines = render(read_code(function, function.run.lift))
    except GpustoreError:
        return function.__name__
    return "; ".join(line.strip() for line in lines).replace("->; ", "-> ") or function.__name__


def _called(function: Any, args: tuple[Any, ...], options: Any) -> Any:
    if function is None or not callable(function) or isinstance(function, type):
        raise OpaqueCodeError(f"the code in this file calls {function!r}, which is no function")
    return function(*args, **options)


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
    raise OpaqueCodeError("the code in this file makes a type; only Val and NamedTuple are known")


def _keyword_function(function: Any) -> Callable[..., Any]:
    return lambda options, _, *args: _called(function, args, dict(options))


def _keyword_call(options: Any, function: Any, *args: Any) -> Any:
    return _called(function, args, dict(options))


def _splat(function: Any, *parts: Any) -> Any:
    args: list[Any] = []
    for part in parts:
        whole = getindex(part, COLON) if hasattr(part, "shape") else part
        args.extend(whole.values() if isinstance(whole, dict) else whole)
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
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Struct, Function)):
        names = [field.name for field in dataclasses.fields(value)]
        known = name if name in names else _LEGACY.get(name, "")
        if known in names:
            return getattr(value, known)
    raise OpaqueCodeError(f"the code in this file reads .{name}, which {value!r} does not have")


_VAL, _NAMED_TUPLE = object(), object()
_SPECIAL: dict[str, Any] = {
    "Val": _VAL,
    "NamedTuple": _NAMED_TUPLE,
    "apply_type": _apply_type,
    "kwfunc": _keyword_function,
    "kwcall": _keyword_call,
    "_apply": _splat,
    "_apply_iterate": lambda iterate, function, *parts: _splat(function, *parts),
    "Tuple": tuple,
}


class _Frame:
    """One call: slots, values of statements, and the place in the code."""

    def __init__(
        self, runner: Runner, method: Method, captured: dict[str, Any], args: Any, budget: _Budget
    ) -> None:
        self.runner, self.method, self.captured = runner, method, captured
        self.budget = budget
        fixed = method.nargs - 1 - method.is_vararg
        given = [*args[:fixed], *([tuple(args[fixed:])] if method.is_vararg else [])]
        self.slots: dict[int, Any] = dict(enumerate(given, 2))
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
            self.budget.step()
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
        if getattr(value, "ndim", 0):
            raise OpaqueCodeError("the code in this file takes an array for a condition")
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
            if part.number == 1:
                return _SELF
            return self.slots[part.number]
        if isinstance(part, Global):
            return self.runner.resolved(part)
        if isinstance(part, Expr):
            return self.expression(part)
        if isinstance(part, Label):
            return None
        raise OpaqueCodeError(f"the code in this file has a form that is not known: {part!r}")

    def expression(self, part: Expr) -> Any:
        if part.head == "call" and part.args:
            value = self.call(part)
            self.budget.step(value)
            return value
        if part.head == "=" and len(part.args) == 2:
            value, place = self.evaluated(part.args[1]), part.args[0]
            if isinstance(place, Slot) and place.number > 1:
                self.slots[place.number] = value
            elif isinstance(place, SSA):
                self.values[place.number] = value
            else:
                raise OpaqueCodeError("the code in this file assigns to a global variable")
            return value
        raise OpaqueCodeError(
            f"the code in this file has an expression `{part.head}`, which is not run here; give a "
            "Python function in its place: load(..., functions={...})"
        )

    def call(self, part: Expr) -> Any:
        first = part.args[0]
        if isinstance(first, Global) and first.name in _GETTERS and len(part.args) >= 3:
            args = [self.evaluated(arg) for arg in part.args[1:]]
            return self.field(*args[:2])
        function = self.evaluated(first)
        return _called(function, tuple(self.evaluated(arg) for arg in part.args[1:]), {})

    def field(self, value: Any, name: Any) -> Any:
        if value is _SELF:
            if str(name) not in self.captured:
                raise OpaqueCodeError(f"the function captures no {name}")
            return number(plain(self.captured[str(name)]))
        if isinstance(value, Module):
            return self.runner.resolved(Global(value.path, str(name)))
        return _getfield(value, name)


_SELF = object()
