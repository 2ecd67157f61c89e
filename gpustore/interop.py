"""Arrays of PyTorch and JAX: of the same memory as NumPy's and CuPy's, and models of PyTorch.

Saving needs nothing from here: their arrays are asked through DLPack.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import devices, tree
from gpustore.errors import MissingExtraError, UnsupportedValueError


def in_framework(x: Any, framework: str) -> Any:
    """Return the model with its arrays as PyTorch's ("torch") or JAX's ("jax"); values are theirs.

    Tensors share the memory of the arrays, on the CPU and on CUDA devices, whatever their strides,
    bfloat16 and float8 too. JAX shares that of row-major arrays on the CPU, and copies the rest.
    Shared arrays stay shared. Raises MissingExtraError where the framework is not installed,
    UnsupportedValueError, by path, for a dtype that it lacks.

    >>> in_framework([1, "text"], "tensorflow")
    Traceback (most recent call last):
        ...
    gpustore.errors.UnsupportedValueError: framework: expected 'torch' or 'jax', found 'tensorflow'
    """
    convert = _CONVERTERS.get(framework)
    if convert is None:
        known = " or ".join(map(repr, _CONVERTERS))
        raise UnsupportedValueError(f"framework: expected {known}, found {framework!r}")
    imported(framework, framework)
    made: dict[int, Any] = {}
    for path, leaf in tree.walk_entries(x):
        if devices.is_array(leaf) and tree.is_numeric(leaf) and id(leaf) not in made:
            try:
                made[id(leaf)] = convert(leaf)
            except devices.EXPORT_ERRORS as error:
                raise UnsupportedValueError(
                    f"{path}: {leaf.dtype} {tuple(leaf.shape)}: {framework} cannot take it, found: "
                    f"{error}; convert it first, or load without framework="
                ) from error
    return tree.rebuild(x, lambda node: made.get(id(node), node)) if made else x


def tensor(array: Any) -> Any:
    """Return a PyTorch tensor of the same memory as a NumPy or CuPy array; its dtype is kept.

    Read-only arrays and those of negative strides are copied; a tensor is returned itself. Raises
    MissingExtraError without PyTorch.
    """
    torch = imported("torch", "torch")
    if isinstance(array, torch.Tensor):
        return array
    name = array.dtype.name
    is_extension = array.dtype.kind == "V" or name.startswith(("bfloat16", "float8_"))
    bits = array.view(f"i{array.dtype.itemsize}") if is_extension else array
    if isinstance(array, np.ndarray):
        if not bits.flags.writeable or any(step < 0 for step in bits.strides):
            bits = bits.copy(order="K")  # a tensor of either would not be safe, or cannot be
        found = torch.from_numpy(bits)
    else:
        found = torch.from_dlpack(bits)
    return found.view(getattr(torch, name)) if is_extension else found


def _jax_array(array: Any) -> Any:
    numpy = imported("jax.numpy", "jax")
    try:
        return numpy.from_dlpack(array)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        BufferError,
    ):  # an order or dtype not in its DLPack
        return numpy.asarray(devices.to_host(array))


_CONVERTERS: dict[str, Callable[[Any], Any]] = {"torch": tensor, "jax": _jax_array}


def imported(module: str, package: str) -> Any:
    """Return a module, or raise MissingExtraError, which says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{package} is not installed: pip install {package}") from error


def to_torch(model: Any, *, ndim: int | None = None) -> Any:
    """Return a Flux model as a `torch.nn` module: inputs and outputs with axes in reverse order.

    A matrix (features, batch) becomes (batch, features), an image (width, height, channels, batch)
    becomes (batch, channels, height, width): `to_torch(m)(torch.from_numpy(x.T)).T` is `m(x)`, to
    rounding. Weights are copies, on the device of the model. The module is in evaluation mode, as
    Flux's layers are outside training.

    `ndim` is the number of axes of the input (4 for images): modules that torch has for each are
    chosen by it, and without it by the first layer that shows it.

    Takes Chain, Dense, Conv, CrossCor, DepthwiseConv, ConvTranspose, BatchNorm, InstanceNorm,
    GroupNorm, LayerNorm, MaxPool, MeanPool, GlobalMaxPool, GlobalMeanPool, Dropout,
    AlphaDropout, flatten and activation functions; UnsupportedValueError names any other layer by
    its path.
    """
    nn = imported("torch.nn", "torch")
    from gpustore.torch_modules import Converter

    return Converter(nn, tensor, 0 if ndim is None else ndim - 2).module(model).eval()
