"""A GPU-aware model store: Julia/Flux `.bson` files and NumPy, CuPy or DLPack arrays."""

from gpustore.activations import *  # noqa: F403
from gpustore.activations import __all__ as _activations
from gpustore.devices import CUDAStatus, cuda_status
from gpustore.errors import (
    CUDAUnavailableError,
    DeviceDataLostError,
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
from gpustore.layers import Chain, Dense, glorot_normal, glorot_uniform
from gpustore.load import StoredFile, load, open_file
from gpustore.save import save
from gpustore.tree import (
    Params,
    TrackedArray,
    cpu,
    data,
    device_of,
    gpu,
    loadmodel,
    loadparams,
    param,
    params,
    reset,
    state,
    testmode,
)
from gpustore.values import Char, DataFrame, JuliaDict, JuliaSet, Range, missing
from gpustore.version import __version__

__all__ = [
    "CUDAStatus",
    "CUDAUnavailableError",
    "Chain",
    "Char",
    "DataFrame",
    "Dense",
    "DeviceDataLostError",
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
    *_activations,
]
