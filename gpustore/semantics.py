"""Julia's arrays on NumPy and CuPy, for code that a file holds: column-major, indices from 1.

Nothing here changes its arguments, and the size of what is made is bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore import devices, limits
from gpustore.arithmetic import as_dtype, is_array, is_number, number, promoted, settled
from gpustore.broadcasting import Row, bounded, collected, joined, whole
from gpustore.errors import OpaqueCodeError


class _Colon:
    """Julia's `:` as an index or a size; called it makes a range."""

    def __call__(self, first: Any, *rest: Any) -> Any:
        *step, last = rest
        by = step[0] if step else 1
        if all(isinstance(n, (int, np.integer)) for n in (first, by, last)):
            if not by:
                raise OpaqueCodeError("a range with a step of 0")
            return range(int(first), int(last) + (1 if by > 0 else -1), int(by))
        count = math.floor((float(last) - float(first)) / float(by) * (1 + 1e-12)) + 1
        bounded((max(count, 0),))
        start, by = promoted(first, by)
        return start + as_dtype(np.arange(max(count, 0)), np.dtype(type(start))) * by


COLON = _Colon()


@dataclass(frozen=True, slots=True)
class Value:
    """Val{x}(): a value as a type."""

    value: Any


def axes(dims: Any) -> Any:
    """Return NumPy's axes of Julia's `dims`."""
    if dims is None or dims is COLON:
        return None
    several = isinstance(dims, (tuple, list, range)) or is_array(dims)
    found = tuple(int(d) - 1 for d in dims) if several else int(dims) - 1
    if min(found if isinstance(found, tuple) else (found,), default=0) < 0:
        raise OpaqueCodeError(f"dims from 1 on are expected, found {dims!r}")
    return found


def array(x: Any) -> Any:
    """Return an array, or that of a sequence of numbers; all else is refused."""
    found = collected(x)
    if not hasattr(found, "shape"):
        raise OpaqueCodeError(f"expected an array, found a {type(x).__name__}")
    return found


def shape_of(dims: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the sizes in f(2, 3) and in f((2, 3))."""
    return dims[0] if len(dims) == 1 and isinstance(dims[0], tuple) else dims


# --- shapes -------------------------------------------------------------------------------------


def size(x: Any, *dims: Any) -> Any:
    shape = tuple(int(n) for n in whole(x).shape) if hasattr(x, "shape") else (len(x),)
    if is_number(x) and not is_array(x):
        shape = ()
    if any(int(d) < 1 for d in dims):
        raise OpaqueCodeError("size: a dimension from 1 on is expected")
    found = tuple(shape[int(d) - 1] if int(d) <= len(shape) else 1 for d in dims)
    return shape if not dims else found[0] if len(found) == 1 else found


def length(x: Any) -> int:
    return 1 if is_number(x) and not is_array(x) else math.prod(size(x))


def reshape(x: Any, *dims: Any) -> Any:
    x, wanted = array(x), shape_of(dims)
    shape = tuple(-1 if n is COLON else int(n) for n in wanted)
    if any(n < 0 and given is not COLON for n, given in zip(shape, wanted, strict=True)):
        raise OpaqueCodeError(f"reshape: a size below 0 in {shape}")
    try:
        return x.reshape(shape, order="F")
    except ValueError:
        raise OpaqueCodeError(f"reshape: {tuple(x.shape)} does not fit {shape}") from None


def cat(*xs: Any, dims: Any) -> Any:
    """Return the arrays one after another along an axis; several axes are refused."""
    axis = axes(dims.value if isinstance(dims, Value) else dims)
    if not isinstance(axis, int):
        raise OpaqueCodeError("cat: one number for dims is expected")
    if any(isinstance(x, (tuple, list)) for x in xs):
        raise OpaqueCodeError("cat: arrays and numbers are expected")
    parts = [joined((x,)) if is_number(x) and not is_array(x) else array(x) for x in xs]
    there = next((x for x in parts if devices.array_device(x) != "cpu"), parts[0])
    parts = [
        x if is_array(given) else _beside(x, there) for x, given in zip(parts, xs, strict=True)
    ]
    ndim = max(axis + 1, *(x.ndim for x in parts))
    bounded((sum(math.prod(x.shape) for x in parts), ndim))
    shaped = [x.reshape(x.shape + (1,) * (ndim - x.ndim)) for x in promoted(*parts)]
    return np.concatenate(shaped, axis=axis)


def vcat(*xs: Any) -> Any:
    return cat(*xs, dims=1) if xs else np.zeros(0)


def hcat(*xs: Any) -> Any:
    return cat(*xs, dims=2) if xs else np.zeros(0)


def hvcat(rows: Any, *xs: Any) -> Any:
    """Return [a b; c d]: `rows` are the numbers of blocks in each row."""
    counts, found, start = rows if isinstance(rows, tuple) else (), [], 0
    for count in counts:
        found.append(hcat(*xs[start : start + count]))
        start += count
    return vcat(*found)


def permutedims(x: Any, order: Any = None) -> Any:
    x = array(x)
    if order is None:
        return x.reshape(1, -1) if x.ndim == 1 else x.transpose()
    return x.transpose([int(d) - 1 for d in order])


def dropdims(x: Any, *, dims: Any) -> Any:
    return np.squeeze(array(x), axis=axes(dims))


def transpose(x: Any) -> Any:
    x = whole(x) if isinstance(x, Row) else array(x) if not is_number(x) or is_array(x) else x
    if not is_array(x):
        return x
    if x.ndim > 2:
        raise OpaqueCodeError(f"no transpose of an array of shape {tuple(x.shape)}")
    return Row(x.reshape(1, -1)) if x.ndim == 1 else x.transpose()


def adjoint(x: Any) -> Any:
    if isinstance(x, Row):
        return np.conj(x.array).reshape(-1)
    found = transpose(x)
    return Row(np.conj(found.array)) if isinstance(found, Row) else np.conj(found)


def repeat(x: Any, *counts: Any, inner: Any = (), outer: Any = ()) -> Any:
    x = array(x)
    outer = tuple(counts or (outer if isinstance(outer, tuple) else (outer,)))
    inner = inner if isinstance(inner, tuple) else (inner,)
    ndim = max(x.ndim, len(inner), len(outer))
    inner, outer = (part + (1,) * (ndim - len(part)) for part in (inner, outer))
    shape = x.shape + (1,) * (ndim - x.ndim)
    bounded(tuple(n * int(i) * int(o) for n, i, o in zip(shape, inner, outer, strict=True)))
    x = x.reshape(shape)
    for axis, count in enumerate(inner):
        x = np.repeat(x, int(count), axis=axis) if count != 1 else x
    return np.tile(x, tuple(map(int, outer)))


def reverse(x: Any, *, dims: Any = None) -> Any:
    return x[::-1] if isinstance(x, (tuple, range)) else np.flip(array(x), axis=axes(dims))


def fill(value: Any, *dims: Any) -> Any:
    if not is_number(value) or is_array(value):
        raise OpaqueCodeError("fill: a number is expected")
    return np.full(bounded(shape_of(dims)), number(value))


# --- indices ------------------------------------------------------------------------------------


def getindex(x: Any, *index: Any) -> Any:
    """Return x[index...]: a number for whole numbers, else an array, as Julia's own shapes."""
    if isinstance(x, (tuple, list, range)):
        return _of_sequence(x, index[0]) if index else x[0]
    if isinstance(x, dict):
        return x[index[0]] if isinstance(index[0], str) else list(x.values())[index[0] - 1]
    x = array(x)
    index = tuple(i if i is COLON or is_number(i) or isinstance(i, range) else array(i)
                  for i in index)  # fmt: skip
    if len(index) == 1:
        return _linear(x, index[0])
    if not index or len(index) < x.ndim:
        raise OpaqueCodeError(f"{len(index)} indices into an array of {x.ndim} dimensions")
    x = x.reshape(x.shape + (1,) * (len(index) - x.ndim))
    axis = 0
    for i in index:
        if i is not COLON:
            x = _taken(x, i, axis)
        axis += 1 if i is COLON or isinstance(i, range) else getattr(i, "ndim", 0)
    return settled(x) if not is_array(x) else x


def _linear(x: Any, index: Any) -> Any:
    """Return x[i]: one index counts all elements, first axis first."""
    if is_array(index) and index.dtype == bool:
        if index.shape not in (x.shape, (math.prod(x.shape),)):
            raise OpaqueCodeError(f"a mask of shape {index.shape} for an array of {x.shape}")
        return x.reshape(-1, order="F")[index.reshape(-1, order="F")]
    if is_number(index) and not is_array(index):
        place = np.unravel_index(_place(index, math.prod(x.shape)), x.shape, order="F")
        return settled(x[place])
    limits.take_elements(math.prod(x.shape) * (x.ndim > 1))
    flat = x if x.ndim == 1 else x.reshape(-1, order="F")
    if index is COLON:
        return flat
    found = _taken(flat, index.reshape(-1, order="F") if is_array(index) else index, 0)
    return found.reshape(index.shape, order="F") if is_array(index) else found


def _taken(x: Any, index: Any, axis: int) -> Any:
    """Return the elements at a number, a range, an array of indices or a mask, along an axis."""
    count = x.shape[axis]
    is_one = is_number(index) and not is_array(index)
    if is_one or isinstance(index, range):
        chosen = _place(index, count) if is_one else _slice(index, count)
        where = (*(slice(None),) * axis, chosen)
        return x[where]
    if index.dtype == bool and index.shape != (count,):
        raise OpaqueCodeError(f"a mask of shape {index.shape} for an axis of {count}")
    places = np.flatnonzero(index) if index.dtype == bool else as_dtype(index, np.int64) - 1
    if index.dtype.kind not in "biu":
        raise OpaqueCodeError("an index is expected to be whole numbers")
    if places.size and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise OpaqueCodeError(f"an index is out of 1 to {count}")
    places = _beside(places, x)
    bounded((*x.shape[:axis], places.size, *x.shape[axis + 1 :]))
    return x.take(places, axis=axis)


def _beside(places: Any, x: Any) -> Any:
    """Return indices on the device of the array they are for."""
    device = devices.array_device(x)
    return places if devices.array_device(places) == device else devices.to_device(places, device)


def _slice(index: range, count: int) -> slice:
    """Return a range of indices from 1 as a slice of `count` elements."""
    if not index:
        return slice(0)
    if not (1 <= index[0] <= count and 1 <= index[-1] <= count):
        raise OpaqueCodeError(f"the indices {index} are out of 1 to {count}")
    stop = index[-1] - 1 + (1 if index.step > 0 else -1)
    return slice(index[0] - 1, stop if stop >= 0 else None, index.step)


def _place(i: Any, n: int) -> int:
    if (
        isinstance(i, (bool, np.bool_))
        or getattr(getattr(i, "dtype", None), "kind", "i") not in "iu"
    ):
        raise OpaqueCodeError(f"an index is expected to be a whole number, found {i!r}")
    if isinstance(i, float) or not 1 <= int(i) <= n:
        raise OpaqueCodeError(f"the index {i} is out of 1 to {n}")
    return int(i) - 1


def _of_sequence(x: Any, index: Any) -> Any:
    if index is COLON:
        return x
    if is_number(index) and not is_array(index):
        return x[_place(index, len(x))]
    if isinstance(index, range):
        return x[_slice(index, len(x))]
    places = collected(index)
    limits.take_steps(len(places))
    if getattr(places, "dtype", None) == np.bool_:
        places = np.flatnonzero(places) + 1
    made = [x[_place(i, len(x))] for i in places]
    return collected(made) if isinstance(x, range) else type(x)(made)


def lastindex(x: Any, *dim: Any) -> int:
    return int(size(x, *dim)) if dim else length(x)


def iterate(x: Any, state: Any = 0) -> Any:
    """Return (value, next state) or None at the end, as Julia's iteration protocol."""
    if not isinstance(state, int) or state < 0:
        raise OpaqueCodeError("iterate: an unknown state")
    if isinstance(x, dict):
        limits.take_steps(len(x))
        x = list(x.values())
    if is_number(x) and not is_array(x):
        x = (x,)
    if hasattr(x, "shape"):
        x = whole(x)
        return (getindex(x, state + 1), state + 1) if state < math.prod(x.shape) else None
    return (x[state], state + 1) if state < len(x) else None


def items(x: Any) -> Any:
    """Return what a loop over `x` takes in turn, as a sequence."""
    if isinstance(x, dict):
        return list(x.values())
    if hasattr(x, "shape"):
        x = getindex(x, COLON) if is_array(whole(x)) else (x,)
    limits.take_steps(len(x))
    return [settled(item) for item in x] if hasattr(x, "shape") else x
