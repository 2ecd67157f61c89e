"""Files written by version 1 of the format open for ever, with the values they were made of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import bson
import numpy as np
import pytest
from bson import Int64

import gpustore as gs
from gpustore import document
from gpustore.testing import assert_same

GOLDEN = Path(__file__).parent / "golden"


sys.path.insert(0, str(GOLDEN))
try:
    import make
    import make_more
finally:
    sys.path.remove(str(GOLDEN))


@pytest.fixture(scope="module")
def values():
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


def loaded(name):
    make_more.register()
    return gs.load(GOLDEN / name, verify=True, lost="placeholder")


def test_the_other_kinds_of_value_are_those_they_were_made_of():
    assert_same(loaded("v1_more.bson"), make_more.values())


def test_golden_files_that_are_a_value_or_an_object_are_these():
    value, dense = loaded("v1_value.bson"), loaded("v1_object.bson")
    assert_same(value, [1, np.arange(3), "a file that is a list"])
    assert_same(gs.params(dense), [np.asfortranarray(np.ones((2, 3), "f4")), np.zeros(2, "f4")])
    assert type(dense) is gs.Dense


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_golden_arrays_on_pages_are_those_they_were_made_of(layout):
    name = f"v1_pages_{layout}.bson"
    assert_same(loaded(name), make_more.pages())
    with gs.open_file(GOLDEN / name) as stored:
        assert [entry.offset % 4096 for entry in stored.arrays if entry.path == "a"] == [0]


def test_a_golden_file_whose_lengths_are_minus_one_opens():
    assert (GOLDEN / "v1_long.bson").read_bytes()[:4] == b"\xff" * 4
    assert_same(loaded("v1_long.bson"), {"many": make_more.many()})


@pytest.mark.parametrize("name", make_more.OF_JULIA)
def test_golden_values_of_julia_are_those_of_the_fixtures(name):
    fixture = gs.load(make_more.FIXTURES / f"{name}.bson", lost="placeholder", mmap=False)
    assert_same(loaded("v1_julia.bson")[name], dict(fixture))


@pytest.mark.parametrize("era", make_more.ERAS)
def test_golden_layers_of_each_era_give_the_outputs_of_today(era):
    found, made = loaded(f"v1_flux{era.replace('.', '')}.bson")["model"], make_more.layers()
    x = np.random.default_rng(0).normal(size=(6, 6, 1, 2)).astype("f4")
    assert np.allclose(found(x), made(x), rtol=1e-5, atol=1e-6)  # memory orders differ
    assert repr(found) == repr(made)


def test_every_version_of_the_format_has_golden_files_and_no_version_is_missing():
    names = [file.name for file in GOLDEN.glob("*.bson")]
    versions = {int(re.match(r"v(\d+)_", name)[1]) for name in names}
    assert versions == set(range(1, document.FORMAT_VERSION + 1))


def test_the_scripts_still_make_every_golden_file(tmp_path):
    for script in ("make.py", "make_more.py"):
        subprocess.run([sys.executable, GOLDEN / script, tmp_path], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        p.name for p in GOLDEN.glob("*.bson")
    )


def test_a_golden_file_is_saved_again_whole(tmp_path):
    shutil.copy(GOLDEN / "v1_inline.bson", tmp_path / "a.bson")
    gs.save(tmp_path / "b.bson", gs.load(tmp_path / "a.bson"))
    assert gs.load(tmp_path / "b.bson", verify=True).keys() == gs.load(tmp_path / "a.bson").keys()
