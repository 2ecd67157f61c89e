"""NNlib's activation functions: an array in, an array of the same shape and float type out.

Written once with NumPy's functions, which CuPy arrays answer themselves. Formulas and constants are
NNlib's (src/activations.jl, src/softmax.jl), so outputs are Flux's to rounding; where the same
value has a form that neither overflows nor cancels, that form is computed. Floating dtypes are
kept; integers become float64 where Julia makes floats of them. Inputs are never changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "celu", "elu", "gelu", "gelu_erf", "gelu_sigmoid", "gelu_tanh", "hardsigmoid", "hardswish",
    "hardtanh", "hardσ", "identity", "leakyrelu", "lisht", "logcosh", "logsigmoid", "logsoftmax",
    "logσ", "mish", "relu", "relu6", "rrelu", "selu", "sigmoid", "sigmoid_fast", "softmax",
    "softplus", "softshrink", "softsign", "swish", "tanh", "tanh_fast", "tanhshrink",
    "thresholdrelu", "trelu", "σ",
]  # fmt: skip


def _array(x: Any) -> Any:
    """Return `x` if it has a dtype, else Python's numbers as NumPy's."""
    return x if hasattr(x, "dtype") else np.asarray(x)[()]


def _activation(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the function a float array and the result the array's dtype.

    Infinities give what IEEE says without a warning, as in Julia: NaN for swish(-inf), for one.
    """

    @functools.wraps(function)
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        x = _array(x)
        if x.dtype.kind in "iub":
            x = x.astype(np.float64)
        with np.errstate(all="ignore"):
            result = function(x, *args, **kwargs)
        return result if result.dtype == x.dtype else result.astype(x.dtype)

    return apply


def identity(x: Any) -> Any:
    """Return `x` itself."""
    return x


@_activation
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent."""
    return np.tanh(x)


@_activation
def tanh_fast(x: Any) -> Any:
    """Return the hyperbolic tangent (NNlib's is within 5 units in the last place of it)."""
    return np.tanh(x)


@_activation
def σ(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)).

    >>> float(σ(0.0))
    0.5
    """
    t = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + t), t / (1 + t))


@_activation
def sigmoid_fast(x: Any) -> Any:
    """Return σ(x), exactly 1 above 40 and 0 below -80 as NNlib's."""
    return np.where(x > 40, 1, np.where(x < -80, 0, σ(x)))


@_activation
def hardσ(x: Any) -> Any:
    """Return (x + 3) / 6 within [0, 1]; it was 0.2 x + 0.5 in NNlib before 0.7.10."""
    return np.clip((x + 3) / 6, 0, 1)


@_activation
def softplus(x: Any) -> Any:
    """Return log(1 + exp(x))."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


@_activation
def logσ(x: Any) -> Any:
    """Return log(σ(x))."""
    return -softplus(-x)


sigmoid = σ
hardsigmoid = hardσ
logsigmoid = logσ


def _clipped(x: Any, low: float, high: float) -> Any:
    x = _array(x)
    return np.clip(x, low, high).astype(x.dtype)


def hardtanh(x: Any) -> Any:
    """Return x within [-1, 1]; integers stay integers."""
    return _clipped(x, -1, 1)


def relu(x: Any) -> Any:
    """Return max(0, x); NaN stays, integers stay integers.

    >>> relu(np.array([-1.0, 2.0], np.float32))
    array([0., 2.], dtype=float32)
    """
    return np.maximum(x, 0)


def relu6(x: Any) -> Any:
    """Return x within [0, 6]; integers stay integers."""
    return _clipped(x, 0, 6)


@_activation
def leakyrelu(x: Any, a: float = 0.01) -> Any:
    """Return x where it is positive, a * x elsewhere."""
    return np.where(x > 0, x, a * x)


@_activation
def rrelu(x: Any, low: float = 1 / 8, high: float = 1 / 3) -> Any:
    """Return leakyrelu with the slope (low + high) / 2.

    NNlib draws each element's slope from that range, in testing too; this is the mean of its
    results, and repeatable.
    """
    return np.where(x > 0, x, (low + high) / 2 * x)


def trelu(x: Any, theta: float = 1) -> Any:
    """Return x where it is above theta, 0 elsewhere; integers stay integers."""
    x = _array(x)
    return np.where(x <= theta, 0, x).astype(x.dtype)


thresholdrelu = trelu


@_activation
def elu(x: Any, alpha: float = 1) -> Any:
    """Return x where it is positive, alpha * (exp(x) - 1) elsewhere."""
    return np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))


@_activation
def celu(x: Any, alpha: float = 1) -> Any:
    """Return x where it is positive, alpha * (exp(x / alpha) - 1) elsewhere."""
    return np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0) / alpha))


@_activation
def selu(x: Any) -> Any:
    """Return the self-normalising elu."""
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


@_activation
def gelu_tanh(x: Any) -> Any:
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    z = np.clip(x, -10, 10)  # beyond, tanh is -1 or 1 in every float type
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * (z * z * z))))


@_activation
def gelu(x: Any) -> Any:
    """Return gelu_tanh(x), by the name that files hold."""
    return gelu_tanh(x)


@_activation
def gelu_sigmoid(x: Any) -> Any:
    """Return x * σ(sqrt(8 / pi) * (x + 0.044715 x^3))."""
    z = np.clip(x, -10, 10)  # beyond, sigmoid_fast is 0 or 1
    return x * sigmoid_fast(math.sqrt(8 / math.pi) * z * (0.044715 * (z * z) + 1))


@_activation
def gelu_erf(x: Any) -> Any:
    """Return x / 2 * (1 + erf(x / sqrt(2))), computed in float64."""
    wide = x.astype(np.float64)
    tail = _normal_tail(wide)
    return wide * np.where(wide > 0, 1 - tail, tail)


# erfc(z) * exp(z * z) / t for t = 3 / (3 + z), z in [0, 28], in powers of y = (31 t - 17) / 14,
# from the highest: Chebyshev interpolation with 60 digits, relative error below 1e-16.
_ERFC = (
    1.158926674396481e-10, 2.0585022450056837e-10, -1.6238619903251004e-09,
    -1.3102334260945481e-09, 1.3610805523129561e-08, -1.149181560220743e-09,
    -9.50093550633554e-08, 8.172503417462032e-08, 6.529115657806651e-07,
    -9.442183147793818e-07, -5.052426898915053e-06, 7.93238455237517e-06,
    4.82877293671435e-05, -3.944780404654869e-05, -0.0005483850362131674,
    -0.0006133075927837363, 0.005110159850308365, 0.02933755184037709,
    0.08823169298471219, 0.18690947387380905, 0.30312258341190373, 0.3884388055267109,
)  # fmt: skip


def _normal_tail(x: Any) -> Any:
    """Return erfc(|x| / sqrt(2)) / 2 of float64, to 3e-13 of itself: what lies beyond |x|."""
    x = np.clip(x, -39, 39)  # beyond, 0 in float64
    t = 3 / (3 + np.abs(x) / math.sqrt(2))
    y = (31 * t - 17) / 14
    total = y * _ERFC[0]
    for coefficient in _ERFC[1:-1]:
        total = (total + coefficient) * y
    return np.exp(-x * x / 2) * t * (total + _ERFC[-1]) / 2


@_activation
def swish(x: Any) -> Any:
    """Return x * σ(x)."""
    return x * sigmoid_fast(x)


@_activation
def hardswish(x: Any) -> Any:
    """Return x * hardσ(x)."""
    return x * hardσ(x)


@_activation
def lisht(x: Any) -> Any:
    """Return x * tanh(x)."""
    return x * np.tanh(x)


@_activation
def softsign(x: Any) -> Any:
    """Return x / (1 + |x|)."""
    return x / (1 + np.abs(x))


@_activation
def logcosh(x: Any) -> Any:
    """Return log(cosh(x))."""
    t = np.exp(-np.abs(x))
    return np.abs(x) + np.log1p(t * t) - math.log(2)


@_activation
def mish(x: Any) -> Any:
    """Return x * tanh(softplus(x))."""
    return x * np.tanh(softplus(x))


@_activation
def tanhshrink(x: Any) -> Any:
    """Return x - tanh(x)."""
    return x - np.tanh(x)


@_activation
def softshrink(x: Any, lam: float = 0.5) -> Any:
    """Return x moved towards 0 by lam, 0 within [-lam, lam]."""
    low, high = x - lam, x + lam
    return np.where(high > 0, np.where(low < 0, 0, low), high)


@_activation
def softmax(x: Any, *, axis: int = 0) -> Any:
    """Return exp(x) over its sum along `axis` (Julia's dims=1 by default).

    >>> softmax(np.zeros((2, 1)))
    array([[0.5],
           [0.5]])
    """
    if x.size == 0:
        return x
    powers = np.exp(_shifted(x, axis))
    return powers / powers.sum(axis=axis, keepdims=True)


@_activation
def logsoftmax(x: Any, *, axis: int = 0) -> Any:
    """Return log(softmax(x)) along `axis`."""
    if x.size == 0:
        return x
    shifted = _shifted(x, axis)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def _shifted(x: Any, axis: int) -> Any:
    """Return x less its maximum; where that is infinite, 0 at the maxima and -inf elsewhere."""
    largest = x.max(axis=axis, keepdims=True)
    return np.where(largest == np.inf, np.where(x == largest, 0, -np.inf), x - largest)


# --- functions of Base that models hold; NaN where Julia raises DomainError ---


@_activation
def exp(x: Any) -> Any:
    """Return e to the power x."""
    return np.exp(x)


@_activation
def log(x: Any) -> Any:
    """Return the natural logarithm."""
    return np.log(x)


@_activation
def sqrt(x: Any) -> Any:
    """Return the square root."""
    return np.sqrt(x)


@_activation
def sin(x: Any) -> Any:
    """Return the sine of radians."""
    return np.sin(x)


@_activation
def cos(x: Any) -> Any:
    """Return the cosine of radians."""
    return np.cos(x)


def abs(x: Any) -> Any:
    """Return the absolute value; integers stay integers."""
    return np.abs(x)


def abs2(x: Any) -> Any:
    """Return the square of the absolute value; integers stay integers."""
    with np.errstate(all="ignore"):
        return np.abs(x) * np.abs(x)


def sign(x: Any) -> Any:
    """Return -1, 0 or 1."""
    return np.sign(x)
