"""A user's script over the whole interface, for `mypy --strict` (make lint) and for running."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpustore
import gpustore as gs
from gpustore import (
    Chain,
    Conv,
    Dense,
    Symbol,
    difference,
    errors,
    figures,
    inspection,
    relu,
    softmax,
    testing,
)


@gs.model_type("Main.TypedNet")
@dataclasses.dataclass
class TypedNet:
    body: Chain
    scale: float

    def __call__(self, x: NDArray[np.float32]) -> Any:
        return self.body(x) * self.scale


@gs.model_type
@dataclasses.dataclass
class TypedPair:
    first: int
    second: int


def devices(model: Chain) -> Chain:
    """Move a model about."""
    status: gs.CUDAStatus = gs.cuda_status()
    where: str = gs.device_of(model)
    cause: str | None = status.cause
    moved: Chain = gs.gpu(model, where) if where == "cpu" else gs.cpu(model)
    assert bool(status) or cause
    return moved


def weights(model: Chain) -> list[Any]:
    """Copy parameters between models."""
    taken: list[Any] = gs.data(gs.params(model))
    gs.loadparams(model, taken)
    gs.loadmodel(model, gs.state(model))
    gs.reset(gs.testmode(model))
    tracked: gs.TrackedArray = gs.param(np.ones(2))
    return [*taken, tracked.data]


def files(folder: Path, net: TypedNet) -> None:
    """Save and load in every way."""
    path = folder / "net.bson"

    def report(done: int, total: int) -> None:
        assert 0 <= done <= total

    gs.save(path, net=net, pair=TypedPair(1, 2), name=Symbol("net"), progress=report)
    gs.save(path, {"net": net}, on_gpu="error", durable=False, layout="detached")
    loaded: TypedNet = gs.load(path, "net", device="cpu", verify=True, progress=report)
    everything: dict[str, Any] = gs.load(path, device={"cuda:0": "cpu"}, mmap=False)
    again: TypedNet = gs.load(str(path), "net", device=lambda tag: "cpu", lost="placeholder")
    assert loaded.scale == again.scale == everything["net"].scale
    with gs.open_file(path) as stored:
        kept: gs.StoredFile = stored
        shapes: list[tuple[int, ...]] = [entry.shape for entry in kept.arrays]
        nbytes: int = sum(entry.nbytes for entry in kept.arrays)
        tags: dict[str, int] = kept.tags
        one: Any = kept.read(kept.arrays[0].path, region=np.s_[:1])
        is_sound: bool = bool(kept.verify())
        assert shapes and nbytes and not tags and one.size and is_sound
    try:
        gs.load(path, "nothing")
    except gs.EntryNotFoundError as error:
        known: errors.GpustoreError = error
        print(known)


def look(path: Path) -> None:
    """Look into a file, and compare it with itself, as the command does."""
    with gs.open_file(path) as stored, gs.open_file(path) as other:
        found: inspection.Inspection = inspection.inspect(stored)
        measured: list[figures.Figures | None] = inspection.figures_of(stored)
        text: dict[str, Any] = inspection.as_json(found, measured)
        era: str = str(found.era)
        apart: difference.Difference = difference.difference(stored, other, tolerance=1e-6)
        array: Any = stored.view(stored.arrays[0])
        assert text["loads_without_gpu"] and era.startswith("Flux") and not apart.changes
        assert measured[0] == figures.figures(array)


def julia() -> None:
    """Hold values of Julia's."""
    kind: gs.JuliaType = gs.JuliaType.named("Main.Thing", 1)
    thing = gs.Struct(kind, [1, gs.missing], ("a", "b"))
    named: gs.NamedTuple = gs.NamedTuple(lr=0.1)
    assert thing.a == 1 and named.lr == 0.1 and gs.Char("x") == "x"


def run(folder: Path) -> None:
    """Run everything."""
    rng = np.random.default_rng(0)
    model = Chain(Conv((3, 3), (1, 2), relu), gs.flatten, Dense(8, 2, gs.tanh, rng=rng), softmax)
    y: Any = model(np.ones((4, 4, 1, 3), np.float32))
    assert y.shape == (2, 3)
    assert gs.device_of(devices(model)) == "cpu" and len(weights(model)) == 5
    files(folder, TypedNet(Chain(model[2]), 2.0))
    look(folder / "net.bson")
    julia()
    same: TypedNet = testing.assert_roundtrip(
        TypedNet(Chain(Dense(2, 2)), 1.5), through=("cpu", "cuda-tagged", "julia")
    )
    with testing.fake_cuda(2) as cupy:
        assert gs.device_of(gs.gpu(same, 1)) == "cuda:1" and cupy.__version__
    assert gpustore.__version__
