"""Calls timed in turn, on a device, within a given time; and what failed among the rivals."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu import Figures

RUNS = 7
SLOW_MS = 4000
FAILED: dict[str, str] = {}


def in_turn(
    calls: dict[str, Callable[[], Any]],
    cupy: Any,
    until: float,
    rivals: dict[str, Callable[[], Any]] | None = None,
    case: str = "",
    folder: Path | None = None,
) -> Figures:
    """Return the median time of each call in ms, the wait for the device part of each.

    All of them in turn in each round, as long as there is time, twice at least; the first time is
    left out where there are others. A rival ("name save", "name load") that is slow has one round;
    one that fails is left out, and named. The folder is emptied before each round: what is gone
    need not be written to the disk.
    """
    whole = calls | (rivals or {})
    times: dict[str, list[float]] = {name: [] for name in whole}
    due = list(whole)
    for turn in range(RUNS + 1):
        if turn > 1 and time.perf_counter() > until:
            break
        for path in folder.iterdir() if folder else ():
            path.unlink()
        os.sync()
        for name in due.copy():
            try:
                times[name].append(milliseconds(whole[name], cupy))
            except Exception as error:
                if name in calls:
                    raise
                failed(f"{case}: {name}", error)
            if name not in calls and (not times[name] or times[name][-1] > SLOW_MS):
                rival = name.split()[0]  # fastsafetensors reads the file of safetensors
                due = [other for other in due if not other.split()[0].endswith(rival)]
    known = {name: all_[1:] or all_ for name, all_ in times.items() if all_}
    return {name: round(statistics.median(all_), 2) for name, all_ in known.items()}


def milliseconds(call: Callable[[], Any], cupy: Any) -> float:
    start = time.perf_counter()
    found = call()
    cupy.cuda.Device().synchronize()
    taken = (time.perf_counter() - start) * 1000
    del found
    return taken


def failed(name: str, error: Exception) -> None:
    FAILED[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    print(f"left out, {name}: {FAILED[name]}", flush=True)


def speeds(nbytes: int, found: Figures) -> Figures:
    return {f"{name}: GB/s": round(nbytes / ms / 1e6, 2) for name, ms in found.items()}
