"""The inline and the detached layout: their limits, their bytes, what a damaged one says."""

from __future__ import annotations

import os
import struct

import bson
import numpy as np
import pytest
from hypothesis import given

import gpustore as gs
from gpustore import document, testing
from gpustore.document import Payload, plan, scan

LIMIT = 2**31 - 1


def never():
    raise AssertionError("nothing may be streamed")


def planned(nbytes, layout="auto", count=1):
    entries = {
        f"a{i}": {"tag": "array", "size": [], "data": Payload(nbytes, never)} for i in range(count)
    }
    return plan(entries, writer="test", layout=layout)


def test_the_limit_of_the_inline_layout_is_met_exactly():
    room = LIMIT - planned(2**30).nbytes + 2**30  # the payload of the largest inline file
    largest = planned(room)
    assert largest.nbytes == LIMIT and not largest.places
    beyond = planned(room + 1)
    assert beyond.places and beyond.nbytes == 4096 + room + 1
    assert struct.unpack_from("<i", largest.structures[0])[0] == LIMIT


def test_inline_beyond_the_limit_gives_lengths_of_minus_one():
    long = planned(2**30, "inline", count=3)
    assert struct.unpack_from("<i", long.structures[0])[0] == -1 and not long.places
    assert struct.unpack_from("<i", planned(2**30, "inline").structures[0])[0] > 0
    with pytest.raises(
        gs.UnsupportedValueError, match="layout='inline'.*2147483647 bytes in an ar"
    ):
        planned(2**31, "inline")


def test_detached_payloads_follow_the_document_in_order_and_aligned():
    laid_out = planned(2**20, "detached", count=3)
    offsets = [place.offset for place in laid_out.places]
    assert offsets == [4096, 4096 + 2**20, 4096 + 2**21]
    small = planned(10, "detached", count=3)
    assert [place.offset for place in small.places] == [4096, 4160, 4224]
    assert small.nbytes == 4234


@given(testing.values())
def test_any_value_comes_back_from_a_detached_file(value):
    testing.assert_roundtrip(value, layout="detached")


@given(testing.models())
def test_any_model_comes_back_from_a_detached_file(model):
    testing.assert_roundtrip(model, layout="detached")


@pytest.fixture
def detached(tmp_path):
    gs.save(tmp_path / "d.bson", a=np.arange(6.0), b=np.ones((300, 300)), layout="detached")
    return tmp_path / "d.bson"


def test_any_bson_reader_sees_a_valid_document_first(detached):
    raw = detached.read_bytes()
    (nbytes,) = struct.unpack_from("<i", raw)
    first = bson.decode(raw[:nbytes])
    assert first["_gpustore"]["layout"] == "detached"
    assert first["a"]["data"] == {"offset": 4096, "nbytes": 48}
    assert raw[4096:4144] == np.arange(6.0).tobytes()


def test_detached_files_are_read_lazily_verified_and_made_anew(detached, tmp_path):
    with gs.open_file(detached) as stored:
        assert [entry.path for entry in stored.arrays] == ["a", "b"]
        assert stored.read("b", region=np.s_[2:4, 5]).tolist() == [1, 1]
        assert stored.verify() and stored.verify().arrays == 2
        stored.save_for_cpu(tmp_path / "cpu.bson")
    testing.assert_same(gs.load(tmp_path / "cpu.bson", verify=True), gs.load(detached))


def test_tags_of_devices_are_kept_in_a_detached_file(cuda, tmp_path):
    model = gs.gpu(gs.Chain(gs.Dense(3, 2)))
    gs.save(tmp_path / "t.bson", model=model, on_gpu="tag", layout="detached")
    assert gs.device_of(gs.load(tmp_path / "t.bson", "model")) == "cuda:0"


def test_damage_is_named(detached):
    raw = bytearray(detached.read_bytes())
    for at, named in [(4096, "a;"), (8192 + 5, "b;"), (4096 + 60, "structure;")]:
        raw[at] ^= 1
        detached.write_bytes(raw)
        with pytest.raises(gs.IntegrityError, match=f"differs for {named}"):
            gs.load(detached, verify=True)
        raw[at] ^= 1


def with_place(path, **place):
    """Write another offset or size of the first array into a detached file."""
    raw = bytearray(path.read_bytes())
    for key, value in place.items():
        at = raw.index(b"\x12" + key.encode() + b"\0") + len(key) + 2
        struct.pack_into("<q", raw, at, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ({"offset": 0}, "multiple of 64 from byte"),
        ({"offset": 4097}, "multiple of 64 from byte"),
        ({"offset": -64}, "is said to lie"),
        ({"nbytes": -1}, "is said to lie"),
        ({"offset": 2**40}, "cut off or damaged"),
        ({"offset": 2**62, "nbytes": 2**62}, "cut off or damaged"),
        ({"nbytes": 2**63 - 1}, "cut off or damaged"),
        ({"offset": 8192}, "multiple of 64 from byte"),
        ({"nbytes": 40}, "expected 48 bytes for float64"),
        ({"nbytes": 8000}, "multiple of 64 from byte"),
    ],
    ids=str,
)
def test_a_place_outside_the_rules_is_refused(detached, place, error):
    with_place(detached, **place)
    with pytest.raises(gs.FormatError, match=error):
        gs.load(detached)


def test_a_detached_file_that_is_cut_off_says_so(detached):
    raw = detached.read_bytes()
    for length in (len(raw) - 1, 9000, 4100, 4096, 500, 3):
        detached.write_bytes(raw[:length])
        with pytest.raises(gs.FormatError):
            gs.load(detached)


def test_slots_of_a_detached_file_lie_within_it():
    assert document.scan(b"\x05\0\0\0\0") == {}
    content = bson.encode({"_gpustore": {"layout": "detached"}, "a": {"tag": "array", "data": 3}})
    assert scan(content)["a"]["data"] == 3


@pytest.mark.skipif(
    "GPUSTORE_TEST_BIG" not in os.environ, reason="writes 4.1 GiB; set GPUSTORE_TEST_BIG=1"
)
@pytest.mark.timeout(600)
def test_an_array_of_over_4_gib_comes_back(tmp_path):
    large = np.zeros(2**32 // 4 + 2**24, np.float32)
    large[:: 2**20] = 1
    gs.save(tmp_path / "large.bson", large=large, small=np.arange(5), durable=False)
    found = gs.load(tmp_path / "large.bson", verify=True)
    assert found["small"].tolist() == [0, 1, 2, 3, 4]
    assert found["large"].shape == large.shape and found["large"][:: 2**20].all()
    assert not found["large"][1 : 2**20].any()
