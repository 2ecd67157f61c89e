"""Code that is decoded when it is used: the same as what is decoded while loading."""

from __future__ import annotations

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


@pytest.mark.parametrize("keys", [["tag", "type", "data"], ["data", "type", "tag"]])
@pytest.mark.parametrize("more", [{}, {"note": "x"}, {"type": {"tag": "symbol", "name": "x"}}])
def test_what_lies_otherwise_than_julia_writes_it_is_read_the_plain_way(
    keys, more, small, plainly, tmp_path
):
    kind = {"tag": "datatype", "name": ["Core", "TypeName"], "params": []}
    fields = ["1.5.3", {"tag": "symbol", "name": "#1#2"}, [["m"] * 50]]
    struct = {"tag": "struct", "type": kind, "data": fields} | more
    path = tmp_path / "code.bson"
    path.write_bytes(bson.encode({"a": {key: struct[key] for key in [*keys, *more]}}))

    def outcome(load):
        try:
            return saved(load(path), tmp_path)
        except gs.FormatError as error:
            return str(error)

    assert outcome(gs.load) == outcome(plainly)


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
