"""The one table: how each struct of Flux was laid out in each era, as rows.

Files hold a struct's fields by position, without names or version; the number of fields tells the
era. Fields carry the names of today's Flux here, Greek letters as Python normalises them (ε for ϵ,
σ2 for σ²). Sources: the struct definitions of Flux v0.5 to v0.16.11, in src/layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import NoneType
from typing import Any

import numpy as np

from gpustore import (
    attention,
    composition,
    convolution,
    layers,
    normalisation,
    pooling,
    recurrent,
    tree,
)
from gpustore.julia import JuliaType, Struct, Symbol
from gpustore.kinds import Kind, Param, StructKind


def _row(
    since: str,
    cls: type,
    fields: str,
    *params: Param,
    name: str | None = None,
    kinds: Any = (),
    from_type: Any = (),
    written: Any = (),
    turned: Any = (),
    becomes: Any = None,
    until: str = "",
) -> StructKind:
    """Return a row for a layer of Flux; `fields` are separated by spaces."""
    names = tuple(fields.split())
    kinds = (*kinds, *((field, _KIND_OF[field]) for field in names if field in _KIND_OF))
    return StructKind(
        cls, f"Flux.{name or cls.__name__}", names, params, True, kinds, since, from_type, written,
        turned, becomes, until,
    )  # fmt: skip


def _is_array(value: Any) -> bool:
    """Whether a value may be an array, or a struct around one; what it is not is plain to see."""
    return not isinstance(value, (str, bytes, dict, list, tuple, set, bool, int, float, NoneType))


def _is_array_or_none(value: Any) -> bool:
    return value is None or _is_array(value)


def _is_array_or_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_array(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic)) or hasattr(value, "is_tracked_array")


_KIND_OF: dict[str, Kind] = {
    "weight": _is_array, "scale": lambda value: not isinstance(value, (str, bytes, dict, list)),
    "Wi": _is_array, "Wh": _is_array, "Wh_h̃": _is_array, "bias": _is_array_or_flag,
    "b": _is_array_or_flag, "β": _is_array_or_none, "γ": _is_array_or_none,
    "μ": _is_array_or_none, "σ2": _is_array_or_none, "p": _is_number, "groups": (int,),
    "ε": _is_number, "momentum": _is_number, "r": (int,), "nheads": (int,), "G": (int,),
    "chs": (int, NoneType),
}  # fmt: skip


def _length(field: str) -> Callable[[Any], int]:
    return lambda layer: len(getattr(layer, field))


_CONTAINER = (tuple, list, dict)
_SIZES = (tuple,)
_LAYERS = (("layers", _CONTAINER),)


def _composition() -> list[StructKind]:
    c = composition
    return [
        _row("0.5", layers.Chain, "layers", kinds=_LAYERS),
        _row("0.7", layers.Chain, "layers", "layers", kinds=_LAYERS),
        _row("0.5", layers.Dense, "weight bias σ", "σ", "weight", "bias"),
        _row("0.5", c.Scale, "scale bias", "scale", name="Diagonal"),
        _row("0.13", c.Scale, "scale bias σ", "σ", "scale", "bias"),
        _row("0.8", c.Maxout, "layers", "layers", kinds=_LAYERS),
        _row("0.9", c.SkipConnection, "layers connection"),
        _row("0.12", c.SkipConnection, "layers connection", "layers", "connection"),
        _row("0.12", c.Bilinear, "weight bias σ", "σ", "weight", "bias"),
        _row("0.12", c.Parallel, "connection layers", "connection", "layers", kinds=_LAYERS),
        _row("0.13.4", c.PairwiseFusion, "connection layers", "connection", "layers",
             kinds=_LAYERS),
        _row("0.12.5", c.Embedding, "weight", "weight"),
        _row("0.16.11", c.Embedding, "weight padding_idx", "weight", "padding_idx"),
        _row("0.13.16", c.EmbeddingBag, "weight reduction", "reduction", "weight"),
        _row(
            "0.13.15", attention.MultiHeadAttention,
            "nheads q_proj k_proj v_proj attn_drop out_proj",
            "q_proj", "attn_drop", "out_proj",
        ),
    ]  # fmt: skip


def _convolutions() -> list[StructKind]:
    kinds = (("stride", _SIZES), ("pad", _SIZES), ("dilation", _SIZES))
    n, m, rest = _length("stride"), _length("pad"), ("σ", "weight", "bias")
    plain, dilated = "σ weight bias stride pad", "σ weight bias stride pad dilation"
    grouped, padded = dilated + " groups", "σ weight bias stride pad outpad dilation groups"
    conv, depthwise = convolution.Conv, convolution.DepthwiseConv
    turned, cross = convolution.ConvTranspose, convolution.CrossCor
    rows = [
        _row("0.5", conv, plain, n, *rest, kinds=kinds),
        _row("0.5.3", conv, dilated, n, *rest, kinds=kinds),
        _row("0.8.3", conv, dilated, n, m, *rest, kinds=kinds),
        _row("0.12.6", conv, grouped, n, m, *rest, kinds=kinds),
        _row("0.7", depthwise, plain, n, *rest, kinds=kinds),
        _row("0.8.3", depthwise, dilated, n, m, *rest, kinds=kinds),
        _row("0.13", depthwise, grouped, name="Conv", becomes=depthwise.grouped),
        _row("0.8", turned, dilated, n, *rest, kinds=kinds),
        _row("0.8.3", turned, dilated, n, m, *rest, kinds=kinds),
        _row("0.12.8", turned, grouped, n, m, *rest, kinds=kinds),
        _row("0.14.17", turned, padded, n, m, *rest, kinds=kinds),
        _row("0.9", cross, dilated, n, m, *rest, kinds=kinds),
    ]
    windows = (("k", _SIZES), ("pad", _SIZES), ("stride", _SIZES))
    for pool in (pooling.MaxPool, pooling.MeanPool):
        rows.append(_row("0.6.7", pool, "k pad stride", _length("k"), kinds=windows))
        rows.append(_row("0.8.3", pool, "k pad stride", _length("k"), m, kinds=windows))
    for adaptive in (pooling.AdaptiveMaxPool, pooling.AdaptiveMeanPool):
        sizes = lambda pool: len(pool.out) + 2, _length("out")
        rows.append(_row("0.11", adaptive, "out", *sizes, kinds=(("out", _SIZES),)))
    return [
        *rows,
        _row("0.11", pooling.GlobalMaxPool, ""),
        _row("0.11", pooling.GlobalMeanPool, ""),
        _row("0.11", convolution.SamePad, ""),
        _row(
            "0.12", pooling.Upsample, "scale size", lambda layer: Symbol(layer.mode), "scale",
            "size", from_type=(("mode", 0),),
        ),
        _row("0.12", pooling.PixelShuffle, "r"),
    ]  # fmt: skip


def _normalisation() -> list[StructKind]:
    v = normalisation
    old, middle = "λ β γ μ σ2 ε momentum active", "λ β γ μ σ2 ε momentum"
    new = "λ β γ μ σ2 ε momentum affine track_stats active chs"
    colon = ("dims", lambda layer: _COLON if layer.dims is None else layer.dims)
    rng = ("rng", lambda layer: layer.rng if isinstance(layer.rng, Struct) else _TASK_LOCAL_RNG)
    rows = [
        _row("0.4", v.Dropout, "p active", "p"),
        _row("0.9", v.Dropout, "p dims active", "p", written=(colon,)),
        _row("0.10.2", v.Dropout, "p dims active", "p", "dims", written=(colon,)),
        _row("0.13", v.Dropout, "p dims active rng", "p", "dims", "rng", written=(colon, rng)),
        _row("0.8", v.AlphaDropout, "p active", "p"),
        _row("0.13", v.AlphaDropout, "p active rng", "p", "rng", written=(rng,)),
        _row("0.4", v.LayerNorm, "diag", "diag.scale", kinds=(("diag", (composition.Scale,)),)),
        _row("0.12", v.LayerNorm, "λ diag ε size affine", "λ", "diag", "ε", _length("size")),
    ]
    for cls, group in ((v.BatchNorm, ""), (v.InstanceNorm, ""), (v.GroupNorm, "G ")):
        more = ("G",) if group else ()
        params = ("λ", "β", "μ", "ε", *more)
        rows += [
            _row("0.4" if cls is v.BatchNorm else "0.8", cls, group + old, *params),
            _row("0.10", cls, group + middle, *params),
            _row("0.10.2", cls, group + old, *params),
            _row("0.12", cls, group + new, "λ", "β", "ε", "μ"),
        ]
    return [*rows, _row("0.14", v.GroupNorm, "G " + new, "λ", "β", "ε")]


def _start(ndim: int) -> Callable[[Any], Any]:
    """Return what gives the first state of a cell: of its file, or zeros of `ndim` dimensions."""

    def start(cell: Any) -> Any:
        found = cell.initialstates()
        shape = (-1, 1)[:ndim]
        if isinstance(found, tuple):
            return tuple(part if part.ndim == ndim else part.reshape(shape) for part in found)
        return found if found.ndim == ndim else found.reshape(shape)

    return start


def _as_columns(state: Any) -> Any:
    """Return the state of a Recur as Flux holds it from 0.12 on: (out, 1), where it is (out,)."""
    if isinstance(state, tuple):
        return tuple(map(_as_columns, state))
    return state.reshape(-1, 1) if getattr(state, "ndim", 0) == 1 else state


def _of_recur(cell: Any) -> Any:
    """Return a cell in the last layout that had a Recur around it, where no other was asked for."""
    rows = [row for row in TABLE if row.cls is type(cell) and row.since != "0.15"]
    if not rows or getattr(cell, "julia_kind", None) is not None:
        return cell
    cell = copy.copy(cell)
    cell.julia_kind = rows[-1]
    return cell


def _recurrent() -> list[StructKind]:
    r = recurrent
    flat, state = (("state0", _start(1)),), (("state0", _start(2)),)
    halves = ("h", lambda cell: _start(1)(cell)[0]), ("c", lambda cell: _start(1)(cell)[1])
    first = (("init", lambda recur: _start(1)(recur.cell)),)
    rows = [
        _row("0.4", r.Recur, "cell init state", "cell", written=first),
        _row(
            "0.12", r.Recur, "cell state", "cell", "state",
            turned=(("cell", _of_recur), ("state", _as_columns)), until="0.15",
        ),
        _row("0.5", r.RNNCell, "σ Wi Wh bias state0", "σ", "Wi", "bias", written=flat),
        _row("0.12", r.RNNCell, "σ Wi Wh bias state0", "σ", "Wi", "bias", "state0", written=state),
        _row(
            "0.13.7", r.RNNCell, "σ Wi Wh bias state0", "σ", "Wi", "Wh", "bias", "state0",
            written=state,
        ),
        _row("0.15", r.RNNCell, "σ Wi Wh bias", "σ", "Wi", "Wh", "bias"),
        _row("0.5", r.LSTMCell, "Wi Wh bias h c", "Wi", "bias", written=halves),
        _row("0.12", r.LSTMCell, "Wi Wh bias state0", "Wi", "bias", "state0", written=state),
        _row(
            "0.13.7", r.LSTMCell, "Wi Wh bias state0", "Wi", "Wh", "bias", "state0", written=state
        ),
        _row("0.15", r.LSTMCell, "Wi Wh bias", "Wi", "Wh", "bias"),
        _row("0.5", r.GRUCell, "Wi Wh b state0", "Wi", "b", written=flat),
        _row("0.12", r.GRUCell, "Wi Wh b state0", "Wi", "b", "state0", written=state),
        _row("0.13.7", r.GRUCell, "Wi Wh b state0", "Wi", "Wh", "b", "state0", written=state),
        _row("0.15", r.GRUCell, "Wi Wh b", "Wi", "Wh", "b"),
        _row("0.12.7", r.GRUv3Cell, "Wi Wh b Wh_h̃ state0", "Wi", "b", "state0", written=state),
        _row(
            "0.13.7", r.GRUv3Cell, "Wi Wh b Wh_h̃ state0", "Wi", "Wh", "b", "Wh_h̃", "state0",
            written=state,
        ),
        _row("0.15", r.GRUv3Cell, "Wi Wh b Wh_h̃", "Wi", "Wh", "b", "Wh_h̃"),
    ]  # fmt: skip
    flag = lambda layer: bool(layer.return_state)  # noqa: E731
    for cls in (r.RNN, r.LSTM, r.GRU, r.GRUv3):
        rows.append(_row("0.15", cls, "cell", "cell"))
        rows.append(_row("0.16.1", cls, "cell", flag, "cell", from_type=(("return_state", 0),)))
    return rows


_COLON = Struct(JuliaType.named("Base.Colon"), [])
_TASK_LOCAL_RNG = Struct(JuliaType.named("Random.TaskLocalRNG"), [])
_TRACKED = ("tracker", "data", "grad")
_TRACKERS = ("Tracker", "Flux.Tracker")
TABLE = (
    *_composition(),
    *_convolutions(),
    *_normalisation(),
    *_recurrent(),
    *(
        StructKind(
            tree.TrackedArray,
            f"{tracker}.TrackedArray",
            _TRACKED[:n],
            is_layer=True,
            kinds=(("data", _is_array), ("grad", _is_array_or_none)),
        )
        for tracker in _TRACKERS
        for n in (3, 2)  # without a gradient it is undefined, and left out
    ),
    *(
        StructKind(tree.Params, f"{package}.Params", ("order", "params"))
        for package in ("Zygote", *_TRACKERS)
    ),
)
