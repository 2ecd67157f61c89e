"""Julia's lowered code as data: an anonymous function's document read into a small neutral form.

BSON.jl writes the TypeName of an anonymous function with its methods (src/anonymous.jl), each with
a CodeInfo of statements. Forms of Julia 0.6 to 1.11 are read: nested expressions, `:return` and
`:gotoifnot` of the older ones, ReturnNode and GotoIfNot of the later. Nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpustore.errors import FormatError, OpaqueCodeError
from gpustore.julia import OpaqueDocument, OpaqueFunction, Source

MAX_STATEMENTS = 10_000
MAX_PARTS = 20_000  # of one function: backrefs let few bytes stand for many of them
_MAX_DEPTH = 50
_MAX_NAME = 200  # characters
_WAY_OUT = "give a Python function for it: load(..., functions={name: function})"


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

    Raises OpaqueCodeError for a function without code, or of a form that is not known, or damaged.
    """
    kept = function.type
    if not isinstance(kept, OpaqueDocument):
        raise OpaqueCodeError(f"{function.__name__}: this function has no code in the file")
    try:
        return _Reader(kept.source, lift, function.__name__).code(kept.document)
    except FormatError as error:
        raise OpaqueCodeError(f"{function.__name__}: {error}; {_WAY_OUT}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise OpaqueCodeError(
            f"{function.__name__}: its code is of a form that is not known ({error!r}); {_WAY_OUT}"
        ) from error


class _Reader:
    def __init__(self, source: Source, lift: Callable[[Any, str], Any], name: str) -> None:
        self.source, self.lift, self.name = source, lift, name
        self.count = 0  # of parts read so far

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
        name = node["name"]
        if not isinstance(name, str) or len(name) > _MAX_NAME:
            raise ValueError(f"expected a name of at most {_MAX_NAME} characters")
        return name

    def symbols(self, node: Any) -> tuple[str, ...]:
        node = self.resolved(node)
        parts = node if isinstance(node, list) else self.resolved(node["data"])
        if len(parts) > MAX_STATEMENTS:
            raise ValueError("it has too many names")
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
        self.count += 1
        if depth > _MAX_DEPTH or self.count > MAX_PARTS:
            raise ValueError("its expressions are nested too deep, or too many")
        node = self.resolved(node)
        if isinstance(node, dict) and node.get("tag") == "ref":
            return Constant(Module(self.path(node)))
        kind, fields = self.struct(node)
        read = _PARTS.get(kind)
        return Constant(self.lift(node, self.name)) if read is None else read(self, fields, depth)

    def path(self, node: Any) -> str:
        names = self.resolved(node["path"])
        if not all(isinstance(name, str) and len(name) <= _MAX_NAME for name in names[:99]):
            raise ValueError("expected the names of a module")
        names = names[:99]
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
