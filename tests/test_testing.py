"""What gpustore gives for users' own tests: assert_roundtrip and the fixture of devices."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import gpustore as gs
from gpustore import testing
from gpustore.testing import fake_cuda

WAYS = ("cpu", "cuda-tagged", "julia")


@dataclasses.dataclass
class Unregistered:
    weight: object


def test_each_way_keeps_a_model_and_gives_it_back():
    shared = gs.Dense(3, 3, gs.relu)
    model = {"model": gs.Chain(shared, shared), "epoch": 3, "rates": [0.1, None, "a"]}
    loaded = testing.assert_roundtrip(model, through=WAYS)
    assert loaded["model"][0] is loaded["model"][1]


@pytest.mark.parametrize(
    "value",
    [b"bytes", np.ones(2, ml_dtypes.bfloat16), {1, 2}, frozenset("a"), range(0)],
    ids=repr,
)
def test_what_julia_has_no_type_for_passes_the_others_and_fails_there(value):
    testing.assert_roundtrip(value, through=("cpu", "cuda-tagged"))
    with pytest.raises(AssertionError, match=r"^through julia: value: expected"):
        testing.assert_roundtrip(value, through=["julia"])


def test_a_lost_value_is_named_with_the_way():
    with pytest.raises(AssertionError, match=r"through cpu: value\['net'\]: expected .*Unregister"):
        testing.assert_roundtrip({"net": Unregistered(1)})


def test_a_value_on_the_gpu_goes_all_ways(cuda):
    testing.assert_roundtrip(gs.gpu(gs.Dense(2, 3)), through=WAYS)


def test_the_tagged_way_goes_through_a_gpu(monkeypatch):
    saved = []
    real = testing.save

    def spying(path, value, **options):
        saved.append((gs.device_of(value["value"]), options["on_gpu"]))
        real(path, value, **options)

    monkeypatch.setattr(testing, "save", spying)
    testing.assert_roundtrip(gs.Dense(2, 3), through=["cuda-tagged"])
    assert saved == [("cuda:0", "tag")]


@pytest.mark.parametrize("through", [["gpu"], [], ["cpu", "Julia"]])
def test_unknown_ways_are_refused(through):
    with pytest.raises(gs.UnsupportedValueError, match="through: expected some of cpu, cuda-tag"):
        testing.assert_roundtrip(1, through=through)


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a folder, with the gpustore that is tested here."""
    package = Path(gs.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "."]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_fixture_runs_a_test_on_each_device_and_the_fake_one(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gpustore.fixtures"]\n')
    (tmp_path / "test_net.py").write_text(
        "import gpustore as gs, sys\n"
        "def test_net(gpustore_device, tmp_path):\n"
        "    model = gs.gpu(gs.Dense(3, 2), gpustore_device)\n"
        "    assert gs.device_of(model) == gpustore_device\n"
        "    gs.save(tmp_path / 'm.bson', model=model, on_gpu='tag')\n"
        "    loaded = gs.load(tmp_path / 'm.bson', 'model')\n"
        "    assert gs.device_of(loaded) == gpustore_device\n"
    )
    done = pytest_run(tmp_path, "-v")
    names = ["cpu", *(f"cuda:{n}" for n in range(gs.cuda_status().device_count)), "fake-cuda:0"]
    for name in names:
        assert f"test_net[{name}] PASSED" in done.stdout, done.stdout + done.stderr
    assert f"{len(names)} passed" in done.stdout


def test_installing_gpustore_changes_no_run_of_pytest():
    from importlib.metadata import entry_points

    assert not [e for e in entry_points(group="pytest11") if e.value.startswith("gpustore")]


def test_arrays_of_the_dtypes_asked_for():
    from hypothesis import given

    @given(testing.arrays(dtypes=["f4", "i8"], max_dims=2))
    def check(array):
        assert array.dtype.newbyteorder("<") in (np.dtype("<f4"), np.dtype("<i8"))
        assert array.ndim <= 2

    check()


def test_the_fake_is_gone_after_a_round_trip():
    before = sys.modules.get("cupy")
    testing.assert_roundtrip(gs.Dense(1, 1), through=["cuda-tagged"])
    assert sys.modules.get("cupy") is before
    with fake_cuda(1) as cupy:
        testing.assert_roundtrip(gs.Dense(1, 1), through=["cuda-tagged"])
        assert sys.modules["cupy"] is cupy
