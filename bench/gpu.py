"""How fast are saving from and loading to a GPU, beside the machine's ceilings and the rivals?

python bench/gpu.py [--fake] [--mib 4096] [FOLDER]: first what the machine gives at most (pinned
copies, device copies, plain files with one thread and with many), then the kernels, then four
models on the device, the same arrays for all in one run, medians of alternating calls. What was
loaded is compared on the device. A table and bench/results/gpu.json; FOLDER is where the files go:
tmpfs, or a disk.

`--fake` runs everything on the fake device: to see that the bench works, for no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cpu import RESULTS, Figures, alternating, named, optional, ratios, table
from import_time import machine

import gpustore as gs
from gpustore import kernels, staging
from gpustore.testing import fake_cuda

MIB = 2**20
PIECE_NBYTES = 8 * MIB
RUNS = 5


def waited(call: Callable[[], Any], cupy: Any) -> Callable[[], Any]:
    """Return the call with the wait that makes its work on the device part of its time."""

    def whole() -> Any:
        found = call()
        cupy.cuda.Device().synchronize()
        return found

    return whole


# --- what the machine gives -------------------------------------------------------------------


def ceilings(folder: Path, nbytes: int, cupy: Any) -> Figures:
    """Return GB/s of `nbytes`: pinned copies, copies within the device, plain parallel file I/O."""
    octets, other = cupy.empty(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)
    pinned = cupy.cuda.alloc_pinned_memory(nbytes)
    stream = cupy.cuda.Stream(non_blocking=True)
    host = np.frombuffer(pinned, np.uint8, nbytes)
    path, threads = folder / "ceiling", 2 * (os.cpu_count() or 1)
    host[...] = 1

    def to_host() -> None:
        octets.data.copy_to_host_async(pinned.ptr, nbytes, stream)
        stream.synchronize()

    def to_device() -> None:
        octets.data.copy_from_host_async(pinned.ptr, nbytes, stream)
        stream.synchronize()

    def within() -> None:
        other[...] = octets

    calls = {
        "pinned copy, device to host": to_host,
        "pinned copy, host to device": to_device,
        "copy within the device": waited(within, cupy),
        "plain write, 1 thread": lambda: write(path, host, 1),
        f"plain write, {threads} threads": lambda: write(path, host, threads),
        "plain read, 1 thread": lambda: read(path, host, 1),
        f"plain read, {threads} threads": lambda: read(path, host, threads),
    }
    times = alternating(calls, RUNS)
    path.unlink()
    return {f"{name}: GB/s": round(nbytes / ms / 1e6, 2) for name, ms in times.items()}


def write(path: Path, host: Any, threads: int) -> None:
    """Write a new preallocated file in pieces, each at its place."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, host.size)
    in_pieces(lambda part, start: os.pwrite(descriptor, part.data, start), host, threads)
    os.close(descriptor)


def read(path: Path, host: Any, threads: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    in_pieces(lambda part, start: os.preadv(descriptor, [part.data], start), host, threads)
    os.close(descriptor)


def in_pieces(move: Callable[[Any, int], int], host: Any, threads: int) -> None:
    starts = range(0, host.size, PIECE_NBYTES)
    with ThreadPoolExecutor(threads) as pool:
        moved = pool.map(lambda start: move(host[start : start + PIECE_NBYTES], start), starts)
        assert sum(moved) == host.size


# --- within the device ------------------------------------------------------------------------


def within_device(nbytes: int, cupy: Any) -> Figures:
    """Return GB/s of the kernels: digests of one array and of many, gathering of many."""
    whole = cupy.zeros(nbytes, np.uint8)
    small = [whole[start : start + 4096] for start in range(0, min(nbytes, 40 * MIB), 4096)]
    matrix = whole.view(np.float32).reshape(-1, 1024).T
    starts = staging.origins({"cuda:0"})
    if kernels.digests([whole]) is None:  # no kernels: the fake device, or no NVRTC
        return {}
    calls = {
        "BLAKE3 of one array": (nbytes, lambda: kernels.digests([whole])),
        "BLAKE3 of arrays of 4 KiB": (4096 * len(small), lambda: kernels.digests(small)),
        "arrays of 4 KiB gathered to the host": (
            4096 * len(small),
            lambda: kernels.gathered(small),
        ),
        "a matrix turned": (nbytes, lambda: kernels.flat_octets(matrix, starts["cuda:0"])),
    }
    times = alternating({name: waited(call, cupy) for name, (_, call) in calls.items()}, RUNS)
    return {f"{name}: GB/s": round(calls[name][0] / ms / 1e6, 2) for name, ms in times.items()}


# --- cases ------------------------------------------------------------------------------------


def compare(folder: Path, model: Any, arrays: dict[str, Any], cupy: Any) -> Figures:
    """Return what saving and loading take, here and by the rivals, all on the same arrays."""
    nbytes = sum(array.nbytes for array in arrays.values())
    ours = folder / "ours"

    def load(**options: Any) -> Any:
        return gs.load(ours, "model", device="cuda", **options)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gs.save(ours, model=model, durable=False)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    same(gs.params(load(verify=True)), list(arrays.values()), cupy)
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: gs.save(ours, model=model, durable=False),
        "load": load,
        "verified load": lambda: load(verify=True),
    } | rivals(folder, arrays, cupy)
    found = alternating({name: waited(call, cupy) for name, call in calls.items()}, RUNS)
    speeds = {
        f"{name}: GB/s": round(nbytes / found[name] / 1e6, 2)
        for name in ("save", "load", "verified load")
    }
    pairs = {
        f"{ours}: times faster than {rival}": (f"{rival} {ours}", ours)
        for ours in ("save", "load")
        for rival in ("torch", "safetensors", "fastsafetensors", "cupy.savez")
    }
    memory = {"save, MiB of host memory above, the ring included": round(peak, 1)}
    added = {"verification: share of a load": round(found["verified load"] / found["load"] - 1, 3)}
    return ratios(found, pairs) | speeds | added | memory


def rivals(folder: Path, arrays: dict[str, Any], cupy: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls of those that are installed."""
    torch, safetensors = optional("torch"), optional("safetensors.torch")
    calls: dict[str, Callable[[], Any]] = {}
    if torch is not None and torch.cuda.is_available():
        tensors = {name: torch.from_dlpack(array) for name, array in arrays.items()}
        pt, st = folder / "arrays.pt", folder / "arrays.safetensors"
        calls["torch save"] = lambda: torch.save(tensors, pt)
        calls["torch load"] = lambda: torch.load(pt, map_location="cuda", weights_only=True)
        calls["torch save"]()
        if safetensors is not None:
            calls["safetensors save"] = lambda: safetensors.save_file(tensors, st)
            calls["safetensors load"] = lambda: safetensors.load_file(st, device="cuda")
            calls["safetensors save"]()
            fast = optional("fastsafetensors")
            if fast is not None:
                calls["fastsafetensors load"] = lambda: fast_load(fast, st)
    if hasattr(cupy, "savez"):
        npz = folder / "arrays.npz"
        calls["cupy.savez save"] = lambda: cupy.savez(npz, **arrays)
        calls["cupy.savez load"] = lambda: [cupy.load(npz)[name] for name in arrays]
        calls["cupy.savez save"]()
    return calls


def fast_load(fast: Any, path: Path) -> dict[str, Any]:
    with fast.fastsafe_open(filenames=[str(path)], nogds=True, device="cuda:0") as opened:
        return {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118


def same(found: list[Any], expected: list[Any], cupy: Any) -> None:
    """Compare on the device, bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert gs.device_of(one) == gs.device_of(other)
        assert one.shape == other.shape and bool((one == other).all())


def cases(mib: int, cupy: Any) -> dict[str, Callable[[], Any]]:
    """Return the models: by name, how each is made on the device."""
    rng = np.random.default_rng(0)

    def matrix(nbytes: int) -> Any:
        return cupy.asarray(rng.random(nbytes // 4, "f4").reshape(64, -1))

    count = max(mib * 10_000 // 4096, 10)
    width = max(int((mib * MIB / 2 / 32 / 4) ** 0.5), 8)
    return {
        f"{mib} MiB in 64 arrays": lambda: [matrix(mib * MIB // 64) for _ in range(64)],
        f"{mib} MiB in one array": lambda: [matrix(mib * MIB)],
        f"{count:,} arrays of 4 KiB": lambda: [matrix(4096) for _ in range(count)],
        f"Chain of 32 Dense({width}, {width})": lambda: gs.gpu(
            gs.Chain(*(gs.Dense(width, width) for _ in range(32)))
        ),
    }


# --- results ----------------------------------------------------------------------------------


def shares(results: dict[str, Figures]) -> None:
    """Add to each case which share of its ceiling it reaches: the slower of copy and file."""
    limits = results["ceilings"]

    def fastest(start: str) -> float:
        return max(value for name, value in limits.items() if name.startswith(start))

    save = min(fastest("pinned copy, device to host"), fastest("plain write"))
    load = min(fastest("pinned copy, host to device"), fastest("plain read"))
    for found in results.values():
        if "save: GB/s" in found:
            found["save: share of the ceiling"] = round(found["save: GB/s"] / save, 3)
            for name in ("load", "verified load"):
                found[f"{name}: share of the ceiling"] = round(found[f"{name}: GB/s"] / load, 3)


def gpu_machine(cupy: Any) -> dict[str, object]:
    names = {"gpu": "the fake device"}
    if hasattr(cupy.cuda.runtime, "getDeviceProperties"):
        names["gpu"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    for name in ("cupy", "torch", "safetensors", "fastsafetensors"):
        found = optional(name)
        if found is not None:
            names[name] = found.__version__
    return machine() | names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--mib", type=int, default=4096)
    options = parser.parse_args()
    with contextlib.ExitStack() as held:
        if options.fake:
            held.enter_context(fake_cuda(1))
        status = gs.cuda_status()
        if not status:
            parser.exit(1, f"bench/gpu.py: {status.message}\n")
        cupy = optional("cupy")
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        nbytes = min(options.mib, 1024) * MIB
        results = {"ceilings": ceilings(folder, nbytes, cupy)}
        results["within the device"] = within_device(nbytes, cupy)
        for case, make in cases(options.mib, cupy).items():
            model = make()
            results[case] = compare(folder, model, named(gs.params(model)), cupy)
            del model
        shares(results)
        print(table(results))
        record = {
            "machine": gpu_machine(cupy),
            "runs": RUNS,
            "ring, MiB": staging.ring_nbytes() // MIB,
            "figures": results,
        }
    if not options.fake:
        (RESULTS / "gpu.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
