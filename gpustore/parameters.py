"""The parameters of a model, in Flux's order, and their values on the way in and out."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpustore import devices, kernels
from gpustore.errors import MismatchError
from gpustore.tree import Params, TrackedArray, is_numeric, rebuild, to_device, walk


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

    They are the arrays themselves (or TrackedArrays), not copies, of any numeric dtype; running
    statistics and the state of Recur are none.

    >>> params({"w": np.zeros((1, 2)), "b": [np.ones(1)]})
    [array([[0., 0.]]), array([1.])]
    """
    if isinstance(x, Params):
        return x.arrays()
    found: list[Any] = []
    seen: set[int] = set()
    inside: set[int] = set()  # what belongs to a TrackedArray
    for _, node in walk(x, is_trainable=True):
        if isinstance(node, TrackedArray):
            inside.update(id(part) for _, part in walk([node.data, node.grad, node.tracker]))
        elif not (devices.is_array(node) and is_numeric(node)):
            continue
        if id(node) not in seen and id(node) not in inside:
            seen.add(id(node))
            found.append(node)
    return found


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
    copy_all("loadparams", pairs, [])


def copy_all(where: str, pairs: list[tuple[str, Any, Any]], problems: list[str]) -> None:
    """Copy each source into its target once all of them are known to fit."""
    for path, target, source in pairs:
        if tuple(target.shape) != tuple(source.shape):
            problems.append(
                f"{path}: expected shape {tuple(target.shape)}, found {tuple(source.shape)}"
            )
        elif not np.can_cast(dtype_of_array(source), dtype_of_array(target), "same_kind"):
            problems.append(f"{path}: expected {target.dtype}, found {source.dtype}")
    if problems:
        raise MismatchError(f"{where}: " + "; ".join(problems) + "; nothing was changed")
    for target, source in kernels.scatter([(target, source) for _, target, source in pairs]):
        target[...] = to_device(source, devices.array_device(target))


def dtype_of_array(array: Any) -> Any:
    return array.dtype if isinstance(array.dtype, np.dtype) else np.dtype(str(array.dtype))
