"""How fast are saving and loading on the CPU beside safetensors, on the same arrays, in one run?

python bench/cpu.py [FOLDER]: medians of alternating runs, and their ratios; results are compared
first. safetensors is no dependency; without it this says so and ends.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from import_time import machine

import gpustore as gs

RESULTS = Path(__file__).parent / "results" / "cpu.json"
RUNS = 7
GIB = 2**30


def alternating(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the median time of each call in ms, all of them in turn in each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(RUNS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1000)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def plain_write(path: Path, arrays: dict[str, Any]) -> None:
    """Write the bytes to a preallocated file: what any save is at least."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(descriptor, 0, sum(array.nbytes for array in arrays.values()))
    for array in arrays.values():
        os.write(descriptor, array.reshape(-1).data)
    os.close(descriptor)


def measure(folder: Path, arrays: dict[str, Any], rival: Any) -> dict[str, float]:
    ours, theirs = folder / "ours.bson", folder / "theirs.safetensors"
    gs.save(ours, arrays, durable=False)
    rival.save_file(arrays, theirs)
    for found in (gs.load(ours, verify=True), rival.load_file(theirs)):
        assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    found = alternating(
        {
            "plain_write": lambda: plain_write(folder / "plain", arrays),
            "safetensors_save": lambda: rival.save_file(arrays, theirs),
            "save": lambda: gs.save(ours, arrays, durable=False),
            "save_durable": lambda: gs.save(ours, arrays),
            "safetensors_load": lambda: rival.load_file(theirs),
            "load": lambda: gs.load(ours),
            "load_verified": lambda: gs.load(ours, verify=True),
        }
    )
    found["save_times_faster"] = round(found["safetensors_save"] / found["save"], 2)
    found["load_times_faster"] = round(found["safetensors_load"] / found["load"], 2)
    return found


def chains(folder: Path) -> dict[str, float]:
    """Return what a Chain of 1,000 Dense layers takes beside a dict of its arrays."""
    model = gs.Chain(*(gs.Dense(16, 16) for _ in range(1000)))
    arrays = dict(enumerate_names(gs.params(model)))
    one, other = folder / "model.bson", folder / "arrays.bson"
    found = alternating(
        {
            "save": lambda: gs.save(one, model=model, durable=False),
            "save_arrays": lambda: gs.save(other, arrays, durable=False),
            "load": lambda: gs.load(one),
            "load_arrays": lambda: gs.load(other),
        }
    )
    found["save_ratio"] = round(found["save"] / found["save_arrays"], 2)
    found["load_ratio"] = round(found["load"] / found["load_arrays"], 2)
    return found


def enumerate_names(arrays: list[Any]) -> list[tuple[str, Any]]:
    return [(f"a{index}", array) for index, array in enumerate(arrays)]


def main() -> None:
    try:
        import safetensors.numpy as rival
    except ImportError:
        print("safetensors is not installed: nothing to compare with (pip install safetensors)")
        return
    rng = np.random.default_rng(0)
    cases = {
        "1 GiB in 64 arrays": [rng.random(GIB // 256, "f4").reshape(2048, -1) for _ in range(64)],
        "1 GiB in 1 array": [rng.random(GIB // 4, "f4").reshape(2**14, -1)],
        "10,000 arrays of 128 bytes": [np.full(32, i, "f4") for i in range(10_000)],
    }
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as name:
        folder = Path(name)
        for case, arrays in cases.items():
            results[case] = measure(folder, dict(enumerate_names(arrays)), rival)
        results["Chain of 1,000 Dense(16, 16) beside a dict of its arrays"] = chains(folder)
    for case, found in results.items():
        print(case)
        for name, value in found.items():
            print(f"  {name:20} {value:10.2f}{'' if 'times' in name or 'ratio' in name else ' ms'}")
    RESULTS.write_text(
        json.dumps({"machine": machine(), "runs": RUNS, "ms": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
