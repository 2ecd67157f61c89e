"""A file that was changed or cut is refused, or nothing that is read is another.

10,000 random bit flips of each file with GPUSTORE_TEST_LONG=1 (`make test-long`), else 300.
"""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

import gpustore as gs
from gpustore.testing import assert_same

IS_LONG = "GPUSTORE_TEST_LONG" in os.environ
FLIPS = 10_000 if IS_LONG else 300


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_random_bit_flip_is_found_or_changes_nothing_that_is_read(tmp_path, layout):
    path, chance = tmp_path / "model.bson", random.Random(1)
    rng = np.random.default_rng(0)
    model = gs.Chain(gs.Dense(64, 300, rng=rng), gs.Dense(300, 300, rng=rng))
    gs.save(path, model=model, rows=[np.full(9, n) for n in range(40)], layout=layout)
    good, expected = path.read_bytes(), repr(gs.load(path, "rows"))
    weights = [array.tobytes() for array in gs.params(gs.load(path, "model"))]
    for _ in range(FLIPS):
        bad = bytearray(good)
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
        path.write_bytes(bad)
        try:
            found = gs.load(path, verify=True)
        except gs.GpustoreError:
            continue
        assert repr(found["rows"]) == expected
        assert [array.tobytes() for array in gs.params(found["model"])] == weights


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_a_file_cut_anywhere_is_refused(tmp_path, layout):
    path = tmp_path / "model.bson"
    gs.save(path, a=np.arange(30), b=[np.full(3, n) for n in range(9)], layout=layout)
    whole = path.read_bytes()
    for nbytes in range(0, len(whole), 1 if len(whole) < 10_000 else 7):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(gs.FormatError):
            gs.load(path)


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_every_bit_flip_of_a_small_file_is_reported_by_verify(tmp_path, layout):
    path = tmp_path / "small.bson"
    expected = {"a": np.arange(3, dtype="f4"), "s": ["x", 1, (2.5, None)]}
    gs.save(path, expected, layout=layout)
    good, unnoticed = path.read_bytes(), []
    step = 1 if layout == "inline" or IS_LONG else 5  # of the latter most are padding
    for bit in range(0, 8 * len(good), step):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            with gs.open_file(path) as stored:
                report = stored.verify()
                if report.damaged:
                    assert set(report.damaged) <= {"a", "structure"}
                    continue
        except gs.GpustoreError:
            continue
        unnoticed.append(bit)
        assert_same(gs.load(path), expected)
    assert not unnoticed


def test_a_flip_in_an_array_names_it_and_no_other(tmp_path):
    path = tmp_path / "named.bson"
    gs.save(path, {"model": {f"w{n}": np.full(300, n, "f4") for n in range(5)}})
    with gs.open_file(path) as stored:
        entries = stored.arrays
    good = path.read_bytes()
    for entry in entries:
        bad = bytearray(good)
        bad[entry.offset + entry.nbytes // 2] ^= 4
        path.write_bytes(bad)
        with gs.open_file(path) as stored:
            assert stored.verify().damaged == (entry.path,)


def test_a_private_copy_is_checked_and_stays_whole_when_the_file_is_cut_or_changed(tmp_path):
    path = tmp_path / "changing.bson"
    gs.save(path, large=np.arange(2**18), small=[1])
    found = gs.load(path, mmap=False, verify=True)
    whole = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(b"\xff" * len(whole))
        file.truncate(100)
    assert (found["large"] == np.arange(2**18)).all()
    path.write_bytes(whole[:-1])
    with pytest.raises(gs.TruncatedFileError):
        gs.load(path, mmap=False)
    bad = bytearray(whole)
    bad[len(whole) // 2] ^= 1
    path.write_bytes(bad)
    with pytest.raises(gs.IntegrityError, match="large"):
        gs.load(path, mmap=False, verify=True)
