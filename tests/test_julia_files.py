"""Files that real Julia wrote: every value beside them, every output of every model."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore import flux, testing
from gpustore.julia import LostArray, NamedTuple, OpaqueFunction, Struct, Symbol
from gpustore.values import DataFrame, JuliaArray, Range

FOLDER = Path(__file__).parent / "fixtures" / "julia"
FILES = sorted(path.stem for path in FOLDER.glob("*.bson"))
LISTINGS = [name for name in FILES if name.startswith(("doc_", "cpu_model"))]


def described(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


class Inside(Exception):
    """A path leads into what is one natural Python value here: the hi of a range's step, say."""


NATURAL = (range, datetime.date, complex, np.generic, set, Range, Symbol, str, int)


def step(value, kind, key, fields):
    """Follow one step of a fixture's path into our value."""
    if isinstance(value, NATURAL):
        raise Inside
    if kind == "key":
        return value[key]
    if isinstance(value, OpaqueFunction):
        return value.captured[fields.index(key)]
    if kind in ("dictkey", "dictval"):
        if isinstance(value, Struct):  # keys that Python cannot hash
            return value.data[kind == "dictval"][key - 1]
        if isinstance(key, str):
            return value[json.loads(key)]
        return list(value.keys() if kind == "dictkey" else value.values())[key - 1]
    if isinstance(value, DataFrame):
        value = value.struct
    if isinstance(value, JuliaArray):
        return value[tuple(np.subtract(key, 1).reshape(-1))]
    if kind == "index":
        return value[key - 1]
    if isinstance(value, LostArray):
        value = value.struct
    if isinstance(value, Struct):
        return value.data[fields.index(key)]
    if isinstance(value, NamedTuple):
        return value[key]
    if isinstance(value, np.ndarray):
        raise Inside  # a BitArray or a PermutedDimsArray
    own = getattr(value, "julia_type", None)
    kind = flux.kind_named(own.name, len(fields)) if own else flux.kind_of(value)
    return getattr(value, kind.fields[fields.index(key)])


def found_at(root, steps, nodes):
    value, path = root, []
    for kind, key in steps:
        fields = nodes.get(json.dumps(path), [])
        value = step(value, kind, key, fields)
        path.append([kind, key])
    return value


def entries_at(name, kind):
    """Yield (entry, our value) for each array or scalar beside a file that is a value here."""
    about = described(name)
    root = gs.load(FOLDER / f"{name}.bson", lost="placeholder")
    nodes = {json.dumps(n["steps"]): n.get("captured", n.get("fields")) for n in about["nodes"]}
    for entry in about[kind]:
        try:
            yield entry, found_at(root, entry["steps"], nodes)
        except Inside:
            assert entry.get("kind") != "bitarray"


@pytest.mark.parametrize("name", [n for n in FILES if described(n)["arrays"]])
def test_every_array_has_julias_bits(name):
    seen = 0
    with np.load(FOLDER / f"{name}.npz") as expected:
        for entry, found in entries_at(name, "arrays"):
            where = entry["path"]
            if entry["kind"] == "dense-view-of-struct":
                values, dense = np.asarray(found), expected[entry["npz"]]
                assert values.dtype == dense.dtype and np.array_equal(values, dense), where
            elif "npz_raw" in entry:
                assert found.shape == tuple(entry["size"]), where
                assert found.data == expected[entry["npz_raw"]].tobytes(), where
            else:
                values = np.asarray(found)
                assert values.shape == tuple(entry["size"]), where
                assert values.dtype == expected[entry["npz"]].dtype, where
                assert values.tobytes("F") == expected[entry["npz"]].tobytes("F"), where
            seen += 1
    assert seen or name.startswith(("dates", "bitarrays"))


@pytest.mark.parametrize("name", [n for n in FILES if described(n)["scalars"]])
def test_every_scalar_is_julias(name):
    for entry, found in entries_at(name, "scalars"):
        where, kind = entry["path"], entry["type"].replace("Main.Base", "Base")
        if "decimal" in entry:
            assert int(found) == int(entry["decimal"]), where
        elif kind == "Core.Char":
            assert ord(found) == entry["codepoint"], where
        elif kind in ("Core.Float64", "Core.Float32", "Core.Float16"):
            assert found.hex() if type(found) is float else found.dtype.kind == "f", where
            octets = np.asarray(found).tobytes()[::-1]
            assert octets.hex() == entry["bits"].removeprefix("0x"), where
        elif kind == "Base.Missing":
            assert found is gs.missing, where
        elif kind in ("Core.String", "Core.Symbol", "Core.Bool", "Core.Nothing"):
            assert found == entry["value"], where


@pytest.mark.parametrize("name", ["adj", "tr", "dg", "rs", "spm", "sym", "ut", "view2"])
def test_a_layer_holds_a_wrapper_as_its_weight(tmp_path, name):
    wrapper = gs.load(FOLDER / "wrappers_v1.bson", name)
    weight = np.asarray(wrapper)
    layer, plain = gs.Dense(weight), gs.Dense(weight)
    layer.weight = wrapper
    x = np.ones((weight.shape[1], 2), weight.dtype)
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-6)
    gs.save(tmp_path / "m.bson", model=layer)
    again = gs.load(tmp_path / "m.bson", "model")
    assert type(again.weight) is type(layer.weight)
    np.testing.assert_array_equal(again(x), layer(x))


def test_a_sparse_matrix_of_a_size_out_of_reason_is_refused():
    sparse = gs.load(FOLDER / "wrappers_v1.bson", "spm")
    sparse.data[0] = 2**40
    with pytest.raises(gs.UnsupportedValueError, match=r"SparseMatrixCSC.*shape \(1099511627776"):
        np.asarray(sparse)


@pytest.mark.parametrize("name", FILES)
def test_every_file_loads_and_saved_again_gives_the_same_values(name, tmp_path):
    loaded = gs.load(FOLDER / f"{name}.bson", lost="placeholder")
    gs.save(tmp_path / "again.bson", loaded)
    again = gs.load(tmp_path / "again.bson", lost="placeholder", verify=True)
    testing.assert_same(again, loaded)


@pytest.mark.parametrize("name", [n for n in LISTINGS if described(n).get("forward")])
def test_models_of_the_documented_listings_give_julias_outputs(name):
    root = gs.load(FOLDER / f"{name}.bson")
    with np.load(FOLDER / f"{name}.npz") as numbers:
        for record in described(name)["forward"]:
            model = root[record["model"]]
            output = model(numbers[record["input"]["npz"]])
            assert output.dtype == np.float32
            np.testing.assert_allclose(output, numbers[record["output"]["npz"]], rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("mlp_activations")])
def test_every_activation_gives_julias_output(name):
    root = gs.load(FOLDER / f"{name}.bson")
    with np.load(FOLDER / f"{name}.npz") as numbers:
        for record in described(name)["forward"]:
            output = root[record["model"]](numbers[record["input"]["npz"]])
            expected = numbers[record["output"]["npz"]]
            np.testing.assert_allclose(output, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", [n for n in LISTINGS if "params" in n or "weights" in n])
def test_data_of_params_are_plain_arrays_in_fluxs_order(name):
    entries = gs.load(FOLDER / f"{name}.bson")
    for weights in entries.values():
        plain = gs.data(weights)
        assert [a.shape for a in plain] == [(5, 10), (5,), (2, 5), (2,)]
        model = gs.Chain(gs.Dense(10, 5, gs.relu), gs.Dense(5, 2), gs.softmax)
        gs.loadparams(model, weights)
        assert np.array_equal(model[0].weight, plain[0])


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith("gpu_")])
def test_pointers_that_julia_saved_from_the_gpu_are_the_documented_failure(name):
    path = FOLDER / f"{name}.bson"
    with pytest.raises(
        gs.DeviceDataLostError, match=r"model.*shape \(5, 9\)|model.*Float32, shape"
    ):
        gs.load(path)
    rest = gs.load(path, lost="placeholder")
    lost = [node for _, node in gs.tree.walk(rest) if isinstance(node, LostArray)]
    assert lost and all(isinstance(node.shape, tuple) and node.shape for node in lost)


def test_lost_arrays_have_the_shapes_julia_had():
    for name in [n for n in FILES if n.startswith("gpu_model")]:
        model = gs.load(FOLDER / f"{name}.bson", "model", lost="placeholder")
        weight = gs.data(model[0].weight)
        assert isinstance(weight, LostArray) and weight.shape == (5, 9)
        assert weight.element_type == "Core.Float32"


def test_sharing_and_cycles_of_the_file_are_those_of_the_values():
    shared = gs.load(FOLDER / "shared_v1.bson")
    groups = described("shared_v1")["shared"]
    assert groups
    arrays = [v for v in shared.values() if isinstance(v, np.ndarray)]
    assert len({id(a) for a in arrays}) < len(arrays) or any(
        isinstance(v, (list, tuple)) for v in shared.values()
    )
    assert shared["u1"] is shared["u2"]  # a bare binary in _backrefs
    cyclic = gs.load(FOLDER / "cyclic_v2.bson")
    assert any(v[-1] is v or v in v for v in cyclic.values() if isinstance(v, list))


def test_element_types_without_a_dtype_are_kept_as_julia_arrays():
    loaded = gs.load(FOLDER / "arrays_eltypes_v1.bson")
    kinds = {type(v) for _, v in gs.tree.walk(loaded)}
    assert np.ndarray in kinds and JuliaArray in kinds
