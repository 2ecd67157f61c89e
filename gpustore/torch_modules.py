"""Flux's layers as modules of `torch.nn`: tables of names, and what differs between the two."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from gpustore import activations, functions
from gpustore.convolution import Conv, ConvTranspose, CrossCor, DepthwiseConv, both_sides
from gpustore.errors import UnsupportedValueError
from gpustore.layers import Chain, Dense, plain, show
from gpustore.normalisation import (
    AlphaDropout,
    BatchNorm,
    Dropout,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
)
from gpustore.pooling import GlobalMaxPool, GlobalMeanPool, MaxPool, MeanPool

_FUNCTIONS: dict[Callable[..., Any], tuple[str, dict[str, Any]]] = {
    activations.relu: ("ReLU", {}),
    activations.σ: ("Sigmoid", {}),
    activations.sigmoid_fast: ("Sigmoid", {}),
    activations.tanh: ("Tanh", {}),
    activations.tanh_fast: ("Tanh", {}),
    activations.hardσ: ("Hardsigmoid", {}),
    activations.hardtanh: ("Hardtanh", {}),
    activations.logσ: ("LogSigmoid", {}),
    activations.relu6: ("ReLU6", {}),
    activations.leakyrelu: ("LeakyReLU", {"negative_slope": 0.01}),
    activations.elu: ("ELU", {}),
    activations.celu: ("CELU", {}),
    activations.selu: ("SELU", {}),
    activations.gelu: ("GELU", {"approximate": "tanh"}),
    activations.gelu_tanh: ("GELU", {"approximate": "tanh"}),
    activations.gelu_erf: ("GELU", {}),
    activations.swish: ("SiLU", {}),
    activations.hardswish: ("Hardswish", {}),
    activations.softplus: ("Softplus", {}),
    activations.softsign: ("Softsign", {}),
    activations.softshrink: ("Softshrink", {}),
    activations.tanhshrink: ("Tanhshrink", {}),
    activations.mish: ("Mish", {}),
    activations.softmax: ("Softmax", {"dim": -1}),
    activations.logsoftmax: ("LogSoftmax", {"dim": -1}),
    functions.flatten: ("Flatten", {}),
}


class Converter:
    """Makes modules, of arrays by `tensor`.

    `rank` is the number of spatial axes where the next layer stands, 0 where it is not known.
    """

    def __init__(self, nn: Any, tensor: Callable[[Any], Any], rank: int) -> None:
        self.nn, self.tensor, self.rank = nn, tensor, rank

    def module(self, model: Any) -> Any:
        parts = list(self.parts(model, ""))
        return parts[0] if len(parts) == 1 else self.nn.Sequential(*parts)

    def parts(self, layer: Any, path: str) -> Iterator[Any]:
        """Yield the modules that do in turn what the layer does."""
        if isinstance(layer, Chain):
            yield self.chain(layer, path)
            return
        if layer is activations.identity:
            return
        if callable(layer) and layer in _FUNCTIONS:
            self.rank = 0 if layer is functions.flatten else self.rank
            yield self.of_function(layer)
            return
        make = _MAKERS.get(type(layer))
        if make is None:
            raise _refused(path, layer, "torch.nn has no such module; build that part by hand")
        yield from make(self, layer, path)
        for name in ("σ", "λ"):
            function = getattr(layer, name, activations.identity)
            if function is not activations.identity:
                yield from self.parts(function, f"{path}.{name}")

    def chain(self, chain: Chain, path: str) -> Any:
        layers = chain.layers
        named = layers.items() if isinstance(layers, dict) else enumerate(layers)
        members: list[tuple[str, Any]] = []
        for position, (name, layer) in enumerate(named):
            key = f"layers[{name!r}]" if isinstance(layers, dict) else f"layers[{name}]"
            self.rank = self.rank or self.rank_ahead(list(chain)[position:])
            found = list(self.parts(layer, f"{path}.{key}".lstrip(".")))
            label = str(name).replace(".", "_")
            whole = found[0] if len(found) == 1 else self.nn.Sequential(*found)
            members.append((label, whole if found else self.nn.Identity()))
        return self.nn.Sequential(OrderedDict(members))

    def rank_ahead(self, layers: list[Any]) -> int:
        """Return the rank that the first layer says which knows it, before any flatten."""
        for layer in layers:
            if layer is functions.flatten or isinstance(layer, Dense):
                return 0
            if isinstance(layer, (Conv, CrossCor, DepthwiseConv, ConvTranspose)):
                return int(plain(layer.weight).ndim) - 2
            if isinstance(layer, (MaxPool, MeanPool)):
                return len(layer.k)
        return 0

    # --- layers ---

    def dense(self, layer: Dense, path: str) -> Iterator[Any]:
        weight = self.copied(layer.weight)
        made = self.nn.Linear(
            weight.shape[1], weight.shape[0], bias=_has(layer.bias), dtype=weight.dtype
        )
        self.fill(made, weight=weight, bias=layer.bias)
        yield made

    def conv(self, layer: Any, path: str) -> Iterator[Any]:
        """Axes are turned, and the kernel flipped where Flux's is a convolution."""
        kernel = plain(layer.weight).transpose()  # (out, in / groups, ..., height, width)
        groups = int(getattr(layer, "groups", 1))
        if isinstance(layer, DepthwiseConv):
            groups = int(kernel.shape[0])
            kernel = kernel.reshape((-1, 1, *kernel.shape[2:]))
        rank = self.rank = kernel.ndim - 2
        if not isinstance(layer, CrossCor):
            kernel = kernel[(slice(None),) * 2 + (slice(None, None, -1),) * rank]
        weight, is_transposed = self.copied(kernel), isinstance(layer, ConvTranspose)
        options: dict[str, Any] = {
            "stride": _reversed(layer.stride, rank), "dilation": _reversed(layer.dilation, rank),
            "groups": groups, "bias": _has(layer.bias), "dtype": weight.dtype,
        }  # fmt: skip
        sides = both_sides(_expanded(layer.pad, rank), rank)
        options["padding"] = tuple(low for low, _ in sides[::-1])
        if any(low != high for low, high in sides):
            if is_transposed:
                raise _refused(path, layer, "torch pads it alike on both sides only")
            yield self.padded(sides, 0.0)
            options["padding"] = 0
        n_out, n_in = weight.shape[0], weight.shape[1] * groups
        if is_transposed:
            n_in, n_out = weight.shape[0], weight.shape[1] * groups
            options["output_padding"] = _reversed(layer.outpad, rank)
        family = "ConvTranspose" if is_transposed else "Conv"
        made = self.of_rank(family, path, layer)(n_in, n_out, tuple(weight.shape[2:]), **options)
        self.fill(made, weight=weight, bias=layer.bias)
        yield made

    def norm(self, layer: Any, path: str) -> Iterator[Any]:
        """BatchNorm and InstanceNorm, with the statistics that they tracked."""
        μ, σ2, γ = plain(layer.μ), plain(layer.σ2), plain(layer.γ)
        tracks = bool(layer.track_stats) and μ is not None
        channels = int((γ if γ is not None else μ).shape[0]) if layer.chs is None else layer.chs
        least = 2 if isinstance(layer, InstanceNorm) else 1
        ε = float(plain(layer.ε))
        if ε == 1e-8 and getattr(layer, "julia_kind", None) and σ2 is not None:
            σ2 = σ2 * σ2  # Flux up to 0.6 stored the deviation
        made = self.of_rank(type(layer).__name__, path, layer, self.rank or least)(
            int(channels), eps=ε, momentum=float(layer.momentum), affine=γ is not None,
            track_running_stats=tracks,
        )  # fmt: skip
        statistics = {"running_mean": μ, "running_var": σ2} if tracks else {}
        self.fill(made, weight=γ, bias=layer.β, **statistics)
        yield made

    def group_norm(self, layer: GroupNorm, path: str) -> Iterator[Any]:
        γ = plain(layer.γ)
        if layer.track_stats and layer.μ is not None:
            raise _refused(path, layer, "torch's GroupNorm tracks no statistics")
        channels = int(γ.shape[0]) if layer.chs is None else int(layer.chs)
        ε = float(plain(layer.ε))
        made = self.nn.GroupNorm(int(layer.G), channels, eps=ε, affine=γ is not None)
        self.fill(made, weight=γ, bias=layer.β)
        yield made

    def layer_norm(self, layer: LayerNorm, path: str) -> Iterator[Any]:
        scale = plain(getattr(layer.diag, "scale", None))
        shape = scale.shape if layer.size is None and scale is not None else layer.size
        if shape is None:
            raise _refused(path, layer, "the file does not say the size that it normalises")
        made = flux_layer_norm()(len(shape), float(layer.ε))
        if scale is not None:
            made.weight = self.nn.Parameter(self.copied(scale.transpose()))
            made.bias = self.nn.Parameter(self.copied(plain(layer.diag.bias).transpose()))
        yield made
        in_scale = getattr(layer.diag, "σ", activations.identity)
        if in_scale is not activations.identity and in_scale is not layer.λ:
            yield from self.parts(in_scale, f"{path}.diag.σ")

    def pool(self, layer: Any, path: str) -> Iterator[Any]:
        rank = self.rank = len(layer.k)
        is_max = isinstance(layer, MaxPool)
        sides = both_sides(_expanded(layer.pad, rank), rank)
        if any(map(any, sides)):
            yield self.padded(sides, float("-inf") if is_max else 0.0)
        family = "MaxPool" if is_max else "AvgPool"
        made = self.of_rank(family, path, layer)
        yield made(tuple(layer.k[::-1]), stride=_reversed(layer.stride, rank))

    def global_pool(self, layer: Any, path: str) -> Iterator[Any]:
        family = "AdaptiveMaxPool" if isinstance(layer, GlobalMaxPool) else "AdaptiveAvgPool"
        yield self.of_rank(family, path, layer, self.rank or 2)(1)

    def dropout(self, layer: Dropout, path: str) -> Iterator[Any]:
        if isinstance(layer.dims, (int, tuple)):
            raise _refused(path, layer, "torch has no dropout along chosen axes")
        yield self.nn.Dropout(float(layer.p))

    def alpha_dropout(self, layer: AlphaDropout, path: str) -> Iterator[Any]:
        yield self.nn.AlphaDropout(float(layer.p))

    # --- of torch.nn ---

    def of_function(self, function: Any) -> Any:
        name, options = _FUNCTIONS[function]
        return getattr(self.nn, name)(**options)

    def of_rank(self, family: str, path: str, layer: Any, rank: int | None = None) -> Any:
        """Return the class of a family for a number of spatial axes: Conv2d for 2."""
        rank = self.rank if rank is None else rank
        if not 1 <= rank <= 3:
            raise _refused(path, layer, f"torch.nn has it for 1 to 3 spatial axes, not for {rank}")
        return getattr(self.nn, f"{family}{rank}d")

    def padded(self, sides: list[tuple[int, int]], fill: float) -> Any:
        """Return the padding of spatial axes: torch's last one is Flux's first."""
        family = getattr(self.nn, f"ConstantPad{len(sides)}d")
        return family(tuple(n for pair in sides for n in pair), fill)

    def copied(self, array: Any) -> Any:
        """Return a row-major copy as a tensor."""
        return self.tensor(plain(array).copy(order="C"))

    def fill(self, module: Any, **arrays: Any) -> None:
        """Put copies into the module's parameters and buffers of these names, in their dtype."""
        for name, array in arrays.items():
            if _has(array):
                is_parameter = isinstance(getattr(module, name), self.nn.Parameter)
                found = array if hasattr(array, "data_ptr") else self.copied(array)
                setattr(module, name, self.nn.Parameter(found) if is_parameter else found)


@functools.cache
def flux_layer_norm() -> Any:
    """Return the class of modules that add ε to the deviation, as Flux; torch adds to its square.

    Pickles find it by the name `FluxLayerNorm` of this module.
    """
    import torch

    class FluxLayerNorm(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, ndim: int, eps: float) -> None:
            super().__init__()
            self.ndim, self.eps = ndim, eps
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

        def forward(self, x: Any) -> Any:
            dim = tuple(range(-self.ndim, 0))
            centred = x - x.mean(dim, keepdim=True)
            y = centred / (centred.square().mean(dim, keepdim=True).sqrt() + self.eps)
            return y if self.weight is None else self.weight * y + self.bias

        def extra_repr(self) -> str:
            return f"ndim={self.ndim}, eps={self.eps:g}"

    FluxLayerNorm.__qualname__ = "FluxLayerNorm"
    return FluxLayerNorm


def __getattr__(name: str) -> Any:
    if name == "FluxLayerNorm":
        return flux_layer_norm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_MAKERS: dict[type, Callable[[Converter, Any, str], Iterator[Any]]] = {
    Dense: Converter.dense,
    Conv: Converter.conv,
    CrossCor: Converter.conv,
    DepthwiseConv: Converter.conv,
    ConvTranspose: Converter.conv,
    BatchNorm: Converter.norm,
    InstanceNorm: Converter.norm,
    GroupNorm: Converter.group_norm,
    LayerNorm: Converter.layer_norm,
    MaxPool: Converter.pool,
    MeanPool: Converter.pool,
    GlobalMaxPool: Converter.global_pool,
    GlobalMeanPool: Converter.global_pool,
    Dropout: Converter.dropout,
    AlphaDropout: Converter.alpha_dropout,
}


def _refused(path: str, layer: Any, why: str) -> UnsupportedValueError:
    return UnsupportedValueError(f"to_torch: {path or 'the model'}: {show(layer)}: {why}")


def _has(array: Any) -> bool:
    """Whether it is a parameter, not what stands for none: false, zero, or nothing."""
    return bool(getattr(plain(array), "shape", ()))


def _expanded(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),) * rank


def _reversed(value: Any, rank: int) -> tuple[int, ...]:
    return _expanded(value, rank)[::-1]
