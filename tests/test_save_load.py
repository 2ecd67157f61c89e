"""Saving and loading: values, refusals, sharing, mapping, digests, atomic replacement."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

import bson
import ml_dtypes
import numpy as np
import pytest

import gpustore as gs
from gpustore import testing
from gpustore.julia import JuliaType, Struct


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.bson"


def model() -> gs.Chain:
    rng = np.random.default_rng(7)
    return gs.Chain(gs.Dense(10, 5, gs.relu, rng=rng), gs.Dense(5, 2, rng=rng), gs.softmax)


# --- entries and names ---


def test_the_tour_of_the_readme(file):
    trained = model()
    gs.save(file, model=trained)
    loaded = gs.load(file, "model")
    assert repr(loaded) == "Chain(Dense(10, 5, relu), Dense(5, 2), softmax)"
    x = np.random.default_rng(1).normal(size=(10, 3)).astype("f4")
    np.testing.assert_allclose(loaded(x), trained(x), rtol=1e-5)
    weights = gs.data(gs.params(trained))
    gs.save(file, weights=weights)
    other = model()
    gs.loadparams(other, gs.load(file, "weights"))
    np.testing.assert_allclose(other(x), trained(x), rtol=1e-5)


def test_no_name_gives_the_dict_one_name_the_object_several_a_tuple(file):
    gs.save(file, {"a": 1}, b=[2])
    assert gs.load(file) == {"a": 1, "b": [2]}
    assert gs.load(file, "b") == [2]
    assert gs.load(file, "b", "a") == ([2], 1)


@pytest.mark.parametrize(
    "value", [None, 3, "text", [1, 2], (1,), {1: 2}, {}, {"tag": "array"}, {"_backrefs": [1]}]
)
def test_any_value_can_be_the_file(file, value):
    gs.save(file, value)
    assert gs.load(file) == value and type(gs.load(file)) is type(value)


def test_a_layer_or_an_array_can_be_the_file(file):
    gs.save(file, gs.Dense(3, 2))
    assert isinstance(gs.load(file), gs.Dense)
    gs.save(file, np.eye(3))
    assert np.array_equal(gs.load(file), np.eye(3))
    with pytest.raises(gs.EntryNotFoundError, match="one object without entries"):
        gs.load(file, "model")


def test_a_missing_entry_is_named_with_those_there_are(file):
    gs.save(file, model=1, epoch=2)
    with pytest.raises(KeyError, match="expected an entry 'modle', found entries model, epoch"):
        gs.load(file, "modle")


def test_an_entry_given_twice_and_a_value_beside_names_are_refused(file):
    with pytest.raises(gs.UnsupportedValueError, match="'a' is given twice"):
        gs.save(file, {"a": 1}, a=2)
    with pytest.raises(gs.UnsupportedValueError, match="give it a name too"):
        gs.save(file, [1], a=2)
    assert not file.exists()


# --- values ---


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Unregistered:
    rate: float
    table: Any


@gs.model_type("Main.Registered")
@dataclasses.dataclass(frozen=True)
class Registered:
    layer: Any
    rate: float = 0.5


@gs.model_type
class Pair(NamedTuple):
    left: Any
    right: Any


EXTENSIONS = [
    name for name in dir(ml_dtypes) if name.startswith(("bfloat16", "float8", "float6", "float4"))
]


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_small_float_of_ml_dtypes_keeps_its_bits(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    values = np.arange(-4, 4).astype(dtype).reshape(2, 4)
    testing.assert_roundtrip([values, np.asfortranarray(values), values[0, 0]])


@pytest.mark.parametrize("code", ["M8[ns]", "m8[s]", "M8[D]"])
def test_times_of_numpy_keep_their_unit(code):
    testing.assert_roundtrip(np.arange(6).reshape(2, 3).astype(code))


def test_registered_classes_come_back_as_themselves():
    testing.assert_roundtrip([Registered(gs.Dense(2, 3)), Pair(1, np.ones(3))])


def test_unregistered_classes_come_back_as_structs_with_their_names(file):
    gs.save(file, a=Unregistered(0.1, np.eye(2)), b=Point(1, [2]))
    loaded = gs.load(file)
    assert loaded["a"].type.name == "Main.Unregistered" and loaded["a"].rate == 0.1
    assert np.array_equal(loaded["a"].table, np.eye(2))
    assert loaded["b"].x == 1 and loaded["b"].data == [1, [2]]
    testing.assert_roundtrip(loaded)


def test_registering_a_name_twice_or_a_plain_class_is_refused():
    with pytest.raises(gs.UnsupportedValueError, match="expected a dataclass"):
        gs.model_type("Main.Plain")(int)
    with pytest.raises(gs.UnsupportedValueError, match="already stands for"):
        gs.model_type("Main.Registered")(Point)


def test_cycles_are_kept():
    loop: list[Any] = [1]
    loop.append(loop)
    knot: dict[str, Any] = {"inside": ({"again": loop},)}
    knot["self"] = knot
    testing.assert_roundtrip([loop, knot])


@pytest.mark.parametrize("rank", [0, 1, 2, 31, 32])
def test_arrays_have_up_to_32_dimensions(rank):
    testing.assert_roundtrip(np.zeros((1,) * rank))
    testing.assert_roundtrip(np.arange(2.0 ** min(rank, 10)).reshape((2,) * min(rank, 10)))


def test_dates_with_microseconds_and_zones_are_exact():
    zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
    moment = datetime.datetime(2026, 11, 23, 12, 0, 0, 123456, zone)
    testing.assert_roundtrip([moment, moment.replace(tzinfo=None), moment.date()])


REFUSED = [
    (object(), "dataclass"),
    (lambda x: x, "code is never saved"),
    (np.zeros(2, [("a", "f4")]), "dict of arrays"),
    (np.array(["a"]), "tolist"),
    (np.array([None]), "tolist"),
    (np.zeros(2, "g"), "float64"),
    (2**128, "128 bits"),
    ("\ud800", "surrogate"),
]


@pytest.mark.parametrize(("value", "advice"), REFUSED)
def test_what_cannot_be_saved_is_refused_with_its_path_before_anything_is_written(
    file, value, advice
):
    chain = gs.Chain(gs.Dense(2, 2), gs.Dense(2, 2))
    chain[1].weight = value
    with pytest.raises(gs.UnsupportedValueError, match=r"^model\.layers\[1\]\.weight: ") as error:
        gs.save(file, model=chain)
    assert advice in str(error.value)
    assert os.listdir(file.parent) == []


def test_values_nested_too_deep_are_refused(file):
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(gs.UnsupportedValueError, match="nested too deep"):
        gs.save(file, deep=deep)
    while deep:  # take it apart: deallocation recurses too
        deep = deep.pop()


# --- sharing and memory order ---


def test_shared_arrays_are_one_payload_and_stay_shared(file):
    weight = np.ones((300, 300), "f4")
    gs.save(file, a=weight, b={"again": weight}, chain=gs.Chain(gs.Dense(weight), gs.Dense(weight)))
    assert file.stat().st_size < 2 * weight.nbytes
    loaded = gs.load(file)
    assert loaded["a"] is loaded["b"]["again"] is loaded["chain"][0].weight
    assert loaded["chain"][1].weight is loaded["a"]


def test_row_major_arrays_stay_row_major_outside_layers_and_turn_inside(file):
    table = np.arange(6.0).reshape(2, 3)
    gs.save(file, table=table, turned=np.asfortranarray(table), layer=gs.Dense(table.copy()))
    raw = bson.decode(file.read_bytes())
    assert raw["table"]["type"]["name"][-1] == "PermutedDimsArray"
    assert raw["table"]["data"][0]["size"] == [3, 2]
    assert raw["turned"]["tag"] == raw["layer"]["data"][0]["tag"] == "array"
    loaded = gs.load(file)
    assert loaded["table"].flags.c_contiguous and loaded["turned"].flags.f_contiguous
    for found in (loaded["table"], loaded["turned"], loaded["layer"].weight):
        assert np.array_equal(found, table)


# --- the format ---


def test_the_document_is_as_the_format_page_says(file):
    gs.save(file, small=np.ones(3, "f4"), large=np.ones(2**18, "f4"))
    raw = bson.decode(file.read_bytes())
    assert list(raw)[-1] == "_gpustore"
    assert raw["_gpustore"]["version"] == 1 and raw["_gpustore"]["layout"] == "inline"
    assert len(raw["large"]["blake3"]) == len(raw["_gpustore"]["blake3"]) == 32
    with gs.open_file(file) as stored:
        small, large = stored.arrays
    assert small.offset % 64 == 0 and large.offset % 4096 == 0


def test_a_newer_format_version_says_so(file):
    file.write_bytes(bson.encode({"a": 1, "_gpustore": {"version": bson.Int64(2)}}))
    with pytest.raises(gs.FutureVersionError, match="install a newer gpustore"):
        gs.load(file)


# --- mapping ---


def test_arrays_of_64_kib_are_private_views_of_the_mapped_file(file):
    big, small = np.zeros(2**14, "f4"), np.zeros(2**14 - 1, "f4")
    gs.save(file, big=big, small=small)
    before = file.read_bytes()
    loaded = gs.load(file)
    for array in loaded.values():
        array += 1
    assert file.read_bytes() == before and not gs.load(file, "big").any()
    assert not loaded["big"].flags.owndata
    copied = gs.load(file, "big", mmap=False)
    copied += 1
    assert file.read_bytes() == before


def test_a_mapped_model_survives_a_save_over_its_file(file):
    gs.save(file, a=np.full(2**16, 1.0))
    loaded = gs.load(file, "a")
    gs.save(file, a=np.full(2**16, 2.0))
    gs.save(file, a=loaded)
    assert gs.load(file, "a")[0] == 1.0


def test_loading_reads_only_the_pages_it_needs(file):
    code = (
        "import gpustore as gs, resource, sys\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "a = gs.load(sys.argv[1], 'a')\n"
        "assert a.shape == (2**26,), a.shape\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 32 * 1024, grown\n"
    )
    gs.save(file, a=np.zeros(2**26, "f4"), durable=False)
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


def test_opening_a_file_lists_no_array_until_asked(file):
    gs.save(file, good=np.ones(3), bad=gs.JuliaType.named("Main.T"))
    content = bson.decode(file.read_bytes())
    content["bad"] = {"tag": "backref", "ref": 9}
    file.write_bytes(bson.encode(content))
    with gs.open_file(file) as stored:
        assert list(stored) == ["good", "bad"] and "missing" not in stored
        with pytest.raises(gs.EntryNotFoundError, match="found entries good, bad"):
            stored["_gpustore"]
        assert stored["good"].tolist() == [1, 1, 1]
        with pytest.raises(gs.FormatError, match="bad: expected a backref from 1 to 0, found 9"):
            stored.arrays  # noqa: B018


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}])
def test_what_can_be_saved_however_deep_can_be_read_in_all_ways(file, wrap):
    deepest, value = 0, np.ones(2)
    for depth in range(1, 260):
        value = wrap(value)
        try:
            gs.save(file, v=value, durable=False)
        except gs.UnsupportedValueError:
            break
        deepest = depth
    assert deepest >= 60
    with pytest.raises(gs.UnsupportedValueError, match="nested too deep"):
        gs.save(file, v=value)
    gs.load(file, verify=True)
    with gs.open_file(file) as stored:
        assert len(stored.arrays) == 1 and stored.verify()


def test_reading_a_region_of_an_array(file):
    table = np.arange(12.0).reshape(3, 4)
    gs.save(file, nested={"table": table})
    with gs.open_file(file) as stored:
        part = stored.read("nested['table']", region=(slice(1, 3), 2))
        with pytest.raises(gs.EntryNotFoundError, match="expected an array 'table'"):
            stored.read("table")
    assert part.tolist() == [6.0, 10.0]


def test_an_open_file_is_a_mapping(file):
    gs.save(file, model=model(), epoch=3)
    with gs.open_file(file) as stored:
        assert list(stored) == ["model", "epoch"] and len(stored) == 2 and stored["epoch"] == 3
        paths = [entry.path for entry in stored.arrays]
        assert paths[:2] == ["model.layers[0].weight", "model.layers[0].bias"]
        assert stored.tags == {} and stored.verify()
        assert "loss" not in stored


# --- integrity ---


def test_every_single_bit_flip_is_found_or_changes_nothing_that_is_read(file):
    gs.save(file, w=np.arange(4, dtype="f4"), n=[1, "text"])
    good = file.read_bytes()
    expected = repr(gs.load(file))
    unseen = 0
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            file.write_bytes(bad)
            try:
                unseen += repr(gs.load(file, verify=True)) != expected
            except gs.GpustoreError:
                continue
    assert unseen == 0


def test_a_damaged_array_is_named(file):
    gs.save(file, model=model())
    with gs.open_file(file) as stored:
        offset = stored.arrays[2].offset
    damaged = bytearray(file.read_bytes())
    damaged[offset] ^= 1
    file.write_bytes(damaged)
    gs.load(file)
    with pytest.raises(gs.IntegrityError, match=r"model\.layers\[1\]\.weight"):
        gs.load(file, verify=True)


def test_a_file_without_digests_passes_verify(file):
    file.write_bytes(bson.encode({"a": 1}))
    assert gs.load(file, verify=True) == {"a": np.int32(1)}


# --- replacing ---


def test_an_error_while_streaming_leaves_the_old_file_and_no_temporary(file, monkeypatch):
    gs.save(file, a=1)
    before = file.read_bytes()

    def broken(array):
        raise MemoryError("device")

    monkeypatch.setattr("gpustore.devices.to_host", broken)
    with pytest.raises(MemoryError):
        gs.save(file, a=np.ones(3000))
    assert file.read_bytes() == before and os.listdir(file.parent) == [file.name]


def test_progress_reaches_the_size_of_the_file(file):
    seen: list[tuple[int, int]] = []
    gs.save(file, a=np.ones(2**19), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (file.stat().st_size,) * 2


@pytest.mark.parametrize(
    "options", [{"on_gpu": "maybe"}, {"layout": "sideways"}], ids=lambda options: str(options)
)
def test_unknown_options_are_refused(file, options):
    with pytest.raises(gs.UnsupportedValueError, match="expected"):
        gs.save(file, {"a": 1}, **options)


def test_tracked_arrays_made_in_python_are_julias_and_stay_shared(file):
    tracked = gs.param(np.ones((2, 3), "f4"))
    gs.save(file, a=tracked, b=tracked, layer=gs.Dense(tracked))
    loaded = gs.load(file)
    assert loaded["a"] is loaded["b"] is loaded["layer"].weight
    assert loaded["a"].tracker.data[3] is loaded["a"].grad
    assert loaded["a"].grad.shape == (2, 3)
    assert not loaded["a"].grad.any()
    testing.assert_roundtrip(loaded)


class Colour(enum.IntEnum):
    RED = 1


def test_subclasses_of_built_in_types_are_saved_as_what_they_extend(file):
    class Text(str):
        pass

    values = {"a": Colour.RED, "b": Text("x"), "c": np.str_("y"), "d": time.gmtime(0)[:3]}
    gs.save(file, values)
    assert gs.load(file) == {"a": 1, "b": "x", "c": "y", "d": (1970, 1, 1)}


def test_masked_arrays_and_unset_fields_are_refused(file):
    with pytest.raises(gs.UnsupportedValueError, match="mask would be lost"):
        gs.save(file, a=np.ma.masked_array([1, 2], [True, False]))
    dense = object.__new__(gs.Dense)
    with pytest.raises(gs.UnsupportedValueError, match="'weight' is not set"):
        gs.save(file, a=dense)


def test_subclasses_of_dict_and_named_tuples_of_julia_keep_their_entries(file):
    gs.save(file, a=collections.OrderedDict(x=1), b=gs.NamedTuple(lr=0.1))
    loaded = gs.load(file)
    assert loaded == {"a": {"x": 1}, "b": {"lr": 0.1}} and type(loaded["b"]) is gs.NamedTuple


def test_unknown_structs_are_written_back_as_they_came(file):
    kept = Struct(JuliaType.named("Main.Foo", JuliaType.named("Core.Int64"), 3), [1, [2.0]])
    gs.save(file, a=kept, b=kept)
    loaded = gs.load(file)
    assert loaded["a"] is loaded["b"] and loaded["a"].type == kept.type
    assert loaded["a"].data == [1, [2.0]] and loaded["a"].fields is None


@pytest.mark.parametrize("dtype", ["f4", "f8", "i1", "c16"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (65, 3), (300, 257), (2000, 1100)])
def test_row_major_weights_of_a_layer_are_written_column_major(file, dtype, shape):
    weight = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    gs.save(file, layer=gs.Dense(weight, False), durable=False)
    with gs.open_file(file) as stored:
        (entry,) = stored.arrays
        octets = file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    assert entry.order == "F" and octets == weight.T.tobytes()


def test_a_save_of_nothing_is_refused_and_none_is_a_value(tmp_path):
    gs.save(tmp_path / "a.bson", None)
    before = (tmp_path / "a.bson").read_bytes()
    with pytest.raises(gs.UnsupportedValueError, match="a value or named entries, found neither"):
        gs.save(tmp_path / "a.bson")
    assert (tmp_path / "a.bson").read_bytes() == before and gs.load(tmp_path / "a.bson") is None
