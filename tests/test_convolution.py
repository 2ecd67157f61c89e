"""Convolution and pooling against plain loops, and each other; construction and printing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import Conv, ConvTranspose, CrossCor, DepthwiseConv, MaxPool, MeanPool


def slow_correlation(x, weight, stride, pad, dilation, groups):
    """Return the cross-correlation by loops over every output: Julia's axes, pad (low, high)."""
    n = weight.ndim - 2
    kernel, n_out = weight.shape[:n], weight.shape[-1]
    padded = np.pad(x, [*pad, (0, 0), (0, 0)])
    sizes = [
        (w - (k - 1) * d - 1) // s + 1
        for w, k, d, s in zip(padded.shape, kernel, dilation, stride, strict=False)
    ]
    out = np.zeros((*sizes, n_out, x.shape[-1]), np.float64)
    per_group, in_group = n_out // groups, weight.shape[n]
    for place in np.ndindex(*sizes):
        for o in range(n_out):
            first = (o // per_group) * in_group
            for tap in np.ndindex(*kernel):
                at = tuple(
                    p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True)
                )
                for c in range(in_group):
                    out[(*place, o)] += weight[(*tap, c, o)] * padded[(*at, first + c)]
    return out


@st.composite
def cases(draw):
    n = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    stride = draw(st.lists(st.integers(1, 3), min_size=n, max_size=n))
    dilation = draw(st.lists(st.integers(1, 2), min_size=n, max_size=n))
    pad = draw(st.lists(st.integers(0, 2), min_size=2 * n, max_size=2 * n))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_in, per_out = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    space = [
        max((k - 1) * d + 1, draw(st.integers(1, 6))) for k, d in zip(kernel, dilation, strict=True)
    ]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(*space, per_in * groups, draw(st.integers(1, 2))))
    weight = rng.normal(size=(*kernel, per_in, per_out * groups))
    order = draw(st.sampled_from("CF"))
    options = {"stride": tuple(stride), "pad": tuple(pad), "dilation": tuple(dilation)}
    return np.asarray(x, order=order), np.asarray(weight, order=order), options, groups


def sides(pad):
    return list(zip(pad[::2], pad[1::2], strict=True))


@given(cases())
def test_conv_is_the_correlation_with_its_kernel_flipped(case):
    x, weight, options, groups = case
    bias = np.arange(weight.shape[-1], dtype=float)
    flipped = np.flip(weight, axis=tuple(range(weight.ndim - 2)))
    expected = slow_correlation(
        x, flipped, options["stride"], sides(options["pad"]), options["dilation"], groups
    )
    found = Conv(weight, bias, groups=groups, **options)(x)
    np.testing.assert_allclose(found, expected + bias[:, None], rtol=1e-9, atol=1e-9)
    if groups == 1:
        crossed = CrossCor(flipped, False, **options)(x)
        np.testing.assert_allclose(crossed, expected, rtol=1e-9, atol=1e-9)


@given(cases())
def test_conv_transpose_is_the_adjoint_of_conv(case):
    x, weight, options, groups = case
    conv = Conv(weight, False, groups=groups, **options)
    y = conv(x)
    v = np.random.default_rng(0).normal(size=y.shape)
    reached = [
        (n - 1) * s + (k - 1) * d + 1 - low - high
        for n, s, k, d, (low, high) in zip(
            y.shape, options["stride"], weight.shape, options["dilation"], sides(options["pad"]),
            strict=False,
        )
    ]  # fmt: skip
    if min(reached) < 1:
        return
    outpad = tuple(w - n for w, n in zip(x.shape, reached, strict=False))
    back = ConvTranspose(weight, False, groups=groups, outpad=outpad, **options)(v)
    assert back.shape == x.shape
    np.testing.assert_allclose((y * v).sum(), (x * back).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(40, 30), (64, 3), (5, 200)])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_inputs_are_computed_in_blocks(shape, stride, monkeypatch):
    from gpustore import correlation

    rng = np.random.default_rng(0)
    x = rng.normal(size=(*shape, 6, 3)).astype("f4")
    layer = Conv((3, 3), (6, 4), stride=stride, pad=1, rng=rng)
    whole = layer(x)
    for nbytes in (1, 20_000):
        monkeypatch.setattr(correlation, "_BUFFER_NBYTES", nbytes)
        np.testing.assert_allclose(layer(x), whole, rtol=1e-4, atol=1e-5)


def slow_pool(x, k, stride, pad, combine, fill):
    padded = np.pad(x, [*pad, (0, 0), (0, 0)], constant_values=fill)
    sizes = [(w - n) // s + 1 for w, n, s in zip(padded.shape, k, stride, strict=False)]
    out = np.zeros((*sizes, *x.shape[-2:]))
    for place in np.ndindex(*sizes):
        window = tuple(slice(p * s, p * s + n) for p, s, n in zip(place, stride, k, strict=True))
        out[place] = combine(padded[window], axis=tuple(range(len(k))))
    return out


@given(st.integers(1, 3), st.data())
def test_pools_are_the_windows_combined(n, data):
    sizes = st.lists(st.integers(1, 3), min_size=n, max_size=n).map(tuple)
    k, stride = data.draw(sizes), data.draw(sizes)
    pad = tuple(data.draw(st.integers(0, (k[i // 2] - 1))) for i in range(2 * n))
    space = [size + data.draw(st.integers(0, 4)) for size in k]
    x = np.random.default_rng(0).normal(size=(*space, 2, 2))
    largest = slow_pool(x, k, stride, sides(pad), np.max, -np.inf)
    np.testing.assert_array_equal(MaxPool(k, stride=stride, pad=pad)(x), largest)
    means = slow_pool(x, k, stride, sides(pad), np.mean, 0)
    np.testing.assert_allclose(MeanPool(k, stride=stride, pad=pad)(x), means, atol=1e-12)


def test_a_depthwise_convolution_is_one_with_groups():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5, 3, 2)).astype("f4")
    layer = DepthwiseConv((3, 2), (3, 6), gs.relu, pad=1, rng=rng)
    weight = layer.weight.reshape((3, 2, 1, 6), order="F")
    np.testing.assert_allclose(
        layer(x), Conv(weight, True, gs.relu, groups=3, pad=1)(x), rtol=1e-5, atol=1e-6
    )


def test_same_padding_keeps_width_and_height():
    x = np.ones((7, 6, 2, 1), "f4")
    for kernel, dilation in itertools.product([(3, 3), (2, 4), (5, 1)], [1, 2]):
        layer = Conv(kernel, (2, 3), pad=gs.SamePad(), dilation=dilation)
        assert layer(x).shape == (7, 6, 3, 1)
    doubled = ConvTranspose((4, 4), (2, 3), stride=2, pad=gs.SamePad())
    assert doubled(x).shape == (14, 12, 3, 1)


def test_adaptive_and_global_pools():
    x = np.random.default_rng(0).normal(size=(10, 7, 3, 2)).astype("f4")
    assert gs.AdaptiveMaxPool((4, 3))(x).shape == (4, 3, 3, 2)
    assert gs.AdaptiveMeanPool((1, 1))(x).shape == (1, 1, 3, 2)
    np.testing.assert_allclose(gs.GlobalMeanPool()(x)[0, 0], x.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(gs.GlobalMaxPool()(x)[0, 0], x.max(axis=(0, 1)))


def test_upsampling_and_pixel_shuffle():
    x = np.arange(6, dtype="f4").reshape(2, 3, 1, 1)
    near = gs.Upsample(scale=2)(x)
    assert near[:, :, 0, 0].tolist() == np.kron(x[:, :, 0, 0], np.ones((2, 2))).tolist()
    row = np.float32([1, 2, 3]).reshape(3, 1, 1)
    assert gs.Upsample("linear", size=5)(row)[:, 0, 0].tolist() == [1, 1.5, 2, 2.5, 3]
    channels = np.arange(8, dtype="f4").reshape(1, 2, 4, 1)
    assert gs.PixelShuffle(2)(channels).shape == (2, 4, 1, 1)
    assert gs.PixelShuffle(2)(channels)[:, :2, 0, 0].tolist() == [[0, 2], [1, 3]]


def test_layers_print_themselves_as_they_are_made():
    made = [
        "Conv((3, 3), (3, 16))", "Conv((3, 3), (4, 16), relu, pad=1, stride=(2, 1), groups=2)",
        "Conv((5,), (1, 2); bias=False)", "ConvTranspose((3, 3), (16, 3), stride=2, outpad=1)",
        "CrossCor((3,), (3, 16), tanh)", "MaxPool((2, 2), stride=1)", "MeanPool((3,), pad=1)",
        "AdaptiveMaxPool((4, 4))", 'Upsample("bilinear", scale=2)',
    ]  # fmt: skip
    for text in made:
        assert repr(eval(text.replace("; ", ", "), vars(gs).copy())) == text


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Conv((3, 3), (3, 4))(np.ones((5, 5, 2, 1))),
            "3 channels as the last but one",
        ),
        (lambda: Conv((3, 3), (3, 4))(np.ones((5, 5, 3))), "expected input of 4 dimensions"),
        (lambda: Conv((3, 3), (1, 4))(np.ones((2, 2, 1, 1))), "expected an input of at least"),
        (lambda: Conv((3, 3), (3, 4), groups=2), "groups that divide 3 and 4"),
        (lambda: Conv((3, 3), (3, 4), stride=(1, 1, 1)), "stride: expected an integer or 2"),
        (lambda: MaxPool((2, 2))(np.ones((4, 4, 1))), "of 4 dimensions"),
        (lambda: gs.PixelShuffle(2)(np.ones((2, 2, 3, 1))), "a multiple of 4 channels"),
        (lambda: gs.Upsample(), "a scale or a size"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises((gs.MismatchError, gs.UnsupportedValueError), match=text):
        make()


def test_the_weights_float_type_is_kept():
    for dtype in ("f2", "f4", "f8"):
        weight = np.ones((2, 2, 1, 1), dtype)
        assert Conv(weight)(np.ones((3, 3, 1, 1))).dtype == dtype
    assert Conv((2, 2), (1, 1))(np.ones((3, 3, 1, 0), "f4")).shape == (2, 2, 1, 0)


LAYERS = [
    Conv((3, 2), (2, 4), gs.relu, pad=1), Conv((1, 1), (2, 4)), Conv((3, 3), (2, 4), stride=2),
    Conv((2, 2), (2, 4), groups=2), CrossCor((3, 3), (2, 2)), DepthwiseConv((3, 3), (2, 4)),
    ConvTranspose((3, 3), (2, 3), stride=2), MaxPool((2, 2), pad=1), MeanPool((2, 2)),
    gs.GlobalMaxPool(), gs.AdaptiveMeanPool((2, 2)), gs.Upsample("bilinear", scale=2),
    gs.Upsample(scale=2),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_the_same_code_runs_on_the_device(cuda, layer):
    x = np.random.default_rng(0).normal(size=(6, 5, 2, 2)).astype("f4")
    found = gs.gpu(layer)(gs.gpu(x))
    assert gs.device_of(found) == "cuda:0"
    np.testing.assert_allclose(gs.cpu(found), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_layers_come_back_from_a_file(layer, tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 5, 2, 2)).astype("f4")
    gs.save(tmp_path / "layer.bson", layer=layer)
    loaded = gs.load(tmp_path / "layer.bson", "layer")
    assert type(loaded) is type(layer) and repr(loaded) == repr(layer)
    np.testing.assert_allclose(loaded(x), layer(x), rtol=1e-5, atol=1e-6)
