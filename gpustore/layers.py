"""Flux's layers as plain dataclasses of arrays, with forward passes on NumPy and CuPy alike.

Conventions are Julia's: features come first, `weight` is (out, in), a batch is the last axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.notebook import Shown


def fans(*shape: int) -> tuple[int, int]:
    """Return (fan-in, fan-out) of a weight: (out, in) of Dense, (width..., in, out) of Conv."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    if len(shape) == 2:
        return shape[1], shape[0]
    window = math.prod(shape[:-2])
    return window * shape[-2], window * shape[-1]


def glorot_uniform(
    *shape: int, rng: np.random.Generator | None = None, gain: float = 1, dtype: Any = np.float32
) -> Any:
    """Return numbers drawn uniformly within ±gain * sqrt(6 / (fan-in + fan-out)) (Glorot 2010).

    They are drawn as float32, as in Flux, then brought to `dtype`.

    >>> glorot_uniform(5, 10, rng=np.random.default_rng(0)).shape
    (5, 10)
    """
    rng = np.random.default_rng() if rng is None else rng
    scale = np.float32(gain) * np.sqrt(np.float32(24) / np.float32(sum(fans(*shape))))
    drawn = rng.random(shape, dtype=np.float32) - np.float32(0.5)
    return (drawn * scale).astype(dtype, copy=False)


def glorot_normal(
    *shape: int, rng: np.random.Generator | None = None, gain: float = 1, dtype: Any = np.float32
) -> Any:
    """Return numbers drawn normally with deviation gain * sqrt(2 / (fan-in + fan-out)).

    They are drawn as float32, as in Flux, then brought to `dtype`.
    """
    rng = np.random.default_rng() if rng is None else rng
    scale = np.float32(gain) * np.sqrt(np.float32(2) / np.float32(sum(fans(*shape))))
    return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(dtype, copy=False)


def plain(x: Any) -> Any:
    """Return a parameter's array: that of a TrackedArray or of Julia's Adjoint, or itself."""
    x = x.data if getattr(x, "is_tracked_array", False) else x
    return x.array if getattr(x, "is_wrapped_array", False) else x


def matched(x: Any, weight: Any) -> Any:
    """Return `x` in the weight's float type, as Flux brings it; complex input stays as it is."""
    if x.dtype == weight.dtype or weight.dtype.kind in "biu" or x.dtype.kind == "c":
        return x
    return x.astype(weight.dtype)


def activate(σ: Callable[[Any], Any], x: Any) -> Any:
    """Return `σ.(x)`: a function of this package takes the array, Julia code each element."""
    if getattr(σ, "is_opaque", False) and getattr(x, "ndim", 0):
        made = np.empty_like(x)
        for index in np.ndindex(*x.shape):
            made[index] = σ(x[index])
        return made
    return σ(x)


def column(bias: Any, ndim: int, axis: int = 0) -> Any:
    """Return a bias (n,) shaped to be added along `axis` of an array of `ndim` dimensions."""
    return bias.reshape([-1 if i == axis else 1 for i in range(ndim)])


def printed(show_self: Callable[[Any], str]) -> Callable[[Any], str]:
    """Make a `__repr__` that never fails: fields of a file may hold what no layer is made of."""

    @functools.wraps(show_self)
    def show_safely(self: Any) -> str:
        try:
            return show_self(self)
        except (TypeError, ValueError, AttributeError, LookupError):
            return f"{type(self).__name__}(...)"

    return show_safely


def show(layer: Any) -> str:
    """Return how a layer, or any callable in its place, is printed: functions by name."""
    is_function = callable(layer) and not hasattr(type(layer), "__dataclass_fields__")
    return str(getattr(layer, "__name__", None) or repr(layer)) if is_function else repr(layer)


@dataclass(init=False, repr=False, eq=False)
class Dense(Shown):
    """A fully connected layer: σ(weight @ x + bias), for x (in, batch) or (in,).

    `Dense(in, out, σ)` makes the weight (out, in) by `init` and a bias (out,) of zeros;
    `Dense(weight, bias, σ)` takes arrays, not copies; only a bias of another dtype than the
    weight's is brought to it. A bias of True is zeros, one of False is none, as in Flux.

    >>> Dense(10, 5)
    Dense(10, 5)
    """

    weight: Any
    bias: Any
    σ: Any

    def __init__(
        self,
        n_in: Any,
        n_out: Any = True,
        σ: Callable[[Any], Any] = identity,
        *,
        bias: Any = True,
        init: Callable[..., Any] = glorot_uniform,
        rng: np.random.Generator | None = None,
    ) -> None:
        if hasattr(n_in, "shape"):
            self.weight, bias = n_in, (n_out if bias is True else bias)
        else:
            shape = _size(n_out, "n_out"), _size(n_in, "n_in")
            self.weight = init(*shape) if rng is None else init(*shape, rng=rng)
        if len(self.weight.shape) != 2:
            raise MismatchError(
                f"Dense: weight: expected shape (out, in), found {tuple(self.weight.shape)}; "
                "give a matrix, or the sizes as Dense(in, out)"
            )
        if not callable(σ):
            raise UnsupportedValueError(
                f"Dense: σ: expected a function, found {σ!r}; give one such as gpustore.relu"
            )
        self.bias, self.σ = made_bias(self.weight, bias, self.weight.shape[0]), σ

    def __call__(self, x: Any) -> Any:
        """Return the layer's output: x (in,) or (in, batch...), result (out,) or (out, batch...).

        `x` is brought to the weight's float type, as Flux does; it must be on the same device.
        """
        weight, bias = plain(self.weight), plain(self.bias)
        n_out, n_in = weight.shape
        if x.shape[:1] != (n_in,):
            raise MismatchError(
                f"{self!r}: expected input of shape ({n_in}, batch), found {tuple(x.shape)}; "
                "features come first: transpose an input of shape (batch, features)"
            )
        x = matched(x, weight)
        batch = x.shape[1:]
        columns = x if x.ndim <= 2 else x.reshape((n_in, math.prod(batch)), order="F")
        product = weight @ columns
        if getattr(bias, "shape", ()):  # False, and the Zeros of Flux 0.11 and 0.12, are none
            product = product + column(bias, product.ndim)
        output = activate(self.σ, product)
        return output if x.ndim <= 2 else output.reshape((n_out, *batch), order="F")

    @printed
    def __repr__(self) -> str:
        n_out, n_in = getattr(self.weight, "shape", ("?", "?"))
        function = "" if self.σ is identity else f", {show(self.σ)}"
        bias = "; bias=False" if self.bias is False else ""
        return f"Dense({n_in}, {n_out}{function}{bias})"


def made_bias(weight: Any, bias: Any, size: int, *, name: str = "Dense") -> Any:
    """Return a bias (size,) of the weight's dtype and device, zeros for True, or False for none."""
    if bias is True:
        return np.zeros_like(plain(weight), shape=(size,))
    if bias is False:
        return bias
    if tuple(getattr(bias, "shape", ("none",))) != (size,):
        raise MismatchError(
            f"{name}: bias: expected True, False or an array of shape ({size},), found "
            f"{getattr(bias, 'shape', bias)!r}; an activation is third: {name}(weight, True, σ)"
        )
    is_same = bias is not plain(bias) or bias.dtype == weight.dtype
    return bias if is_same else bias.astype(weight.dtype)


def _size(n: Any, name: str) -> int:
    try:
        size = n.__index__()
    except AttributeError:
        size = -1
    if size < 0 or isinstance(n, bool):
        raise UnsupportedValueError(
            f"Dense: {name}: expected a size or an array, found {n!r}; "
            "build it as Dense(in, out, σ) or Dense(weight, bias, σ)"
        )
    return int(size)


@dataclass(init=False, repr=False, eq=False)
class Chain(Shown):
    """Layers applied one after the other; any callable is a layer.

    `chain[0]` is the first layer, `chain["first"]` one by name; `len(chain)` counts them.

    `layers` is a tuple, a list (as old files hold) or a dict (`Chain(first=..., second=...)`).

    >>> Chain(Dense(10, 5), Dense(5, 2))[0]
    Dense(10, 5)
    """

    layers: Any

    def __init__(self, *layers: Any, **named: Any) -> None:
        if layers and named:
            raise UnsupportedValueError(
                f"Chain: expected all layers named or none, found {len(layers)} without a name; "
                "name them all"
            )
        self.layers = named or layers
        for layer in self:
            if not callable(layer):
                raise UnsupportedValueError(
                    f"Chain: expected callable layers, found {layer!r}; give Chain(first, second)"
                )

    def __call__(self, x: Any) -> Any:
        """Return the output of the last layer."""
        for layer in self:
            x = layer(x)
        return x

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers.values() if isinstance(self.layers, dict) else self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int | slice | str) -> Any:
        """Return a layer by position or name; a slice gives a Chain."""
        if isinstance(index, str):
            return self.layers[index]
        if not isinstance(index, slice):
            return list(self)[index]
        if isinstance(self.layers, dict):
            return Chain(**dict(list(self.layers.items())[index]))
        return Chain(*self.layers[index])

    @printed
    def __repr__(self) -> str:
        if isinstance(self.layers, dict):
            return f"Chain({', '.join(f'{name}={show(x)}' for name, x in self.layers.items())})"
        return f"Chain({', '.join(map(show, self.layers))})"
