"""How fast are saving and loading on the CPU beside safetensors, on the same arrays, in one run?

python bench/cpu.py [--big] [FOLDER]: medians of alternating runs and their ratios, as a table, as
JSON and as a plot under bench/results. What is read back is compared first. `--big` adds 12 GiB.
Rivals and matplotlib come with `pip install 'gpustore[bench]'`; what is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bson
import numpy as np
from import_time import machine

import gpustore as gs
from gpustore.digest import blake3_digest

RESULTS = Path(__file__).parent / "results"
RUNS = 5
DIRECT_PIECE = 8 * 1024 * 1024
GIB = 2**30
Figures = dict[str, float]


def settle(nbytes: int) -> None:
    """Give each call the same machine: nothing left to be written, and memory that is there.

    A virtual machine hands free pages back to its host; the next to use them waits five times as
    long as for pages that were in use just before, so whoever comes first is made to wait here.
    """
    for thread in threading.enumerate():
        if thread.name == "gpustore-freeing":  # of the file that the last save replaced
            thread.join()
    os.sync()
    np.ones(nbytes, np.uint8)


def alternating(
    calls: dict[str, Callable[[], Any]],
    runs: int = RUNS,
    nbytes: int = 0,
    *,
    is_settled: bool = True,
    anew: tuple[Path, ...] = (),
) -> Figures:
    """Return the median time of each call in ms, all of them in turn in each round.

    Each is given free memory of `nbytes` that was in use just before, a load by a load before,
    which also brings the file into the page cache. Files of the names in `anew` are removed before.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            for path in anew:
                path.unlink(missing_ok=True)
            is_load = "load" in name or name == "BLAKE3"
            if is_settled:
                settle(0 if is_load else nbytes)
            if is_load:  # the machine may have let go of some of it meanwhile
                call()
            start = time.perf_counter()
            found = call()
            times[name].append((time.perf_counter() - start) * 1000)
            del found
    return {name: round(statistics.median(found), 4) for name, found in times.items()}


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def ratios(found: Figures, pairs: dict[str, tuple[str, str]]) -> Figures:
    """Add, under each name, how many times longer the first of a pair takes than the second."""
    known = {k: pair for k, pair in pairs.items() if pair[0] in found and pair[1] in found}
    return found | {k: round(found[one] / found[other], 2) for k, (one, other) in known.items()}


# --- cases ------------------------------------------------------------------------------------


def plain_write(path: Path, arrays: dict[str, Any], *, is_durable: bool = False) -> None:
    """Write the bytes to a new preallocated file: what any save is at least."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(descriptor, 0, sum(array.nbytes for array in arrays.values()))
    for array in arrays.values():
        os.write(descriptor, array.reshape(-1).data)
    if is_durable:
        os.fsync(descriptor)
    os.close(descriptor)


def plain_direct_write(path: Path, aligned: Any) -> None:
    """Write page-aligned memory to a new preallocated file past the page cache, by two threads."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(descriptor, 0, aligned.size)
    with ThreadPoolExecutor(2) as threads:
        starts = range(0, aligned.size, DIRECT_PIECE)
        pieces = [(start, aligned[start : start + DIRECT_PIECE].data) for start in starts]
        assert all(threads.map(lambda piece: os.pwrite(descriptor, piece[1], piece[0]), pieces))
    os.fsync(descriptor)
    os.close(descriptor)


def page_aligned(arrays: dict[str, Any]) -> Any:
    """Return the bytes of all arrays, up to whole pages, in memory that begins at a page."""
    nbytes = sum(array.nbytes for array in arrays.values())
    aligned, done = np.frombuffer(mmap.mmap(-1, -(-nbytes // 4096) * 4096), np.uint8), 0
    for array in arrays.values():
        aligned[done : done + array.nbytes] = array.reshape(-1).view(np.uint8)
        done += array.nbytes
    return aligned


def rivals(folder: Path, arrays: dict[str, Any], layout: str = "auto") -> Figures:
    """Return what saving and loading of row-major arrays takes, here, there, and at least."""
    ours, synced, theirs, plain = (folder / name for name in ("ours", "synced", "theirs", "plain"))
    numpys, torchs = optional("safetensors.numpy"), optional("safetensors.torch")
    gs.save(ours, arrays, durable=False, layout=layout)
    found = gs.load(ours, verify=True)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    calls: dict[str, Callable[[], Any]] = {
        "plain write": lambda: plain_write(plain, arrays),
        "plain durable write": lambda: plain_write(plain, arrays, is_durable=True),
        "save": lambda: gs.save(ours, arrays, durable=False, layout=layout),
        "durable save": lambda: gs.save(synced, arrays, layout=layout),
        "load": lambda: gs.load(ours),
        "verified load": lambda: gs.load(ours, verify=True),
        "BLAKE3": lambda: [blake3_digest(array) for array in arrays.values()],
    }
    if hasattr(os, "O_DIRECT") and sum(array.nbytes for array in arrays.values()) >= GIB:
        aligned = page_aligned(arrays)
        calls["plain O_DIRECT write"] = lambda: plain_direct_write(plain, aligned)
    if numpys is not None:
        numpys.save_file(arrays, theirs)
        calls["safetensors save"] = lambda: numpys.save_file(arrays, theirs)
        calls["safetensors load"] = lambda: numpys.load_file(theirs)
    if torchs is not None and sum(array.nbytes for array in arrays.values()) >= GIB:
        calls["safetensors.torch load"] = lambda: torchs.load_file(theirs)
    new = folder / "new"
    if sum(array.nbytes for array in arrays.values()) >= GIB:
        calls |= {
            "plain write, new name": lambda: plain_write(new, arrays),
            "save, new name": lambda: gs.save(new, arrays, durable=False, layout=layout),
            "durable save, new name": lambda: gs.save(new, arrays, layout=layout),
        }
    if "plain O_DIRECT write" in calls:
        calls["plain O_DIRECT write, new name"] = lambda: plain_direct_write(new, aligned)
    if numpys is not None and "save, new name" in calls:
        calls["safetensors save, new name"] = lambda: numpys.save_file(arrays, new)
    nbytes = 2 * sum(array.nbytes for array in arrays.values())
    return ratios(
        alternating(calls, nbytes=nbytes, anew=(new,)),
        {
            "save: times faster than safetensors": ("safetensors save", "save"),
            "save: share of the plain write": ("plain write", "save"),
            "durable save: times faster than safetensors": ("safetensors save", "durable save"),
            "durable save: share of the plain one": ("plain durable write", "durable save"),
            "durable save: share of O_DIRECT": ("plain O_DIRECT write", "durable save"),
            "save, new name: times faster than safetensors": (
                "safetensors save, new name",
                "save, new name",
            ),
            "save, new name: share of the plain write": ("plain write, new name", "save, new name"),
            "durable save, new name: share of O_DIRECT": (
                "plain O_DIRECT write, new name",
                "durable save, new name",
            ),
            "load: times faster than safetensors": ("safetensors load", "load"),
            "load: times faster than safetensors.torch": ("safetensors.torch load", "load"),
            "verified load: share of BLAKE3": ("BLAKE3", "verified load"),
        },
    )


def orders(folder: Path) -> Figures:
    """Return what 1 GiB takes in either memory order, and in layers that hold either."""
    rows = [np.random.default_rng(i).random((2048, 2048), "f4") for i in range(64)]
    columns = [np.asfortranarray(array) for array in rows]
    biases = [np.zeros(2048, "f4") for _ in rows]
    chains = [
        gs.Chain(*(gs.Dense(weight, bias) for weight, bias in zip(weights, biases, strict=True)))
        for weights in (rows, columns)
    ]
    path = folder / "orders"
    found = alternating(
        {
            "row-major arrays": lambda: gs.save(path, rows, durable=False),
            "column-major arrays": lambda: gs.save(path, columns, durable=False),
            "layers, column-major": lambda: gs.save(path, model=chains[1], durable=False),
            "layers, row-major": lambda: gs.save(path, model=chains[0], durable=False),
        },
        nbytes=2 * GIB,
    )
    share = ("layers, column-major", "layers, row-major")
    return ratios(found, {"row-major in layers: share of the speed": share})


def opening(folder: Path) -> Figures:
    """Return what opening the files of Julia's takes beside PyMongo's decoder, over all of them."""
    files = sorted((Path(__file__).parents[1] / "tests/fixtures/julia").glob("*.bson"))
    found: dict[str, list[float]] = {}
    for file in files:
        octets = file.read_bytes()
        octets = octets[: int.from_bytes(octets[:4], "little")]
        times = alternating(
            {
                "PyMongo's decoder": lambda octets=octets: bson.decode(octets),
                "open_file": lambda file=file: gs.open_file(file),
                "load": lambda file=file: gs.load(file, lost="placeholder"),
            },
            is_settled=False,
        )
        for name, value in times.items():
            found.setdefault(name, []).append(value)
    totals: Figures = {"files": len(files)} | {k: round(sum(v), 2) for k, v in found.items()}
    for name in ("open_file", "load"):
        pairs = zip(found[name], found["PyMongo's decoder"], strict=True)
        shares = [one / other for one, other in pairs]
        totals[f"{name}: times the decoder, median file"] = round(statistics.median(shares), 2)
    return totals


def chains(folder: Path) -> Figures:
    """Return what a Chain of 1,000 Dense layers takes beside a dict of its arrays."""
    model = gs.Chain(*(gs.Dense(16, 16) for _ in range(1000)))
    arrays = named(gs.params(model))
    one, other = folder / "model.bson", folder / "arrays.bson"
    found = alternating(
        {
            "save": lambda: gs.save(one, model=model, durable=False),
            "save of the arrays": lambda: gs.save(other, arrays, durable=False),
            "load": lambda: gs.load(one),
            "load of the arrays": lambda: gs.load(other),
        }
    )
    pairs = {name: (name, f"{name} of the arrays") for name in ("save", "load")}
    return ratios(found, {f"{name}: times the arrays'": pair for name, pair in pairs.items()})


def growth(folder: Path) -> Figures:
    """Return microseconds for each array of 128 bytes, for more and more of them."""
    found: Figures = {}
    path = folder / "growth"
    for count in (1_000, 10_000, 100_000):
        arrays = tiny(count)
        times = alternating(
            {
                "save": lambda arrays=arrays: gs.save(path, arrays, durable=False),
                "load": lambda: gs.load(path),
            },
            3,
        )
        for name, value in times.items():
            found[f"{name}, {count:,} arrays, µs each"] = round(value * 1000 / count, 2)
    return found


MEMORY = """
import sys, numpy as np, gpustore as gs
path, gib, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def now(): return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def peak():  # getrusage knows the peak of the process that forked this one, if that was higher
    found = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(found[0].split()[1]) / 1024
if what != "load":
    weights = [np.ones((4096, 8192), "f4") for _ in range(8 * gib)]
    model = gs.Chain(*(gs.Dense(w, False) for w in weights)) if what == "layers" else weights
gs.save(path + ".warm", np.ones(2))
gs.load(path + ".warm")
before = max(now(), peak() if what != "load" else 0)
if what == "load":
    model = gs.load(path, "model")
    print(now() - before)
else:
    gs.save(path, model=model)
    print(peak() - before)
"""


def memory(folder: Path, gib: int) -> Figures:
    """Return the MiB of resident memory above the model's own, in processes of their own."""
    found = {}
    for what in ("save", "layers", "load"):
        arguments = [sys.executable, "-c", MEMORY, str(folder / "memory"), str(gib), what]
        output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
        label = {"layers": "save of row-major layers"}.get(what, what)
        found[f"{label}, {gib} GiB: MiB above"] = round(float(output), 1)
    return found


def big(folder: Path) -> Figures:
    """Return the seconds that 12 GiB take: saved, loaded, verified, three arrays of 4 GiB."""
    block = np.random.default_rng(0).random(GIB // 4, "f4")
    path, found = folder / "big", {}
    start = time.perf_counter()
    gs.save(path, {name: np.broadcast_to(block, (4, block.size)) for name in "abc"}, durable=False)
    found["save, s"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    loaded = gs.load(path, verify=True)
    found["verified load, s"] = round(time.perf_counter() - start, 1)
    found["GiB"] = round(path.stat().st_size / GIB, 1)
    assert all(np.array_equal(loaded[name][row], block) for name in "abc" for row in range(4))
    return found


def tiny(count: int) -> dict[str, Any]:
    return named([np.full(32, index, "f4") for index in range(count)])


def named(arrays: list[Any]) -> dict[str, Any]:
    return {f"a{index}": array for index, array in enumerate(arrays)}


# --- results ----------------------------------------------------------------------------------


def table(results: dict[str, Figures]) -> str:
    lines = []
    for case, found in results.items():
        lines += ["", case]
        for name, value in found.items():
            is_time = ":" not in name and "," not in name and name not in ("GiB", "files")
            lines.append(f"  {name:46} {value:10.2f}{' ms' if is_time else ''}")
    return "\n".join(lines[1:])


def plot(results: dict[str, Figures], path: Path) -> None:
    """Draw the times of each case beside its rivals', and how cost grows with the number."""
    if optional("matplotlib") is None:
        print("matplotlib is not installed: no plot (pip install 'gpustore[bench]')")
        return
    pyplot = importlib.import_module("matplotlib.pyplot")
    importlib.import_module("matplotlib").use("Agg")
    cases = [case for case, found in results.items() if "plain write" in found]
    rows = -(-(len(cases) + 1) // 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(11, 3.6 * rows))
    axes = list(grid.flat)
    growth = axes[len(cases)]
    for unused in axes[len(cases) + 1 :]:
        unused.set_axis_off()
    for axis, case in zip(axes, cases, strict=False):
        found = {k: v for k, v in results[case].items() if ":" not in k}
        colours = ["tab:blue" if "save" in k or "load" in k else "tab:gray" for k in found]
        colours = [
            "tab:orange" if "safetensors" in k else c for k, c in zip(found, colours, strict=True)
        ]
        bars = axis.barh(list(found), list(found.values()), color=colours)
        axis.bar_label(bars, [f" {v:.0f}" if v >= 100 else f" {v:.3g}" for v in found.values()])
        axis.margins(x=0.2)
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        axis.set_title(case, fontsize=10)
    for name in ("save", "load"):
        found = {k: v for k, v in results["growth"].items() if k.startswith(name)}
        counts = [int(key.split(",", 1)[1].split(" arrays")[0].replace(",", "")) for key in found]
        growth.plot(counts, list(found.values()), marker="o", label=name)
    growth.set(xscale="log", xlabel="arrays of 128 bytes", ylabel="µs for each", ylim=(0, None))
    growth.legend()
    growth.set_title("growth", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    image = importlib.import_module("PIL.Image")  # of matplotlib's
    image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--big", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    results: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        arrays = named([rng.random(GIB // 256, "f4").reshape(2048, -1) for _ in range(64)])
        results["1 GiB in 64 arrays"] = rivals(folder, arrays)
        results["1 GiB in 1 array"] = rivals(folder, {"a": np.stack(list(arrays.values()))})
        del arrays
        results["10,000 arrays of 128 bytes"] = rivals(folder, tiny(10_000))
        results["the same, detached"] = rivals(folder, tiny(10_000), "detached")
        matrices = named([np.full((16, 8), index, "f4") for index in range(10_000)])
        results["10,000 row-major matrices, 16 by 8"] = rivals(folder, matrices)
        turns = [np.full([(16, 8), (16,)][index % 2], index, "f4") for index in range(10_000)]
        results["10,000 arrays, 16 by 8 and 16 in turn"] = rivals(folder, named(turns))
        shapes = [(64, 64)] * 4 + [(64,), (64, 256), (256,), (64,)]
        layers = [np.full(shapes[index % 8], index, "f4") for index in range(2_000)]
        results["2,000 arrays of a transformer, 64 wide"] = rivals(folder, named(layers))
        del turns, layers, matrices
        results["Julia's files of the tests"] = opening(folder)
        results["Chain of 1,000 Dense(16, 16) beside a dict of its arrays"] = chains(folder)
        results["1 GiB in each memory order"] = orders(folder)
        results["growth"] = growth(folder)
        results["memory"] = memory(folder, 1)
        if options.big:
            results["memory"] |= memory(folder, 8)
            results["12 GiB in 3 arrays"] = big(folder)
    print(table(results))
    record = {"machine": machine(), "runs": RUNS, "figures": results}
    (RESULTS / "cpu.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    plot(results, RESULTS / "cpu.png")


if __name__ == "__main__":
    main()
