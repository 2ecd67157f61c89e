"""Julia's functions of several arrays that models hold as connections and reductions.

Arrays are Julia's: the first axis is the rows. All are plain functions of NumPy or CuPy arrays.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpustore.layers import plain


def add(*xs: Any) -> Any:
    """Return x + y + ..."""
    return functools.reduce(lambda x, y: x + y, xs)


def subtract(x: Any, *ys: Any) -> Any:
    """Return x - y, or -x."""
    return x - ys[0] if ys else -x


def multiply(*xs: Any) -> Any:
    """Return x * y * ...: the product of matrices, or of numbers."""
    return functools.reduce(lambda x, y: x @ y if np.ndim(x) and np.ndim(y) else x * y, xs)


def vcat(*xs: Any) -> Any:
    """Return the arrays one below the other: along the first axis.

    >>> import gpustore as gs
    >>> gs.vcat(np.ones((1, 3)), np.ones((2, 3))).shape
    (3, 3)
    """
    return np.concatenate([x if np.ndim(x) else x.reshape(1) for x in xs], axis=0)


def hcat(*xs: Any) -> Any:
    """Return the arrays side by side: along the second axis; vectors are columns.

    >>> import gpustore as gs
    >>> gs.hcat(np.ones(3), np.ones((3, 2))).shape
    (3, 3)
    """
    return np.concatenate([x if np.ndim(x) > 1 else x.reshape(-1, 1) for x in xs], axis=1)


def maximum(x: Any, *, axis: Any = None) -> Any:
    """Return the largest element, along `axis` with the axis kept."""
    return x.max(axis=axis, keepdims=axis is not None)


def minimum(x: Any, *, axis: Any = None) -> Any:
    """Return the smallest element, along `axis` with the axis kept."""
    return x.min(axis=axis, keepdims=axis is not None)


def total(x: Any, *, axis: Any = None) -> Any:
    """Return the sum, along `axis` with the axis kept."""
    return x.sum(axis=axis, keepdims=axis is not None)


def mean(x: Any, *, axis: Any = None) -> Any:
    """Return the mean, along `axis` with the axis kept."""
    return x.mean(axis=axis, keepdims=axis is not None)


def maximum_of(*xs: Any) -> Any:
    """Return max.(x, y, ...)."""
    return functools.reduce(np.maximum, xs)


def minimum_of(*xs: Any) -> Any:
    """Return min.(x, y, ...)."""
    return functools.reduce(np.minimum, xs)


def flatten(x: Any) -> Any:
    """Return an array (features..., batch) as a matrix (features, batch), as Flux.flatten.

    >>> import gpustore as gs
    >>> gs.flatten(np.ones((4, 4, 3, 2))).shape
    (48, 2)
    """
    return plain(x).reshape((-1, x.shape[-1]), order="F")


def normalise(x: Any, *, axis: int | tuple[int, ...] = -1, eps: float = 1e-5) -> Any:
    """Return `x` with mean 0 and deviation 1 along `axis`, as Flux.normalise.

    >>> import gpustore as gs
    >>> gs.normalise(np.array([1.0, 3.0])).round(3)
    array([-1.,  1.])
    """
    centred = x - x.mean(axis=axis, keepdims=True)
    deviation = np.sqrt((centred * centred).mean(axis=axis, keepdims=True))
    return centred / (deviation + eps)
