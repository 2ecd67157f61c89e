"""Files written by version 1 of the format open for ever, with the values they were made of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import bson
import numpy as np
import pytest
from bson import Int64

import gpustore as gs
from gpustore.testing import assert_same

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def values():
    sys.path.insert(0, str(GOLDEN))
    try:
        import make
    finally:
        sys.path.remove(str(GOLDEN))
    return make.values()


@pytest.mark.parametrize("name", ["v1_inline.bson", "v1_detached.bson"])
def test_a_golden_file_holds_the_values_it_was_made_of(values, name):
    found = gs.load(GOLDEN / name, verify=True)
    assert found["shared"][0] is found["shared"][1]
    assert found["cycle"][1] is found["cycle"]
    assert found.keys() == values.keys()
    for key in values.keys() - {"cycle"}:
        assert_same(found[key], values[key])


def test_a_golden_file_with_tags_holds_the_values_and_the_tags():
    found = gs.load(GOLDEN / "v1_tagged.bson", device="cpu", verify=True)
    assert_same(found, {"a": np.arange(5, dtype="f4"), "b": np.arange(3)})
    with gs.open_file(GOLDEN / "v1_tagged.bson") as stored:
        assert stored.tags == {"cuda:1": 1}


def test_a_file_of_a_newer_format_says_so(tmp_path):
    path = tmp_path / "newer.bson"
    stamp = {"version": Int64(2), "writer": "gpustore 9.0", "layout": "folded"}
    path.write_bytes(bson.encode({"a": 1, "_gpustore": stamp}))
    for read in (gs.load, gs.open_file):
        with pytest.raises(gs.FutureVersionError, match="version 1 or older, found 2"):
            read(path)


def test_the_script_still_makes_every_golden_file(tmp_path):
    subprocess.run([sys.executable, GOLDEN / "make.py", tmp_path], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in GOLDEN.glob("*.bson")
    )


def test_a_golden_file_is_saved_again_whole(tmp_path):
    shutil.copy(GOLDEN / "v1_inline.bson", tmp_path / "a.bson")
    gs.save(tmp_path / "b.bson", gs.load(tmp_path / "a.bson"))
    assert gs.load(tmp_path / "b.bson", verify=True).keys() == gs.load(tmp_path / "a.bson").keys()
