"""What only a real GPU can show: CuPy's and PyTorch's arrays, streams, memory and kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from test_kernels import SHAPES, VECTORS, octets

import gpustore as gs
from gpustore import kernels, ring, staging
from gpustore.digest import blake3_digest

MIB = 2**20


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    """Yield the real CuPy, with all it has pooled given back at the end."""
    status = gs.cuda_status()
    if not status:
        pytest.skip(f"there is no GPU: {status.message}")
    import cupy as real

    yield real
    real.get_default_memory_pool().free_all_blocks()


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("PyTorch has no CUDA here")
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.bson"


def float_matrix(nbytes: int, seed: int = 0) -> Any:
    """Return a matrix of 256 rows of any bits that are numbers, infinite or not."""
    bits = np.random.default_rng(seed).integers(0, 2**31, nbytes // 4, np.int32)
    return bits.view("f4").reshape(256, -1)


def same_bits(found: Any, expected: Any) -> None:
    found, expected = gs.cpu(found), gs.cpu(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


# --- kernels ----------------------------------------------------------------------------------


def test_digests_are_those_of_the_host(cupy):
    host = [octets(nbytes, 1) for nbytes in (*VECTORS, 3 * MIB + 1, 65 * MIB)]
    arrays = [cupy.asarray(array) for array in host]
    arrays += [array[1:] for array in arrays[1:]]  # not aligned to anything
    host += [array[1:] for array in host[1:]]
    found = kernels.digests(arrays)
    assert found is not None, "the kernels cannot be compiled here"
    assert found == [blake3(array.tobytes()).digest() for array in host]


def test_an_array_above_4_gib_is_hashed(cupy):
    nbytes = 2**32 + 3
    if cupy.cuda.runtime.memGetInfo()[0] < 2 * nbytes:
        pytest.skip("the GPU has no 8 GiB free")
    array = cupy.zeros(nbytes, np.uint8)
    array[::MIB] = 7
    found = kernels.digests([array])
    assert found == [blake3_digest(array.get())]


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8", "c16"])
@pytest.mark.parametrize("shape", [*SHAPES, (4097, 1023)])
def test_matrices_are_turned(cupy, shape, dtype):
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    matrix = np.asfortranarray(octets(nbytes).view(dtype).reshape(shape))
    (start,) = staging.origins({"cuda:0"}).values()
    found = kernels.flat_octets(cupy.asarray(matrix), start)
    assert found.get().tobytes() == matrix.tobytes("C")


def test_arrays_of_any_size_and_alignment_are_gathered_and_scattered(cupy):
    sizes = [1, 15, 16, 17, 4096, 16384, 16385, 100_003] * 50
    host = [octets(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    for shift in (0, 1):
        arrays = [cupy.asarray(array)[shift:] for array in host]
        for one, array in zip(kernels.gathered(arrays), host, strict=True):
            assert one.tobytes() == array[shift:].tobytes()
    targets = [cupy.zeros(nbytes, np.uint8) for nbytes in sizes]
    assert kernels.scatter(list(zip(targets, host, strict=True))) == []
    for target, array in zip(targets, host, strict=True):
        same_bits(target, array)


# --- saving and loading -----------------------------------------------------------------------


def mixed() -> dict[str, Any]:
    """Return arrays of many sizes, orders and dtypes, on the host."""
    model: dict[str, Any] = {f"a{n}": octets(n, n) for n in (0, 1, 100, 256 * 1024, 9 * MIB + 5)}
    model["c"], model["f"] = float_matrix(40 * MIB), np.asfortranarray(float_matrix(20 * MIB))
    model["strided"] = float_matrix(4 * MIB)[:, ::2]
    model["layer"] = gs.Chain(gs.Dense(float_matrix(12 * MIB), np.arange(256, dtype="f4")))
    kinds = ("?", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16")
    return model | {f"t{k}": (np.arange(70_000 + i) % 100).astype(k) for i, k in enumerate(kinds)}


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_model_on_the_gpu_is_saved_as_the_bytes_of_its_host_twin(file, layout):
    host = mixed()
    gs.save(file, host, layout=layout)
    expected = file.read_bytes()
    there = gs.gpu(host)
    assert gs.device_of(there) == "cuda:0"
    gs.save(file, there, layout=layout, durable=False)
    assert file.read_bytes() == expected
    found = gs.load(file, device="cuda", verify=True)
    assert gs.device_of(found) == "cuda:0"
    for one, other in zip(gs.params(found), gs.params(host), strict=True):
        same_bits(one, other)


def test_bfloat16_travels(file, cupy):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = (np.arange(3 * MIB) % 100).astype(ml_dtypes.bfloat16)
    try:
        there = cupy.asarray(array)
    except ValueError as error:
        pytest.skip(f"this CuPy has no bfloat16: {error}")
    gs.save(file, there, on_gpu="tag")
    same_bits(gs.load(file, verify=True), array)


@pytest.mark.parametrize("nbytes", [100, 40 * MIB])
def test_a_save_waits_for_the_callers_stream(file, cupy, nbytes):
    array = cupy.zeros(nbytes, np.uint8)
    work = cupy.zeros((4096, 4096), "f4")
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True):
        for _ in range(200):
            work += work  # that the GPU takes some time for
        array.fill(7)
        gs.save(file, array=array)
    assert (gs.load(file, "array", verify=True) == 7).all()


def test_what_is_loaded_is_whole_on_any_stream(file, cupy):
    gs.save(file, a=np.full(60 * MIB, 3, np.uint8))
    with cupy.cuda.Stream(non_blocking=True):
        first = gs.load(file, "a", device="cuda")
    assert bool((first == 3).all())


def test_ten_thousand_small_arrays_travel(file, cupy):
    whole = cupy.asarray(octets(10_000 * 1024))
    model = {f"a{i}": whole[1024 * i : 1024 * (i + 1)] for i in range(10_000)}
    gs.save(file, model, on_gpu="tag")
    found = gs.load(file, verify=True)
    same_bits(cupy.concatenate([found[name] for name in model]), whole)


def test_the_plain_way_is_the_same(file, monkeypatch):
    there = gs.gpu(mixed())
    gs.save(file, there)
    expected = file.read_bytes()
    monkeypatch.setenv("GPUSTORE_RING_MIB", "0")
    gs.save(file, there)
    assert file.read_bytes() == expected
    for one, other in zip(gs.params(gs.load(file, device="cuda")), gs.params(there), strict=True):
        same_bits(one, other)


# --- PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool"])
@pytest.mark.parametrize("count", [7, 9_000_000])
def test_tensors_travel_both_ways(file, torch, dtype, count):
    kind = getattr(torch, dtype)
    tensor = torch.arange(count, device="cuda").remainder(2).to(kind).reshape(-1, 1).expand(-1, 2)
    tensor = tensor.contiguous().requires_grad_(dtype == "float32")
    gs.save(file, weight=tensor, on_gpu="tag")
    found = gs.load(file, "weight", framework="torch", verify=True)
    assert found.device.type == "cuda" and found.dtype == kind and torch.equal(found, tensor)
    host = gs.load(file, "weight", device="cpu", framework="torch")
    assert host.device.type == "cpu" and torch.equal(host, tensor.detach().cpu())


@pytest.mark.parametrize("count", [100, 40 * MIB])
def test_a_save_waits_for_the_current_stream_of_pytorch(file, torch, count):
    tensor, work = torch.zeros(count, dtype=torch.uint8, device="cuda"), torch.zeros(2**24).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(200):
            work += 1
        tensor.fill_(7)
        gs.save(file, tensor=tensor)
    assert (gs.load(file, "tensor", verify=True) == 7).all()


# --- when something fails ---------------------------------------------------------------------


@pytest.mark.parametrize("ring_mib", ["128", "0"])
def test_without_room_on_the_gpu_a_load_releases_all(file, cupy, ring_mib, monkeypatch):
    monkeypatch.setenv("GPUSTORE_RING_MIB", ring_mib)
    gs.save(file, {f"a{i}": octets(16 * MIB, i) for i in range(8)})
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    used, limit = pool.used_bytes(), pool.get_limit()
    try:
        pool.set_limit(size=used + 60 * MIB)
        with pytest.raises(gs.DeviceMemoryError, match="cuda:0: expected room for 16777216 bytes"):
            gs.load(file, device="cuda")
        assert pool.used_bytes() <= used
    finally:
        pool.set_limit(size=limit)
    assert gs.device_of(gs.load(file, device="cuda", verify=True)) == "cuda:0"


def test_a_full_gpu_can_be_saved_from(file, cupy):
    host = mixed()
    there = gs.gpu(host)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    limit = pool.get_limit()
    try:
        pool.set_limit(size=pool.total_bytes())
        gs.save(file, there)
    finally:
        pool.set_limit(size=limit)
    for one, other in zip(gs.params(gs.load(file, verify=True)), gs.params(host), strict=True):
        same_bits(one, other)


def in_capture(cupy: Any, job: Callable[[], Any]) -> None:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            job()
        finally:
            try:
                stream.end_capture()
            except RuntimeError:  # what was captured is void
                assert not stream.is_capturing()


@pytest.mark.parametrize("nbytes", [100, 20 * MIB])
@pytest.mark.parametrize("job", ["save", "load"])
def test_while_a_graph_is_captured_nothing_is_saved_or_loaded(file, cupy, job, nbytes):
    array = cupy.asarray(octets(nbytes))
    gs.save(file, array=array, on_gpu="tag")
    before = file.read_bytes()
    jobs = {"save": lambda: gs.save(file, array=array), "load": lambda: gs.load(file)}
    with pytest.raises(gs.DeviceError, match="a CUDA graph is being captured"):
        in_capture(cupy, jobs[job])
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    same_bits(gs.load(file, "array", verify=True), array)


def test_ctrl_c_leaves_nothing_in_use(file, cupy):
    there = {f"a{i}": cupy.asarray(octets(30 * MIB, i)) for i in range(3)}
    gs.save(file, there, on_gpu="tag")
    before, used = file.read_bytes(), cupy.get_default_memory_pool().used_bytes()

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for job in (lambda: gs.save(file, there, progress=interrupted),
                lambda: gs.load(file, progress=interrupted)):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            job()
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]
    assert cupy.get_default_memory_pool().used_bytes() <= used
    assert ring.GROUP_NBYTES < 30 * MIB  # these went through the ring
