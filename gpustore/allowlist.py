"""The functions of Julia that code from a file may call: this table, and nothing outside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import activations, functions, pooling, semantics
from gpustore.flux import FUNCTIONS
from gpustore.layers import plain
from gpustore.semantics import COLON, Function, getindex, length, reduction, size, spread


def _filled(value: Any) -> Callable[..., Any]:
    def make(*dims: Any) -> Any:
        is_typed = bool(dims) and isinstance(dims[0], Function)
        dtype = np.float64 if not is_typed else _DTYPES.get(dims[0].name, np.float64)
        rest = dims[1:] if is_typed else dims
        shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple) else rest
        semantics.bounded(tuple(int(n) for n in shape))
        return np.full(tuple(int(n) for n in shape), value, dtype)

    return make


def _pool(cls: Any) -> Callable[..., Any]:
    def apply(x: Any, k: Any, *, pad: Any = 0, stride: Any = None) -> Any:
        n = plain(x).ndim - 2
        return cls(k if isinstance(k, tuple) else (k,) * n, pad=pad, stride=stride)(x)

    return apply


_DTYPES = {
    "Float16": np.float16, "Float32": np.float32, "Float64": np.float64, "Int64": np.int64,
    "Int": np.int64, "Int32": np.int32, "Bool": np.bool_,
}  # fmt: skip
_UFUNCS = {
    "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "sinh": np.sinh, "cosh": np.cosh, "abs": np.abs,
    "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.round, "log2": np.log2,
    "log10": np.log10, "isnan": np.isnan, "isinf": np.isinf, "isfinite": np.isfinite,
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater,
    ">=": np.greater_equal, "!": np.logical_not, "&": np.bitwise_and, "|": np.bitwise_or,
    "mod": np.mod, "ifelse": np.where, "conj": np.conj, "real": np.real, "imag": np.imag,
    "atan": np.arctan, "asin": np.arcsin, "acos": np.arccos, "clamp": np.clip,
    "abs2": activations.abs2, "inv": lambda x: 1 / x, "max": semantics.folded(np.maximum),
    "min": semantics.folded(np.minimum), "rem": np.fmod, "%": np.fmod, "xor": np.bitwise_xor,
    "muladd": lambda x, y, z: x * y + z, "fma": lambda x, y, z: x * y + z,
    "zero": np.zeros_like, "one": np.ones_like,
}  # fmt: skip


def _getindex(x: Any, *index: Any) -> Any:
    """Return x[index...]; of a type such as Float32 it is a vector of that type."""
    if isinstance(x, Function) and x.name in _DTYPES:
        return np.array(index, _DTYPES[x.name])
    return getindex(x, *index)


def _selectdim(x: Any, d: Any, i: Any) -> Any:
    before, after = int(d) - 1, len(size(x)) - int(d)
    return getindex(x, *[COLON] * before, i, *[COLON] * after)


def _map(function: Any, *xs: Any) -> Any:
    is_tuple = isinstance(xs[0], tuple)
    return tuple(map(function, *xs)) if is_tuple else semantics.broadcast(function, *xs)


def _axes(x: Any, *d: Any) -> Any:
    return range(1, size(x, *d) + 1) if d else tuple(range(1, n + 1) for n in size(x))


def _ntuple(function: Any, n: Any) -> tuple[Any, ...]:
    return tuple(function(i) for i in range(1, min(int(n), 1000) + 1))


_SHAPES: dict[str, Callable[..., Any]] = {
    "size": size, "length": length, "ndims": lambda x: len(size(x)), "axes": _axes,
    "reshape": semantics.reshape, "vec": lambda x: plain(x).reshape(-1, order="F"),
    "dropdims": semantics.dropdims, "permutedims": semantics.permutedims,
    "transpose": semantics.transpose, "adjoint": semantics.adjoint, "'": semantics.adjoint,
    "vcat": functions.vcat, "hcat": functions.hcat, "cat": semantics.cat,
    "repeat": semantics.repeat, "flatten": functions.flatten,
    "unsqueeze": lambda x, d=None, dims=None: np.expand_dims(plain(x), int(dims or d) - 1),
}  # fmt: skip
_ELEMENTS: dict[str, Callable[..., Any]] = {
    "getindex": _getindex, "view": getindex, "selectdim": _selectdim,
    "firstindex": lambda x, *d: 1, "lastindex": semantics.lastindex,
    "first": lambda x: getindex(x, 1), "last": lambda x: getindex(x, length(x)),
    "eachindex": lambda x: range(1, length(x) + 1), "iterate": semantics.iterate,
    "indexed_iterate": lambda x, i, *state: (getindex(x, i), int(i) + 1),
    "collect": semantics.collected, "copy": semantics.materialize,
    "tuple": lambda *xs: xs, "vect": lambda *xs: np.array([semantics.number(x) for x in xs]),
    "zeros": _filled(0), "ones": _filled(1), "fill": semantics.fill,
    "similar": lambda x: np.zeros_like(plain(x)), "ntuple": _ntuple,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": reduction(np.sum), "prod": reduction(np.prod), "mean": reduction(np.mean),
    "maximum": reduction(np.max), "minimum": reduction(np.min), "all": reduction(np.all),
    "any": reduction(np.any), "std": spread(np.std), "var": spread(np.var),
    "softmax": semantics.softmax, "logsoftmax": semantics.logsoftmax,
    "normalise": semantics.normalise, "maxpool": _pool(pooling.MaxPool),
    "meanpool": _pool(pooling.MeanPool), "dropout": lambda x, p, dims=None: x,
    "batched_mul": lambda x, y: np.einsum("ijb,jkb->ikb", x, y),
    "foldl": lambda f, xs: functools.reduce(f, xs),
    "reduce": lambda f, xs: functools.reduce(f, xs),
}  # fmt: skip
_OTHERS: dict[str, Callable[..., Any]] = {
    "===": semantics.identical, "is": semantics.identical,
    "!==": lambda x, y: not semantics.identical(x, y), "not_int": lambda x: not x,
    "isnothing": lambda x: x is None, "identity": activations.identity, "data": plain,
    "param": plain, "float": lambda x: x * 1.0, "broadcasted": semantics.broadcasted,
    "materialize": semantics.materialize, "broadcast": semantics.broadcast, "map": _map,
    "∘": lambda f, g: lambda *xs: f(g(*xs)), "|>": lambda x, f: f(x), "=>": lambda x, y: (x, y),
}  # fmt: skip


def _arithmetic() -> list[Function]:
    """Return the functions that differ on whole arrays and on their elements."""
    minus = semantics.same("-", np.subtract)
    return [
        Function("+", semantics.same("+", np.add), semantics.folded(np.add)),
        Function("-", minus, lambda x, *y: x - y[0] if y else -x),
        Function("*", semantics.matmul, semantics.folded(np.multiply)),
        Function("/", semantics.quotient, semantics.quotient),
        Function("÷", semantics.whole_quotient, semantics.whole_quotient),
        Function("div", semantics.whole_quotient, semantics.whole_quotient),
        Function("^", semantics.power, lambda x, n: x**n),
        Function("literal_pow", semantics.literal_pow, lambda f, x, n: x**n.value),
    ]


def _table() -> dict[str, Function]:
    whole = _SHAPES | _ELEMENTS | _REDUCTIONS | _OTHERS
    table = {name: Function(name, call) for name, call in whole.items()}
    table |= {name: semantics.elementwise(name, ufunc) for name, ufunc in _UFUNCS.items()}
    for name, function in FUNCTIONS.items():
        bare = name.rpartition("#")[2]
        if bare not in table and name.startswith(("NNlib", "Base")):
            table[bare] = Function(bare, function, function)
    for name, dtype in _DTYPES.items():
        table[name] = Function(name, semantics.convert(dtype), semantics.convert(dtype))
    return table | {function.name: function for function in _arithmetic()}


TABLE = _table()
CONSTANTS = {
    ":": COLON, "nothing": None, "pi": math.pi, "π": math.pi, "Inf": math.inf, "NaN": math.nan,
    "Inf32": np.float32(math.inf), "NaN32": np.float32(math.nan),
}  # fmt: skip
MODULES = (
    "Base", "Core", "Flux", "NNlib", "Statistics", "LinearAlgebra", "Tracker", "Zygote", "MLUtils",
    "Main",
)  # fmt: skip
QUALIFIED = ("normalise", "dropout", "unsqueeze", "batched_mul")  # not Main's: not exported
