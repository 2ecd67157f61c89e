"""How fast are models that Julia wrote opened, beside BSON.jl?

python bench/opening.py --julia COMMAND --bson FOLDER [FOLDER]: needs Julia and the source of
BSON.jl. Julia writes the files, both load them in turn, medians, each after a load that is not
timed; Julia's collector goes between its two and is not timed. A table, and opening.json under
bench/results. The second FOLDER is where the files go.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu import RESULTS, Figures, ratios, table
from import_time import machine

import gpustore as gs

RUNS = 9
HERE = Path(__file__).parent
CASES = {
    "matrix": "a matrix of 8 MB",
    "structs": "8 layers of 512 by 512, as structs",
    "long": "the same with 8 anonymous functions of 600 calls each",
    "convolutions": "8 convolutional layers, as structs",
    "many": "1,900 layers of 32 by 32, as structs",
    "short": "400 short anonymous functions",
}


def milliseconds(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    found = call()
    taken = (time.perf_counter() - start) * 1000
    del found
    return taken


def opening(path: Path, julia: subprocess.Popen[str]) -> Figures:
    """Return the median times in ms, in turn."""
    assert julia.stdin is not None and julia.stdout is not None
    times: dict[str, list[float]] = {"BSON.jl": [], "load": [], "open_file": []}
    for _ in range(RUNS):
        print(path, file=julia.stdin, flush=True)
        times["BSON.jl"].append(float(julia.stdout.readline()) * 1000)
        times["load"].append(milliseconds(lambda: gs.load(path)))
        times["open_file"].append(milliseconds(lambda: gs.open_file(path)))
    found = {name: round(statistics.median(all_), 3) for name, all_ in times.items()}
    pairs = {f"{name}: times as fast": ("BSON.jl", name) for name in ("load", "open_file")}
    return {"MB": round(path.stat().st_size / 1e6, 1)} | ratios(found, pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--julia", default="julia", help="the command that runs Julia")
    parser.add_argument("--bson", required=True, help="the source of BSON.jl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [*shlex.split(options.julia), str(HERE / "opening.jl"), options.bson, folder]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as julia:
            assert julia.stdin is not None and julia.stdout is not None
            version = julia.stdout.readline().strip()
            results = {
                what: opening(Path(folder, f"{name}.bson"), julia) for name, what in CASES.items()
            }
            julia.stdin.close()
    print(table(results))
    bson_jl = Path(options.bson, "Project.toml").read_text().partition('version = "')[2]
    rival = {"julia": version, "BSON.jl": bson_jl.partition('"')[0]}
    record = {"machine": machine() | rival, "runs": RUNS, "figures": results}
    (RESULTS / "opening.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
