"""Python values that remember which of Julia's they are, so that they are written back as those.

Each is used like the Python value it extends: a Dict of Julia is a dict, a Char a string, a range
a sequence. Where the plain Python value says it all (a `range`, an `int`), that is what is loaded.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.dtypes import dtype_of
from gpustore.julia import LEAF, JuliaType, NamedTuple, Struct
from gpustore.notebook import Shown

_INT64 = JuliaType.named("Core.Int64")


class Entries(Shown, dict[str, Any]):
    """The entries of a file of Julia's; `spelling` are the modules it names as parts of Main."""

    spelling: frozenset[str] = frozenset()


class JuliaDict(Shown, dict[Any, Any]):
    """A dictionary of Julia whose type is not the one a plain dict is written as.

    A dict with its `julia_type`: `Dict{String, Float32}`, an IdDict. `dict(x)` forgets the type.
    """

    julia_type: JuliaType


class JuliaSet(set[Any]):
    """A set of Julia (Set, IdSet) with its `julia_type`; `order` is that of the file."""

    julia_type: JuliaType
    order: tuple[Any, ...] = ()


class DataFrame(Shown, dict[str, Any]):
    """A DataFrame: its columns by name; `struct` is all that the file holds of it."""

    struct: Struct


class Int128(int):
    """An Int128 of Julia; a plain int is written as one only where an Int64 is too narrow."""


class UInt128(int):
    """A UInt128 of Julia; a plain int is written as one only where an Int128 is too narrow."""


def wide_int(name: str, raw: bytes) -> int:
    """Return the number of the 16 bytes of a `Core.Int128` or `Core.UInt128`."""
    if name == "Core.Int128":
        value = int.from_bytes(raw, "little", signed=True)
        return Int128(value) if -(2**63) <= value < 2**63 else value
    value = int.from_bytes(raw, "little")
    return UInt128(value) if value < 2**127 else value


class Char(str):
    """A Char of Julia: a string of one character.

    >>> Char("λ").raw.hex()
    '0000bbce'
    """

    __slots__ = ()

    @property
    def raw(self) -> bytes:
        """The 4 bytes of it in memory: UTF-8, left-aligned in a little-endian number."""
        return self.encode().ljust(4, b"\0")[::-1]

    @classmethod
    def from_raw(cls, raw: bytes) -> Char | None:
        """Return the character of 4 bytes, or None for bytes that are no valid character."""
        try:
            made = cls(raw[::-1].rstrip(b"\0").decode() or "\0")
        except UnicodeDecodeError:
            return None
        return made if len(made) == 1 and made.raw == raw else None


class Missing:
    """The type of `missing`, Julia's value for what is not known."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "missing"

    def __reduce__(self) -> str:
        return "missing"


missing = Missing()


class Range(Struct, Sequence[Any]):
    """A range of Julia that Python's `range` is not: a sequence of its elements.

    `numpy.asarray` gives them as an array, bit for bit as Julia's `collect`. Files make it;
    `range` is what one of Int64 comes as.
    """

    __slots__ = ()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        name: str = getattr(self.type, "name", "")
        return np.asarray(_ELEMENTS[name](self), dtype=dtype)

    def __len__(self) -> int:
        return _count(self)

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__array__())


def _count(span: Any) -> int:
    """Return the number of elements of a range."""
    name, fields = span.type.name, span.data
    if name == "Base.Slice":
        return len(fields[0])
    if name in ("Base.StepRangeLen", "Base.LinRange"):
        return max(int(fields[2]), 0)
    if name == "Base.OneTo":
        return max(int(fields[0]), 0)
    first, step, last = fields if len(fields) == 3 else (fields[0], 1, fields[1])
    return max((int(last) - int(first)) // int(step) + 1, 0) if step else 0


def _steps(span: Any) -> Any:
    """Return the elements of a UnitRange, OneTo or StepRange of numbers."""
    fields = [1, *span.data] if span.type.name == "Base.OneTo" else span.data
    first, step = np.asarray(fields[0]), np.asarray(fields[1] if len(fields) == 3 else 1)
    if span.type.name == "Base.OneTo":
        first = np.ones_like(fields[1])
    return first + step.astype(first.dtype) * np.arange(_count(span)).astype(first.dtype)


def _step_range_length(span: Any) -> Any:
    """Return the elements of a StepRangeLen: ref + (i - offset) * step, in twice the precision."""
    ref, step, count, offset = span.data[:4]
    place = np.arange(1, int(count) + 1, dtype=np.float64) - float(offset)
    element = span.type.params[0].name
    dtype = {"Core.Float16": np.float16, "Core.Float32": np.float32}.get(element, np.float64)
    if not isinstance(ref, Struct):
        return (float(ref) + place * float(step)).astype(dtype)
    shift_hi, shift_lo = place * step.data[0], place * step.data[1]
    larger = np.where(np.abs(shift_hi) > abs(ref.data[0]), shift_hi, ref.data[0])
    smaller = np.where(np.abs(shift_hi) > abs(ref.data[0]), ref.data[0], shift_hi)
    total = larger + smaller
    return (total + ((larger - total) + smaller + (shift_lo + ref.data[1]))).astype(dtype)


def _linear_range(span: Any) -> Any:
    """Return the elements of a LinRange: (1 - t) * start + t * stop, t from 0 to 1."""
    start, stop, count, divisor = span.data[:4]
    t = np.arange(int(count)) / max(int(divisor), 1)
    return ((1 - t) * start + t * stop).astype(np.result_type(start))


_ELEMENTS: dict[str, Callable[[Any], Any]] = {
    "Base.Slice": lambda span: np.asarray(span.data[0]),
    "Base.UnitRange": _steps,
    "Base.OneTo": _steps,
    "Base.StepRange": _steps,
    "Base.StepRangeLen": _step_range_length,
    "Base.LinRange": _linear_range,
}
RANGES = tuple(_ELEMENTS)
_UNIT_RANGE = JuliaType.named("Base.UnitRange", _INT64)
_STEP_RANGE = JuliaType.named("Base.StepRange", _INT64, _INT64)


def range_parts(span: range) -> tuple[JuliaType, list[int]]:
    """Return the Julia type and the fields a Python range is written as."""
    if span.step == 1:
        return _UNIT_RANGE, [span.start, span.start + len(span) - 1]
    last = span[-1] if span else span.start - (1 if span.step > 0 else -1)
    return _STEP_RANGE, [span.start, span.step, last]


def range_of(julia_type: JuliaType, fields: list[Any]) -> range | None:
    """Return the Python range that is written as this type and fields, or None.

    Python's empty ranges do not tell NumPy that they are of integers.
    """
    if not all(type(field) is int for field in fields) or not fields:
        return None
    step = fields[1] if len(fields) == 3 else 1
    if step == 0:
        return None
    made = range(fields[0], fields[-1] + (1 if step > 0 else -1), step)
    known = range_parts(made)
    return made if made and known[0].is_same(julia_type) and known[1] == fields else None


# --- arrays of what NumPy has no dtype for ------------------------------------------------------


@dataclass(slots=True, eq=False)
class JuliaArray:
    """An array of elements that NumPy has no dtype for: raw column-major memory, or a list.

    It is indexed as an array of Python values, and `numpy.asarray` gives that array of objects;
    elements whose layout is not known are Structs of their bytes.
    """

    element_type: Any = field(metadata=LEAF)
    shape: tuple[int, ...] = field(metadata=LEAF)
    data: list[Any] | bytes

    def elements(self) -> list[Any]:
        """Return all elements in column-major order."""
        if isinstance(self.data, list):
            return self.data
        count = math.prod(self.shape)
        layout = _layout(self.element_type)
        if layout is not None and layout[0].itemsize * count == len(self.data):
            dtype, decode = layout
            empty = [()] * count if dtype.itemsize == 0 else None
            return list(map(decode, empty or np.frombuffer(self.data, dtype).tolist()))
        size = len(self.data) // max(count, 1)
        return [
            Struct(self.element_type, self.data[i * size : (i + 1) * size]) for i in range(count)
        ]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        made = np.empty(math.prod(self.shape), object)
        for index, element in enumerate(self.elements()):
            made[index] = element
        return made.reshape(self.shape, order="F").astype(dtype or object)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.__array__()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__array__())


_Layout = tuple[np.dtype[Any], Callable[[Any], Any]]


def _layout(element_type: Any) -> _Layout | None:
    """Return the dtype of a bits type's memory, and what makes the value of its item; or None."""
    dtype = dtype_of(element_type)
    if dtype is not None:
        keep = dtype.char in "?ldD"
        return dtype, (lambda item: item) if keep else dtype.type
    name = getattr(element_type, "name", None)
    if name == "Core.Tuple":
        return _tuple_layout(element_type.params, tuple)
    if name == "Core.NamedTuple" and len(element_type.params) == 2:
        names, types = element_type.params
        if getattr(types, "name", None) != "Core.Tuple":
            return None
        return _tuple_layout(
            types.params, lambda v: NamedTuple(zip(map(str, names), v, strict=True))
        )
    return _LAYOUTS.get(name) if not getattr(element_type, "params", ()) else None


def _tuple_layout(types: tuple[Any, ...], make: Callable[[Any], Any]) -> _Layout | None:
    """Return the layout of fields that lie as in a C struct."""
    parts = [_layout(part) for part in types]
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return None
    dtype = np.dtype([(f"f{i}", part[0]) for i, part in enumerate(known)], align=True)
    return dtype, lambda item: make(
        [part[1](field) for part, field in zip(known, item, strict=True)]
    )


def _char(item: int) -> Any:
    raw = item.to_bytes(4, "little")
    return Char.from_raw(raw) or Struct(JuliaType.named("Core.Char"), raw)


def _date(item: int) -> Any:
    if 1 <= item <= datetime.date.max.toordinal():
        return datetime.date.fromordinal(item)
    return Struct(JuliaType.named("Dates.Date"), item.to_bytes(8, "little", signed=True))


_WIDE = np.dtype([("low", "<u8"), ("high", "<u8")])
_LAYOUTS: dict[Any, _Layout] = {
    "Core.Nothing": (np.dtype([]), lambda item: None),
    "Base.Missing": (np.dtype([]), lambda item: missing),
    "Core.Char": (np.dtype("<u4"), _char),
    "Dates.Date": (np.dtype("<i8"), _date),
    "Core.UInt128": (_WIDE, lambda item: UInt128(item[0] | item[1] << 64)),
    "Core.Int128": (
        _WIDE,
        lambda item: Int128((item[0] | item[1] << 64) - (item[1] >> 63 << 128)),
    ),
}


# --- arrays that remember what they were -------------------------------------------------------


class Origin:
    """The memory of an array that remembers what the array was in its file.

    `twin` is BARE for a bare binary, the Struct of a BitArray, or the JuliaType of the elements.
    """

    __slots__ = ("__array_interface__", "memory", "twin")

    def __init__(self, array: Any, twin: Any) -> None:
        self.__array_interface__ = array.__array_interface__
        self.memory, self.twin = array, twin


BARE = "bare"


def with_origin(array: Any, twin: Any) -> Any:
    """Return a view of a host array that `origin_of` knows; copies and views of it are plain."""
    return np.asarray(Origin(array, twin)) if type(array) is np.ndarray else array


def origin_of(array: Any) -> Any:
    """Return what the array was in its file where plain Python does not say, or None."""
    base = getattr(array, "base", None)
    return base.twin if type(base) is Origin else None


def bits_of(chunks: Any, shape: tuple[int, ...]) -> Any:
    """Return the boolean array of a BitArray's chunks (uint64, the lowest bit first)."""
    octets = np.frombuffer(np.asarray(chunks, "<u8").tobytes(), np.uint8)
    count = int(np.prod(shape, dtype=np.int64))
    return (
        np.unpackbits(octets, count=count, bitorder="little").view(bool).reshape(shape, order="F")
    )


def chunks_of(array: Any) -> Any:
    """Return the chunks (uint64) of a BitArray that holds this boolean array."""
    octets = np.packbits(array.reshape(-1, order="F"), bitorder="little")
    return np.frombuffer(octets.tobytes() + bytes(-len(octets) % 8), "<u8")
