"""Activations: NNlib's values, dtypes kept, no warnings, NaN through, on the device too."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import activations

ALL = [getattr(activations, name) for name in activations.__all__]
BASE = [activations.abs, activations.abs2, activations.sign, activations.sin, activations.cos]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softplus(x: float) -> float:
    return max(x, 0) + math.log1p(math.exp(-abs(x)))


EXACT = {
    "σ": sigmoid, "sigmoid": sigmoid, "sigmoid_fast": sigmoid, "tanh": math.tanh,
    "tanh_fast": math.tanh, "identity": lambda x: x, "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6), "hardtanh": lambda x: min(max(x, -1), 1),
    "hardσ": lambda x: min(max((x + 3) / 6, 0), 1),
    "hardsigmoid": lambda x: min(max((x + 3) / 6, 0), 1),
    "hardswish": lambda x: x * min(max((x + 3) / 6, 0), 1),
    "leakyrelu": lambda x: max(x, 0.01 * x), "rrelu": lambda x: x if x > 0 else x * 11 / 48,
    "elu": lambda x: x if x >= 0 else math.exp(x) - 1,
    "celu": lambda x: x if x >= 0 else math.exp(x) - 1,
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_sigmoid": lambda x: x * sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "gelu_erf": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "swish": lambda x: x * sigmoid(x), "lisht": lambda x: x * math.tanh(x),
    "softplus": softplus, "softsign": lambda x: x / (1 + abs(x)),
    "logσ": lambda x: -softplus(-x), "logsigmoid": lambda x: -softplus(-x),
    "logcosh": lambda x: x + softplus(-2 * x) - math.log(2),
    "mish": lambda x: x * math.tanh(softplus(x)), "tanhshrink": lambda x: x - math.tanh(x),
    "softshrink": lambda x: math.copysign(max(abs(x) - 0.5, 0), x),
    "trelu": lambda x: x if x > 1 else 0, "thresholdrelu": lambda x: x if x > 1 else 0,
}  # fmt: skip
FLOATS = st.floats(-30, 30, width=32)


def test_every_activation_has_an_exact_twin_here():
    assert set(EXACT) | {"softmax", "logsoftmax"} == set(activations.__all__)


@pytest.mark.parametrize("name", EXACT)
@given(x=FLOATS)
def test_float32_is_within_rounding_of_the_exact_value(name, x):
    found = getattr(activations, name)(np.float32([x]))
    assert found.dtype == np.float32
    scale = max(1.0, abs(x))  # cancellation is the formula's own, as in NNlib
    assert abs(float(found[0]) - EXACT[name](x)) <= 4e-7 * scale


@pytest.mark.parametrize("name", EXACT)
@given(x=st.floats(-30, 30))
def test_float64_is_within_rounding_of_the_exact_value(name, x):
    found = getattr(activations, name)(np.float64([x]))
    assert abs(found[0] - EXACT[name](x)) <= 1e-15 * max(1.0, abs(x)) * 4


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_dtype_and_shape_are_kept_and_the_input_is_not_changed(function, dtype):
    x = np.array([[-100, -1, 0], [1, 0.5, 100]]).astype(dtype)
    before = x.copy()
    found = function(x)
    assert found.dtype == x.dtype and found.shape == x.shape
    assert np.array_equal(x, before)


@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_infinities_and_large_numbers_give_no_warning_and_nan_stays_nan(function):
    x = np.float32([[np.nan], [np.inf], [-np.inf], [3e38], [-3e38]])
    assert np.isnan(function(x)[0, 0])


@pytest.mark.parametrize("function", [*ALL, *BASE], ids=lambda f: f.__name__)
def test_scalars_and_integers_are_taken(function):
    if "softmax" not in function.__name__:
        assert np.ndim(function(0.5)) == 0
    assert np.shape(function(np.arange(3))) == (3,)


def test_integers_stay_integers_where_julia_keeps_them():
    for function in (gs.relu, gs.relu6, gs.hardtanh, gs.identity):
        assert function(np.int32([-9, 9])).dtype == np.int32
    assert gs.σ(np.int32([0])).dtype == np.float64


def test_values_far_out_neither_overflow_nor_cancel():
    huge = np.float32([-3e38, 3e38])
    assert np.array_equal(gs.logcosh(huge), np.abs(huge))
    assert gs.gelu_tanh(huge).tolist() == gs.gelu_sigmoid(huge).tolist() == [0, huge[1]]
    assert gs.trelu(np.int32([0, 1, 2])).dtype == np.int32
    x = np.linspace(-38, 10, 2001)
    expected = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x]
    np.testing.assert_allclose(gs.gelu_erf(x), expected, rtol=1e-12, atol=1e-320)


def test_softmax_sums_to_one_over_the_first_axis_and_takes_infinities():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("f4")
    np.testing.assert_allclose(gs.softmax(x).sum(axis=0), 1, rtol=1e-6)
    np.testing.assert_allclose(gs.softmax(x, axis=1).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(gs.logsoftmax(x)), gs.softmax(x), rtol=1e-5)
    assert gs.softmax(np.float32([np.inf, 1, np.inf])).tolist() == [0.5, 0, 0.5]
    assert gs.logsoftmax(np.float32([np.inf, 1])).tolist() == [0, -np.inf]
    assert gs.softmax(np.zeros((0, 2))).shape == (0, 2)


@pytest.mark.parametrize("function", [*ALL, *BASE], ids=lambda f: f.__name__)
def test_the_same_code_runs_on_the_device(cuda, function):
    x = np.linspace(-4, 4, 12, dtype="f4").reshape(4, 3)
    found = function(gs.gpu(x))
    assert gs.device_of(found) == "cuda:0"
    np.testing.assert_allclose(gs.cpu(found), function(x), rtol=2e-6, atol=1e-6)
