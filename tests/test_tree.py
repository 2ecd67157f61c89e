"""Flux's functions on models: params, data, loadparams, state, loadmodel, testmode."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import gpustore as gs


def model() -> gs.Chain:
    rng = np.random.default_rng(5)
    return gs.Chain(gs.Dense(3, 2, gs.relu, rng=rng), gs.Dense(2, 2, bias=False, rng=rng))


def test_params_are_the_arrays_themselves_in_fluxs_order_each_once():
    chain = model()
    chain = gs.Chain(*chain, chain[0])
    found = gs.params(chain)
    assert [a.shape for a in found] == [(2, 3), (2,), (2, 2)]
    assert found[0] is chain[0].weight


def test_params_of_tracked_arrays_are_tracked_and_data_removes_tracking():
    chain = model()
    chain[0].weight = gs.param(chain[0].weight)
    tracked = gs.params(chain)
    assert isinstance(tracked[0], gs.TrackedArray) and len(tracked) == 3
    assert gs.data(tracked)[0] is chain[0].weight.data
    plain = gs.data(chain)
    assert isinstance(plain[0].weight, np.ndarray) and isinstance(chain[0].weight, gs.TrackedArray)
    assert np.asarray(chain[0].weight).shape == (2, 3)


def test_loadparams_collects_every_mismatch_and_changes_nothing():
    chain = model()
    before = chain[0].weight.copy()
    wrong = [np.ones((3, 2)), np.ones(2), np.ones((2, 3))]
    with pytest.raises(gs.MismatchError, match=r"weights\[0\].*\(2, 3\).*weights\[2\]"):
        gs.loadparams(chain, wrong)
    with pytest.raises(gs.MismatchError, match="expected 3 arrays, found 1"):
        gs.loadparams(chain, [before])
    with pytest.raises(gs.MismatchError, match="complex"):
        gs.loadparams(chain, [before + 0j, np.ones(2), np.ones((2, 2))])
    assert np.array_equal(chain[0].weight, before)


def test_state_is_nested_values_and_loadmodel_takes_it_or_a_model():
    chain = model()
    values = gs.state(chain)
    assert values["layers"][0]["σ"] == () and values["layers"][1]["bias"] is False
    assert values["layers"][0]["weight"] is chain[0].weight
    for source in (values, chain):
        other = gs.Chain(gs.Dense(3, 2, gs.relu), gs.Dense(2, 2, bias=False))
        assert gs.loadmodel(other, source) is other
        assert np.array_equal(other[0].weight, chain[0].weight)


def test_state_holds_named_layers_as_a_named_tuple_and_texts_as_they_are():
    chain = gs.Chain(first=gs.Chain(a=gs.Dense(3, 2)), second=gs.Dense(2, 1))
    values = gs.state({"model": chain, "name": "net"})
    assert values["name"] == "net" and type(values) is dict
    layers = values["model"]["layers"]
    assert type(layers) is type(layers["first"]["layers"]) is gs.NamedTuple
    other = gs.Chain(first=gs.Chain(a=gs.Dense(3, 2)), second=gs.Dense(2, 1))
    assert np.array_equal(gs.loadmodel(other, values["model"])[1].weight, chain[1].weight)


def test_state_has_the_fields_of_the_struct_of_a_file(tmp_path):
    chain = gs.Chain(gs.Embedding(3, 2), gs.Dropout(0.5), gs.Upsample("bilinear", scale=2))
    made = [list(part) for part in gs.state(chain)["layers"]]
    assert made == [["weight", "padding_idx"], ["p", "dims", "active", "rng"], ["scale", "size"]]
    gs.save(tmp_path / "old.bson", chain=chain, flux="0.14")
    loaded = gs.load(tmp_path / "old.bson", "chain")
    embedding, dropout, upsample = gs.state(loaded)["layers"]
    assert (list(embedding), list(upsample)) == (["weight"], ["scale", "size"])
    assert dict(dropout) == {"p": 0.5, "dims": (), "active": None, "rng": ()}
    for target, source in ((chain, loaded), (loaded, chain)):
        assert gs.loadmodel(target, gs.state(source)) is target


def test_loadmodel_names_what_differs():
    with pytest.raises(gs.MismatchError, match=r"model\.layers\[0\]\.weight: expected shape"):
        gs.loadmodel(model(), gs.Chain(gs.Dense(4, 2), gs.Dense(2, 2, bias=False)))
    with pytest.raises(gs.MismatchError, match="expected 2 parts"):
        gs.loadmodel(model(), gs.Chain(gs.Dense(3, 2)))
    with pytest.raises(gs.MismatchError, match="no bias"):
        gs.loadmodel(gs.Dense(2, 2, bias=False), gs.Dense(2, 2, bias=np.ones(2, "f4")))


@dataclasses.dataclass
class Recurrent:
    state: int = 3
    active: bool | None = None

    def reset(self) -> None:
        self.state = 0


def test_reset_and_testmode_reach_layers_wherever_they_are():
    layer = Recurrent()
    gs.reset({"a": [layer]})
    assert layer.state == 0
    for mode, active in ((True, False), (False, True), (None, None)):
        assert gs.testmode([layer], mode) == [layer] and layer.active is active


def test_users_dataclasses_dicts_and_lists_are_models():
    nested = {"a": [Recurrent(), (np.ones(2), np.float32(1))], "b": np.zeros((), "i8")}
    assert len(gs.params(nested)) == 2
    assert gs.device_of(nested) == "cpu"
