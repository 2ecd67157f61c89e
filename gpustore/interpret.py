"""A small interpreter of Julia's lowered code, for the anonymous functions that models hold.

Only the functions of `allowlist.py`, layers, values that the function captured, other functions of
the file and those that the user supplies are ever called: a name outside is an error that says so.
Steps, depth and the memory of what is made are limited (`limits.py`). Arguments are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpustore import flux, limits
from gpustore.allowlist import CONSTANTS, MODULES, QUALIFIED, TABLE
from gpustore.arithmetic import is_array, number
from gpustore.broadcasting import Function
from gpustore.calls import SPECIAL, Supplied, called, getfield, outside, supplied, twin_of
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
from gpustore.julia import JuliaType, OpaqueFunction
from gpustore.layers import plain

_GETTERS = ("getfield", "getproperty")
_FAILURES = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, MemoryError)
Functions = Mapping[str, Callable[..., Any]]


class Runner:
    """What calls an OpaqueFunction: its code is read on the first call."""

    def __init__(self, lift: Callable[[Any, str], Any], functions: Functions) -> None:
        self.lift, self.functions = lift, functions
        self.code: Code | None = None

    def __deepcopy__(self, memo: Any) -> Runner:
        return self

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
        except Supplied as carrier:
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
            return called(parts[0], (parts[1], *args), options)
        if name == "Base.Fix2" and len(parts) == 2:
            return called(parts[0], (*args, parts[1]), options)
        if name == "Base.ComposedFunction" and len(parts) == 2:
            return called(parts[0], (called(parts[1], args, options),), {})
        module, _, bare = name.rpartition(".")
        return called(self.resolved(Global(module, bare.removeprefix("#"))), args, options)

    def resolved(self, name: Global) -> Any:
        """Return what a global name stands for."""
        plain_name = str(name).replace(".#", ".")  # as `functions` are keyed
        for spelling in (plain_name, f"Main.{name.name}", name.name):
            if spelling in self.functions:
                found = self.functions[spelling]
                return Function(name.name, supplied(found)) if callable(found) else found
        known = flux.function_named(f"{name.module}.#{name.name}")
        in_table = TABLE.get(name.name)
        package = name.module.partition(".")[0]
        is_package = package in MODULES and name.module != "Main"
        if in_table is not None and (is_package or name.name not in QUALIFIED):
            return in_table
        if known is not None:
            return Function(name.name, known, known)
        if name.name in CONSTANTS:
            return CONSTANTS[name.name]
        if name.name in SPECIAL:
            return SPECIAL[name.name]
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


class _Frame:
    """One call: slots, values of statements, and the place in the code."""

    def __init__(
        self, runner: Runner, function: OpaqueFunction, code: Code, method: Method, args: Any
    ) -> None:
        self.runner, self.function, self.method = runner, function, method
        self.captured = dict(zip(code.captured, function.captured, strict=False))
        fixed = method.nargs - 1 - method.is_vararg
        given = [*args[:fixed], *([tuple(args[fixed:])] if method.is_vararg else [])]
        self.slots: dict[int, Any] = dict(enumerate((twin_of(number(value)) for value in given), 2))
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
        return called(function, tuple(self.evaluated(arg) for arg in part.args[1:]), {})

    def field(self, value: Any, name: Any) -> Any:
        if value is self.function:
            if str(name) not in self.captured:
                raise OpaqueCodeError(f"the function captures no {name}")
            return twin_of(number(plain(self.captured[str(name)])))
        if isinstance(value, Module):
            return self.runner.resolved(Global(value.path, str(name)))
        return getfield(value, name)
