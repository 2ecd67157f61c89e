"""Flux's normalisation and dropout layers, with the formulas of each era.

Channels are the last axis but one, a batch the last (WHCN). `active` is None (inactive outside
training, which is always here), False (testing) or True (training).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.composition import Scale
from gpustore.devices import array_device, to_device
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.functions import normalise
from gpustore.layers import activate, column, plain, printed, show
from gpustore.notebook import Shown

STATISTIC = {"trainable": False}
_EPS, _MOMENTUM = np.float32(1e-5), np.float32(0.1)


_IDENTITY = staticmethod(identity)  # as a class attribute it is no method


def _check(layer: Any, x: Any, channels: int, least: int) -> None:
    if x.ndim < least or x.shape[-2] != channels:
        raise MismatchError(
            f"{layer!r}: expected input of {least} dimensions or more with {channels} channels "
            f"as the last but one, found {tuple(x.shape)}"
        )


def _float_of(layer: Any, x: Any) -> np.dtype[Any]:
    """Return the float type of the output: that of input and scale; statistics have no say."""
    scale = plain(layer.γ)
    known = x.dtype if scale is None else np.result_type(x.dtype, scale.dtype)
    return known if known.kind not in "biu" else np.dtype(np.float32)


def _standardised(layer: Any, x: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """Return (x - μ) / sqrt(σ² + ε) by the statistics tracked, or by those of `x` along `axes`.

    `shape` is that of the statistics tracked, among the axes of `x`.
    """
    dtype = x.dtype
    μ, σ2 = plain(layer.μ), plain(layer.σ2)
    if float(plain(layer.ε)) == 1e-8 and getattr(layer, "julia_kind", None) and σ2 is not None:
        σ2 = σ2 * σ2  # Flux up to 0.6, known by its ε, stored the deviation
    if layer.active is not True and layer.track_stats and μ is not None:
        μ, σ2 = (v.astype(dtype, copy=False).reshape(shape) for v in (μ, σ2))
    else:
        μ = x.mean(axis=axes, keepdims=True)
        σ2 = ((x - μ) * (x - μ)).mean(axis=axes, keepdims=True)
        if layer.active is True and layer.track_stats and layer.μ is not None:
            _track(layer, x, μ, σ2, axes)
    return (x - μ) / np.sqrt(σ2 + dtype.type(layer.ε))


def _track(layer: Any, x: Any, μ: Any, σ2: Any, axes: tuple[int, ...]) -> None:
    """Move the statistics of the layer towards those of a batch, as Flux does in training."""
    count = x.size // max(μ.size, 1)
    batch_axis = x.ndim - 1
    if batch_axis not in axes:
        μ, σ2 = (v.mean(axis=batch_axis, keepdims=True) for v in (μ, σ2))
    step = float(layer.momentum)
    for name, found in (("μ", μ), ("σ2", σ2 * (count / max(count - 1, 1)))):
        old = plain(getattr(layer, name))
        new = (1 - step) * old + step * found.reshape(old.shape)
        setattr(layer, name, new.astype(old.dtype))


def _finished(layer: Any, y: Any) -> Any:
    """Return λ(γ * y + β), the scale and shift along the channels."""
    γ, β = plain(layer.γ), plain(layer.β)
    if γ is not None:
        axis = y.ndim - 2
        y = column(γ.astype(y.dtype), y.ndim, axis) * y + column(β.astype(y.dtype), y.ndim, axis)
    return activate(layer.λ, y)


def _init(layer: Any, channels: int, statistics: int, λ: Any, affine: bool, track: bool) -> None:
    layer.λ, layer.chs, layer.affine, layer.track_stats = λ, channels, affine, track
    layer.β = np.zeros(channels, np.float32) if affine else None
    layer.γ = np.ones(channels, np.float32) if affine else None
    layer.μ = np.zeros(statistics, np.float32) if track else None
    layer.σ2 = np.ones(statistics, np.float32) if track else None
    layer.ε, layer.momentum, layer.active = _EPS, _MOMENTUM, None


def _shown(layer: Any, *first: Any) -> str:
    words = [*map(str, first)]
    if layer.λ is not identity:
        words.append(show(layer.λ))
    if layer.γ is None:
        words.append("affine=False")
    if layer.active is not None:
        words.append(f"active={layer.active}")
    return f"{type(layer).__name__}({', '.join(words)})"


def _channels(layer: Any) -> int:
    """Return the number of channels, which older files say only by their arrays."""
    chs = getattr(layer, "chs", None)
    return int(plain(layer.γ).shape[0] if chs is None else chs)


@dataclass(init=False, repr=False, eq=False)
class BatchNorm(Shown):
    """Normalises each channel over the batch; outside training by the statistics it tracked.

    λ is the activation, β and γ shift and scale, μ and σ2 are the mean and variance tracked.

    >>> BatchNorm(3)
    BatchNorm(3)
    """

    λ: Any
    β: Any
    γ: Any
    μ: Any = field(metadata=STATISTIC)
    σ2: Any = field(metadata=STATISTIC)
    ε: Any
    momentum: Any
    affine: Any = True
    track_stats: Any = True
    active: Any = None
    chs: Any = None

    def __init__(
        self,
        chs: int,
        λ: Callable[[Any], Any] = identity,
        *,
        affine: bool = True,
        track_stats: bool = True,
    ) -> None:
        _init(self, chs, chs, λ, affine, track_stats)

    def __call__(self, x: Any) -> Any:
        """Return an array of the shape of `x`: (..., channels, batch)."""
        _check(self, x, _channels(self), 2)
        x = x.astype(_float_of(self, x), copy=False)
        axes = (*range(x.ndim - 2), x.ndim - 1)
        shape = (1,) * (x.ndim - 2) + (-1, 1)
        return _finished(self, _standardised(self, x, axes, shape))

    @printed
    def __repr__(self) -> str:
        return _shown(self, _channels(self))


@dataclass(init=False, repr=False, eq=False)
class InstanceNorm(Shown):
    """Normalises each channel of each sample over its width and height.

    >>> InstanceNorm(3)
    InstanceNorm(3, affine=False)
    """

    λ: Any
    β: Any
    γ: Any
    μ: Any = field(metadata=STATISTIC)
    σ2: Any = field(metadata=STATISTIC)
    ε: Any
    momentum: Any
    affine: Any = True
    track_stats: Any = True
    active: Any = None
    chs: Any = None

    def __init__(
        self,
        chs: int,
        λ: Callable[[Any], Any] = identity,
        *,
        affine: bool = False,
        track_stats: bool = False,
    ) -> None:
        _init(self, chs, chs, λ, affine, track_stats)

    def __call__(self, x: Any) -> Any:
        """Return an array of the shape of `x`: (..., channels, batch)."""
        _check(self, x, _channels(self), 3)
        x = x.astype(_float_of(self, x), copy=False)
        shape = (1,) * (x.ndim - 2) + (-1, 1)
        return _finished(self, _standardised(self, x, tuple(range(x.ndim - 2)), shape))

    @printed
    def __repr__(self) -> str:
        return _shown(self, _channels(self))


@dataclass(init=False, repr=False, eq=False)
class GroupNorm(Shown):
    """Normalises each sample over groups of G channels each, width and height.

    >>> GroupNorm(6, 2)
    GroupNorm(6, 2)
    """

    G: Any
    λ: Any
    β: Any
    γ: Any
    μ: Any = field(metadata=STATISTIC)
    σ2: Any = field(metadata=STATISTIC)
    ε: Any
    momentum: Any
    affine: Any = True
    track_stats: Any = True
    active: Any = None
    chs: Any = None

    def __init__(
        self, chs: int, G: int, λ: Callable[[Any], Any] = identity, *, affine: bool = True
    ) -> None:
        if chs % G:
            raise UnsupportedValueError(
                f"GroupNorm: expected a number of groups that divides {chs} channels, found {G}"
            )
        self.G = G
        _init(self, chs, G, λ, affine, False)

    def __call__(self, x: Any) -> Any:
        """Return an array of the shape of `x`: (..., channels, batch)."""
        channels, groups = _channels(self), int(self.G)
        _check(self, x, channels, 3)
        x = x.astype(_float_of(self, x), copy=False)
        split = (*x.shape[:-2], channels // groups, groups, x.shape[-1])
        shape = (1,) * (x.ndim - 1) + (-1, 1)
        y = _standardised(self, x.reshape(split, order="F"), tuple(range(x.ndim - 1)), shape)
        return _finished(self, y.reshape(x.shape, order="F"))

    @printed
    def __repr__(self) -> str:
        return _shown(self, _channels(self), self.G)


@dataclass(init=False, repr=False, eq=False)
class LayerNorm(Shown):
    """Normalises over the first axes, of the given size; `diag` then scales and shifts.

    >>> LayerNorm(4)
    LayerNorm(4)
    """

    λ: Any = field(default=_IDENTITY)
    diag: Any = None
    ε: Any = 0.0
    size: Any = None
    affine: Any = True

    def __init__(self, *size: Any, λ: Callable[[Any], Any] = identity, affine: bool = True) -> None:
        if size and callable(size[-1]):
            size, λ = size[:-1], size[-1]
        size = size[0] if len(size) == 1 and isinstance(size[0], tuple) else size
        self.λ, self.ε, self.affine = λ, _EPS, affine
        self.size = tuple(int(n) for n in size)
        self.diag = Scale(*self.size, σ=λ) if affine else λ

    def __call__(self, x: Any) -> Any:
        """Return an array of the shape of `x`: (size..., batch...).

        ε is added to the deviation, as in Flux up to 0.14; later ones add its square to the
        variance, which differs by less than ε / σ.
        """
        axes = tuple(range(1 if self.size is None else len(self.size)))
        x = x if x.dtype.kind not in "biu" else x.astype(np.float32)
        y = normalise(x, axis=axes, eps=x.dtype.type(self.ε))
        y = y if self.diag is None else activate(self.diag, y)
        is_in_scale = isinstance(self.diag, Scale) and self.diag.σ is not identity
        is_done = is_in_scale or not (self.diag is None or isinstance(self.diag, Scale))
        return y if is_done else activate(self.λ, y)

    @printed
    def __repr__(self) -> str:
        scale = getattr(self.diag, "scale", None)
        size = self.size or (() if scale is None else tuple(scale.shape))
        words = [*map(str, size), *([] if self.λ is identity else [show(self.λ)])]
        return f"LayerNorm({', '.join([*words, *([] if self.affine else ['affine=False'])])})"


@dataclass(init=False, repr=False, eq=False)
class Dropout(Shown):
    """Sets a share `p` of the elements to zero in training; else returns its input.

    `dims` are the axes along which elements are dropped one by one (all of them by default).

    >>> Dropout(0.5)
    Dropout(0.5)
    """

    p: Any
    dims: Any = None
    active: Any = None
    rng: Any = None

    def __init__(self, p: float, *, dims: Any = None, rng: Any = None) -> None:
        _check_share("Dropout", p)
        self.p, self.dims, self.rng = p, dims, rng

    def __call__(self, x: Any) -> Any:
        if self.active is not True or not self.p:
            return x
        shape = x.shape
        if isinstance(self.dims, (int, tuple)):
            axes = self.dims if isinstance(self.dims, tuple) else (self.dims,)
            shape = tuple(n if axis + 1 in axes else 1 for axis, n in enumerate(x.shape))
        scale = 0.0 if self.p == 1 else 1 / (1 - float(self.p))
        factors = (_noise(self, shape) > float(self.p)) * scale
        return x * _on_device(factors, x).astype(x.dtype)

    @printed
    def __repr__(self) -> str:
        return f"Dropout({float(self.p):.7g})"


@dataclass(init=False, repr=False, eq=False)
class AlphaDropout(Shown):
    """Dropout that keeps mean and variance, for selu networks; inactive outside training.

    >>> AlphaDropout(0.5)
    AlphaDropout(0.5)
    """

    p: Any
    active: Any = None
    rng: Any = None

    def __init__(self, p: float, *, rng: Any = None) -> None:
        _check_share("AlphaDropout", p)
        self.p, self.rng = p, rng

    def __call__(self, x: Any) -> Any:
        if self.active is not True or not self.p:
            return x
        p, lowest = float(self.p), -1.7580993408473766  # selu(-Inf)
        if p == 1:
            return np.zeros_like(x)
        scale = 1 / np.sqrt((1 - p) * (1 + p * lowest**2))
        kept = _on_device((_noise(self, x.shape) > p) * 1.0, x).astype(x.dtype)
        return (scale * (x * kept + lowest * (1 - kept)) - scale * lowest * p).astype(x.dtype)

    @printed
    def __repr__(self) -> str:
        return f"AlphaDropout({float(self.p):.7g})"


def _check_share(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise UnsupportedValueError(f"{name}: expected a share from 0 to 1, found {p!r}")


def _noise(layer: Any, shape: tuple[int, ...]) -> Any:
    """Return uniform noise by the layer's NumPy Generator; one of Julia's is not one here."""
    is_ours = isinstance(layer.rng, np.random.Generator)
    return (layer.rng if is_ours else np.random.default_rng()).random(shape)


def _on_device(values: Any, like: Any) -> Any:
    """Return host values as an array where `like` is."""
    made = np.empty_like(like, shape=values.shape, dtype=values.dtype)
    made[...] = values if isinstance(like, np.ndarray) else to_device(values, array_device(like))
    return made
