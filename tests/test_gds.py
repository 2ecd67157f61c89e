"""GPUDirect Storage: probed, used where it is faster, and the same bytes; on a fake of kvikio."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_kernels import built, octets, with_kernels  # noqa: F401

import gpustore as gs
from gpustore import gds, ring, staging
from gpustore.fake_cuda import fake_cuda

LANE, GROUP = 64 * 1024, 4096


class CuFile:
    """kvikio.CuFile: bytes between a file and the memory of the fake device, in short moves."""

    moved: list[tuple[str, int]] = []  # noqa: RUF012
    failure: str | None = None
    clock = cost = 0

    def __init__(self, file: str, flags: str) -> None:
        self._descriptor = os.open(file, os.O_RDONLY if flags == "r" else os.O_RDWR)

    def __enter__(self) -> CuFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        content = os.pread(self._descriptor, size - size // 2, file_offset)
        memory = self._memory(buf)
        memory[dev_offset : dev_offset + len(content)] = np.frombuffer(content, np.uint8)
        return self._told("read", len(content))

    def raw_write(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        part = self._memory(buf)[dev_offset : dev_offset + size - size // 2]
        return self._told("write", os.pwrite(self._descriptor, part.tobytes(), file_offset))

    @staticmethod
    def _memory(buf: Any) -> Any:
        assert buf._machine.current == buf._ordinal, "cuFile works on the current device"
        if CuFile.failure:
            raise RuntimeError(CuFile.failure)
        return buf._host.reshape(-1).view(np.uint8)

    @staticmethod
    def _told(kind: str, nbytes: int) -> int:
        CuFile.clock += CuFile.cost
        CuFile.moved.append((kind, nbytes))
        return nbytes


@pytest.fixture(autouse=True)
def kvikio(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the fake kvikio, with GPUDirect Storage active."""
    module: Any = ModuleType("kvikio")
    module.CuFile = CuFile
    module.driver = {"is_gds_available": True}
    module.cufile_driver = SimpleNamespace(get=module.driver.__getitem__)
    module.defaults = SimpleNamespace(is_compat_mode_preferred=lambda: False)
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setattr(CuFile, "moved", [])
    monkeypatch.setattr(staging, "LANE_NBYTES", LANE)
    monkeypatch.setattr(ring, "GROUP_NBYTES", GROUP)
    monkeypatch.setattr(ring, "_TRIAL_PIECES", 4)
    gds._probed.cache_clear()
    yield module
    gds._probed.cache_clear()


@pytest.fixture
def cupy(built: Path) -> Iterator[Any]:  # noqa: F811
    if shutil.which("g++") is None:  # without kernels the host hashes, and all goes through it
        pytest.skip("g++ is not installed")
    with fake_cuda(2) as fake:
        yield with_kernels(fake, built)


def model_on(cupy: Any) -> dict[str, Any]:
    model = {f"a{n}": cupy.asarray(octets(n, n)) for n in (100, GROUP, 6 * LANE + 1, 9 * LANE)}
    with cupy.cuda.Device(1):
        return model | {"other": cupy.asarray(octets(7 * LANE)), "host": octets(3 * LANE)}


def moved(kind: str) -> int:
    return sum(nbytes for found, nbytes in CuFile.moved if found == kind)


@pytest.mark.parametrize("layout", ["inline", "detached"])
@pytest.mark.parametrize("is_fast", [True, False])
def test_what_goes_directly_is_the_same_and_the_faster_way_wins(
    tmp_path, cupy, layout, is_fast, monkeypatch
):
    monkeypatch.setattr(ring, "time", SimpleNamespace(perf_counter=lambda: CuFile.clock))
    monkeypatch.setattr(CuFile, "cost", 0 if is_fast else 10**9)
    for name in ("to_host", "to_device"):
        monkeypatch.setattr(staging.Lane, name, costing(getattr(staging.Lane, name)))
    model, large = model_on(cupy), 22 * LANE
    gs.save(tmp_path / "direct.bson", model, layout=layout, on_gpu="tag")
    assert (moved("write") > large // 2) == is_fast and moved("write") > 0
    found = gs.load(tmp_path / "direct.bson", verify=True)
    assert (moved("read") > large // 2) == is_fast and moved("read") > 0
    monkeypatch.setenv("GPUSTORE_GDS", "0")
    count = len(CuFile.moved)
    gs.save(tmp_path / "host.bson", model, layout=layout, on_gpu="tag")
    assert (tmp_path / "direct.bson").read_bytes() == (tmp_path / "host.bson").read_bytes()
    twin = gs.load(tmp_path / "host.bson")
    assert len(CuFile.moved) == count
    for name, array in model.items():
        assert gs.device_of(found[name]) == gs.device_of(twin[name]) == gs.device_of(array)
        np.testing.assert_array_equal(gs.cpu(found[name]), gs.cpu(array))
    assert cupy.machine.violations == []


def costing(call: Any) -> Any:
    """Have the clock of the trial go on by one at each call."""

    def counted(*args: Any) -> Any:
        CuFile.clock += 1
        return call(*args)

    return counted


def test_a_save_waits_for_the_callers_stream(tmp_path, cupy):
    array = cupy.asarray(np.zeros(9 * LANE, np.uint8))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.launch(lambda: array._host.fill(7))  # a kernel that has not run yet
        gs.save(tmp_path / "m.bson", array=array)
    assert moved("write") > 0
    assert (gs.load(tmp_path / "m.bson", "array", verify=True) == 7).all()


@pytest.mark.parametrize("job", ["save", "load"])
def test_a_failure_is_typed_and_leaves_the_old_file(tmp_path, cupy, job, monkeypatch):
    path = tmp_path / "m.bson"
    model = model_on(cupy)
    gs.save(path, model, on_gpu="tag")
    before = path.read_bytes()
    monkeypatch.setattr(CuFile, "failure", "cuFile error at: 5030")
    with pytest.raises(gs.DeviceError, match="5030; set GPUSTORE_GDS=0"):
        gs.save(path, model) if job == "save" else gs.load(path)
    del model
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert cupy.machine.pinned_nbytes == 0


def test_a_file_that_cannot_be_opened_directly_goes_through_the_host(tmp_path, cupy, kvikio):
    def refused(file: str, flags: str) -> Any:
        raise RuntimeError("the file system has no O_DIRECT")

    kvikio.CuFile = refused
    gs.save(tmp_path / "m.bson", model_on(cupy))
    gs.load(tmp_path / "m.bson", device="cuda", verify=True)
    assert CuFile.moved == []


def test_the_status_says_which_path_is_used(kvikio, monkeypatch):
    def said() -> str:
        gds._probed.cache_clear()
        return gs.cuda_status().transfers

    assert said().startswith("by GPUDirect Storage or through")
    kvikio.driver["is_gds_available"] = False
    assert said() == "through pinned host memory (the driver offers no GPUDirect Storage)"
    kvikio.defaults.is_compat_mode_preferred = lambda: True
    assert "compatibility mode" in said()
    del kvikio.defaults.is_compat_mode_preferred
    assert "kvikio cannot be used: " in said()
    monkeypatch.setenv("GPUSTORE_GDS", "0")
    assert said() == "through pinned host memory (GPUSTORE_GDS is 0)"
    monkeypatch.delenv("GPUSTORE_GDS")
    monkeypatch.setitem(sys.modules, "kvikio", None)
    assert said() == "through pinned host memory (kvikio is not installed)"
