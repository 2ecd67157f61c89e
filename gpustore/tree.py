"""Walks over models: every container is visited once, shared parts stay shared, cycles are fine.

A model is any nesting of dict, list, tuple, set-free containers and dataclasses (layers among
them); everything else is a leaf. A dataclass field with `metadata={"leaf": True}` is not entered.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore import devices
from gpustore.errors import MismatchError
from gpustore.julia import NamedTuple


@dataclass(slots=True, eq=False)
class TrackedArray:
    """An array whose gradient is tracked, as Flux had them up to 0.9 (Tracker.jl).

    `data` are the values, `grad` the gradient of the same shape or None; `tracker` is Julia's
    record of how the array came about, kept as it was read. `numpy.asarray` gives `data`.
    """

    data: Any
    grad: Any = None
    tracker: Any = None
    julia_type: Any = field(default=None, metadata={"leaf": True})
    julia_kind: Any = field(default=None, metadata={"leaf": True})

    is_tracked_array = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return len(self.data.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        values = np.asarray(self.data, dtype=dtype)
        return values.copy() if copy else values

    def __repr__(self) -> str:
        dtype, shape = (getattr(self.data, name, "unknown") for name in ("dtype", "shape"))
        return f"TrackedArray(dtype={dtype}, shape={shape})"


@dataclass(slots=True, eq=False)
class Params:
    """Julia's collection of parameters (`Tracker.Params`, `Zygote.Params`), iterable in order."""

    order: Any
    params: Any = None
    julia_type: Any = field(default=None, metadata={"leaf": True})

    def arrays(self) -> list[Any]:
        """Return the arrays in order, tracked or plain."""
        order = self.order
        return list(order if isinstance(order, (list, tuple)) else order.data[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.arrays())

    def __len__(self) -> int:
        return len(self.arrays())

    def __getitem__(self, index: int) -> Any:
        return self.arrays()[index]


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if not f.metadata.get("leaf"))


def children(node: Any) -> list[tuple[str, Any]]:
    """Return the children of a container as (path suffix, child); of a leaf, nothing.

    >>> children({"a": 1})
    [("['a']", 1)]
    """
    if isinstance(node, dict):
        return [(f"[{key!r}]", child) for key, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(f".{name}", getattr(node, name)) for name in node._fields]
    if isinstance(node, (list, tuple)):
        return [(f"[{index}]", child) for index, child in enumerate(node)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        names = _field_names(type(node))
        return [(f".{name}", getattr(node, name)) for name in names if hasattr(node, name)]
    return []


def walk(root: Any, path: str | None = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, node) for `root` and all below it, in order; a shared container once.

    With None for the path of a dict, those of its children are their keys.
    """
    seen: set[int] = set()
    stack = [(path or "", root)]
    if path is None:
        stack = [(str(key), child) for key, child in reversed(root.items())]
    while stack:
        path, node = stack.pop()
        below = children(node)
        if below or isinstance(node, (dict, list)):
            if id(node) in seen:
                continue
            seen.add(id(node))
        yield path, node
        stack.extend((path + suffix, child) for suffix, child in reversed(below))


def walk_entries(root: Any) -> Iterator[tuple[str, Any]]:
    """Walk what a file holds: paths begin with the entry's name, or `value` where it has none."""
    is_plain = type(root) is dict or hasattr(root, "spelling")  # the Entries of a file
    if is_plain and all(isinstance(key, str) for key in root):
        return walk(root, None)
    return walk(root, "value")


def arrays(nodes: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield (path, array) for each array of a walk, a shared one at its first place only."""
    seen: set[int] = set()
    for where, node in nodes:
        if devices.is_array(node) and id(node) not in seen:
            seen.add(id(node))
            yield where, node


def rebuild(root: Any, replace: Callable[[Any], Any]) -> Any:
    """Return a copy of `root`; what was shared is shared, cycles are cycles.

    A node for which `replace` returns another object is that object; other containers are copied
    with their children visited, other leaves taken over.
    """
    memo: dict[int, Any] = {}

    def visit(node: Any) -> Any:
        if id(node) in memo:
            return memo[id(node)]
        new = replace(node)
        if new is not node:
            pass
        elif isinstance(node, tuple):
            parts = [visit(child) for child in node]
            new = type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
        elif isinstance(node, (dict, list)):
            new = memo[id(node)] = copy.copy(node)
            for key in node if isinstance(node, dict) else range(len(node)):
                new[key] = visit(node[key])
        elif dataclasses.is_dataclass(node) and not isinstance(node, type):
            new = memo[id(node)] = copy.copy(node)
            for name in _field_names(type(node)):
                if hasattr(node, name):
                    object.__setattr__(new, name, visit(getattr(node, name)))
        memo[id(node)] = new
        return new

    return visit(root)


# --- devices ----------------------------------------------------------------------------------


def device_of(x: Any) -> str:
    """Return the device of an array or of all arrays of a model: "cpu", "cuda:0", ...

    A model without arrays is on the CPU. Raises MismatchError where arrays lie on several devices.

    >>> device_of({"w": np.zeros(3)})
    'cpu'
    """
    places: dict[str, str] = {}
    for path, array in arrays(walk(x, "x")):
        places.setdefault(devices.array_device(array), path)
    if len(places) > 1:
        found = ", ".join(f"{path} on {device}" for device, path in places.items())
        raise MismatchError(f"expected all arrays on one device, found {found}; use cpu() or gpu()")
    return next(iter(places), "cpu")


def to_device(x: Any, device: str) -> Any:
    """Return a copy of the model with every array on `device`; shared arrays stay shared."""

    def move(leaf: Any) -> Any:
        if not devices.is_array(leaf):
            return leaf
        if device == "cpu":
            return devices.to_host(leaf)
        return devices.to_device(leaf, device) if is_numeric(leaf) else leaf

    return rebuild(x, move)


def cpu(x: Any) -> Any:
    """Return the model with its arrays in host memory (NumPy); arrays there already are not copied.

    >>> cpu([np.ones(2)])[0].sum()
    np.float64(2.0)
    """
    return to_device(x, "cpu")


def gpu(x: Any, device: str | int | None = None) -> Any:
    """Return the model with its arrays on a CUDA device (CuPy), the current one by default.

    Where CUDA is not available and no device is named, the model comes back unchanged with one
    warning, as in Flux; a named device raises CUDAUnavailableError.

    >>> from gpustore.testing import fake_cuda
    >>> with fake_cuda():
    ...     device_of(gpu({"w": np.ones(2)}, "cuda:1"))
    'cuda:1'
    """
    if device is None:
        status = devices.cuda_status()
        if not status:
            warnings.warn(f"gpu(): the model stays on the CPU: {status.message}", stacklevel=2)
            return x
        device = "cuda"
    name = devices.parse_device(f"cuda:{device}" if isinstance(device, int) else device)
    devices.require_cuda(name)
    return to_device(x, name)


# --- parameters -------------------------------------------------------------------------------


def param(array: Any) -> TrackedArray:
    """Return a tracked array, as Flux's `param` did up to 0.9.

    >>> param(np.ones(2))
    TrackedArray(dtype=float64, shape=(2,))
    """
    return TrackedArray(array)


def data(x: Any) -> Any:
    """Return `x` with tracking removed: a TrackedArray's values, a list of them, a whole model.

    The arrays themselves are not copied.

    >>> data([param(np.ones(2))])
    [array([1., 1.])]
    """

    def untrack(node: Any) -> Any:
        if isinstance(node, TrackedArray):
            return node.data
        if isinstance(node, Params):
            return [untrack(array) for array in node]
        return node

    return rebuild(x, untrack)


def params(x: Any) -> list[Any]:
    """Return the model's parameters in Flux's order: fields in turn, depth first, each once.

    They are the arrays themselves (or TrackedArrays), not copies, of any numeric dtype.

    >>> params({"w": np.zeros((1, 2)), "b": [np.ones(1)]})
    [array([[0., 0.]]), array([1.])]
    """
    if isinstance(x, Params):
        return x.arrays()
    found: list[Any] = []
    seen: set[int] = set()
    inside: set[int] = set()  # what belongs to a TrackedArray
    for _, node in walk(x):
        if isinstance(node, TrackedArray):
            inside.update(id(part) for _, part in walk([node.data, node.grad, node.tracker]))
        elif not (devices.is_array(node) and is_numeric(node)):
            continue
        if id(node) not in seen and id(node) not in inside:
            seen.add(id(node))
            found.append(node)
    return found


def is_numeric(array: Any) -> bool:
    """Whether an array holds numbers, which may be parameters and may lie on a GPU."""
    return not isinstance(array, np.ndarray) or array.dtype.kind not in "OSUVmM"


def loadparams(model: Any, weights: Any) -> None:
    """Copy `weights` (as `params` gives them) into the model's arrays, on whatever device they are.

    Raises MismatchError naming every array whose shape differs, or the counts; then nothing has
    been changed. Values are converted to the model's dtype within the same kind.

    >>> model = {"w": np.zeros(2)}
    >>> loadparams(model, [np.array([1.0, 2.0])])
    >>> model
    {'w': array([1., 2.])}
    """
    targets, sources = [data(p) for p in params(model)], [data(w) for w in weights]
    if len(targets) != len(sources):
        raise MismatchError(
            f"loadparams: expected {len(targets)} arrays, found {len(sources)}; build the model "
            "as it was when the weights were saved"
        )
    pairs = [(f"weights[{i}]", t, s) for i, (t, s) in enumerate(zip(targets, sources, strict=True))]
    _copy_all("loadparams", pairs, [])


def _copy_all(where: str, pairs: list[tuple[str, Any, Any]], problems: list[str]) -> None:
    """Copy each source into its target once all of them are known to fit."""
    for path, target, source in pairs:
        if tuple(target.shape) != tuple(source.shape):
            problems.append(
                f"{path}: expected shape {tuple(target.shape)}, found {tuple(source.shape)}"
            )
        elif not np.can_cast(_dtype(source), _dtype(target), "same_kind"):
            problems.append(f"{path}: expected {target.dtype}, found {source.dtype}")
    if problems:
        raise MismatchError(f"{where}: " + "; ".join(problems) + "; nothing was changed")
    for _, target, source in pairs:
        target[...] = to_device(source, devices.array_device(target))


def _dtype(array: Any) -> Any:
    return array.dtype if isinstance(array.dtype, np.dtype) else np.dtype(str(array.dtype))


# --- state ------------------------------------------------------------------------------------


def state(x: Any) -> Any:
    """Return the model's values without its types, as `Flux.state`: NamedTuples, dicts and tuples.

    Arrays (not copied), numbers, booleans and None stay; what has no values (a function) is ().

    >>> state([1.5, abs, None])
    (1.5, (), None)
    """
    if isinstance(x, TrackedArray):
        return x.data
    if devices.is_array(x) or x is None or isinstance(x, (bool, int, float, complex, np.generic)):
        return x
    if isinstance(x, dict):
        kind = NamedTuple if isinstance(x, NamedTuple) else dict
        return kind((key, state(child)) for key, child in x.items())
    if isinstance(x, (list, tuple)) and not hasattr(x, "_fields"):
        return tuple(state(child) for child in x)
    below = children(x)
    names = (suffix[1:] for suffix, _ in below)
    parts = [
        (_AS_JULIA.get(name, name), state(child))
        for name, (_, child) in zip(names, below, strict=True)
    ]
    return NamedTuple(parts) if below else ()


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
    _copy_all("loadmodel", pairs, problems)
    return dst


def _pair(
    dst: Any, src: Any, path: str, pairs: list[tuple[str, Any, Any]], problems: list[str]
) -> None:
    if devices.is_array(dst):
        if devices.is_array(src):
            pairs.append((path, dst, src))
        elif src is False:  # a layer without bias: Flux loads zeros
            pairs.append((path, dst, np.zeros(tuple(dst.shape), _dtype(dst))))
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
    """Put the state of every recurrent layer back to its start (layers that have `reset`)."""
    for _, node in walk(model):
        start_again = getattr(node, "reset", None) if dataclasses.is_dataclass(node) else None
        if callable(start_again):
            start_again()


def testmode(model: Any, mode: bool | None = True) -> Any:
    """Make dropout and normalisation layers behave as in testing; `None` restores the default.

    Sets the field `active` of the layers that have one, as `Flux.testmode!`; returns the model.
    """
    active = None if mode is None else not mode
    for _, node in walk(model):
        cls: type = type(node)
        if dataclasses.is_dataclass(cls) and "active" in _field_names(cls):
            node.active = active
    return model
