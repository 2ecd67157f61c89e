"""Documents that no writer makes: each raises a typed error with the path inside the file."""

from __future__ import annotations

import bson
import numpy as np
import pytest
from bson import Int64 as I

import gpustore as gs


def datatype(name: str, *params) -> dict:
    return {"tag": "datatype", "name": name.split("."), "params": list(params)}


FLOAT32 = datatype("Core.Float32")


def array(size, data=b"abcd", **more) -> dict:
    return {"tag": "array", "type": FLOAT32, "size": size, "data": data, **more}


def struct(name: str, *data) -> dict:
    return {"tag": "struct", "type": datatype(name), "data": list(data)}


BACKREFS = [
    {"tag": "backref", "ref": I(1)},
    {"tag": "tuple", "data": [{"tag": "backref", "ref": 2}]},
]
MALFORMED = {
    "a zero-size array too large to address": array([I(0), I(2**61)], b""),
    "a product of sizes that overflows": array([I(2**40), I(2**40)]),
    "a negative size": array([I(-1)], b""),
    "a boolean size": array([True]),
    "a size that is a float": array([1.0]),
    "33 dimensions": array([I(1)] * 33),
    "data shorter than the shape": array([I(3)]),
    "data longer than the shape": array([I(0)]),
    "no data": {"tag": "array", "type": FLOAT32, "size": []},
    "a device of no kind": array([I(1)], device="tpu"),
    "a huge ordinal": array([I(1)], device="cuda:99999999999"),
    "a device that is a number": array([I(1)], device=5),
    "a digest of the wrong length": array([I(1)], blake3=b"12"),
    "a dtype of another size": array([I(1)], dtype="datetime64[ns]"),
    "a dtype that is no dtype": array([I(1)], dtype="finfo"),
    "a backref to itself": {"tag": "backref", "ref": I(1)},
    "a backref to 0": {"tag": "backref", "ref": I(0)},
    "a backref out of range": {"tag": "backref", "ref": I(3)},
    "a tuple that contains itself": {"tag": "backref", "ref": I(2)},
    "a struct without a type": {"tag": "struct", "data": []},
    "a struct of a number": {"tag": "struct", "type": I(1), "data": []},
    "a symbol without a name": {"tag": "symbol"},
    "a tuple of a number": {"tag": "tuple", "data": I(1)},
    "a type whose name is no list": {"tag": "datatype", "name": "Core", "params": []},
    "a date that is none": struct("Dates.DateTime", I(1)) | {"python": "never"},
    "a chain of a number": struct("Flux.Chain", I(1)),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_documents_raise_format_error(tmp_path, what):
    path = tmp_path / "bad.bson"
    path.write_bytes(bson.encode({"entry": MALFORMED[what], "_backrefs": BACKREFS}))
    with pytest.raises(gs.FormatError, match=r"bad\.bson: (entry|the values)"):
        gs.load(path, device="cpu")


def test_types_that_share_their_parameters_take_no_exponential_time(tmp_path):
    types: list[dict] = [datatype("A")]
    for number in range(1, 60):
        types.append(datatype("A", *[{"tag": "backref", "ref": I(number)}] * 2))
    path = tmp_path / "bomb.bson"
    value = {"tag": "array", "type": {"tag": "backref", "ref": I(60)}, "size": [], "data": b""}
    path.write_bytes(bson.encode({"a": value, "_backrefs": types}))
    assert type(gs.load(path, "a")).__name__ == "JuliaArray"


def test_keys_that_mongodb_gives_a_meaning_are_keys(tmp_path):
    path = tmp_path / "ref.bson"
    path.write_bytes(bson.encode({"a": {"$ref": "b", "$id": I(1)}}))
    assert gs.load(path, "a") == {"$ref": "b", "$id": 1}
    gs.save(path, a={"$ref": "b", "$id": 1})
    assert gs.load(path, "a") == {"$ref": "b", "$id": 1}


@pytest.mark.parametrize("name", [{"Core": 1, "Float32": 2}, ["Core\0Float32"], "Core"])
def test_a_type_of_another_name_is_not_taken_for_a_known_one(tmp_path, name):
    kind = {"tag": "datatype", "name": name, "params": []}
    array = {"tag": "array", "type": kind, "size": [I(1)], "data": bytes(4)}
    (tmp_path / "f").write_bytes(bson.encode({"a": array}))
    if isinstance(name, list):
        assert not isinstance(gs.load(tmp_path / "f", "a"), np.ndarray)
    else:
        with pytest.raises(gs.FormatError, match="is not a list of strings"):
            gs.load(tmp_path / "f", "a")
