"""Python values -> document, as BSON.jl writes them; what cannot be saved is refused by its path.

An object met twice is written once, into `_backrefs`, so sharing and cycles are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import arrays, devices, dictionaries, document, flux, kinds, templates, twins
from gpustore.document import Encoded, Payload, Slot
from gpustore.dtypes import element_type_of
from gpustore.errors import UnsupportedValueError
from gpustore.julia import (
    JuliaType,
    LostArray,
    NamedTuple,
    OpaqueDocument,
    OpaqueFunction,
    Struct,
    Symbol,
)
from gpustore.sharing import Sharing
from gpustore.small import Alike
from gpustore.survey import Form
from gpustore.tree import TrackedArray
from gpustore.typeof import (
    array_type,
    field_of,
    is_plain,
    named_tuple_type,
    names_of,
    type_document,
    type_of,
)
from gpustore.values import DataFrame, JuliaArray, JuliaDict

if TYPE_CHECKING:
    from numpy.typing import NDArray

_named = JuliaType.named
_FLOAT64 = _named("Core.Float64")
_NOTHING = _named("Core.Nothing")
_FEW = 32  # parameters of a type that is encoded at once, not of parts


def _is_short(julia_type: JuliaType) -> bool:
    """Whether a type has few parameters: a Chain has one, the tuple type of all its layers."""
    counts = [len(getattr(param, "params", ())) for param in julia_type.params]
    return max(len(counts), *counts, 0) <= _FEW


class Lowerer(Sharing):
    """Lowers values into one document.

    `make_payload(array, order)` streams an array in memory order "C" or "F"; `column_major` are
    the ids of arrays inside layers; `tag_devices` writes the device of GPU arrays beside them;
    `spelling` are those of Core and Base that are written as parts of Main; `forms` are those of
    objects that are alike, by id.
    """

    def __init__(
        self,
        make_payload: Callable[[Any, str], Payload | NDArray[Any]],
        column_major: set[int],
        tag_devices: bool,
        spelling: frozenset[str] = frozenset(),
        forms: Mapping[int, Form] | None = None,
    ) -> None:
        super().__init__()
        self.make_payload, self.column_major = make_payload, column_major
        self.tag_devices, self.spelling, self.forms = tag_devices, spelling, forms or {}
        self.encoded: dict[JuliaType, Encoded] = {}
        self.functions: dict[str, Encoded] = {}
        self.memories: dict[Any, Any] = {}  # what a tensor lies in -> the first of that
        self.heads: dict[Any, tuple[Encoded, Encoded]] = {}  # dtype and shape -> `type` and `size`
        self.alikes: dict[Any, Alike] = {}  # by dtype, shape and order
        self.kinds: dict[np.dtype[Any], tuple[JuliaType, str | None]] = {}
        self.int64 = document.int64()

    def refuse(self, path: str, value: Any, advice: str) -> UnsupportedValueError:
        return UnsupportedValueError(
            f"{path}: a value of type {type(value).__qualname__} cannot be saved; {advice}"
        )

    # --- dispatch ---

    def put(self, container: Any, key: Any, value: Any, path: str) -> None:
        """Lower `value` into container[key], as a backref where it has been met before."""
        lower = _BY_TYPE.get(type(value))
        if lower is not None:
            container[key] = lower(self, value, path)
        elif type(value) is FunctionType:
            self.instance(container, key, value, path)
        elif not self.is_met(container, key, value):
            form = self.forms.get(id(value))
            if form is None or not templates.fill(self, form, container, key, value):
                self.new(container, key, value, path)
                if form is not None and form.template is None and form.tries > 0:
                    templates.keep(self, form, container[key], value)

    def new(self, container: Any, key: Any, value: Any, path: str) -> None:
        """Lower an object that has an identity and is met for the first time."""
        if type(value) is np.ndarray:
            arrays.lower(self, container, key, value, path)
        elif isinstance(value, dict):
            self.dictionary(container, key, value, path)
        elif isinstance(value, list):
            node = self.place(container, key, value, [None] * len(value))
            templates.lower_all(
                self, node, list(range(len(value))), value, lambda i: f"{path}[{i}]"
            )
        elif devices.is_array(value):
            first = self.memories.setdefault(devices.memory_of(value), value)
            if first is value or not self.is_met(container, key, first):
                arrays.lower(self, container, key, value, path)
        elif flux.kind_of(value) is not None:
            self.instance(container, key, value, path)
        elif isinstance(value, OpaqueDocument):
            self.opaque(container, key, value.document, value)
        elif isinstance(value, (Struct, OpaqueFunction)):
            self.kept(container, key, value, path)
        elif isinstance(value, LostArray):
            self.new(container, key, value.struct, path)
            self.place(container, key, value, container[key])
        elif isinstance(value, JuliaArray):
            self.julia_array(container, key, value, path)
        elif isinstance(value, JuliaType):
            self.julia_type(container, key, value, path)
        elif isinstance(value, np.generic) and not isinstance(value, (str, bytes)):
            container[key] = self.scalar(value, path)
        elif isinstance(value, (set, frozenset)):
            dictionaries.lower_set(self, container, key, value, path)
        elif type(value) is tuple:
            self.tuple_of(container, key, value, path)
        elif isinstance(value, _BUILT_IN) and kinds.field_names(type(value)) is None:
            base: Any = next(base for base in _BUILT_IN if isinstance(value, base))
            container[key] = _BY_TYPE[base](self, base(value), path)
        elif isinstance(value, tuple) and kinds.field_names(type(value)) is None:
            self.tuple_of(container, key, tuple(value), path)
        else:
            self.instance(container, key, value, path)

    def fill(self, node: list[Any], values: Any, paths: list[str]) -> None:
        for index, (child, path) in enumerate(zip(values, paths, strict=True)):
            self.put(node, index, child, path)

    def put_named(
        self, node: dict[str, Any], value: dict[str, Any], path: str, path_of: Callable[[str], str]
    ) -> None:
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            for name in value:
                self.text(name, path)  # raises for the first one
        templates.lower_all(self, node, list(value), list(value.values()), path_of)

    # --- values without an identity ---

    def same(self, value: Any, path: str) -> Any:
        return value

    def text(self, value: str, path: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.refuse(path, value, "it holds a lone surrogate; save valid text") from None
        return value

    def integer(self, value: int, path: str) -> Any:
        if -(2**63) <= value < 2**63:
            return self.int64(value)
        for name, signed in (("Core.Int128", True), ("Core.UInt128", False)):
            try:
                raw = value.to_bytes(16, "little", signed=signed)
            except OverflowError:
                continue
            return {"tag": "struct", "type": self.type(_named(name)), "data": raw}
        raise self.refuse(path, value, "integers have at most 128 bits; save it as a string")

    def symbol(self, value: Symbol, path: str) -> dict[str, Any]:
        return {"tag": "symbol", "name": self.text(str(value), path)}

    def octets(self, value: bytes | bytearray, path: str) -> dict[str, Any]:
        payload = self.make_payload(np.frombuffer(value, "u1"), "F")
        size = [self.int64(len(value))]
        element_type = self.type(_named("Core.UInt8"))
        return {
            "tag": "array", "type": element_type, "size": size, "python": "bytes", "data": payload,
        }  # fmt: skip

    def complex_number(self, value: complex, path: str) -> dict[str, Any]:
        return self.struct(_named("Base.Complex", _FLOAT64), [value.real, value.imag])

    def scalar(self, value: np.generic, path: str) -> Any:
        dtype = value.dtype.newbyteorder("<")
        if dtype == np.int32:
            return int(value)
        if dtype.kind == "c" and element_type_of(dtype):
            parts: list[Any] = [None, None]
            self.fill(parts, [value.real, value.imag], [path, path])
            julia_type = element_type_of(dtype)
            assert julia_type is not None
            return self.struct(julia_type[0], parts)
        known = element_type_of(dtype)
        if known is None:
            raise self.refuse(path, value, f"there is no Julia type for {value.dtype}")
        raw = np.asarray(value, dtype).tobytes()
        node = {"tag": "struct", "type": self.type(known[0]), "data": raw}
        return node if known[1] is None else node | {"dtype": known[1]}

    # --- types ---

    def type(self, julia_type: JuliaType) -> Encoded:
        """Return a type that holds nothing opaque, encoded once."""
        encoded = self.encoded.get(julia_type)
        if encoded is None:
            encoded = document.encode(type_document(julia_type, self.spelling))
            self.encoded[julia_type] = encoded
        return encoded

    def encoded_type(self, julia_type: Any) -> Encoded | None:
        try:
            return self.encoded.get(julia_type)
        except TypeError:  # a parameter that is not hashable, so not plain
            return None

    def julia_type(self, container: Any, key: Any, value: Any, path: str) -> None:
        known = self.encoded_type(value)
        if known is not None:
            container[key] = known
        elif not isinstance(value, JuliaType):
            self.put(container, key, value, path)
        elif _is_short(value) and is_plain(value):
            container[key] = self.type(value)
        else:
            params: list[Any] = [None] * len(value.params)
            name = names_of(value, self.spelling)
            container[key] = {"tag": "datatype", "name": name, "params": params}
            for index, param in enumerate(value.params):
                params[index] = self.encoded_type(param)
                if params[index] is None:
                    self.put(params, index, param, path)

    # --- objects ---

    def struct(self, julia_type: JuliaType, fields: list[Any]) -> dict[str, Any]:
        return {"tag": "struct", "type": self.type(julia_type), "data": fields}

    def open_struct(self, container: Any, key: Any, value: Any, node: dict[str, Any]) -> list[Any]:
        """Place a struct document for `value` and return its list of fields, to be filled."""
        self.place(container, key, value, node)
        fields: list[Any] = node["data"]
        return fields

    def dictionary(self, container: Any, key: Any, value: dict[Any, Any], path: str) -> None:
        if isinstance(value, NamedTuple):
            self.named_tuple(container, key, value, path)
        elif isinstance(value, DataFrame):
            dictionaries.lower_data_frame(self, container, key, value, path)
        elif not isinstance(value, JuliaDict) and dictionaries.is_document(value):
            node = self.place(container, key, value, {})
            self.put_named(node, value, path, lambda name: f"{path}[{name!r}]")
        else:
            dictionaries.lower_dict(self, container, key, value, path)

    def named_tuple(self, container: Any, key: Any, value: dict[str, Any], path: str) -> None:
        node = {"tag": "struct", "type": None, "data": [None] * len(value)}
        fields = self.open_struct(container, key, value, node)
        self.julia_type(node, "type", named_tuple_type(value), path)
        self.fill(fields, value.values(), [f"{path}[{name!r}]" for name in value])

    def tuple_of(self, container: Any, key: Any, value: tuple[Any, ...], path: str) -> None:
        parts: list[Any] = [None] * len(value)
        self.place(container, key, value, {"tag": "tuple", "data": parts})
        templates.lower_all(
            self, parts, list(range(len(value))), list(value), lambda i: f"{path}[{i}]"
        )

    def kept(self, container: Any, key: Any, value: Struct | OpaqueFunction, path: str) -> None:
        content = value.data if isinstance(value, Struct) else value.captured
        node: dict[str, Any] = {"tag": "struct", "type": None, "data": content}
        names = value.fields if isinstance(value, Struct) else None
        if names and names != kinds.field_names_of(value.type, len(content)):
            node["fields"] = list(names)
        self.place(container, key, value, node)
        self.put(node, "type", value.type, path)
        if not isinstance(content, bytes):
            node["data"] = [None] * len(content)
            labels = [f".{name}" for name in names] if names else None
            labels = labels or [f".data[{i}]" for i in range(len(content))]
            self.fill(node["data"], content, [path + label for label in labels])

    def instance(self, container: Any, key: Any, value: Any, path: str) -> None:
        """Lower a function, a layer, or an object of a dataclass or namedtuple class."""
        kind = flux.kind_of(value)
        name = flux.function_name(value) if kind is None else None
        if name is not None:
            if name not in self.functions:
                type_node = type_document(_named(name), self.spelling)
                self.functions[name] = document.encode(
                    {"tag": "struct", "type": type_node, "data": []}
                )
            container[key] = self.functions[name]
            return
        if kind is not None and kind.becomes is not None:
            self.instance(container, key, kind.becomes(value), path)
            container[key]["python"] = type(value).__name__
            self.place(container, key, value, container[key])
            return
        names = kind.fields if kind else kinds.field_names(type(value))
        if names is None:
            raise self.refuse(path, value, _advice(value))
        parts = self.parts(value, names, path)
        node: dict[str, Any] = {"tag": "struct", "type": None, "data": [None] * len(names)}
        if kind is None:
            node["fields"] = list(names)
        fields = self.open_struct(container, key, value, node)
        self.julia_type(node, "type", type_of(value), path)
        self.fill(fields, parts, [f"{path}.{name}" for name in names])

    def parts(self, value: Any, names: tuple[str, ...], path: str) -> list[Any]:
        """Return the fields of an object as they are written."""
        if isinstance(value, TrackedArray) and value.tracker is None:
            return self.tracked(value)
        kind = flux.kind_of(value)
        worked_out = {name for name, _ in kind.written} if kind and kind.written else ()
        unset = [name for name in names if not hasattr(value, name) and name not in worked_out]
        if unset:
            raise self.refuse(path, value, f"its field {unset[0]!r} is not set")
        return [field_of(value, name, kind) for name in names]

    def tracked(self, value: TrackedArray) -> list[Any]:
        """Return the fields of an array tracked in Python: Tracker.jl's record of a leaf first."""
        grad = np.zeros(value.shape, value.dtype, order="F") if value.grad is None else value.grad
        self.column_major.add(id(grad))
        call = Struct(_named("Tracker.Call", _NOTHING, _named("Core.Tuple")), [None, ()])
        tracked_type = _named("Tracker.Tracked", array_type(value.data))
        return [Struct(tracked_type, [np.uint32(0), call, True, grad]), value.data, grad]

    # --- arrays ---

    def array_node(
        self, value: Any, known: tuple[JuliaType, str | None], shape: Any, order: str
    ) -> dict[str, Any]:
        kind, size = self.head(known[0], value.dtype, shape)
        node: dict[str, Any] = {"tag": "array", "type": kind, "size": size}
        if self.tag_devices:
            device = devices.array_device(value)
            if device != "cpu":
                node["device"] = device
        if known[1] is not None:
            node["dtype"] = known[1]
        node["data"] = self.make_payload(value, order)
        return node

    def head(self, element_type: JuliaType, dtype: Any, shape: Any) -> tuple[Encoded, Encoded]:
        """Return the type and the size of an array, the same ones for all that are alike."""
        head = self.heads.get((dtype, shape))
        if head is None:
            size = document.encode([self.int64(n) for n in shape])
            head = self.heads[dtype, shape] = self.type(element_type), size
        return head

    def julia_array(self, container: Any, key: Any, value: JuliaArray, path: str) -> None:
        size = [self.int64(n) for n in value.shape]
        node = {"tag": "array", "type": None, "size": size, "data": value.data}
        self.place(container, key, value, node)
        self.put(node, "type", value.element_type, path)
        if isinstance(value.data, list):
            elements = [None] * len(value.data)
            node["data"] = elements
            self.fill(elements, value.data, [f"{path}[{i}]" for i in range(len(elements))])

    # --- documents kept as they came ---

    def opaque(self, container: Any, key: Any, node: Any, kept: OpaqueDocument) -> None:
        """Copy a document of a file, its backrefs numbered anew."""
        target = kept.source.resolve(node, "an opaque value")
        if target is not node:
            if not self.is_met(container, key, target):
                self.places[id(target)] = (container, key, target)
                self.opaque(container, key, target, kept)
        elif type(node) is dict:
            copied: dict[str, Any] = {}
            container[key] = copied
            for name, child in node.items():
                self.opaque(copied, name, child, kept)
        elif type(node) is list:
            elements = container[key] = [None] * len(node)
            for index, child in enumerate(node):
                self.opaque(elements, index, child, kept)
        else:
            container[key] = kept.source.read(node) if isinstance(node, Slot) else node


_BY_TYPE: dict[type, Callable[[Lowerer, Any, str], Any]] = {
    type(None): Lowerer.same,
    bool: Lowerer.same,
    float: Lowerer.same,
    int: Lowerer.integer,
    str: Lowerer.text,
    Symbol: Lowerer.symbol,
    bytes: Lowerer.octets,
    bytearray: Lowerer.octets,
    complex: Lowerer.complex_number,
    **twins.LOWER,
}
_BUILT_IN = (str, int, float, complex, bytes, bytearray)  # subclasses are saved as these


def _advice(value: Any) -> str:
    for name in ("state_dict", "unfreeze", "to_pure_dict"):  # of PyTorch's modules, of Flax
        if hasattr(type(value), name):
            return f"save its {name}()"
    if callable(value):
        return "code is never saved; use a function of gpustore, or a dataclass with __call__"
    return "make its class a dataclass, or save its parts as a dict"
