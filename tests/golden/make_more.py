"""Makes more golden files of version 1 of the format: python tests/golden/make_more.py FOLDER.

Those of `make.py` hold a value of each kind; these hold what else a file can be: one value or one
object instead of entries, lengths of -1, arrays that begin on a page, layers as older versions of
Flux laid them out, values of Julia's own and functions with their code (of the fixtures of Julia).
As there, a golden file is never made anew.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import gpustore as gs
from gpustore import encoder
from gpustore.julia import JuliaType, NamedTuple, Symbol
from gpustore.values import Char, Int128, UInt128, missing

FIXTURES = Path(__file__).parent.parent / "fixtures" / "julia"
OF_JULIA = [
    "arrays_nested_v1", "bitarrays_v1", "bitsarrays_v1", "conv_anon_flux012_v1", "conv_flux012_v1",
    "cyclic_v1", "dates_v1", "dicts_v1", "functions_v1", "gpu_model_g5_v1", "hyper_v1",
    "norms_flux010_v1", "optimisers_flux012_v1", "ranges_v1", "recurrent_flux010_v1",
    "scalars_int_v1", "scalars_text_v1", "shared_v1", "structs_v1", "tuples_v1", "types_v1",
    "wrappers_v1",
]  # fmt: skip
ERAS = ["0.9", "0.12", "0.13", "0.14", "0.16"]
Point = namedtuple("Point", ["x", "y"])


@dataclass
class Net:
    """A class of a user."""

    weight: Any
    name: str
    below: Any = None


def values() -> dict[str, Any]:
    """Return the kinds of value that `make.values` has not."""
    kinds = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    return {
        "float8": {kind: np.arange(5).astype(getattr(ml_dtypes, kind)) for kind in kinds},
        "timedelta64": np.arange(3).astype("m8[ms]"),
        "wide": [Int128(7), UInt128(7)],
        "characters": [Char("λ"), Char("a")],
        "missing": missing,
        "named_tuple": NamedTuple(a=1, b=(Symbol("c"), 2.5)),
        "type": JuliaType.named("Core.Array", JuliaType.named("Core.Float32"), 2),
        "functions": [gs.relu, gs.tanh, gs.softmax],
        "class": Net(np.ones((2, 3), "f4"), "outer", Net(np.zeros(2), "inner")),
        "point": Point(1, 2.5),
        "names": {"tag": "array", "_backrefs": 1, "$ref": 2, "": 3, "é": 4},
    }


def layers() -> Any:
    """Return layers whose fields moved from one Flux to the next, with the same weights always."""
    rng = np.random.default_rng(6)
    return gs.Chain(
        gs.Conv((3, 3), (1, 4), gs.relu, rng=rng),
        gs.BatchNorm(4),
        gs.MaxPool((2, 2)),
        gs.Dropout(0.5),
        gs.flatten,
        gs.Dense(16, 3, rng=rng),
    )


def of_julia() -> dict[str, Any]:
    """Return what the fixtures of Julia hold: structs, functions with code, lost arrays."""
    return {
        name: dict(gs.load(FIXTURES / f"{name}.bson", lost="placeholder", mmap=False))
        for name in OF_JULIA
    }


def pages() -> dict[str, Any]:
    """Return arrays above and below the size from which they begin on a page."""
    return {"a": np.zeros(2**18, "f4"), "b": np.arange(20_000)}


def many() -> list[Any]:
    return [np.full(50 + n, n, "f4") for n in range(30)]


def register() -> None:
    gs.model_type("Main.Golden.Net")(Net)
    gs.model_type("Main.Golden.Point")(Point)


def main() -> None:
    folder = Path(sys.argv[1])
    register()
    gs.save(folder / "v1_more.bson", values())
    gs.save(folder / "v1_value.bson", [1, np.arange(3), "a file that is a list"])
    gs.save(folder / "v1_object.bson", gs.Dense(np.ones((2, 3), "f4"), np.zeros(2, "f4")))
    gs.save(folder / "v1_julia.bson", of_julia())
    large = pages()
    gs.save(folder / "v1_pages_inline.bson", large)
    gs.save(folder / "v1_pages_detached.bson", large, layout="detached")
    with mock.patch.object(encoder, "INLINE_LIMIT", 2000):
        gs.save(folder / "v1_long.bson", many=many(), layout="inline")
    for era in ERAS:
        gs.save(folder / f"v1_flux{era.replace('.', '')}.bson", model=layers(), flux=era)


if __name__ == "__main__":
    main()
