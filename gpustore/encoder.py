"""A neutral document -> the segments of a file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import rows
from gpustore.digest import DIGEST_NBYTES
from gpustore.errors import UnsupportedValueError
from gpustore.layout import (
    ARRAY_HEAD,
    DATA_ELEMENT,
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    DOUBLE,
    INLINE_LIMIT,
    INT32,
    INT64,
    MAX_DEPTH,
    PAGE_ALIGNED_NBYTES,
    PLACE_ELEMENT,
    STRUCT_HEAD,
    Encoded,
    Payload,
    Place,
    Plan,
    TooLong,
)  # fmt: skip

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROW = 8  # elements from this number on are looked at for rows


class Encoder:
    """Encodes a document into segments; `position` is the offset in the file."""

    def __init__(self, *, may_be_long: bool = False) -> None:
        self.may_be_long = may_be_long  # -1 for a length beyond 2**31 - 1
        self.segment = bytearray()
        self.base = 0  # offset in the file of the current segment's first byte
        self.structures = [self.segment]
        self.payloads: list[Payload] = []
        self.depth = 0  # of documents that are being encoded
        self.likes: dict[tuple[int, int, int], tuple[bytes, bytes, bytes, int]] = {}

    def enter(self, levels: int = 1) -> None:
        """Count levels of documents; refuse more than can be read."""
        self.depth += levels
        if self.depth > MAX_DEPTH + 1:  # the outermost one is none
            raise UnsupportedValueError(
                f"the value is nested too deep to be saved: expected at most {MAX_DEPTH} levels of "
                "documents, those of types counted; flatten it"
            )

    def position(self) -> int:
        return self.base + len(self.segment)

    def document(self, value: dict[str, Any], trailer: dict[str, Any] | None = None) -> None:
        self.enter()
        segment, start, position = self.segment, len(self.segment), self.position()
        segment += b"\0\0\0\0"
        if len(value) >= _ROW:
            self.elements(_cstrings(list(value)), list(value.values()))
        else:
            for key, child in value.items():
                self.element(_cstring(key), child)
        if trailer is not None:
            self.trailer(trailer)
        self.segment.append(0)
        self.length(segment, start, self.position() - position)
        self.depth -= 1

    def array(self, values: list[Any]) -> None:
        self.enter()
        segment, start, position = self.segment, len(self.segment), self.position()
        segment += b"\0\0\0\0"
        if len(values) >= _ROW:
            self.elements([b"%d\0" % index for index in range(len(values))], values)
        else:
            for index, child in enumerate(values):
                self.element(b"%d\0" % index, child)
        self.segment.append(0)
        self.length(segment, start, self.position() - position)
        self.depth -= 1

    def elements(self, keys: list[bytes], nodes: list[Any]) -> None:
        """Encode many elements, small arrays alike with names of one length as rows."""
        done = 0
        for start, stop in rows.shared(nodes):
            lengths = itertools.pairwise(map(len, keys[start:stop]))
            edges = [start, *(i for i, (a, b) in enumerate(lengths, start + 1) if a != b)]
            for first, last in itertools.pairwise([*edges, stop]):
                # the first one is encoded by itself: its padding may differ
                if last - first <= _ROW or not rows.is_small(nodes[first:last]):
                    continue
                for index in range(done, first + 1):
                    self.element(keys[index], nodes[index])
                self.row(keys[first + 1 : last], nodes[first + 1 : last])
                done = last
        for index in range(done, len(nodes)):
            self.element(keys[index], nodes[index])

    def trailer(self, value: dict[str, Any]) -> None:
        self.segment += b"\x03_gpustore\0"
        segment, start = self.segment, len(self.segment)
        segment += b"\0\0\0\0"
        for key, child in value.items():
            self.element(_cstring(key), child)
        segment += DIGEST_ELEMENT + bytes(DIGEST_NBYTES) + b"\0"
        self.length(segment, start, len(segment) - start)

    def length(self, segment: bytearray, start: int, nbytes: int) -> None:
        if nbytes > INLINE_LIMIT:
            if not self.may_be_long:
                raise TooLong(f"expected at most {INLINE_LIMIT} bytes, found {nbytes}")
            nbytes = -1
        INT32.pack_into(segment, start, nbytes)

    def element(self, key: bytes, value: Any) -> None:
        encode = _ENCODERS.get(type(value))
        if encode is None:
            raise UnsupportedValueError(f"a document cannot hold a {type(value).__qualname__}")
        encode(self, key, value)

    def payload(self, key: bytes, value: Payload) -> None:
        """Pad, write the binary's header, cut the segment, and leave room for the digest."""
        alignment = 64 if value.nbytes < PAGE_ALIGNED_NBYTES else 4096
        if value.is_bare:
            alignment = 1
        header = len(key) + 6
        if value.nbytes > INLINE_LIMIT:
            raise TooLong(
                f"expected at most {INLINE_LIMIT} bytes in an array, found {value.nbytes}"
            )
        if (self.position() + header) % alignment:
            padding = -(self.position() + 8 + header) % alignment
            self.segment += b"\x05_\0" + INT32.pack(padding) + b"\0" + bytes(padding)
        self.segment += b"\x05" + key + INT32.pack(value.nbytes) + b"\0"
        self.base = self.position() + value.nbytes
        self.payloads.append(value)
        after = b"" if value.is_bare else DIGEST_ELEMENT + bytes(DIGEST_NBYTES)
        self.segment = bytearray(after)
        self.structures.append(self.segment)

    def small_array(self, key: bytes, node: dict[str, Any], inner: dict[str, Any]) -> None:
        """Encode the document of a small array, or of the struct around it, as `element` would.

        What is the same for arrays of one type and size is joined once.
        """
        outer, head, behind = self.like(node, inner)
        content = inner["data"]
        nbytes, open_nbytes = content.nbytes, len(outer) + 11 if outer else 0
        padding_at = self.position() + 1 + len(key) + open_nbytes + 4 + len(head)
        padding = b""
        if (padding_at + len(DATA_ELEMENT) + 5) % 64:
            padding = _PADDINGS[-(padding_at + 8 + len(DATA_ELEMENT) + 5) % 64]
        inner_nbytes = 4 + len(head) + len(padding) + len(DATA_ELEMENT) + 5 + nbytes
        inner_nbytes += len(DIGEST_ELEMENT) + DIGEST_NBYTES + 1
        self.segment += _opened(key, outer, inner_nbytes) + head + padding
        self.segment += DATA_ELEMENT + INT32.pack(nbytes) + b"\0"
        self.base = self.position() + nbytes
        self.payloads.append(_small(content))
        self.segment = bytearray(behind)
        self.structures.append(self.segment)

    def like(self, node: dict[str, Any], inner: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
        """Return what is the same for arrays of one type and size, before and behind their data.

        That of the struct around them comes first. All are held by the document that is encoded.
        """
        key = id(node["type"]), id(inner["type"]), id(inner["size"])
        found = self.likes.get(key)
        if found is None:
            kind, size = inner["type"], inner["size"]
            head = ARRAY_HEAD + kind.bson + b"\x04size\0" + size.bson
            outer, behind = b"", DIGEST_ELEMENT + bytes(DIGEST_NBYTES) + b"\0"
            levels = 1 + max(kind.depth, size.depth)
            if inner is not node:
                outer = STRUCT_HEAD + node["type"].bson + b"\x04data\0"
                behind += b"\0\0"
                levels = 1 + max(node["type"].depth, 1 + levels)
            found = self.likes[key] = outer, head, behind, levels
        self.enter(found[3])
        self.depth -= found[3]
        return found[:3]

    def row(self, keys: list[bytes], nodes: list[Any]) -> None:
        """Encode a row as one payload, made piece by piece when it is written."""
        contents = [rows.array_in(node)["data"] for node in nodes]
        like = Encoder()
        like.base = self.position()
        like.element(keys[0], nodes[0])
        before, after = like.structures
        start, stop = len(before), len(before) + contents[0].nbytes
        template = before + bytes(contents[0].nbytes) + after

        def pieces() -> Iterator[tuple[Any, Any]]:
            for part in rows.parts(len(keys), len(template)):
                payloads = rows.stacked(contents[part])
                matrix = rows.filled(template, keys[part], payloads, stop + len(DIGEST_ELEMENT))
                matrix[:, start:stop] = payloads
                structure = np.concatenate((matrix[:, :start], matrix[:, stop:]), axis=1)
                yield matrix.reshape(-1), structure.reshape(-1)

        nbytes = len(keys) * len(template)
        self.base = self.position() + nbytes
        self.payloads.append(Payload(nbytes, None, True, make_row=pieces))
        self.segment = bytearray()
        self.structures.append(self.segment)

    def finish(self) -> Plan:
        return Plan(self.structures, self.payloads, self.position())


class DetachedEncoder(Encoder):
    """Encodes a document whose payloads follow it: in it stand their offsets and sizes."""

    def __init__(self) -> None:
        super().__init__()
        # where in the document each offset belongs; of a row with the distance of its payloads
        self.offsets: list[int | tuple[range, int]] = []

    def payload(self, key: bytes, value: Payload) -> None:
        if value.is_bare:
            content = b"".join(bytes(chunk) for chunk in value.chunks())
            _encode_bytes(self, key, content)
            return
        self.payloads.append(value)
        _encode_dict(self, key, {"offset": int64()(0), "nbytes": int64()(value.nbytes)})
        self.offsets.append(len(self.segment) - len(DETACHED_TAIL) - 8)
        self.segment += DIGEST_ELEMENT + bytes(DIGEST_NBYTES)

    def small_array(self, key: bytes, node: dict[str, Any], inner: dict[str, Any]) -> None:
        outer, head, behind = self.like(node, inner)
        content = inner["data"]
        place = PLACE_ELEMENT + bytes(8) + DETACHED_TAIL[:8] + INT64.pack(content.nbytes) + b"\0"
        inner_nbytes = 4 + len(head) + len(place) + len(DIGEST_ELEMENT) + DIGEST_NBYTES + 1
        self.segment += _opened(key, outer, inner_nbytes) + head + place + behind
        self.offsets.append(len(self.segment) - len(behind) - len(DETACHED_TAIL) - 8)
        self.payloads.append(_small(content))

    def row(self, keys: list[bytes], nodes: list[Any]) -> None:
        """Encode a row; its payloads are one, with zeros between them."""
        contents = [rows.array_in(node)["data"] for node in nodes]
        like = DetachedEncoder()
        like.element(keys[0], nodes[0])
        (at,) = like.offsets
        assert isinstance(at, int)
        count, nbytes, start = len(keys), contents[0].nbytes, len(self.segment) + at
        pitch, distance = len(like.segment), _aligned(nbytes, 64)
        for part in rows.parts(count, pitch + nbytes):
            payloads = rows.stacked(contents[part])
            matrix = rows.filled(like.segment, keys[part], payloads, _digest_of(at).start)
            self.segment += matrix.reshape(-1).data

        def pieces() -> Iterator[tuple[Any, Any]]:
            for part in rows.parts(count, distance):
                payloads = rows.stacked(contents[part])
                spaced = np.zeros((len(payloads), distance), np.uint8)
                spaced[:, :nbytes] = payloads
                whole = spaced.reshape(-1)
                if part.stop >= count:
                    whole = whole[: whole.size - distance + nbytes]
                yield whole, bytes(whole.size - payloads.size)

        self.offsets.append((range(start, start + count * pitch, pitch), distance))
        self.payloads.append(Payload((count - 1) * distance + nbytes, None, True, make_row=pieces))

    def finish(self) -> Plan:
        """Place the payloads, in order and aligned, after the document and its padding."""
        position, places = _aligned(len(self.segment), 4096), []
        for at, payload in zip(self.offsets, self.payloads, strict=True):
            if isinstance(at, tuple):
                (within, distance), position = at, _aligned(position, 64)
                count, pitch = len(within), (within.step,)
                column: Any = np.ndarray(count, "<i8", self.segment, within.start, pitch)
                column[:] = position + distance * np.arange(count)
                places.append(Place(position, None))
            else:
                alignment = 64 if payload.nbytes < PAGE_ALIGNED_NBYTES else 4096
                position = _aligned(position, alignment)
                INT64.pack_into(self.segment, at, position)
                places.append(Place(position, _digest_of(at)))
            position += payload.nbytes
        nbytes = position if places else len(self.segment)
        return Plan([self.segment], self.payloads, nbytes, tuple(places))


def _digest_of(at: int) -> slice:
    """Return where in the document the digest belongs whose array has its offset `at` there."""
    start = at + 8 + len(DETACHED_TAIL) + len(DIGEST_ELEMENT)
    return slice(start, start + DIGEST_NBYTES)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


@functools.lru_cache(1024)  # `tag`, `type`, `size`, `data`: a few names make up most of a file
def _cstring(key: str) -> bytes:
    encoded = key.encode()
    if b"\0" in encoded:
        raise UnsupportedValueError(f"a key cannot hold a NUL character: {key!r}")
    return encoded + b"\0"


def _cstrings(keys: list[str]) -> list[bytes]:
    encoded = [key + b"\0" for key in "\0".join(keys).encode().split(b"\0")]
    return encoded if len(encoded) == len(keys) else [_cstring(key) for key in keys]


def _encode_int(encoder: Encoder, key: bytes, value: int) -> None:
    if -(2**31) <= value < 2**31:
        encoder.segment += b"\x10" + key + INT32.pack(value)
    else:
        _encode_int64(encoder, key, value)


def _encode_int64(encoder: Encoder, key: bytes, value: int) -> None:
    encoder.segment += b"\x12" + key + INT64.pack(value)


def _encode_float(encoder: Encoder, key: bytes, value: float) -> None:
    encoder.segment += b"\x01" + key + DOUBLE.pack(value)


def _encode_str(encoder: Encoder, key: bytes, value: str) -> None:
    text = value.encode()
    encoder.segment += b"\x02" + key + INT32.pack(len(text) + 1) + text + b"\0"


def _encode_bytes(encoder: Encoder, key: bytes, value: bytes) -> None:
    encoder.segment += b"\x05" + key + INT32.pack(len(value)) + b"\0" + value


def _encode_bool(encoder: Encoder, key: bytes, value: bool) -> None:
    encoder.segment += b"\x08" + key + (b"\1" if value else b"\0")


def _encode_none(encoder: Encoder, key: bytes, value: None) -> None:
    encoder.segment += b"\x0a" + key


def _encode_dict(encoder: Encoder, key: bytes, value: dict[str, Any]) -> None:
    inner = value if "size" in value else rows.array_in(value)
    if type(inner) is dict and _is_small_array(value, inner):
        encoder.small_array(key, value, inner)
        return
    encoder.segment += b"\x03" + key
    encoder.document(value)


def _is_small_array(node: dict[str, Any], inner: dict[str, Any]) -> bool:
    """Whether this is the document of a small array with nothing unusual about it."""
    return (
        len(inner) == 4
        and type(inner.get("data")) is np.ndarray
        and type(inner.get("type")) is Encoded
        and type(inner.get("size")) is Encoded
        and inner["tag"] == "array"
        and (inner is node or (len(node) == 3 and type(node.get("type")) is Encoded))
    )


def _opened(key: bytes, outer: bytes, nbytes: int) -> bytes:
    """Return what is before the head of an array of `nbytes`, and the struct around it if any."""
    if not outer:
        return b"\x03" + key + INT32.pack(nbytes)
    before = INT32.pack(4 + len(outer) + nbytes + 9), outer, INT32.pack(nbytes + 8)
    return b"".join((b"\x03", key, *before, b"\x030\0", INT32.pack(nbytes)))


_PADDINGS = [b"\x05_\0" + INT32.pack(n) + b"\0" + bytes(n) for n in range(64)]


def _small(content: NDArray[Any]) -> Payload:
    return Payload(content.nbytes, None, content=content)


def _encode_list(encoder: Encoder, key: bytes, value: list[Any]) -> None:
    encoder.segment += b"\x04" + key
    encoder.array(value)


def _encode_encoded(encoder: Encoder, key: bytes, value: Encoded) -> None:
    encoder.enter(value.depth)
    encoder.depth -= value.depth
    encoder.segment += b"%c%b%b" % (value.kind, key, value.bson)


_ENCODERS: dict[type, Callable[[Encoder, bytes, Any], None]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    bytes: _encode_bytes,
    bool: _encode_bool,
    type(None): _encode_none,
    dict: _encode_dict,
    list: _encode_list,
    Payload: lambda encoder, key, value: encoder.payload(key, value),
    np.ndarray: lambda encoder, key, value: encoder.payload(key, _small(value)),
    Encoded: _encode_encoded,
}


@functools.cache
def int64() -> type[int]:
    """Return the class of BSON's int64 (a subclass of int), known to the encoder from then on."""
    from bson.int64 import Int64

    _ENCODERS[Int64] = _encode_int64
    return Int64
