"""Makes the golden files of this version of the format: python tests/golden/make.py FOLDER.

A golden file is never made anew: a file that was readable once is readable for ever. What a later
version of the format adds gets files of its own beside these.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import gpustore as gs
from gpustore.testing import fake_cuda


def values() -> dict[str, Any]:
    """Return a value of every kind that the format has."""
    shared = np.arange(6, dtype="f4").reshape(2, 3)
    cycle: list[Any] = [1]
    cycle.append(cycle)
    codes = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
    return {
        "dtypes": {code: np.arange(5).astype(code) for code in codes},
        "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
        "datetime64": np.arange(3).astype("M8[s]"),
        "row_major": np.arange(24, dtype="i4").reshape(2, 3, 4),
        "column_major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "empty": np.zeros((0, 3), "f4"),
        "scalar": np.array(3.5, "f4"),
        "row": [np.full(3, n, "f4") for n in range(20)],
        "shared": [shared, shared],
        "cycle": cycle,
        "plain": [None, True, 7, 2**63, -(2**127), 1.5, 2j, "tëxt", b"\0\xff", (1, "a")],
        "numbers": [np.int32(7), np.uint8(7), np.float16(7), np.complex64(7j)],
        "keys": {1: "one", (2, 3): "two"},
        "sets": [{1, 2}, frozenset({"a"})],
        "ranges": [range(3), range(0, 9, 2), range(0)],
        "dates": [datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2, 3, 4, 5, 6000)],
        "symbol": gs.julia.Symbol("name"),
        "model": gs.Chain(
            gs.Dense(np.arange(6, dtype="f4").reshape(2, 3), np.zeros(2, "f4"), gs.relu),
            gs.Dense(np.ones((1, 2), "f4"), False),
            gs.softmax,
        ),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    gs.save(folder / "v1_inline.bson", values(), layout="inline")
    gs.save(folder / "v1_detached.bson", values(), layout="detached")
    with fake_cuda(2):
        tagged = {"a": gs.gpu(np.arange(5, dtype="f4"), "cuda:1"), "b": np.arange(3)}
        gs.save(folder / "v1_tagged.bson", tagged, on_gpu="tag")


if __name__ == "__main__":
    main()
