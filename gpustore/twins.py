"""Structs of Julia's Base and Dates <-> the Python values that are the same: each with both ways.

`lift_*` make the value of a struct document, or return NotImplemented where the value would not
be written back as that document: it then stays a `Struct`. `lower_*` write the document.
"""

from __future__ import annotations

import collections
import datetime
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from gpustore import flux, specs
from gpustore.julia import ArraySpec, JuliaType, NamedTuple, Struct, dtype_of
from gpustore.values import (
    RANGES,
    Char,
    DataFrame,
    Int128,
    JuliaDict,
    JuliaSet,
    Range,
    UInt128,
    bits_of,
    chunks_of,
    missing,
    range_of,
    range_parts,
    wide_int,
    with_origin,
)

_named = JuliaType.named
_ANY = _named("Core.Any")
_NOTHING = _named("Core.Nothing")
_FLOAT64 = _named("Core.Float64")
DICT = _named("Base.Dict", _ANY, _ANY)
SET = _named("Base.Set", _ANY)
_MAX_OF_ONE_HASH = 100
_UNIX_EPOCH_DAYS = 719163  # 1970-01-01 in days from 0000-12-31, where Julia's dates begin
_DAY_MILLISECONDS = 86_400_000
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


# --- dictionaries and sets --------------------------------------------------------------------


def lift_dict(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift [keys, values]; either is an array document where its type is a bits type."""
    if len(content) != 2 or len(julia_type.params) != 2:
        return NotImplemented
    raw_keys, raw_values = (_once(lifter, part, path) for part in content)
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


def _once(lifter: Any, node: Any, path: str) -> Any:
    """Return what a node stands for; one of which several values are made is counted each time."""
    found = lifter.resolve(node, path)
    payload = found.get("data") if isinstance(found, dict) else found
    if id(found) in lifter.parts:
        lifter.count_shared(lifter.resolve(payload, path), path)
    lifter.parts.add(id(found))
    return found


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
    _once(lifter, fields[0], path)
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


# --- numbers, characters, times ---------------------------------------------------------------


def lift_complex(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    parts = lifter.children(content, path)
    dtype = dtype_of(julia_type)
    if dtype is None or len(parts) != 2:
        return NotImplemented
    if dtype == np.complex128 and all(type(part) is float for part in parts):
        return complex(*parts)
    if all(type(part) is type(dtype.type(0).real) for part in parts):
        made = np.zeros((), dtype)
        made.real, made.imag = parts
        return made[()]
    return NotImplemented


def lift_primitive(name: str, raw: bytes) -> Any:
    """Return the value of a primitive type that NumPy has no scalar for, or NotImplemented."""
    if name in ("Core.Int128", "Core.UInt128") and len(raw) == 16:
        return wide_int(name, raw)
    if name == "Core.Char" and len(raw) == 4:
        char = Char.from_raw(raw)
        return NotImplemented if char is None else char
    return NotImplemented


def lower_char(lowerer: Any, value: Char, path: str) -> Any:
    return {"tag": "struct", "type": lowerer.type(_named("Core.Char")), "data": value.raw}


def lower_wide_int(lowerer: Any, value: int, path: str) -> Any:
    name = type(value).__name__
    raw = int(value).to_bytes(16, "little", signed=name == "Int128")
    return {"tag": "struct", "type": lowerer.type(_named(f"Core.{name}")), "data": raw}


def lift_missing(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    return NotImplemented if content else missing


def lower_missing(lowerer: Any, value: Any, path: str) -> Any:
    return lowerer.struct(_named("Base.Missing"), [])


def lift_date(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    days = _instant(lifter, content, path)
    if days is None or not 1 <= days <= datetime.date.max.toordinal():
        return NotImplemented
    return datetime.date.fromordinal(days)


def lower_date(lowerer: Any, value: datetime.date, path: str) -> Any:
    day = lowerer.struct(_named("Dates.Day"), [lowerer.int64(value.toordinal())])
    instant = lowerer.struct(_named("Dates.UTInstant", _named("Dates.Day")), [day])
    return lowerer.struct(_named("Dates.Date"), [instant])


def lift_date_time(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    exact = node.get("python")
    if isinstance(exact, str):
        try:
            moment = datetime.datetime.fromisoformat(exact.removesuffix(" fold"))
            return moment.replace(fold=int(exact.endswith(" fold")))
        except ValueError:
            raise lifter.malformed(path, f"{exact!r} is no ISO date") from None
    milliseconds = _instant(lifter, content, path)
    if milliseconds is None:
        return NotImplemented
    since = datetime.timedelta(milliseconds=milliseconds - _UNIX_EPOCH_DAYS * _DAY_MILLISECONDS)
    try:
        return datetime.datetime(1970, 1, 1) + since
    except OverflowError:
        return NotImplemented


def lower_date_time(lowerer: Any, value: datetime.datetime, path: str) -> Any:
    """Julia's DateTime holds milliseconds of no zone; the exact value stands beside it."""
    since = value.replace(tzinfo=None, fold=0) - datetime.datetime(1970, 1, 1)
    milliseconds = since // datetime.timedelta(milliseconds=1)
    unit = _named("Dates.Millisecond")
    day_zero = _UNIX_EPOCH_DAYS * _DAY_MILLISECONDS
    inner = lowerer.struct(unit, [lowerer.int64(milliseconds + day_zero)])
    instant = lowerer.struct(_named("Dates.UTInstant", unit), [inner])
    node = lowerer.struct(_named("Dates.DateTime"), [instant])
    is_exact = value.tzinfo is None and value.microsecond % 1000 == 0 and not value.fold
    return node if is_exact else node | {"python": value.isoformat() + " fold" * value.fold}


def _instant(lifter: Any, content: Any, path: str) -> int | None:
    """Return the number inside UTInstant(Day(n)) or UTInstant(Millisecond(n))."""
    value: Any = Struct(JuliaType(()), lifter.children(content, path))
    while isinstance(value, Struct) and len(value.data) == 1:
        value = value.data[0]
    return value if type(value) is int and abs(value) < 2**53 else None


# --- ranges and bit arrays --------------------------------------------------------------------


def lift_range(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift a range of numbers, as Python's where that is written back the same."""
    fields = lifter.children(content, path)
    names = flux.field_names_of(julia_type, len(fields))
    plain = range_of(julia_type, fields)
    if plain is not None:
        return plain
    if node.get("python") == "range":
        return range(0)
    if names is None or not all(map(_is_number, fields)):
        return NotImplemented
    return Range(julia_type, fields, names)


def _is_number(part: Any) -> bool:
    if isinstance(part, (range, Range)):  # the indices of a Slice
        return True
    if isinstance(part, Struct):  # TwicePrecision(hi, lo)
        return len(part.data) == 2 and all(type(half) is float for half in part.data)
    return isinstance(part, (int, float, np.number)) and not isinstance(part, bool)


def lower_range(lowerer: Any, value: range, path: str) -> Any:
    julia_type, fields = range_parts(value)
    node = lowerer.struct(julia_type, [lowerer.integer(field, path) for field in fields])
    return node if value else node | {"python": "range"}


def lift_bit_array(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift [chunks, len, dims] as a boolean array; the dims of a BitVector are meaningless."""
    chunks = _once(lifter, content[0], path) if len(content) == 3 else None
    if not isinstance(chunks, dict) or chunks.get("tag") != "array" or len(julia_type.params) != 1:
        return NotImplemented
    spec = specs.array_spec(lifter, chunks, path)
    length, dims = (lifter.value(part, path) for part in content[1:])
    if not isinstance(spec, ArraySpec) or spec.dtype != np.uint64 or type(dims) is not tuple:
        return NotImplemented
    shape = (length,) if len(dims) == 1 else dims
    if not all(type(n) is int and 0 <= n < 2**62 for n in (length, *shape)):
        return NotImplemented
    is_filled = -(-length // 64) == spec.nbytes // 8 and math.prod(shape) == length
    if not is_filled or math.prod(size for size in shape if size) >= 2**62:
        raise lifter.malformed(path, f"a BitArray of shape {shape} has {spec.nbytes} bytes of bits")
    words = np.frombuffer(lifter.bytes_of(spec.payload), np.uint64)
    return with_origin(bits_of(words, shape), Struct(julia_type, [length, dims]))


def lower_bit_array(lowerer: Any, container: Any, key: Any, value: Any, twin: Struct) -> None:
    node: dict[str, Any] = {"tag": "struct", "type": None, "data": [None, None, None]}
    lowerer.place(container, key, value, node)
    lowerer.put(node, "type", twin.type, "")
    chunks = chunks_of(value)
    uint64 = (_named("Core.UInt64"), None)
    node["data"][0] = lowerer.array_node(chunks, uint64, chunks.shape, "F")
    lowerer.put(node["data"], 1, twin.data[0], "")
    lowerer.put(node["data"], 2, twin.data[1], "")


LIFT: dict[str, Callable[..., Any]] = {
    "Base.Dict": lift_dict,
    "Base.IdDict": lift_dict,
    "Base.Set": lift_set,
    "Base.IdSet": lift_set,
    "Base.Complex": lift_complex,
    "Base.Missing": lift_missing,
    "Base.BitArray": lift_bit_array,
    "Core.NamedTuple": lift_named_tuple,
    "Dates.Date": lift_date,
    "Dates.DateTime": lift_date_time,
    "DataFrames.DataFrame": lift_data_frame,
    **dict.fromkeys(RANGES, lift_range),
}
LOWER: dict[type, Callable[..., Any]] = {
    Char: lower_char,
    Int128: lower_wide_int,
    UInt128: lower_wide_int,
    type(missing): lower_missing,
    range: lower_range,
    datetime.date: lower_date,
    datetime.datetime: lower_date_time,
}
