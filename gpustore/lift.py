"""Document -> Python values: BSON.jl's tags become values; nothing a file names is ever resolved.

A backref is followed when it is met and gives the same object each time, so that sharing and
cycles of the file are those of the result. A type that has no Python twin stays what it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpustore import clones, datatypes, flux, kinds, specs, tree, twins, wrappers
from gpustore.document import Deferred, Slot, int64
from gpustore.dtypes import NATIVE_DTYPES
from gpustore.errors import FormatError
from gpustore.julia import (
    PERMUTED,
    ArraySpec,
    JuliaType,
    LostArray,
    OpaqueDocument,
    OpaqueFunction,
    Source,
    Struct,
    Symbol,
)
from gpustore.kinds import StructKind
from gpustore.layout import STAMP
from gpustore.memo import Memo
from gpustore.rows import FEWEST
from gpustore.values import BARE, Entries, with_origin

RESERVED = ("_backrefs", STAMP)
_GPU_ARRAYS = ("CuArray", "ROCArray", "MtlArray", "oneArray")
_ATOMS = frozenset((str, float, bool, type(None)))
_UNKNOWN = object()
_COMPOSED = ("Base.Fix1", "Base.Fix2", "Base.ComposedFunction")
_OPAQUETAGS = ("unionall", "ref", "svec", "jl_anonymous", "jl_bottom_type")


class Lifter(Memo):
    """Lifts the parts of one document; `make_array(spec, path)` builds each array.

    `make_row(spec, payloads)` may build those of a row alike at once, of which `spec` is the first.
    `alike` says by the ids of nodes which of them are alike: those that have the same value.
    """

    def __init__(
        self,
        document: dict[str, Any],
        make_array: Callable[[ArraySpec, str], Any],
        read: Callable[[Slot], bytes],
        name: str,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        make_row: Callable[[ArraySpec, list[Any]], list[Any] | None] | None = None,
        alike: Mapping[int, Any] | None = None,
    ) -> None:
        backrefs = document.get("_backrefs", [])
        if not isinstance(backrefs, list):
            raise FormatError(f"{name}: _backrefs: expected a list")
        super().__init__(Source(name, backrefs, read))
        self.make_array, self.make_row, self.read, self.name = make_array, make_row, read, name
        self.functions = functions or {}
        if functions:
            self.functions = {name.replace(".#", "."): f for name, f in functions.items()}
        self.alike = alike or {}
        self.types: dict[Any, JuliaType] = {}
        # what is known of types and sizes that documents share, by ids of what is kept beside it
        self.heads: dict[tuple[int, Any], tuple[Any, ...]] = {}
        self.datatypes: dict[int, tuple[Any, JuliaType]] = {}
        self.dtypes = dict(NATIVE_DTYPES)  # of element types without parameters
        self.int64 = int64()
        self.has_lost = False  # whether a LostArray was made
        self.spelling: set[str] = set()  # of Core and Base, those that the file calls Main's
        self.lock: threading.Lock | None = None  # where functions were made, which keep this

    # --- dispatch ---

    def value(self, node: Any, path: str) -> Any:
        """Return the Python value of a node of the document."""
        kind = type(node)
        if kind is dict:
            return self.tagged(node, path)
        if kind in _ATOMS:
            return node
        if kind is list:
            return self.elements(node, path)
        if kind is int:
            return np.int32(node)
        if isinstance(node, int):
            return int(node)
        if kind is bytes or kind is Slot:
            spec = ArraySpec(np.dtype("u1"), (specs.nbytes_of(node),), "F", "cpu", node, None)
            return with_origin(self.make_array(spec, path), BARE)
        if kind is Deferred:
            return self.value(node.value, path)
        if kind.__name__ == "DBRef":  # how the codec gives a document that has the key `$ref`
            whole = dict(node.as_doc())
            try:
                return self.mapping(whole, path)
            finally:
                del self.memo[id(whole)]  # which is gone
        raise FormatError(
            f"{self.name}: {path}: found a value of type {kind.__name__}, which BSON.jl never "
            "writes; this is a MongoDB document: read it with PyMongo or bsondump"
        )

    def elements(self, node: list[Any], path: str) -> list[Any]:
        if id(node) in self.memo:
            known: list[Any] = self.memo[id(node)]
            return known
        values: list[Any] = []
        self.memo[id(node)] = values
        path = tree.shortened(path)
        specs.lift_alike(self, node)
        clones.lift_alike(self, node, lambda index: f"{path}[{index}]")
        for i, child in enumerate(node):
            is_atom = type(child) in _ATOMS
            values.append(child if is_atom else self.value(child, f"{path}[{i}]"))
        return values

    def tagged(self, node: dict[str, Any], path: str) -> Any:
        tag = node.get("tag")
        if tag == "backref":
            number, node = node.get("ref"), self.resolve(node, path)
            if isinstance(node, (bytes, Slot)):  # without an identity of its own: short ones repeat
                if -number not in self.memo:
                    self.memo[-number] = self.value(node, path)
                return self.memo[-number]
            if type(node) is not dict:
                return self.value(node, path)
            tag = node.get("tag")
        known = self.memo.get(id(node), _UNKNOWN)
        if known is not _UNKNOWN:
            return known
        if len(path) > tree.MAX_PATH:
            path = tree.shortened(path)
        like = self.alike.get(id(node))
        if like is not None and like.lifted is not None:
            value = self.memo[id(node)] = self.make_array(specs.like_another(like, node), path)
            return value
        lift = TAGS.get(tag) if type(tag) is str else None
        if lift is None:
            return self.mapping(node, path)
        value = self.memo[id(node)] = lift(self, node, path)
        return value

    def bytes_of(self, binary: bytes | Slot) -> bytes:
        return self.read(binary) if isinstance(binary, Slot) else binary

    def field(self, node: dict[str, Any], key: str, kind: type | tuple[Any, ...], path: str) -> Any:
        found = node.get(key)
        if type(found) is dict:
            found = self.part(found, path)
        if type(found) is not kind and not (isinstance(kind, tuple) and type(found) in kind):
            what = "nothing" if key not in node else type(found).__name__
            raise self.malformed(path, f"`{key}` of a {node['tag']} document is {what}")
        return found

    def mapping(self, node: dict[str, Any], path: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self.memo[id(node)] = values
        specs.lift_alike(self, node.values())
        clones.lift_alike(self, node.values(), lambda index: f"{path}[{[*node][index]!r}]")
        known = self.memo.get
        for key, child in node.items():
            value = known(id(child), _UNKNOWN)
            values[key] = self.value(child, f"{path}[{key!r}]") if value is _UNKNOWN else value
        return values

    def entries(self, document: dict[str, Any], names: tuple[str, ...] | None) -> dict[str, Any]:
        """Return the top-level entries of these names (all of them for None)."""
        if names is None and len(document) >= FEWEST:
            specs.lift_alike(self, document.values())
            clones.lift_alike(self, document.values(), [*document].__getitem__)
        wanted = document.keys() - {*RESERVED} if names is None else {*names}
        known = map(self.memo.get, map(id, document.values()))
        found: dict[str, Any] = {}
        for (key, child), value in zip(document.items(), known, strict=True):
            if key in wanted:
                found[key] = self.value(child, key) if value is None else value
        if self.spelling:
            found = Entries(found)
            found.spelling = frozenset(self.spelling)
        return found

    # --- tags ---

    def symbol(self, node: dict[str, Any], path: str) -> Symbol:
        return Symbol(self.field(node, "name", str, path))

    def tuple_of(self, node: dict[str, Any], path: str) -> tuple[Any, ...]:
        parts = self.field(node, "data", list, path)
        clones.lift_alike(self, parts, lambda index: f"{path}[{index}]")
        made = tuple(self.value(child, f"{path}[{i}]") for i, child in enumerate(parts))
        self.weigh(made, path)
        return made

    def opaque(self, node: dict[str, Any], path: str) -> OpaqueDocument:
        return OpaqueDocument(node, self.source)

    def type_in(self, node: dict[str, Any], path: str) -> Any:
        """Return the type in a struct or array document."""
        found = node.get("type")
        if type(found) is dict and found.get("tag") == "datatype":
            return datatypes.datatype(self, found, path)
        return self.value(self.field(node, "type", dict, path), path)

    def array(self, node: dict[str, Any], path: str) -> Any:
        spec = specs.array_spec(self, node, path)
        if node.get("python") == "bytes" and isinstance(spec, ArraySpec):
            return self.bytes_of(spec.payload)
        if not isinstance(spec, ArraySpec):
            return spec
        specs.keep(self, node, spec)
        return self.make_array(spec, path)

    # --- structs ---

    def struct(self, node: dict[str, Any], path: str) -> Any:
        julia_type = self.type_in(node, path)
        content = node.get("data")
        if type(content) is not list:
            content = self.field(node, "data", (list, bytes, Slot), path)
        if isinstance(julia_type, OpaqueDocument) and julia_type.document["tag"] == "jl_anonymous":
            return self.function(node, julia_type, content, path)
        if not isinstance(julia_type, (JuliaType, OpaqueDocument)):
            what = type(julia_type).__name__
            raise self.malformed(path, f"the type of a struct document is a {what}")
        if isinstance(content, (bytes, Slot)):
            dtype = specs.dtype_at(self, node, julia_type, path)
            return _primitive(julia_type, dtype, self.bytes_of(content))
        name = julia_type.name if isinstance(julia_type, JuliaType) else ""
        if flux.has_class(name):
            return self.known(node, julia_type, content, path)
        builder = _BUILDERS.get(name)
        if builder is not None:
            built = builder(self, node, julia_type, content, path)
            if built is not NotImplemented:
                return built
        if name.rpartition(".")[2].startswith("#") or name in _COMPOSED:
            known = flux.function_named(name) if not content else None
            return known or self.function(node, julia_type, content, path)
        if name.rpartition(".")[2] in _GPU_ARRAYS:
            return self.lost_array(julia_type, content, path)
        return self.unknown(node, julia_type, content, path)

    def function(
        self, node: dict[str, Any], julia_type: Any, content: Any, path: str
    ) -> OpaqueFunction:
        function = self.memo[id(node)] = OpaqueFunction(julia_type, [])
        from gpustore.interpret import Runner  # 10 ms, for files with functions only

        self.lock = self.lock or threading.Lock()
        function.run = Runner(self.later, self.functions)
        function.captured.extend(self.children(content, path + ".captured"))
        return function

    def later(self, node: Any, path: str) -> Any:
        """Return the value of a node of code, which may be gone with its function thereafter."""
        assert self.lock is not None
        with self.lock:
            since = len(self.memo), len(self.parents), len(self.parts)
            try:
                return self.value(node, path)
            finally:
                self.forget(since)

    def children(self, content: Any, path: str) -> list[Any]:
        if not isinstance(content, list):
            raise self.malformed(path, "the fields of a struct document are not a list")
        return [self.value(child, f"{path}[{i}]") for i, child in enumerate(content)]

    def known(self, node: dict[str, Any], julia_type: Any, content: Any, path: str) -> Any:
        """Make the object of a struct that has a class here: of Flux, or registered by the user."""
        kind = flux.kind_named(julia_type.name, len(content), len(julia_type.params))
        if kind is not None:
            made = self.instance(node, kind, julia_type, content, path)
            return flux.restored(made, node["python"]) if "python" in node else made
        if not flux.is_of_flux(julia_type.name):
            return self.unknown(node, julia_type, content, path)
        counts = " or ".join(map(str, flux.layouts(julia_type.name)))
        raise FormatError(
            f"{self.name}: {path}: {julia_type.name}: expected {counts} fields, found "
            f"{len(content)}; the file is damaged, or of a Flux newer than this gpustore knows"
        )

    def instance(
        self, node: dict[str, Any], kind: StructKind, julia_type: Any, content: Any, path: str
    ) -> Any:
        """Make an object of a known class: first the object, then its fields (cycles close)."""
        if issubclass(kind.cls, tuple):
            return kind.cls(*self.children(content, path))
        made: Any = object.__new__(kind.cls)
        self.memo[id(node)] = made
        fields: Any = zip(kind.fields, content, strict=True)
        if kind.cls is tree.TrackedArray:  # its tracker, which comes first, holds the data too
            fields = sorted(fields, key=lambda field: field[0] == "tracker")
        for name, child in fields:
            part = self.value(child, f"{path}.{name}")
            if kind.is_layer and type(part) is np.ndarray and not part.flags.f_contiguous:
                part = self.turned(child, part, path)
            if not kind.accepts(name, part):
                raise self.malformed(f"{path}.{name}", f"a {type(part).__name__} is out of place")
            object.__setattr__(made, name, part)
        for name, index in kind.from_type:
            if index < len(julia_type.params):
                object.__setattr__(made, name, julia_type.params[index])
        if flux.is_of_flux(kind.name) or julia_type != JuliaType.named(kind.name):
            with contextlib.suppress(AttributeError):  # a class with slots of its own
                object.__setattr__(made, "julia_type", julia_type)
                object.__setattr__(made, "julia_kind", kind)
        if kind.cls is tree.TrackedArray and len(content) == 2:
            made.grad = None  # it was never set in Julia
        return made

    def turned(self, node: Any, array: Any, path: str) -> Struct:
        """Return a layer's PermutedDimsArray as the struct it is: in layers `save` writes none."""
        node = self.resolve(node, path)
        made = self.memo[id(node)] = wrappers.Wrapped(self.type_in(node, path), [array.T])
        return made

    def unknown(self, node: dict[str, Any], julia_type: Any, content: Any, path: str) -> Struct:
        names = node.get("fields")
        if not isinstance(names, list) or len(names) != len(content):
            names = kinds.field_names_of(julia_type, len(content))
        fields: list[Any] = []
        kind = wrappers.CLASSES.get(getattr(julia_type, "name", ""), Struct)
        made = self.memo[id(node)] = kind(julia_type, fields, tuple(names) if names else None)
        labels = [f".{name}" for name in names] if names else range(len(content))
        for label, child in zip(labels, content, strict=True):
            fields.append(self.value(child, f"{path}{label}" if names else f"{path}.data[{label}]"))
        return made

    def lost_array(self, julia_type: Any, content: Any, path: str) -> LostArray:
        fields = self.children(content, path)
        rank = julia_type.params[1] if len(julia_type.params) > 1 else None
        shapes = [f for f in fields if isinstance(f, tuple) and all(type(n) is int for n in f)]
        fitting = [shape for shape in shapes if type(rank) is int and len(shape) == rank]
        shape = next(iter(fitting + shapes), ())
        self.has_lost = True
        return LostArray(julia_type, shape, Struct(julia_type, fields))

    def wrapped(self, node: Any, julia_type: Any, content: Any, path: str) -> Any:
        """Lift the `Base.Some` in which `save` puts a value that no document can be."""
        if node.get("python") == "value" and len(content) == 1:
            return self.value(content[0], path)
        return NotImplemented


TAGS: dict[str, Callable[[Lifter, dict[str, Any], str], Any]] = {
    "symbol": Lifter.symbol,
    "tuple": Lifter.tuple_of,
    "datatype": datatypes.datatype,
    "array": Lifter.array,
    "struct": Lifter.struct,
    **dict.fromkeys(_OPAQUETAGS, Lifter.opaque),
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    **twins.LIFT,
    PERMUTED: specs.lift_row_major,
    "Base.Some": Lifter.wrapped,
}


def _primitive(
    julia_type: JuliaType | OpaqueDocument, dtype: np.dtype[Any] | None, raw: bytes
) -> Any:
    """Return the value of a primitive struct: a NumPy scalar, a twin, or the struct itself."""
    name = julia_type.name if isinstance(julia_type, JuliaType) else ""
    if dtype is not None and len(raw) == dtype.itemsize:
        return np.frombuffer(raw, dtype)[0]
    value = twins.lift_primitive(name, raw)
    return Struct(julia_type, raw) if value is NotImplemented else value
