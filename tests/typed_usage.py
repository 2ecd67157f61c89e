"""A user's script over the whole interface, for `mypy --strict` (make lint) and for running."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import gpustore
import gpustore as gs
from gpustore import (
    Chain,
    Conv,
    Dense,
    Symbol,
    convert,
    difference,
    errors,
    figures,
    inspection,
    interop,
    relu,
    softmax,
    testing,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Image = NDArray[np.float32]


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


def julia(folder: Path) -> None:
    """Hold values of Julia's."""
    kind: gs.JuliaType = gs.JuliaType.named("Main.Thing", 1)
    thing = gs.Struct(kind, [1, gs.missing], ("a", "b"))
    named: gs.NamedTuple = gs.NamedTuple(lr=0.1)
    assert thing.a == 1 and named.lr == 0.1 and gs.Char("x") == "x"
    function: gs.OpaqueFunction = gs.OpaqueFunction(gs.JuliaType.named("Main.#f"), [])
    lost: gs.LostArray = gs.LostArray(gs.JuliaType.named("CUDA.CuArray"), (2,), thing)
    element: str = lost.element_type
    steps: gs.Range = gs.Range(gs.JuliaType.named("Base.UnitRange"), [1, 2])
    table: gs.DataFrame = gs.DataFrame(a=[1, 2])
    ordered: gs.JuliaDict = gs.JuliaDict({1: 2})
    chosen: gs.JuliaSet = gs.JuliaSet({1})
    several: gs.Params = gs.Params([])
    assert element and table["a"] and ordered[1] and chosen and not several.arrays()
    gs.save(folder / "function.bson", function=function)
    again: gs.OpaqueFunction = gs.load(folder / "function.bson", "function")
    assert again.type == function.type and steps.data == [1, 2]


def layers(image: Image, series: Image) -> list[Any]:
    """Call every layer: image (8, 8, 4, 3), series (4, 5)."""
    first: list[Any] = [
        gs.ConvTranspose((3, 3), (4, 2)), gs.CrossCor((3, 3), (4, 2)),
        gs.DepthwiseConv((3, 3), (4, 8)), Conv((3, 3), (4, 2), pad=gs.SamePad(), groups=2),
        gs.MaxPool((2, 2)), gs.MeanPool((2, 2)), gs.GlobalMaxPool(), gs.GlobalMeanPool(),
        gs.AdaptiveMaxPool((2, 2)), gs.AdaptiveMeanPool((2, 2)), gs.PixelShuffle(2),
        gs.Upsample("bilinear", scale=2), gs.BatchNorm(4), gs.InstanceNorm(4),
        gs.GroupNorm(4, 2), gs.LayerNorm(8), gs.Dropout(0.5), gs.AlphaDropout(0.5), gs.flatten,
    ]  # fmt: skip
    second: list[Any] = [
        gs.RNN(4, 2), gs.LSTM(4, 2), gs.GRU(4, 2), gs.GRUv3(4, 2), gs.RNNCell(4, 2),
        gs.LSTMCell(4, 2), gs.GRUCell(4, 2), gs.GRUv3Cell(4, 2), gs.Recur(gs.RNNCell(4, 2)),
        gs.Scale(4), gs.SkipConnection(gs.tanh, gs.vcat), gs.Parallel(gs.hcat, gs.tanh, gs.relu),
        gs.Maxout(gs.tanh, gs.relu), gs.Bilinear((4, 4), 2),
    ]  # fmt: skip
    words = np.array([1, 3])
    outputs: list[Any] = [layer(image) for layer in first] + [layer(series) for layer in second]
    outputs += [gs.Embedding(5, 2)(words), gs.EmbeddingBag(5, 2)(words)]
    outputs.append(gs.PairwiseFusion(np.add, gs.tanh, gs.relu)((series, series)))
    part = Dense(4, 4, bias=False, init=gs.glorot_normal)
    attend = gs.MultiHeadAttention(2, part, part, part, gs.identity, part)
    q = series[:, :, None]
    outputs += [attend(q), gs.dot_product_attention(q, q, q), gs.normalise(series)]
    return [*outputs, gs.glorot_uniform(2, 3)]


def activations(x: Image) -> list[Any]:
    """Call every activation function."""
    return [
        f(x)
        for f in (
            gs.celu, gs.elu, gs.gelu, gs.gelu_erf, gs.gelu_sigmoid, gs.gelu_tanh, gs.hardsigmoid,
            gs.hardswish, gs.hardtanh, gs.hardσ, gs.leakyrelu, gs.lisht, gs.logcosh,
            gs.logsigmoid, gs.logsoftmax, gs.logσ, gs.mish, gs.relu6, gs.rrelu, gs.selu,
            gs.sigmoid, gs.sigmoid_fast, gs.softplus, gs.softshrink, gs.softsign, gs.swish,
            gs.tanh_fast, gs.tanhshrink, gs.thresholdrelu, gs.trelu, gs.σ,
        )
    ]  # fmt: skip


def failure(path: Path) -> str:
    """Name what is wrong with a file, by the class of its error."""
    try:
        gs.load(path)
    except (gs.TruncatedFileError, gs.FutureVersionError, gs.FormatError) as error:
        return f"file: {error}"
    except gs.CUDAUnavailableError as error:
        return error.cause or ""
    except (gs.DeviceMemoryError, gs.DeviceError, gs.DeviceDataLostError) as error:
        return f"device: {error}"
    except (gs.IntegrityError, gs.MismatchError, gs.OpaqueCodeError) as error:
        return f"content: {error}"
    except (gs.UnsupportedValueError, gs.MissingExtraError, gs.GpustoreError) as error:
        return f"other: {error}"
    return ""


def edges(folder: Path) -> None:
    """Convert files, meet other frameworks, draw examples."""
    np.savez(folder / "weights.npz", w=np.ones(3))
    narrays: int = convert.convert(folder / "weights.npz", folder / "weights.bson", unshare=True)
    drawn: list[SearchStrategy[Any]] = [
        testing.arrays(max_dims=2), testing.models(), testing.values(), testing.documents()
    ]  # fmt: skip
    testing.assert_same([1, np.ones(2)], [1, np.ones(2)])
    assert narrays == 1 and len(drawn) == 4
    try:
        kept: Any = interop.in_framework([interop.tensor(np.ones(2))], "torch")
        assert interop.to_torch(Chain(Dense(2, 2))) is not None and kept
    except gs.MissingExtraError as error:
        print(error)


def run(folder: Path) -> None:
    """Run everything."""
    rng = np.random.default_rng(0)
    model = Chain(Conv((3, 3), (1, 2), relu), gs.flatten, Dense(8, 2, gs.tanh, rng=rng), softmax)
    y: Any = model(np.ones((4, 4, 1, 3), np.float32))
    assert y.shape == (2, 3)
    assert gs.device_of(devices(model)) == "cpu" and len(weights(model)) == 5
    files(folder, TypedNet(Chain(model[2]), 2.0))
    look(folder / "net.bson")
    julia(folder)
    image, series = np.ones((8, 8, 4, 3), np.float32), np.ones((4, 5), np.float32)
    assert len(layers(image, series)) == 40 and len(activations(series)) == 31
    (folder / "text.bson").write_text("no model")
    assert failure(folder / "text.bson").startswith("file: ")
    edges(folder)
    same: TypedNet = testing.assert_roundtrip(
        TypedNet(Chain(Dense(2, 2)), 1.5), through=("cpu", "cuda-tagged", "julia")
    )
    with testing.fake_cuda(2) as cupy:
        moved: testing.FakeCudaArray = gs.gpu(np.ones(2), 1)
        assert gs.device_of(gs.gpu(same, 1)) == "cuda:1" and cupy.__version__ and moved.get().size
    assert gpustore.__version__ == gs.__version__
