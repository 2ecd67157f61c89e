"""The benchmark for GPU machines runs: there is little time on one to find out that it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpustore as gs

ROOT = Path(gs.__file__).parents[1]


def test_the_benchmark_for_gpus_runs_on_the_fake_device(tmp_path):
    arguments = ["--fake", "--mib", "1", "--seconds", "1", "--results", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["machine"]["gpu"] == "the fake device"
    assert list(record["figures"])[:2] == ["ceilings", "within the device"]
    for case, found in list(record["figures"].items())[2:]:
        assert found["load"] > 0 and "load: share of the ceiling" in found, case
    assert "aimed at at least" in (tmp_path / "gpu.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.txt"}
