"""BSON byte by byte, and the documents of BSON.jl's tags, right or wrong as asked."""

from __future__ import annotations

import struct
from typing import Any

from bson import Int64


def document(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def element(kind: int, name: str, value: bytes) -> bytes:
    return bytes([kind]) + name.encode() + b"\0" + value


def text(name: str, value: str) -> bytes:
    encoded = value.encode() + b"\0"
    return element(2, name, struct.pack("<i", len(encoded)) + encoded)


def binary(name: str, value: bytes, *, nbytes: int | None = None, subtype: int = 0) -> bytes:
    length = len(value) if nbytes is None else nbytes
    return element(5, name, struct.pack("<iB", length, subtype) + value)


def integer(name: str, value: int) -> bytes:
    return element(18, name, struct.pack("<q", value))


def datatype(name: str, *path: str) -> bytes:
    names = document(*(text(str(index), part) for index, part in enumerate(path)))
    parts = text("tag", "datatype"), element(4, "name", names), element(4, "params", document())
    return element(3, name, document(*parts))


def array(name: str, sizes: list[int], data: bytes, *more: bytes) -> bytes:
    size = document(*(integer(str(index), n) for index, n in enumerate(sizes)))
    kind = datatype("type", "Core", "Float32")
    parts = text("tag", "array"), kind, element(4, "size", size), data, *more
    return element(3, name, document(*parts))


def backref(name: str, number: int) -> bytes:
    return element(3, name, document(text("tag", "backref"), integer("ref", number)))


def nested(depth: int, kind: int = 3) -> bytes:
    heads = [struct.pack("<i", 5 + 8 * (depth - i)) + bytes([kind]) + b"0\0" for i in range(depth)]
    return b"".join(heads) + document() + bytes(depth)


PAD = binary("pad", bytes(70_000))  # beside it a document is scanned, not decoded whole


# --- documents that PyMongo's codec encodes ---


def type_of(name: str, *params: Any) -> dict[str, Any]:
    return {"tag": "datatype", "name": name.split("."), "params": list(params)}


def struct_of(name: str, *data: Any, params: tuple[Any, ...] = (), **more: Any) -> dict[str, Any]:
    return {"tag": "struct", "type": type_of(name, *params), "data": list(data), **more}


def array_of(size: Any, data: Any = b"abcd", kind: Any = None, **more: Any) -> dict[str, Any]:
    kind = type_of("Core.Float32") if kind is None else kind
    return {"tag": "array", "type": kind, "size": size, "data": data, **more}


def tuple_of(*data: Any) -> dict[str, Any]:
    return {"tag": "tuple", "data": list(data)}


def symbol(name: str) -> dict[str, Any]:
    return {"tag": "symbol", "name": name}


def ref(number: int) -> dict[str, Any]:
    return {"tag": "backref", "ref": Int64(number)}


def dict_of(keys: Any, values: Any, name: str = "Base.Dict") -> dict[str, Any]:
    return struct_of(name, keys, values, params=(type_of("Core.Any"), type_of("Core.Any")))
