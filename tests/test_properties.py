"""Round trips of generated arrays, values and models; the GPU's part by the strict fake device."""

from __future__ import annotations

import tempfile

import numpy as np
from hypothesis import given

import gpustore as gs
from gpustore import testing
from gpustore.testing import fake_cuda


@given(testing.arrays())
def test_any_array_comes_back_bit_for_bit(array):
    testing.assert_roundtrip(array)


@given(testing.values())
def test_any_value_comes_back_with_its_types_and_sharing(value):
    testing.assert_roundtrip(value, through=("cpu", "cuda-tagged"))


@given(testing.models())
def test_any_model_comes_back_and_computes_the_same(model):
    loaded = testing.assert_roundtrip(model, through=("cpu", "cuda-tagged", "julia"))
    features = gs.params(model)[0].shape[1]
    x = np.linspace(-1, 1, features, dtype="f4").reshape(features, 1)
    np.testing.assert_allclose(loaded(x), model(x), rtol=1e-5, atol=1e-6)


@given(testing.models())
def test_any_gpu_model_is_saved_like_its_cpu_twin(model):
    with fake_cuda(1):
        testing.assert_roundtrip(gs.gpu(model))


@given(testing.models())
def test_any_tagged_model_goes_back_to_its_device(model):
    with fake_cuda(2), tempfile.TemporaryDirectory() as folder:
        model = gs.gpu(model, 1)
        gs.save(f"{folder}/m.bson", model=model, on_gpu="tag", durable=False)
        testing.assert_same(gs.load(f"{folder}/m.bson", "model"), model)


@given(testing.models())
def test_cpu_after_gpu_is_the_same_model(model):
    with fake_cuda(1):
        testing.assert_same(gs.cpu(gs.gpu(model)), gs.cpu(model))
