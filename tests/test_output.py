"""Large arrays are written and hashed by several threads: the same file as by one."""

from __future__ import annotations

import errno
import os
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpustore as gs
from gpustore import newfile, output, transfer
from gpustore.testing import fake_cuda

pytestmark = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="there is no pwrite here")
LARGE = 4096


@pytest.fixture(autouse=True)
def _several_threads_for_arrays_of_some_kib(monkeypatch):
    monkeypatch.setattr(output, "_LARGE_NBYTES", LARGE)
    monkeypatch.setattr(output, "_GATHER_NBYTES", LARGE)
    monkeypatch.setattr(output, "_THREADS", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(newfile, "_STAGE_NBYTES", 16 * 1024)
    monkeypatch.setattr(newfile, "_DIRECT_NBYTES", 64 * 1024)
    monkeypatch.setattr(transfer, "CHUNK_NBYTES", 5000)
    monkeypatch.setattr(transfer, "_BLOCK_NBYTES", 8192)


@pytest.fixture
def crews(monkeypatch):
    """The numbers of threads of all crews that worked."""
    seen, real = [], output.Crew

    def crew(pieces, count, name):
        seen.append(count)
        return real(pieces, count, name)

    monkeypatch.setattr(output, "Crew", crew)
    return seen


def model(shapes):
    arrays = [
        np.arange(rows * columns, dtype="f4").reshape(rows, -1) + index
        for index, (rows, columns) in enumerate(shapes)
    ]
    layers = [gs.Dense(array, False) for array in arrays[::2]]  # turned on the way
    return {"arrays": arrays, "layers": layers, "swapped": [a.astype(">f4") for a in arrays[:2]]}


SHAPES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=7)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES, st.sampled_from(["inline", "detached"]), st.booleans())
def test_the_file_is_the_one_that_one_thread_writes(tmp_path, shapes, layout, durable):
    whole = model(shapes)
    gs.save(tmp_path / "several", whole, layout=layout, durable=durable)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_THREADS", 1)
        gs.save(tmp_path / "one", whole, layout=layout, durable=durable)
    assert (tmp_path / "several").read_bytes() == (tmp_path / "one").read_bytes()
    gs.load(tmp_path / "several", verify=True)


@pytest.mark.parametrize("durable", [True, False])
def test_there_are_as_many_threads_as_pay(tmp_path, crews, durable):
    def save(*counts):
        crews.clear()
        gs.save(tmp_path / "a", [np.arange(n, dtype="u1") for n in counts], durable=durable)
        return crews

    assert save(100_000) == [] and save(LARGE - 1, LARGE - 1) == []
    assert save(50_000, 50_000) == [2] and save(40_000, 40_000, 40_000, 40_000) == [3]
    assert save(200_000, 50_000, 50_000) == [2]  # the first is hashed beside the writing
    assert save(200_000, 50_000) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)  # two threads write a durable file
        assert save(50_000, 50_000) == ([] if durable else [2])
        patch.setattr(os, "cpu_count", lambda: 1)
        assert save(50_000, 50_000) == []


def test_a_file_without_its_tags_is_written_by_several_threads_too(tmp_path, crews):
    path, arrays = tmp_path / "a", {name: np.arange(9000.0) for name in "abc"}
    with fake_cuda(1):
        gs.save(path, gs.gpu(arrays), on_gpu="tag", durable=False)
    crews.clear()
    with gs.open_file(path) as stored:
        stored.save_for_cpu(tmp_path / "b")
    assert crews == [3]
    found = gs.load(tmp_path / "b", verify=True)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_progress_comes_from_the_thread_that_saves_and_ends_at_the_size(tmp_path):
    seen = []

    def progress(done, total):
        seen.append((done, total, threading.current_thread()))

    gs.save(tmp_path / "a", model([(100, 100)] * 6), progress=progress)
    size = (tmp_path / "a").stat().st_size
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {(total, thread) for _, total, thread in seen} == {(size, threading.main_thread())}
    assert seen[-1][0] == size and len(seen) > 6


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("failing", [0, 1, 5, 11])
def test_a_write_that_fails_on_one_thread_stops_the_others(tmp_path, monkeypatch, durable, failing):
    path = tmp_path / "a.bson"
    gs.save(path, old=1)
    count, real = iter(range(10**6)), os.pwrite

    def pwrite(descriptor, octets, position):
        if next(count) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, octets, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="a.bson") as caught:
        gs.save(path, model([(100, 100)] * 8), durable=durable)
    assert caught.value.errno == errno.EIO
    assert gs.load(path) == {"old": 1} and os.listdir(tmp_path) == ["a.bson"]
    assert not [thread for thread in threading.enumerate() if "writing" in thread.name]


@pytest.mark.parametrize("durable", [True, False])
def test_memory_that_runs_out_on_a_thread_is_an_error_of_the_save(tmp_path, monkeypatch, durable):
    def failing(host, scratch):
        raise MemoryError("no room for a block")

    monkeypatch.setattr(transfer, "_transposed_chunks", failing)
    with pytest.raises(MemoryError, match="no room for a block"):
        gs.save(tmp_path / "a", model([(100, 100)] * 8), durable=durable)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("durable", [True, False])
def test_an_interrupt_stops_all_threads(tmp_path, durable):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.save(tmp_path / "a", model([(100, 100)] * 8), durable=durable, progress=interrupt)
    assert not os.listdir(tmp_path)
    assert not [thread for thread in threading.enumerate() if "writing" in thread.name]
