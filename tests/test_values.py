"""Julia's values that Python has no exact twin for: what they are used as here."""

from __future__ import annotations

import copy
import datetime
import pickle
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore.julia import JuliaType
from gpustore.testing import assert_roundtrip
from gpustore.values import Int128, JuliaArray, UInt128, origin_of

FOLDER = Path(__file__).parent / "fixtures" / "julia"


def test_ranges_are_pythons_where_that_says_it_all():
    ranges = gs.load(FOLDER / "ranges_v1.bson")
    assert ranges["r1"] == range(1, 5) and ranges["r9"] == range(10, 0, -1)
    assert np.asarray(ranges["r4"]).tolist() == [i / 10 for i in range(11)]
    third = ranges["r3"]  # Base.OneTo(5)
    assert len(third) == 5 and third[-1] == 5 and list(third) == [1, 2, 3, 4, 5]
    assert third.stop == 5
    huge = gs.Range(third.type, [2**60], ("stop",))
    assert len(huge) == 2**60


@pytest.mark.parametrize(
    "value", [range(5), range(2, 9, 3), range(9, 2, -3), range(1, 2), range(0)]
)
def test_pythons_ranges_come_back(value):
    found = assert_roundtrip({"r": value})["r"]
    assert found == value and type(found) is range


def test_bit_arrays_are_boolean_arrays_and_remember_what_they_were(tmp_path):
    bits = gs.load(FOLDER / "bitarrays_v1.bson")
    first = next(value for value in bits.values() if origin_of(value) is not None)
    assert first.dtype == bool
    first[...] = ~first
    gs.save(tmp_path / "flipped.bson", {"bits": first})
    again = gs.load(tmp_path / "flipped.bson", "bits")
    assert np.array_equal(again, first) and origin_of(again).type.name == "Base.BitArray"
    assert origin_of(first.copy()) is None and origin_of(first[:1]) is None


def test_characters_are_strings_of_one_character():
    text = gs.load(FOLDER / "scalars_text_v1.bson")
    assert text["c"] == "a" and isinstance(text["c"], gs.Char)
    for value in (gs.Char("a"), gs.Char("λ"), gs.Char("\0"), gs.Char("🙂")):
        assert gs.Char.from_raw(value.raw) == value
    assert gs.Char.from_raw(b"\0\0\0\xff") is None


def test_missing_is_one_object():
    assert gs.load(FOLDER / "scalars_text_v1.bson", "m") is gs.missing
    assert copy.deepcopy(gs.missing) is gs.missing
    assert pickle.loads(pickle.dumps(gs.missing)) is gs.missing
    assert_roundtrip([gs.missing, gs.Char("x"), Int128(3), UInt128(2**100), -(2**100)])


def test_elements_of_bits_types_are_python_values():
    files = gs.load(FOLDER / "bitsarrays_v1.bson")
    assert files["same"].elements() == [(1.0, 2.0), (1.0, 4.0)]
    assert files["nt"][0] == {"a": 1.0, "b": -1, "c": 1}
    assert files["chars"][1, 0] == "λ" and np.asarray(files["chars"]).shape == (2, 2)
    assert all(type(day) is datetime.date for day in files["dates"])
    assert isinstance(files["pairs"][0], gs.Struct) and len(files["pairs"]) == 2
    wide = JuliaArray(
        JuliaType.named("Core.Int128"), (1,), (-5).to_bytes(16, "little", signed=True)
    )
    assert wide[0] == -5


def test_a_typed_dictionary_keeps_its_type_while_its_members_fit(tmp_path):
    file = tmp_path / "d.bson"
    ages = gs.load(FOLDER / "dicts_v1.bson")["d"]
    typed = next(value for value in ages.values() if isinstance(value, gs.JuliaDict))
    again = assert_roundtrip([typed])[0]
    assert again.julia_type == typed.julia_type
    counts = gs.JuliaDict({1: 2.0})
    counts.julia_type = JuliaType.named(
        "Base.Dict", JuliaType.named("Core.Int64"), JuliaType.named("Core.Float64")
    )
    assert assert_roundtrip([counts])[0].julia_type == counts.julia_type
    counts["other"] = None
    gs.save(file, {"counts": counts})
    found = gs.load(file, "counts")
    assert found == {1: 2.0, "other": None} and type(found) is dict


def test_sets_keep_their_type_and_order(tmp_path):
    loaded = gs.load(FOLDER / "shared_v1.bson")
    assert loaded
    assert_roundtrip([{3, 1, 2}, frozenset("ab"), set()])
    members = gs.JuliaSet(["b", "a"])
    members.julia_type, members.order = (
        JuliaType.named("Base.Set", JuliaType.named("Core.String")),
        ("b", "a"),
    )
    again = assert_roundtrip([members])[0]
    assert again.order == ("b", "a") and again.julia_type == members.julia_type


def test_a_data_frame_is_its_columns(tmp_path):
    index = gs.Struct(
        JuliaType.named("DataFrames.Index"), [{"a": 1, "b": 2}, [gs.Symbol("a"), gs.Symbol("b")]]
    )
    columns = [np.arange(3), ["x", "y", "z"]]
    frame = gs.Struct(JuliaType.named("DataFrames.DataFrame"), [columns, index])
    gs.save(tmp_path / "frame.bson", frame=frame)
    found = gs.load(tmp_path / "frame.bson", "frame")
    assert isinstance(found, gs.DataFrame) and list(found) == ["a", "b"]
    assert found["b"] == ["x", "y", "z"] and found["a"].tolist() == [0, 1, 2]
    found["a"] = np.arange(3) * 10
    gs.save(tmp_path / "again.bson", frame=found)
    again = gs.load(tmp_path / "again.bson", "frame")
    assert isinstance(again, gs.DataFrame) and again["a"].tolist() == [0, 10, 20]
    found["c"] = np.zeros(3)
    gs.save(tmp_path / "plain.bson", frame=found)
    assert type(gs.load(tmp_path / "plain.bson", "frame")) is dict


def test_val_of_one_is_not_val_of_true():
    one, true = JuliaType.named("Base.Val", 1), JuliaType.named("Base.Val", True)
    assert one != true and one.is_same(JuliaType(("Main", "Base", "Val"), (1,)))
    found = assert_roundtrip([one, true])
    assert type(found[0].params[0]) is int and found[1].params[0] is True


def test_a_type_follows_its_fields(tmp_path):
    model = gs.load(FOLDER / "doc_model_flux08_v1.bson", "model")
    assert "TrackedArray" in repr(model[0].julia_type)
    gs.save(tmp_path / "plain.bson", model=gs.data(model))
    plain = gs.load(tmp_path / "plain.bson", "model")
    assert "TrackedArray" not in repr(plain.julia_type)
    assert plain[0].julia_type.params[1] == JuliaType.named(
        "Core.Array", JuliaType.named("Core.Float32"), 2
    )
