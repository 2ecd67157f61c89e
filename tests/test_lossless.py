"""Load, then save: the document written is the one that was read."""

from __future__ import annotations

import struct
from pathlib import Path

import bson
import numpy as np
import pytest
from bson.int64 import Int64
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs

FOLDER = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "wild"
OURS = {"_", "blake3"}  # what a save adds to a tagged document


def differences(a, b):
    """Compare two documents as graphs: whatever way backrefs are numbered."""
    refs = a.get("_backrefs", []), b.get("_backrefs", [])
    seen, found, stack = set(), [], [("", a, b)]
    while stack and len(found) < 5:
        path, *pair = stack.pop()
        x, y = (followed(node, known) for node, known in zip(pair, refs, strict=True))
        if isinstance(x, (dict, list)):
            if (id(x), id(y)) in seen:
                continue
            seen.add((id(x), id(y)))
        if type(x) is not type(y):
            found.append((path, x, y))
        elif isinstance(x, dict):
            keys = [[k for k in n if k not in ("_backrefs", "_gpustore")] for n in (x, y)]
            if "tag" in x:
                keys = [sorted(keys[0]), sorted(set(keys[1]) - OURS)]
            if keys[0] != keys[1]:
                found.append((path, *keys))
            else:
                stack.extend((f"{path}/{key}", x[key], y[key]) for key in keys[0])
        elif isinstance(x, list):
            if len(x) != len(y):
                found.append((path, len(x), len(y)))
            stack.extend((f"{path}/{i}", p, q) for i, (p, q) in enumerate(zip(x, y, strict=False)))
        elif isinstance(x, float):
            if struct.pack("<d", x) != struct.pack("<d", y):
                found.append((path, x, y))
        elif x != y:
            found.append((path, x, y))
    return found


def followed(node, backrefs):
    while isinstance(node, dict) and node.get("tag") == "backref" and "ref" in node:
        node = backrefs[node["ref"] - 1]
    return node


def saved(path, *values, **named):
    gs.save(path, *values, **named, durable=False)
    return bson.decode(path.read_bytes())


def whole_files():
    files = [*sorted(FOLDER.glob("*.bson")), *sorted(WILD.glob("*.bson"))]
    for file in files:
        octets = file.read_bytes()
        is_one = len(octets) > 4 and int.from_bytes(octets[:4], "little") == len(octets)
        if is_one and (b"\2tag\0" in octets or file.parent == FOLDER):
            yield pytest.param(file, id=file.stem)


@pytest.mark.parametrize("file", list(whole_files()))
def test_a_file_saved_again_is_the_document_that_was_read(file, tmp_path):
    loaded = gs.load(file, lost="placeholder")
    document = bson.decode(file.read_bytes())
    assert differences(document, saved(tmp_path / "again.bson", loaded)) == []
    if type(loaded) is dict or "tag" in document:
        return
    for name in loaded:  # one entry at a time
        value = gs.load(file, name, lost="placeholder")
        again = saved(tmp_path / "one.bson", {name: value})
        one = {key: document[key] for key in (name, "_backrefs") if key in document}
        if differences(one, again):  # arrays and numbers alone do not tell the file's spelling
            assert differences(plainly(one), plainly(again)) == []


def plainly(node):
    """Return a document with `Main.Core` and `Main.Base` spelled without `Main`."""
    if isinstance(node, list):
        return [plainly(child) for child in node]
    if not isinstance(node, dict):
        return node
    made = {key: plainly(child) for key, child in node.items()}
    names = made.get("name")
    if made.get("tag") == "datatype" and names[0] == "Main" and names[1] in ("Core", "Base"):
        made["name"] = names[1:]
    return made


# --- documents as BSON.jl could write them ---


def datatype(name, *params):
    if params and all(type(param) is Int64 for param in params):
        raw = np.array(params, "<i8").tobytes()
        size = [Int64(len(params))]
        packed = {"tag": "array", "type": datatype("Core.Int64"), "size": size, "data": raw}
        return {"tag": "datatype", "name": name.split("."), "params": packed}
    return {"tag": "datatype", "name": name.split("."), "params": list(params)}


def julia_struct(julia_type, *fields):
    return {"tag": "struct", "type": julia_type, "data": list(fields)}


def vector(element_type, raw, count):
    return {"tag": "array", "type": element_type, "size": [Int64(count)], "data": raw}


def primitive(name, nbytes):
    kind = {"tag": "struct", "type": datatype(name)}
    return st.binary(min_size=nbytes, max_size=nbytes).map(lambda raw: kind | {"data": raw})


def dictionary(pairs, name):
    keys = [key for key, _ in pairs]
    if name == "Core.Int64":
        keys = vector(datatype(name), np.array(keys, "<i8").tobytes(), len(keys))
    kind = datatype("Base.Dict", datatype(name), datatype("Core.Any"))
    return julia_struct(kind, keys, [value for _, value in pairs])


def julia_set(members):
    any_type, nothing = datatype("Core.Any"), datatype("Core.Nothing")
    values = vector(nothing, b"", len(members))
    inner = julia_struct(datatype("Base.Dict", any_type, nothing), members, values)
    return julia_struct(datatype("Base.Set", any_type), inner)


def span(start, step, stop):
    kind = datatype("Base.StepRange", datatype("Core.Int64"), datatype("Core.Int64"))
    return julia_struct(kind, Int64(start), Int64(step), Int64(stop))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
INT64 = st.integers(-(2**63), 2**63 - 1).map(Int64)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.floats(), TEXT, INT64, st.integers(-(2**31), 2**31 - 1),
    st.binary(max_size=9),
    TEXT.map(lambda name: {"tag": "symbol", "name": name}),
    st.sampled_from(["UInt8", "Int8"]).flatmap(lambda name: primitive(f"Core.{name}", 1)),
    st.sampled_from(["Char", "Float32", "UInt32"]).flatmap(lambda n: primitive(f"Core.{n}", 4)),
    st.sampled_from(["Int128", "UInt128"]).flatmap(lambda name: primitive(f"Core.{name}", 16)),
    st.builds(span, *[st.integers(-9, 9)] * 3),
    st.just(julia_struct(datatype("Base.Missing"))),
    st.just(julia_struct(datatype("NNlib.#relu"))),
    st.just(julia_struct(datatype("Main.#mine"))),
    st.just({"tag": "ref", "path": ["Main", "Base"]}),
    st.just({"tag": "jl_bottom_type"}),
    st.builds(lambda n: datatype("Base.Val", n), INT64),
    st.lists(INT64, max_size=3).map(
        lambda v: vector(datatype("Core.Int64"), np.array(v, "<i8").tobytes(), len(v))
    ),
)  # fmt: skip


def branches(inner):
    several = st.lists(inner, max_size=3)
    unique = st.lists(st.tuples(TEXT, inner), max_size=3, unique_by=lambda pair: pair[0])
    numbered = st.lists(st.tuples(INT64, inner), max_size=3, unique_by=lambda pair: pair[0])
    keys = TEXT.filter(lambda key: not key.startswith(("$", "_")) and key != "tag")
    return st.one_of(
        several,
        several.map(lambda v: {"tag": "tuple", "data": v}),
        several.map(lambda v: {"tag": "svec", "data": v}),
        several.map(lambda v: julia_struct(datatype("Main.Thing", datatype("Core.Any")), *v)),
        st.dictionaries(keys, inner, max_size=3),
        unique.map(lambda pairs: dictionary(pairs, "Core.String")),
        unique.map(lambda pairs: dictionary(pairs, "Core.Any")),
        numbered.map(lambda pairs: dictionary(pairs, "Core.Int64")),
        st.lists(TEXT, unique=True, max_size=4).map(julia_set),
        st.lists(inner, min_size=2, max_size=2).map(
            lambda v: {"tag": "array", "type": datatype("Core.Any"),
                       "size": [Int64(2), Int64(1)], "data": v}
        ),
    )  # fmt: skip


REF = st.integers(1, 3).map(lambda n: {"tag": "backref", "ref": Int64(n)})
MUTABLE = st.one_of(  # what BSON.jl shares: lists, dictionaries, structs
    st.lists(st.one_of(LEAVES, REF), max_size=3),
    st.lists(st.one_of(LEAVES, REF), max_size=3).map(
        lambda v: julia_struct(datatype("Main.Node"), *v)
    ),
    st.dictionaries(st.sampled_from("abc"), st.one_of(LEAVES, REF), max_size=3),
)
VALUES = st.recursive(st.one_of(LEAVES, REF), branches, max_leaves=10)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(
    st.dictionaries(st.sampled_from("abcdef"), VALUES, min_size=1, max_size=4),
    st.lists(MUTABLE, min_size=3, max_size=3),
)
def test_any_document_of_julias_is_written_as_it_was_read(tmp_path_factory, entries, backrefs):
    document = entries | {"_backrefs": backrefs}
    folder = tmp_path_factory.mktemp("lossless")
    (folder / "in.bson").write_bytes(bson.encode(document))
    loaded = gs.load(folder / "in.bson")
    again = saved(folder / "out.bson", loaded)
    assert differences(bson.decode((folder / "in.bson").read_bytes()), again) == []


def test_a_layer_keeps_the_permuted_weight_of_its_file(tmp_path):
    matrix = datatype("Core.Array", datatype("Core.Float32"), Int64(2))
    vector_type = datatype("Core.Array", datatype("Core.Float32"), Int64(1))
    order = {"tag": "tuple", "data": [Int64(2), Int64(1)]}
    permuted = {
        "tag": "datatype", "name": ["Base", "PermutedDimsArrays", "PermutedDimsArray"],
        "params": [datatype("Core.Float32"), Int64(2), order, order, matrix],
    }  # fmt: skip
    numbers = np.arange(6, dtype="f4")
    parent = vector(datatype("Core.Float32"), numbers.tobytes(), 3)
    parent["size"].append(Int64(2))
    bias = vector(datatype("Core.Float32"), bytes(8), 2)
    identity = datatype("Base.#identity")
    dense = datatype("Flux.Dense", identity, permuted, vector_type)
    weight = julia_struct(permuted, parent)
    document = {"a": julia_struct(dense, weight, bias, julia_struct(identity)), "_backrefs": []}
    (tmp_path / "in.bson").write_bytes(bson.encode(document))
    loaded = gs.load(tmp_path / "in.bson")
    assert np.array_equal(loaded["a"](np.eye(3, dtype="f4")), numbers.reshape(2, 3))
    assert differences(document, saved(tmp_path / "out.bson", loaded)) == []


def test_sets_around_one_dictionary_are_one_set_and_short_binaries_are_not(tmp_path):
    numbers = julia_set(["a"])
    inner = numbers["data"][0]
    ref = [{"tag": "backref", "ref": Int64(n)} for n in (1, 2, 3)]
    document = {
        "one": numbers | {"data": [ref[0]]}, "two": numbers | {"data": [ref[0]]},
        "x": ref[1], "y": ref[1], "z": ref[2], "_backrefs": [inner, b"\1", b"\1"],
    }  # fmt: skip
    (tmp_path / "in.bson").write_bytes(bson.encode(document))
    loaded = gs.load(tmp_path / "in.bson")
    assert loaded["one"] is loaded["two"]
    assert loaded["x"] is loaded["y"] is not loaded["z"]
    assert differences(document, saved(tmp_path / "out.bson", loaded)) == []


def test_the_comparison_sees_what_differs():
    whole = {"a": [1.0, {"tag": "backref", "ref": 1}], "_backrefs": [{"x": Int64(1)}]}
    same = {"a": [1.0, {"x": Int64(1)}], "_gpustore": {}}
    assert differences(whole, same) == []
    for other in ([-1.0, {"x": Int64(1)}], [1.0, {"x": 1}], [1.0, {"y": Int64(1)}], [1.0]):
        assert differences(whole, {"a": other})
