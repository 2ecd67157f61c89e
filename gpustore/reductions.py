"""Julia's products, comparisons and reductions of whole arrays, for code that a file holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import activations, arithmetic, functions, limits
from gpustore.arithmetic import as_dtype, is_array, is_number, promoted, settled
from gpustore.broadcasting import Function, Row, bounded, broadcast, whole
from gpustore.errors import OpaqueCodeError
from gpustore.semantics import COLON, Value, array, axes, getindex, items


def same(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return x + y and the like for whole values: arrays must have one shape."""

    def apply(*xs: Any) -> Any:
        xs = tuple(array(x) if isinstance(x, range) else whole(x) for x in xs)
        shapes = {tuple(x.shape) for x in xs if is_array(x)}
        if len(shapes) > 1 or (shapes and not all(map(is_array, xs))):
            raise OpaqueCodeError(
                f"{name}: expected one shape, found {sorted(shapes)}; use .{name}"
            )
        return settled(function(*xs))

    return apply


def matmul(*xs: Any) -> Any:
    product = xs[0]
    for x in xs[1:]:
        product = _product(product, x)
    return product


def _product(x: Any, y: Any) -> Any:
    is_row = isinstance(x, Row)
    x, y = (array(part) if isinstance(part, range) else whole(part) for part in (x, y))
    if not (is_array(x) and is_array(y)):
        return settled(arithmetic.multiply(x, y))
    if is_row and y.ndim == 1:
        return dot(x.reshape(-1), y, is_conjugated=False)
    x = x.reshape(-1, 1) if x.ndim == 1 and y.ndim == 2 and y.shape[0] == 1 else x
    if x.ndim not in (1, 2) or y.ndim > 2 or x.shape[-1] != y.shape[0] or x.ndim == 1:
        raise OpaqueCodeError(f"no product of arrays of shapes {x.shape} and {y.shape}")
    limits.take_elements(math.prod((*x.shape, *y.shape[1:])) // 16)
    bounded((*x.shape[:-1], *y.shape[1:]))
    x, y = promoted(x, y)
    return Row(x @ y) if is_row else x @ y


def dot(x: Any, y: Any, is_conjugated: bool = True) -> Any:
    x, y = promoted(getindex(x, COLON), getindex(y, COLON))
    if x.shape != y.shape:
        raise OpaqueCodeError(f"dot: expected one length, found {x.shape} and {y.shape}")
    x = np.conj(x) if is_conjugated and x.dtype.kind == "c" else x
    return settled((x @ y)[()])


def norm(x: Any, p: Any = 2) -> Any:
    x = np.abs(arithmetic.floating(getindex(x, COLON)))
    if p == 2:
        return np.sqrt((x * x).sum())
    if p == 1:
        return x.sum()
    return x.max() if p == math.inf else (x**p).sum() ** (1 / p)


def divide(x: Any, y: Any) -> Any:
    if is_array(y):
        raise OpaqueCodeError("/: a division by an array; use ./ for its elements")
    return arithmetic.divide(whole(x), y)


def power(x: Any, n: Any) -> Any:
    if isinstance(n, Value):
        n = n.value
    x = whole(x)
    if is_array(x):
        if type(n) is not int or not 1 <= n <= 64 or x.ndim != 2 or x.shape[0] != x.shape[1]:
            raise OpaqueCodeError("^: of arrays only square ones have powers, from 1 to 64")
        limits.take_elements(x.shape[0] ** 3)
        return np.linalg.matrix_power(x, n)
    return settled(arithmetic.power(x, n))


def literal_pow(function: Any, x: Any, n: Any) -> Any:
    if is_number(x) and not is_array(x):
        return settled(arithmetic.literal_power(x, n.value))
    return power(x, n)


def equal(x: Any, y: Any) -> bool:
    """Return x == y of whole values: one truth, for arrays and tuples too."""
    limits.take_steps()
    x, y = (array(v) if isinstance(v, range) else whole(v) for v in (x, y))
    if is_number(x) and is_number(y):
        if not is_array(x) and not is_array(y):
            return bool(np.equal(*promoted(x, y)))
        return np.shape(x) == np.shape(y) and bool(np.equal(*promoted(x, y)).all())
    if isinstance(x, (tuple, list)) and isinstance(y, type(x)):
        return len(x) == len(y) and all(map(equal, x, y))
    if isinstance(x, str) and isinstance(y, str):
        return type(x) is type(y) and str(x) == str(y)
    return x is y


def identical(x: Any, y: Any) -> bool:
    """Return x === y."""
    if type(x) is not type(y) or is_array(x) or not (is_number(x) or isinstance(x, (str, tuple))):
        return x is y
    return x is y or equal(x, y)


def is_close(x: Any, y: Any, *, rtol: Any = None, atol: Any = 0) -> bool:
    """Return x ≈ y as Julia: by the norm of the difference."""
    x, y = promoted(arithmetic.floating(whole(x)), arithmetic.floating(whole(y)))
    if np.shape(x) != np.shape(y):
        raise OpaqueCodeError(f"≈: expected one shape, found {np.shape(x)} and {np.shape(y)}")
    rtol = np.sqrt(np.finfo(x.dtype).eps) if rtol is None else rtol
    sizes = [norm(np.reshape(part, -1)) for part in (x - y, x, y)]
    return bool(sizes[0] <= max(atol, rtol * max(sizes[1:])))


def is_in(x: Any, among: Any) -> bool:
    if is_array(whole(among)):
        return bool((getindex(among, COLON) == x).any())
    return x in among if isinstance(among, range) else any(equal(x, item) for item in items(among))


def reduction(function: Callable[..., Any], dtype: Any = None) -> Callable[..., Any]:
    """Return sum(x), sum(f, x), sum(x; dims = 1) and the like."""

    def apply(*args: Any, dims: Any = None, corrected: Any = None) -> Any:
        x = array(args[-1])
        if len(args) == 2:
            x = array(broadcast(args[0], x))
        elif len(args) != 1:
            raise OpaqueCodeError("a reduction of one array, or of a function and one")
        if dtype is not None:
            x = as_dtype(x, dtype)
        options = {} if corrected is None else {"ddof": int(corrected)}
        axis = axes(dims)
        if axis is not None:
            axis = tuple(a for a in (axis if isinstance(axis, tuple) else (axis,)) if a < x.ndim)
        count = math.prod(x.shape if axis is None else [x.shape[a] for a in axis])
        with warnings.catch_warnings():
            if count <= int(corrected or 0):  # NaN, of which NumPy warns and Julia does not
                warnings.simplefilter("ignore", RuntimeWarning)
            found = function(x, axis=axis, keepdims=axis is not None, **options)
        return settled(found)

    return apply


def spread(function: Callable[..., Any]) -> Callable[..., Any]:
    apply = reduction(function)
    return lambda x, dims=None, corrected=True: apply(x, dims=dims, corrected=corrected)


def softmax(x: Any, *, dims: Any = 1) -> Any:
    return activations.softmax(array(x), axis=axes(dims))


def logsoftmax(x: Any, *, dims: Any = 1) -> Any:
    return activations.logsoftmax(array(x), axis=axes(dims))


def normalise(x: Any, *, dims: Any = None, eps: Any = 1e-5, ϵ: Any = None) -> Any:
    axis = array(x).ndim - 1 if dims is None else axes(dims)
    return functions.normalise(array(x), axis=axis, eps=float(eps if ϵ is None else ϵ))


def only_numbers(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of numbers that refuses arrays, whose f(x) is not f.(x) in Julia."""

    def apply(*xs: Any, **options: Any) -> Any:
        if any(is_array(whole(x)) for x in xs):
            raise OpaqueCodeError(f"{name}: of an array; use {name}.( ) for its elements")
        return settled(function(*xs, **options))

    return apply


def elementwise(name: str, function: Callable[..., Any]) -> Function:
    return Function(name, only_numbers(name, function), function)


# --- losses of Flux (Flux.Losses) ---------------------------------------------------------------


def loss(terms: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss of Flux: the mean, or what `agg` gives, of `terms(ŷ, y, dims, ϵ)`."""

    def apply(
        guess: Any, y: Any, *, dims: Any = 1, agg: Any = None, eps: Any = None, ϵ: Any = None
    ) -> Any:
        guess, y = promoted(arithmetic.floating(array(guess)), array(y))
        if guess.shape != y.shape:
            raise OpaqueCodeError(f"a loss of arrays of shapes {guess.shape} and {y.shape}")
        given = eps if ϵ is None else ϵ
        tiny = np.finfo(guess.dtype).eps if given is None else as_dtype(given, guess.dtype)
        found = terms(guess, y, axes(dims), tiny)
        return settled(found.mean() if agg is None else agg(found))

    return apply


def _times_log(x: Any, y: Any) -> Any:
    """Return x * log(y), which is 0 where x is."""
    return np.where(x == 0, np.zeros_like(x), x * np.log(y))


LOSSES: dict[str, Callable[..., Any]] = {
    "mse": loss(lambda x, y, axis, eps: (x - y) ** 2),
    "mae": loss(lambda x, y, axis, eps: np.abs(x - y)),
    "crossentropy": loss(
        lambda x, y, axis, eps: -_times_log(y, x + eps).sum(axis=axis, keepdims=True)
    ),
    "logitcrossentropy": loss(
        lambda x, y, axis, eps: (
            -(y * activations.logsoftmax(x, axis=axis)).sum(axis=axis, keepdims=True)
        )
    ),
    "binarycrossentropy": loss(
        lambda x, y, axis, eps: -_times_log(y, x + eps) - _times_log(1 - y, 1 - x + eps)
    ),
    "logitbinarycrossentropy": loss(
        lambda x, y, axis, eps: (1 - y) * x - activations.logsigmoid(x)
    ),
}
