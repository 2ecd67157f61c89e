"""Flux's layers that join others, and those of one weight: Parallel, Maxout, Embedding, Scale, ...

Conventions are Julia's: features come first, a batch is the last axis, indices count from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.functions import maximum_of, mean
from gpustore.layers import (
    activate,
    column,
    glorot_uniform,
    made_bias,
    matched,
    plain,
    printed,
    show,
)
from gpustore.notebook import Shown

_IDENTITY = staticmethod(identity)  # as a class attribute it is no method


def _suffix(layer: Any) -> str:
    """Return how Flux prints an activation and a missing bias."""
    function = "" if layer.σ is identity else f", {show(layer.σ)}"
    return function + ("; bias=False" if layer.bias is False else "")


def _shape(array: Any) -> tuple[Any, ...]:
    return tuple(getattr(array, "shape", ("?",) * 3))


@dataclass(init=False, repr=False, eq=False)
class Scale(Shown):
    """Element-wise scaling: σ(scale * x + bias); `Flux.Diagonal` in older files.

    `Scale(5, 3)` makes scale and bias of shape (5, 3); `Scale(scale, bias, σ)` takes arrays.

    >>> Scale(3)
    Scale(3)
    """

    scale: Any
    bias: Any
    σ: Any = field(default=_IDENTITY)

    def __init__(
        self, *size: Any, bias: Any = True, σ: Callable[[Any], Any] = identity, init: Any = np.ones
    ) -> None:
        if size and hasattr(size[0], "shape"):
            self.scale, bias, σ = (*size, bias, σ)[: len(size)] + (bias, σ)[len(size) - 1 :]
        else:
            if size and callable(size[-1]):
                size, σ = size[:-1], size[-1]
            self.scale = np.asarray(init(size), np.float32)
        if bias is True:
            bias = np.zeros_like(plain(self.scale))
        elif bias is not False and _shape(bias) != _shape(self.scale):
            raise MismatchError(
                f"Scale: bias: expected shape {_shape(self.scale)}, found {_shape(bias)}; give "
                "True for zeros"
            )
        self.bias, self.σ = bias, σ

    def __call__(self, x: Any) -> Any:
        """Return σ(scale * x + bias): `scale` lies along the first axes of `x`."""
        scale, bias = plain(self.scale), plain(self.bias)
        ones = (1,) * max(x.ndim - scale.ndim, 0)
        x = matched(x, scale)
        product = x.reshape(x.shape + (1,) * max(scale.ndim - x.ndim, 0)) * scale.reshape(
            scale.shape + ones
        )
        if bias is not False:
            product = product + bias.reshape(bias.shape + ones)
        return activate(self.σ, product)

    @printed
    def __repr__(self) -> str:
        return f"Scale({', '.join(map(str, _shape(self.scale)))}{_suffix(self)})"


@dataclass(init=False, repr=False, eq=False)
class Bilinear(Shown):
    """z[i] = σ(x' * weight[i, :, :] * y + bias[i]), for two inputs or one twice.

    >>> Bilinear((3, 4), 5)
    Bilinear((3, 4), 5)
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
            first, second = n_in if isinstance(n_in, tuple) else (n_in, n_in)
            shape = int(n_out), int(first), int(second)
            self.weight = init(*shape) if rng is None else init(*shape, rng=rng)
        if len(self.weight.shape) != 3:
            raise MismatchError(
                f"Bilinear: weight: expected shape (out, in1, in2), found {_shape(self.weight)}; "
                "give Bilinear((in1, in2), out)"
            )
        self.bias = made_bias(self.weight, bias, self.weight.shape[0], name="Bilinear")
        self.σ = σ

    def __call__(self, x: Any, y: Any = None) -> Any:
        """Return (out, batch) for x (in1, batch) and y (in2, batch); (out,) for vectors."""
        if isinstance(x, tuple):
            x, y = x
        y = x if y is None else y
        weight, bias = plain(self.weight), plain(self.bias)
        if x.shape[:1] != weight.shape[1:2] or y.shape[:1] != weight.shape[2:]:
            raise MismatchError(
                f"{self!r}: expected inputs of {weight.shape[1]} and {weight.shape[2]} rows, found "
                f"{tuple(x.shape)} and {tuple(y.shape)}"
            )
        is_vector = x.ndim == 1
        x, y = (matched(v, weight).reshape((v.shape[0], -1), order="F") for v in (x, y))
        product = np.einsum("oij,ib,jb->ob", weight, x, y, optimize=True)
        if bias is not False:
            product = product + column(bias, 2)
        output = activate(self.σ, product)
        return output[:, 0] if is_vector else output

    @printed
    def __repr__(self) -> str:
        n_out, first, second = _shape(self.weight)
        sizes = str(first) if first == second else f"({first}, {second})"
        return f"Bilinear({sizes}, {n_out}{_suffix(self)})"


@dataclass(init=False, repr=False, eq=False)
class Embedding(Shown):
    """A table of vectors: weight (out, in), one column for each index from 1 to in.

    >>> Embedding(26, 4)
    Embedding(26, 4)
    """

    weight: Any
    padding_idx: Any = None

    def __init__(
        self,
        n_in: Any,
        n_out: int | None = None,
        *,
        padding_idx: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.weight = _table(n_in, n_out, rng)
        self.padding_idx = padding_idx

    def __call__(self, x: Any) -> Any:
        """Return (out, ...) for indices (...) from 1, or for one-hot columns (in, ...) of bool."""
        found = _looked_up(self, plain(self.weight), x)
        if self.padding_idx is None:
            return found
        is_padding = x[self.padding_idx - 1] if _is_one_hot(x) else x == self.padding_idx
        return found * (1 - np.asarray(is_padding)[None]).astype(found.dtype)

    @printed
    def __repr__(self) -> str:
        n_out, n_in = _shape(self.weight)
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"Embedding({n_in}, {n_out}{padding})"


def _table(n_in: Any, n_out: int | None, rng: np.random.Generator | None) -> Any:
    if hasattr(n_in, "shape"):
        return n_in
    if n_out is None:
        raise UnsupportedValueError("Embedding: expected sizes (in, out) or a weight (out, in)")
    rng = np.random.default_rng() if rng is None else rng
    return rng.standard_normal((n_out, n_in), dtype=np.float32)


def _is_one_hot(x: Any) -> bool:
    return getattr(getattr(x, "dtype", None), "kind", "") == "b"


def _looked_up(layer: Any, weight: Any, x: Any) -> Any:
    if _is_one_hot(x):
        if x.shape[0] != weight.shape[1]:
            raise MismatchError(
                f"{layer!r}: expected one-hot columns of {weight.shape[1]} rows, found {x.shape}"
            )
        flat = weight @ x.reshape((x.shape[0], -1), order="F").astype(weight.dtype)
        return flat.reshape((weight.shape[0], *x.shape[1:]), order="F")
    index = x if hasattr(x, "shape") else np.asarray(x)
    if index.dtype.kind not in "iu":
        raise MismatchError(f"{layer!r}: expected integers from 1, found {index.dtype}")
    if index.size and not 1 <= int(index.min()) <= int(index.max()) <= weight.shape[1]:
        raise MismatchError(
            f"{layer!r}: expected indices from 1 to {weight.shape[1]}, found {int(index.min())} to "
            f"{int(index.max())}; Julia counts from 1"
        )
    return weight[:, index - 1]


@dataclass(init=False, repr=False, eq=False)
class EmbeddingBag(Shown):
    """Embeddings of the indices of a bag, reduced to one vector: by mean, total or maximum.

    >>> EmbeddingBag(26, 4)
    EmbeddingBag(26, 4)
    """

    weight: Any
    reduction: Any

    def __init__(
        self,
        n_in: Any,
        n_out: Any = None,
        reduction: Callable[..., Any] = mean,
        *,
        rng: np.random.Generator | None = None,
    ) -> None:
        self.weight = _table(n_in, n_out, rng)
        self.reduction = reduction

    def __call__(self, x: Any, at: Any = None) -> Any:
        """Return (out, ...) for indices (bag, ...), a list of bags, or a vector split at `at`.

        `at` holds the index, from 1, at which each bag begins; the first is 1.
        """
        if at is not None:
            ends = [*(int(i) - 1 for i in at[1:]), len(x)]
            x = [x[int(i) - 1 : end] for i, end in zip(at, ends, strict=True)]
        if isinstance(x, (list, tuple)):
            return np.stack([self(bag) for bag in x], axis=1)
        found = _looked_up(self, plain(self.weight), x)
        return self.reduction(found, axis=1)[:, 0]

    @printed
    def __repr__(self) -> str:
        n_out, n_in = _shape(self.weight)
        return f"EmbeddingBag({n_in}, {n_out})"


# --- joining ----------------------------------------------------------------------------------


def _parts(layers: Any) -> list[Any]:
    return list(layers.values() if isinstance(layers, dict) else layers)


def _shown(layers: Any) -> str:
    if isinstance(layers, dict):
        return ", ".join(f"{name}={show(layer)}" for name, layer in layers.items())
    return ", ".join(map(show, layers))


@dataclass(init=False, repr=False, eq=False)
class Maxout(Shown):
    """The largest of the layers' outputs, element by element.

    >>> Maxout(np.sin, np.cos)
    Maxout(sin, cos)
    """

    layers: Any

    def __init__(self, *layers: Any) -> None:
        self.layers = layers

    def __call__(self, x: Any) -> Any:
        return maximum_of(*(layer(x) for layer in _parts(self.layers)))

    @printed
    def __repr__(self) -> str:
        return f"Maxout({_shown(self.layers)})"


@dataclass(init=False, repr=False, eq=False)
class SkipConnection(Shown):
    """connection(layers(x), x): the input goes around the layers.

    >>> SkipConnection(np.tanh, np.add)
    SkipConnection(tanh, add)
    """

    layers: Any
    connection: Any

    def __init__(self, layers: Any, connection: Callable[..., Any]) -> None:
        self.layers, self.connection = layers, connection

    def __call__(self, x: Any) -> Any:
        return self.connection(self.layers(x), x)

    @printed
    def __repr__(self) -> str:
        return f"SkipConnection({show(self.layers)}, {show(self.connection)})"


class _Joined(Shown):
    """What Parallel and PairwiseFusion share: indexing by number or name, printing."""

    layers: Any
    connection: Any

    def __init__(self, connection: Callable[..., Any], *layers: Any, **named: Any) -> None:
        if layers and named:
            raise UnsupportedValueError(
                f"{type(self).__name__}: expected all layers named or none; name them all"
            )
        self.connection, self.layers = connection, named or layers

    def __getitem__(self, index: int | str) -> Any:
        return self.layers[index] if isinstance(index, str) else _parts(self.layers)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(_parts(self.layers))

    def __len__(self) -> int:
        return len(self.layers)

    @printed
    def __repr__(self) -> str:
        return f"{type(self).__name__}({show(self.connection)}, {_shown(self.layers)})"


@dataclass(init=False, repr=False, eq=False)
class Parallel(_Joined):
    """connection(layer1(x), layer2(x), ...), or layer by layer for as many inputs.

    >>> Parallel(np.add, np.sin, np.cos)
    Parallel(add, sin, cos)
    """

    connection: Any
    layers: Any

    def __call__(self, *inputs: Any) -> Any:
        xs = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], tuple) else inputs
        parts = _parts(self.layers)
        if len(xs) == 1:
            return self.connection(*(part(xs[0]) for part in parts))
        if len(parts) == 1:
            return self.connection(*(parts[0](x) for x in xs))
        if len(xs) != len(parts):
            raise MismatchError(
                f"{self!r}: expected one input or {len(parts)}, found {len(xs)}; give one for each "
                "layer"
            )
        return self.connection(*(part(x) for part, x in zip(parts, xs, strict=True)))


@dataclass(init=False, repr=False, eq=False)
class PairwiseFusion(_Joined):
    """y1 = layer1(x1), y2 = layer2(connection(y1, x2)), ...: the tuple of all y.

    >>> PairwiseFusion(np.add, np.sin, np.cos)
    PairwiseFusion(add, sin, cos)
    """

    connection: Any
    layers: Any

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """Return all outputs for one input each, or one input for all."""
        xs = inputs[0] if len(inputs) == 1 else inputs
        parts = _parts(self.layers)
        if not isinstance(xs, tuple):
            xs = (xs,) * len(parts)
        if len(xs) != len(parts):
            raise MismatchError(
                f"{self!r}: expected one input or {len(parts)}, found {len(xs)}; give one for each "
                "layer"
            )
        outputs: list[Any] = []
        for part, x in zip(parts, xs, strict=True):
            outputs.append(part(self.connection(outputs[-1], x) if outputs else x))
        return tuple(outputs)
