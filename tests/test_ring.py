"""Arrays between devices and files by the ring: the plain way's bytes, on a strict fake device."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpustore as gs
from gpustore import ring, staging, workers
from gpustore.fake_cuda import fake_cuda
from gpustore.fake_streams import FAULT_STAGES
from gpustore.storage import MappedFile

LANE = 64 * 1024
GROUP = 4 * 1024


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have arrays of some KiB take many pieces; all of it is by the fake, also under test-gpu."""
    monkeypatch.setattr(staging, "LANE_NBYTES", LANE)
    monkeypatch.setattr(ring, "GROUP_NBYTES", GROUP)
    monkeypatch.setattr(ring, "_MAX_LANES", 4)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.bson"


def on(device: int, array: Any, cupy: Any) -> Any:
    with cupy.cuda.Device(device):
        return cupy.asarray(array)


def values(nbytes: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def clean(cupy: Any, *, used: bool = False) -> None:
    """Nothing is left: no pinned memory, no lane, nothing that a real device would not forgive."""
    machine = cupy.machine
    assert machine.violations == []
    assert machine.pinned_nbytes == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("gpustore-lane")]
    if not used:
        assert machine.used_nbytes == [0, 0]


SIZES = st.sampled_from([0, 1, 100, GROUP - 4, GROUP, LANE - 4, LANE, LANE + 4, 3 * LANE + 8])
ARRAYS = st.lists(st.tuples(SIZES, st.sampled_from(["C", "F"]), st.sampled_from([0, 1, None])))


@settings(max_examples=40)
@given(ARRAYS, st.sampled_from(["inline", "detached"]), st.sampled_from(["transfer", "tag"]))
def test_the_ring_writes_what_the_plain_way_writes_and_loads_it_back(
    tmp_path_factory, described, layout, on_gpu
):
    folder = tmp_path_factory.mktemp("ring")
    with fake_cuda(2) as cupy, pytest.MonkeyPatch.context() as patch:
        model = []
        for seed, (nbytes, order, device) in enumerate(described):
            shape = (2, nbytes // 8) if nbytes % 8 == 0 else (nbytes,)
            dtype = "f4" if nbytes % 8 == 0 else "u1"
            array = np.asarray(values(nbytes, seed).view(dtype).reshape(shape), order=order)
            model.append(array if device is None else on(device, array, cupy))
        gs.save(folder / "ring.bson", model, layout=layout, on_gpu=on_gpu)
        loaded = gs.load(folder / "ring.bson", verify=True)
        patch.setenv("GPUSTORE_RING_MIB", "0")
        gs.save(folder / "plain.bson", model, layout=layout, on_gpu=on_gpu)
        twin = gs.load(folder / "plain.bson")
        assert (folder / "ring.bson").read_bytes() == (folder / "plain.bson").read_bytes()
        for source, array, other in zip(model, loaded, twin, strict=True):
            expected = "cpu" if on_gpu == "transfer" else gs.device_of(source)
            assert gs.device_of(array) == gs.device_of(other) == expected
            assert (array.flags.c_contiguous, array.dtype) == (
                other.flags.c_contiguous,
                other.dtype,
            )
            np.testing.assert_array_equal(gs.cpu(array), gs.cpu(source))
        clean(cupy, used=True)


def test_layers_with_row_major_weights_are_turned_on_the_device(file):
    with fake_cuda(2) as cupy:
        weight = values(4 * LANE).view("f4").reshape(256, -1)
        model = gs.Chain(gs.Dense(on(1, weight, cupy), on(1, weight[:, 0].copy(), cupy)))
        gs.save(file, model=model, on_gpu="tag")
        assert sum(nbytes for kind, nbytes in cupy.transfers if kind == "d2h") < 5 * LANE
        found = gs.load(file, "model", device="cuda:0")
        np.testing.assert_array_equal(found[0].weight.get(), weight)
        clean(cupy, used=True)


def test_where_the_device_has_no_room_for_a_turned_copy_the_host_turns_it(file):
    with fake_cuda(2, memory_nbytes=5 * LANE) as cupy:
        weight = values(4 * LANE).view("f4").reshape(256, -1)
        model = gs.Dense(cupy.zeros(weight.shape, "f4"), np.zeros(256, "f4"))
        model.weight.set(weight)
        gs.save(file, model=model)
        np.testing.assert_array_equal(gs.load(file, "model", verify=True).weight, weight)
        clean(cupy, used=True)


def test_pinned_memory_stays_within_the_ring(file, monkeypatch):
    monkeypatch.setenv("GPUSTORE_RING_MIB", "1")
    monkeypatch.setattr(staging, "LANE_NBYTES", 512 * 1024)
    with fake_cuda(2) as cupy:
        gs.save(file, [cupy.asarray(values(3 * 2**20)) for _ in range(3)], on_gpu="tag")
        gs.load(file)
        assert 0 < cupy.machine.pinned_peak_nbytes <= 2**20


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many"])
def test_a_size_of_the_ring_that_is_no_number_is_refused(file, text, monkeypatch):
    monkeypatch.setenv("GPUSTORE_RING_MIB", text)
    with fake_cuda(2) as cupy, pytest.raises(gs.UnsupportedValueError, match="GPUSTORE_RING_MIB"):
        gs.save(file, cupy.asarray(values(9)))
    assert not file.exists()


def test_thousands_of_small_arrays_are_a_few_copies(file):
    with fake_cuda(2) as cupy:
        model = {f"w{i}": cupy.asarray(values(1024, i)) for i in range(300)}
        del cupy.transfers[:]
        gs.save(file, model=model, on_gpu="tag")
        assert len(cupy.transfers) == -(-300 * 1024 // LANE)
        del cupy.transfers[:]
        found = gs.load(file, "model")
        assert len(cupy.transfers) == -(-300 * 1024 // LANE)
        for name, array in model.items():
            np.testing.assert_array_equal(found[name].get(), array.get())
        clean(cupy, used=True)


@pytest.mark.parametrize("nbytes", [100, GROUP * 3])
def test_a_save_waits_for_the_callers_stream(file, nbytes):
    with fake_cuda(2) as cupy:
        array = on(1, np.zeros(nbytes, np.uint8), cupy)
        with cupy.cuda.Device(1):
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.launch(lambda: array._host.fill(7))  # a kernel that has not run yet
                gs.save(file, array=array)
        assert (gs.load(file, "array") == 7).all()
        clean(cupy, used=True)


def test_one_array_in_two_places_stays_one(file):
    with fake_cuda(2) as cupy:
        array = cupy.asarray(values(LANE * 2))
        gs.save(file, a=array, b=[array], on_gpu="tag")
        found = gs.load(file)
        assert found["a"] is found["b"][0]
        clean(cupy, used=True)


def test_a_dtype_that_cupy_lacks_goes_the_plain_way_and_is_refused_by_it(file):
    with fake_cuda(2) as cupy:
        gs.save(file, [np.zeros(GROUP, ml_dtypes.bfloat16)])
        with pytest.raises(gs.UnsupportedValueError, match="dtype"):
            gs.load(file, device="cuda")
        clean(cupy)


def test_progress_counts_every_byte_once_on_the_callers_thread(file):
    with fake_cuda(2) as cupy:
        model = [cupy.asarray(values(nbytes)) for nbytes in (5 * LANE, 100, LANE, GROUP)]
        told, threads = [], set()

        def progress(done: int, total: int) -> None:
            told.append((done, total))
            threads.add(threading.current_thread())

        for job in (gs.save, gs.load):
            del told[:]
            job(file, *([model] if job is gs.save else []), progress=progress)
            assert told == sorted(told)
            assert told[-1] == (file.stat().st_size,) * 2
        assert threads == {threading.current_thread()}


# --- when something fails ---------------------------------------------------------------------


FAULTS = [(stage, nth, status) for stage in FAULT_STAGES for nth in range(9) for status in (2, 700)]


def failure_of(job: Callable[[], Any]) -> str | None:
    """Return the sentence of the device's error, None without one."""
    try:
        job()
    except (gs.DeviceError, gs.DeviceMemoryError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(("stage", "nth", "status"), FAULTS)
def test_a_fault_in_a_save_leaves_the_old_file_and_nothing_else(file, stage, nth, status):
    gs.save(file, old=1)
    before = file.read_bytes()
    with fake_cuda(2) as cupy:
        rows = values(4 * LANE).view("f4").reshape(256, -1)
        model = [on(i % 2, values(3 * LANE, i), cupy) for i in range(4)]
        model += [gs.Dense(cupy.asarray(rows), cupy.asarray(rows[:, 0].copy())), *model[:1]]
        cupy.machine.faults[stage] = nth, status
        sentence = failure_of(lambda: gs.save(file, model=model))
        if sentence is None:
            gs.load(file, verify=True)
            due = cupy.machine.faults[stage][0] < 0
            # no room for a turned copy; a last wait for what had been waited for
            assert not due or (stage, status) in {("memory", 2), ("wait", 2)}
        else:
            assert "cuda" in sentence or "pinned" in sentence
            assert file.read_bytes() == before
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        clean(cupy, used=True)


@pytest.mark.parametrize(("stage", "nth", "status"), FAULTS)
def test_a_fault_in_a_load_releases_what_was_placed(file, stage, nth, status):
    model = {f"w{i}": values(3 * LANE, i) for i in range(4)} | {"small": values(99)}
    gs.save(file, model=model)
    found = {}
    with fake_cuda(2) as cupy:
        cupy.machine.faults[stage] = nth, status
        sentence = failure_of(lambda: found.update(gs.load(file, "model", device="cuda:1")))
        if sentence is None:
            assert cupy.machine.faults[stage][0] >= 0 or (stage, status) == ("wait", 2)
            for name, array in model.items():
                np.testing.assert_array_equal(found[name].get(), array)
            found.clear()
        else:
            assert "cuda:1" in sentence or "pinned" in sentence
        clean(cupy)


@pytest.mark.parametrize("nbytes", [100, GROUP * 3])
def test_a_gpu_in_error_is_said_to_be(file, nbytes, monkeypatch):
    gs.save(file, old=1)
    before = file.read_bytes()
    for ring_mib in ("1", "0"):
        monkeypatch.setenv("GPUSTORE_RING_MIB", ring_mib)
        with fake_cuda(2) as cupy:
            array = on(1, values(nbytes), cupy)
            cupy.machine.status = 719  # a kernel of the caller's has failed
            with pytest.raises(gs.DeviceError, match="cuda:1: cudaErrorLaunchFailure.*restart"):
                gs.save(file, array=array)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("status", "advice"),
    [(46, "another process holds the GPU .nvidia-smi"), (719, "restart the process")],
)
@pytest.mark.parametrize("job", ["save", "load"])
def test_what_to_do_about_a_gpu_is_said(file, job, status, advice):
    with fake_cuda(2) as cupy:
        array = cupy.asarray(values(3 * LANE))
        gs.save(file, array=array, on_gpu="tag")
        before = file.read_bytes()
        cupy.machine.faults["stream"] = 0, status
        with pytest.raises(gs.DeviceError, match=f"cuda:0: cudaError.*{advice}"):
            gs.save(file, array=array) if job == "save" else gs.load(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("job", ["save", "load"])
def test_while_a_graph_is_captured_nothing_is_saved_or_loaded(file, job):
    with fake_cuda(2) as cupy:
        array = cupy.asarray(values(GROUP * 3))
        gs.save(file, array=array, on_gpu="tag")
        before, stream = file.read_bytes(), cupy.cuda.Stream(non_blocking=True)
        stream.is_captured = True
        with stream, pytest.raises(gs.DeviceError, match="capturing.*; a CUDA graph is being"):
            gs.save(file, array=array) if job == "save" else gs.load(file)
        clean(cupy, used=True)
    assert file.read_bytes() == before


def test_only_the_devices_of_the_arrays_are_used(file):
    with fake_cuda(2) as cupy:
        gs.save(file, a=on(1, values(3 * LANE), cupy), b=on(1, values(99), cupy), on_gpu="tag")
        gs.load(file, verify=True)
        assert cupy.machine.used_devices == {1}


@pytest.mark.parametrize("nth", range(6))
def test_a_full_disk_while_lanes_write_leaves_the_old_file(file, nth, monkeypatch):
    gs.save(file, old=1)
    before, calls, pwrite = file.read_bytes(), [], os.pwrite

    def failing(descriptor: int, octets: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == nth + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, octets[: max(len(octets) // 2, 1)], offset)  # short writes

    with fake_cuda(2) as cupy:
        model = [cupy.asarray(values(3 * LANE)) for _ in range(3)]
        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(OSError, match="expected room for"):
            gs.save(file, model)
        clean(cupy, used=True)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("job", ["save", "load"])
def test_ctrl_c_stops_the_lanes(file, job):
    with fake_cuda(2) as cupy:
        model = [cupy.asarray(values(9 * LANE, i)) for i in range(3)]
        gs.save(file, model, on_gpu="tag")
        before = file.read_bytes()

        def interrupted(done: int, total: int) -> None:
            raise KeyboardInterrupt  # as it arrives in the thread that waits for the lanes

        job = partial(gs.save, file, model) if job == "save" else partial(gs.load, file)
        with pytest.raises(KeyboardInterrupt):
            job(progress=interrupted)
        del job
        del model
        clean(cupy)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.fixture
def heard_ctrl_c():
    """SIGINT raises, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("job", ["save", "load"])
@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_while_the_lanes_work_waits_for_them(file, job, times, monkeypatch):
    with fake_cuda(2) as cupy:
        model = [cupy.asarray(values(9 * LANE, i)) for i in range(3)]
        gs.save(file, model, on_gpu="tag")
        before, left = file.read_bytes(), [times]
        name = "to_host" if job == "save" else "to_device"
        work = getattr(staging.Lane, name)

        def struck(lane: staging.Lane, *args: Any) -> Any:
            if left[0] > 0:
                left[0] -= 1
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return work(lane, *args)

        monkeypatch.setattr(staging.Lane, name, struck)
        with pytest.raises(KeyboardInterrupt):
            gs.save(file, model) if job == "save" else gs.load(file)
        del model
        clean(cupy)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_however_often_ctrl_c_comes_the_lanes_are_waited_for(monkeypatch):
    events = iter(["Ctrl-C", "Ctrl-C", "end"])
    running = []

    def joined() -> None:
        if next(events) == "Ctrl-C":
            raise KeyboardInterrupt
        running.clear()

    running.append(SimpleNamespace(is_alive=lambda: True, join=joined))
    monkeypatch.setattr(threading, "enumerate", lambda: running)
    with pytest.raises(KeyboardInterrupt):
        workers._join(running[:])
    assert not running


@pytest.mark.parametrize("nth", range(5))
def test_a_disk_that_cannot_be_read_releases_what_was_placed(file, nth, monkeypatch):
    gs.save(file, {f"w{i}": values(3 * LANE, i) for i in range(3)})
    calls, preadv = [], os.preadv

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) == nth + 1:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, buffers, offset)

    with fake_cuda(2) as cupy:
        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="Input/output error") as caught:
            gs.load(file, device="cuda:1")
        assert caught.value.errno == errno.EIO
        clean(cupy)


@pytest.mark.parametrize("nth", range(4))
def test_a_hash_that_fails_leaves_the_old_file(file, nth, monkeypatch):
    gs.save(file, old=1)
    before, calls = file.read_bytes(), []

    def failing(octets: Any) -> None:
        calls.append(len(octets))
        if len(calls) > nth:
            raise MemoryError("no room to hash")

    hasher = SimpleNamespace(update=failing, digest=lambda: bytes(32))
    with fake_cuda(2) as cupy:
        monkeypatch.setattr("gpustore.digest.blake3", mock.Mock(return_value=hasher))
        model = [cupy.asarray(values(2 * LANE, i)) for i in range(3)]
        with pytest.raises(MemoryError, match="no room to hash"):
            gs.save(file, model)
        clean(cupy, used=True)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# --- reading beside the mapping ---------------------------------------------------------------


@pytest.mark.parametrize("change", ["none", "replaced", "removed"])
def test_a_reader_gives_the_bytes_that_were_mapped(file, change):
    content = values(9000).tobytes()
    file.write_bytes(content)
    mapped = MappedFile.open(file)
    if change == "replaced":
        (file.parent / "new").write_bytes(bytes(9000))
        os.replace(file.parent / "new", file)
    elif change == "removed":
        file.unlink()
    octets, into = np.frombuffer(mapped.buffer, np.uint8), np.zeros(4000, np.uint8)
    with mapped.reader() as reader:
        reader.read(into, octets[5000:])
        assert into.tobytes() == content[5000:]
        reader.read(into, np.full(4000, 3, np.uint8))  # no view of the file
        assert (into == 3).all()


def test_a_file_cut_while_it_is_read_is_an_error_not_a_signal(file):
    file.write_bytes(bytes(9000))
    mapped = MappedFile.open(file)
    octets = np.frombuffer(mapped.buffer, np.uint8)
    with mapped.reader() as reader:
        os.truncate(file, 4096)
        with pytest.raises(gs.TruncatedFileError, match="expected 9000 bytes, found 4096"):
            reader.read(np.zeros(9000, np.uint8), octets)
