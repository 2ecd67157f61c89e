"""What code from a file may take of NNlib and Flux: convolutions, pools, sequences, one-hot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import convolution, limits, model_state, pooling
from gpustore.arithmetic import is_array, is_number, promoted, settled
from gpustore.broadcasting import Function, bounded
from gpustore.errors import OpaqueCodeError
from gpustore.semantics import array, cat, getindex, items, permutedims, reshape

_LAYER_STEPS = 100  # that the reset of a model counts for


def conv(
    x: Any, w: Any, *, stride: Any = 1, pad: Any = 0, dilation: Any = 1, flipped: Any = False,
    groups: Any = 1,
) -> Any:  # fmt: skip
    """Return NNlib's conv(x, w): x (width..., in, batch), w (width..., in / groups, out)."""
    x, w = promoted(array(x), array(w))
    space = _padded_space(x, pad)
    limits.take_elements(math.prod((*space, x.shape[-1], *w.shape)) // 16)
    if flipped:
        w = w[(slice(None, None, -1),) * (w.ndim - 2)]
    layer = convolution.Conv(
        w, False, stride=stride, pad=pad, dilation=dilation, groups=int(groups)
    )
    return layer(x)


def _padded_space(x: Any, pad: Any) -> tuple[int, ...]:
    """Return the sizes of the padded axes, which are bounded."""
    n = x.ndim - 2
    sides = convolution.both_sides(pad if isinstance(pad, tuple) else (pad,) * n, n)
    space = tuple(size + sum(side) for size, side in zip(x.shape, sides, strict=False))
    bounded((*space, *x.shape[n:]))
    return space


def pool(cls: Any) -> Callable[..., Any]:
    """Return maxpool(x, k; pad, stride) or meanpool."""

    def apply(x: Any, k: Any, *, pad: Any = 0, stride: Any = None) -> Any:
        x = array(x)
        _padded_space(x, pad)
        return cls(k if isinstance(k, tuple) else (k,) * (x.ndim - 2), pad=pad, stride=stride)(x)

    return apply


def _pool_layer(cls: Any) -> Callable[..., Any]:
    """Return MaxPool(k; pad, stride), which gives the layer."""
    apply = pool(cls)
    return lambda k, **options: Function(cls.__name__, lambda x: apply(x, k, **options))


def _plain_layer(cls: Any) -> Callable[..., Any]:
    """Return a layer's constructor, such as GlobalMeanPool()."""

    def make(*sizes: Any) -> Function:
        def apply(x: Any) -> Any:
            x = array(x)
            bounded((*(n for size in sizes for n in size), *x.shape[-2:]))
            return cls(*sizes)(x)

        return Function(cls.__name__, apply)

    return make


def _upsample(mode: str) -> Callable[..., Any]:
    def apply(x: Any, scale: Any = None, *, size: Any = None) -> Any:
        x = array(x)
        n = x.ndim - 2
        given = scale if size is None else size
        given = given if isinstance(given, tuple) else (given,) * n
        sizes = (
            given
            if size is not None
            else tuple(math.ceil(w * s) for w, s in zip(x.shape, given, strict=False))
        )
        bounded((*sizes, *x.shape[n:]))
        what = {"scale": given} if size is None else {"size": given}
        return pooling.Upsample(mode, **what)(x)

    return apply


def batched_mul(x: Any, y: Any) -> Any:
    x, y = promoted(array(x), array(y))
    limits.take_elements(math.prod(x.shape) * y.shape[1] // 16)
    bounded((x.shape[0], *y.shape[1:]))
    return np.einsum("ijb,jkb->ikb", x, y)


def _stack(xs: Any, d: Any = None, *, dims: Any = None) -> Any:
    """Return Flux.stack(xs, d), or stack(xs; dims): a new axis there."""
    axis = int(d if dims is None else dims)
    parts = [array(x) for x in items(xs)]
    shape = (*parts[0].shape[: axis - 1], 1, *parts[0].shape[axis - 1 :])
    return cat(*(reshape(x, shape) for x in parts), dims=axis)


def _batch(xs: Any) -> Any:
    """Return Flux.batch(xs): arrays side by side along a new last axis."""
    parts = items(xs)
    if all(is_number(x) and not is_array(x) for x in parts):
        return array(xs)
    return _stack(parts, array(parts[0]).ndim + 1)


def _unstack(x: Any, d: Any = None, *, dims: Any = None) -> list[Any]:
    x, axis = array(x), int(d if dims is None else dims) - 1
    limits.take_steps(x.shape[axis])
    return [x[(slice(None),) * axis + (i,)] for i in range(x.shape[axis])]


def _onehot_batch(labels: Any, classes: Any) -> Any:
    """Return onehotbatch(labels, classes) as an array of Bool: (classes, labels...)."""
    labels, classes = array(labels), list(items(classes))
    bounded((len(classes), *labels.shape))
    found = np.stack([labels == settled(name) for name in classes])
    if not found.any(axis=0).all():
        raise OpaqueCodeError("onehotbatch: a label is none of the classes")
    return found


def _onecold(y: Any, labels: Any = None) -> Any:
    """Return onecold(y): the place of the largest of each column, or its label."""
    place = np.argmax(array(y), axis=0) + 1
    place = settled(place) if not is_array(place) else place
    return place if labels is None else getindex(labels, place)


def _reset(model: Any) -> None:
    limits.take_steps(_LAYER_STEPS)
    model_state.reset(model)


NETWORKS: dict[str, Callable[..., Any]] = {
    "conv": conv, "maxpool": pool(pooling.MaxPool), "meanpool": pool(pooling.MeanPool),
    "MaxPool": _pool_layer(pooling.MaxPool), "MeanPool": _pool_layer(pooling.MeanPool),
    "GlobalMaxPool": _plain_layer(pooling.GlobalMaxPool),
    "GlobalMeanPool": _plain_layer(pooling.GlobalMeanPool),
    "AdaptiveMaxPool": _plain_layer(pooling.AdaptiveMaxPool),
    "AdaptiveMeanPool": _plain_layer(pooling.AdaptiveMeanPool),
    "upsample_nearest": _upsample("nearest"), "upsample_bilinear": _upsample("bilinear"),
    "batched_mul": batched_mul, "⊠": batched_mul,
    "batched_transpose": lambda x: permutedims(x, (2, 1, 3)),
    "batched_adjoint": lambda x: np.conj(permutedims(x, (2, 1, 3))),
    "stack": _stack, "batch": _batch, "unstack": _unstack, "onehotbatch": _onehot_batch,
    "onecold": _onecold, "reset!": _reset,
}  # fmt: skip
