"""Figures of arrays' values, streamed: extent, mean, histogram, and how far two arrays are apart.

Arrays are walked in blocks, so that of a mapped array only pages of its file are touched, and the
memory beside them is that of a few blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpustore import tree

Report = Callable[[int], None]  # of bytes that were read
_BLOCK_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Figures:
    """What is said of an array: `min`, `max` and `mean` are of what is no NaN, None where nothing.

    Those of complex numbers are of their magnitudes. `nan` and `zeros` are counts.
    """

    count: int
    min: float | None
    max: float | None
    mean: float | None
    nan: int
    zeros: int

    @property
    def nan_share(self) -> float:
        return self.nan / self.count if self.count else 0.0

    @property
    def zero_share(self) -> float:
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far two arrays of one shape are apart: elements that differ, and by how much.

    `largest` is the largest distance of two elements, `relative` the norm of the distance by that
    of the first array's finite elements: both NaN where one of two elements is, and None where the
    elements are no numbers.
    """

    differing: int
    count: int
    largest: float | None
    relative: float | None


def figures(array: Any, report: Report | None = None) -> Figures | None:
    """Return the figures of a host array, or None where it holds no numbers.

    >>> figures(np.array([0, 1, np.nan, 3]))
    Figures(count=4, min=0.0, max=3.0, mean=1.3333333333333333, nan=1, zeros=1)
    """
    if not tree.is_numeric(array):
        return None
    low, high, total, nan, zeros = math.inf, -math.inf, 0.0, 0, 0
    for (block,) in _blocks(report, array):
        numbers = _real(block)
        is_nan = np.isnan(numbers)
        nan_here = int(is_nan.sum())
        zeros += numbers.size - int(np.count_nonzero(numbers))
        if nan_here:
            nan += nan_here
            numbers = numbers[~is_nan]
        if numbers.size:
            low, high = min(low, numbers.min().item()), max(high, numbers.max().item())
            total += float(numbers.sum(dtype=np.float64))
    known = array.size - nan
    if not known:
        return Figures(array.size, None, None, None, nan, zeros)
    return Figures(array.size, low, high, total / known, nan, zeros)


def histogram(
    array: Any, bins: int, report: Report | None = None
) -> tuple[NDArray[np.int64], float, float]:
    """Return how many finite elements lie in each of `bins` equal parts, and the range's ends."""
    low, high = math.inf, -math.inf
    for (block,) in _blocks(report, array):
        numbers = _finite(block)
        if numbers.size:
            low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
    counts = np.zeros(bins, np.int64)
    if low > high:
        low = high = 0.0
    half = high / 2 - low / 2  # where the whole may be more than a float64 holds
    for (block,) in _blocks(report, array):
        numbers = _finite(block)
        places = (numbers / 2 - low / 2) * (bins / half) if half else numbers * 0 + bins // 2
        counts += np.bincount(places.astype(np.int64).clip(0, bins - 1), minlength=bins)
    return counts, low, high


def deviation(a: Any, b: Any, tolerance: float = 0.0, report: Report | None = None) -> Deviation:
    """Return how far two host arrays of one shape are apart; NaN equals NaN, 0.0 equals -0.0.

    Elements at most `tolerance` apart do not count as differing.

    >>> deviation(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    Deviation(differing=1, count=2, largest=0.5, relative=0.1)
    """
    is_numeric = tree.is_numeric(a) and tree.is_numeric(b)
    differing, largest, apart, size = 0, 0.0, 0.0, 0.0
    for one, other in _blocks(report, a, b):
        if not is_numeric:
            differing += _bytes_differing(one, other)
            continue
        is_same = one == other
        if is_same.all():
            size += _square_sum(_wide(one))
            continue
        distance = _distance(one, other)
        one, other = _wide(one), _wide(other)
        is_same |= np.isnan(one) & np.isnan(other)
        distance[is_same] = 0  # two NaN are apart by NaN, and so is an infinity from itself
        if tolerance:
            is_same |= distance <= tolerance
        differing += one.size - int(np.count_nonzero(is_same))
        largest = float(np.maximum(largest, distance.max()))
        apart += float(np.square(distance).sum())
        size += _square_sum(one)
    if not is_numeric:
        return Deviation(differing, a.size, None, None)
    relative = math.sqrt(apart / size) if size else (math.inf if apart else 0.0)
    return Deviation(differing, a.size, largest, relative)


def _blocks(report: Report | None, *arrays: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the elements of arrays of one shape, in one order for all, in flat blocks."""
    walk = np.nditer(
        arrays,
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"]] * len(arrays),
        buffersize=_BLOCK_ELEMENTS,
    )
    with np.errstate(all="ignore"):
        for found in walk:
            blocks = found if isinstance(found, tuple) else (found,)
            if blocks[0].size:
                yield blocks
            if report is not None:
                report(sum(block.nbytes for block in blocks))


def _real(block: Any) -> Any:
    """Return the block as numbers that NumPy itself knows; of complex ones the magnitudes."""
    if block.dtype.kind == "c":
        return np.abs(block)
    if block.dtype.kind == "b":
        return block.view(np.uint8)
    is_native = block.dtype.kind in "iuf" and block.dtype.isbuiltin == 1
    return block if is_native else block.astype(np.float64)


def _finite(block: Any) -> Any:
    numbers = _real(block).astype(np.float64, copy=False)
    is_finite = np.isfinite(numbers)
    return numbers if is_finite.all() else numbers[is_finite]


def _wide(block: Any) -> Any:
    return block.astype(np.complex128 if block.dtype.kind == "c" else np.float64)


def _distance(one: Any, other: Any) -> Any:
    """Return how far elements are apart as float64; of integers the exact distance, rounded."""
    if one.dtype == other.dtype and one.dtype.kind in "iu" and one.dtype.isbuiltin == 1:
        apart = np.maximum(one, other) - np.minimum(one, other)  # wraps: unsigned it is right
        return apart.view(f"u{apart.itemsize}").astype(np.float64)
    return np.abs(_wide(one) - _wide(other))


def _square_sum(numbers: Any) -> float:
    """Return the sum of the squares of the finite elements' magnitudes."""
    return float(np.square(np.abs(numbers)).sum(where=np.isfinite(numbers)))


def _bytes_differing(a: Any, b: Any) -> int:
    if a.dtype != b.dtype:
        return int(a.size)
    shape = (a.size, a.dtype.itemsize)
    rows = [np.ascontiguousarray(block).view(np.uint8).reshape(shape) for block in (a, b)]
    return int((rows[0] != rows[1]).any(axis=1).sum())
