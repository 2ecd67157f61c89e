"""How fast are saving from and loading to a GPU, beside the machine's ceilings and the rivals?

python bench/gpu.py [--fake] [--mib 4096] [--seconds 300] [--results FOLDER] [FOLDER]: first what
the machine gives at most (pinned copies, device copies, plain files with one thread and with many),
then the kernels, then four models on the device, the same arrays for all in one run, in turn,
medians. What was loaded is compared on the device. A table and gpu.json under bench/results after
each part; a rival that is missing or fails is left out and named. FOLDER is where the files go:
without one the page cache of the temporary folder or tmpfs, whichever takes a file faster.

`--fake` runs everything on the fake device: to see that the bench works, for no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import ceilings, faster
from cpu import RESULTS, Figures, named, optional, ratios, table
from import_time import machine
from turns import FAILED, failed, in_turn, speeds

import gpustore as gs
from gpustore import kernels, staging
from gpustore.testing import fake_cuda

MIB = 2**20
DEVICE = "cuda:0"  # of the rivals
ABOVE = "save, MiB of host memory above, the ring included"


class Clock:
    """How long this bench may take, shared out among the cases that are left."""

    def __init__(self, seconds: float, cases: int) -> None:
        self._end, self._cases = time.perf_counter() + seconds, cases

    def next_case(self) -> float:
        """Return when the next case should be done."""
        now = time.perf_counter()
        share = max(self._end - now, 0) / max(self._cases, 1)
        self._cases -= 1
        return now + share


# --- within the device ------------------------------------------------------------------------


def within_device(nbytes: int, cupy: Any, until: float) -> Figures:
    """Return GB/s of the kernels: digests of one array and of many, gathering of many."""
    whole = filled(nbytes, 0, cupy).view(np.uint8)
    small = [whole[start : start + 4096] for start in range(0, min(nbytes, 40 * MIB), 4096)]
    matrix = whole.view(np.float32).reshape(-1, 1024).T
    starts = staging.origins({"cuda:0"})
    if kernels.digests([whole]) is None:  # no kernels: the fake device, or no NVRTC
        FAILED["kernels"] = "they cannot be compiled here"
        return {}
    one = {
        "BLAKE3 of one array": lambda: kernels.digests([whole]),
        "matrix turned": lambda: kernels.flat_octets(matrix, starts["cuda:0"]),
    }
    many = {
        "BLAKE3 of arrays of 4 KiB": lambda: kernels.digests(small),
        "arrays of 4 KiB gathered to the host": lambda: kernels.gathered(small),
    }
    found = speeds(nbytes, in_turn(one, cupy, until))
    return found | speeds(4096 * len(small), in_turn(many, cupy, until))


# --- cases ------------------------------------------------------------------------------------


def compare(
    case: str, folder: Path, model: Any, arrays: dict[str, Any], cupy: Any, until: float
) -> Figures:
    """Return what saving and loading take, here and by the rivals, all on the same arrays."""
    nbytes = sum(array.nbytes for array in arrays.values())
    ours = folder / "ours"

    def save() -> None:
        gs.save(ours, model=model, durable=False)

    def load(**options: Any) -> Any:
        return gs.load(ours, "model", device="cuda", **options)

    memory = peak(save)
    same(gs.params(load(verify=True)), list(arrays.values()))
    own: dict[str, Callable[[], Any]] = {
        "save": save,
        "load": load,
        "verified load": lambda: load(verify=True),
    }
    found = in_turn(own, cupy, until, rivals(folder, arrays, cupy, case), case, folder)
    pairs = {
        f"{ours}: times faster than {rival}": (f"{rival} {ours}", ours)
        for ours in ("save", "load")
        for rival in ("torch", "safetensors", "fastsafetensors", "cupy.savez")
    }
    added = {"verification: share of a load": round(found["verified load"] / found["load"] - 1, 3)}
    own_speeds = speeds(nbytes, {name: found[name] for name in own})
    return ratios(found, pairs) | own_speeds | added | memory


def peak(call: Callable[[], Any]) -> Figures:
    """Return how far resident memory rises while the call runs, where the kernel says so."""

    def resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    call()  # what is made once: lanes, kernels
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before = resident("VmRSS:")
        call()
        return {ABOVE: round((resident("VmHWM:") - before) / 1024, 1)}
    except (OSError, StopIteration):
        return {}


def rivals(
    folder: Path, arrays: dict[str, Any], cupy: Any, case: str
) -> dict[str, Callable[[], Any]]:
    """Return the calls of those that are installed, each save before its load."""
    torch, safetensors = optional("torch"), optional("safetensors.torch")
    calls: dict[str, Callable[[], Any]] = {}
    try:
        if torch is not None and (DEVICE == "cpu" or torch.cuda.is_available()):
            tensors = {name: torch.from_dlpack(a).contiguous() for name, a in arrays.items()}
            pt, st = folder / "arrays.pt", folder / "arrays.safetensors"
            calls["torch save"] = lambda: torch.save(tensors, pt)
            calls["torch load"] = lambda: torch.load(pt, map_location=DEVICE, weights_only=True)
            if safetensors is not None:
                calls["safetensors save"] = lambda: safetensors.save_file(tensors, st)
                calls["safetensors load"] = lambda: safetensors.load_file(st, device=DEVICE)
                fast = optional("fastsafetensors")
                if fast is not None:
                    calls["fastsafetensors load"] = lambda: fast_load(fast, st)
    except Exception as error:
        failed(f"{case}: torch", error)
    if hasattr(cupy, "savez"):
        npz = folder / "arrays.npz"
        calls["cupy.savez save"] = lambda: cupy.savez(npz, **arrays)
        calls["cupy.savez load"] = lambda: read_npz(npz, list(arrays), cupy)
    return calls


def read_npz(path: Path, names: list[str], cupy: Any) -> list[Any]:
    with cupy.load(path) as stored:
        return [stored[name] for name in names]


def fast_load(fast: Any, path: Path) -> dict[str, Any]:
    with fast.fastsafe_open(filenames=[str(path)], nogds=True, device=DEVICE) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def same(found: list[Any], expected: list[Any]) -> None:
    """Compare on the device, bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert gs.device_of(one) == gs.device_of(other)
        assert one.shape == other.shape
        assert bool((one.view(np.uint32) == other.view(np.uint32)).all())


def filled(nbytes: int, seed: int, cupy: Any) -> Any:
    """Return float32 of any finite bits on the device, made there of one MiB that repeats."""
    bits = np.random.default_rng(seed).integers(0, 2**32, MIB // 4, np.uint32) & 0xFF7FFFFF
    block = cupy.asarray(bits.astype(np.uint32))
    return np.tile(block, -(-nbytes // MIB))[: nbytes // 4].view(np.float32)


def cases(mib: int, cupy: Any) -> dict[str, Callable[[], Any]]:
    """Return the models: by name, how each is made on the device."""

    def matrices(count: int, nbytes: int) -> list[Any]:
        return [filled(nbytes, seed, cupy).reshape(64, -1) for seed in range(count)]

    def small(count: int) -> list[Any]:
        whole = filled(count * 4096, 0, cupy).reshape(count, 64, 16)
        return [part.copy() for part in whole]

    def chain(width: int) -> Any:
        weights = (filled(4 * width * width, i, cupy).reshape(width, width) for i in range(32))
        return gs.Chain(*(gs.Dense(weight, cupy.zeros(width, np.float32)) for weight in weights))

    count = max(mib * 10_000 // 4096, 10)
    width = max(int((mib * MIB / 2 / 32 / 4) ** 0.5), 8)
    return {
        f"{mib} MiB in 64 arrays": lambda: matrices(64, mib * MIB // 64),
        f"{mib} MiB in one array": lambda: matrices(1, mib * MIB),
        f"{count:,} arrays of 4 KiB": lambda: small(count),
        f"Chain of 32 Dense({width}, {width})": lambda: chain(width),
    }


# --- results ----------------------------------------------------------------------------------


def shares(results: dict[str, Figures]) -> None:
    """Add to each case which share of its ceiling it reaches: the slower of copy and file."""
    limits = results["ceilings"]

    def fastest(*starts: str) -> float:
        return max(value for name, value in limits.items() if name.startswith(starts))

    save = min(fastest("pinned copy to host"), fastest("plain write", "mapped write"))
    load = min(fastest("pinned copy to device"), fastest("plain read"))
    for found in results.values():
        if "save: GB/s" in found:
            found["save: share of the ceiling"] = round(found["save: GB/s"] / save, 3)
            for name in ("load", "verified load"):
                found[f"{name}: share of the ceiling"] = round(found[f"{name}: GB/s"] / load, 3)


def goals(results: dict[str, Figures]) -> list[str]:
    """Return what was aimed at beside what was found, for an H200 with the file in memory."""
    names = list(results)[2:]
    large, small = names[:2], names[2:3]
    wanted = [(case, f"{name}: share of the ceiling", 0.9) for case in large
              for name in ("save", "load")]  # fmt: skip
    wanted += [(case, f"save: times faster than {rival}", times) for case in large
               for rival, times in (("torch", 5), ("safetensors", 3))]  # fmt: skip
    wanted += [(case, "load: times faster than safetensors", 2) for case in large]
    wanted += [(case, f"{name}: times faster than torch", 20) for case in small
               for name in ("save", "load")]  # fmt: skip
    wanted += [("within the device", "BLAKE3 of one array: GB/s", 500)]
    most = [(case, "verification: share of a load", 0.03) for case in large]
    most += [(case, ABOVE, 64 + staging.ring_nbytes() // MIB) for case in large]
    lines = []
    for case, name, limit in [*wanted, *most]:
        found = results.get(case, {}).get(name)
        is_most = (case, name, limit) in most
        if found is not None:
            is_met = found <= limit if is_most else found >= limit
            sign = "at most" if is_most else "at least"
            verdict = "met" if is_met else "missed"
            lines.append(f"{verdict:6}  {case}: {name}: {found}, aimed at {sign} {limit}")
    return lines


def gpu_machine(cupy: Any, folder: Path) -> dict[str, object]:
    names = {"gpu": "the fake device", "driver": "none"}
    if hasattr(cupy.cuda.runtime, "getDeviceProperties"):
        names["gpu"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        names["driver"] = f"CUDA {cupy.cuda.runtime.driverGetVersion()}"
    for name in ("cupy", "torch", "safetensors", "fastsafetensors"):
        names[name] = str(getattr(optional(name), "__version__", "not installed"))
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [m for m in mounts if folder.resolve().is_relative_to(m[0])]
    files = max(above, key=lambda m: len(m[0]), default=["", "?"])[1]
    return machine() | names | {"kernel": os.uname().release, "files on": files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--mib", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with contextlib.ExitStack() as held:
        if options.fake:
            held.enter_context(fake_cuda(1))
        status = gs.cuda_status()
        if not status:
            parser.exit(1, f"bench/gpu.py: {status.message}\n")
        cupy = optional("cupy")
        place = options.folder or faster([tempfile.gettempdir(), "/dev/shm"], 6 * options.mib * MIB)
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir=place)))
        record = {
            "machine": gpu_machine(cupy, folder),
            "ring, MiB": staging.ring_nbytes() // MIB,
            "left out": FAILED,
        }
        print("\n".join(goals(measured(options, cupy, folder, record))))


def measured(options: Any, cupy: Any, folder: Path, record: dict[str, Any]) -> dict[str, Figures]:
    """Run it all, and write down what is known after each part."""
    results: dict[str, Figures] = {}

    def note(name: str, found: Figures) -> None:
        results[name] = found
        shares(results)
        print(table({name: results[name]}), "\n", flush=True)
        if not options.fake or options.results != RESULTS:
            whole = json.dumps(record | {"figures": results}, indent=2, ensure_ascii=False)
            (options.results / "gpu.json").write_text(whole + "\n")
            text = "\n".join([table(results), "", *goals(results), ""])
            (options.results / "gpu.txt").write_text(text)

    made = cases(options.mib, cupy)
    clock = Clock(options.seconds, len(made) + 2)
    nbytes = min(options.mib, 1024) * MIB
    note("ceilings", ceilings(folder, nbytes, cupy, clock.next_case()))
    note("within the device", within_device(nbytes, cupy, clock.next_case()))
    for case, make in made.items():
        until = clock.next_case()
        model = make()
        note(case, compare(case, folder, model, named(gs.params(model)), cupy, until))
        del model
        for path in folder.iterdir():
            path.unlink()
    return results


if __name__ == "__main__":
    main()
