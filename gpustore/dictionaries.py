"""Julia's Dict, Set, NamedTuple and DataFrame <-> dicts and sets: each with both ways, as twins."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from gpustore import specs
from gpustore.dtypes import dtype_of
from gpustore.julia import ArraySpec, JuliaType, NamedTuple, Struct
from gpustore.values import DataFrame, JuliaDict, JuliaSet

_named = JuliaType.named
_ANY = _named("Core.Any")
_NOTHING = _named("Core.Nothing")
DICT = _named("Base.Dict", _ANY, _ANY)
SET = _named("Base.Set", _ANY)
_MAX_OF_ONE_HASH = 100
RESERVED_TAGS = frozenset(
    ("array", "struct", "tuple", "svec", "symbol", "datatype", "unionall", "ref", "backref",
     "jl_anonymous", "jl_bottom_type")
)  # fmt: skip


def is_document(value: dict[Any, Any]) -> bool:
    """Whether a dict can be written as a document, which Julia reads as a Dict{Symbol}."""
    if not {*map(type, value)} <= {str} or "\0" in "".join(value):
        return False
    if "_backrefs" in value or "_gpustore" in value or "$ref" in value:
        return False
    tag = value.get("tag")
    is_harmless = type(tag) in (type(None), bool, int, float, list)
    return is_harmless or (type(tag) is str and tag not in RESERVED_TAGS)


def lift_dict(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift [keys, values]; either is an array document where its type is a bits type."""
    if len(content) != 2 or len(julia_type.params) != 2:
        return NotImplemented
    raw_keys, raw_values = (lifter.once(part, path) for part in content)
    is_plain = DICT.is_same(julia_type) and type(raw_keys) is type(raw_values) is list
    if is_plain and all(type(key) is str for key in raw_keys):
        is_plain = not is_document(dict(zip(raw_keys, raw_values, strict=False)))
    values: dict[Any, Any] = {} if is_plain else JuliaDict()
    lifter.memo[id(node)] = values
    keys = _lift_members(lifter, content[0], julia_type.params[0], path)
    found = _lift_members(lifter, content[1], julia_type.params[1], path)
    if keys is None or found is None or len(keys) != len(found):
        return NotImplemented
    try:
        if not _are_told_apart(keys):
            return NotImplemented
        values.update(zip(keys, found, strict=True))
    except TypeError:  # a key that Python cannot hash
        return NotImplemented
    if len(values) != len(keys):
        return NotImplemented
    if isinstance(values, JuliaDict):
        values.julia_type = julia_type
    return values


def _are_told_apart(keys: Collection[Any]) -> bool:
    """Whether few have the same hash: who chooses numbers can choose Python's hashes of them.

    A dict takes the square of the number of those that have one hash.
    """
    most = collections.Counter(map(hash, keys)).most_common(1)
    return not most or most[0][1] <= _MAX_OF_ONE_HASH


def _lift_members(lifter: Any, node: Any, element_type: Any, path: str) -> list[Any] | None:
    """Return the elements of a Vector, in the form in which `_lower_members` writes it, or None."""
    node = lifter.resolve(node, path)
    dtype = dtype_of(element_type)
    if isinstance(node, list):
        members: list[Any] = lifter.elements(node, path)
        return members if dtype is None else None
    if dtype is None or not isinstance(node, dict) or node.get("tag") != "array":
        return None
    spec = specs.array_spec(lifter, node, path)
    if not isinstance(spec, ArraySpec) or spec.dtype != dtype or len(spec.shape) != 1:
        return None
    array = np.frombuffer(lifter.bytes_of(spec.payload), dtype)
    return array.tolist() if dtype.char in "?dDl" else list(array)


def _lower_members(lowerer: Any, members: Iterable[Any], element_type: Any, paths: Any) -> Any:
    """Return the document of `collect(members)`, or None where they are not of that bits type."""
    members = list(members)
    dtype = dtype_of(element_type)
    if dtype is None:
        node: list[Any] = [None] * len(members)
        lowerer.fill(node, members, paths)
        return node
    array = np.array(members) if members else np.empty(0, dtype)
    if array.dtype != dtype or array.ndim != 1:
        return None
    return lowerer.array_node(array, (element_type, None), array.shape, "F")


def lower_dict(lowerer: Any, container: Any, key: Any, value: Any, path: str) -> None:
    """Write a dict as the struct of its type: of Dict{Any, Any} where it does not fit its own."""
    julia_type = getattr(value, "julia_type", DICT)
    node: dict[str, Any] = {"tag": "struct", "type": None, "data": [[], []]}
    lowerer.place(container, key, value, node)
    key_paths = [f"{path}, key {name!r}" for name in value]
    paths = [f"{path}[{name!r}]" for name in value]
    keys = _lower_members(lowerer, value, julia_type.params[0], key_paths)
    found = _lower_members(lowerer, value.values(), julia_type.params[1], paths)
    if keys is None or found is None:
        julia_type = DICT
        keys = _lower_members(lowerer, value, _ANY, key_paths)
        found = _lower_members(lowerer, value.values(), _ANY, paths)
    lowerer.julia_type(node, "type", julia_type, path)
    node["data"][:] = keys, found


def lift_set(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift a Set or IdSet: it holds a dictionary whose values are nothing."""
    inner = lifter.resolve(content[0], path) if len(content) == 1 else None
    if not isinstance(inner, dict) or inner.get("tag") != "struct" or len(julia_type.params) != 1:
        return NotImplemented
    inner_type = lifter.value(lifter.field(inner, "type", dict, path), path)
    fields = lifter.field(inner, "data", list, path)
    if not _inner_type(julia_type).is_same(inner_type) or len(fields) != 2:
        return NotImplemented
    known = lifter.memo.get(~id(inner))  # Julia's Set is nothing but its dictionary: one, one set
    if known is not None:
        return known
    lifter.once(fields[0], path)
    members = _lift_members(lifter, fields[0], julia_type.params[0], path)
    try:
        if not _are_told_apart(members or ()):
            return NotImplemented
        made = JuliaSet(members or ())
    except TypeError:
        return NotImplemented
    if members is None or len(made) != len(members):
        return NotImplemented
    if node.get("python") in ("set", "frozenset"):
        return frozenset(made) if node["python"] == "frozenset" else set(made)
    made.julia_type, made.order = julia_type, tuple(members)
    lifter.memo[~id(inner)] = made
    return made


def _inner_type(julia_type: JuliaType) -> JuliaType:
    """Return the type of the dictionary inside a set of this type."""
    name = "Base.IdDict" if julia_type.name.endswith(".IdSet") else "Base.Dict"
    return _named(name, *julia_type.params, _NOTHING)


def lower_set(lowerer: Any, container: Any, key: Any, value: Any, path: str) -> None:
    julia_type = getattr(value, "julia_type", SET)
    order = [member for member in getattr(value, "order", ()) if member in value]
    known = set(order)
    members = order + [member for member in value if member not in known]
    paths = [f"{path}, member {member!r}" for member in members]
    node: dict[str, Any] = {"tag": "struct", "type": None, "data": []}
    lowerer.place(container, key, value, node)
    keys = _lower_members(lowerer, members, julia_type.params[0], paths)
    if keys is None:
        julia_type = SET
        keys = _lower_members(lowerer, members, _ANY, paths)
    count = [lowerer.int64(len(members))]
    nothing = {"tag": "array", "type": lowerer.type(_NOTHING), "size": count, "data": b""}
    lowerer.julia_type(node, "type", julia_type, path)
    node["data"].append(lowerer.struct(_inner_type(julia_type), [keys, nothing]))
    if type(value) in (set, frozenset):
        node["python"] = type(value).__name__


def lift_named_tuple(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    names = julia_type.params[0] if julia_type.params else None
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        return NotImplemented
    if not len(names) == len(content) == len(set(names)):
        return NotImplemented
    made = lifter.memo[id(node)] = NamedTuple()
    made.julia_type = julia_type
    for name, child in zip(names, content, strict=True):
        made[str(name)] = lifter.value(child, f"{path}[{str(name)!r}]")
    return made


def lift_data_frame(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift a DataFrame: its columns by name; what else it holds is kept in `struct`."""
    made = lifter.memo[id(node)] = DataFrame()
    made.struct = Struct(julia_type, lifter.children(content, path))
    columns, index = made.struct.data[0], made.struct.data[1]
    names = index.data[1] if isinstance(index, Struct) and len(index.data) == 2 else None
    if not isinstance(columns, list) or not isinstance(names, list) or len(columns) != len(names):
        return made.struct
    made.update(zip(map(str, names), columns, strict=True))
    return made


def lower_data_frame(lowerer: Any, container: Any, key: Any, value: Any, path: str) -> None:
    """Write the struct with the columns of today, or a plain dict where their names changed."""
    struct = value.struct
    if list(value) != list(map(str, struct.data[1].data[1])):
        lowerer.new(container, key, dict(value), path)
        lowerer.place(container, key, value, container[key])
        return
    columns = struct.data[0]
    if any(a is not b for a, b in zip(columns, value.values(), strict=True)):
        columns = list(value.values())
    lowerer.kept(container, key, Struct(struct.type, [columns, *struct.data[1:]]), path)
    lowerer.place(container, key, value, container[key])


LIFT: dict[str, Callable[..., Any]] = {
    "Base.Dict": lift_dict,
    "Base.IdDict": lift_dict,
    "Base.Set": lift_set,
    "Base.IdSet": lift_set,
    "Core.NamedTuple": lift_named_tuple,
    "DataFrames.DataFrame": lift_data_frame,
}
