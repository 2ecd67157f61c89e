"""Figures, histograms and deviations of arrays, against NumPy on the whole array."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from gpustore import figures as module
from gpustore import testing
from gpustore.figures import Deviation, deviation, figures, histogram

BLOCK = module._BLOCK_ELEMENTS
EXTENSIONS = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def plain(array):
    """Return the array as numbers that NumPy knows well."""
    if array.dtype.kind == "c":
        return np.abs(array)
    return array.astype("f8") if array.dtype.kind in "Vfb" else array


@given(testing.arrays())
def test_figures_are_those_of_numpy(array):
    with np.errstate(all="ignore"):
        numbers = plain(array).ravel()
        known = numbers[~np.isnan(numbers)]
        expected = known.mean(dtype="f8") if known.size else None
        found = figures(array)
    assert (found.count, found.nan) == (array.size, array.size - known.size)
    assert found.zeros == int((numbers == 0).sum())
    if known.size:
        assert (found.min, found.max) == (known.min(), known.max())
        np.testing.assert_allclose(found.mean, expected, rtol=1e-9, atol=1e-300)
    else:
        assert (found.min, found.max, found.mean) == (None, None, None)


@given(testing.arrays())
def test_a_histogram_counts_every_finite_element(array):
    counts, low, high = histogram(array, 7)
    with np.errstate(all="ignore"):
        finite = plain(array)[np.isfinite(plain(array))]
    assert counts.sum() == finite.size
    if finite.size:
        # the last bit of a complex magnitude may hang on where in its loop NumPy 2.1 meets it
        apart = 2 * np.spacing(finite.max()) if array.dtype.kind == "c" else 0
        assert abs(low - finite.min()) <= apart and abs(high - finite.max()) <= apart


def test_a_histogram_of_many_blocks_is_that_of_numpy():
    array = np.random.default_rng(0).standard_normal((3, BLOCK))
    counts, low, high = histogram(array, 50)
    np.testing.assert_array_equal(counts, np.histogram(array, 50, (low, high))[0])


@given(testing.arrays())
def test_an_array_deviates_in_nothing_from_itself(array):
    other = np.array(array, order="C" if array.flags.f_contiguous else "F")
    found = deviation(array, other)
    assert (found.differing, found.largest or 0) == (0, 0) and found.count == array.size


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "u8", "f2", "f4", "f8", "c8", *EXTENSIONS])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_differs_is_counted_and_measured(dtype, order):
    a = np.zeros((2, BLOCK), dtype)
    b = np.array(a, order=order)
    b[0, 3] = b[1, -1] = 1
    found = deviation(a, b)
    assert found == Deviation(2, a.size, 1.0, math.inf)
    assert deviation(b, a) == Deviation(2, a.size, 1.0, 1.0)
    assert deviation(a, b, tolerance=1).differing == 0


def test_integers_that_float64_cannot_tell_apart_differ():
    a = np.array([2**63 - 1])
    assert deviation(a, a - 1) == Deviation(1, 1, 1.0, 2.0**-63)
    found = deviation(np.array([-(2**63)]), np.array([2**63 - 1]))
    assert (found.differing, found.largest) == (1, 2.0**64)


@pytest.mark.parametrize("ends", [(1e17, 1e17 + 16), (-1e308, 1e308), (0, 5e-324), (3, 3)])
def test_a_histogram_of_any_range_counts_all(ends):
    counts, low, high = histogram(np.array([*ends, ends[1]]), 8)
    assert (low, high) == ends and counts.sum() == 3


@pytest.mark.parametrize(("a", "b", "differing", "largest"), [
    ([np.nan, 1], [np.nan, 1], 0, 0), ([0.0], [-0.0], 0, 0), ([np.inf], [np.inf], 0, 0),
    ([np.nan, 1], [0, 1], 1, np.nan), ([np.inf], [-np.inf], 1, np.inf), ([], [], 0, 0),
    ([np.inf, np.nan, 1], [np.inf, np.nan, 3], 1, 2),
])  # fmt: skip
def test_nan_infinity_and_zeros(a, b, differing, largest):
    found = deviation(np.array(a, "f8"), np.array(b, "f8"))
    assert found.differing == differing
    np.testing.assert_equal(found.largest, largest)


def test_what_is_no_number_differs_by_its_bytes():
    a = np.array(["2020-01-01", "NaT"], "M8[D]")
    assert figures(a) is None
    assert deviation(a, a) == Deviation(0, 2, None, None)
    assert deviation(a, a[::-1]) == Deviation(2, 2, None, None)
    assert deviation(a, a.astype("M8[s]")).differing == 2


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_read_is_reported(count):
    told: list[int] = []
    array = np.zeros((3, BLOCK), "f4")
    if count == 1:
        figures(array, told.append)
    else:
        deviation(array, array, 0.0, told.append)
    assert sum(told) == count * array.nbytes and len(told) >= 3
