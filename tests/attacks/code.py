"""Bombs in an anonymous function: loading it is harmless, calling it ends soon."""

from __future__ import annotations

from typing import Any

import bson
from bson import Int64 as I

import gpustore as gs
from attacks.octets import ref, struct_of, symbol, tuple_of
from attacks.registry import READ, attack

CALLED = ("called",)


def expr(head: str, *args: Any) -> dict[str, Any]:
    return struct_of("Core.Expr", symbol(head), list(args), None)


def base(name: str, *module: str) -> dict[str, Any]:
    where = {"tag": "ref", "path": list(module or ("Main", "Base"))}
    return struct_of("Core.GlobalRef", where, symbol(name))


def call(name: str, *args: Any) -> dict[str, Any]:
    return expr("call", base(name), *args)


def slot(number: int) -> dict[str, Any]:
    return struct_of("Core.SlotNumber", I(number))


def ssa(number: int) -> dict[str, Any]:
    return struct_of("Core.SSAValue", I(number))


def goto(number: int) -> dict[str, Any]:
    return struct_of("Core.GotoNode", I(number))


def function(*statements: Any, **instead: Any) -> dict[str, Any]:
    """Return an anonymous function of one argument, Slot(2), as BSON.jl writes it."""
    body = [*statements, expr("return", ssa(len(statements)))]
    info = struct_of("Core.CodeInfo", body, [symbol(n) for n in ("#self#", "x", "y", "z")])
    method = struct_of("Core.Method", I(2), False, None, info)
    typename = struct_of("Core.TypeName", "1.5.3", symbol("#1#2"), [], [None, [method]])
    kind = {"tag": "jl_anonymous", "typename": typename, "params": []} | instead
    return {"tag": "struct", "type": kind, "data": []}


def file_of(made: Any, *backrefs: Any) -> bytes:
    return bson.encode({"f": made, "_backrefs": list(backrefs)})


@attack()
def code_that_is_not_called():
    """To run at all."""
    return file_of(function(expr("call", base("exit", "Main", "Base"))))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_loop_without_end():
    """To never come back."""
    return file_of(function(goto(1)))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_function_that_calls_itself():
    """To overflow a stack."""
    return file_of(function(expr("call", slot(1), slot(2))))


@attack(gs.OpaqueCodeError, uses=CALLED)
def zeros_without_end():
    """To fill memory in one call."""
    return file_of(function(call("zeros", I(2**40))))


@attack(gs.OpaqueCodeError, uses=CALLED)
def an_array_that_doubles():
    """To fill memory in forty."""
    first = expr("=", slot(3), call("zeros", I(2**20)))
    return file_of(function(first, expr("=", slot(3), call("vcat", slot(3), slot(3))), goto(2)))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_splat_without_end():
    """A range as the arguments of a call."""
    arguments = call(":", I(1), I(2**60))
    splat = expr("call", base("_apply", "Core"), base("tuple", "Core"), ssa(1))
    return file_of(function(arguments, splat))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_call_of_the_shell():
    """What BSON.jl's users fear."""
    return file_of(function(call("run", "touch x")))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_call_of_ccall():
    """A form that is no call."""
    return file_of(function(expr("foreigncall", "system", "touch x")))


@attack(gs.OpaqueCodeError, uses=CALLED)
def a_field_of_python():
    """A way from an array to the interpreter around it."""
    return file_of(
        function(call("getproperty", slot(2), struct_of("Core.QuoteNode", symbol("__class__"))))
    )


@attack(gs.OpaqueCodeError, uses=CALLED)
def expressions_that_double():
    """Parts of code that share their parts: 2**60 of them to read."""
    parts = [expr("call", base("+"), I(1), I(1))]
    parts += [expr("call", base("+"), ref(n), ref(n)) for n in range(1, 60)]
    return file_of(function(ref(60)), *parts)


@attack(gs.OpaqueCodeError, uses=CALLED)
def tuples_that_double_as_a_constant():
    """A value in the code that cannot be told from a tree of 2**60."""
    parts = [tuple_of(I(1)), *(tuple_of(ref(n), ref(n)) for n in range(1, 60))]
    quoted = struct_of("Core.QuoteNode", ref(60))
    return file_of(function(call("+", quoted, quoted)), *parts)


@attack(uses=("shown",))
def lists_that_double_as_a_constant():
    """A value in the code that takes 2**60 parts to spell."""
    parts = [[I(1)], *([ref(n), ref(n)] for n in range(1, 60))]
    return file_of(function(call("sum", struct_of("Core.QuoteNode", ref(60)))), *parts)


@attack(gs.OpaqueCodeError, uses=CALLED)
def code_without_end():
    """One statement more than are read."""
    return file_of(function(*[expr("=", slot(3), I(1))] * 10_001))


@attack(gs.OpaqueCodeError, uses=(*CALLED,))
def a_function_that_is_no_code():
    """Documents of other forms."""
    return file_of(function(typename=struct_of("Core.TypeName", None)))


@attack(uses=READ)
def a_function_of_itself():
    """A type that refers to itself, as all of Julia's anonymous functions do."""
    made = function(expr("call", slot(1), slot(2)))
    made["type"]["typename"]["data"].append(ref(1))
    return file_of(ref(1), made)
