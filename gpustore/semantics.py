"""Julia's semantics of arrays and numbers on NumPy and CuPy, for code that a file holds.

Arrays are column-major, indices count from 1, broadcasting aligns the first axes, integers wrap.
Nothing here changes its arguments, and the size of what is made is bounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore import activations, functions
from gpustore.errors import OpaqueCodeError
from gpustore.layers import plain

MAX_NBYTES = 2**30  # of one array that code makes


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the table: `call` on whole values, `each` on the elements of arrays."""

    name: str
    call: Callable[..., Any]
    each: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.call(*args, **options)


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
        bounded((max(count, 0),), 8)
        return first + np.arange(max(count, 0)) * by


COLON = _Colon()


def bounded(shape: tuple[int, ...], itemsize: int = 8) -> None:
    """Raise OpaqueCodeError where an array of this shape would be too large."""
    if math.prod(int(n) for n in shape) * itemsize > MAX_NBYTES or min(shape, default=0) < 0:
        raise OpaqueCodeError(f"code from the file wants an array of shape {shape}")


def number(value: Any) -> Any:
    """Return a literal as Julia computes with it: Float64 is not weaker than Float32."""
    return np.float64(value) if type(value) is float else value


def wrapped(value: Any) -> Any:
    """Return an integer as an Int64 wraps it."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return (value + 2**63) % 2**64 - 2**63
    return value


def is_array(x: Any) -> bool:
    return bool(getattr(x, "ndim", 0))


def axes(dims: Any) -> Any:
    """Return NumPy's axes of Julia's `dims`."""
    if dims is None or dims is COLON:
        return None
    return (
        tuple(int(d) - 1 for d in dims) if isinstance(dims, (tuple, list, range)) else int(dims) - 1
    )


# --- broadcasting -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Broadcasted:
    """A broadcast that has not been computed: f.(args...)."""

    function: Any
    args: tuple[Any, ...]


def materialize(x: Any) -> Any:
    """Compute a broadcast: arrays are aligned by their first axes."""
    if not isinstance(x, Broadcasted):
        return x
    args = [materialize(arg) for arg in x.args]
    args = [collected(a) for a in args]
    ndim = max((a.ndim for a in args if is_array(a)), default=0)
    if not ndim:
        return x.function(*args)
    args = [a.reshape(a.shape + (1,) * (ndim - a.ndim)) if is_array(a) else number(a) for a in args]
    shapes = [a.shape for a in args if is_array(a)]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError:
        raise OpaqueCodeError(f"arrays of shapes {shapes} do not broadcast") from None
    bounded(shape)
    each = getattr(x.function, "each", None)
    return each(*args) if each is not None else _one_by_one(x.function, args, shape)


def collected(x: Any) -> Any:
    """Return the array of a sequence; other values as they are."""
    if not isinstance(x, (tuple, list, range)):
        return plain(x)
    bounded((len(x),))
    return np.asarray(x)


def _one_by_one(function: Any, args: list[Any], shape: tuple[int, ...]) -> Any:
    parts = [np.broadcast_to(a, shape) if is_array(a) else a for a in args]
    found = [
        function(*(a[index] if is_array(a) else a for a in parts)) for index in np.ndindex(*shape)
    ]
    return np.array(found).reshape(shape)


def broadcasted(function: Any, *args: Any) -> Broadcasted:
    return Broadcasted(function, args)


def broadcast(function: Any, *args: Any) -> Any:
    return materialize(Broadcasted(function, args))


# --- arrays -------------------------------------------------------------------------------------


def size(x: Any, *dims: Any) -> Any:
    shape = tuple(int(n) for n in plain(x).shape) if hasattr(x, "shape") else (len(x),)
    found = tuple(shape[int(d) - 1] if 0 < int(d) <= len(shape) else 1 for d in dims)
    return shape if not dims else found[0] if len(found) == 1 else found


def length(x: Any) -> int:
    return math.prod(x.shape) if hasattr(x, "shape") else len(x)


def reshape(x: Any, *dims: Any) -> Any:
    x = plain(x)
    wanted = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple) else dims
    shape = tuple(-1 if n is COLON else int(n) for n in wanted)
    try:
        return x.reshape(shape, order="F")
    except ValueError:
        raise OpaqueCodeError(f"reshape: {tuple(x.shape)} does not fit {shape}") from None


def getindex(x: Any, *index: Any) -> Any:
    x = plain(x)
    if isinstance(x, (tuple, list, range)):
        return _of_sequence(x, index[0]) if index else x[0]
    if isinstance(x, dict):
        return x[index[0]]
    if len(index) == 1 and x.ndim > 1 and not _is_mask(index[0], x):
        x = x.reshape(-1, order="F")
    if len(index) == 1 and _is_mask(index[0], x):
        return x.reshape(-1, order="F")[index[0].reshape(-1, order="F")]
    axis = 0
    for i in index:
        if i is COLON:
            axis += 1
        elif isinstance(i, (int, np.integer)):
            if axis >= x.ndim and int(i) == 1:
                continue
            x = x.take(_place(int(i), x.shape[axis] if axis < x.ndim else 0), axis=axis)
        else:
            x = _taken(x, i, axis)
            axis += 1
    return x


def _taken(x: Any, index: Any, axis: int) -> Any:
    """Return the elements at a range, at an array of indices or under a mask, along an axis."""
    count = x.shape[axis] if axis < x.ndim else 0
    if isinstance(index, range):
        ends = [index[0], index[-1]] if index else []
        if any(not 1 <= place <= count for place in ends):
            raise OpaqueCodeError(f"the indices {index} are out of 1 to {count}")
        stop = index[-1] - 1 + index.step if index else 0
        chosen = slice(index[0] - 1, stop if stop >= 0 else None, index.step) if index else slice(0)
        return x[(slice(None),) * axis + (chosen,)]
    places = collected(index)
    places = np.flatnonzero(places) if places.dtype == bool else places - 1
    if places.size and not 0 <= int(places.min()) <= int(places.max()) < count:
        raise OpaqueCodeError(f"an index is out of 1 to {count}")
    return x.take(places, axis=axis)


def _is_mask(index: Any, x: Any) -> bool:
    return is_array(index) and index.dtype == bool and index.shape == x.shape


def _place(i: int, n: int) -> int:
    if not 1 <= i <= n:
        raise OpaqueCodeError(f"the index {i} is out of 1 to {n}")
    return i - 1


def _of_sequence(x: Any, index: Any) -> Any:
    if isinstance(index, (int, np.integer)):
        return x[_place(int(index), len(x))]
    if isinstance(index, str) and isinstance(x, tuple):
        raise OpaqueCodeError("a tuple has no names")
    if index is COLON:
        return x
    return type(x)(x[_place(int(i), len(x))] for i in index)


def lastindex(x: Any, *dim: Any) -> int:
    return int(size(x, *dim)) if dim else length(x)


def cat(*xs: Any, dims: Any) -> Any:
    axis = axes(dims)
    ndim = max(axis + 1, *(np.ndim(x) for x in xs))
    parts = [plain(x) for x in xs]
    parts = [x.reshape(x.shape + (1,) * (ndim - x.ndim)) for x in parts]
    return np.concatenate(parts, axis=axis)


def matmul(*xs: Any) -> Any:
    return functools.reduce(_product, xs)


def _product(x: Any, y: Any) -> Any:
    x, y = plain(x), plain(y)
    if not (is_array(x) and is_array(y)):
        return number(x) * number(y) if is_array(x) or is_array(y) else wrapped(x * y)
    x = x.reshape(-1, 1) if x.ndim == 1 and y.ndim == 2 and y.shape[0] == 1 else x
    if x.ndim > 2 or y.ndim > 2 or x.shape[-1] != y.shape[0]:
        raise OpaqueCodeError(f"no product of arrays of shapes {x.shape} and {y.shape}")
    bounded((*x.shape[:-1], *y.shape[1:]))
    return x @ y


def same(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return x + y and the like for whole values: arrays must have one shape."""

    def apply(*xs: Any) -> Any:
        xs = tuple(number(plain(x)) for x in xs)
        shapes = {x.shape for x in xs if is_array(x)}
        if len(shapes) > 1 or (shapes and not all(map(is_array, xs))):
            raise OpaqueCodeError(
                f"{name}: expected one shape, found {sorted(shapes)}; use .{name}"
            )
        return wrapped(functools.reduce(function, xs) if len(xs) > 1 else function(0, xs[0]))

    return apply


def power(x: Any, n: Any) -> Any:
    if type(x) is int and type(n) is int and n >= 0:
        return wrapped(pow(x, n, 2**64))
    if is_array(x):
        if type(n) is not int or not 0 <= n <= 64:
            raise OpaqueCodeError("^: a matrix to a power that is no small whole number")
        return np.linalg.matrix_power(x, n)
    return number(x) ** (n if isinstance(n, int) else number(n))


@dataclass(frozen=True, slots=True)
class Value:
    """Val{x}(): a value as a type."""

    value: Any


def literal_pow(function: Any, x: Any, n: Any) -> Any:
    return power(x, n.value)


def reduction(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*args: Any, dims: Any = None, corrected: Any = None) -> Any:
        x = args[-1]
        if len(args) == 2:  # sum(f, x)
            x = materialize(Broadcasted(args[0], (x,)))
        x = plain(x) if hasattr(x, "shape") else np.asarray([number(v) for v in x])
        options = {} if corrected is None else {"ddof": int(corrected)}
        found = function(x, axis=axes(dims), keepdims=axes(dims) is not None, **options)
        return number(found.item() if type(found) is np.int64 else found)

    return apply


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    apply = reduction(function)
    return lambda x, dims=None, corrected=True: apply(x, dims=dims, corrected=corrected)


def dropdims(x: Any, *, dims: Any) -> Any:
    return np.squeeze(plain(x), axis=axes(dims))


def permutedims(x: Any, order: Any = None) -> Any:
    x = plain(x)
    if order is None:
        return x.reshape(1, -1) if x.ndim == 1 else x.transpose()
    return x.transpose([int(d) - 1 for d in order])


def transpose(x: Any) -> Any:
    x = plain(x)
    return x.reshape(1, -1) if x.ndim == 1 else x.transpose()


def adjoint(x: Any) -> Any:
    return np.conj(transpose(x))


def fill(value: Any, *dims: Any) -> Any:
    shape = dims[0] if len(dims) == 1 and isinstance(dims[0], tuple) else dims
    bounded(tuple(int(n) for n in shape))
    return np.full(tuple(int(n) for n in shape), number(value))


def repeat(x: Any, *counts: Any) -> Any:
    x = plain(x)
    times = [int(n) for n in counts] + [1] * (x.ndim - len(counts))
    bounded((x.size, *times))
    return np.tile(x.reshape(x.shape + (1,) * (len(times) - x.ndim)), times)


def iterate(x: Any, state: Any = 0) -> Any:
    """Return (value, next state) or None at the end, as Julia's iteration protocol."""
    if hasattr(x, "shape"):
        x = plain(x).reshape(-1, order="F")
    items = list(x.values()) if isinstance(x, dict) else x
    return (items[state], state + 1) if state < len(items) else None


def identical(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and not is_array(x) and bool(x == y))


def softmax(x: Any, *, dims: Any = 1) -> Any:
    return activations.softmax(plain(x), axis=axes(dims))


def logsoftmax(x: Any, *, dims: Any = 1) -> Any:
    return activations.logsoftmax(plain(x), axis=axes(dims))


def normalise(x: Any, *, dims: Any = None, eps: Any = 1e-5, ϵ: Any = None) -> Any:
    axis = plain(x).ndim - 1 if dims is None else axes(dims)
    return functions.normalise(plain(x), axis=axis, eps=eps)


def elementwise(name: str, ufunc: Any, whole: Any = None) -> Function:
    return Function(name, whole or (lambda *xs: wrapped(ufunc(*map(number, xs)))), ufunc)


def folded(ufunc: Any) -> Callable[..., Any]:
    return lambda *xs: functools.reduce(ufunc, xs)


def convert(dtype: Any) -> Callable[..., Any]:
    def convert(x: Any) -> Any:
        return x.astype(dtype) if is_array(x) else dtype(x)

    return convert


def quotient(x: Any, y: Any) -> Any:
    """Return x / y as Julia: of integers a Float64."""
    return np.true_divide(number(x), number(y))


def whole_quotient(x: Any, y: Any) -> Any:
    return np.trunc(np.true_divide(x, y)).astype(np.int64) if is_array(x) else towards_zero(x, y)


def towards_zero(x: Any, y: Any) -> Any:
    if not y:
        raise OpaqueCodeError("a division by zero")
    return wrapped(int(abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1))
