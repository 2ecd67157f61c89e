"""Julia's functions as values, and broadcasting: f.(x, y) aligns the first axes of x and y."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore import devices, limits
from gpustore.arithmetic import as_dtype, is_array, is_number, number, promoted, settled
from gpustore.errors import OpaqueCodeError
from gpustore.layers import plain

MAX_NBYTES = 2**30  # of one array that code makes


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the table: `call` on whole values, `each` on the elements of arrays."""

    name: str
    call: Callable[..., Any]
    each: Callable[..., Any] | None = None
    dtype: Any = None  # of a type such as Float32, which is called to convert

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)


@dataclass(frozen=True, slots=True)
class Broadcasted:
    """A broadcast that has not been computed: f.(args...)."""

    function: Any
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """Ref(x): one value for a broadcast, whatever it is."""

    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """The adjoint of a vector: a row, whose product with a vector is a number."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


def whole(x: Any) -> Any:
    """Return the array of a row or a tracked array, all else as it is."""
    return x.array if isinstance(x, Row) else plain(x)


def bounded(shape: tuple[Any, ...], itemsize: int = 8) -> tuple[int, ...]:
    """Return a shape; raise OpaqueCodeError where an array of it would be too large."""
    sizes = tuple(int(n) for n in shape)
    if math.prod(sizes) * itemsize > MAX_NBYTES or min(sizes, default=0) < 0 or len(sizes) > 32:
        raise OpaqueCodeError(f"code from the file wants an array of shape {sizes}")
    limits.take_elements(math.prod(sizes))
    return sizes


def collected(x: Any) -> Any:
    """Return the array of a sequence of numbers; other values as they are."""
    if isinstance(x, range):
        bounded((len(x),))
        return np.arange(x.start, x.stop, x.step)
    if not isinstance(x, (tuple, list)):
        return whole(x)
    limits.take_steps(len(x))
    if any(is_array(item) or not is_number(item) for item in x):
        return x
    return joined(x)


def joined(numbers: Any) -> Any:
    """Return a vector of numbers, in the type that all of them have in Julia."""
    if not numbers:
        return np.zeros(0)
    alike = promoted(*numbers)
    if all(isinstance(x, (bool, np.bool_)) for x in alike):
        return np.array(alike, np.bool_)
    kinds = [x.dtype if hasattr(x, "dtype") else np.dtype(np.int64) for x in alike]
    dtype = max(kinds, key=lambda kind: (kind.kind in "fc", kind.itemsize * (kind.kind != "b")))
    alike = tuple(as_dtype(x, dtype) for x in alike)
    if all(isinstance(x, np.generic) for x in alike):
        return np.array(alike)
    return _on_device(alike)


def _on_device(numbers: tuple[Any, ...]) -> Any:
    """Return a vector of numbers of which some lie on a device: all are brought there."""
    there = next(x for x in numbers if not isinstance(x, np.generic))
    return np.stack([np.full_like(there, x) if isinstance(x, np.generic) else x for x in numbers])


def broadcasted(function: Any, *args: Any) -> Broadcasted:
    return Broadcasted(function, tuple(whole(arg) for arg in args))


def broadcast(function: Any, *args: Any) -> Any:
    return materialize(broadcasted(function, *args))


def materialize(x: Any) -> Any:
    """Compute a broadcast: of tuples alone a tuple, else an array, of numbers a number."""
    if not isinstance(x, Broadcasted):
        return x
    args = [_argument(materialize(arg)) for arg in x.args]
    if not any(is_array(arg) or isinstance(arg, (range, list)) for arg in args):
        return _of_tuples(x.function, args)
    args = _together(args)
    if any(isinstance(arg, list) for arg in args):
        return _of_lists(x.function, args)
    if any(isinstance(arg, tuple) for arg in args):
        raise OpaqueCodeError("a broadcast over a list whose elements are not numbers")
    ndim = max(arg.ndim for arg in args if is_array(arg))
    args = [
        arg.reshape(arg.shape + (1,) * (ndim - arg.ndim)) if is_array(arg) else number(arg)
        for arg in args
    ]
    shapes = [tuple(arg.shape) for arg in args if is_array(arg)]
    try:
        shape = bounded(np.broadcast_shapes(*shapes))
    except ValueError:
        raise OpaqueCodeError(f"arrays of shapes {shapes} do not broadcast") from None
    each = getattr(x.function, "each", None)
    if each is None or any(isinstance(arg, Held) and is_array(arg.value) for arg in args):
        return _one_by_one(x.function, args, shape)
    found = each(*(arg.value if isinstance(arg, Held) else arg for arg in args))
    return found if getattr(found, "shape", None) == shape else np.broadcast_to(found, shape).copy()


def _together(args: list[Any]) -> list[Any]:
    """Return tuples and ranges as arrays, on the device where the arrays are."""
    there = {devices.array_device(arg) for arg in args if is_array(arg)} - {"cpu"}
    found = []
    for arg in args:
        made = collected(arg)
        if there and made is not arg and is_array(made):
            made = devices.to_device(made, min(there))
        found.append(made)
    return found


def _argument(x: Any) -> Any:
    if isinstance(x, tuple) and len(x) == 1 and (is_array(x[0]) or not is_number(x[0])):
        return Held(x[0])
    return x


def _of_tuples(function: Any, args: list[Any]) -> Any:
    lengths = {len(arg) for arg in args if isinstance(arg, tuple)} - {1}
    if len(lengths) > 1:
        raise OpaqueCodeError(f"tuples of {sorted(lengths)} elements do not broadcast")
    count = next(iter(lengths), 1)
    limits.take_steps(count)
    parts = [
        arg * (count if len(arg) == 1 else 1)
        if isinstance(arg, tuple)
        else (arg.value if isinstance(arg, Held) else number(arg),) * count
        for arg in args
    ]
    call = getattr(function, "each", None) or function
    found = tuple(settled(call(*row)) for row in zip(*parts, strict=True))
    return found if any(isinstance(arg, tuple) for arg in args) else found[0]


def _of_lists(function: Any, args: list[Any]) -> list[Any]:
    """Call a function for each element of lists, such as a layer for each step of a sequence."""
    count = max(len(arg) for arg in args if isinstance(arg, list))
    is_row = [isinstance(arg, list) or getattr(arg, "shape", ()) == (count,) for arg in args]
    for arg, one in zip(args, is_row, strict=True):
        if isinstance(arg, tuple) or (is_array(arg) and not one):
            raise OpaqueCodeError("a broadcast over a list and what is no list of its length")
        if isinstance(arg, list) and len(arg) != count:
            raise OpaqueCodeError(f"lists of {len(arg)} and {count} elements do not broadcast")
    limits.take_steps(100 * count)
    return [
        function(*(arg[i] if one else _value(arg) for arg, one in zip(args, is_row, strict=True)))
        for i in range(count)
    ]


def _one_by_one(function: Any, args: list[Any], shape: tuple[int, ...]) -> Any:
    """Call a function for every element; it is a step each, whatever the function does."""
    limits.take_steps(math.prod(shape))
    parts: list[Any] = [
        np.broadcast_to(arg, shape) if is_array(arg) else itertools.repeat(_value(arg))
        for arg in args
    ]
    found = [
        function(*(part[place] if is_array(part) else next(part) for part in parts))
        for place in np.ndindex(*shape)
    ]
    if not all(is_number(value) and not is_array(value) for value in found):
        if len(shape) == 1:
            return found
        raise OpaqueCodeError("a broadcast whose results are not numbers")
    return joined(found).reshape(shape)


def _value(arg: Any) -> Any:
    return arg.value if isinstance(arg, Held) else arg
