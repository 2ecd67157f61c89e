"""The CUDA kernels: their arithmetic on the host, and that they compile for real architectures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from host import KERNELS, HostModule, kernel_names
from hypothesis import given, settings
from hypothesis import strategies as st

import gpustore as gs
from gpustore import kernels, ring, staging
from gpustore.fake_cuda import fake_cuda

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# the lengths of the official test vectors, and both sides of each edge of this tree
VECTORS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2048, 2049, 3072,
           3073, 4096, 4097, 5120, 5121, 6144, 6145, 7168, 7169, 8192, 8193, 16384, 31744, 102400,
           256 * 1024, 256 * 1024 + 1, 257 * 1024, 511 * 1024, 513 * 1024 - 1]  # fmt: skip


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where compiled kernels are kept for the session."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def cupy(built: Path) -> Iterator[Any]:
    """Yield the fake CuPy with the kernels: 2 devices; `modules` lists what was compiled."""
    with fake_cuda(2) as fake:
        yield with_kernels(fake, built)


def with_kernels(fake: Any, built: Path) -> Any:
    fake.modules = []

    def compiled(code: str, options: tuple[str, ...]) -> HostModule:
        fake.modules.append(HostModule(built, fake.machine, code))
        return fake.modules[-1]

    fake.RawModule = compiled
    return fake


def octets(nbytes: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def launches(cupy: Any) -> list[str]:
    return [name for module in cupy.modules for name in module.launches]


def expected(arrays: list[Any]) -> list[bytes]:
    return [blake3(array.tobytes()).digest() for array in arrays]


def test_every_kernel_has_a_name_that_the_host_knows():
    names = {file.stem: kernel_names(file.read_text()) for file in KERNELS.glob("*.cu")}
    assert names == {
        "blake3": ["blake3_chunks", "blake3_parents"],
        "pack": ["copy_arrays", "turn_1", "turn_2", "turn_4", "turn_8", "turn_16"],
    }


def test_digests_at_the_lengths_of_the_test_vectors_in_one_batch(cupy):
    pattern = np.arange(max(VECTORS)) % 251  # the content that the vectors are made of
    arrays = [pattern[:nbytes].astype(np.uint8) for nbytes in VECTORS]
    assert kernels.digests([cupy.asarray(array) for array in arrays]) == expected(arrays)
    assert launches(cupy) == ["blake3_chunks", "blake3_parents", "blake3_parents"]
    assert kernels.digests([]) == []


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([0, 1, 4])), min_size=1))
def test_digests_of_any_batch_at_any_alignment(built, described):
    with fake_cuda(1) as fake:
        cupy, arrays = with_kernels(fake, built), []
        for seed, (nbytes, shift) in enumerate(described):
            arrays.append(cupy.asarray(octets(nbytes + shift, seed))[shift:])
        assert kernels.digests(arrays) == expected([array.get() for array in arrays])


@pytest.mark.parametrize("nbytes", [4 * 2**20, 65536 * 1024 + 1])
def test_digests_of_trees_of_three_and_four_levels(cupy, nbytes):
    array = np.zeros(nbytes, np.uint8)
    array[:: 2**16] = octets(len(array[:: 2**16]))
    assert kernels.digests([cupy.asarray(array)]) == expected([array])


def test_digests_of_much_are_made_in_batches(cupy, monkeypatch):
    monkeypatch.setattr(kernels, "_BATCH_NBYTES", 5000)
    arrays = [octets(nbytes, nbytes) for nbytes in (0, 1, 3000, 3000, 9000, 0, 2000)]
    assert kernels.digests([cupy.asarray(array) for array in arrays]) == expected(arrays)
    assert 2 < launches(cupy).count("blake3_chunks") < len(arrays)


def test_digests_wait_for_the_current_stream(cupy):
    array = cupy.asarray(np.zeros(100, np.uint8))
    stream = cupy.cuda.Stream()
    with stream:
        stream.launch(lambda: array._host.fill(7))
        assert kernels.digests([array]) == expected([np.full(100, 7, np.uint8)])


SHAPES = [(1, 1), (1, 100), (100, 1), (31, 33), (32, 32), (64, 96), (33, 65)]


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8", "c16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_turned(cupy, shape, dtype):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    matrix = np.asfortranarray((octets(nbytes) % 100).view("u1").view(dtype).reshape(shape))
    (start,) = staging.origins({"cuda:0"}).values()
    found = kernels.flat_octets(cupy.asarray(matrix), start)
    assert found.get().tobytes() == matrix.tobytes("C")
    turned = 0 if matrix.flags.c_contiguous else 1
    assert launches(cupy) == [f"turn_{matrix.itemsize}"] * turned


def test_a_matrix_of_numbers_that_are_not_aligned_is_left_to_cupy(cupy):
    flat = cupy.asarray(np.arange(13, dtype="f8"))
    off = flat[1 + flat.data.ptr % 16 // 8 :]  # complex numbers at multiples of 8, not of 16
    matrix = off[: len(off) // 2 * 2].view("c16").reshape(-1, 1)[:4].reshape(2, 2).T
    (start,) = staging.origins({"cuda:0"}).values()
    found = kernels.flat_octets(matrix, start)
    assert found.get().tobytes() == matrix.get().tobytes("C") and launches(cupy) == []


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 40_000), st.sampled_from([0, 1, 8])), min_size=1))
def test_arrays_are_gathered_in_one_launch(built, described):
    with fake_cuda(1) as fake:
        cupy, arrays = with_kernels(fake, built), []
        for seed, (nbytes, shift) in enumerate(described):
            arrays.append(cupy.asarray(octets(nbytes + shift, seed))[shift:])
        found = kernels.gathered(arrays)
        assert launches(cupy) == ["copy_arrays"]
        for one, array in zip(found, arrays, strict=True):
            np.testing.assert_array_equal(one, array.get())


def test_a_kernel_that_cannot_be_compiled_is_said_and_done_without(tmp_path, caplog):
    def failing(code: str, options: tuple[str, ...]) -> Any:
        raise RuntimeError("libnvrtc.so.12 not found")

    with fake_cuda(1) as cupy:
        cupy.RawModule = failing
        model = [cupy.asarray(octets(500_000)), cupy.asarray(octets(100))]
        gs.save(tmp_path / "model.bson", model)
        assert caplog.text.count("libnvrtc.so.12 not found") == 2  # once for each source
    loaded = gs.load(tmp_path / "model.bson", verify=True)
    np.testing.assert_array_equal(loaded[0], octets(500_000))


def test_a_gpu_without_room_for_the_kernels_is_asked_again(cupy):
    compiled, array = cupy.RawModule, cupy.asarray(octets(100))

    def failing(code: str, options: tuple[str, ...]) -> Any:
        raise cupy.cuda.driver.CUDADriverError(2)

    cupy.RawModule = failing
    assert kernels.digests([array]) is None
    cupy.RawModule = compiled
    assert kernels.digests([array]) == expected([array.get()])


# --- in saving and loading --------------------------------------------------------------------

GROUP, LANE = 4096, 64 * 1024


@pytest.fixture
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LANE_NBYTES", LANE)
    monkeypatch.setattr(ring, "GROUP_NBYTES", GROUP)


def model_on(cupy: Any) -> dict[str, Any]:
    weight = octets(4 * 200 * 300).view("f4").reshape(200, 300)
    arrays = {f"a{n}": cupy.asarray(octets(n, n)) for n in (1, 100, GROUP, LANE + 1, 3 * LANE)}
    layer = gs.Dense(cupy.asarray(weight), cupy.asarray(weight[:, 0].copy()))
    return arrays | {"layer": layer, "host": octets(9 * GROUP)}


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_save_with_digests_of_the_device_is_that_of_the_host(
    tmp_path, cupy, small_lanes, layout, monkeypatch
):
    model = model_on(cupy)
    gs.save(tmp_path / "device.bson", model, layout=layout)
    assert {"blake3_chunks", "copy_arrays", "turn_4"} <= set(launches(cupy))
    monkeypatch.setenv("GPUSTORE_RING_MIB", "0")
    gs.save(tmp_path / "host.bson", model, layout=layout)
    assert (tmp_path / "device.bson").read_bytes() == (tmp_path / "host.bson").read_bytes()
    assert cupy.machine.violations == []


# --- loadparams -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 90), st.sampled_from("CF"), st.integers(0, 2))))
def test_loadparams_scatters_what_the_plain_way_copies(built, described):
    with fake_cuda(2) as fake, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_SMALL_NBYTES", 8 * 80 * 3)
        patch.setattr(kernels, "_SLAB_NBYTES", 8 * 80 * 6)
        cupy, model, weights = with_kernels(fake, built), [], []
        for seed, (rows, order, device) in enumerate(described):
            array = np.asarray(np.zeros((rows, 3)), order=order)
            model.append(array if device == 2 else gs.gpu(array, device))
            weights.append(octets(rows * 3, seed).reshape(rows, 3).astype("f4"))
        gs.loadparams(model, weights)
        for target, weight in zip(model, weights, strict=True):
            np.testing.assert_array_equal(gs.cpu(target), weight)
        small = [d for rows, _, d in described if 0 < rows <= 80 and d != 2]
        assert len(set(small)) <= len(launches(cupy)) <= len(small)
        assert cupy.machine.violations == []


def test_loadparams_of_many_small_arrays_is_one_copy_and_one_launch(cupy):
    model = [cupy.asarray(np.zeros(256, "f4")) for _ in range(10_000)]
    weights = [np.full(256, n, "f4") for n in range(10_000)]
    gs.loadparams(model, weights)
    assert launches(cupy) == ["copy_arrays"]
    assert all(model[n][0].item() == n for n in range(10_000))


# --- when something fails ---------------------------------------------------------------------


def test_where_the_device_has_no_room_the_host_hashes_and_arrays_come_one_by_one(tmp_path, cupy):
    arrays = {f"a{n}": octets(n, n) for n in (100, 3000, 300_000)}
    model = {name: cupy.asarray(array) for name, array in arrays.items()}
    kernels.digests([model["a100"]])  # compiled
    cupy.machine.memory_nbytes = 0  # for more than what is there
    assert kernels.digests([*model.values()]) is None
    gs.save(tmp_path / "m.bson", model)
    assert "copy_arrays" not in launches(cupy)
    found = gs.load(tmp_path / "m.bson", verify=True)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    gs.loadparams(model, [octets(array.size, 7) for array in arrays.values()])
    for array in model.values():
        np.testing.assert_array_equal(array.get(), octets(array.size, 7))
    assert cupy.machine.violations == []


@pytest.mark.parametrize("status", [2, 719])
@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("job", ["save", "load", "loadparams"])
def test_a_kernel_that_is_not_launched_is_a_typed_error(
    tmp_path, built, small_lanes, job, nth, status
):
    path = tmp_path / "m.bson"
    with fake_cuda(2) as fake:
        cupy = with_kernels(fake, built)
        model = model_on(cupy)
        gs.save(path, model, on_gpu="tag")
        before = path.read_bytes()
        jobs = {
            "save": lambda: gs.save(path, model),
            "load": lambda: gs.load(path, verify=True),
            "loadparams": lambda: gs.loadparams(model, gs.params(gs.load(path, device="cpu"))),
        }
        cupy.machine.faults["launch"] = nth, status
        error = None
        try:
            jobs[job]()
        except gs.DeviceError as found:
            error = str(found)
        if error is None:  # so many launches there were not, or it is done without
            assert status == 2 or cupy.machine.faults["launch"][0] >= 0
        else:
            assert "LaunchFailure" in error and status == 719  # what another lane met may be first
            assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        assert cupy.machine.pinned_nbytes == 0 and cupy.machine.violations == []


# --- verified loading -------------------------------------------------------------------------

NAMES = ["a1", "a100", f"a{GROUP}", f"a{LANE + 1}", f"a{3 * LANE}", "host", "extra"]
PLACES = {name: f"cuda:{n % 2}" for n, name in enumerate([*NAMES, "m"]) if name != "host"}


def saved_for_devices(path: Path, layout: str) -> dict[str, Any]:
    """Save arrays of many sizes, tagged for two devices and untagged; return them."""
    arrays = {name: octets(9 * GROUP if name in ("host", "extra") else int(name[1:]), 7)
              for name in NAMES}  # fmt: skip
    arrays["m"] = octets(4 * 200 * 300).view("f4").reshape(200, 300)
    model = {name: gs.gpu(array, PLACES[name]) if name in PLACES else array
             for name, array in arrays.items()}  # fmt: skip
    gs.save(path, model, on_gpu="tag", layout=layout)
    return arrays


def damage(path: Path, name: str) -> None:
    content = bytearray(path.read_bytes())
    with gs.open_file(path) as stored:
        offsets = {entry.path: entry.offset for entry in stored.arrays}
    content[content.rindex(b"_gpustore") if name == "structure" else offsets[name]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("device", [None, "cuda:1"])
@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_verified_load_hashes_on_the_devices(tmp_path, cupy, small_lanes, layout, device):
    arrays = saved_for_devices(tmp_path / "m.bson", layout)
    cupy.modules[0].launches.clear()
    told: list[tuple[int, int]] = []
    found = gs.load(
        tmp_path / "m.bson", device=device, verify=True, progress=lambda *at: told.append(at)
    )
    assert launches(cupy).count("blake3_chunks") == (2 if device is None else 1)
    for name, array in arrays.items():
        assert gs.device_of(found[name]) == (device or PLACES.get(name, "cpu"))
        np.testing.assert_array_equal(gs.cpu(found[name]), array)
    size = (tmp_path / "m.bson").stat().st_size
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (size, size)
    assert cupy.machine.violations == []


@pytest.mark.parametrize("name", [*NAMES, "m", "structure"])
@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_verified_load_names_what_is_damaged(tmp_path, cupy, small_lanes, layout, name):
    path = tmp_path / "m.bson"
    saved_for_devices(path, layout)
    damage(path, name)
    for device in (None, "cuda:0"):
        with pytest.raises(gs.IntegrityError, match=f"differs for {name}; the file was damaged"):
            gs.load(path, device=device, verify=True)
    with pytest.raises(gs.IntegrityError, match=f"differs for {name}; "):
        gs.load(path, "m", device="cuda:0", verify=True)  # the whole file, as on the CPU


def test_what_goes_wrong_on_the_way_to_a_device_is_found(tmp_path, cupy, small_lanes, monkeypatch):
    path = tmp_path / "m.bson"
    saved_for_devices(path, "detached")
    to_device = staging.Lane.to_device

    def faulty(lane: Any, into: Any, start: int, nbytes: int) -> None:
        lane.host[nbytes - 1] ^= 1  # of the last member of a group
        to_device(lane, into, start, nbytes)

    monkeypatch.setattr(staging.Lane, "to_device", faulty)
    with pytest.raises(gs.IntegrityError, match=r"m on cuda:0, .* the file is whole") as caught:
        gs.load(path, "m", device="cuda:0", verify=True)
    assert caught.value is not None and cupy.machine.used_nbytes == [0, 0]


def test_without_kernels_the_file_is_verified(tmp_path, small_lanes):
    with fake_cuda(2):
        path = tmp_path / "m.bson"
        arrays = saved_for_devices(path, "inline")
        np.testing.assert_array_equal(gs.cpu(gs.load(path, verify=True)["m"]), arrays["m"])
        damage(path, "m")
        with pytest.raises(gs.IntegrityError, match="differs for m; the file was damaged"):
            gs.load(path, verify=True)
