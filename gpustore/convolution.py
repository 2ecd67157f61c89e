"""Flux's convolutions: Conv, ConvTranspose, CrossCor, DepthwiseConv, SamePad.

Arrays are Julia's: input (width..., channels, batch), weight (width..., in / groups, out), and a
convolution flips its kernel where a cross-correlation does not. The arithmetic is in
`correlation.py`, with the axes reversed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore.activations import identity
from gpustore.correlation import correlate, flipped, transposed
from gpustore.errors import MismatchError, UnsupportedValueError
from gpustore.layers import activate, glorot_uniform, made_bias, matched, plain, printed, show
from gpustore.notebook import Shown


class SamePad:
    """Padding that keeps width and height where the stride is 1; given as `pad=SamePad()`.

    >>> Conv((3, 3), (1, 2), pad=SamePad())(np.ones((8, 8, 1, 1), np.float32)).shape
    (8, 8, 2, 1)
    """

    def __call__(self, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
        amounts = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple(part for n in amounts for part in (-(-n // 2), n // 2))


def expand(value: Any, n: int, what: str) -> tuple[int, ...]:
    """Return `n` integers, from one for all or from as many."""
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,) * n
    if len(given) != n or not all(isinstance(v, (int, np.integer)) for v in given):
        raise UnsupportedValueError(f"{what}: expected an integer or {n} of them, found {value!r}")
    return tuple(map(int, given))


def both_sides(pad: Any, n: int) -> list[tuple[int, int]]:
    """Return (low, high) for each of `n` spatial axes, from n numbers or from 2n."""
    given = [int(p) for p in pad]
    if len(given) == 2 * n:
        return list(zip(given[::2], given[1::2], strict=True))
    return [(p, p) for p in given]


class _Convolution(Shown):
    """What the layers share: construction, the way to reversed axes and back, printing."""

    σ: Any
    weight: Any
    bias: Any
    stride: Any
    pad: Any
    dilation: Any = 1
    groups: Any = 1
    is_transposed = False

    def _init(
        self, first: Any, second: Any, σ: Any, bias: Any, stride: Any, pad: Any, dilation: Any,
        groups: int, init: Callable[..., Any], rng: Any,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        if hasattr(first, "shape"):
            self.weight, bias = first, (second if bias is True else bias)
        else:
            shape = self._weight_shape(tuple(first), second, groups)
            self.weight = init(*shape) if rng is None else init(*shape, rng=rng)
        if len(self.weight.shape) < 3:
            raise MismatchError(
                f"{name}: weight: expected shape (width..., in, out), found "
                f"{tuple(self.weight.shape)}; give {name}((3, 3), (in, out))"
            )
        n = len(self.weight.shape) - 2
        self.stride = expand(stride, n, f"{name}: stride")
        self.dilation = expand(dilation, n, f"{name}: dilation")
        if isinstance(pad, SamePad):
            self.pad = self._same(pad)
        else:
            is_full = isinstance(pad, (tuple, list)) and len(pad) == 2 * n
            self.pad = expand(pad, 2 * n if is_full else n, f"{name}: pad")
            self.pad = self.pad if is_full else tuple(p for p in self.pad for _ in range(2))
        self.groups = groups
        self.bias = made_bias(self.weight, True if bias is None else bias, self.n_out, name=name)
        self.σ = σ

    def _weight_shape(self, kernel: Any, channels: Any, groups: int) -> tuple[int, ...]:
        try:
            n_in, n_out = (int(n) for n in channels)
        except (TypeError, ValueError):
            raise UnsupportedValueError(
                f"{type(self).__name__}: expected channels (in, out), found {channels!r}"
            ) from None
        if n_in % groups or n_out % groups:
            raise UnsupportedValueError(
                f"{type(self).__name__}: expected groups that divide {n_in} and {n_out} channels, "
                f"found {groups}"
            )
        if self.is_transposed:
            n_in, n_out = n_out, n_in
        return (*kernel, n_in // groups, n_out)

    def _same(self, pad: SamePad) -> tuple[int, ...]:
        return pad(tuple(self.weight.shape[:-2]), self.dilation)

    @property
    def n_in(self) -> int:
        shape = plain(self.weight).shape
        return int(shape[-1]) if self.is_transposed else int(shape[-2]) * int(self.groups)

    @property
    def n_out(self) -> int:
        shape = plain(self.weight).shape
        return int(shape[-2]) * int(self.groups) if self.is_transposed else int(shape[-1])

    def __call__(self, x: Any) -> Any:
        """Return (width..., out, batch) for x (width..., in, batch), of the weight's float type."""
        weight = plain(self.weight)
        if x.ndim != weight.ndim or x.shape[-2] != self.n_in:
            raise MismatchError(
                f"{self!r}: expected input of {weight.ndim} dimensions with {self.n_in} channels "
                f"as the last but one, found {tuple(x.shape)}"
            )
        y = self._forward(matched(x, weight).transpose(), weight.transpose())
        bias = plain(self.bias)
        if getattr(bias, "ndim", 0):  # False, and the Zeros of some versions, are none
            y += bias.astype(y.dtype, copy=False).reshape((-1,) + (1,) * (y.ndim - 2))
        return activate(self.σ, y.transpose())

    def _space(self) -> tuple[Any, Any, Any]:
        """Return stride, pad and dilation with the axes reversed."""
        n = plain(self.weight).ndim - 2
        stride, dilation = (
            (int(v),) * n if isinstance(v, (int, np.integer)) else tuple(map(int, v))[::-1]
            for v in (self.stride, self.dilation)
        )
        pad = (self.pad,) * n if isinstance(self.pad, (int, np.integer)) else self.pad
        return stride, both_sides(pad, n)[::-1], dilation

    def _forward(self, x: Any, weight: Any) -> Any:
        stride, pad, dilation = self._space()
        return correlate(x, flipped(weight), stride, pad, dilation, int(self.groups))

    @printed
    def __repr__(self) -> str:
        shape = getattr(plain(self.weight), "shape", None)
        if shape is None:
            return f"{type(self).__name__}({self.weight!r})"
        words = [str(tuple(shape[:-2])), f"({self.n_in}, {self.n_out})"]
        words += [] if self.σ is identity else [show(self.σ)]
        for name, usual in (("pad", 0), ("stride", 1), ("dilation", 1), ("outpad", 0)):
            value = getattr(self, name, usual)
            values = value if isinstance(value, tuple) else (value,)
            if any(v != usual for v in values):
                words.append(f"{name}={values[0] if len(set(values)) == 1 else values}")
        words += [f"groups={self.groups}"] if self.groups != 1 and self._shows_groups() else []
        return (
            f"{type(self).__name__}({', '.join(words)}{'' if self._has_bias() else '; bias=False'})"
        )

    def _shows_groups(self) -> bool:
        return True

    def _has_bias(self) -> bool:
        return bool(getattr(self.bias, "shape", ()))


@dataclass(init=False, repr=False, eq=False)
class Conv(_Convolution):
    """A convolution, its kernel flipped: weight (width..., in / groups, out).

    x (width..., in, batch) gives (width..., out, batch); one width to three are taken.
    `Conv((3, 3), (in, out), σ)` makes the weight by `init`; `Conv(weight, bias, σ)` takes arrays.
    `pad` is one number, one per axis, low and high of each, or SamePad().

    >>> Conv((3, 3), (3, 16), pad=1)(np.ones((8, 8, 3, 2), np.float32)).shape
    (8, 8, 16, 2)
    """

    σ: Any
    weight: Any
    bias: Any
    stride: Any
    pad: Any
    dilation: Any = 1
    groups: Any = 1

    def __init__(
        self, kernel: Any, channels: Any = True, σ: Any = identity, *, stride: Any = 1,
        pad: Any = 0, dilation: Any = 1, groups: int = 1, bias: Any = True,
        init: Callable[..., Any] = glorot_uniform, rng: Any = None,
    ) -> None:  # fmt: skip
        self._init(kernel, channels, σ, bias, stride, pad, dilation, groups, init, rng)


@dataclass(init=False, repr=False, eq=False)
class CrossCor(_Convolution):
    """A cross-correlation: as Conv, but the kernel is not flipped.

    >>> CrossCor((3,), (3, 16))
    CrossCor((3,), (3, 16))
    """

    σ: Any
    weight: Any
    bias: Any
    stride: Any
    pad: Any
    dilation: Any = 1

    def __init__(
        self, kernel: Any, channels: Any = True, σ: Any = identity, *, stride: Any = 1,
        pad: Any = 0, dilation: Any = 1, bias: Any = True,
        init: Callable[..., Any] = glorot_uniform, rng: Any = None,
    ) -> None:  # fmt: skip
        self._init(kernel, channels, σ, bias, stride, pad, dilation, 1, init, rng)
        del self.groups

    def _forward(self, x: Any, weight: Any) -> Any:
        stride, pad, dilation = self._space()
        return correlate(x, weight, stride, pad, dilation, 1)


@dataclass(init=False, repr=False, eq=False)
class DepthwiseConv(_Convolution):
    """A convolution of each channel by kernels of its own: weight (width..., multiple, in).

    The struct of Flux 0.7 to 0.12; today's Flux makes a Conv with groups instead, and so it is
    written for Flux 0.13 and later.

    >>> DepthwiseConv((3, 3), (4, 8))
    DepthwiseConv((3, 3), (4, 8))
    """

    σ: Any
    weight: Any
    bias: Any
    stride: Any
    pad: Any
    dilation: Any = 1

    def __init__(
        self, kernel: Any, channels: Any = True, σ: Any = identity, *, stride: Any = 1,
        pad: Any = 0, dilation: Any = 1, bias: Any = True,
        init: Callable[..., Any] = glorot_uniform, rng: Any = None,
    ) -> None:  # fmt: skip
        self._init(kernel, channels, σ, bias, stride, pad, dilation, 1, init, rng)
        del self.groups

    def _weight_shape(self, kernel: Any, channels: Any, groups: int) -> tuple[int, ...]:
        n_in, n_out = super()._weight_shape((), channels, 1)
        if n_out % n_in:
            raise UnsupportedValueError(
                f"DepthwiseConv: expected a multiple of {n_in} output channels, found {n_out}"
            )
        return (*kernel, n_out // n_in, n_in)

    @property
    def n_in(self) -> int:
        return int(plain(self.weight).shape[-1])

    @property
    def n_out(self) -> int:
        return int(math.prod(plain(self.weight).shape[-2:]))

    def _forward(self, x: Any, weight: Any) -> Any:
        stride, pad, dilation = self._space()
        kernels = weight.reshape((-1, 1, *weight.shape[2:]))
        return correlate(x, flipped(kernels), stride, pad, dilation, self.n_in)

    def grouped(self) -> Conv:
        """Return the Conv with groups that computes the same."""
        weight = plain(self.weight)
        kernels = weight.reshape((*weight.shape[:-2], 1, -1), order="F")
        return Conv(
            kernels, self.bias, self.σ, stride=self.stride, pad=self.pad, dilation=self.dilation,
            groups=self.n_in,
        )  # fmt: skip

    @classmethod
    def of_grouped(cls, conv: Conv) -> DepthwiseConv:
        """Return the depthwise convolution that `grouped` gave this for."""
        weight = plain(conv.weight)
        kernels = weight.reshape((*weight.shape[:-2], -1, int(conv.groups)), order="F")
        return cls(
            kernels, conv.bias, conv.σ, stride=conv.stride, pad=conv.pad, dilation=conv.dilation
        )


@dataclass(init=False, repr=False, eq=False)
class ConvTranspose(_Convolution):
    """The adjoint of a Conv: weight (width..., out / groups, in).

    >>> ConvTranspose((3, 3), (16, 3), stride=2)
    ConvTranspose((3, 3), (16, 3), stride=2)
    """

    σ: Any
    weight: Any
    bias: Any
    stride: Any
    pad: Any
    outpad: Any = 0
    dilation: Any = 1
    groups: Any = 1

    is_transposed = True

    def __init__(
        self, kernel: Any, channels: Any = True, σ: Any = identity, *, stride: Any = 1,
        pad: Any = 0, outpad: Any = 0, dilation: Any = 1, groups: int = 1, bias: Any = True,
        init: Callable[..., Any] = glorot_uniform, rng: Any = None,
    ) -> None:  # fmt: skip
        self._init(kernel, channels, σ, bias, stride, pad, dilation, groups, init, rng)
        self.outpad = expand(outpad, len(self.stride), "ConvTranspose: outpad")

    def _same(self, pad: SamePad) -> tuple[int, ...]:
        kernel = self.weight.shape[:-2]
        return pad(
            tuple(k - s + 1 for k, s in zip(kernel, self.stride, strict=True)), self.dilation
        )

    def _forward(self, x: Any, weight: Any) -> Any:
        stride, pad, dilation = self._space()
        n = weight.ndim - 2
        outpad = self.outpad if isinstance(self.outpad, tuple) else (int(self.outpad),) * n
        return transposed(x, flipped(weight), stride, pad, outpad[::-1], dilation, int(self.groups))
