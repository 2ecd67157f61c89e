"""Flux's pooling layers, and those that change width and height: Upsample, PixelShuffle.

Arrays are Julia's: (width..., channels, batch), any number of spatial axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.convolution import SamePad, both_sides, expand
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.layers import plain, printed
from gpustore.notebook import Shown

_ALL = (slice(None),)


def _check(layer: Any, x: Any, ndim: int | None = None) -> Any:
    x = plain(x)
    if x.ndim < 3 or (ndim is not None and x.ndim != ndim):
        wanted = f"{ndim} dimensions" if ndim else "3 dimensions or more"
        raise MismatchError(
            f"{layer!r}: expected input (width..., channels, batch) of {wanted}, found "
            f"{tuple(x.shape)}"
        )
    return x


def _pooled(
    layer: Any, x: Any, k: Any, pad: Any, stride: Any, combine: Callable[..., Any], fill: float
) -> Any:
    """Return the windows of `x` combined: Julia's axes, padded with `fill`."""
    n = len(k)
    sides = both_sides((pad,) * n if isinstance(pad, int) else pad, n)
    space = x.shape[:n]
    sizes = [
        (w + low + high - size) // s + 1
        for w, (low, high), size, s in zip(space, sides, k, stride, strict=True)
    ]
    if min(sizes) < 1:
        raise MismatchError(f"{layer!r}: expected an input larger than its windows, found {space}")
    reversed_x = x.transpose()
    if any(map(any, sides)):
        shape = [w + low + high for w, (low, high) in zip(space, sides, strict=True)]
        padded = np.full_like(x, fill, shape=(*reversed_x.shape[:2], *shape[::-1]))
        inner = [slice(low, low + w) for w, (low, _) in zip(space, sides, strict=True)]
        padded[_ALL * 2 + tuple(inner[::-1])] = reversed_x
        reversed_x = padded
    found = None
    for place in np.ndindex(*k[::-1]):
        slices = (
            slice(p, p + (size - 1) * s + 1, s)
            for p, size, s in zip(place, sizes[::-1], stride[::-1], strict=True)
        )
        window = reversed_x[_ALL * 2 + tuple(slices)]
        found = window.copy() if found is None else combine(found, window, out=found)
    assert found is not None
    return found.transpose()


def _lowest(x: Any) -> Any:
    return -np.inf if x.dtype.kind not in "iu" else np.iinfo(x.dtype).min


def _max(layer: Any, x: Any, k: Any, pad: Any, stride: Any) -> Any:
    return _pooled(layer, x, k, pad, stride, np.maximum, _lowest(x))


def _mean(layer: Any, x: Any, k: Any, pad: Any, stride: Any) -> Any:
    """Return the means; zeros of the padding count, as in NNlib."""
    x = x if x.dtype.kind not in "iub" else x.astype(np.float32)
    total = _pooled(layer, x, k, pad, stride, np.add, 0)
    return total * x.dtype.type(1 / math.prod(k))


class _Pool(Shown):
    k: Any
    pad: Any
    stride: Any

    def __init__(self, k: Any, *, pad: Any = 0, stride: Any = None) -> None:
        name = type(self).__name__
        self.k = tuple(int(n) for n in k)
        n = len(self.k)
        self.stride = self.k if stride is None else expand(stride, n, f"{name}: stride")
        if isinstance(pad, SamePad):
            self.pad = pad(self.k, (1,) * n)
        else:
            is_full = isinstance(pad, (tuple, list)) and len(pad) == 2 * n
            given = expand(pad, 2 * n if is_full else n, f"{name}: pad")
            self.pad = given if is_full else tuple(p for p in given for _ in range(2))

    @printed
    def __repr__(self) -> str:
        words = [str(self.k)]
        words += [f"pad={_short(self.pad)}"] if any(self.pad) else []
        words += [f"stride={_short(self.stride)}"] if self.stride != self.k else []
        return f"{type(self).__name__}({', '.join(words)})"


def _short(values: tuple[int, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else values


@dataclass(init=False, repr=False, eq=False)
class MaxPool(_Pool):
    """The largest of each window of size `k`.

    x (width..., channels, batch); the stride is the size of the window where it is not given.

    >>> MaxPool((2, 2))(np.ones((8, 8, 3, 1))).shape
    (4, 4, 3, 1)
    """

    k: Any
    pad: Any
    stride: Any

    def __call__(self, x: Any) -> Any:
        return _max(self, _check(self, x, len(self.k) + 2), self.k, self.pad, self.stride)


@dataclass(init=False, repr=False, eq=False)
class MeanPool(_Pool):
    """The mean of each window of size `k`; zeros of the padding count.

    >>> MeanPool((2, 2), stride=1)
    MeanPool((2, 2), stride=1)
    """

    k: Any
    pad: Any
    stride: Any

    def __call__(self, x: Any) -> Any:
        return _mean(self, _check(self, x, len(self.k) + 2), self.k, self.pad, self.stride)


class _AdaptivePool(Shown):
    out: Any

    def __init__(self, out: Any) -> None:
        self.out = tuple(int(n) for n in out)

    def _windows(self, x: Any) -> tuple[Any, Any]:
        """Return the size and stride of the windows that give `out`, as Flux chooses them."""
        space = x.shape[:-2]
        if any(w < n for w, n in zip(space, self.out, strict=True)):
            raise MismatchError(
                f"{self!r}: expected an input of at least {self.out}, found {space}"
            )
        stride = tuple(w // n for w, n in zip(space, self.out, strict=True))
        sizes = zip(space, self.out, stride, strict=True)
        return tuple(w - (n - 1) * s for w, n, s in sizes), stride

    @printed
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.out})"


@dataclass(init=False, repr=False, eq=False)
class AdaptiveMaxPool(_AdaptivePool):
    """MaxPool with windows that give an output of width and height `out`.

    >>> AdaptiveMaxPool((4, 4))
    AdaptiveMaxPool((4, 4))
    """

    out: Any

    def __call__(self, x: Any) -> Any:
        x = _check(self, x, len(self.out) + 2)
        k, stride = self._windows(x)
        return _max(self, x, k, 0, stride)


@dataclass(init=False, repr=False, eq=False)
class AdaptiveMeanPool(_AdaptivePool):
    """MeanPool with windows that give an output of width and height `out`.

    >>> AdaptiveMeanPool((4, 4))
    AdaptiveMeanPool((4, 4))
    """

    out: Any

    def __call__(self, x: Any) -> Any:
        x = _check(self, x, len(self.out) + 2)
        k, stride = self._windows(x)
        return _mean(self, x, k, 0, stride)


@dataclass(eq=False)
class GlobalMaxPool(Shown):
    """The largest element of each channel: (1..., channels, batch).

    >>> GlobalMaxPool()(np.ones((8, 8, 3, 2))).shape
    (1, 1, 3, 2)
    """

    def __call__(self, x: Any) -> Any:
        x = _check(self, x)
        return x.max(axis=tuple(range(x.ndim - 2)), keepdims=True)


@dataclass(eq=False)
class GlobalMeanPool(Shown):
    """The mean of each channel: (1..., channels, batch).

    >>> GlobalMeanPool()(np.ones((8, 8, 3, 2))).shape
    (1, 1, 3, 2)
    """

    def __call__(self, x: Any) -> Any:
        x = _check(self, x)
        return x.mean(axis=tuple(range(x.ndim - 2)), keepdims=True)


@dataclass(init=False, repr=False, eq=False)
class Upsample(Shown):
    """Enlarges width and height by `scale`, or to `size`; "nearest", "bilinear", "trilinear".

    Linear modes keep the corners where they are (align_corners), as NNlib's default.

    >>> Upsample("bilinear", scale=2)
    Upsample("bilinear", scale=2)
    """

    scale: Any
    size: Any
    mode: Any = field(default="nearest", metadata={"leaf": True})  # a parameter of the type

    def __init__(self, mode: str = "nearest", *, scale: Any = None, size: Any = None) -> None:
        if mode not in ("nearest", "linear", "bilinear", "trilinear"):
            raise UnsupportedValueError(
                f"Upsample: expected 'nearest', 'bilinear' or 'trilinear', found {mode!r}"
            )
        if (scale is None) == (size is None):
            raise UnsupportedValueError("Upsample: expected a scale or a size, and not both")
        self.mode, self.scale, self.size = mode, scale, size

    def __call__(self, x: Any) -> Any:
        x = _check(self, x)
        n = x.ndim - 2
        if self.size is None:
            scale = self.scale if isinstance(self.scale, tuple) else (self.scale,) * n
            size = tuple(int(w * s) for w, s in zip(x.shape, scale, strict=False))
        else:
            size = self.size if isinstance(self.size, tuple) else (self.size,) * n
        if len(size) != n:
            raise MismatchError(f"{self!r}: expected {len(size) + 2} dimensions, found {x.shape}")
        enlarge = _nearest if self.mode == "nearest" else _linear
        for axis, target in enumerate(size):
            x = enlarge(self, x, axis, int(target))
        return x

    @printed
    def __repr__(self) -> str:
        what = f"scale={self.scale}" if self.size is None else f"size={self.size}"
        return f'Upsample("{self.mode}", {what})'


def _nearest(layer: Any, x: Any, axis: int, size: int) -> Any:
    if size % x.shape[axis]:
        raise MismatchError(f"{layer!r}: expected a multiple of {x.shape[axis]}, found {size}")
    return np.repeat(x, size // x.shape[axis], axis=axis)


def _linear(layer: Any, x: Any, axis: int, size: int) -> Any:
    """Return `x` with `size` elements along an axis, each between its two neighbours."""
    width = x.shape[axis]
    first = x.swapaxes(0, axis)
    made = np.empty_like(x, shape=(size, *first.shape[1:]))
    for place in range(size):
        position = place * (width - 1) / (size - 1) if size > 1 else 0.0
        low = min(int(position), width - 1)
        high, share = min(low + 1, width - 1), x.dtype.type(position - low)
        made[place] = (1 - share) * first[low] + share * first[high]
    return made.swapaxes(0, axis)


@dataclass(eq=False)
class PixelShuffle(Shown):
    """Turns channels into width and height: (w..., c r^n, batch) into (w r..., c, batch).

    >>> PixelShuffle(2)(np.ones((4, 4, 12, 1))).shape
    (8, 8, 3, 1)
    """

    r: Any

    def __call__(self, x: Any) -> Any:
        x, r = _check(self, x), int(self.r)
        n = x.ndim - 2
        *space, channels, batch = x.shape
        if channels % r**n:
            raise MismatchError(
                f"{self!r}: expected a multiple of {r**n} channels, found {channels}"
            )
        split = x.reshape((*space, *(r,) * n, channels // r**n, batch), order="F")
        order = [axis for i in range(n) for axis in (n + i, i)]
        turned = split.transpose(*order, 2 * n, 2 * n + 1)
        return turned.reshape((*(w * r for w in space), channels // r**n, batch), order="F")
