"""The functions of Julia that code from a file may call: this table, and nothing outside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import activations, arithmetic, limits, networks, reductions, semantics
from gpustore.arithmetic import (
    Irrational,
    comparison,
    is_array,
    is_number,
    of_bits,
    of_floats,
    of_numbers,
    promoted,
    rounding,
    settled,
)  # fmt: skip
from gpustore.broadcasting import (
    Function,
    Held,
    bounded,
    broadcast,
    broadcasted,
    collected,
    joined,
    materialize,
    whole,
)  # fmt: skip
from gpustore.errors import OpaqueCodeError
from gpustore.flux import known_functions
from gpustore.julia import Struct
from gpustore.reductions import elementwise, reduction, spread
from gpustore.semantics import COLON, array, getindex, items, length, shape_of, size

_DTYPES = {
    "Float16": np.float16, "Float32": np.float32, "Float64": np.float64, "Int64": np.int64,
    "Int": np.int64, "Int32": np.int32, "Int16": np.int16, "Int8": np.int8, "UInt8": np.uint8,
    "UInt16": np.uint16, "UInt32": np.uint32, "UInt64": np.uint64, "Bool": np.bool_,
    "ComplexF32": np.complex64, "ComplexF64": np.complex128,
}  # fmt: skip
_KINDS = {
    "Number": "biufc", "Real": "biuf", "Integer": "biu", "AbstractFloat": "f", "Complex": "c",
}  # fmt: skip
_ARRAYS = {"AbstractArray": 0, "Array": 0, "AbstractVector": 1, "Vector": 1, "AbstractMatrix": 2,
           "Matrix": 2}  # fmt: skip


def _of_half_turns(ufunc: Callable[..., Any], x: Any) -> Any:
    """Return the sine or cosine of π x, worked out in Float64."""
    return ufunc(np.fmod(x, 2).astype(np.float64) * math.pi).astype(x.dtype)


def _of_type_too(like: Callable[..., Any]) -> Callable[..., Any]:
    """Return zero or one: of a number, or of a type such as Float32."""

    def apply(x: Any) -> Any:
        if isinstance(x, Function) and x.dtype is not None:
            return settled(like(np.dtype(x.dtype).type(0))[()])
        return like(*promoted(x))

    return apply


def _eps(x: Any = None) -> Any:
    """Return eps(Float32), eps(x) or eps()."""
    dtype = np.float64 if x is None else getattr(x, "dtype", None)
    is_type = x is None or isinstance(x, Function)
    if dtype is None or np.dtype(dtype).kind != "f":
        raise OpaqueCodeError("eps: a type of floats or a float is expected")
    return np.dtype(dtype).type(np.finfo(dtype).eps) if is_type else np.spacing(np.abs(x))


def _extreme(name: str) -> Callable[..., Any]:
    """Return typemin or typemax of a type such as Float32."""

    def apply(kind: Any) -> Any:
        dtype = np.dtype(getattr(kind, "dtype", None) or np.bool_)
        if dtype.kind not in "iuf":
            raise OpaqueCodeError(f"type{name}: a type of numbers is expected")
        if dtype.kind == "f":
            return dtype.type(-math.inf if name == "min" else math.inf)
        return settled(dtype.type(getattr(np.iinfo(dtype), name)))

    return apply


def _range(start: Any, stop: Any = None, *, length: Any = None, step: Any = None) -> Any:
    """Return range(start, stop; length) or with a step, as an array."""
    if length is None:
        return COLON(start, 1 if step is None else step, stop)
    count = int(length)
    bounded((max(count, 0),))
    if step is None:
        step = 1 if stop is None else arithmetic.divide(arithmetic.subtract(stop, start),
                                                        max(count - 1, 1))  # fmt: skip
    start, step = promoted(start, step)
    return start + arithmetic.as_dtype(np.arange(count), np.dtype(type(step))) * step


_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "sqrt": of_floats(np.sqrt), "exp": of_floats(np.exp), "log1p": of_floats(np.log1p),
    "log": arithmetic.logarithm, "expm1": of_floats(np.expm1), "sin": of_floats(np.sin),
    "cos": of_floats(np.cos), "tan": of_floats(np.tan), "sinh": of_floats(np.sinh),
    "cosh": of_floats(np.cosh), "tanh": of_floats(np.tanh), "asin": of_floats(np.arcsin),
    "acos": of_floats(np.arccos), "atan": arithmetic.angle, "log2": of_floats(np.log2),
    "log10": of_floats(np.log10), "exp2": of_floats(np.exp2), "cbrt": of_floats(np.cbrt),
    "abs": of_numbers(np.abs), "sign": of_numbers(np.sign), "isnan": of_numbers(np.isnan),
    "isinf": of_numbers(np.isinf), "isfinite": of_numbers(np.isfinite),
    "floor": rounding(np.floor), "ceil": rounding(np.ceil), "round": rounding(np.round),
    "trunc": rounding(np.trunc), "<": comparison(np.less), "<=": comparison(np.less_equal),
    ">": comparison(np.greater), ">=": comparison(np.greater_equal),
    "!": of_numbers(np.logical_not),
    "&": of_bits(np.bitwise_and), "|": of_bits(np.bitwise_or), "xor": of_bits(np.bitwise_xor),
    "⊻": of_bits(np.bitwise_xor), "mod": arithmetic.modulo, "rem": arithmetic.remainder,
    "%": arithmetic.remainder, "÷": arithmetic.quotient, "div": arithmetic.quotient,
    "fld": arithmetic.floor_quotient, "cld": arithmetic.ceil_quotient, "clamp": arithmetic.clamp,
    "abs2": of_numbers(activations.abs2), "inv": lambda x: arithmetic.divide(1, x),
    "max": arithmetic.largest, "min": arithmetic.smallest, "muladd": arithmetic.muladd,
    "fma": arithmetic.muladd, "hypot": arithmetic.hypotenuse, "one": _of_type_too(np.ones_like),
    "sinpi": of_floats(lambda x: _of_half_turns(np.sin, x)),
    "cospi": of_floats(lambda x: _of_half_turns(np.cos, x)),
    "iseven": lambda x: arithmetic.modulo(x, 2) == 0,
    "isodd": lambda x: arithmetic.modulo(x, 2) == 1,
}  # fmt: skip
_WHOLE_TOO: dict[str, Callable[..., Any]] = {
    "conj": of_numbers(np.conj), "real": of_numbers(np.real), "imag": of_numbers(np.imag),
    "float": arithmetic.floating, "zero": _of_type_too(np.zeros_like),
}  # fmt: skip


def _typed(name: str, dtype: Any) -> Function:
    made = Function(name, lambda x: arithmetic.converted(made, _number(name, x)),
                    lambda x: arithmetic.converted(made, x), dtype)  # fmt: skip
    return made


def _number(name: str, x: Any) -> Any:
    if not is_number(x) or is_array(x):
        raise OpaqueCodeError(f"{name}: of what is no number; use {name}.( ) for elements")
    return x


def _is_a(x: Any, kind: Any) -> bool:
    name = getattr(kind, "name", None)
    if name in _ARRAYS:
        ndim = getattr(whole(x), "ndim", 0)
        return ndim > 0 and _ARRAYS[name] in (0, ndim)
    if name in _KINDS or name in _DTYPES:
        if not is_number(x) or is_array(x):
            return False
        dtype = getattr(x, "dtype", None) or np.dtype(type(x))
        return dtype.kind in _KINDS[name] if name in _KINDS else dtype == kind.dtype
    if name in ("Nothing", "Tuple", "NamedTuple"):
        kinds: dict[str, type] = {"Nothing": type(None), "Tuple": tuple, "NamedTuple": dict}
        return isinstance(x, kinds[name])
    raise OpaqueCodeError(f"isa: the type {name or kind!r} is not known here")


def _eltype(x: Any) -> Function:
    dtype = getattr(array(x) if not is_number(x) else x, "dtype", None) or np.asarray(x).dtype
    for name, known in _DTYPES.items():
        if dtype == known:
            return TABLE[name]
    raise OpaqueCodeError(f"eltype: of {dtype} there is no type here")


def _filled(value: Any) -> Callable[..., Any]:
    def make(*dims: Any) -> Any:
        is_typed = bool(dims) and isinstance(dims[0], Function)
        dtype = dims[0].dtype if is_typed else np.float64
        if dtype is None:
            raise OpaqueCodeError(f"an array of {dims[0].name} is not known here")
        return np.full(bounded(shape_of(dims[1:] if is_typed else dims)), value, dtype)

    return make


def _getindex(x: Any, *index: Any) -> Any:
    """Return x[index...]; of a type such as Float32 it is a vector of that type."""
    if isinstance(x, Struct) and repr(x.type).startswith("Base.RefValue{") and not index:
        return x.data[0]
    if isinstance(x, Function) and x.dtype is not None:
        return joined(tuple(arithmetic.converted(x, i) for i in index)).astype(x.dtype)
    return getindex(x, *index)


def _selectdim(x: Any, d: Any, i: Any) -> Any:
    before, after = int(d) - 1, len(size(x)) - int(d)
    return getindex(x, *[COLON] * before, i, *[COLON] * after)


def _map(function: Any, *xs: Any) -> Any:
    if all(isinstance(x, tuple) for x in xs):
        limits.take_steps(len(xs[0]))
        return tuple(settled(function(*row)) for row in zip(*xs, strict=False))
    return broadcast(function, *xs)


def _filter(function: Any, xs: Any) -> Any:
    kept = [x for x in items(xs) if function(x)]
    if isinstance(xs, tuple):
        return tuple(kept)
    return array(kept).astype(array(xs).dtype) if kept else array(xs)[:0]


def _axes(x: Any, *d: Any) -> Any:
    return range(1, size(x, *d) + 1) if d else tuple(range(1, n + 1) for n in size(x))


def _ntuple(function: Any, n: Any) -> tuple[Any, ...]:
    n = getattr(n, "value", n)
    limits.take_steps(int(n))
    return tuple(function(i) for i in range(1, int(n) + 1))


def _fold(function: Any, xs: Any, *, init: Any = None, dims: Any = None) -> Any:
    if dims is not None:
        raise OpaqueCodeError("reduce: dims is not known here; use sum, maximum and the like")
    xs = items(xs)
    return functools.reduce(function, xs) if init is None else functools.reduce(function, xs, init)


def _fold_right(function: Any, xs: Any) -> Any:
    return functools.reduce(lambda y, x: function(x, y), reversed(items(xs)))


def _cumulative(function: Any) -> Callable[..., Any]:
    def apply(x: Any, *, dims: Any = None) -> Any:
        x = array(x)
        if dims is None and x.ndim > 1:
            raise OpaqueCodeError("cumsum and cumprod of a matrix want dims")
        return function(x, axis=0 if dims is None else semantics.axes(dims))

    return apply


def _place_of(function: Any) -> Callable[..., Any]:
    def apply(x: Any) -> int:
        if array(x).ndim != 1:
            raise OpaqueCodeError("argmax and the like: of a vector only, without dims")
        return int(function(array(x))) + 1

    return apply


def _sorted(x: Any, *, rev: Any = False) -> Any:
    found = np.sort(getindex(x, COLON)) if array(x).ndim == 1 else None
    if found is None:
        raise OpaqueCodeError("sort: a vector is expected")
    return found[::-1] if rev else found


def _first_of(place: Callable[[Any], int]) -> Callable[..., Any]:
    return lambda x: getindex(items(x) if isinstance(x, dict) else x, place(x))


_SHAPES: dict[str, Callable[..., Any]] = {
    "size": size, "length": length, "ndims": lambda x: len(size(x)), "axes": _axes,
    "reshape": semantics.reshape, "vec": lambda x: array(x).reshape(-1, order="F"),
    "dropdims": semantics.dropdims, "permutedims": semantics.permutedims,
    "transpose": semantics.transpose, "adjoint": semantics.adjoint, "'": semantics.adjoint,
    "vcat": semantics.vcat, "hcat": semantics.hcat, "cat": semantics.cat,
    "hvcat": semantics.hvcat, "repeat": semantics.repeat, "reverse": semantics.reverse,
    "flatten": lambda x: array(x).reshape((-1, x.shape[-1]), order="F"),
    "unsqueeze": lambda x, d=None, dims=None: np.expand_dims(array(x), int(dims or d) - 1),
    "isempty": lambda x: length(x) == 0, "eltype": _eltype,
}  # fmt: skip
_ELEMENTS: dict[str, Callable[..., Any]] = {
    "getindex": _getindex, "view": getindex, "selectdim": _selectdim,
    "firstindex": lambda x, *d: 1, "lastindex": semantics.lastindex,
    "first": _first_of(lambda x: 1), "last": _first_of(length),
    "eachindex": lambda x: range(1, length(x) + 1), "iterate": semantics.iterate,
    "indexed_iterate": lambda x, i, *state: (_first_of(lambda _: int(i))(x), int(i) + 1),
    "collect": lambda x: collected(items(x) if isinstance(x, dict) else materialize(x)),
    "copy": materialize, "deepcopy": whole, "tuple": lambda *xs: xs,
    "vect": lambda *xs: collected(list(xs)) if xs else np.zeros(0),
    "zeros": _filled(0), "ones": _filled(1), "fill": semantics.fill,
    "similar": lambda x: np.zeros_like(array(x)), "ntuple": _ntuple,
    "enumerate": lambda xs: list(enumerate(items(xs), 1)),
    "eachcol": lambda x: networks.NETWORKS["unstack"](x, 2), "maybeview": getindex,
    "eachrow": lambda x: networks.NETWORKS["unstack"](x, 1), "range": _range, "eps": _eps,
    "typemin": _extreme("min"), "typemax": _extreme("max"),
    "zip": lambda *xs: list(zip(*map(items, xs), strict=False)),
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "sum": reduction(np.sum), "prod": reduction(np.prod), "mean": reduction(np.mean),
    "maximum": reduction(np.max), "minimum": reduction(np.min), "all": reduction(np.all),
    "any": reduction(np.any), "count": reduction(np.sum, np.bool_), "std": spread(np.std),
    "var": spread(np.var), "median": reduction(np.median), "norm": reductions.norm,
    "dot": reductions.dot, "⋅": reductions.dot, "cumsum": _cumulative(np.cumsum),
    "cumprod": _cumulative(np.cumprod), "argmax": _place_of(np.argmax),
    "argmin": _place_of(np.argmin), "sort": _sorted,
    "extrema": lambda x: (reduction(np.min)(x), reduction(np.max)(x)),
    "findmax": lambda x: (reduction(np.max)(x), _place_of(np.argmax)(x)),
    "findmin": lambda x: (reduction(np.min)(x), _place_of(np.argmin)(x)),
    "tr": lambda x: settled(np.trace(array(x))), "diag": lambda x: np.diag(array(x)),
    "softmax": reductions.softmax, "logsoftmax": reductions.logsoftmax,
    "normalise": reductions.normalise, "dropout": lambda x, p, dims=None: x,
    "foldl": _fold, "foldr": _fold_right, "reduce": _fold,
    "mapreduce": lambda f, g, xs, **options: _fold(g, _map(f, xs), **options),
}  # fmt: skip
_OTHERS: dict[str, Callable[..., Any]] = {
    "===": reductions.identical, "is": reductions.identical, "≈": reductions.is_close,
    "isapprox": reductions.is_close, "isequal": reductions.equal, "in": reductions.is_in,
    "∈": reductions.is_in, "!==": lambda x, y: not reductions.identical(x, y),
    "not_int": lambda x: not x, "isnothing": lambda x: x is None, "isa": _is_a,
    "identity": activations.identity, "data": whole, "param": whole, "broadcasted": broadcasted,
    "materialize": materialize, "broadcast": broadcast, "map": _map, "filter": _filter,
    "∘": lambda f, g: lambda *xs: f(g(*xs)), "|>": lambda x, f: f(x), "=>": lambda x, y: (x, y),
    "convert": lambda kind, x: broadcast(kind, x) if is_array(x) else kind(x),
    "oftype": lambda x, y: _eltype(x)(y), "Ref": Held, "typeassert": lambda x, kind: x,
    "Fix1": lambda f, x: lambda y: f(x, y), "Fix2": lambda f, y: lambda x: f(x, y),
}  # fmt: skip


def _curried(name: str, function: Function) -> Function:
    """Return a comparison that of one argument is a function of the other: >(0)."""

    def call(*xs: Any) -> Any:
        if len(xs) == 1:
            return Function(
                name, lambda y: function(y, xs[0]), lambda y: (function.each or function)(y, xs[0])
            )
        return function(*xs)

    return Function(name, call, function.each)


def _arithmetic() -> list[Function]:
    """Return the functions that differ on whole arrays and on their elements."""
    plus, minus = reductions.same("+", arithmetic.add), reductions.same("-", arithmetic.subtract)
    return [
        Function("+", plus, arithmetic.add),
        Function("-", minus, arithmetic.subtract),
        Function("*", reductions.matmul, arithmetic.multiply),
        Function("/", reductions.divide, arithmetic.divide),
        Function("^", reductions.power, arithmetic.power),
        Function("literal_pow", reductions.literal_pow,
                 lambda f, x, n: arithmetic.literal_power(x, n.value)),
        Function("==", reductions.equal, comparison(np.equal)),
        Function("!=", lambda x, y: not reductions.equal(x, y), comparison(np.not_equal)),
        Function("ifelse", lambda c, x, y: x if c else y, arithmetic.choose),
    ]  # fmt: skip


def _of_reals(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def apply(x: Any, *args: Any, **options: Any) -> Any:
        if isinstance(x, complex) or getattr(getattr(x, "dtype", None), "kind", "") == "c":
            raise OpaqueCodeError(f"{function.__name__}: real numbers are expected")
        return function(whole(x), *args, **options)

    return apply


def _table() -> dict[str, Function]:
    groups = _SHAPES | _ELEMENTS | _REDUCTIONS | _OTHERS | reductions.LOSSES | networks.NETWORKS
    table = {name: Function(name, call) for name, call in groups.items()}
    table["identity"] = Function("identity", activations.identity, activations.identity)
    table |= {name: elementwise(name, each) for name, each in _ELEMENTWISE.items()}
    table |= {name: Function(name, each, each) for name, each in _WHOLE_TOO.items()}
    for name, function in known_functions().items():
        bare = name.rpartition("#")[2]
        if bare not in table and name.startswith("NNlib"):
            table[bare] = Function(bare, _of_reals(function), _of_reals(function))
    table |= {name: _typed(name, dtype) for name, dtype in _DTYPES.items()}
    for name in (*_KINDS, *_ARRAYS, "Nothing"):
        table[name] = Function(name, _no_constructor)
    table |= {function.name: function for function in _arithmetic()}
    for name in ("<", "<=", ">", ">=", "==", "!="):
        table[name] = _curried(name, table[name])
    return table


def _no_constructor(*args: Any) -> Any:
    raise OpaqueCodeError("an abstract type is called; only number types make values")


TABLE = _table()
BY_TWIN = {
    function: TABLE[name.rpartition("#")[2]]
    for name, function in known_functions().items()
    if name.rpartition("#")[2] in TABLE
}  # the table's functions by the Python ones that stand for them in models
CONSTANTS = {
    ":": COLON, "nothing": None, "pi": Irrational(math.pi), "π": Irrational(math.pi),
    "ℯ": Irrational(math.e), "Inf": np.float64(math.inf), "NaN": np.float64(math.nan),
    "Inf32": np.float32(math.inf), "NaN32": np.float32(math.nan),
    "Inf64": np.float64(math.inf), "NaN64": np.float64(math.nan),
}  # fmt: skip
MODULES = (
    "Base", "Core", "Flux", "NNlib", "Statistics", "LinearAlgebra", "Tracker", "Zygote", "MLUtils",
    "Losses", "Main",
)  # fmt: skip
QUALIFIED = (
    "normalise", "dropout", "unsqueeze", "stack", "unstack", "batch", "reset!",
    *reductions.LOSSES,
)  # fmt: skip  # not Main's: not exported
