"""PyTorch, JAX and what they hold, against the real libraries; skipped where they are absent."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import gpustore as gs
from gpustore import activations, interop, testing, torch_modules

FIXTURES = Path(__file__).parent / "fixtures" / "julia"


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax() -> Any:
    return pytest.importorskip("jax")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.bson"


# --- saving -----------------------------------------------------------------------------------


def test_a_state_dict_is_saved_and_comes_back(torch, file):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    gs.save(file, model.state_dict(), epoch=3)
    found = gs.load(file, framework="torch", verify=True)
    assert found.pop("epoch") == 3
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    other.load_state_dict(found)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16", "bool",
                                  "complex64", "int8", "uint8", "int64", "float64"])  # fmt: skip
def test_every_dtype_of_torch_comes_back(torch, file, name):
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, name))
    gs.save(file, tensor=tensor)
    found = gs.load(file, "tensor", framework="torch")
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
    assert gs.load(file, "tensor").dtype.name == name


def test_tensors_of_one_memory_stay_one(torch, file):
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    gs.save(file, model.state_dict())  # its tensors are different objects
    for found in (gs.load(file), gs.load(file, framework="torch")):
        assert found["embedding.weight"] is found["head.weight"]
    view = torch.arange(6.0)
    gs.save(file, a=view, b=view[:3], c=view.reshape(2, 3), d=view[:0], e=view[:0])
    found = gs.load(file)
    assert len({id(array) for array in found.values()}) == 5


def test_a_conjugate_is_no_tied_weight(torch, file):
    z = torch.tensor([1 + 2j, 3 - 1j])
    tree = {"z": z, "conj": z.conj(), "imag": z.imag, "neg": z.conj().imag}
    gs.save(file, tree)
    found = gs.load(file, framework="torch")
    assert all(torch.equal(found[name], tensor) for name, tensor in tree.items())


def test_tensors_that_are_not_dense_are_refused_by_a_sentence(torch, file):
    for tensor, advice in (
        (torch.eye(3).to_sparse(), r"torch.sparse_coo; save its to_dense\(\)"),
        (torch.eye(3).to_mkldnn(), r"torch._mkldnn; save its to_dense\(\)"),
        (torch.empty(2, device="meta"), "on the device meta it has no values"),
    ):
        with pytest.raises(gs.UnsupportedValueError, match=rf"^a\[0\]: .* cannot.*{advice}"):
            gs.save(file, a=[tensor])
    with pytest.raises(gs.UnsupportedValueError, match="cannot be saved"):
        gs.save(file, a=torch.nn.Linear(2, 3))
    assert not file.exists()


def test_arrays_of_jax_are_saved_and_come_back(jax, file):
    numpy = jax.numpy
    tree = {"w": numpy.ones((2, 3), numpy.bfloat16), "b": [numpy.arange(4), (numpy.float32(2),)]}
    gs.save(file, tree)
    found = gs.load(file, framework="jax")
    assert found["w"].dtype == numpy.bfloat16 and isinstance(found["w"], jax.Array)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), tree, found)
    assert jax.tree.all(same)


def test_flaxs_parameters_and_optaxs_states_come_back(jax, file):
    linen, optax = pytest.importorskip("flax.linen"), pytest.importorskip("optax")
    for cls in (optax.ScaleByAdamState, optax.EmptyState):
        gs.model_type(f"optax.{cls.__name__}")(cls)
    params = linen.Dense(3).init(jax.random.key(0), jax.numpy.ones((1, 2)))
    tree = {"params": params, "opt": optax.adam(1e-3).init(params)}
    gs.save(file, tree)
    found = gs.load(file, framework="jax")
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), tree, found))


def test_containers_of_frameworks_are_refused_with_what_to_save_instead(torch, file):
    with pytest.raises(gs.UnsupportedValueError, match=r"m: .*Linear cannot.*its state_dict\(\)"):
        gs.save(file, m=torch.nn.Linear(2, 3))
    flax = pytest.importorskip("flax")
    with pytest.raises(gs.UnsupportedValueError, match=r"FrozenDict cannot.* save its unfreeze"):
        gs.save(file, p=flax.core.freeze({"w": 1}))


# --- loading without a copy -------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
def test_tensors_share_the_memory_of_the_mapping(torch, file, order, dtype):
    array = np.asarray(np.arange(60_000).reshape(200, 300).astype(dtype), order=order)
    gs.save(file, a=array)
    loaded = gs.load(file)
    tensor = interop.in_framework(loaded, "torch")["a"]
    assert tensor.data_ptr() == loaded["a"].ctypes.data
    loaded["a"][1, 2] = 7
    assert float(tensor[1, 2]) == 7
    assert not np.array_equal(gs.load(file, "a"), loaded["a"])  # the file is as it was


def test_tensors_of_a_model_stay_themselves(torch):
    model = {"w": torch.ones(2), "v": np.ones(2)}
    found = interop.in_framework(model, "torch")
    assert found["w"] is model["w"] and interop.tensor(found["v"]) is found["v"]


def test_jax_shares_the_memory_of_row_major_arrays(jax, file):
    gs.save(file, a=np.zeros((200, 300), np.float32))
    loaded = gs.load(file)
    array = interop.in_framework(loaded, "jax")["a"]
    assert array.unsafe_buffer_pointer() == loaded["a"].ctypes.data


@settings(max_examples=60)
@given(testing.models())
def test_models_keep_all_their_values_in_torch(torch, tmp_path_factory, model):
    path = tmp_path_factory.mktemp("torch") / "model.bson"
    gs.save(path, model=model)
    found, plain = gs.load(path, "model", framework="torch"), gs.load(path, "model")
    for one, other in zip(gs.params(found), gs.params(plain), strict=True):
        one, other = gs.data([one])[0], gs.data([other])[0]
        np.testing.assert_array_equal(gs.cpu(one), other)


def test_what_a_framework_lacks_is_said_by_path(torch, file):
    gs.save(file, layer={"w": np.zeros(3, ml_dtypes.float8_e4m3b11fnuz)})
    with pytest.raises(gs.UnsupportedValueError, match=r"layer\['w'\]: float8_e4m3b11fnuz \(3,\)"):
        gs.load(file, framework="torch")
    with pytest.raises(gs.UnsupportedValueError, match="framework: expected 'torch' or 'jax'"):
        gs.load(file, framework="tensorflow")


def test_a_framework_that_is_not_installed_is_said(file, monkeypatch):
    import sys

    gs.save(file, a=np.zeros(3))
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "torch.nn", None)
    with pytest.raises(gs.MissingExtraError, match="pip install torch"):
        gs.load(file, framework="torch")
    with pytest.raises(gs.MissingExtraError, match="pip install torch"):
        interop.to_torch(gs.Chain())


# --- models -----------------------------------------------------------------------------------


def same_as_torch(torch: Any, model: Any, x: Any) -> None:
    """Compare with the module: rank 2 is (batch, features), images have their axes reversed."""
    module = interop.to_torch(model, ndim=x.ndim)
    assert not module.training
    with torch.no_grad():
        found = module(torch.from_numpy(np.ascontiguousarray(x.T))).numpy().T
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-5)


RNG = np.random.default_rng(0)


def images(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def tracked(norm: Any) -> Any:
    """Give a normalisation statistics, scale and shift that are not the ones it starts with."""
    for name in ("μ", "σ2", "β", "γ"):
        if getattr(norm, name) is not None:
            setattr(norm, name, RNG.uniform(0.5, 2, getattr(norm, name).shape).astype(np.float32))
    return norm


@pytest.mark.parametrize("layer", [
    gs.Conv((3, 2), (4, 6)),
    gs.Conv((3, 2), (4, 6), gs.relu, stride=(2, 1), pad=(1, 0), dilation=(1, 2)),
    gs.Conv((3, 3), (4, 6), pad=(1, 0, 2, 1)),
    gs.Conv((3, 3), (4, 6), pad=gs.SamePad(), groups=2, bias=False),
    gs.CrossCor((3, 2), (4, 6), pad=1),
    gs.DepthwiseConv((3, 2), (4, 8)),
    gs.ConvTranspose((3, 2), (4, 6), stride=(2, 1), pad=(1, 0), outpad=(1, 0)),
    gs.ConvTranspose((3, 3), (4, 6), groups=2),
    gs.MaxPool((2, 3)),
    gs.MaxPool((3, 3), pad=1, stride=(2, 1)),
    gs.MeanPool((3, 2), pad=(1, 0), stride=1),
    gs.GlobalMeanPool(),
    gs.GlobalMaxPool(),
    gs.Chain(gs.Conv((1, 1), (4, 4)), tracked(gs.BatchNorm(4, gs.relu))),
    gs.Chain(tracked(gs.InstanceNorm(4, affine=True)), gs.Conv((1, 1), (4, 4))),
    tracked(gs.GroupNorm(4, 2)),
    gs.Dropout(0.5),
    gs.Chain(gs.flatten, gs.Dense(9 * 8 * 4, 3, gs.tanh)),
], ids=repr)  # fmt: skip
def test_layers_of_images_give_the_same_in_torch(torch, layer):
    same_as_torch(torch, layer, images(9, 8, 4, 2))


@pytest.mark.parametrize("layer", [
    gs.Dense(5, 3), gs.Dense(5, 3, gs.gelu, bias=False), tracked(gs.BatchNorm(5)),
    gs.Chain(gs.Dense(5, 4, gs.relu), gs.Chain(gs.Dense(4, 3)), gs.softmax), gs.LayerNorm(5),
    gs.LayerNorm(5, gs.relu), gs.Chain(), gs.Chain(a=gs.Dense(5, 3), b=gs.identity),
], ids=repr)  # fmt: skip
def test_layers_of_features_give_the_same_in_torch(torch, layer):
    same_as_torch(torch, layer, images(5, 7))


def test_one_and_three_spatial_axes(torch):
    same_as_torch(torch, gs.Chain(gs.Conv((3,), (2, 4), pad=1), gs.MaxPool((2,))), images(8, 2, 3))
    same_as_torch(torch, gs.Conv((2, 1, 3), (2, 4), pad=(1, 0, 2)), images(5, 6, 7, 2, 3))


@pytest.mark.parametrize("function", list(torch_modules._FUNCTIONS), ids=lambda f: f.__name__)
def test_every_function_gives_the_same_in_torch(torch, function):
    same_as_torch(torch, gs.Chain(function), images(6, 40) * 3)


def test_weights_are_copies_that_can_be_trained(torch):
    model = gs.Dense(2, 3)
    before = model.weight.copy()
    module = interop.to_torch(model)
    torch.nn.init.zeros_(module.weight)
    np.testing.assert_array_equal(model.weight, before)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(("layer", "match"), [
    (gs.Chain(gs.LSTM(2, 3)), r"layers\[0\]: LSTM\(2 => 3\).*by hand|layers\[0\]: LSTM.*by hand"),
    (gs.Chain(gs.Chain(lambda x: x)), r"layers\[0\]\.layers\[0\]: .*by hand"),
    (gs.Dense(2, 3, activations.lisht), r"σ: lisht: torch.nn has no"),
    (gs.ConvTranspose((3, 3), (4, 6), pad=(1, 0, 0, 0)), "alike on both sides"),
    (gs.Conv((1, 1, 1, 1), (1, 1)), "1 to 3 spatial axes"),
])  # fmt: skip
def test_what_torch_lacks_is_refused_by_path(torch, layer, match):
    with pytest.raises(gs.UnsupportedValueError, match=match):
        interop.to_torch(layer)


RECORDED = [path for path in sorted(FIXTURES.glob("*.json"))
            if json.loads(path.read_text()).get("forward")]  # fmt: skip
ALIKE = ("batchnorm", "conv_flux", "conv_nd", "conv_plain", "depthwise", "mlp_flux", "norms")


def outputs(torch: Any, path: Path) -> Iterator[tuple[Any, Any]]:
    """Yield torch's output and Julia's, of the recorded models that torch has all layers of."""
    root = gs.load(path.with_suffix(".bson"))
    for record in json.loads(path.read_text())["forward"]:
        with np.load(path.with_suffix(".npz")) as numbers, torch.no_grad():
            if "npz" not in record.get("input", ()):
                continue
            given, expected = (numbers[record[name]["npz"]] for name in ("input", "output"))
            with contextlib.suppress(gs.UnsupportedValueError):
                module = interop.to_torch(root[record["model"]], ndim=given.ndim)
                found = module(torch.from_numpy(np.ascontiguousarray(given.T)))
                yield found.numpy().T, expected


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_the_forward_passes_that_julia_recorded(torch, path):
    compared = 0
    for found, expected in outputs(torch, path):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        compared += 1
    if not compared:
        assert not path.stem.startswith(ALIKE)
        pytest.skip("no recorded model of layers that torch has")
