"""A model's values without its types, as Flux.state, and back; layers' state and mode."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from gpustore import devices
from gpustore.julia import NamedTuple, Struct
from gpustore.parameters import copy_all, data, dtype_of_array
from gpustore.tree import TrackedArray, arrays, children, field_names, walk


def state(x: Any) -> Any:
    """Return the model's values without its types, as `Flux.state`: NamedTuples, dicts and tuples.

    Arrays (not copied), numbers, booleans, texts and None stay; what has no values (a function) is
    (). Named layers are a NamedTuple.

    >>> state([1.5, abs, None])
    (1.5, (), None)
    """
    if isinstance(x, TrackedArray):
        return x.data
    if devices.is_array(x) or x is None or isinstance(x, _VALUES):
        return x
    if isinstance(x, dict):
        kind = NamedTuple if isinstance(x, NamedTuple) else dict
        return kind((key, state(child)) for key, child in x.items())
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return tuple(state(child) for child in x)
    if isinstance(x, Struct) and not x.data:
        return ()
    below = {suffix[1:]: child for suffix, child in children(x)}
    layout = getattr(x, "julia_kind", None)  # that a layer has in its file
    parts = [
        (_AS_JULIA.get(name, name), state(named_layers(name, child)))
        for name, child in below.items()
        if layout is None or name in layout.fields
    ]
    return NamedTuple(parts) if below else ()


def named_layers(name: str, part: Any) -> Any:
    """Return a field as Julia holds it: layers with names, a dict in Python, are a NamedTuple."""
    return NamedTuple(part) if name == "layers" and type(part) is dict else part


_VALUES = (bool, int, float, complex, str, np.generic)
_AS_JULIA = {"σ2": "σ²", "ε": "ϵ"}  # names of fields that Python spells otherwise
_AS_PYTHON = {julia: python for python, julia in _AS_JULIA.items()}


def loadmodel(dst: Any, src: Any) -> Any:
    """Copy all arrays of `src` (a model or a `state` of one) into `dst` and return `dst`.

    Numbers and functions of `dst` stay as they are, as in Flux. Raises MismatchError naming
    every difference in structure or shape; then nothing has been changed.

    >>> loadmodel({"w": np.zeros(2)}, {"w": np.ones(2)})
    {'w': array([1., 1.])}
    """
    pairs: list[tuple[str, Any, Any]] = []
    problems: list[str] = []
    _pair(data(dst), state(src), "model", pairs, problems)
    copy_all("loadmodel", pairs, problems)
    return dst


def _pair(
    dst: Any, src: Any, path: str, pairs: list[tuple[str, Any, Any]], problems: list[str]
) -> None:
    if devices.is_array(dst):
        if devices.is_array(src):
            pairs.append((path, dst, src))
        elif src is False:  # a layer without bias: Flux loads zeros
            pairs.append((path, dst, np.zeros(tuple(dst.shape), dtype_of_array(dst))))
        else:
            problems.append(f"{path}: expected an array, found {type(src).__name__}")
        return
    if dst is False and devices.is_array(src):
        if bool((src != 0).any()):
            problems.append(f"{path}: expected no bias, found one that is not zero")
        return
    below, found = dict(children(dst)), _by_suffix(dst, src)
    if isinstance(dst, (dict, list, tuple)) and below.keys() != found.keys():
        problems.append(f"{path}: expected {len(below)} parts, found {len(found)} or other names")
        return
    for suffix, child in below.items():
        if suffix in found:
            _pair(child, found[suffix], path + suffix, pairs, problems)
        elif next(arrays(walk(child)), None) is not None:
            problems.append(f"{path}{suffix}: expected arrays, found nothing")


def _by_suffix(dst: Any, src: Any) -> dict[str, Any]:
    """Return the parts of a state under the path suffixes of the container they belong to."""
    if isinstance(src, dict) and not isinstance(dst, dict):
        return {f".{_AS_PYTHON.get(name, name)}": child for name, child in src.items()}
    return dict(children(src))


def reset(model: Any) -> None:
    """Put the state of every recurrent layer back to its start (layers that have `reset`).

    >>> from gpustore import Recur, RNNCell
    >>> model = Recur(RNNCell(1, 1))
    >>> _ = model(np.ones(1, np.float32))
    >>> reset(model)
    >>> model.state
    array([0.], dtype=float32)
    """
    for _, node in walk(model):
        start_again = getattr(node, "reset", None) if dataclasses.is_dataclass(node) else None
        if callable(start_again):
            start_again()


def testmode(model: Any, mode: bool | None = True) -> Any:
    """Make dropout and normalisation layers behave as in testing; `None` restores the default.

    Sets the field `active` of the layers that have one, as `Flux.testmode!`; returns the model.
    `testmode(model, False)` is training.

    >>> from gpustore import Dropout
    >>> testmode([Dropout(0.5)])[0](np.ones(3))
    array([1., 1., 1.])
    """
    active = None if mode is None else not mode
    for _, node in walk(model):
        cls: type = type(node)
        if dataclasses.is_dataclass(cls) and ("active", False) in field_names(cls):
            node.active = active
    return model
