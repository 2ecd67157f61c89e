"""Objects alike: written and read at once, as each would be by itself."""

from __future__ import annotations

import datetime
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import bson
import numpy as np
import pytest
from bson.int64 import Int64
from hypothesis import given
from hypothesis import strategies as st
from test_rows import LAYOUTS, outcome, plainly

import gpustore as gs
from gpustore import digest, document, testing
from gpustore.errors import FormatError
from gpustore.julia import JuliaType, Struct, Symbol
from gpustore.lift import Lifter
from gpustore.lower import Lowerer
from gpustore.values import Char, JuliaArray, UInt128


@gs.model_type("Main.Block")
@dataclass
class Block:
    weight: Any
    scale: Any
    note: Any = None


def dense(number: int, shape: tuple[int, int] = (3, 4)) -> gs.Dense:
    weight = np.full(shape, number, "f4", order="F")
    return gs.Dense(weight, np.full(shape[0], -number, "f4"), gs.relu)


def written(path, value, layout="inline", *, is_plain=False):
    with pytest.MonkeyPatch.context() as patch:
        if is_plain:
            plainly(patch)
        gs.save(path, value, durable=False, layout=layout)
    return path.read_bytes()


def counted(monkeypatch, cls, name):
    """Return the list of what a method is called with from now on."""
    calls, plain = [], getattr(cls, name)

    def method(self, *given):
        calls.append(given)
        return plain(self, *given)

    monkeypatch.setattr(cls, name, method)
    return calls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_alike_are_written_and_made_at_once(tmp_path, monkeypatch, layout):
    path, layers = tmp_path / "a", [dense(number) for number in range(100)]
    lowered = counted(monkeypatch, Lowerer, "instance")
    lifted = counted(monkeypatch, Lifter, "instance")
    other = gs.Chain(*map(dense, range(90)))
    gs.save(path, model=gs.Chain(*layers), epoch=3, other=other, layout=layout)
    model = gs.load(path, "model", verify=True)
    for layer, made in zip(layers, model.layers, strict=True):
        assert np.array_equal(made.weight, layer.weight) and np.array_equal(made.bias, layer.bias)
        assert made.weight.flags.f_contiguous and made.weight.flags.writeable
        assert made.σ is gs.relu and vars(made).keys() == vars(model.layers[0]).keys()
    assert len({id(made) for made in model.layers}) == 100
    assert len(lowered) < 5 and len(lifted) < 30
    for read in (lambda: gs.open_file(path)["model"], lambda: gs.load(path, "model", "epoch")[0]):
        lifted.clear()
        testing.assert_same(read(), model)
        assert len(lifted) < 30
    assert written(path, {"model": model}, layout) == written(path, {"model": model}, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_whose_kinds_alternate_are_made_at_once(tmp_path, monkeypatch, layout):
    kinds = [dense, lambda n: dense(n, (2, 5)), lambda n: gs.BatchNorm(3 + n % 2)]
    layers = [kinds[number % 3](number) for number in range(200)]
    path = tmp_path / "a"
    lifted = counted(monkeypatch, Lifter, "instance")
    gs.save(path, model=gs.Chain(*layers), layout=layout)
    assert path.read_bytes() == written(
        tmp_path / "b", {"model": gs.Chain(*layers)}, layout, is_plain=True
    )
    model = gs.load(path, "model", verify=True)
    testing.assert_same(model, gs.Chain(*layers))
    assert len(lifted) < 100


@pytest.mark.parametrize("note", [None, "a", gs.relu, JuliaType.named("Core.Any")])
def test_structs_that_have_no_class_are_made_at_once(tmp_path, monkeypatch, note):
    """Julia's own files have no digests; those alike in them lie at one pitch."""
    kind = {"tag": "datatype", "name": ["Main", "Layer"], "params": []}
    float32 = {"tag": "datatype", "name": ["Core", "Float32"], "params": []}

    def array(number, *shape):
        octets = np.full(shape, number, "f4").tobytes()
        size = [bson.Int64(n) for n in shape]
        return {"tag": "array", "type": float32, "size": size, "data": octets}

    gs.save(tmp_path / "note", note=note)
    told = bson.decode((tmp_path / "note").read_bytes())["note"]
    nodes = [
        {"tag": "struct", "type": kind, "data": [array(n, 2, 300), told, array(-n, 50)]}
        for n in range(100, 200)
    ]
    path = tmp_path / "layers"
    path.write_bytes(bson.encode({"layers": nodes}))
    lifted = counted(monkeypatch, Lifter, "unknown")
    layers = gs.load(path, "layers")
    assert len(lifted) < 15  # the first ten have shorter names
    for number, layer in enumerate(layers, 100):
        assert type(layer) is Struct and layer.type is layers[0].type
        assert layer.data[0].shape == (2, 300) and (layer.data[0] == number).all()
        assert layer.data[1] is note or layer.data[1] == note
        assert layer.data[2].shape == (50,) and (layer.data[2] == -number).all()
    assert len({id(layer.data) for layer in layers}) == len(layers)
    layers[1].data[0][:] = 0
    assert (layers[2].data[0] == 102).all()


VALUES = st.sampled_from(
    [True, 1, 1.0, -0.0, 0.0, 0, float("nan"), None, "a", Symbol("a"), gs.relu, gs.tanh, 2**70,
     np.float32(1), (1, 2), JuliaType.named("Core.Any")]
)  # fmt: skip


@given(st.lists(VALUES, min_size=12, max_size=40), st.sampled_from(LAYOUTS), st.data())
def test_objects_are_written_as_each_would_be(tmp_path_factory, notes, layout, data):
    """What differs in more than the values of arrays is told apart, and what is shared is kept."""
    folder, count = tmp_path_factory.getbasetemp(), len(notes)
    notes = data.draw(st.sampled_from([notes, notes[:1] * count]))
    weights = [np.full((2, 3), number, "f4") for number in range(count)]
    for _ in range(data.draw(st.integers(0, 2))):
        one, other = data.draw(st.tuples(*[st.integers(0, count - 1)] * 2))
        weights[one] = weights[other]
    kind = data.draw(st.sampled_from(["block", "dict", "dense", "nested", "struct"]))
    scales = [np.full(2, number) for number in range(count)]
    rows = [*zip(weights, scales, notes, strict=True)]
    if kind == "block":
        objects = [Block(*row) for row in rows]
    elif kind == "nested":
        objects = [Block({"of": weight}, scale, note) for weight, scale, note in rows]
    elif kind == "struct":
        objects = [Struct(JuliaType.named("Main.Net"), [*row]) for row in rows]
    elif kind == "dense":
        objects = [gs.Dense(weight, scale.astype("f4")) for weight, scale, _ in rows]
    else:
        objects = [{"weight": row[0], "scale": row[1], row[2] and "note": row[2]} for row in rows]
    if data.draw(st.booleans()):
        objects[-1] = objects[0]
    value = {"objects": objects, "again": weights[:1], "layer": dense(1)}
    value["layer"].weight = weights[-1]
    fast = written(folder / "fast", value, layout)
    assert fast == written(folder / "plain", value, layout, is_plain=True)
    found = outcome(folder / "fast")
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        assert found == outcome(folder / "fast")


@dataclass(slots=True)
class Slotted:
    weight: Any


@dataclass
class Derived(Slotted):
    note: Any = None


@dataclass
class Scaled:
    weight: Any
    scale: Any


def _scale(self: Any) -> Any:
    return self.__dict__["scale"] + 1


Scaled.scale = property(_scale, lambda self, value: self.__dict__.update(scale=value))


@dataclass
class Shared:
    weight: Any
    sizes = (1, 2)  # no field


SHARED_TYPE = JuliaType(("Main", "A"), (Struct(JuliaType.named("Main.B"), [1]),))


class Named(NamedTuple):
    weight: Any
    note: Any


@dataclass
class Mapped(dict):
    weight: Any

    def __post_init__(self):
        self["n"] = float(self.weight[0, 0])


@dataclass
class Summed:
    weight: Any
    norm: Any

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        return float(self.weight.sum()) if name == "norm" else found


@dataclass
class Made:
    one: Any
    other: Any


def _made(*names: str) -> property:
    make = lambda self: [{key: np.full(3, n) for key in names} for n in range(20)]  # noqa: E731
    return property(make, lambda self, value: None)


Made.one, Made.other = _made("w"), _made("v", "u")


def with_more(weight: Any) -> Block:
    block = Block(weight, 1)
    block.cache = weight + 1
    return block


@pytest.mark.parametrize(
    "make",
    [
        Slotted,
        Derived,
        lambda w: Scaled(w, w),
        lambda w: Scaled(w, 1),
        Shared,
        lambda w: Named(w, 1),
        with_more,
        lambda w: Block(w, w),
        lambda w: Block(w.view(np.ma.MaskedArray), 1) if w[0, 0] < 0 else Block(w, (1, 2)),
        lambda w: {"tag": "mine", "weight": w},
        lambda w: {"tag": 1.5, "data": w, "type": None, "size": [2]},
        lambda w: {1: w},
        lambda w: {Symbol("weight"): w} if w[0, 0] % 2 else {"weight": w},
        lambda w: gs.Dense(w, bool(w[0, 0] % 3)),
        lambda w: gs.BatchNorm(3),
        lambda w: gs.Conv((2, 2), (1, 2)),
        lambda w: gs.RNNCell(2, 3),
        lambda w: gs.DepthwiseConv((2, 2), (2, 2)),
        lambda w: Block(w, JuliaType.named("Core.Val", JuliaType.named("Main.T", 1.5))),
        lambda w: Block(w, SHARED_TYPE),
        lambda w: Mapped(w),
        lambda w: Summed(w, 0),
        lambda w: Made(w, w),
        lambda w: {},
        lambda w: {"w": w, "options": {}},
        lambda w: gs.GlobalMeanPool(),
        lambda w: {"w": w, "n": 2**64 + int(w[0, 0])},
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_objects_are_written_as_each_would_be(tmp_path, layout, make):
    objects = [make(np.full((2, 3), number, "f4")) for number in range(20)]
    fast = written(tmp_path / "fast", {"objects": objects}, layout)
    assert fast == written(tmp_path / "plain", {"objects": objects}, layout, is_plain=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slot_nbytes", [600, 4000])
def test_each_bit_of_an_object_among_others_alike(tmp_path, monkeypatch, layout, slot_nbytes):
    monkeypatch.setattr(document, "SLOT_NBYTES", slot_nbytes)
    path = tmp_path / "damaged"
    whole = written(path, {"model": gs.Chain(*map(dense, range(26)))}, layout)
    first = whole.index(b"\x0314\0") + 4
    stop = whole.index(b"\x0315\0", first)
    for byte in [*range(first - 4, first + 40), *range(first + 40, stop + 4, 7)]:
        changed = bytearray(whole)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        found = outcome(path)
        with monkeypatch.context() as patch:
            plainly(patch)
            assert found == outcome(path), byte


def test_objects_alike_share_nothing_that_can_be_changed(tmp_path):
    blocks = {f"b{n}": {"w": np.full(3, n), "sizes": [1, 2], "x": {"y": n}} for n in range(10, 400)}
    gs.save(tmp_path / "a", blocks=blocks)
    found = gs.load(tmp_path / "a", "blocks")
    found["b50"]["sizes"].append(3)
    found["b50"]["x"]["y"] = None
    found["b50"]["w"] += 1
    changed = [name for name, block in found.items() if block["sizes"] != [1, 2]]
    assert changed == ["b50"]
    assert [name for name in blocks if found[name]["x"] != blocks[name]["x"]] == ["b50"]
    assert [name for name in blocks if (found[name]["w"] != blocks[name]["w"]).any()] == ["b50"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "note",
    [
        lambda n: 2**100 + n,
        lambda n: -(2**64) - n,
        lambda n: np.float32(n),
        lambda n: np.complex64(n),
        lambda n: complex(n, 1),
        lambda n: bytes([n % 256]) * 3,
        lambda n: Symbol(f"{n:04}"),
        lambda n: datetime.date(2000, 1, 1) + datetime.timedelta(n),
        lambda n: Char(chr(200 + n)),
        lambda n: UInt128(n),
        lambda n: [np.full(3, n)],
        lambda n: np.full(4, n).astype(object).tolist(),
    ],
)
def test_what_differs_beside_arrays_is_each_objects_own(tmp_path, layout, note):
    """Such as numbers whose bytes are as many in each, of which a document is no array's."""
    objects = [Block(np.full(3, n, "f4"), np.full(2, n), note(n)) for n in range(600)]
    gs.save(tmp_path / "a", objects=objects, layout=layout)
    testing.assert_same(gs.load(tmp_path / "a", "objects"), objects)


@gs.model_type("Main.Child")
@dataclass
class Child(Slotted):
    note: Any = None


def _set_weight(self, value):
    self.__dict__["weight"] = value
    self.__dict__["norm"] = float(value.sum())


@gs.model_type("Main.Normed")
@dataclass
class Normed:
    weight: Any
    scale: Any


Normed.weight = property(lambda self: self.__dict__["weight"], _set_weight)


# object.__setattr__, by which fields are set, calls the setter of a property
@pytest.mark.parametrize("cls", [Child, Normed])
def test_objects_of_classes_with_slots_or_properties_are_made_whole(tmp_path, cls):
    objects = [cls(np.full(3, n, "f4"), np.full(2, n)) for n in range(300)]
    gs.save(tmp_path / "a", objects=objects)
    for found, expected in zip(gs.load(tmp_path / "a", "objects"), objects, strict=True):
        assert np.array_equal(found.weight, expected.weight)
        assert vars(found).keys() == vars(expected).keys()
        assert getattr(found, "norm", None) == getattr(expected, "norm", None)


def test_bytes_alike_are_bytes(tmp_path):
    texts = [bytes([number % 251]) * 100 for number in range(2000)]
    gs.save(tmp_path / "a", texts=texts, padding="a" * 9000)
    assert gs.load(tmp_path / "a", "texts") == texts


def test_structs_alike_do_not_share_their_fields(tmp_path):
    """What is between the tag of a document and what is large in it may be alike, too."""
    names = [f"field{number:06}" for number in range(6000)]
    one = {"tag": "struct", "type": TYPE, "data": [1, ARRAY], "fields": names}
    (tmp_path / "a").write_bytes(bson.encode({"a": one, "b": one}))
    found = gs.load(tmp_path / "a")
    assert found["a"].data[1] is not found["b"].data[1]


TYPE = {"tag": "datatype", "name": ["Main", "X"], "params": []}
ARRAY = {
    "tag": "array",
    "type": {"tag": "datatype", "name": ["Core", "Float32"], "params": []},
    "size": [Int64(3)],
    "data": bytes(12),
}


def test_a_damaged_type_of_row_major_arrays_is_refused_of_many_too(tmp_path):
    path = tmp_path / "a"
    for count in (3, 2000):
        gs.save(path, arrays=[np.full((2, 3), number, "f4") for number in range(count)])
        octets = path.read_bytes()
        head = b"\x02tag\0\x07\0\0\0struct\0\x03type\0"
        first, *rest = octets.split(head)
        rest = [part.replace(b"\x04name\0", b"\x04nane\0", 1) for part in rest]
        path.write_bytes(head.join([first, *rest]))
        with pytest.raises(FormatError, match="`name` of a datatype"):
            gs.load(path)


def test_types_that_refer_to_themselves_in_many_arrays_end_in_an_error(tmp_path):
    kind = {**TYPE, "params": [{"tag": "backref", "ref": Int64(1)}, Int64(3)]}
    array = {**ARRAY, "type": kind}
    octets = bson.encode({"a": [array] * 2000, "_backrefs": [array]})
    (tmp_path / "a").write_bytes(octets)
    with pytest.raises(FormatError):
        gs.load(tmp_path / "a")


@pytest.mark.parametrize("stamped", [True, False])
@pytest.mark.parametrize("place", [2**40, 64])
def test_places_beside_types_are_checked(tmp_path, stamped, place):
    """A type that holds a digest and what looks like a payload is no type that many share."""
    kind = {**TYPE, "data": bytes(200), "blake3": bytes(32)}
    array = {**ARRAY, "data": {"offset": Int64(place), "nbytes": Int64(12)}, "blake3": bytes(32)}
    parts = {f"{number:04}": (kind, array)[number % 2] for number in range(600)}
    document_of = {"a": parts, "padding": "a" * 70_000}
    if stamped:
        document_of["_gpustore"] = {"version": Int64(1), "layout": "detached"}
    (tmp_path / "a").write_bytes(bson.encode(document_of))
    with pytest.raises(FormatError):
        gs.load(tmp_path / "a")


def test_digests_of_arrays_beside_those_in_structs_alike_are_found(tmp_path):
    array = {**ARRAY, "data": bytes(12), "blake3": digest.blake3_digest(bytes(12))}
    struct = {"tag": "struct", "type": TYPE, "data": [array], "more": array}
    octets = bson.encode({"a": [struct] * 40})
    for damaged in (octets, octets[:-60] + b"\1" + octets[-59:]):
        (tmp_path / "a").write_bytes(damaged)
        found = gs.open_file(tmp_path / "a").verify()
        assert found.arrays == 80 and len(found.damaged) == 1 + (damaged != octets)


@pytest.mark.parametrize("count", [0, 3])
def test_arrays_and_structs_around_arrays_of_the_same_type_are_told_apart(tmp_path, count):
    kind = {"tag": "datatype", "name": ["Lib", "Foo"], "params": [Int64(3)]}
    array = {**ARRAY, "type": kind, "size": [Int64(count)], "data": bytes(count)}
    struct = {"tag": "struct", "type": kind, "data": [array]}
    sized = {"tag": "struct", **{key: ARRAY[key] for key in ("type", "size", "data")}}
    for nodes in ([struct] * 20 + [array] * 20, [array] * 20 + [struct] * 20, [sized] * 20):
        (tmp_path / "a").write_bytes(bson.encode({"a": nodes, "padding": "a" * 70_000}))
        found = outcome(tmp_path / "a")
        with pytest.MonkeyPatch.context() as patch:
            plainly(patch)
            assert found == outcome(tmp_path / "a")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fields", "dicts", "elements", "structs", "arrays"])
def test_arrays_within_types_of_objects_alike_are_verified(tmp_path, layout, kind):
    foo = [JuliaType(("Lib", "Foo"), (np.full(4, 7, "f4"),)) for _ in range(20)]
    own = [np.full(3, number, "f4") for number in range(20)]
    value = {
        "fields": [
            Struct(JuliaType.named("Lib.Bar"), [*pair]) for pair in zip(own, foo, strict=True)
        ],
        "dicts": [{"array": array, "type": known} for array, known in zip(own, foo, strict=True)],
        "elements": foo,
        "structs": [Struct(known, [array]) for array, known in zip(own, foo, strict=True)],
        "arrays": [JuliaArray(known, (3,), bytes(48)) for known in foo],
    }[kind]
    gs.save(tmp_path / "a", value=value, layout=layout)
    with gs.open_file(tmp_path / "a") as stored:
        assert stored.verify() and stored.verify().arrays >= 20
        stored.save_for_cpu(tmp_path / "b")
    assert gs.open_file(tmp_path / "b").verify()
    for path in (tmp_path / "a", tmp_path / "b"):
        found = outcome(path)
        with pytest.MonkeyPatch.context() as patch:
            plainly(patch)
            assert found == outcome(path)


def test_nodes_of_an_entry_that_is_refused_are_taken_for_no_others(tmp_path):
    """What is noted by ids of nodes is of nodes that are there, and whose ids nothing else has."""
    array = {**ARRAY, "blake3": bytes(32)}
    struct = {"tag": "struct", "type": TYPE, "data": [array, array]}
    bad = {"objects": [struct] * 2000, "last": {"x": 1}}
    octets = bytearray(bson.encode({"bad": bad, "good": {**bad, "last": 2}}))
    octets[octets.index(b"\x10x\0")] = 0x99
    (tmp_path / "a").write_bytes(octets)
    stored = gs.open_file(tmp_path / "a")
    with pytest.raises(FormatError):
        stored["bad"]
    repeats = stored._parts._scanner.repeats
    kept = [node for part in repeats.kept for node in (part if type(part) is list else [part])]
    assert len(repeats.alike) > 1000 and repeats.alike.keys() <= {*map(id, kept)}
    assert len(stored["good"]["objects"]) == 2000


def test_an_own_class_of_the_package_may_be_registered_before_its_table_is_there():
    code = (
        "import gpustore as gs; from gpustore import flux; gs.model_type('Main.Mine')(gs.Dense); "
        "flux.known_functions(); print(flux.rows_of(gs.Dense)[-1].name)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "Main.Mine"


def test_an_object_that_is_refused_is_named_where_others_are_alike(tmp_path):
    """The first of those that are made at once is not the first of all."""
    good = Struct(JuliaType.named("Flux.Dense"), [np.ones((3, 2)), np.ones(3), gs.relu])
    bad = Struct(JuliaType.named("Flux.Dense"), ["weight", np.ones(3), gs.relu])
    found = {"first": good} | {
        f"a{n}": Struct(bad.type, [*bad.data[:1], np.full(3, n), gs.relu]) for n in range(10, 400)
    }
    gs.save(tmp_path / "a", layers=found)
    with pytest.raises(FormatError, match=r"layers\['a10'\]\.weight: a str is out of place"):
        gs.load(tmp_path / "a")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_layers_alike_stay_where_they_lie(tmp_path, layout):
    layers = [dense(number, (200, 100)) for number in range(30)]
    gs.save(tmp_path / "a", model=gs.Chain(*layers), layout=layout)
    for _ in range(3):
        model = gs.load(tmp_path / "a", "model", verify=True)
        testing.assert_same(model, gs.Chain(*layers))
        assert not model.layers[20].weight.flags.owndata
    with gs.open_file(tmp_path / "a") as stored:
        assert len(stored.arrays) == 60 and stored.verify()
        testing.assert_same(stored["model"], model)
