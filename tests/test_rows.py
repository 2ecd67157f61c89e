"""Rows of small arrays alike: the fast ways of reading and writing equal the plain ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bson
import numpy as np
import pytest
from bson.int64 import Int64
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import (
    arrays,
    document,
    encoder,
    likeness,
    rows,
    runs,
    scanner,
    survey,
    tagged,
    testing,
    transfer,
)
from gpustore.document import Slot
from gpustore.errors import GpustoreError
from gpustore.julia import JuliaType, Struct
from gpustore.layout import SLOT_NBYTES
from gpustore.small import SmallArray


@gs.model_type("Main.Pair")
@dataclass
class Pair:
    first: Any
    second: Any
    third: int


LAYOUTS = ["inline", "detached"]


@pytest.fixture(autouse=True, scope="module")
def _documents_are_not_decoded_whole():
    """Documents below SLOT_NBYTES never come to be looked at for rows; make that few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "SLOT_NBYTES", 600)
        yield


def one_by_one(self, keys, *columns):
    for key, pair in zip(keys, zip(*columns, strict=True), strict=True):
        self.element(key, SmallArray(*pair).document())


def plainly(monkeypatch):
    """Read and write every element by itself, with nothing known of others alike."""
    monkeypatch.setattr(rows, "pitch_at", lambda *position: None)
    monkeypatch.setattr(rows, "groups", lambda nodes: [])
    monkeypatch.setattr(scanner.Scanner, "tagged_at", lambda *position: None)
    monkeypatch.setattr(tagged, "stamp", lambda *position: None)
    for kind in (encoder.Encoder, encoder.DetachedEncoder):
        monkeypatch.setattr(kind, "small_arrays", one_by_one)
    monkeypatch.setattr(arrays, "lower_row", lambda *row: None)
    monkeypatch.setattr(survey, "_forms", lambda cls, nodes: {})


@st.composite
def small_arrays(draw):
    """Arrays of which many follow one another with one shape and dtype, as a dict or as a list."""
    arrays = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(["f4", "f8", "i1", "?", "c8", "f2", ">f4", "M8[s]"]))
        shape = draw(st.sampled_from([(), (3,), (2, 3), (0,), (1, 2, 2), (64,), (200,), (50, 30)]))
        values = np.arange(int(np.prod(shape)) or 1).astype(dtype)[: int(np.prod(shape))]
        order = draw(st.sampled_from("CF"))
        count = draw(st.sampled_from([1, 2, 5, 12, 40]))
        arrays += [values.copy().reshape(shape, order=order) for _ in range(count)]
    if draw(st.booleans()):
        arrays = [array for turn in range(3) for array in arrays[turn::3]]  # shapes alternate
    if draw(st.booleans()):
        arrays[-1] = arrays[0]
    names = draw(st.sampled_from(["a{}", "ö{}", "{}", "layer.{:04}"]))
    what = draw(st.sampled_from(["dict", "list", "layers", "objects", "dicts"]))
    if what == "list":
        return arrays
    firsts, seconds = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    pairs = [*zip(firsts, seconds, strict=False)]
    if what == "layers":
        matrices = [array for array in arrays if array.ndim == 2 and array.dtype.kind == "f"]
        layers = [gs.Dense(array, draw(st.sampled_from([True, False]))) for array in matrices]
        return gs.Chain(*layers, *layers[:1])
    if what == "objects":
        return [Pair(*pair, draw(st.sampled_from([1, 2]))) for pair in pairs]
    if what == "dicts":
        return {f"layer{i}": {"kernel": one, "bias": other} for i, (one, other) in enumerate(pairs)}
    return {names.format(index): array for index, array in enumerate(arrays)}


def described(value):
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes(), value.flags.writeable
    if isinstance(value, (Pair, gs.Dense, gs.Chain)):
        return described({name: vars(value)[name] for name in type(value).__annotations__})
    if not isinstance(value, (dict, list, tuple)):
        return repr(value)
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: described(part) for key, part in parts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def filled(node, buffer):
    """Return a document with bytes in the place of slots."""
    if isinstance(node, Slot):
        return buffer[node.offset : node.offset + node.nbytes]
    if isinstance(node, dict):
        return {key: filled(child, buffer) for key, child in node.items()}
    return [filled(child, buffer) for child in node] if isinstance(node, list) else node


@given(small_arrays(), st.sampled_from(LAYOUTS), st.sampled_from([0, 600]))
def test_rows_are_written_and_read_as_their_elements_would_be(folder, value, layout, slot_nbytes):
    fast, plain = folder / "fast.bson", folder / "plain.bson"
    gs.save(fast, model=value, layout=layout, durable=False)
    octets = fast.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        gs.save(plain, model=value, layout=layout, durable=False)
        assert plain.read_bytes() == octets
        arrays = described(gs.load(plain, "model"))
        expected = filled(document.scan(octets, slot_nbytes=slot_nbytes), octets)
    assert repr(filled(document.scan(octets, slot_nbytes=slot_nbytes), octets)) == repr(expected)
    assert described(gs.load(fast, "model", verify=True)) == arrays
    with gs.open_file(fast) as stored:
        assert stored.verify().arrays == len(stored.arrays)


@pytest.fixture(scope="module")
def row_files(folder):
    arrays = {f"a{index}": np.full(4, index, "f4") for index in range(10, 40)}
    shapes = [(2, 3), (4,), (50, 30)] * 3
    arrays |= {f"b{index}": np.ones(shape) for index, shape in enumerate(shapes)}
    arrays["c"] = [gs.Dense(np.ones((2, 2)), np.ones(2)) for _ in range(3)]
    for layout in LAYOUTS:
        gs.save(folder / layout, arrays, layout=layout, durable=False)
    return {layout: folder / layout for layout in LAYOUTS}


def outcome(path):
    """Return what a file loads as, its arrays and what is damaged of them, or the error of each.

    Offsets in messages may differ.
    """
    found = []
    for job in (
        lambda: repr(described(gs.load(path))),
        lambda: gs.open_file(path).arrays,
        lambda: gs.open_file(path).verify(),
    ):
        try:
            found.append(job())
        except GpustoreError as error:
            found.append(type(error))
    return found


CHANGES = st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=3)


@given(CHANGES, st.sampled_from(LAYOUTS))
def test_a_damaged_row_gives_what_its_elements_would_give(row_files, folder, changes, layout):
    damaged = bytearray(row_files[layout].read_bytes())
    for position, octet in changes:
        damaged[position % len(damaged)] = octet
    path = folder / "damaged.bson"
    path.write_bytes(damaged)
    found = outcome(path)
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        assert outcome(path) == found


def test_each_bit_of_a_type_and_a_size_gives_what_the_codec_would_give(tmp_path):
    path, model = tmp_path / "damaged.bson", {"a": np.ones((60, 50)), "b": np.ones((60, 50))}
    gs.save(path, model, durable=False)
    whole = path.read_bytes()
    for position in range(4, whole.index(b"\x05data\0")):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = outcome(path)
            with pytest.MonkeyPatch.context() as patch:
                plainly(patch)
                assert outcome(path) == found, (position, bit)


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_a_row_do_not_overlap(tmp_path, layout, shape):
    path = tmp_path / "rows.bson"
    gs.save(path, [np.full(shape, index, "f4") for index in range(20)], layout=layout)
    found = gs.load(path)
    found[5][:] = -1
    assert [float(array.flat[-1]) for array in found[4:7]] == [4, -1, 6]
    assert gs.load(path)[5].flat[0] == 5


def noted(monkeypatch, name):
    """Return the list of all that a reader of many elements gives from now on."""
    read = []
    plain = getattr(runs, name)

    def reader(*arguments):
        read.append(plain(*arguments))
        return read[-1]

    monkeypatch.setattr(runs, name, reader)
    return read


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)])
def test_a_row_is_written_and_read_as_one(tmp_path, monkeypatch, shape, order):
    path = tmp_path / "rows.bson"
    arrays = [np.full(shape, index, "f4", order=order) for index in range(10, 90)]
    monkeypatch.setattr(gs.arrays, "lower", None)
    gs.save(path, arrays)
    read = noted(monkeypatch, "read_row")
    for made, array in zip(gs.load(path), arrays, strict=True):
        assert np.array_equal(made, array) and made.flags.c_contiguous == array.flags.c_contiguous
    assert sum(len(row.names) for row in read if row is not None) >= 70


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("again", [[0], [19], [3, 3, 7], [*range(20)]])
def test_arrays_of_a_row_that_stand_elsewhere_too_stay_shared(tmp_path, layout, again):
    own = [np.full((2, 3), number, "f4") for number in range(20)]
    names = {f"n{number}": array for number, array in enumerate(own)}
    twice = [own[number] for number in again]
    for first, second in ((names, twice), (twice, names), (own, names), (names, own)):
        value = {"first": first, "second": second, "row": [array + 1 for array in own]}
        gs.save(tmp_path / "fast", value, layout=layout)
        with pytest.MonkeyPatch.context() as patch:
            plainly(patch)
            gs.save(tmp_path / "plain", value, layout=layout)
        assert (tmp_path / "fast").read_bytes() == (tmp_path / "plain").read_bytes()
        found = gs.load(tmp_path / "fast")
        testing.assert_same(found, value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_whose_shapes_alternate_are_read_as_one_run(tmp_path, monkeypatch, layout):
    path = tmp_path / "run.bson"
    shapes = [(3, 4), (4,), (2, 3, 4), (50, 40), (5, 6)]
    arrays = {f"a{i}": np.full(shapes[i % 5], i, "f4") for i in range(10, 98)}
    arrays["a50"] = np.asfortranarray(arrays["a50"])
    gs.save(path, arrays, layout=layout)
    read = noted(monkeypatch, "read_run")
    for found, array in zip(gs.load(path).values(), arrays.values(), strict=True):
        assert np.array_equal(found, array)
        assert found.flags.c_contiguous == array.flags.c_contiguous
    assert sum(len(row.nodes) for row in read) >= 44
    assert gs.open_file(path).verify().arrays == 88


@pytest.mark.parametrize("names", [(), ("model",), ("epoch", "model")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_of_layers_are_made_at_once(tmp_path, monkeypatch, layout, names):
    layers = [gs.Dense(np.full((5, 4), i, "f4"), np.full(5, i, "f4")) for i in range(60)]
    gs.save(tmp_path / "a", model=gs.Chain(*layers), epoch=3, layout=layout)
    one_by_one = []
    plain = transfer.host_view
    monkeypatch.setattr(
        transfer, "host_view", lambda *given: one_by_one.append(given) or plain(*given)
    )
    found = gs.load(tmp_path / "a", *names)
    model = {(): lambda: found["model"], ("model",): lambda: found}.get(names, lambda: found[1])()
    for layer, made in zip(layers, model.layers, strict=True):
        assert np.array_equal(made.weight, layer.weight) and np.array_equal(made.bias, layer.bias)
        assert made.weight.flags.f_contiguous
    assert len(one_by_one) < (90 if names == ("model",) else 1)  # of several entries, only one


def test_runs_with_large_arrays_are_found_however_often_such_files_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "SLOT_NBYTES", SLOT_NBYTES)
    monkeypatch.setattr(likeness, "likes", {})
    monkeypatch.setattr(likeness, "_met", set())
    shapes = [(3, 4), (4,), (90, 400)]
    arrays = {f"a{i}": np.full(shapes[i % 3], i, "f4") for i in range(10, 90)}
    gs.save(tmp_path / "a", arrays)
    counts, read = [], noted(monkeypatch, "read_run")
    cut, widths = likeness.cut, []
    monkeypatch.setattr(
        likeness, "cut", lambda *of: widths.append(of[2].stop - of[2].start) or cut(*of)
    )
    for _ in range(4):
        read.clear()
        found = gs.load(tmp_path / "a", verify=True)
        assert all(map(np.array_equal, found.values(), arrays.values()))
        counts.append(sum(len(row.nodes) for row in read))
    assert min(counts) == max(counts) >= 60 and likeness.likes
    assert 0 < max(widths) < 4096  # large payloads are not read


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_bit_around_arrays_whose_shapes_alternate(tmp_path, layout):
    """Those at the beginning, in whose likeness others are read, and one in the midst of these."""
    path, shapes = tmp_path / "damaged.bson", [(3, 4), (4,), (6, 2)]
    arrays = {f"a{i}": np.full(shapes[i % 3], i, "f4") for i in range(10, 44)}
    gs.save(path, arrays | {"padding": "a" * 9000}, layout=layout, durable=False)
    whole = path.read_bytes()
    first, middle = whole.index(b"a10\0"), whole.index(b"a33\0")
    nbytes = whole.index(b"a11\0") - first
    for position in (*range(first, first + nbytes), *range(middle, middle + nbytes)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        found = outcome(path)
        with pytest.MonkeyPatch.context() as patch:
            plainly(patch)
            assert outcome(path) == found, position


def test_arrays_of_one_size_must_have_the_bytes_for_it(tmp_path):
    """They share what says their type and size, and may be said to hold less or more than that."""
    document = {"tag": "array", "type": {"tag": "datatype", "name": ["Core", "UInt16"]}}
    document = {**document, "size": [Int64(10)], "data": bytes(20)}
    document["type"]["params"] = []
    wrong = [{**document, "data": bytes(18)}, {**document, "data": bytes(22)}]
    for extra in ({}, {"blake3": b"abc"}, {"dtype": "M8[s]"}, {"device": "x"}):
        nodes = [document] * 900 + ([{**document, **extra}] if extra else wrong) + [document] * 900
        (tmp_path / "a").write_bytes(bson.encode({f"a{i}": node for i, node in enumerate(nodes)}))
        with pytest.raises(gs.FormatError, match=r"a: a900: (expected|the digest|'M8)"):
            gs.load(tmp_path / "a")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_within_types_are_found_where_they_lie(tmp_path, layout):
    path = tmp_path / "types.bson"
    held = [np.full(5, index, "f4") for index in range(9)]
    kinds = [JuliaType(("Main", "A"), (array, "a" * 300)) for array in held]
    structs = [Struct(kind, [np.ones(3)]) for kind in kinds]
    gs.save(path, {"structs": structs, "padding": "a" * 9000}, layout=layout)
    found = gs.load(path, "structs", verify=True)
    assert [struct.type.params[0].tolist() for struct in found] == [a.tolist() for a in held]
    with gs.open_file(path) as stored:
        assert stored.verify().arrays == 18
    again = tmp_path / "again.bson"
    gs.save(again, {"structs": found, "padding": "a" * 9000}, layout=layout)
    assert again.read_bytes() == path.read_bytes()


def test_types_that_are_kept_for_other_files_say_nothing_of_the_file(tmp_path):
    """How modules are spelled, references and what is unknown belong to one file."""
    file, large = tmp_path / "a", np.ones((3, 9000), "f4")
    spelled = JuliaType.named("Main.Base.Kept", JuliaType.named("Main.Core.Int64"), 3)
    for _ in range(3):  # row-major: in a struct whose type has parameters, as the other
        gs.save(file, {"struct": Struct(spelled, [np.asfortranarray(large)]), "rows": large})
        found = gs.load(file)
        assert found["struct"].type.path == spelled.path
        assert found.spelling == frozenset({"Core", "Base"})
        gs.save(file, {"rows": large})
        assert type(gs.load(file)) is dict
    assert any(b"PermutedDimsArray" in octets for octets in tagged._kept)
    assert not any(b"Main" in octets or b"backref" in octets for octets in tagged._kept)
    assert {*map(id, tagged._kept.values())} == {*tagged.lifted}


def scanned(octets):
    try:
        return document.scan(octets)
    except GpustoreError as error:  # what the codec says after that depends on chance
        return type(error), str(error).partition("codec says")[0]


def test_each_bit_of_a_stamp_gives_what_the_codec_would_give(tmp_path, monkeypatch):
    """A stamp is read in the likeness of another file's: whatever differs, as without."""
    gs.save(tmp_path / "a", w=np.ones(9000), durable=False)
    octets = (tmp_path / "a").read_bytes()
    first = octets.index(b"\x03_gpustore\0")

    assert scanned(octets)["_gpustore"]["blake3"] == octets[-34:-2] and tagged._stamps
    for bit in range(8 * first, 8 * len(octets)):
        changed = bytearray(octets)
        changed[bit // 8] ^= 1 << bit % 8
        quick = scanned(bytes(changed))
        with monkeypatch.context() as patch:
            patch.setattr(tagged, "stamp", lambda *position: None)
            assert quick == scanned(bytes(changed)), bit


@pytest.mark.parametrize("array", [np.ones((3, 9000)), np.asfortranarray(np.ones((3, 9000)))])
def test_each_bit_of_a_large_array_gives_what_it_would_without_others_like_it(
    tmp_path, monkeypatch, array
):
    """A large array is read in the likeness of another file's: whatever differs, as without."""
    monkeypatch.setattr(likeness, "likes", {})
    monkeypatch.setattr(likeness, "_met", set())
    gs.save(tmp_path / "a", w=array, durable=False)
    octets = (tmp_path / "a").read_bytes()

    assert all(scanned(octets) == scanned(octets) for _ in range(3))
    like = likeness.likes[max(likeness.likes)]  # the other is of the array in it
    first = octets.index(like.parts[0][2])
    payload = range(first + like.holes[0].start, first + like.holes[0].stop)
    for byte in (*range(first, payload[0] + 2), *range(payload[-1] - 40, len(octets))):
        for bit in range(8):
            changed = bytearray(octets)
            changed[byte] ^= 1 << bit
            quick = scanned(bytes(changed))
            with monkeypatch.context() as patch:
                patch.setattr(likeness, "likes", {})
                assert quick == scanned(bytes(changed)), (byte, bit)


def test_large_arrays_of_other_files_are_remembered_only_where_they_say_nothing_of_these(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(document, "SLOT_NBYTES", SLOT_NBYTES)
    monkeypatch.setattr(likeness, "likes", {})
    monkeypatch.setattr(likeness, "_met", set())
    spelled, large = JuliaType.named("Main.Base.Held"), np.ones((90, 400))
    for number in range(4):
        gs.save(tmp_path / "a", {"s": Struct(spelled, [large.T]), "w": large * number})
        found = gs.load(tmp_path / "a")
        assert found.spelling == frozenset({"Base"}) and np.all(found["w"] == number)
        gs.save(tmp_path / "b", large.astype("f4").repeat(2, axis=0) + number)
        assert np.all(gs.load(tmp_path / "b", verify=True) == 1 + number)
    kept = [part for like in likeness.likes.values() for *_, part in like.parts]
    assert kept and not any(b"Main" in octets or b"backref" in octets for octets in kept)


def test_a_type_that_two_threads_decode_at_once_is_kept_once(tmp_path, monkeypatch):
    """What is known by the id of a document is that document's as long as it is known."""
    gs.save(tmp_path / "a", np.ones((3, 9000), "f4"))
    monkeypatch.setattr(tagged, "_kept", {})
    monkeypatch.setattr(tagged, "lifted", {})
    decode = scanner.Scanner.decode_whole
    is_inner = False

    def decoded(self, start, end, *rest):
        nonlocal is_inner
        if not is_inner and b"PermutedDimsArray" in self.buffer[start:end]:
            is_inner = True
            gs.load(tmp_path / "a")  # as another thread would meanwhile
        return decode(self, start, end, *rest)

    monkeypatch.setattr(scanner.Scanner, "decode_whole", decoded)
    assert gs.load(tmp_path / "a").shape == (3, 9000) and is_inner
    assert {*map(id, tagged._kept.values())} == {*tagged.lifted} and tagged.lifted
