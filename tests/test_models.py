"""Models that Julia's Flux wrote, of every era: their outputs, their types, their layouts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path

import bson
import numpy as np
import pytest

import gpustore as gs
from gpustore import flux, tree, typeof
from gpustore.julia import JuliaType

FOLDER = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "wild"
FILES = sorted(path.stem for path in FOLDER.glob("*.bson"))


def described(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


FORWARD = {  # what the definitions beside the files say
    "Main.MyNet": lambda m, x: m.act(m.scale * (gs.data(m.proj) @ m.body(x))),
    "Main.AutoEnc": lambda m, x: m.decoder(m.encoder(x)),
    "Main.Nets.Block": lambda m, x: m.b(m.a(x)) / m.n,
}


def run(model, record, numbers):
    """Yield (output, Julia's output) for each recorded call."""
    gs.testmode(model)
    if "sequence" not in record:
        given = record["input"]
        several = tuple(numbers[x["npz"]] for x in given) if isinstance(given, list) else ()
        yield model(several or numbers[given["npz"]]), numbers[record["output"]["npz"]]
        return
    if record["reset_before"]:
        gs.reset(model)
    for step in record["sequence"]:
        yield model(numbers[step["input"]["npz"]]), numbers[step["output"]["npz"]]


WITH_MODELS = [
    name
    for name in FILES
    if described(name).get("forward") and not name.startswith("custom_struct")
]


@pytest.mark.parametrize("name", WITH_MODELS)
@pytest.mark.parametrize("is_saved_again", [False, True], ids=["loaded", "saved again"])
def test_every_recorded_output_is_julias(name, is_saved_again, tmp_path):
    root = gs.load(FOLDER / f"{name}.bson")
    if is_saved_again:
        gs.save(tmp_path / "again.bson", root, durable=False)
        root = gs.load(tmp_path / "again.bson")
    with np.load(FOLDER / f"{name}.npz") as numbers:
        for record in described(name)["forward"]:
            for found, expected in run(root[record["model"]], record, numbers):
                least = 1e-6 * np.abs(expected).max(initial=0)
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=least)
                is_float64 = expected.dtype == np.float64
                assert found.dtype == (np.float64 if is_float64 else np.float32)


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("custom_struct")])
def test_a_users_own_struct_runs_once_its_class_is_registered(name, monkeypatch):
    assert flux.known_functions()  # so that the tables are there
    for table in ("_KINDS", "_ROWS", "_REGISTERED"):
        monkeypatch.setattr(flux, table, copy.copy(getattr(flux, table)))
    about = described(name)
    for node in about["nodes"]:
        kind = node["type"].partition("{")[0]
        if kind in FORWARD:
            fields = [(field, object) for field in node["fields"]]
            made = dataclasses.make_dataclass("Own", fields, namespace={"__call__": FORWARD[kind]})
            made.__qualname__ = kind
            gs.model_type(kind)(made)
    root = gs.load(FOLDER / f"{name}.bson")
    with np.load(FOLDER / f"{name}.npz") as numbers:
        for record in about["forward"]:
            for found, expected in run(root[record["model"]], record, numbers):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def layers_of(file):
    """Yield every object of Flux in a file with the row of the table it was read by."""
    for _, node in tree.walk(gs.load(file, lost="placeholder")):
        kind = getattr(node, "julia_kind", None)
        if kind is not None and not isinstance(node, gs.TrackedArray):
            yield node, kind


@pytest.mark.parametrize("name", FILES)
def test_the_table_gives_the_type_parameters_that_julia_wrote(name):
    for layer, kind in layers_of(FOLDER / f"{name}.bson"):
        made = JuliaType.named(kind.name, *(typeof._param(p, layer, kind) for p in kind.params))
        if "OpaqueDocument" not in repr(layer.julia_type):
            assert made.is_same(layer.julia_type), kind


def test_a_layer_of_an_unknown_layout_is_refused(tmp_path):
    dense = gs.Struct(JuliaType.named("Flux.Dense"), [np.ones((2, 2)), np.ones(2), None, 3])
    gs.save(tmp_path / "m.bson", model=[dense])
    with pytest.raises(gs.FormatError, match=r"model\[0\]: Flux\.Dense: expected 3 fields, fo"):
        gs.load(tmp_path / "m.bson")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Flux.Conv", [None, np.ones((2, 2, 1, 1)), np.ones(1), "x", (0, 0), (1, 1)]),
        ("Flux.Chain", [3]),
        ("Flux.MaxPool", [(2, 2), 0, (2, 2)]),
        ("Flux.Parallel", [None, 1.5]),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_with_its_path(tmp_path, name, fields):
    gs.save(tmp_path / "m.bson", model=gs.Struct(JuliaType.named(name), fields))
    with pytest.raises(gs.FormatError, match=r"model\.\w+: a \w+ is out of place"):
        gs.load(tmp_path / "m.bson")


# --- writing for a version of Flux ---


def sample():
    rng = np.random.default_rng(0)
    return gs.Chain(
        gs.Conv((3, 3), (1, 4), gs.relu, pad=1, rng=rng),
        gs.BatchNorm(4),
        gs.MaxPool((2, 2)),
        gs.flatten,
        gs.Dense(16, 3, rng=rng),
        gs.Dropout(0.5),
        gs.softmax,
    )


@pytest.mark.parametrize("version", ["0.9", "0.10.4", "0.11", "0.12.1", "0.13.4", "0.14", "0.16"])
def test_a_model_is_written_in_the_layout_of_the_flux_asked_for(tmp_path, version):
    model = sample()
    gs.save(tmp_path / "m.bson", model=model, flux=version)
    loaded = gs.load(tmp_path / "m.bson", "model")
    x = np.random.default_rng(1).normal(size=(4, 4, 1, 2)).astype("f4")
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-6)
    counts = {type(layer).__name__: len(layer.julia_kind.fields) for layer, _ in kinds(loaded)}
    number = tuple(map(int, version.split(".")))
    assert counts["Conv"] == (7 if number >= (0, 12, 6) else 6)
    assert counts["BatchNorm"] == (11 if number >= (0, 12) else 8)
    assert counts["Dropout"] == (4 if number >= (0, 13) else 3)


def kinds(model):
    return [(n, n.julia_kind) for _, n in tree.walk(model) if hasattr(n, "julia_kind")]


def test_a_model_of_another_era_is_brought_to_the_layout_asked_for(tmp_path):
    old = gs.data(gs.load(FOLDER / "conv_plain_flux08_v1.bson", "model"))
    gs.save(tmp_path / "new.bson", model=old, flux="0.16")
    new = gs.load(tmp_path / "new.bson", "model")
    conv = next(layer for layer, _ in kinds(new) if isinstance(layer, gs.Conv))
    assert len(conv.julia_kind.fields) == 7 and conv.groups == 1
    with np.load(FOLDER / "conv_plain_flux08_v1.npz") as numbers:
        record = described("conv_plain_flux08_v1")["forward"][0]
        for found, expected in run(new, record, numbers):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_version_cannot_hold_is_refused(tmp_path):
    grouped = gs.Conv((3, 3), (4, 4), groups=2)
    with pytest.raises(gs.UnsupportedValueError, match=r"model\[0\]\.groups: Flux 0\.9 has no"):
        gs.save(tmp_path / "m.bson", model=[grouped], flux="0.9")
    with pytest.raises(gs.UnsupportedValueError, match=r"Flux 0\.12 has no Flux\.EmbeddingBag"):
        gs.save(tmp_path / "m.bson", model=gs.EmbeddingBag(3, 2), flux="0.12")
    with pytest.raises(gs.UnsupportedValueError, match=r"expected a version from 0\.9 on"):
        gs.save(tmp_path / "m.bson", model=grouped, flux="two")
    with pytest.raises(gs.UnsupportedValueError, match=r"no Flux\.Recur, which went with 0\.15"):
        gs.save(tmp_path / "m.bson", model=gs.Recur(gs.RNNCell(2, 3)), flux="0.16")
    still = gs.InstanceNorm(3, affine=True)
    with pytest.raises(gs.UnsupportedValueError, match=r"model\.track_stats: Flux 0\.9 has no"):
        gs.save(tmp_path / "m.bson", model=still, flux="0.9")
    assert not (tmp_path / "m.bson").exists()


@pytest.mark.parametrize("version", [None, "0.13", "0.16"])
def test_a_depthwise_convolution_is_written_as_a_grouped_one_from_flux_0_13_on(tmp_path, version):
    rng = np.random.default_rng(0)
    layer = gs.DepthwiseConv((3, 2), (3, 6), gs.relu, stride=2, pad=(1, 0, 0, 1), rng=rng)
    gs.save(tmp_path / "m.bson", model=gs.Chain(layer, layer), flux=version)
    node = bson.decode((tmp_path / "m.bson").read_bytes())
    found = node["_backrefs"][0]
    assert found["type"]["name"] == ["Flux", "Conv"] and len(found["data"]) == 7
    assert found["data"][1]["size"] == [3, 2, 1, 6] and found["data"][6] == 3
    kernels = np.asarray(layer.weight).reshape(-1, order="F")
    assert bytes(found["data"][1]["data"]) == kernels.tobytes()
    loaded = gs.load(tmp_path / "m.bson", "model")
    assert loaded[0] is loaded[1] and type(loaded[0]) is gs.DepthwiseConv
    x = rng.normal(size=(7, 6, 3, 2)).astype("f4")
    np.testing.assert_array_equal(loaded[0](x), layer(x))
    np.testing.assert_allclose(layer.grouped()(x), layer(x), rtol=1e-5, atol=1e-6)
    gs.save(tmp_path / "old.bson", model=loaded[0], flux="0.12")
    assert b"DepthwiseConv" in (tmp_path / "old.bson").read_bytes()


@pytest.mark.parametrize("cell", [gs.RNNCell, gs.LSTMCell, gs.GRUCell])
def test_the_state_of_a_new_recur_is_written_as_the_matrix_that_flux_starts_from(tmp_path, cell):
    gs.save(tmp_path / "m.bson", model=gs.Recur(cell(4, 3)), flux="0.12")
    found = gs.load(tmp_path / "m.bson", "model")
    states = found.state if isinstance(found.state, tuple) else (found.state,)
    assert all(state.shape == (3, 1) for state in states)
    last = found.julia_type.params[-1]
    assert (last.params[-1] if cell is gs.LSTMCell else last).params[1] == 2
    assert found(np.ones((4, 2), np.float32)).shape == (3, 2)


@pytest.mark.parametrize(
    ("cell", "nfields"), [(gs.RNNCell, 5), (gs.LSTMCell, 4), (gs.GRUCell, 4), (gs.GRUv3Cell, 5)]
)
def test_a_cell_in_a_new_recur_has_the_layout_of_the_last_flux_with_a_recur(
    tmp_path, cell, nfields
):
    recur = gs.Recur(cell(4, 3))
    gs.save(tmp_path / "m.bson", model=gs.Chain(recur), alone=cell(4, 3))
    found = gs.load(tmp_path / "m.bson")
    inner = found["model"][0].cell
    assert (len(inner.julia_kind.fields), inner.julia_kind.since[:4]) == (nfields, "0.13")
    assert found["model"][0].julia_type.params[0] == inner.julia_type
    assert found["alone"].julia_kind.since == "0.15"
    x = np.ones((4, 2), np.float32)
    np.testing.assert_array_equal(found["model"](x), recur(x))


@pytest.mark.parametrize("file", sorted(WILD.glob("*.bson")), ids=lambda file: file.stem)
def test_layers_of_other_peoples_files_have_the_types_the_table_gives(file):
    try:
        pairs = list(layers_of(file))
    except gs.FormatError:
        return  # not written by BSON.jl
    for layer, kind in pairs:
        made = JuliaType.named(kind.name, *(typeof._param(p, layer, kind) for p in kind.params))
        if "OpaqueDocument" not in repr(layer.julia_type):
            assert made.is_same(layer.julia_type), kind


# --- optimisers ---


@pytest.mark.parametrize("name", [n for n in FILES if "optimisers" in n or "doc_opt" in n])
def test_optimisers_are_read_by_the_names_of_their_fields(name):
    nodes = {n["path"]: n for n in described(name)["nodes"]}
    seen = 0
    for key, value in gs.load(FOLDER / f"{name}.bson").items():
        if isinstance(value, gs.Struct) and "Optimis" in value.type.name:
            assert list(value.fields) == nodes[key]["fields"], key
            assert getattr(value, value.fields[0]) is value.data[0]
            seen += 1
    assert seen


def test_arrays_within_an_optimiser_are_written_column_major_as_their_weights_are(tmp_path):
    weight, moment = np.arange(6, dtype="f4").reshape(2, 3), np.ones((2, 3), "f4")
    pairs = gs.Struct(JuliaType.named("Base.IdDict"), [[weight], [(moment, moment * 2)]])
    adam = gs.Struct(JuliaType.named("Flux.Optimise.ADAM"), [0.01, (0.9, 0.999), pairs])
    leaf_type = JuliaType.named("Optimisers.Leaf", *map(typeof.type_of, (None, moment)))
    leaf = gs.Struct(leaf_type, [None, moment.copy()])
    gs.save(tmp_path / "o.bson", adam=adam, leaf=leaf, weight=weight, other=moment.copy())
    with gs.open_file(tmp_path / "o.bson") as stored:
        orders = {array.path: array.order for array in stored.arrays}
    assert orders.pop("other") == "C" and {*orders.values()} == {"F"} and len(orders) == 4
    found = gs.load(tmp_path / "o.bson")
    np.testing.assert_array_equal(found["adam"].data[2].data[1][0][1], moment * 2)
    assert found["adam"].data[2].data[0][0] is found["weight"]


# --- other people's models ---


def first_layer(model):
    kinds = (gs.Dense, gs.Conv, gs.RNNCell, gs.LSTMCell, gs.GRUCell)
    return next((node for _, node in tree.walk(model) if isinstance(node, kinds)), None)


def inputs_for(layer):
    """Yield inputs that the first layer of a model takes, of several widths and heights."""
    if isinstance(layer, gs.Dense):
        n = gs.data(layer.weight).shape[1]
        yield from (np.ones(shape, "f4") for shape in [(n, 2), (28, 28, 1, 2), (1, n, 2)])
    elif isinstance(layer, gs.Conv):
        spatial = gs.data(layer.weight).ndim - 2
        for width in (28, 32, 64, 19, 16, 8, 10, 48, 96, 100, 128, 160, 224, *range(3, 130)):
            yield np.ones((width,) * spatial + (layer.n_in, 1), "f4")
        for shape in itertools.product(range(4, 70, 2), repeat=spatial):
            yield np.ones((*shape, layer.n_in, 1), "f4")
    elif layer is not None:
        yield np.ones((gs.data(layer.Wi).shape[1], 2), "f4")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("file", sorted(WILD.glob("*.bson")), ids=lambda file: file.stem)
def test_models_of_layers_and_known_functions_run_forward(file):
    try:
        root = gs.load(file, lost="placeholder")
    except gs.FormatError:
        return  # not written by BSON.jl
    for model in root.values() if isinstance(root, dict) else ():
        nodes = [node for _, node in tree.walk(model)]
        is_whole = not any(isinstance(node, gs.LostArray) for node in nodes)
        if not isinstance(model, (gs.Chain, gs.Recur, gs.Dense, gs.Conv)) or not is_whole:
            continue
        gs.testmode(model)
        outputs = filter(None, (output_of(model, x) for x in inputs_for(first_layer(model))))
        assert next(outputs, None) is not None, f"{model} runs on no input"


def output_of(model, x):
    """Return how a call ends, with an output or at a user's own struct; None for a wrong input."""
    try:
        gs.reset(model)
        found = model(x)
    except (gs.MismatchError, ValueError, IndexError):
        return None
    except gs.OpaqueCodeError as error:
        return "own struct" if "is not in the file" in str(error) else None
    assert found is not None
    return "output"


def test_the_type_of_a_layer_is_worked_out_once_in_a_save_and_forgotten_after_it(
    tmp_path, monkeypatch
):
    """A Chain's type has those of its layers; what they hold may be another the next time."""
    real, asked = typeof._type_today, []

    def counted(value):
        asked.append(id(value))
        return real(value)

    monkeypatch.setattr(typeof, "_type_today", counted)
    model = gs.Chain(gs.Chain(gs.Dense(2, 3)), gs.Dense(3, 1))
    for dtype in ("f4", "f8"):
        asked.clear()
        model.layers[1].weight = np.ones((1, 3), dtype)
        gs.save(tmp_path / "a", model=model)
        assert len(asked) == len(set(asked)) == 4
        assert gs.load(tmp_path / "a", "model").layers[1].weight.dtype == dtype
    with pytest.raises(gs.UnsupportedValueError):
        gs.save(tmp_path / "a", model=gs.Chain(gs.Dense(2, 3)), other=object())
    assert typeof._remembered.types is None
