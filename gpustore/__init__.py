"""A GPU-aware model store: Julia/Flux `.bson` files and NumPy, CuPy or DLPack arrays."""

import importlib
from typing import TYPE_CHECKING, Any

from gpustore.devices import CUDAStatus, cuda_status
from gpustore.errors import (
    CUDAUnavailableError,
    DeviceDataLostError,
    DeviceError,
    DeviceMemoryError,
    EntryNotFoundError,
    FormatError,
    FutureVersionError,
    GpustoreError,
    IntegrityError,
    MismatchError,
    MissingExtraError,
    OpaqueCodeError,
    TruncatedFileError,
    UnsupportedValueError,
)
from gpustore.flux import model_type
from gpustore.julia import JuliaType, LostArray, NamedTuple, OpaqueFunction, Struct, Symbol
from gpustore.load import load
from gpustore.model_state import loadmodel, reset, state, testmode
from gpustore.parameters import data, loadparams, param, params
from gpustore.save import save
from gpustore.stored import StoredFile, open_file
from gpustore.tree import Params, TrackedArray, cpu, device_of, gpu
from gpustore.values import Char, DataFrame, JuliaDict, JuliaSet, Range, missing
from gpustore.version import __version__

if TYPE_CHECKING:
    from gpustore.activations import *  # noqa: F403
    from gpustore.attention import MultiHeadAttention, dot_product_attention
    from gpustore.composition import (
        Bilinear,
        Embedding,
        EmbeddingBag,
        Maxout,
        PairwiseFusion,
        Parallel,
        Scale,
        SkipConnection,
    )
    from gpustore.convolution import Conv, ConvTranspose, CrossCor, DepthwiseConv, SamePad
    from gpustore.functions import flatten, hcat, normalise, vcat
    from gpustore.layers import Chain, Dense, glorot_normal, glorot_uniform
    from gpustore.normalisation import (
        AlphaDropout,
        BatchNorm,
        Dropout,
        GroupNorm,
        InstanceNorm,
        LayerNorm,
    )
    from gpustore.pooling import (
        AdaptiveMaxPool,
        AdaptiveMeanPool,
        GlobalMaxPool,
        GlobalMeanPool,
        MaxPool,
        MeanPool,
        PixelShuffle,
        Upsample,
    )
    from gpustore.recurrent import (
        GRU,
        LSTM,
        RNN,
        GRUCell,
        GRUv3,
        GRUv3Cell,
        LSTMCell,
        Recur,
        RNNCell,
    )

# modules that are imported when one of these names is asked for: files of arrays need none
_LAYERS = {
    "activations": """
        celu elu gelu gelu_erf gelu_sigmoid gelu_tanh hardsigmoid hardswish hardtanh hardσ
        identity leakyrelu lisht logcosh logsigmoid logsoftmax logσ mish relu relu6 rrelu
        selu sigmoid sigmoid_fast softmax softplus softshrink softsign swish tanh tanh_fast
        tanhshrink thresholdrelu trelu σ
    """,
    "attention": "MultiHeadAttention dot_product_attention",
    "composition": """
        Bilinear Embedding EmbeddingBag Maxout PairwiseFusion Parallel Scale SkipConnection
    """,
    "correlation": "",
    "eras": "",
    "convolution": "Conv ConvTranspose CrossCor DepthwiseConv SamePad",
    "functions": "flatten hcat normalise vcat",
    "layers": "Chain Dense glorot_normal glorot_uniform",
    "normalisation": "AlphaDropout BatchNorm Dropout GroupNorm InstanceNorm LayerNorm",
    "pooling": """
        AdaptiveMaxPool AdaptiveMeanPool GlobalMaxPool GlobalMeanPool MaxPool MeanPool
        PixelShuffle Upsample
    """,
    "recurrent": "GRU GRUCell GRUv3 GRUv3Cell LSTM LSTMCell RNN RNNCell Recur",
}
_MODULES = {name: module for module, names in _LAYERS.items() for name in names.split()}


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name in _LAYERS:
            return importlib.import_module(f"gpustore.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module 'gpustore' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"gpustore.{_MODULES[name]}"), name)
        globals()[name] = found  # asked for once
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "AdaptiveMaxPool",
    "AdaptiveMeanPool",
    "AlphaDropout",
    "BatchNorm",
    "Bilinear",
    "Conv",
    "ConvTranspose",
    "CrossCor",
    "DepthwiseConv",
    "Dropout",
    "Embedding",
    "EmbeddingBag",
    "GRU",
    "GRUCell",
    "GRUv3",
    "GRUv3Cell",
    "GlobalMaxPool",
    "GlobalMeanPool",
    "GroupNorm",
    "InstanceNorm",
    "LSTM",
    "LSTMCell",
    "LayerNorm",
    "MaxPool",
    "Maxout",
    "MeanPool",
    "MultiHeadAttention",
    "PairwiseFusion",
    "Parallel",
    "PixelShuffle",
    "RNN",
    "RNNCell",
    "Recur",
    "SamePad",
    "Scale",
    "SkipConnection",
    "Upsample",
    "dot_product_attention",
    "flatten",
    "hcat",
    "normalise",
    "vcat",
    "CUDAStatus",
    "CUDAUnavailableError",
    "Chain",
    "Char",
    "DataFrame",
    "Dense",
    "DeviceDataLostError",
    "DeviceError",
    "DeviceMemoryError",
    "EntryNotFoundError",
    "FormatError",
    "FutureVersionError",
    "GpustoreError",
    "IntegrityError",
    "JuliaDict",
    "JuliaSet",
    "JuliaType",
    "LostArray",
    "MismatchError",
    "MissingExtraError",
    "NamedTuple",
    "OpaqueCodeError",
    "OpaqueFunction",
    "Params",
    "Range",
    "StoredFile",
    "Struct",
    "Symbol",
    "TrackedArray",
    "TruncatedFileError",
    "UnsupportedValueError",
    "cpu",
    "cuda_status",
    "data",
    "device_of",
    "glorot_normal",
    "glorot_uniform",
    "gpu",
    "load",
    "loadmodel",
    "loadparams",
    "missing",
    "model_type",
    "open_file",
    "param",
    "params",
    "reset",
    "save",
    "state",
    "testmode",
    "__version__",
    *_LAYERS["activations"].split(),
]
