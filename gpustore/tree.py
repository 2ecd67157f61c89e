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

MAX_PATH = 1000  # characters of a path below which no more are added


def shortened(path: str) -> str:
    """Return a path as it is, or the start of one so long that many of them would fill memory."""
    return path if len(path) <= MAX_PATH else path[:MAX_PATH] + "…"


@dataclass(slots=True, eq=False, repr=False)
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
def field_names(cls: type, is_trainable: bool = False) -> tuple[tuple[str, bool], ...]:
    """Return the names of the fields that are entered, and whether only where they hold something.

    A field's metadata say so: `leaf` is not entered, `trainable: False` is no parameter, `era` is
    one that only layers of some versions of Flux have.
    """
    found = []
    for entry in dataclasses.fields(cls):
        is_left_out = is_trainable and not entry.metadata.get("trainable", True)
        if not entry.metadata.get("leaf") and not is_left_out:
            found.append((entry.name, bool(entry.metadata.get("era"))))
    return tuple(found)


def children(node: Any, *, is_trainable: bool = False) -> list[tuple[str, Any]]:
    """Return the children of a container as (path suffix, child); of a leaf, nothing.

    With `is_trainable` those that are no parameters, such as running statistics, are left out.

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
        parts = (
            (f".{name}", getattr(node, name), is_of_era)
            for name, is_of_era in field_names(type(node), is_trainable)
            if hasattr(node, name)
        )
        return [(suffix, part) for suffix, part, of_era in parts if not (of_era and part is None)]
    return []


def walk(
    root: Any, path: str | None = "", *, is_trainable: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield (path, node) for `root` and all below it, in order; a shared container once.

    With None for the path of a dict, those of its children are their keys.
    """
    seen: set[int] = set()
    stack = [(path or "", root)]
    if path is None:
        stack = [(str(key), child) for key, child in reversed(root.items())]
    while stack:
        path, node = stack.pop()
        below = children(node, is_trainable=is_trainable)
        if below or isinstance(node, (dict, list)):
            if id(node) in seen:
                continue
            seen.add(id(node))
        yield path, node
        path = shortened(path)
        stack.extend((path + suffix, child) for suffix, child in reversed(below))


def containers(root: Any) -> Iterator[Any]:
    """Yield `root` and what is below it, in order, without paths: a shared container once.

    Leaves of NumPy's arrays and of plain Python are left out.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if type(node) in _LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        below = node.values() if isinstance(node, dict) else [part for _, part in children(node)]
        stack.extend(reversed(below))


_LEAVES = frozenset((np.ndarray, str, bytes, int, float, bool, type(None)))


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
    return _rebuilt(root, replace, {})


def _rebuilt(node: Any, replace: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
    # no closure, which would hold itself, and the arrays in `memo`, until it is collected
    if id(node) in memo:
        return memo[id(node)]
    new = replace(node)
    if new is not node:
        pass
    elif isinstance(node, tuple):
        parts = [_rebuilt(child, replace, memo) for child in node]
        new = type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    elif isinstance(node, (dict, list)):
        new = memo[id(node)] = copy.copy(node)
        for key in node if isinstance(node, dict) else range(len(node)):
            new[key] = _rebuilt(node[key], replace, memo)
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        new = memo[id(node)] = copy.copy(node)
        for name, _ in field_names(type(node)):
            if hasattr(node, name):
                object.__setattr__(new, name, _rebuilt(getattr(node, name), replace, memo))
    memo[id(node)] = new
    return new


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


def is_numeric(array: Any) -> bool:
    """Whether an array holds numbers, which may be parameters and may lie on a GPU."""
    if not isinstance(array, np.ndarray):
        return True
    return array.dtype.kind not in "OSUmM" and array.dtype.type is not np.void  # bfloat16 is V too
