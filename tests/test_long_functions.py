"""Code that is decoded when it is used: the same as what is decoded while loading."""

from __future__ import annotations

import contextlib
import copy
import gc
import gzip
import weakref
from pathlib import Path

import bson
import numpy as np
import pytest

import gpustore as gs
from gpustore import document, listing, tagged, tree
from gpustore.julia import OpaqueDocument, OpaqueFunction
from gpustore.layout import Deferred

FIXTURES = Path(__file__).parent / "fixtures"
WILD = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "wild"
OURS = [FIXTURES / "code_julia15.bson", FIXTURES / "code_julia15_networks.bson.gz"]
JULIAS = [
    *OURS,
    *(p for p in sorted((FIXTURES / "julia").glob("*.bson")) if b"TypeName" in p.read_bytes()),
]
OTHERS = [p for p in sorted(WILD.glob("*.bson")) if b"TypeName" in p.read_bytes()]


@pytest.fixture
def small(monkeypatch):
    """Have the code of every function deferred, however short it and its file are."""
    monkeypatch.setattr(document, "SLOT_NBYTES", 300)
    monkeypatch.setattr(tagged, "DEFERRED_NBYTES", 32)


@pytest.fixture
def plainly(monkeypatch):
    """Return what loads a file with nothing deferred."""

    def load(path, *names):
        with monkeypatch.context() as within:
            within.setattr(tagged, "_code", lambda *position: None)
            return gs.load(path, *names, lost="placeholder")

    return load


def unpacked(path, folder):
    if path.suffix != ".gz":
        return path
    file = folder / path.stem
    file.write_bytes(gzip.decompress(path.read_bytes()))
    return file


def functions_in(value):
    found = [n for _, n in tree.walk_entries(value) if isinstance(n, OpaqueFunction)]
    return [function for function in found if isinstance(function.type, OpaqueDocument)]


def deferred_in(value):
    """Return what is deferred of the methods of functions, one for each function."""
    methods = []
    for function in functions_in(value):
        kept = function.type
        typename = kept.source.resolve(kept.document["typename"], "")
        methods.append(typename["data"][-1])
    return [part for part in methods if isinstance(part, Deferred)]


def is_decoded(part):
    return "known" in vars(part)


def saved(value, folder, layout="auto"):
    gs.save(folder / "again.bson", value, durable=False, layout=layout)
    return (folder / "again.bson").read_bytes()


def check_same(path, plainly, folder):
    """Check that a file gives the same loaded lazily, opened, and plainly; return its values."""
    plain, lazy = plainly(path), gs.load(path, lost="placeholder")
    texts = [*map(listing.rendered, functions_in(plain))]
    with gs.open_file(path) as opened:
        for value in (gs.load(path, lost="placeholder"), opened.value()):
            assert [*map(repr, functions_in(value))] == [*map(repr, functions_in(plain))]
            assert [*map(listing.rendered, functions_in(value))] == texts
    assert len(deferred_in(plain)) == 0
    assert saved(lazy, folder) == saved(plain, folder)
    return lazy


@pytest.mark.parametrize("path", JULIAS, ids=lambda path: path.name)
def test_deferred_code_is_what_the_file_holds(path, small, plainly, tmp_path):
    value = check_same(unpacked(path, tmp_path), plainly, tmp_path)
    assert len(deferred_in(value)) == len(functions_in(value))


@pytest.mark.skipif(not OTHERS, reason="other people's files are not here")
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_deferred_code_of_other_people_is_what_their_files_hold(path, small, plainly, tmp_path):
    check_same(path, plainly, tmp_path)


@pytest.fixture
def networks(tmp_path):
    return unpacked(OURS[1], tmp_path)


def test_loading_decodes_no_long_function(networks):
    value = gs.load(networks)
    parts = deferred_in(value)
    assert len(parts) > 10
    assert not any(map(is_decoded, parts))
    repr(value), gs.cpu(value), gs.params(value["functions"])
    assert not any(map(is_decoded, parts))
    listing.rendered(functions_in(value)[0])
    assert sum(map(is_decoded, parts)) == 1


def test_an_entry_of_an_open_file_decodes_no_long_function(tmp_path):
    with gs.open_file(OURS[0]) as opened:
        parts = deferred_in(opened["functions"])
        assert parts and not any(map(is_decoded, parts))


def test_deferred_code_runs_when_the_file_is_gone_and_documents_too(networks):
    value = gs.load(networks)
    networks.unlink()
    filler = [{"tag": "tuple", "data": [number]} for number in range(100_000)]  # takes their ids
    for name, (args, expected) in value["cases"].items():
        found = value["functions"][name](*args)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)
    assert filler


def test_a_loaded_function_keeps_no_array_that_is_not_its_own(networks, tmp_path):
    functions = gs.load(networks, "functions")
    saved({"functions": functions, "rest": [np.ones(4), (np.ones(5), (1, 2))]}, tmp_path)
    value = gs.load(tmp_path / "again.bson")
    array, inner = map(weakref.ref, (value["rest"][0], value["rest"][1][0]))
    functions = value.pop("functions")
    del value
    gc.collect()
    assert array() is None and inner() is None
    assert functions


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_long_functions_of_files_of_ours(networks, layout, tmp_path):
    value = gs.load(networks)
    octets = saved(value, tmp_path, layout)
    again = gs.load(tmp_path / "again.bson", verify=True)
    assert len(deferred_in(again)) == (0 if layout == "detached" else len(deferred_in(value)))
    assert gs.open_file(tmp_path / "again.bson").verify()
    texts = [*map(listing.rendered, functions_in(value))]
    assert [*map(listing.rendered, functions_in(again))] == texts
    assert saved(again, tmp_path, layout) == octets


def damaged(path, folder):
    """Return a copy of a file of which a name within the code of a function says another length."""
    octets = bytearray(path.read_bytes())
    at = octets.index(b"#self#\0") - 4
    octets[at] += 1
    file = folder / "damaged.bson"
    file.write_bytes(octets)
    return file


def test_damaged_code_is_said_when_it_is_used(networks, tmp_path):
    value = gs.load(damaged(networks, tmp_path))
    functions = functions_in(value)
    assert [*map(repr, functions)] == [function.name for function in copy.deepcopy(functions)]
    broken = [f for f in functions if listing.rendered(f) == f.name]
    assert broken
    for use in (listing.render, lambda function: function(np.ones(3))):
        with pytest.raises(gs.OpaqueCodeError, match=r"damaged\.bson: byte .*functions=") as found:
            use(broken[0])
        assert isinstance(found.value.__cause__, gs.FormatError)
        assert "form" not in str(found.value)


def test_damaged_code_is_found_by_saving_and_verifying(networks, tmp_path):
    file = damaged(networks, tmp_path)
    gs.save(tmp_path / "old.bson", epoch=3)
    with pytest.raises(gs.FormatError, match=r"damaged\.bson: byte "):
        gs.save(tmp_path / "old.bson", gs.load(file))
    assert gs.load(tmp_path / "old.bson") == {"epoch": 3}
    with pytest.raises(gs.FormatError):
        gs.load(file, verify=True)
    with gs.open_file(file) as opened, pytest.raises(gs.FormatError):
        opened.verify()


def test_a_struct_that_begins_like_code_is_what_it_is(small, plainly, tmp_path):
    kind = {"tag": "datatype", "name": ["Main", "Run"], "params": []}
    many = [{"tag": "tuple", "data": ["a", index]} for index in range(100)]
    run = {"tag": "struct", "type": {"tag": "backref", "ref": 2}, "data": ["name", 1, many]}
    value = {"tag": "backref", "ref": 1}
    path = tmp_path / "run.bson"
    path.write_bytes(bson.encode({"a": value, "b": [value], "_backrefs": [run, kind]}))
    found = check_same(path, plainly, tmp_path)
    assert found["a"] is found["b"][0] and found["a"].data[2][99] == ("a", 99)


TYPE_NAME = {"tag": "datatype", "name": ["Core", "TypeName"], "params": []}
OTHER = {"tag": "datatype", "name": ["Main", "TypeNames"], "params": []}
LONG = [["m"] * 50]
FIELDS = ["1.5.3", {"tag": "symbol", "name": "#1#2"}, LONG]
USUAL = [("tag", "struct"), ("type", TYPE_NAME), ("data", FIELDS)]


def raw(elements, end=b"\0"):
    """Return a document of these elements, also of keys given twice or in arrays."""
    octets = b"".join(bson.encode({key: value})[4:-1] for key, value in elements) + end
    return (len(octets) + 4).to_bytes(4, "little") + octets


def with_fields(*elements):
    """Return the usual struct with fields of these names and values."""
    fields = raw(elements)
    tail = b"\x04data\0" + fields + b"\0"
    head = raw(USUAL[:2])[4:-1]
    return (len(head + tail) + 4).to_bytes(4, "little") + head + tail


CASES = {
    "usual": (raw(USUAL), True),
    "a backref as type": (raw([USUAL[0], ("type", {"tag": "backref", "ref": 1}), USUAL[2]]), True),
    "names of fields that are the same": (with_fields(*(("0", part) for part in FIELDS)), False),
    "names of fields that are none": (
        with_fields(*zip("abc", FIELDS, strict=True)).replace(b"\x02a\0", b"\x02\xb1\0", 1),
        False,
    ),
    "keys in another order": (raw(USUAL[::-1]), False),
    "another type": (raw([USUAL[0], ("type", OTHER), USUAL[2]]), False),
    "a type twice": (raw([*USUAL, ("type", TYPE_NAME)]), False),
    "fields twice": (raw([*USUAL, USUAL[2]]), False),
    "a note": (raw([*USUAL, ("note", "x")]), False),
    "no end": (raw(USUAL, b"\1"), False),
    "two ends": (raw(USUAL, b"\0\0"), False),
    "no version": (raw([*USUAL[:2], ("data", [1, *FIELDS[1:]])]), False),
    "another text first": (raw([*USUAL[:2], ("data", ["name", *FIELDS[1:]])]), False),
    "no symbol second": (raw([*USUAL[:2], ("data", ["1.5.3", {"tag": "tuple"}, LONG])]), False),
    "two fields": (raw([*USUAL[:2], ("data", ["1.5.3", LONG])]), False),
    "short methods": (raw([*USUAL[:2], ("data", [*FIELDS[:2], ["m"]])]), False),
    "a text last": (raw([*USUAL[:2], ("data", [*FIELDS[:2], "m" * 300])]), False),
    "one field": (raw([*USUAL[:2], ("data", ["1.5.3"])]), False),
    "no fields": (raw([*USUAL[:2], ("data", [])]), False),
}


@pytest.mark.parametrize("name", CASES)
def test_what_lies_otherwise_than_julia_writes_it_is_read_the_plain_way(
    name, small, plainly, tmp_path
):
    struct, is_deferred = CASES[name]
    octets = raw([("_backrefs", [TYPE_NAME]), ("padding", ["x" * 300])])[4:-1] + b"\x03a\0" + struct
    path = tmp_path / "code.bson"
    path.write_bytes((len(octets) + 5).to_bytes(4, "little") + octets + b"\0")

    def outcome(load):
        try:
            return saved(load(path), tmp_path)
        except gs.FormatError as error:
            return str(error)

    assert outcome(gs.load) == outcome(plainly)
    found = {}
    with contextlib.suppress(gs.FormatError):
        found = document.scan(path.read_bytes(), slot_nbytes=300, is_lazy=True)
    fields = found.get("a", {}).get("data", [])
    assert any(isinstance(field, Deferred) for field in fields) == is_deferred


def test_code_of_which_much_is_constants_is_left_in_the_file(small, plainly, tmp_path, monkeypatch):
    monkeypatch.setattr(tagged, "MOST_DEFERRED_NBYTES", 100)
    assert not deferred_in(gs.load(OURS[0]))


def function(name, constants):
    """Return an anonymous function whose TypeName is in it, of as many methods as constants."""

    def struct(kind, *fields):
        kind = {"tag": "datatype", "name": ["Core", kind], "params": []}
        return {"tag": "struct", "type": kind, "data": [*fields]}

    symbol = {"tag": "symbol", "name": name}
    body = [*(struct("QuoteNode", constant) for constant in constants)]
    body.append(struct("Expr", {"tag": "symbol", "name": "return"}, [body[-1]]))
    slots = [symbol, {"tag": "symbol", "name": "x"}]
    info = struct("CodeInfo", body, None, slots)
    methods = [symbol, [struct("Method", symbol, 2, False, None, info)]]
    typename = struct("TypeName", "1.5.3", symbol, [], methods)
    kind = {"tag": "jl_anonymous", "typename": typename, "params": []}
    return {"tag": "struct", "type": kind, "data": []}


def test_constants_of_a_function_that_is_gone_are_not_those_of_another(small, tmp_path):
    """The documents of its code go with it, and their ids soon belong to others."""
    wanted = [[{"tag": "tuple", "data": [k, k + i]} for i in range(40)] for k in range(40)]
    functions = [function(f"#{k}", constants) for k, constants in enumerate(wanted)]
    path = tmp_path / "code.bson"
    path.write_bytes(bson.encode({"functions": functions}))
    made = gs.load(path, "functions")[::-1]
    assert len(deferred_in(made)) == 40
    for k in range(40):
        one = made.pop()
        assert one(1.0) == (k, k + 39)
        del one


def test_constants_that_functions_share_stay_shared(small, tmp_path):
    """Also where one is a binary, a set, or a row-major array, which are told apart otherwise."""
    turned, one = np.arange(6.0).reshape(2, 3), {1.5, 2.5}
    gs.save(tmp_path / "kept", turned=[turned, turned], set=one)
    content = bson.decode((tmp_path / "kept").read_bytes())
    del content["_gpustore"], content["set"]["python"]
    content["_backrefs"] += [content["set"]["data"][0], b"123"]
    refs = {
        "turned": content["turned"][0],
        "set": {**content["set"], "data": [{"tag": "backref", "ref": 2}]},  # one for each
        "binary": {"tag": "backref", "ref": 3},
    }
    content |= {key: [ref, dict(ref)] for key, ref in refs.items()}
    for name in ("f", "g"):
        content[name] = {key: function("#1", [[dict(ref)] * 9]) for key, ref in refs.items()}
    (tmp_path / "code").write_bytes(bson.encode(content))
    value = gs.load(tmp_path / "code")
    for key in refs:
        kept, *others = value[key]
        others += [*value["f"][key](1), *value["g"][key](1)]
        assert len(others) == 19 and all(other is kept for other in others), key


def test_code_is_what_it_was_when_the_file_was_loaded(networks):
    """Whoever rewrites the file in place, as BSON.jl does, changes and breaks nothing."""
    value = gs.load(networks)
    with networks.open("r+b") as file:
        file.truncate(100)
    args, expected = value["cases"]["conv_options"]
    found = value["functions"]["conv_options"](*args)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_an_open_file_looks_at_no_backrefs_but_those_of_an_entry(tmp_path):
    kind = {"tag": "datatype", "name": ["Main", "#f"], "params": []}
    called = {"tag": "struct", "type": kind, "data": []}
    others = [{"tag": "tuple", "data": [number]} for number in range(1000)]
    entries = {f"f{number}": called for number in range(10)}
    path = tmp_path / "functions.bson"
    path.write_bytes(bson.encode({**entries, "_backrefs": others}))
    with gs.open_file(path) as opened:
        lifter = opened["f1"].run.lift.__self__
        assert not lifter.memo and not lifter.source.alive


def test_a_copy_of_a_function_has_captured_values_of_its_own():
    closure = gs.load(FIXTURES / "julia" / "functions_v1.bson", "closure")
    copied = copy.deepcopy(closure)
    assert copied is not closure and listing.rendered(copied) == listing.rendered(closure)
    arrays = [
        [part for part in one.captured if isinstance(part, np.ndarray)] for one in (closure, copied)
    ]
    assert arrays[0] and not np.shares_memory(arrays[0][0], arrays[1][0])
    x = np.ones(arrays[0][0].shape[1], "f4")
    before = closure(x)
    assert np.array_equal(copied(x), before)
    arrays[1][0][:] = 0
    assert np.array_equal(closure(x), before) and not np.array_equal(copied(x), before)


def test_what_code_refers_to_is_what_was_loaded(networks):
    value = gs.load(networks)
    function = value["functions"]["conv"]
    backrefs = function.type.source.backrefs
    numbers = [n for n, node in enumerate(backrefs, 1) if node.get("tag") == "array"]
    found = {id(node) for _, node in tree.walk_entries(value)}
    referred = [function.run.lift({"tag": "backref", "ref": number}, "") for number in numbers]
    assert numbers and {*map(id, referred)} & found
    assert [*map(id, referred)] == [
        id(function.run.lift({"tag": "backref", "ref": number}, "")) for number in numbers
    ]
