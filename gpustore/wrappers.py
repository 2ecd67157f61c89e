"""Julia's array wrappers (Adjoint, SubArray, sparse, one-hot): structs that give their array.

They stay the structs that they are in the file; `numpy.asarray` and layers that hold one take the
array it stands for. Sources: LinearAlgebra, SparseArrays, Base, Flux and OneHotArrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore.dtypes import dtype_of
from gpustore.errors import UnsupportedValueError
from gpustore.julia import JuliaType, Struct

_MAX_ELEMENTS = 2**28  # of the array that a few bytes of a sparse one may stand for


class Wrapped(Struct):
    """A wrapper around an array; `array` is what Julia's `collect` gives."""

    __slots__ = ()
    is_wrapped_array = True

    @property
    def array(self) -> Any:
        """The array it stands for, worked out at each use, on the device of what it wraps."""
        name = getattr(self.type, "name", "")
        try:
            return _DENSE[name](self)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UnsupportedValueError(
                f"{name}: its fields do not fit together ({error}); use .data"
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self.array, dtype=dtype)


def dense(value: Any) -> Any:
    """Return the array of a wrapper, or an array itself."""
    return value.array if isinstance(value, Wrapped) else value


def _param(wrapper: Struct, index: int) -> Any:
    return wrapper.type.params[index] if isinstance(wrapper.type, JuliaType) else None


def _parent(wrapper: Struct) -> Any:
    return dense(wrapper.data[0])


def _turned(wrapper: Struct) -> Any:
    parent = _parent(wrapper)
    return parent.reshape(1, -1) if parent.ndim == 1 else parent.T


def _is_upper(wrapper: Struct) -> bool:
    return str(wrapper.data[1]) == "U"


def _mirrored(wrapper: Struct, is_hermitian: bool) -> Any:
    """Return a Symmetric or Hermitian: one triangle of the parent says it all."""
    parent = _parent(wrapper)
    half = np.triu(parent) if _is_upper(wrapper) else np.tril(parent)
    strict = np.triu(parent, 1) if _is_upper(wrapper) else np.tril(parent, -1)
    return half + (np.conj(strict.T) if is_hermitian else strict.T)


def _with_ones(triangle: Any) -> Any:
    return triangle + np.eye(len(triangle), dtype=triangle.dtype)


def _viewed(wrapper: Struct) -> Any:
    """Return a SubArray: a view of the parent at its indices, from 1."""
    indices: Any = wrapper.data[1]
    parent = _parent(wrapper)
    if len(indices) == 1 != parent.ndim:
        parent = parent.reshape(-1, order="F")
    axis = 0
    for index in indices:
        places = np.asarray(dense(index)).astype(np.int64) - 1
        if places.size and not 0 <= places.min() <= places.max() < parent.shape[axis]:
            raise ValueError("an index is out of the parent")
        parent = parent.take(places, axis=axis)
        axis += places.ndim
    return parent


def _permuted(wrapper: Struct) -> Any:
    return _parent(wrapper).transpose([int(axis) - 1 for axis in _param(wrapper, 2)])


def _reinterpreted(wrapper: Struct) -> Any:
    """Return the memory of the parent as another type: its first axis becomes longer or shorter."""
    parent: Any = np.ascontiguousarray(_parent(wrapper).T)
    return parent.view(dtype_of(_param(wrapper, 0))).T


def _sparse(wrapper: Struct) -> Any:
    rows, columns, starts, places, values = wrapper.data
    made = _zeros((rows, columns), values)
    counts = np.diff(np.asarray(starts))
    made[np.asarray(places) - 1, np.repeat(np.arange(int(columns)), counts)] = values
    return made


def _sparse_vector(wrapper: Struct) -> Any:
    count, places, values = wrapper.data
    made = _zeros((count,), values)
    made[np.asarray(places) - 1] = values
    return made


def _zeros(shape: tuple[Any, ...], like: Any) -> Any:
    sizes = tuple(map(int, shape))
    if math.prod(sizes) > _MAX_ELEMENTS:
        raise ValueError(f"as an array it has the shape {sizes}")
    return np.zeros_like(like, shape=sizes, order="F")


def _one_hot(wrapper: Struct) -> Any:
    """Return a OneHotArray of Bool: (labels, indices...); the labels are a parameter or a field."""
    indices = np.asarray(wrapper.data[0])
    return _hot(wrapper.data[1] if len(wrapper.data) == 2 else _param(wrapper, 1), indices)


def _one_hot_vectors(wrapper: Struct) -> Any:
    """Return a OneHotMatrix of Flux up to 0.11: its height, and a vector of OneHotVector."""
    vectors: Any = wrapper.data[1]
    places = np.frombuffer(vectors.data, "<u4")[::2]  # each is its place and its height
    return _hot(wrapper.data[0], places)


def _hot(count: Any, places: Any) -> Any:
    made = _zeros((count, *places.shape), np.zeros(0, np.bool_))
    np.equal(np.arange(1, len(made) + 1).reshape(-1, *(1,) * places.ndim), places, out=made)
    return made


_DENSE: dict[str, Callable[[Any], Any]] = {
    "LinearAlgebra.Adjoint": lambda wrapper: np.conj(_turned(wrapper)),
    "LinearAlgebra.Transpose": _turned,
    "LinearAlgebra.Diagonal": lambda wrapper: np.diag(_parent(wrapper)),
    "LinearAlgebra.Symmetric": lambda wrapper: _mirrored(wrapper, is_hermitian=False),
    "LinearAlgebra.Hermitian": lambda wrapper: _mirrored(wrapper, is_hermitian=True),
    "LinearAlgebra.UpperTriangular": lambda wrapper: np.triu(_parent(wrapper)),
    "LinearAlgebra.LowerTriangular": lambda wrapper: np.tril(_parent(wrapper)),
    "LinearAlgebra.UnitUpperTriangular": lambda w: _with_ones(np.triu(_parent(w), 1)),
    "LinearAlgebra.UnitLowerTriangular": lambda w: _with_ones(np.tril(_parent(w), -1)),
    "Base.SubArray": _viewed,
    "Base.CodeUnits": lambda wrapper: np.frombuffer(wrapper.data[0].encode(), np.uint8),
    "Base.ReshapedArray": lambda w: _parent(w).reshape(tuple(map(int, w.data[1])), order="F"),
    "Base.ReinterpretArray": _reinterpreted,
    "Base.PermutedDimsArrays.PermutedDimsArray": _permuted,
    "SparseArrays.SparseMatrixCSC": _sparse,
    "SparseArrays.SparseVector": _sparse_vector,
    "Flux.OneHotVector": lambda wrapper: _hot(wrapper.data[1], np.asarray(wrapper.data[0])),
    "Flux.OneHotMatrix": _one_hot_vectors,
    "Flux.OneHotArray": _one_hot,
    "OneHotArrays.OneHotArray": _one_hot,
}
CLASSES: dict[str, type[Struct]] = dict.fromkeys(_DENSE, Wrapped)
