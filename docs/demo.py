"""The main job, end to end: train, save, load where CUDA is hidden, and open a file of Julia's.

Run by `make demo`. It uses the GPU where there is one; on a machine without, the strict fake
device of gpustore.testing plays its part in making the GPU-tagged file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np

import gpustore as gs
from gpustore import Chain, Dense, relu, softmax
from gpustore.testing import fake_cuda

JULIA = Path(__file__).parents[1] / "tests" / "fixtures" / "julia" / "doc_model_flux08_v1"

SERVER = """
import numpy as np
import gpustore as gs

print("   CUDA here:", gs.cuda_status().message)
model = gs.load("mymodel.bson", "model")
print("   loaded:", model)
with np.load("expected.npz") as expected:
    same = np.array_equal(model(expected["x"]), expected["y"])
    print("   outputs equal to the workstation's:", same)
    assert same
    try:
        gs.load("tagged.bson", "model")
        raise SystemExit("the tagged file must not load without CUDA")
    except gs.CUDAUnavailableError as error:
        print("   the GPU-tagged file fails as documented:")
        print("     CUDAUnavailableError:", error)
    model = gs.load("tagged.bson", "model", device="cpu")
    same = np.array_equal(model(expected["x"]), expected["y"])
    print("   the way out, load(..., device='cpu'): outputs equal:", same)
    assert same
"""


def train(steps: int = 300) -> tuple[Chain, np.ndarray, np.ndarray]:
    """Teach a small network which of ten inputs is the largest half, by plain gradient descent."""
    rng = np.random.default_rng(0)
    model = Chain(Dense(10, 16, relu, rng=rng), Dense(16, 2, rng=rng), softmax)
    x = rng.normal(size=(10, 512)).astype(np.float32)
    labels = (x[:5].sum(axis=0) > x[5:].sum(axis=0)).astype(int)
    hidden, output = model[0], model[1]
    for _ in range(steps):
        activity = hidden(x)
        error = model(x)
        error[labels, np.arange(512)] -= 1
        error /= 512
        back = (output.weight.T @ error) * (activity > 0)
        output.weight -= error @ activity.T
        output.bias -= error.sum(axis=1)
        hidden.weight -= back @ x.T
        hidden.bias -= back.sum(axis=1)
    return model, x, labels


def main() -> None:
    """Play both machines and say what happens in plain lines."""
    status = gs.cuda_status()
    print(f"1. On the workstation. CUDA: {'available' if status else status.message}")
    model, x, labels = train()
    accuracy = (model(x).argmax(axis=0) == labels).mean()
    print(f"   trained {model}: {accuracy:.0%} right")
    with tempfile.TemporaryDirectory() as folder:
        with nullcontext() if status else fake_cuda(1):
            on_gpu = gs.gpu(model)
            device = gs.device_of(on_gpu)
            print(
                f"   the model is on {device}" + ("" if status else " (a fake one, for the demo)")
            )
            gs.save(f"{folder}/mymodel.bson", model=on_gpu)
            gs.save(f"{folder}/tagged.bson", model=on_gpu, on_gpu="tag")
        np.savez(f"{folder}/expected.npz", x=x, y=gs.load(f"{folder}/mymodel.bson", "model")(x))
        print("   saved mymodel.bson (a CPU file) and tagged.bson (it remembers the GPU)")
        print("2. On the server: another process, CUDA hidden.", flush=True)
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", SERVER], cwd=folder, env=hidden, check=True)
    print("3. A file that Julia's Flux 0.8 wrote, opened without Julia.")
    model = gs.load(f"{JULIA}.bson", "model")
    print("   loaded:", model)
    record = json.loads(Path(f"{JULIA}.json").read_text())["forward"][1]
    with np.load(f"{JULIA}.npz") as numbers:
        expected = numbers[record["output"]["npz"]]
        found = model(numbers[record["input"]["npz"]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    print("   Julia's outputs:", np.round(expected[0], 6).tolist())
    print("   ours:           ", np.round(found[0], 6).tolist())
    print("Done: all outputs are equal.")


if __name__ == "__main__":
    main()
