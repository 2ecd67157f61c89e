"""Device policies, on the strict fake device everywhere and on a real GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest

import gpustore as gs
from gpustore import testing
from gpustore.testing import fake_cuda


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.bson"


def trained() -> gs.Chain:
    rng = np.random.default_rng(3)
    return gs.Chain(gs.Dense(4, 3, gs.relu, rng=rng), gs.Dense(3, 2, rng=rng), gs.softmax)


def test_gpu_and_cpu_move_a_model_and_keep_sharing(cuda):
    model = trained()
    model[1].bias = model[0].bias
    there = gs.gpu(model)
    assert gs.device_of(there) == "cuda:0" and there[1].bias is there[0].bias
    back = gs.cpu(there)
    assert gs.device_of(back) == "cpu" and back[1].bias is back[0].bias
    assert repr(there) == repr(model)
    testing.assert_same(back[0].weight, model[0].weight)


def test_the_forward_pass_stays_on_the_device(cuda):
    model, x = trained(), np.random.default_rng(0).normal(size=(4, 5)).astype("f4")
    output = gs.gpu(model)(gs.gpu(x))
    assert gs.device_of(output) == "cuda:0"
    np.testing.assert_allclose(gs.cpu(output), model(x), rtol=1e-5)


def test_transfer_writes_a_cpu_file(cuda, file):
    gs.save(file, model=gs.gpu(trained()))
    with gs.open_file(file) as stored:
        assert stored.tags == {} and {entry.device for entry in stored.arrays} == {"cpu"}
    loaded = gs.load(file, "model")
    assert gs.device_of(loaded) == "cpu"
    testing.assert_same(loaded[0].bias, trained()[0].bias)


def test_a_gpu_model_is_written_as_the_same_bytes_as_its_cpu_twin(cuda, file):
    model = trained()
    gs.save(file, model=model)
    expected = file.read_bytes()
    gs.save(file, model=gs.gpu(model))
    assert file.read_bytes() == expected


def test_tag_writes_the_device_and_load_puts_arrays_back(cuda, file):
    model = trained()
    gs.save(file, model=gs.gpu(model), host=np.ones(2), on_gpu="tag")
    with gs.open_file(file) as stored:
        assert stored.tags == {"cuda:0": 4}
    loaded = gs.load(file)
    assert gs.device_of(loaded["model"]) == "cuda:0" and gs.device_of(loaded["host"]) == "cpu"
    assert gs.device_of(gs.load(file, device="cpu")) == "cpu"
    assert gs.device_of(gs.load(file, device="cuda")) == "cuda:0"
    testing.assert_same(gs.cpu(loaded["model"])[0].bias, model[0].bias)


def test_error_refuses_and_names_the_arrays(cuda, file):
    with pytest.raises(gs.UnsupportedValueError, match=r"4 arrays.*model\.layers\[0\]\.weight"):
        gs.save(file, model=gs.gpu(trained()), on_gpu="error")
    assert not file.exists()
    gs.save(file, model=trained(), on_gpu="error")


def test_column_and_row_major_arrays_keep_their_order_through_the_device(cuda, file):
    table = np.arange(6.0).reshape(2, 3)
    gs.save(file, c=gs.gpu(table), f=gs.gpu(np.asfortranarray(table)))
    loaded = gs.load(file)
    assert loaded["c"].flags.c_contiguous and loaded["f"].flags.f_contiguous
    assert np.array_equal(loaded["c"], table) and np.array_equal(loaded["f"], table)


def test_device_may_be_a_mapping_or_a_callable(file):
    with fake_cuda(2):
        gs.save(file, a=gs.gpu(np.ones(2), "cuda:1"), b=np.zeros(2), on_gpu="tag")
        moved = gs.load(file, device={"cuda:1": "cuda:0"})
        assert gs.device_of(moved["a"]) == "cuda:0" and gs.device_of(moved["b"]) == "cpu"
        seen = []
        gs.load(file, device=lambda tag: seen.append(tag))
        assert set(seen) == {"cpu", "cuda:1"}
        assert gs.device_of(gs.load(file, "b", device={"cpu": "cuda:1"})) == "cuda:1"


def test_only_the_wanted_entries_decide_what_devices_are_needed(file):
    with fake_cuda(1):
        gs.save(file, a=gs.gpu(np.ones(2)), b=np.zeros(2), on_gpu="tag")
    with fake_cuda(fail="cupy-missing"):
        assert gs.load(file, "b").tolist() == [0, 0]


CAUSES = ["cupy-missing", "broken", "no-driver", "no-device"]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_tagged_file_does_not_load_without_cuda_and_says_the_way_out(file, cause):
    with fake_cuda(1):
        gs.save(file, model=gs.gpu(trained()), on_gpu="tag")
    with fake_cuda(fail=cause):
        with pytest.raises(gs.CUDAUnavailableError) as error:
            gs.load(file, "model")
        assert error.value.cause == {"broken": "cupy-broken"}.get(cause, cause)
        for part in (str(file), "4 arrays are tagged cuda:0", "device='cpu'", "cpu(model)"):
            assert part in str(error.value)
        assert gs.device_of(gs.load(file, "model", device="cpu")) == "cpu"


def test_an_ordinal_that_is_not_there_is_its_own_cause(file):
    with fake_cuda(2):
        gs.save(file, a=gs.gpu(np.ones(2), 1), on_gpu="tag")
    with fake_cuda(1):
        with pytest.raises(gs.CUDAUnavailableError) as error:
            gs.load(file)
        assert error.value.cause == "no-such-ordinal"


def test_gpu_without_cuda_warns_once_and_changes_nothing():
    model = trained()
    with fake_cuda(fail="no-driver"):
        with pytest.warns(UserWarning, match="stays on the CPU") as warned:
            assert gs.gpu(model) is model
        assert len(warned) == 1
        with pytest.raises(gs.CUDAUnavailableError):
            gs.gpu(model, "cuda:0")


def test_loadparams_and_loadmodel_copy_onto_the_models_device(cuda):
    source, target = trained(), gs.gpu(trained())
    source[0].weight = source[0].weight + 1
    gs.loadparams(target, gs.params(source))
    testing.assert_same(gs.cpu(target)[0].weight, source[0].weight)
    source[0].weight = source[0].weight + 1
    gs.loadmodel(target, gs.state(source))
    testing.assert_same(gs.cpu(target)[0].weight, source[0].weight)


def test_device_of_a_model_on_two_devices_names_both():
    with fake_cuda(1), pytest.raises(gs.MismatchError, match=r"x\[0\] on cpu, x\[1\] on cuda:0"):
        gs.device_of([np.ones(2), gs.gpu(np.ones(2))])


def test_nothing_large_is_read_before_the_failure(file):
    with fake_cuda(1) as cupy:
        gs.save(file, a=gs.gpu(np.ones(2**16)), on_gpu="tag")
        assert [kind for kind, _ in cupy.transfers].count("d2h") == 1
    with fake_cuda(fail="no-device"), pytest.raises(gs.CUDAUnavailableError):
        gs.load(file)


def test_out_of_device_memory_says_what_was_asked_and_what_is_free(file):
    with fake_cuda(1, memory_nbytes=600) as cupy:
        gs.save(file, a=np.ones(4), b=np.ones(100))
        with pytest.raises(gs.DeviceMemoryError, match="1056 bytes, found 600 free of 600"):
            gs.load(file, device="cuda")
        assert cupy.machine.used_nbytes == [0]


@pytest.mark.parametrize("device", ["tpu", "cuda:-1", "cuda:x", 3.5])
def test_unknown_devices_are_refused(file, device):
    gs.save(file, a=1)
    with pytest.raises(gs.UnsupportedValueError):
        gs.load(file, device=device)
