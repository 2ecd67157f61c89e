"""Arrays -> array documents: one by one, and rows of small ones alike at once."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections import defaultdict
from operator import attrgetter
from typing import Any

import numpy as np

from gpustore import rows, twins
from gpustore.document import Payload
from gpustore.dtypes import element_type_of
from gpustore.julia import PERMUTED, JuliaType, Struct, is_of_both_orders
from gpustore.layout import SMALL_NBYTES
from gpustore.small import Alike, Row, SmallArray
from gpustore.typeof import array_type, numpy_dtype
from gpustore.values import Origin, origin_of

_dtype_of, _shape_of = attrgetter("dtype"), attrgetter("shape")
_base_of, _is_contiguous = attrgetter("base"), attrgetter("flags.c_contiguous")


def lower(lowerer: Any, container: Any, key: Any, value: Any, path: str) -> None:
    """Lower an array of any device into container[key], in Julia's memory order or turned to it."""
    is_plain = type(value) is np.ndarray
    if not is_plain and (not_dense := _not_dense(value)):
        raise lowerer.refuse(path, value, not_dense)
    dtype = value.dtype if is_plain else numpy_dtype(value)
    known = lowerer.kinds.get(dtype) or element_type_of(dtype)
    if known is None:
        raise lowerer.refuse(path, value, _advice(dtype))
    lowerer.kinds[dtype] = known
    if not is_plain and hasattr(value, "mask") and isinstance(value, np.ndarray):
        raise lowerer.refuse(path, value, "its mask would be lost; save .data and .mask")
    twin = origin_of(value)
    if twin is not None:
        _original(lowerer, container, key, value, twin)
        return
    flags = getattr(value, "flags", None)
    is_column_major = getattr(flags, "f_contiguous", False) or is_of_both_orders(value.shape)
    is_column_major = is_column_major or id(value) in lowerer.column_major
    if is_plain and value.nbytes <= SMALL_NBYTES and known[1] is None:
        order = "F" if is_column_major else "C"
        content = lowerer.make_payload(value, order)
        if type(content) is np.ndarray:
            lowerer.place(container, key, value, SmallArray(alike(lowerer, value, order), content))
            return
    if is_column_major:
        container[key] = lowerer.array_node(value, known, value.shape, "F")
        lowerer.places[id(value)] = (container, key, value)
        return
    parent = lowerer.array_node(value, known, value.shape[::-1], "C")
    lowerer.place(
        container, key, value, lowerer.struct(_row_major_type(array_type(value)), [parent])
    )


def alike(lowerer: Any, value: Any, order: str) -> Alike:
    """Return what documents of NumPy arrays of one dtype, shape and order have in common."""
    known = value.dtype, value.shape, order
    found: Alike | None = lowerer.alikes.get(known)
    if found is None:
        element_type, _ = element_type_of(value.dtype) or (None, None)
        shape = value.shape if order == "F" else value.shape[::-1]
        kind, size = lowerer.head(element_type, value.dtype, shape)
        is_turned = order == "C"
        outer = lowerer.type(_row_major_type(array_type(value))) if is_turned else None
        found = lowerer.alikes[known] = Alike(value.nbytes, kind, size, outer)
    return found


def _not_dense(value: Any) -> str:
    """Return what to save in the place of a tensor of PyTorch that has no dense memory, or ""."""
    tensors: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    if not isinstance(value, tensors):
        return ""
    if value.is_meta:
        return "on the device meta it has no values"
    if value.is_quantized:
        return "save its dequantize()"
    is_strided = str(value.layout) == "torch.strided"
    return "" if is_strided else f"its layout is {value.layout}; save its to_dense()"


@functools.lru_cache(256)
def _row_major_type(whole: JuliaType) -> JuliaType:
    """Return the type by which Julia sees the row-major array of a type without turning it."""
    order = tuple(range(whole.params[1], 0, -1))
    return JuliaType.named(PERMUTED, *whole.params, order, order, whole)


def _original(lowerer: Any, container: Any, key: Any, value: Any, twin: Any) -> None:
    """Write an array as what it was in its file: a bare binary, or the bits of a BitArray."""
    if isinstance(twin, Struct):
        twins.lower_bit_array(lowerer, container, key, value, twin)
        return
    payload = lowerer.make_payload(value, "F")
    if isinstance(payload, Payload):
        bare = dataclasses.replace(payload, is_bare=True)
    else:
        bare = Payload(payload.nbytes, None, is_bare=True, content=payload)
    lowerer.place(container, key, value, bare)


def lower_run(lowerer: Any, node: Any, keys: list[Any], arrays: list[Any]) -> list[int]:
    """Lower NumPy arrays of which others have dtype and shape; return the indices of the rest."""
    dtypes, shapes = [*map(_dtype_of, arrays)], [*map(_shape_of, arrays)]
    are_alike = dtypes.count(dtypes[0]) == shapes.count(shapes[0]) == len(arrays)
    row = lower_row(lowerer, node, keys, arrays) if are_alike else None
    if row:
        if type(node) is dict:
            node.update(dict.fromkeys(keys, row))
        else:
            node[keys[0] : keys[-1] + 1] = [row] * len(keys)
        return []
    if type(node) is dict:
        node.update(dict.fromkeys(keys))  # in this order
    groups: defaultdict[Any, list[int]] = defaultdict(list)
    for index, kind in enumerate(zip(dtypes, shapes, strict=True)):
        groups[kind].append(index)
    rest: list[int] = []
    for group in groups.values():
        members = [keys[index] for index in group], [arrays[index] for index in group]
        row = lower_row(lowerer, node, *members) if len(group) >= rows.FEWEST else None
        if row:
            row.dissolve()
        else:
            rest += group
    return sorted(rest)


def lower_row(lowerer: Any, node: Any, keys: list[Any], arrays: list[Any]) -> Row | None:
    """Lower small NumPy arrays of one dtype and shape as `lower` would; None if they cannot be.

    They are met for the first time here, and lie in memory as the first one does. The row is to be
    put into the node.
    """
    first, ids = arrays[0], dict.fromkeys(map(id, arrays))
    is_column_major = first.flags.f_contiguous or is_of_both_orders(first.shape)
    if not (is_column_major or lowerer.column_major.isdisjoint(ids)):
        return None
    known = element_type_of(first.dtype)
    order = "F" if is_column_major else "C"
    if known is None or known[1] is not None or type(lowerer.make_payload(first, order)) is Payload:
        return None
    if len(ids) < len(arrays) or not lowerer.places.keys().isdisjoint(ids):
        return None
    if Origin in {*map(type, map(_base_of, arrays))}:
        return None
    is_as_stacked = first.ndim == 1 or not is_column_major
    contents = arrays if is_as_stacked else [array.T for array in arrays]
    if not all(map(_is_contiguous, contents)):
        return None
    row = Row(node, keys, alike(lowerer, first, order), contents, arrays)
    lowerer.places.update(dict.fromkeys(ids, row))
    return row


def _advice(dtype: np.dtype[Any]) -> str:
    if dtype.names:
        return f"save the fields of {dtype} as a dict of arrays"
    if dtype.kind in "OUS":
        return "save it as a list: array.tolist()"
    return f"there is no Julia type for {dtype}; convert it, for example to float64"
