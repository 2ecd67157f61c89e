"""Normalisation, recurrence, joining and attention where no recorded output covers them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore import Chain, Dense, eras, functions, tree

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("f4")


def σ(x):
    return 1 / (1 + np.exp(-x))


# --- recurrence: today's interface ---


def scan(step, x, state):
    """Run a step (x, state) -> state over time (axis 1) of x; return the first parts, stacked."""
    found = []
    for t in range(x.shape[1]):
        state = step(x[:, t], state)
        found.append(state[0])
    return np.stack(found, axis=1), state


def lstm_step(cell):
    def step(x, state):
        g = cell.Wi @ x + cell.Wh @ state[0] + cell.bias[:, None]
        i, f, c, o = np.split(g, 4)
        c = σ(f) * state[1] + σ(i) * np.tanh(c)
        return σ(o) * np.tanh(c), c

    return step


def gru_step(cell):
    def step(x, state):
        a, b, c = np.split(cell.Wi @ x, 3)
        p, q, r = np.split(cell.Wh @ state[0], 3)
        u, v, w = np.split(cell.b[:, None], 3)
        reset, update = σ(a + p + u), σ(b + q + v)
        return ((1 - update) * np.tanh(c + reset * r + w) + update * state[0],)

    return step


def gru_v3_step(cell):
    def step(x, state):
        a, b, c = np.split(cell.Wi @ x, 3)
        p, q = np.split(cell.Wh @ state[0], 2)
        u, v, w = np.split(cell.b[:, None], 3)
        reset, update = σ(a + p + u), σ(b + q + v)
        inner = cell.Wh_h̃ @ (reset * state[0])
        return ((1 - update) * np.tanh(c + inner + w) + update * state[0],)

    return step


def rnn_step(cell):
    return lambda x, state: (np.tanh(cell.Wi @ x + cell.Wh @ state[0] + cell.bias[:, None]),)


KINDS = [(gs.RNN, rnn_step), (gs.LSTM, lstm_step), (gs.GRU, gru_step), (gs.GRUv3, gru_v3_step)]


@pytest.mark.parametrize(("kind", "step"), KINDS)
def test_a_sequence_is_mapped_step_by_step(kind, step):
    layer = kind(3, 5, rng=np.random.default_rng(1), return_state=True)
    for name in ("bias", "b"):
        if hasattr(layer.cell, name):
            setattr(layer.cell, name, normal(*getattr(layer.cell, name).shape))
    x = normal(3, 6, 2)
    zero = np.zeros((5, 2), "f4")
    expected, last = scan(step(layer.cell), x, (zero, zero))
    found, state = layer(x)
    assert found.shape == (5, 6, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state[0] if isinstance(state, tuple) else state, last[0], rtol=1e-4)
    alone = kind(layer.cell)(x[:, :, 0])
    np.testing.assert_allclose(alone, expected[:, :, 0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "step"), KINDS)
def test_recur_keeps_its_state_between_calls_and_starts_again(kind, step):
    cell = kind(3, 5).cell
    recur, x = gs.Recur(cell), normal(3, 4, 2)
    expected, _ = scan(step(cell), x, (np.zeros((5, 2), "f4"),) * 2)
    for _ in range(2):
        found = np.stack([recur(x[:, t]) for t in range(4)], axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        gs.reset(recur)
    whole = recur(x.transpose(0, 2, 1))
    np.testing.assert_allclose(whole, expected.transpose(0, 2, 1), rtol=1e-4, atol=1e-6)


def test_cells_take_and_give_their_state():
    cell = gs.LSTMCell((3, 5))
    out, (h, c) = cell(normal(3))
    assert out.shape == h.shape == c.shape == (5,) and np.array_equal(out, h)
    out, state = cell(normal(3, 2), (h, c))
    assert out.shape == (5, 2) and len(state) == 2
    with pytest.raises(gs.MismatchError, match=r"LSTMCell\(3, 5\): expected input \(3,\)"):
        cell(normal(4))
    assert gs.RNNCell(3, 5, gs.relu, bias=False).bias is False
    assert gs.GRU(3, 5, bias=False)(normal(3, 2)).shape == (5, 2)


# --- normalisation ---


def test_batch_norm_in_training_uses_and_tracks_the_batch():
    layer, x = gs.BatchNorm(3), normal(4, 3, 8) * 2 + 1
    gs.testmode(layer, False)
    found = layer(x)
    mean, var = x.mean(axis=(0, 2)), x.var(axis=(0, 2))
    np.testing.assert_allclose(found.mean(axis=(0, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(layer.μ, 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(layer.σ2, 0.9 + 0.1 * var * 32 / 31, rtol=1e-4)
    gs.testmode(layer)
    tested = (x - layer.μ[:, None]) / np.sqrt(layer.σ2[:, None] + 1e-5)
    np.testing.assert_allclose(layer(x), tested, rtol=1e-4, atol=1e-5)


def test_normalisation_over_instances_groups_and_features():
    x = normal(5, 4, 6, 2)
    found = gs.InstanceNorm(6, affine=True)(x)
    np.testing.assert_allclose(found.std(axis=(0, 1)), 1, rtol=1e-3)
    groups = gs.GroupNorm(6, 3)(x).reshape(5, 4, 2, 3, 2, order="F")
    np.testing.assert_allclose(groups.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.std(axis=(0, 1, 2)), 1, rtol=1e-3)
    features = gs.LayerNorm(5, 4)(x)
    np.testing.assert_array_equal(gs.LayerNorm((5, 4))(x), features)
    np.testing.assert_allclose(features.std(axis=(0, 1)), 1, rtol=1e-3)
    assert gs.LayerNorm(5, gs.relu)(x[:, 0, 0]).min() == 0
    assert all(layer(x.astype("f8")).dtype == np.float64 for layer in [gs.InstanceNorm(6)])


@pytest.mark.parametrize("kind", [gs.Dropout, gs.AlphaDropout])
def test_dropout_is_inactive_outside_training(kind):
    layer, x = kind(0.4, rng=np.random.default_rng(0)), normal(50, 40)
    assert layer(x) is x and gs.testmode(layer)(x) is x
    dropped = gs.testmode(layer, False)(x)
    assert dropped.dtype == np.float32 and dropped.shape == x.shape
    share = np.unique(dropped, return_counts=True)[1].max() / x.size  # all that is dropped
    assert 0.3 < share < 0.5
    assert not gs.testmode(kind(1.0), False)(x).any()
    with pytest.raises(gs.UnsupportedValueError, match="share from 0 to 1"):
        kind(1.5)


def test_dropout_along_some_axes_drops_whole_slices():
    layer = gs.testmode(gs.Dropout(0.5, dims=2, rng=np.random.default_rng(3)), False)
    kept = layer(np.ones((4, 30), "f4")) > 0
    assert (kept.all(axis=0) | ~kept.any(axis=0)).all() and 0 < kept.mean() < 1


# --- joining ---


def test_parallel_and_fusion():
    x, y = normal(3, 2), normal(3, 2)
    first, second = Dense(3, 4, gs.tanh), Dense(3, 4)
    both = gs.Parallel(gs.vcat, first, second)
    np.testing.assert_array_equal(both(x), np.concatenate([first(x), second(x)]))
    np.testing.assert_array_equal(both(x, y), np.concatenate([first(x), second(y)]))
    assert both((x, y)).shape == (8, 2)
    named = gs.Parallel(np.add, a=first, b=second)
    assert named["a"] is first and named[1] is second and len(named) == 2
    square = Dense(3, 3)
    outs = gs.PairwiseFusion(np.add, square, square)(x, y)
    np.testing.assert_allclose(outs[1], square(square(x) + y), rtol=1e-5)
    with pytest.raises(gs.MismatchError, match="expected one input or 2, found 3"):
        both(x, x, x)


def test_maxout_skip_scale_and_bilinear():
    x, y = normal(3, 5), normal(4, 5)
    a, b = Dense(3, 3), Dense(3, 3)
    np.testing.assert_array_equal(gs.Maxout(a, b)(x), np.maximum(a(x), b(x)))
    np.testing.assert_array_equal(gs.SkipConnection(a, np.add)(x), a(x) + x)
    scaled = gs.Scale(np.float32([1, 2, 3]), np.float32([1, 0, 0]), gs.relu)
    np.testing.assert_array_equal(
        scaled(x), np.maximum(x * [[1], [2], [3]] + [[1], [0], [0]], 0).astype("f4")
    )
    layer = gs.Bilinear((3, 4), 2)
    expected = np.einsum("oij,ib,jb->ob", layer.weight, x, y)
    np.testing.assert_allclose(layer(x, y), expected, rtol=1e-4, atol=1e-6)
    assert layer((x[:, 0], y[:, 0])).shape == (2,)


def test_embeddings_count_from_one_and_take_one_hot_columns():
    layer = gs.Embedding(5, 3, rng=np.random.default_rng(0))
    assert np.array_equal(layer(np.int64([1, 5])), layer.weight[:, [0, 4]])
    assert layer(np.ones((2, 3), int)).shape == (3, 2, 3) and layer(2).shape == (3,)
    hot = np.eye(5, dtype=bool)[:, [2, 0]]
    np.testing.assert_allclose(layer(hot), layer.weight[:, [2, 0]])
    padded = gs.Embedding(layer.weight, padding_idx=1)
    assert not padded(np.int64([1, 2]))[:, 0].any() and padded(np.int64([1, 2]))[:, 1].any()
    with pytest.raises(gs.MismatchError, match=r"from 1 to 5, found 0 to 4"):
        layer(np.int64([0, 4]))


@pytest.mark.parametrize("reduction", ["mean", "total", "maximum"])
def test_bags_of_embeddings_are_reduced(reduction):
    layer = gs.EmbeddingBag(6, 4, getattr(functions, reduction))
    bags = [[1, 3], [2], [6, 6, 1]]
    reduce = {"mean": np.mean, "total": np.sum, "maximum": np.max}[reduction]
    expected = np.stack([reduce(layer.weight[:, np.array(b) - 1], axis=1) for b in bags], axis=1)
    np.testing.assert_allclose(layer([np.array(b) for b in bags]), expected, rtol=1e-5)
    flat = np.array([i for bag in bags for i in bag])
    np.testing.assert_allclose(layer(flat, [1, 3, 4]), expected, rtol=1e-5)


def slow_attention(q, k, v, nheads, mask):
    features, length, batch = q.shape
    size, out = features // nheads, np.zeros((v.shape[0], length, batch))
    for b in range(batch):
        for h in range(nheads):
            rows = slice(h * size, (h + 1) * size)
            scores = k[rows, :, b].T @ q[rows, :, b] / np.sqrt(size)
            scores = scores if mask is None else np.where(mask, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=0))
            weights /= weights.sum(axis=0)
            values = slice(h * v.shape[0] // nheads, (h + 1) * v.shape[0] // nheads)
            out[values, :, b] = v[values, :, b] @ weights
    return out


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_the_formula(is_causal):
    parts = [Dense(6, 8, bias=False) for _ in range(3)]
    layer = gs.MultiHeadAttention(2, *parts, gs.Dropout(0.0), Dense(8, 6, bias=False))
    x = normal(6, 5, 2)
    mask = np.triu(np.ones((5, 5), bool)) if is_causal else None
    found, weights = layer(x, mask=mask)
    q, k, v = (part(x) for part in parts)
    expected = layer.out_proj(slow_attention(q, k, v, 2, mask).astype("f4"))
    assert found.shape == (6, 5, 2) and weights.shape == (5, 5, 2, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)


# --- all of them ---


def test_attention_is_made_from_sizes_as_flux_makes_it():
    def sizes(layer):
        parts = layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj
        assert all(part.bias is False for part in parts) and layer.attn_drop.p == 0.0
        return layer.nheads, *(part.weight.shape for part in parts)

    assert sizes(gs.MultiHeadAttention(8)) == (8, *[(8, 8)] * 4)
    assert sizes(gs.MultiHeadAttention(8, nheads=2)) == (2, *[(8, 8)] * 4)
    assert sizes(gs.MultiHeadAttention(6, 8, nheads=2)) == (2, *[(8, 6)] * 3, (8, 8))
    assert sizes(gs.MultiHeadAttention(6, (8, 4), 3, nheads=4)) == (
        4, (8, 6), (8, 6), (4, 6), (3, 4)
    )  # fmt: skip
    layer = gs.MultiHeadAttention((6, 5, 7), (8, 4), 3, nheads=2)
    assert sizes(layer) == (2, (8, 6), (8, 5), (4, 7), (3, 4))
    out, weights = layer(normal(6, 2, 1), normal(5, 9, 1), normal(7, 9, 1))
    assert out.shape == (3, 2, 1) and weights.shape == (9, 2, 2, 1)
    biased = gs.MultiHeadAttention(
        4, nheads=2, bias=True, init=lambda *shape: np.zeros(shape, "f4"), dropout_prob=0.5
    )
    assert biased.out_proj.bias.shape == (4,) and biased.attn_drop.p == 0.5
    again = gs.MultiHeadAttention(
        2, *(getattr(biased, f.name) for f in dataclasses.fields(biased)[1:])
    )
    assert again.q_proj is biased.q_proj and again.out_proj is biased.out_proj
    for wrong in ((7,), (8, 7)):
        with pytest.raises(gs.MismatchError, match="sizes of the heads that 2 divides"):
            gs.MultiHeadAttention(*wrong, nheads=2)
    with pytest.raises(gs.UnsupportedValueError, match="up to three sizes"):
        gs.MultiHeadAttention(8, 8, 8, 8)


MADE = {
    "BatchNorm": (gs.BatchNorm(3, gs.relu), (4, 3, 2)), "LayerNorm": (gs.LayerNorm(4), (4, 3)),
    "InstanceNorm": (gs.InstanceNorm(3), (4, 3, 2)), "GroupNorm": (gs.GroupNorm(4, 2), (3, 4, 2)),
    "Dropout": (gs.Dropout(0.5), (4, 3)), "AlphaDropout": (gs.AlphaDropout(0.5), (4, 3)),
    "RNN": (gs.RNN(4, 3), (4, 5, 2)), "LSTM": (gs.LSTM((4, 3)), (4, 5, 2)),
    "GRU": (gs.GRU(4, 3), (4, 5)), "GRUv3": (gs.GRUv3(4, 3), (4, 5, 2)),
    "Recur": (gs.Recur(gs.GRUCell(4, 3)), (4, 2)), "Scale": (gs.Scale(4, gs.tanh), (4, 3)),
    "Maxout": (gs.Maxout(Dense(4, 2), Dense(4, 2)), (4, 3)),
    "SkipConnection": (gs.SkipConnection(Chain(Dense(4, 4)), np.add), (4, 3)),
    "Parallel": (gs.Parallel(gs.vcat, a=Dense(4, 2), b=gs.relu), (4, 3)),
    "PairwiseFusion": (gs.PairwiseFusion(np.add, Dense(4, 4), gs.relu), (4, 3)),
    "Bilinear": (gs.Bilinear(4, 2), (4, 3)),
    "MultiHeadAttention": (
        gs.MultiHeadAttention(2, *(Dense(4, 4, bias=False) for _ in range(3)),
                              gs.Dropout(0.0), Dense(4, 4)), (4, 5, 2)),
}  # fmt: skip


def outputs(layer, x):
    gs.reset(layer)
    found = layer(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("version", [None, "0.16.1", "0.14"])
def test_layers_made_here_come_back_from_a_file(name, version, tmp_path):
    layer, shape = MADE[name]
    x = normal(*shape)
    try:
        gs.save(tmp_path / "layer.bson", layer=layer, flux=version)
    except gs.UnsupportedValueError:
        # what came with 0.15, and what went with it
        refused = {"0.14": ("RNN", "LSTM", "GRU", "GRUv3"), "0.16.1": ("Recur",)}
        assert name in refused.get(version, ())
        return
    loaded = gs.load(tmp_path / "layer.bson", "layer")
    assert type(loaded) is type(layer) and repr(loaded) == repr(layer)
    for a, b in zip(outputs(loaded, x), outputs(layer, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_the_same_code_runs_on_the_device(cuda, name):
    layer, shape = MADE[name]
    x = normal(*shape)
    found = outputs(gs.gpu(layer), gs.gpu(x))
    for a, b in zip(found, outputs(layer, x), strict=True):
        assert gs.device_of(a) == "cuda:0"
        np.testing.assert_allclose(gs.cpu(a), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Dropout", "AlphaDropout", "BatchNorm"])
def test_training_runs_on_the_device(cuda, name):
    layer, shape = MADE[name]
    found = gs.testmode(gs.gpu(layer), False)(gs.gpu(normal(*shape)))
    assert gs.device_of(found) == "cuda:0"


def test_running_statistics_and_states_are_no_parameters():
    norm = gs.BatchNorm(2)
    assert [id(p) for p in gs.params(norm)] == [id(norm.β), id(norm.γ)]
    recur = gs.Recur(gs.RNNCell(3, 5))
    assert [p.shape for p in gs.params(recur)] == [(5, 3), (5, 5), (5,)]


def test_a_state_from_a_file_moves_with_its_cell(cuda):
    file = Path(__file__).parent / "fixtures" / "julia" / "lstm_flux07_v1.bson"
    model = gs.gpu(gs.data(gs.load(file, "model")))
    gs.reset(model)
    width = gs.data(model[0].cell.Wi).shape[1]
    assert gs.device_of(model(gs.gpu(np.ones((width, 2), "f4")))) == "cuda:0"


def test_a_state_has_the_names_that_flux_gives():
    assert list(gs.state(gs.BatchNorm(2)))[:6] == ["λ", "β", "γ", "μ", "σ²", "ϵ"]


@pytest.mark.parametrize("name", MADE)
def test_a_state_is_loaded_into_another_layer(name):
    layer, shape = MADE[name]
    copied = tree.rebuild(layer, lambda n: n.copy() if isinstance(n, np.ndarray) else n)
    for array in gs.params(copied):
        array[...] = 0
    gs.loadmodel(copied, gs.state(layer))
    x = normal(*shape)
    for a, b in zip(outputs(copied, x), outputs(layer, x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_recurrent_layer_without_a_cell_is_refused_on_saving(tmp_path):
    layer = gs.Recur(gs.RNNCell(2, 3))
    rows = [row for row in eras.TABLE if row.cls is gs.Recur and row.since == "0.4"]
    (layer.julia_kind,) = rows
    layer.cell = None
    with pytest.raises(gs.UnsupportedValueError, match=r"Recur\.init: what is written cannot"):
        gs.save(tmp_path / "a.bson", layer=layer)
