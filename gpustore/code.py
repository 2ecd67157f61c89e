"""Julia's lowered code as data: an anonymous function's document read into a small neutral form.

BSON.jl writes the TypeName of an anonymous function with its methods (src/anonymous.jl), each with
a CodeInfo of statements. Forms of Julia 0.6 to 1.11 are read: nested expressions, `:return` and
`:gotoifnot` of the older ones, ReturnNode and GotoIfNot of the later. Nothing is executed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpustore.errors import OpaqueCodeError
from gpustore.julia import OpaqueDocument, OpaqueFunction, Source

MAX_STATEMENTS = 10_000
_MAX_DEPTH = 50


@dataclass(frozen=True, slots=True)
class Expr:
    """A call, an assignment or another form, by its head."""

    head: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class SSA:
    """The value of a statement (from 1), or in Julia 0.6 of an assignment to this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Slot:
    """An argument or a local variable, from 1; the first is the function itself."""

    number: int


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, such as Base.size."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Module:
    """A module of Julia, by its path."""

    path: str


@dataclass(frozen=True, slots=True)
class Goto:
    """A jump to a statement, or in Julia 0.6 to the Label of this number."""

    target: int


@dataclass(frozen=True, slots=True)
class Label:
    number: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that stands in the code."""

    value: Any


@dataclass(frozen=True, slots=True)
class Method:
    """One method: names of all slots, of which the first `nargs` are the function and arguments."""

    slots: tuple[str, ...]
    nargs: int
    is_vararg: bool
    statements: tuple[Any, ...]
    is_nested: bool  # Julia 0.6: expressions within expressions, and labels

    @property
    def arguments(self) -> tuple[str, ...]:
        names = self.slots[1 : self.nargs]
        return (*names[:-1], names[-1] + "...") if self.is_vararg and names else names

    def takes(self, count: int) -> bool:
        """Whether it can be called with this many arguments."""
        return count >= self.nargs - 2 if self.is_vararg else count == self.nargs - 1


@dataclass(frozen=True, slots=True)
class Code:
    """An anonymous function: its methods, the names of the values it captures, its Julia."""

    name: str
    captured: tuple[str, ...]
    methods: tuple[Method, ...]
    version: str


def read_code(function: OpaqueFunction, lift: Callable[[Any, str], Any]) -> Code:
    """Return the code of an anonymous function; `lift` makes values of what stands in it.

    Raises OpaqueCodeError for a function without code, or of a form that is not known.
    """
    kept = function.type
    if not isinstance(kept, OpaqueDocument):
        raise OpaqueCodeError(f"{function.__name__}: this function has no code in the file")
    try:
        return _Reader(kept.source, lift, function.__name__).code(kept.document)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise OpaqueCodeError(
            f"{function.__name__}: its code is of a form that is not known ({error!r}); "
            "give a Python function for it: load(..., functions={name: function})"
        ) from error


class _Reader:
    def __init__(self, source: Source, lift: Callable[[Any, str], Any], name: str) -> None:
        self.source, self.lift, self.name = source, lift, name

    def resolved(self, node: Any) -> Any:
        return self.source.resolve(node, self.name)

    def fields(self, node: Any, kind: str) -> list[Any]:
        """Return the fields of a struct of Core of this name."""
        found_kind, fields = self.struct(node)
        if found_kind != kind:
            raise ValueError(f"expected a {kind}, found {found_kind}")
        return fields

    def struct(self, node: Any) -> tuple[str, list[Any]]:
        """Return the last name of a struct's type and its fields; no name for what is none."""
        node = self.resolved(node)
        if not isinstance(node, dict) or node.get("tag") != "struct":
            return "", []
        kind, fields = self.resolved(node["type"]), self.resolved(node["data"])
        name = kind.get("name") if isinstance(kind, dict) else None
        if not isinstance(name, list) or not isinstance(fields, list):
            return "", []
        return str(name[-1]), fields

    def symbol(self, node: Any) -> str:
        node = self.resolved(node)
        if not isinstance(node, dict) or node.get("tag") != "symbol":
            raise ValueError("expected a symbol")
        return str(node["name"])

    def symbols(self, node: Any) -> tuple[str, ...]:
        node = self.resolved(node)
        parts = node if isinstance(node, list) else self.resolved(node["data"])
        return tuple(self.symbol(part) for part in parts)

    def code(self, document: dict[str, Any]) -> Code:
        fields = self.fields(document["typename"], "TypeName")
        table = self.resolved(fields[-1])
        methods = [self.method(node) for node in self.resolved(table[1])] if table else []
        version = str(fields[0])
        return Code(self.symbol(fields[1]), self.symbols(fields[2]), tuple(methods), version)

    def method(self, node: Any) -> Method:
        fields = self.fields(node, "Method")
        nargs, is_vararg = self.resolved(fields[-4]), self.resolved(fields[-3])
        info = self.fields(fields[-1], "CodeInfo")
        body = self.resolved(info[0])
        if not isinstance(body, list) or len(body) > MAX_STATEMENTS:
            raise ValueError("the code is no list of statements, or too long")
        statements = tuple(self.part(statement, 0) for statement in body)
        named = [found for found in map(self.slot_names, info[1:]) if found is not None]
        slots = named[0]
        if not 1 <= int(nargs) <= len(slots):
            raise ValueError("there are more arguments than slots")
        is_nested = any(isinstance(part, Label) for part in statements) or any(
            isinstance(inner, Expr) for part in statements for inner in _inner(part)
        )
        return Method(slots, int(nargs), bool(is_vararg), statements, is_nested)

    def slot_names(self, node: Any) -> tuple[str, ...] | None:
        node = self.resolved(node)
        if not isinstance(node, list) or not node:
            return None
        try:
            return self.symbols(node)
        except (ValueError, LookupError, TypeError):
            return None

    def part(self, node: Any, depth: int) -> Any:
        """Return a statement or a part of one."""
        if depth > _MAX_DEPTH:
            raise ValueError("expressions are nested too deep")
        node = self.resolved(node)
        if isinstance(node, dict) and node.get("tag") == "ref":
            return Constant(Module(self.path(node)))
        kind, fields = self.struct(node)
        read = _PARTS.get(kind)
        return Constant(self.lift(node, self.name)) if read is None else read(self, fields, depth)

    def path(self, node: Any) -> str:
        names = [str(name) for name in self.resolved(node["path"])]
        is_spelled = len(names) > 1 and names[0] == "Main" and names[1] in ("Core", "Base")
        return ".".join(names[1:] if is_spelled else names)

    def expr(self, fields: list[Any], depth: int) -> Any:
        head = self.symbol(fields[0])
        if head in _NOTES:
            return Constant(None)
        return Expr(head, tuple(self.part(arg, depth + 1) for arg in self.resolved(fields[1])))

    def global_ref(self, fields: list[Any], depth: int) -> Global:
        return Global(self.path(self.resolved(fields[0])), self.symbol(fields[1]))

    def quoted(self, fields: list[Any], depth: int) -> Any:
        node = self.resolved(fields[0])
        if self.struct(node)[0] in _PARTS:
            raise ValueError("code that is quoted as a value")
        return Constant(self.lift(node, self.name))

    def number(self, fields: list[Any]) -> int:
        found = self.resolved(fields[0])
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 2**31:
            raise ValueError(f"expected a number of a statement or slot, found {found!r}")
        return int(found)


_NOTES = ("meta", "line", "inbounds", "boundscheck", "simdloop", "loopinfo", "inline", "noinline")
_PARTS: dict[str, Callable[[_Reader, list[Any], int], Any]] = {
    "Expr": _Reader.expr,
    "GlobalRef": _Reader.global_ref,
    "QuoteNode": _Reader.quoted,
    "SSAValue": lambda reader, fields, depth: SSA(reader.number(fields)),
    "SlotNumber": lambda reader, fields, depth: Slot(reader.number(fields)),
    "TypedSlot": lambda reader, fields, depth: Slot(reader.number(fields)),
    "Argument": lambda reader, fields, depth: Slot(reader.number(fields)),
    "GotoNode": lambda reader, fields, depth: Goto(reader.number(fields)),
    "LabelNode": lambda reader, fields, depth: Label(reader.number(fields)),
    "GotoIfNot": lambda reader, fields, depth: Expr(
        "gotoifnot", (reader.part(fields[0], depth + 1), Constant(reader.number(fields[1:])))
    ),
    "ReturnNode": lambda reader, fields, depth: Expr(
        "return", (reader.part(fields[0], depth + 1) if fields else Constant(None),)
    ),
    "NewvarNode": lambda reader, fields, depth: Constant(None),
    "LineNumberNode": lambda reader, fields, depth: Constant(None),
    "PhiNode": lambda reader, fields, depth: Expr("phi", ()),
    "PiNode": lambda reader, fields, depth: reader.part(fields[0], depth + 1),
}


def _inner(part: Any) -> Iterator[Any]:
    """Yield the arguments of an expression, below `return` and assignments."""
    for arg in part.args if isinstance(part, Expr) else ():
        if part.head in ("return", "="):
            yield from _inner(arg)
        else:
            yield arg


# --- rendering ----------------------------------------------------------------------------------

_OPTIONS = re.compile(r"NamedTuple\{\((.*?),?\)\}\(\((.*?),?\)\)")
_INFIX = ("+", "-", "*", "/", "^", "÷", "%", "==", "!=", "<", "<=", ">", ">=", "&", "|", "=>", ":")


def render(code: Code) -> list[str]:
    """Return the code as lines one can read: `x -> reshape(x, :, size(x, 4))` where that is all.

    >>> identity = Method(("#self#", "x"), 2, False, (Expr("return", (Slot(2),)),), False)
    >>> render(Code("#1#2", (), (identity,), "1.5.3"))
    ['x -> x']
    """
    lines: list[str] = []
    for method in code.methods:
        names = ", ".join(method.arguments)
        head = names if len(method.arguments) == 1 and "..." not in names else f"({names})"
        body = _Renderer(method).lines()
        if len(body) == 1:
            lines.append(f"{head} -> {body[0].removeprefix('return ')}")
        else:
            lines += [f"{head} ->", *("  " + line for line in body)]
    return lines


class _Renderer:
    def __init__(self, method: Method) -> None:
        self.method = method
        self.uses: dict[SSA, int] = {}
        for part in method.statements:
            self.count(part)
        self.targets = {
            target for part in method.statements if (target := _target(part)) is not None
        }
        self.inlined: dict[SSA, str] = {}

    def count(self, part: Any) -> None:
        if isinstance(part, SSA):
            self.uses[part] = self.uses.get(part, 0) + 1
        elif isinstance(part, Expr):
            for arg in part.args:
                self.count(arg)

    def lines(self) -> list[str]:
        """Return one line for each statement whose value is not put where it is used."""
        found: list[str] = []
        has_jumps = bool(self.targets)
        for index, part in enumerate(self.method.statements, 1):
            label = f"{index}: " if index in self.targets else ""
            value = SSA(index)
            if isinstance(part, Constant) and part.value is None and not label:
                continue
            if isinstance(part, Label):
                found.append(f"{part.number}:")
            elif isinstance(part, Expr) and part.head in ("return", "=", "gotoifnot"):
                found.append(label + self.text(part))
            elif isinstance(part, Goto):
                found.append(f"{label}goto {part.target}")
            elif (self.uses.get(value, 0) == 1 and not has_jumps) or not isinstance(part, Expr):
                self.inlined[value] = self.text(part)
            else:
                name = f"%{index} = " if self.uses.get(value) else ""
                found.append(label + name + self.text(part))
        return found or ["nothing"]

    def text(self, part: Any) -> str:
        if isinstance(part, SSA):
            return self.inlined.get(part, f"%{part.number}")
        if isinstance(part, Slot):
            known = part.number <= len(self.method.slots)
            name = self.method.slots[part.number - 1] if known else ""
            return (
                name
                if name and part.number > 1
                else "self"
                if part.number == 1
                else f"_{part.number}"
            )
        if isinstance(part, Global):
            return part.name
        if isinstance(part, Goto):
            return f"goto {part.target}"
        if isinstance(part, Constant):
            return _constant(part.value)
        return self.expression(part) if isinstance(part, Expr) else str(part)

    def expression(self, part: Expr) -> str:
        args = [self.text(arg) for arg in part.args]
        if part.head == "call" and part.args:
            return self.call(args[0], list(part.args[1:]), args[1:])
        if part.head == "return":
            return f"return {args[0]}" if args else "return"
        if part.head == "=" and len(args) == 2:
            return f"{args[0]} = {args[1]}"
        if part.head == "gotoifnot" and len(args) == 2:
            return f"unless {args[0]} goto {args[1]}"
        return f"{part.head}({', '.join(args)})"

    def call(self, function: str, parts: list[Any], args: list[str]) -> str:
        if function in _INFIX and len(args) == 2:
            spaced = function if function in ":^" else f" {function} "
            return spaced.join(f"({a})" if " " in a and "(" not in a[:1] else a for a in args)
        if function == "getindex" and args:
            return f"{args[0]}[{', '.join(args[1:])}]"
        if function in ("getfield", "getproperty") and len(args) == 2:
            name = args[1].removeprefix(":")
            return name if args[0] == "self" else f"{args[0]}.{name}"
        if function in ("materialize", "copy") and len(args) == 1:
            return args[0]
        if function == "broadcasted" and args:
            inner = self.call(args[0], parts[1:], args[1:])
            if args[0] in _INFIX and len(args) == 3:
                return inner.replace(f" {args[0]} ", f" .{args[0]} ", 1)
            return f"{args[0]}.{inner[len(args[0]) :]}" if inner.startswith(args[0]) else inner
        if function == "literal_pow" and len(args) == 3:
            return f"{args[1]}^{args[2].removeprefix('Val{').removesuffix('}()')}"
        if function.startswith(("kwfunc(", "kwcall")) and len(args) > 1:
            options = _OPTIONS.fullmatch(args[0])
            if options is not None:
                names = options[1].replace(":", "").replace(",", " ").split()
                words = ", ".join(
                    f"{n} = {v}" for n, v in zip(names, options[2].split(", "), strict=False)
                )
                return f"{args[1]}({', '.join(args[2:])}; {words})"
        if function == "apply_type":
            return f"{args[0]}{{{', '.join(args[1:])}}}"
        if function == "tuple":
            return f"({', '.join(args)}{',' if len(args) == 1 else ''})"
        if function in ("_apply", "_apply_iterate"):
            args = args[1:] if function == "_apply_iterate" else args
            return f"{args[0]}({', '.join(arg + '...' for arg in args[1:])})"
        return f"{function}({', '.join(args)})"


def _target(part: Any) -> int | None:
    """Return the statement that a jump goes to."""
    if isinstance(part, Goto):
        return part.target
    if isinstance(part, Expr) and part.head == "gotoifnot" and len(part.args) == 2:
        target = part.args[1]
        return target.value if isinstance(target, Constant) else None
    return None


def _constant(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Module):
        return value.path
    if type(value).__name__ == "Symbol":
        return f":{value}"
    if isinstance(value, bool):
        return str(value).lower()
    if type(value) is tuple:
        return f"({', '.join(map(_constant, value))}{',' if len(value) == 1 else ''})"
    text = str(getattr(value, "__name__", None) or value)
    return text if len(text) <= 60 else text[:57] + "..."
