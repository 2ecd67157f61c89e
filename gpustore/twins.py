"""Structs of Julia's Base and Dates <-> the Python values that are the same: each with both ways.

`lift_*` make the value of a struct document, or return NotImplemented where the value would not
be written back as that document: it then stays a `Struct`. `lower_*` write the document.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import dictionaries, kinds, specs
from gpustore.dtypes import dtype_of
from gpustore.julia import ArraySpec, JuliaType, Struct
from gpustore.values import (
    RANGES,
    Char,
    Int128,
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
_UNIX_EPOCH_DAYS = 719163  # 1970-01-01 in days from 0000-12-31, where Julia's dates begin
_DAY_MILLISECONDS = 86_400_000


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
    names = kinds.field_names_of(julia_type, len(fields))
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
    chunks = lifter.once(content[0], path) if len(content) == 3 else None
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
    **dictionaries.LIFT,
    "Base.Complex": lift_complex,
    "Base.Missing": lift_missing,
    "Base.BitArray": lift_bit_array,
    "Dates.Date": lift_date,
    "Dates.DateTime": lift_date_time,
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
