"""Julia code as text: lowered statements put back into expressions, for people to read.

A value that is used once is shown where it is used, broadcasts with their dots, keyword calls with
their keywords, captured variables by name; what remains are lines, numbered where code jumps to.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpustore.code import (
    SSA,
    Constant,
    Expr,
    Global,
    Goto,
    Label,
    Method,
    Module,
    Slot,
    read_code,
)
from gpustore.errors import OpaqueCodeError
from gpustore.julia import JuliaType, OpaqueDocument, OpaqueFunction, Struct, Symbol
from gpustore.notebook import printable

MAX_LINES = 200
_MAX_INLINE = 20  # levels of nesting within a line
_MAX_REACH = 200  # statements between a value and where it is shown
_MAX_TEXT = 2000  # characters of a line
_MAX_STRING = 80  # characters of a string in the code
_MAX_PARTS = 20  # of a tuple in the code, and
_MAX_NESTED = 3  # levels of tuples within it
_PRECEDENCE = {
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "===", "!==", "≈", "∈"), 1),
    "=>": 0, "|>": 2, ":": 2, "+": 3, "-": 3, "|": 3, "*": 4, "/": 4, "÷": 4, "%": 4, "&": 4,
    "⋅": 4, "∘": 4, "^": 6,
}  # fmt: skip
_PREFIX = 5
_ATOM = 9


def render(function: OpaqueFunction) -> str:
    """Return what a function does as text, such as `x -> reshape(x, :, size(x, 4))`.

    Raises OpaqueCodeError where the file holds no code for it that can be read.
    """
    if not isinstance(function.type, OpaqueDocument):
        return function.__name__
    lift = getattr(function.run, "lift", None)
    if lift is None:
        raise OpaqueCodeError(f"{function.__name__}: its file is not at hand")
    methods = read_code(function, lift).methods
    try:
        lines = [line for method in methods for line in listed(method)]
    except RecursionError:
        raise OpaqueCodeError(f"{function.__name__}: nested too deep to be shown") from None
    return "\n".join(lines) or function.__name__


def rendered(function: OpaqueFunction) -> str:
    """Return what `render` does, or the function's name where its code cannot be read."""
    try:
        return render(function)
    except OpaqueCodeError:
        return function.__name__


def listed(method: Method) -> list[str]:
    """Return the lines of a method.

    >>> listed(Method(("#self#", "x"), 2, False, (Expr("return", (Slot(2),)),), False))
    ['x -> x']
    """
    return _Listing(method).text()


class _Listing:
    """One method: `trees` are its statements with what is shown in place put in place."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.trees: dict[int, Any] = {}
        self.depths: dict[int, int] = {}
        self.names = _unique(method.slots)
        statements = method.statements
        self.jumps = {_target(s) for s in statements} - {None}
        self.uses = Counter(part.number for s in statements for part in _parts(s, SSA))
        self.last_use: dict[int, int] = {}
        for number, statement in enumerate(statements, 1):
            self.last_use.update((p.number, number) for p in _parts(statement, SSA))
        self.assigned = {
            number: statement.args[0]
            for number, statement in enumerate(statements, 1)
            if isinstance(statement, Expr) and statement.head == "=" and statement.args
        }

    def text(self) -> list[str]:
        names = self.method.arguments
        arguments = [printable(self.names[i + 2]) for i in range(len(names))]
        if self.method.is_vararg and arguments:
            arguments[-1] += "..."
        head = arguments[0] if len(arguments) == 1 else f"({', '.join(arguments)})"
        lines: list[tuple[str, str]] = []
        for label, line in self.lines():
            lines.append((label, line if len(line) <= _MAX_TEXT else line[:_MAX_TEXT] + "..."))
            if len(lines) > MAX_LINES:
                lines[-1] = ("", "...")
                break
        if len(lines) == 1 and lines[0][1].startswith("return ") and not lines[0][0]:
            return [f"{head} -> {lines[0][1].removeprefix('return ')}"]
        return [f"{head} ->", *(f"  {label}{line}" for label, line in lines)]

    def lines(self) -> Iterator[tuple[str, str]]:
        pending = ""  # the label of statements that show no line of their own
        for number, statement in enumerate(self.method.statements, 1):
            label = f"{number}: " if number in self.jumps and not self.method.is_nested else pending
            if isinstance(statement, Label):
                pending = f"{statement.number}: "
                continue
            tree, depth = self.placed(statement)
            self.trees[number], self.depths[number] = tree, depth
            if self.is_silent(number, tree) or self.is_inline(number, tree, depth):
                pending = label
                continue
            pending = ""
            yield label, self.line(number, tree)

    def is_silent(self, number: int, tree: Any) -> bool:
        return isinstance(tree, (Constant, Slot, Global)) and not self.uses[number]

    def is_inline(self, number: int, tree: Any, depth: int) -> bool:
        """Whether a statement is shown where it is used instead of on its own line."""
        is_short = not (isinstance(tree, Constant) and isinstance(tree.value, tuple))
        if isinstance(tree, (Constant, Global)) and is_short:
            return True
        if self.captured(tree) is not None:
            return True
        if _is_a_line(tree) or number in self.assigned:
            return False
        if self.uses[number] != 1 or depth >= _MAX_INLINE:
            return False
        between = range(number + 1, self.last_use[number] + 1)
        if not 0 < len(between) <= _MAX_REACH or not self.jumps.isdisjoint(between):
            return False
        written = {self.assigned[n] for n in between[:-1] if n in self.assigned}
        return written.isdisjoint(_parts(tree, Slot))

    def placed(self, node: Any) -> tuple[Any, int]:
        """Return the node with the statements it alone uses in it, and how deep it is then."""
        if isinstance(node, SSA):
            tree = self.trees.get(node.number)
            if tree is not None and self.is_inline(node.number, tree, self.depths[node.number]):
                return tree, self.depths[node.number]
            return node, 0
        if isinstance(node, Expr):
            placed = [self.placed(arg) for arg in node.args]
            tree = Expr(node.head, tuple(part for part, _ in placed))
            return tree, 1 + max((depth for _, depth in placed), default=0)
        return node, 0

    def captured(self, tree: Any) -> str | None:
        """Return the name of the captured variable that an expression reads, or None."""
        match tree:
            case Expr("call", (Global("Core", "getfield"), Slot(1), Constant(name))):
                return name if isinstance(name, str) else None
        return None

    # --- text of one line ---

    def line(self, number: int, tree: Any) -> str:
        match tree:
            case Expr("return", (value, *_)):
                return f"return {self.show(value)}"
            case Goto(target):
                return f"goto {target}"
            case Expr("gotoifnot", (condition, Constant(target), *_)):
                return f"goto {target} unless {self.show(condition)}"
            case Expr("=", (left, right)):
                return f"{self.show(left)} = {self.show(right)}"
        text = self.show(tree)
        return f"v{number} = {text}" if self.uses[number] else text

    def show(self, node: Any, outer: int = -1) -> str:
        """Return the text of an expression, in parentheses within an operator that binds more."""
        text, own = self.shown(node)
        return f"({text})" if own <= outer else text

    def shown(self, node: Any) -> tuple[str, int]:
        match node:
            case Constant(value):
                return _literal(value), _ATOM
            case SSA(number):
                return f"v{number}", _ATOM
            case Slot(number):
                known = "self" if number == 1 else self.names.get(number, f"slot{number}")
                return printable(known), _ATOM
            case Global():
                return self.name(node), _ATOM
            case Expr("call", (called, *args)):
                name = self.captured(node)
                return (printable(name), _ATOM) if name is not None else self.call(called, args)
            case Expr(head, args):
                return f"{printable(head)}({self.joined(args)})", _ATOM
        return "?", _ATOM

    def name(self, name: Global) -> str:
        return printable(name.name)

    def joined(self, args: Any) -> str:
        return ", ".join(self.show(arg) for arg in args)

    def call(self, called: Any, args: list[Any]) -> tuple[str, int]:
        """Return the text of a call, with Julia's own spelling where it has one."""
        match called, args:
            case Global(name="materialize"), [Expr("call", (Global(name="broadcasted"), *_))]:
                return self.broadcast(args[0].args[1:])
            case Global(name="broadcast"), [_, _, *_]:
                return self.broadcast(args)
            case Global(name="literal_pow"), [power, x, exponent]:
                return self.call(power, [x, _val(exponent)])
            case Global(name="getindex"), [x, *index]:
                return f"{self.show(x, _PREFIX)}[{self.joined(index)}]", _ATOM
            case Global(name="getproperty"), [x, Constant(str() as field)]:
                return f"{self.show(x, _PREFIX)}.{printable(field)}", _ATOM
            case Global(name="tuple"), _:
                return f"({self.joined(args)}{',' * (len(args) == 1)})", _ATOM
            case Global(name="vect"), _:
                return f"[{self.joined(args)}]", _ATOM
            case Global(name="adjoint" | "'"), [x]:
                return f"{self.show(x, _PREFIX)}'", _ATOM
            case Global("Core", "apply_type"), [kind, *params]:
                return f"{self.show(kind)}{{{self.joined(params)}}}", _ATOM
            case Global("Core", "_apply" | "_apply_iterate" as how), [_, *_]:
                rest = args[1:] if how == "_apply_iterate" else args
                return self.splatted(rest)
        keywords = _keyword_call(called, args)
        if keywords is not None:
            function, names, values, rest = keywords
            pairs = zip(names, values, strict=True)
            given = ", ".join(f"{printable(key)}={self.show(value)}" for key, value in pairs)
            return f"{self.show(function, _PREFIX)}({self.joined(rest)}; {given})", _ATOM
        return self.operator(called, args, "")

    def splatted(self, args: list[Any]) -> tuple[str, int]:
        if not args:
            return "?", _ATOM
        shown = []
        for arg in args[1:]:
            match arg:
                case Expr("call", (Global(name="tuple"), *parts)):
                    shown += [self.show(part) for part in parts]
                case _:
                    shown.append(self.show(arg, _PREFIX) + "...")
        if isinstance(args[0], Global) and args[0].name == "tuple":
            return f"({', '.join(shown)}{',' * (len(shown) == 1)})", _ATOM
        return f"{self.show(args[0], _PREFIX)}({', '.join(shown)})", _ATOM

    def broadcast(self, args: Any) -> tuple[str, int]:
        called, *rest = args
        match called, rest:
            case Global(name="literal_pow"), [power, x, exponent]:
                called, rest = power, [x, _val(exponent)]
        undotted = [
            _Dotted(arg.args[1:])
            if isinstance(arg, Expr) and _is_call_of(arg, "broadcasted")
            else arg
            for arg in rest
        ]
        return self.operator(called, undotted, ".")

    def operator(self, called: Any, args: list[Any], dot: str) -> tuple[str, int]:
        name = called.name if isinstance(called, Global) else ""
        level = _PRECEDENCE.get(name)
        if level is not None and len(args) >= 2 and (len(args) == 2 or name in "+*:"):
            space = "" if name in (":", "^") and not dot else " "
            parts = [self.part(args[0], level - 1 if name != "^" else level)]
            parts += [self.part(arg, level) for arg in args[1:]]
            return f"{space}{dot}{name}{space}".join(parts), level
        if name in ("-", "!") and len(args) == 1:
            return f"{dot}{name}{self.part(args[0], _PREFIX)}", _PREFIX
        shown = ", ".join(self.part(arg, -1) for arg in args)
        function = f"({name})" if level is not None else self.show(called, _PREFIX)
        return f"{function}{dot}({shown})", _ATOM

    def part(self, node: Any, outer: int) -> str:
        if isinstance(node, _Dotted):
            text, own = self.broadcast(node.args)
            return f"({text})" if own <= outer else text
        return self.show(node, outer)


class _Dotted:
    """A broadcast within a broadcast."""

    def __init__(self, args: Any) -> None:
        self.args = args


def _parts(node: Any, kind: type) -> Iterator[Any]:
    """Yield the parts of a kind in a statement."""
    if isinstance(node, kind):
        yield node
    elif isinstance(node, Expr):
        for arg in node.args:
            yield from _parts(arg, kind)


def _is_a_line(tree: Any) -> bool:
    """Whether a statement is shown on a line of its own in any case."""
    return isinstance(tree, Goto) or (
        isinstance(tree, Expr) and tree.head in ("return", "gotoifnot", "=")
    )


def _target(statement: Any) -> int | None:
    """Return the number that a jump goes to."""
    match statement:
        case Goto(target) | Expr("gotoifnot", (_, Constant(int() as target), *_)):
            return target
    return None


def _is_call_of(node: Expr, name: str) -> bool:
    called = node.args[0] if node.head == "call" and node.args else None
    return isinstance(called, Global) and called.name == name and len(node.args) > 1


def _keyword_call(called: Any, args: list[Any]) -> tuple[Any, Any, Any, list[Any]] | None:
    """Take apart `kwfunc(f)((; dims = 1), f, x)` and `kwcall((; dims = 1), f, x)`."""
    match called, args:
        case (Expr("call", (Global("Core", "kwfunc"), _)), [named, function, *rest]):
            pass
        case (Global("Core", "kwcall"), [named, function, *rest]):
            pass
        case _:
            return None
    match named:
        case Expr(
            "call",
            (
                Expr(
                    "call",
                    (
                        Global("Core", "apply_type"),
                        Global("Core", "NamedTuple"),
                        Constant(tuple() as names),
                    ),
                ),
                Expr("call", (Global(name="tuple"), *values)),
            ),
        ) if len(names) == len(values) and all(isinstance(name, str) for name in names):
            return function, names, values, rest
    return None


def _val(exponent: Any) -> Any:
    """Return the number in `Val{2}()`."""
    match exponent:
        case Expr("call", (Expr("call", (Global("Core", "apply_type"), Global(), number)),)):
            return number
    return exponent


def _literal(value: Any, depth: int = 0) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case Symbol():
            return ":" + printable(value)
        case str():
            shown = value if len(value) <= _MAX_STRING else value[:_MAX_STRING] + "..."
            return '"' + printable(shown).replace('"', '\\"') + '"'
        case tuple() | list():
            count = min(len(value), _MAX_PARTS) if depth < _MAX_NESTED else 0
            parts = [_literal(part, depth + 1) for part in value[:count]]
            parts += ["..."] * (count < len(value))
            text = ", ".join(parts) + "," * (len(value) == 1 and isinstance(value, tuple))
            return f"({text})" if isinstance(value, tuple) else f"[{text}]"
        case dict() | set() | frozenset():  # Python would spell all that they hold
            return f"{type(value).__name__}(...)"
        case Module(path):
            return printable(path)
        case JuliaType():
            return printable(value.path[-1])
    if isinstance(value, np.float32):
        text = str(value)
        return text.replace("e", "f") if "e" in text else text + "f0"
    if dataclasses.is_dataclass(value) and not isinstance(value, (Struct, OpaqueFunction)):
        return f"{type(value).__name__}(...)"
    text = str(getattr(value, "__name__", None) or value)
    return printable(text if len(text) <= _MAX_STRING else text[:_MAX_STRING] + "...")


def _unique(names: tuple[str, ...]) -> dict[int, str]:
    """Return the names of variables by number, those that occur twice told apart."""
    counts = Counter(names)
    return {
        number: name if name and counts[name] == 1 else f"{name or 'slot'}{number}"
        for number, name in enumerate(names, 1)
    }
