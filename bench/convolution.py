"""How fast are convolutions beside torch's, on the CPU and the same arrays, in one run?

python bench/convolution.py: the goal is at most 3 times torch's time on the layers of a ResNet.
torch is no dependency; without it this says so and ends.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from import_time import machine

import gpustore as gs

RESULTS = Path(__file__).parent / "results" / "convolution.json"
RUNS = 7
GOAL = 3
CASES = {  # name: width, in, out, kernel, stride, batch
    "7x7/2, 224x224x3 -> 64": (224, 3, 64, 7, 2, 4),
    "3x3, 56x56x64 -> 64": (56, 64, 64, 3, 1, 8),
    "1x1, 56x56x64 -> 256": (56, 64, 256, 1, 1, 8),
    "3x3/2, 56x56x128 -> 128": (56, 128, 128, 3, 2, 8),
    "3x3, 28x28x128 -> 128": (28, 128, 128, 3, 1, 8),
    "3x3, 14x14x256 -> 256": (14, 256, 256, 3, 1, 8),
    "3x3, 7x7x512 -> 512": (7, 512, 512, 3, 1, 8),
    "1x1, 7x7x2048 -> 512": (7, 2048, 512, 1, 1, 8),
}


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def measure(torch: Any, case: tuple[int, ...]) -> dict[str, float]:
    """Return the median times in ms and their ratio; the outputs are compared first."""
    width, n_in, n_out, kernel, stride, batch = case
    rng = np.random.default_rng(0)
    layer = gs.Conv((kernel, kernel), (n_in, n_out), stride=stride, pad=kernel // 2, rng=rng)
    layer.weight = np.asfortranarray(layer.weight)
    x = np.asfortranarray(rng.normal(size=(width, width, n_in, batch)).astype("f4"))
    theirs = torch.nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2)
    with torch.no_grad():
        flipped = layer.weight[::-1, ::-1].transpose().copy(order="C")
        theirs.weight.copy_(torch.from_numpy(flipped))
        theirs.bias.zero_()
        tensor = torch.from_numpy(np.ascontiguousarray(x.transpose()))
        np.testing.assert_allclose(
            layer(x).transpose(), theirs(tensor).numpy(), rtol=1e-3, atol=1e-3
        )
        pairs = [(timed(lambda: layer(x)), timed(lambda: theirs(tensor))) for _ in range(RUNS)]
    ours, torchs = (statistics.median(times) for times in zip(*pairs, strict=True))
    found = {"gpustore_ms": ours, "torch_ms": torchs, "ratio": ours / torchs}
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    try:
        import torch
    except ImportError:
        print("torch is not installed: nothing to compare with (pip install torch)")
        return
    results = {name: measure(torch, case) for name, case in CASES.items()}
    for name, found in results.items():
        print(f"{name:26} {found['gpustore_ms']:8.2f} ms, torch {found['torch_ms']:8.2f} ms, "
              f"ratio {found['ratio']:.2f} (goal {GOAL})")  # fmt: skip
    about = machine() | {"torch": torch.__version__}
    found = {"machine": about, "runs": RUNS, "goal": GOAL, "layers": results}
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
