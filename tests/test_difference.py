"""diff: what was added, removed and changed, by how much; its exit codes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings

import gpustore as gs
from gpustore import testing
from gpustore.difference import Change, difference
from gpustore.testing import fake_cuda
from gpustore.values import JuliaSet

JULIA = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).parents[2] / "shared" / "fixtures" / "wild"


@pytest.fixture
def compare(tmp_path):
    def compare(a, b, **options):
        gs.save(tmp_path / "a.bson", a)
        gs.save(tmp_path / "b.bson", b)
        with gs.open_file(tmp_path / "a.bson") as old, gs.open_file(tmp_path / "b.bson") as new:
            return difference(old, new, **options)

    return compare


def told(found) -> list[tuple[str, str, str]]:
    return [(change.kind, change.path, change.text) for change in found.changes]


def model(seed: int = 0):
    return gs.Chain(*(gs.Dense(3, 3, rng=np.random.default_rng(seed)) for _ in range(2)))


@settings(max_examples=60)
@given(testing.values())
def test_a_value_does_not_differ_from_itself(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("diff")
    gs.save(folder / "a.bson", value=value)
    gs.save(folder / "b.bson", gs.load(folder / "a.bson"))
    with gs.open_file(folder / "a.bson") as a, gs.open_file(folder / "b.bson") as b:
        assert told(difference(a, b)) == []


@pytest.mark.parametrize("path", sorted(JULIA.glob("*.bson")), ids=lambda path: path.stem)
def test_no_file_of_julia_differs_from_itself_but_each_from_another(path):
    with gs.open_file(path) as a, gs.open_file(path) as b:
        assert not difference(a, b)
    with gs.open_file(path) as a, gs.open_file(JULIA / "doc_opt_flux08_v1.bson") as b:
        assert difference(a, b) or path.stem.startswith("doc_opt_flux08")


@pytest.mark.parametrize("path", sorted(WILD.glob("*.bson")), ids=lambda path: path.stem[:60])
def test_no_file_of_other_people_differs_from_itself(path, run):
    code, out, err = run("diff", path, path)
    assert (code, out, err) == (0, "", "") or (code, out, err.count("\n")) == (2, "", 1)


def test_each_kind_of_change_is_named(compare):
    first = {"epoch": 3, "gone": "a", "net": model(), "w": np.zeros((2, 3), "f4"), "same": [1, 2]}
    second = {"epoch": 4, "net": model(), "w": np.zeros((2, 4), "f4"), "same": [1, 2], "new": [1]}
    second["net"][1].weight[0, 1] += 0.5
    found = compare(first, second)
    (weight,) = (change for change in found.changes if change.deviation is not None)
    assert told(found) == [
        ("changed", "epoch", "3 -> 4"),
        ("removed", "gone", "'a'"),
        ("changed", "net.layers[1].weight", weight.text),
        ("changed", "w", "float32 (2, 3) -> float32 (2, 4)"),
        ("added", "new", "list of 1"),
    ]
    assert weight.text.startswith("float32 (3, 3): 1 of 9 elements differ, by 0.5 at most (0.")
    assert weight.deviation.differing == 1
    assert {kind: found.count(kind) for kind in ("added", "removed", "changed")} == {
        "added": 1, "removed": 1, "changed": 3,
    }  # fmt: skip
    assert found.same == 7  # of the model: two biases, two functions, a weight; and of the list


def test_another_dtype_is_a_change_with_its_loss(compare):
    values = np.array([0.1, 0.5])
    found = told(compare({"w": values}, {"w": values.astype("f4")}))
    assert found == [("changed", "w", "float64 (2,) -> float32 (2,): 1 of 2 elements differ, "
                      "by 1.49e-09 at most (2.92e-09 of the norm)")]  # fmt: skip
    found = told(compare({"w": np.zeros(2)}, {"w": np.zeros(2, "f4")}))
    assert found == [("changed", "w", "float64 (2,) -> float32 (2,)")]


def test_another_layer_or_type_is_a_change(compare):
    found = told(compare({"m": gs.Chain(gs.Dense(3, 3))}, {"m": gs.Chain(gs.LayerNorm(3))}))
    assert found[0] == ("changed", "m.layers[0]", "Dense -> LayerNorm")
    assert told(compare({"a": (1, 2)}, {"a": [1, 2]})) == [("changed", "a", "tuple -> list")]
    assert told(compare({"a": 1}, {"a": 1.0})) == [("changed", "a", "1 -> 1.0")]
    assert told(compare({"a": gs.relu}, {"a": gs.tanh})) == [("changed", "a", "relu -> tanh")]


def test_what_is_shared_in_one_file_only_is_a_change(compare):
    weight = np.zeros(3)
    tied, untied = {"a": weight, "b": weight}, {"a": weight, "b": weight.copy()}
    assert told(compare(tied, untied)) == [("changed", "b", "one with a -> its own")]
    assert told(compare(untied, tied)) == [("changed", "b", "its own -> one with a")]
    assert not compare(tied, tied)
    dense = gs.Dense(2, 2)
    found = compare({"m": [dense, dense]}, {"m": [dense, gs.Dense(2, 2)]})
    assert ("changed", "m[1]", "one with m[0] -> its own") in told(found)


def test_values_that_hold_themselves_are_compared_once(compare):
    def ring(number):
        value = [number]
        value.append(value)
        return value

    assert told(compare({"r": ring(1)}, {"r": ring(2)})) == [("changed", "r[0]", "1 -> 2")]
    assert not compare({"r": ring(1)}, {"r": ring(1)})


def test_what_is_shared_over_and_over_takes_no_time(compare):
    def folded(leaf):
        for _ in range(60):
            leaf = [leaf, leaf]
        return {"v": leaf}

    found = compare(folded([np.zeros(2)]), folded([np.ones(2)]))
    assert len(found.changes) == 1


def test_a_tolerance_makes_near_numbers_the_same(compare):
    a, b = {"w": np.zeros(3), "x": 1.0}, {"w": np.full(3, 1e-6), "x": 1.0 + 1e-6}
    assert len(compare(a, b).changes) == 2
    assert not compare(a, b, tolerance=1e-5)
    assert not compare({"x": float("nan")}, {"x": float("nan")})


def test_devices_and_memory_order_are_no_part_of_a_value(tmp_path, run):
    array = np.arange(6.0, dtype="f4").reshape(2, 3)
    with fake_cuda(1):
        gs.save(tmp_path / "a.bson", w=gs.gpu(array), on_gpu="tag")
    gs.save(tmp_path / "b.bson", w=np.asfortranarray(array))
    assert run("diff", tmp_path / "a.bson", tmp_path / "b.bson") == (0, "", "")


def test_lost_arrays_and_functions_are_compared_by_what_is_known_of_them(run):
    lost = JULIA / "gpu_model_g3_v1.bson"
    assert run("diff", lost, lost) == (0, "", "")
    code, out, _ = run("diff", JULIA / "conv_anon_flux08_v1.bson", JULIA / "functions_v1.bson")
    assert code == 1 and "- model: Chain" in out


def test_members_of_a_set_that_are_themselves_alone_are_compared_in_order():
    def stored(*members):
        found = JuliaSet(members)
        found.order = members
        return SimpleNamespace(value=lambda: {"s": found}, arrays=())

    def lost(size):
        struct = gs.Struct(gs.JuliaType.named("CUDA.CuArray"), [])
        return gs.LostArray(struct.type, (size,), struct)

    assert not difference(stored(lost(1), lost(2)), stored(lost(1), lost(2)))
    found = told(difference(stored(lost(1), lost(2)), stored(lost(1), lost(3))))
    assert [path for _, path, _ in found] == ["s{1}"]
    assert not difference(stored("a", "b"), stored("b", "a"))


def test_exit_codes_are_those_of_diff(run, tmp_path):
    gs.save(tmp_path / "a.bson", a=1, c=0)
    gs.save(tmp_path / "b.bson", b=1, c=0)
    (tmp_path / "c.bson").write_bytes(b"no model")
    a, b, c = (tmp_path / f"{name}.bson" for name in "abc")
    assert run("diff", a, a) == (0, "", "")
    code, out, err = run("diff", a, b)
    assert (code, err) == (1, "")
    assert out == f"--- {a}\n+++ {b}\n- a: 1\n+ b: 1\n1 added, 1 removed, 0 changed, 1 the same\n"
    for one, other in ((a, c), (c, a), (a, tmp_path / "none.bson")):
        code, out, err = run("diff", one, other)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_progress_counts_both_files(compare):
    counted: list[tuple[int, int]] = []
    array = np.zeros(1000)
    compare({"w": array}, {"w": array}, progress=lambda *now: counted.append(now))
    assert counted[-1] == (16000, 16000)


def test_a_change_is_a_value_of_its_own():
    assert Change("added", "a", "1") == Change("added", "a", "1")
