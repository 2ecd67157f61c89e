"""Chain and Dense: construction, printing, indexing, forward passes, initialisation."""

from __future__ import annotations

import numpy as np
import pytest

import gpustore as gs
from gpustore import Chain, Dense, relu, softmax
from gpustore.layers import fans


def test_a_chain_prints_itself():
    model = Chain(Dense(10, 5, relu), Dense(5, 2), softmax)
    assert repr(model) == "Chain(Dense(10, 5, relu), Dense(5, 2), softmax)"
    assert repr(Dense(3, 2, gs.σ, bias=False)) == "Dense(3, 2, σ; bias=False)"
    assert repr(Chain(a=Dense(3, 2), b=Chain(relu))) == "Chain(a=Dense(3, 2), b=Chain(relu))"


def test_a_chain_is_indexed_sliced_iterated_and_nested():
    first, second = Dense(3, 2), Dense(2, 2)
    model = Chain(first, Chain(second, relu), softmax)
    assert model[0] is first and model[-1] is softmax and model[1][0] is second
    assert isinstance(model[:2], Chain) and list(model[:2]) == [first, model[1]]
    assert len(model) == 3 and next(iter(model)) is first
    named = Chain(a=first, b=second)
    assert named["a"] is first and named[1] is second and list(named[1:].layers) == ["b"]


def test_dense_is_made_of_sizes_or_of_arrays():
    made = Dense(4, 3)
    assert made.weight.shape == (3, 4) and made.weight.dtype == np.float32
    assert made.bias.shape == (3,) and not made.bias.any()
    weight, bias = np.ones((2, 3), "f8"), np.zeros(2)
    given = Dense(weight, bias, relu)
    assert given.weight is weight and given.bias is bias and given.σ is relu
    assert Dense(weight).bias.dtype == np.float64 and Dense(weight, False).bias is False
    assert Dense(3, 2, bias=bias).bias.dtype == np.float32  # the weight's, as in Flux


def test_a_bias_is_made_on_the_weights_device(cuda):
    layer = Dense(gs.gpu(np.ones((2, 3), "f4")))
    assert gs.device_of(layer.bias) == "cuda:0" and layer.bias.shape == (2,)
    assert gs.device_of(layer(gs.gpu(np.ones((3, 1), "f4")))) == "cuda:0"


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 0), (4, 0, 5), (4, 5, 0)])
def test_dense_maps_the_first_axis(shape):
    layer = Dense(4, 5, gs.tanh, rng=np.random.default_rng(0))
    layer.bias = np.arange(5, dtype="f4")
    x = np.random.default_rng(1).normal(size=shape).astype("f4")
    expected = np.tanh(
        np.einsum("oi,i...->o...", layer.weight, x) + layer.bias.reshape(5, *[1] * (len(shape) - 1))
    )
    found = layer(x)
    assert found.shape == (5, *shape[1:]) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_input_is_brought_to_the_weights_type_as_flux_does():
    assert Dense(4, 3)(np.ones((4, 2))).dtype == np.float32
    assert Dense(4, 3)(np.ones((4, 2), "i8")).dtype == np.float32


def test_tracked_weights_compute_like_plain_ones():
    layer = Dense(4, 3)
    tracked = Dense(gs.param(layer.weight), gs.param(layer.bias))
    x = np.ones((4, 2), "f4")
    assert np.array_equal(tracked(x), layer(x))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Dense(4, 3)(np.ones((5, 2))), gs.MismatchError, r"expected input of shape \(4,"),
        (lambda: Dense(np.ones(3)), gs.MismatchError, r"expected shape \(out, in\)"),
        (lambda: Dense(np.ones((3, 2)), np.ones(2)), gs.MismatchError, "bias"),
        (lambda: Dense("4", 3), gs.UnsupportedValueError, "expected a size or an array"),
        (lambda: Dense(4, -1), gs.UnsupportedValueError, "n_out"),
        (lambda: Dense(4, 3, "relu"), gs.UnsupportedValueError, "expected a function"),
        (lambda: Chain(Dense(4, 3), 5), gs.UnsupportedValueError, "callable layers"),
        (lambda: Chain(relu, a=relu), gs.UnsupportedValueError, "all layers named"),
    ],
)
def test_wrong_use_is_said_clearly(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_glorot_initialisation_takes_a_generator_and_has_fluxs_scale():
    for make, bound in ((gs.glorot_uniform, np.sqrt(6 / 1100)), (gs.glorot_normal, np.inf)):
        one, two = (make(100, 1000, rng=np.random.default_rng(4)) for _ in range(2))
        assert np.array_equal(one, two) and one.dtype == np.float32
        assert abs(one).max() <= bound
        assert abs(one.std() / np.sqrt(2 / 1100) - 1) < 0.01


def test_fans_are_those_of_flux():
    assert fans() == (1, 1) and fans(4) == (1, 4) and fans(5, 3) == (3, 5)
    assert fans(3, 3, 8, 16) == (72, 144)
