"""Julia's concepts as plain data: symbols, types, structs and arrays, named as BSON.jl names them.

Nothing here is ever executed or resolved: a type is a name with parameters. `lift.py` makes these
from a document, `lower.py` makes a document from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.document import Deferred, Slot
from gpustore.errors import FormatError, OpaqueCodeError
from gpustore.notebook import Shown

PERMUTED = "Base.PermutedDimsArrays.PermutedDimsArray"  # how row-major arrays are written
MAX_SENTENCE = 500  # characters that an error takes from a file
LEAF = {"leaf": True}  # tree.py does not look inside fields that are marked so


class Symbol(str):
    """A Julia Symbol: a string that is written back as a symbol.

    >>> Symbol("weight")
    Symbol('weight')
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Symbol({str.__repr__(self)})"

    __str__ = str.__str__


class NamedTuple(Shown, dict[str, Any]):
    """A Julia NamedTuple: a dict that is written back as one; `nt.lr` is `nt["lr"]`.

    `julia_type` is the type it had in its file.

    >>> NamedTuple(lr=0.1).lr
    0.1
    """

    julia_type: JuliaType | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this NamedTuple has no entry {name!r}") from None

    def __repr__(self) -> str:
        return f"NamedTuple({super().__repr__()})"


class _Hashed:
    __slots__ = ("known_hash", "known_reversed", "known_weight")
    known_hash: int
    known_reversed: int
    known_weight: int


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class JuliaType(_Hashed):
    """The name of a Julia type, `("Core", "Array")`, and its parameters, as the file spells them.

    >>> JuliaType.named("Core.Array", JuliaType.named("Core.Float32"), 2)
    Core.Array{Core.Float32, 2}
    """

    path: tuple[str, ...]
    params: tuple[Any, ...] = ()

    @classmethod
    def named(cls, name: str, *params: Any) -> JuliaType:
        """Return the type of this dotted name; a `#` begins a function's name, dots and all."""
        module, mark, function = name.partition("#")
        path = tuple(module.split("."))
        return cls((*path[:-1], path[-1] + mark + function) if mark else path, params)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, JuliaType) or self.path != other.path:
            return False
        # Val{1} is not Val{true}
        pairs = zip(self.params, other.params, strict=False)
        return len(self.params) == len(other.params) and all(
            a is b or is_equal(a, b) for a, b in pairs
        )

    def __hash__(self) -> int:
        try:  # worked out once: types are the keys that writing looks up
            return self.known_hash
        except AttributeError:
            object.__setattr__(self, "known_hash", hash((self.path, self.params)))
            return self.known_hash

    @property
    def weight(self) -> int:
        """How many types and parameters it takes to write it out, however many are shared."""
        if not self.params:
            return 1
        known: int | None = getattr(self, "known_weight", None)
        if known is None:
            known = 1 + sum(map(_weight, self.params))
            object.__setattr__(self, "known_weight", known)
        return known

    @property
    def reversed_rank(self) -> int:
        """The rank of the array that this PermutedDimsArray turns into a row-major one, else 0."""
        try:
            return self.known_reversed
        except AttributeError:
            found = 0
            if len(self.params) == 5 and self.name == PERMUTED:
                rank, order = self.params[1:3]
                is_order = type(rank) is int and type(order) is tuple and len(order) == rank
                found = rank if is_order and is_equal(order, (*range(rank, 0, -1),)) else 0
            object.__setattr__(self, "known_reversed", found)
            return found

    @property
    def name(self) -> str:
        """The dotted name; `Main.` before Core or Base, as BSON.jl writes it, is left out."""
        path = self.path
        if len(path) > 2 and path[0] == "Main" and path[1] in ("Core", "Base"):
            path = path[1:]
        return ".".join(path)

    def is_same(self, other: Any) -> bool:
        """Whether `other` is this type, however the two are spelled."""
        if not isinstance(other, JuliaType) or self.name != other.name:
            return False
        pairs = zip(self.params, other.params, strict=False)
        return len(self.params) == len(other.params) and all(
            a.is_same(b) if isinstance(a, JuliaType) else is_equal(a, b) for a, b in pairs
        )

    def __repr__(self) -> str:
        return _spelled(self, [MAX_SPELLED])


MAX_SPELLED = 500  # parameters that the spelling of one type has; backrefs make few of many


def _spelled(part: Any, left: list[int]) -> str:
    """Return a type or a parameter of one as text; `left[0]` more parameters are spelled."""
    if isinstance(part, (JuliaType, tuple)):
        inner: list[str] = []
        for param in part.params if isinstance(part, JuliaType) else part:
            left[0] -= 1
            inner.append(_spelled(param, left) if left[0] >= 0 else "…")
            if left[0] < 0:
                break
        text = ", ".join(inner)
        if isinstance(part, JuliaType):
            return part.name + (f"{{{text}}}" if inner else "")
        return f"({text},)" if len(inner) == 1 else f"({text})"
    if isinstance(part, Struct) and not isinstance(part.data, bytes):
        return f"Struct({_spelled(part.type, left)}, {len(part.data)} fields)"
    is_plain = isinstance(part, (str, int, float, bytes, type(None), np.generic, OpaqueDocument))
    return repr(part) if is_plain else f"<{type(part).__name__}>"


def _weight(part: Any) -> int:
    if type(part) is JuliaType:
        return part.weight
    if isinstance(part, tuple):
        return 1 + sum(map(_weight, part))
    return _weight(part.type) if isinstance(part, Struct) else 1


def is_equal(a: Any, b: Any) -> bool:
    """Whether two parameters are equal; arrays, which only a damaged file has there, never are."""
    if type(a) is type(b) is tuple:
        return len(a) == len(b) and all(map(is_equal, a, b))
    is_plain = isinstance(a, Hashable) and type(a) is type(b)
    return a is b or (is_plain and bool(a == b))


class Source:
    """The file a value came from: its `_backrefs`, and how to read the bytes of a slot."""

    __slots__ = ("alive", "backrefs", "ends", "name", "read")

    def __init__(self, name: str, backrefs: list[Any], read: Callable[[Slot], bytes]) -> None:
        self.name, self.backrefs, self.read = name, backrefs, read
        self.ends: dict[int, Any] = {}  # of chains of backrefs
        # of those that were followed: id, ~id and -number, by which lifters know what they are
        self.alive: set[int] = set()

    def resolve(self, node: Any, path: str) -> Any:
        """Follow backrefs (1-based into `_backrefs`) to what they stand for; decode code."""
        if type(node) is not dict or node.get("tag") != "backref" or "ref" not in node:
            return node.value if type(node) is Deferred else node
        found = self.referred(node, path)
        if type(found) is not dict or found.get("tag") != "backref":
            return found
        chain: list[int] = []
        while type(found) is dict and found.get("tag") == "backref" and "ref" in found:
            target, number = self.referred(found, path), found["ref"]
            chain.append(number)
            if len(chain) > len(self.backrefs):
                raise self.malformed(path, "a backref refers to itself")
            found = self.ends.get(number, target)
        self.ends.update(dict.fromkeys(chain, found))  # so that a long one is followed once
        return found

    def referred(self, node: dict[str, Any], path: str) -> Any:
        """Return what one backref refers to."""
        number = node["ref"]
        is_number = isinstance(number, int) and number is not True
        if is_number and 0 < number <= len(self.backrefs):
            found = self.backrefs[number - 1]
            if -number not in self.alive:
                self.alive.update((id(found), ~id(found), -number))
            return found
        what = repr(number) if is_number else f"a {type(number).__name__}"
        raise self.malformed(
            path, f"expected a backref from 1 to {len(self.backrefs)}, found {what}"
        )

    def malformed(self, path: str, what: str) -> FormatError:
        if len(what) > MAX_SENTENCE:
            what = what[:MAX_SENTENCE] + "…"
        return FormatError(f"{self.name}: {path or 'the file'}: {what}; the file is damaged")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class OpaqueDocument:
    """A tagged document that is kept as it came: types with free variables, modules, code."""

    document: dict[str, Any] = field(metadata=LEAF)
    source: Source = field(metadata=LEAF)

    def __deepcopy__(self, memo: Any) -> OpaqueDocument:
        return self

    def __repr__(self) -> str:
        return f"OpaqueDocument({self.document.get('tag')!r})"


@dataclass(slots=True, eq=False, repr=False)
class Struct(Shown):
    """A Julia struct with no Python twin: `data` by position, or the raw bytes of a primitive.

    `fields` are the names where they are known (files do not hold them): `struct.lr` is then
    the value of that field, and `struct.data[0]` always the first one. `model_type` gives a struct
    a class instead.

    >>> Struct(JuliaType.named("Main.Net"), [1, "a"], ("size", "name")).name
    'a'
    """

    type: JuliaType | OpaqueDocument = field(metadata=LEAF)
    data: list[Any] | bytes
    fields: tuple[str, ...] | None = field(default=None, metadata=LEAF)

    def __getattr__(self, name: str) -> Any:
        fields = object.__getattribute__(self, "fields")
        if fields is not None and name in fields:
            return self.data[fields.index(name)]
        raise AttributeError(f"{self.type!r} has no field known as {name!r}; use .data[i]")

    def __call__(self, *args: Any, **options: Any) -> Any:
        name = getattr(self.type, "name", "this struct")
        raise OpaqueCodeError(
            f"{name}: what it computes is not in the file; write a class with its fields in order "
            f"and __call__, and register it: @gpustore.model_type({name!r})"
        )

    def __repr__(self) -> str:
        if isinstance(self.data, bytes):
            return f"Struct({self.type!r}, {self.data!r})"
        return f"Struct({self.type!r}, {len(self.data)} fields)"


@dataclass(slots=True, eq=False, repr=False)
class OpaqueFunction:
    """A Julia function that has no Python twin, whole: named, or anonymous with its code.

    `captured` are the values a closure holds. `run(function, args, options)` is what calls it: a
    small interpreter of pure functions (`interpret.py`); without it, and for what the interpreter
    does not know, a call raises OpaqueCodeError.
    """

    type: JuliaType | OpaqueDocument = field(metadata=LEAF)
    captured: list[Any]
    name: str = field(default="", metadata=LEAF)
    run: Callable[[OpaqueFunction, tuple[Any, ...], dict[str, Any]], Any] | None = field(
        default=None, metadata=LEAF
    )

    is_opaque = True

    def __post_init__(self) -> None:
        if isinstance(self.type, JuliaType):
            self.name = self.type.name.replace("#", "", 1)
        else:
            self.name = _anonymous_name(self.type)

    @property
    def __name__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.run is None:
            raise OpaqueCodeError(
                f"{self.__name__}: this is Julia code; put a Python function in its place, for "
                "example chain.layers = (*chain[:2], f, *chain[3:])"
            )
        return self.run(self, args, options)


def _anonymous_name(kept: OpaqueDocument) -> str:
    """Return the name of an anonymous function, such as `#3`, from its TypeName's second field."""
    typename = kept.source.resolve(kept.document.get("typename"), "jl_anonymous")
    fields = typename.get("data") if isinstance(typename, dict) else None
    symbol = fields[1] if isinstance(fields, list) and len(fields) > 1 else None
    name = symbol.get("name") if isinstance(symbol, dict) else None
    return name if isinstance(name, str) else "#anonymous"


@dataclass(slots=True, eq=False, repr=False)
class LostArray:
    """An array that Julia saved from the GPU: its type and shape are in the file, its values not.

    `load(..., lost="placeholder")` gives one in each such place. `struct` is what the file holds
    there: a device pointer of a process long gone.
    """

    type: JuliaType = field(metadata=LEAF)
    shape: tuple[int, ...] = field(metadata=LEAF)
    struct: Struct = field(metadata=LEAF)

    @property
    def element_type(self) -> str:
        return repr(self.type.params[0]) if self.type.params else "unknown"

    def __repr__(self) -> str:
        return f"LostArray({self.type.name}, {self.element_type}, shape={self.shape})"


@dataclass(slots=True)  # a frozen one takes 0.6 us longer to make, a tenth of reading an array
class ArraySpec:
    """What an array document says, checked: `payload` holds `nbytes` of `dtype` in `order`.

    order: "F" column-major, "C" row-major (the parent of a PermutedDimsArray). device: the tag.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    device: str
    payload: bytes | Slot = field(repr=False)
    digest: bytes | None = field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes if isinstance(self.payload, Slot) else len(self.payload)


def is_of_both_orders(shape: tuple[int, ...]) -> bool:
    """Whether the row-major memory of an array of this shape is its column-major memory too."""
    return len(shape) - shape.count(1) < 2 or 0 in shape
