"""A neutral document -> the segments of a file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore.digest import DIGEST_NBYTES
from gpustore.errors import UnsupportedValueError
from gpustore.layout import (
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    DOUBLE,
    INLINE_LIMIT,
    INT32,
    INT64,
    MAX_DEPTH,
    PAGE_ALIGNED_NBYTES,
    Encoded,
    Payload,
    Place,
    Plan,
    TooLong,
)  # fmt: skip
from gpustore.small import Alike, Batch, Filled, Row, SmallArray, Template

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MANY = 8  # elements


class Encoder:
    """Encodes a document into segments; `position` is the offset in the file."""

    def __init__(self, *, may_be_long: bool = False) -> None:
        self.may_be_long = may_be_long  # -1 for a length beyond 2**31 - 1
        self.segment = bytearray()
        self.base = 0  # offset in the file of the current segment's first byte
        self.structures = [self.segment]
        self.payloads: list[Payload] = []
        self.depth = 0  # of documents that are being encoded
        self.batch: Batch | None = None  # of small arrays, which begins at `begun` in the file
        self.begun = 0

    def enter(self, levels: int = 1) -> None:
        """Count levels of documents; refuse more than can be read."""
        self.depth += levels
        if self.depth > MAX_DEPTH + 1:  # the outermost one is none
            raise UnsupportedValueError(
                f"the value is nested too deep to be saved: expected at most {MAX_DEPTH} levels of "
                "documents, those of types counted; flatten it"
            )

    def reach(self, levels: int) -> None:
        """Refuse levels that are not entered one by one, where they are too many."""
        self.enter(levels)
        self.depth -= levels

    def position(self) -> int:
        return self.base + len(self.segment)

    def document(self, value: dict[str, Any], trailer: dict[str, Any] | None = None) -> None:
        self.enter()
        segment, start, position = self.segment, len(self.segment), self.position()
        segment += b"\0\0\0\0"
        if len(value) >= _MANY:
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
        if len(values) >= _MANY:
            self.elements([b"%d\0" % index for index in range(len(values))], values)
        else:
            for index, child in enumerate(values):
                self.element(b"%d\0" % index, child)
        self.segment.append(0)
        self.length(segment, start, self.position() - position)
        self.depth -= 1

    def elements(self, keys: list[bytes], nodes: list[Any]) -> None:
        first = 0
        for kind, members in itertools.groupby(map(type, nodes)):
            last = first + len(list(members))
            if kind is Row:
                self.rows(keys[first:last], nodes[first:last])
            elif kind is SmallArray:
                alikes, contents = zip(*nodes[first:last], strict=True)
                self.small_arrays(keys[first:last], alikes, contents)
            elif kind is Filled:
                self.filled(keys[first:last], nodes[first:last])
            elif kind is Encoded:
                self.encoded(keys[first:last], nodes[first:last])
            else:
                for index in range(first, last):
                    self.element(keys[index], nodes[index])
            first = last

    def encoded(self, keys: list[bytes], nodes: list[Encoded]) -> None:
        self.reach(max(node.depth for node in nodes))
        pairs = zip(keys, nodes, strict=True)
        self.segment += b"".join([b"%c%b%b" % (kind, key, bson) for key, (bson, kind, _) in pairs])

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
        self.close()
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

    def rows(self, keys: list[bytes], nodes: list[Row]) -> None:
        """Encode rows, each of which is in as many nodes as it has arrays."""
        first = 0
        while first < len(keys):
            row = nodes[first]
            last = first + len(row.contents)
            self.small_arrays(keys[first:last], [row.alike] * len(row.contents), row.contents)
            first = last

    def small_arrays(
        self, keys: list[bytes], alikes: Sequence[Alike], contents: Sequence[Any]
    ) -> None:
        """Encode arrays into the batch, to which all belongs until the next large one."""
        befores: list[bytes | bytearray] = []
        position, behind, last = self.position(), b"", None
        for key, alike in zip(keys, alikes, strict=True):
            if last != (last := (alike, len(key), position % 64)):
                self.reach(alike.levels)
                before = alike.inline(key, position)
                nbytes = 1 + len(key) + len(before) + alike.nbytes + alike.behind_nbytes
            befores.append(behind + b"\x03" + key + before)
            position += nbytes
            behind = alike.behind
        self.batched(befores, contents, behind, position)

    def batched(
        self, befores: list[bytes | bytearray], contents: Sequence[Any], behind: bytes, end: int
    ) -> None:
        """Take arrays into the batch, the last of which is followed by `behind` until `end`."""
        segment = self.segment
        segment += befores[0]
        if self.batch is None:
            self.batch, self.begun = Batch(), self.position()
            befores[0] = b""  # it is in `structures`
        else:
            befores[0] = segment  # in which lengths are set later
        self.batch.befores += befores
        self.batch.arrays += contents
        self.base, self.segment = end - len(behind), bytearray(behind)

    def filled(self, keys: list[bytes], values: list[Filled]) -> None:
        """Encode objects of which others are alike, those that hold what their template says."""
        parts = itertools.chain.from_iterable([value.parts for value in values])
        if {*map(type, parts)} == {SmallArray}:
            levels = max(template.levels for template in {template for template, _ in values})
            self.reach(levels)
            self.in_likeness(keys, values)
            return
        for key, value in zip(keys, values, strict=True):
            if {*map(type, value.parts)} == {SmallArray}:
                self.filled([key], [value])
            else:
                _encode_dict(self, key, value.document())

    def in_likeness(self, keys: list[bytes], values: list[Filled]) -> None:
        """Encode objects in the likeness of their templates."""
        befores: list[bytes | bytearray] = []
        position, behind = self.position(), b""
        for key, (template, _) in zip(keys, values, strict=True):
            form = len(key), position % 64
            known = template.inline.get(form)
            if known is None:
                known = template.inline[form] = _inline(template, key, position % 64)
            own, after, nbytes = known
            befores.append(b"%b\x03%b%b" % (behind, key, own[0]))
            befores += own[1:]
            position += nbytes
            behind = after
        contents = [content for _, parts in values for _, content in parts]
        self.batched(befores, contents, behind, position)

    def close(self) -> None:
        """Let the batch end before the segment."""
        if self.batch is not None:
            nbytes = self.base - self.begun
            self.payloads.append(Payload(nbytes, None, True, make_row=self.batch.inline))
            self.structures.append(self.segment)
            self.batch = None

    def finish(self) -> Plan:
        self.close()
        return Plan(self.structures, self.payloads, self.position())


class DetachedEncoder(Encoder):
    """Encodes a document whose payloads follow it: in it stand their offsets and sizes."""

    def __init__(self) -> None:
        super().__init__()
        # where in the document each offset belongs; those of a batch are known to it
        self.offsets: list[int | Batch] = []

    def payload(self, key: bytes, value: Payload) -> None:
        if value.is_bare:
            content = b"".join(bytes(chunk) for chunk in value.chunks())
            _encode_bytes(self, key, content)
            return
        self.close()
        self.payloads.append(value)
        _encode_dict(self, key, {"offset": int64()(0), "nbytes": int64()(value.nbytes)})
        self.offsets.append(len(self.segment) - len(DETACHED_TAIL) - 8)
        self.segment += DIGEST_ELEMENT + bytes(DIGEST_NBYTES)

    def small_arrays(
        self, keys: list[bytes], alikes: Sequence[Alike], contents: Sequence[Any]
    ) -> None:
        self.reach(max(alike.levels for alike in {*alikes}))
        self.batch = self.batch or Batch()
        self.batch.add_detached(self.segment, keys, alikes, contents)

    def in_likeness(self, keys: list[bytes], values: list[Filled]) -> None:
        for template in {template for template, _ in values}:
            if not template.detached[0]:
                template.detached = _detached(template)
        self.batch = self.batch or Batch()
        self.batch.add_filled(self.segment, keys, values)

    def close(self) -> None:
        if self.batch is not None:
            self.offsets.append(self.batch)
            nbytes = self.batch.place()
            self.payloads.append(Payload(nbytes, None, True, make_row=self.batch.detached))
            self.batch = None

    def finish(self) -> Plan:
        """Place the payloads, in order and aligned, after the document and its padding."""
        self.close()
        position, places = _aligned(len(self.segment), 4096), []
        for at, payload in zip(self.offsets, self.payloads, strict=True):
            if isinstance(at, Batch):
                position = _aligned(position, 64)
                at.locate(self.segment, position)
                places.append(Place(position, None))
            else:
                alignment = 64 if payload.nbytes < PAGE_ALIGNED_NBYTES else 4096
                position = _aligned(position, alignment)
                INT64.pack_into(self.segment, at, position)
                places.append(Place(position, _digest_of(at)))
            position += payload.nbytes
        nbytes = position if places else len(self.segment)
        return Plan([self.segment], self.payloads, nbytes, tuple(places))


def _inline(template: Template, key: bytes, position: int) -> tuple[list[bytes], bytes, int]:
    """Encode a template plainly, to have what `Template.inline` says."""
    encoder = Encoder()
    encoder.base = position
    _encode_dict(encoder, key, template.node)
    assert encoder.batch is not None
    first = encoder.structures[0][1 + len(key) :]
    befores = [bytes(octets) for octets in (first, *encoder.batch.befores[1:])]
    return befores, bytes(encoder.segment), encoder.position() - position


def _detached(template: Template) -> tuple[bytes, list[int]]:
    """Encode a template plainly, to have what `Template.detached` says."""
    encoder = DetachedEncoder()
    encoder.document(template.node)
    assert encoder.batch is not None
    return bytes(encoder.segment), [*encoder.batch.at]


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
    encoder.segment += b"\x03" + key
    encoder.document(value)


def _small(content: NDArray[Any]) -> Payload:
    return Payload(content.nbytes, None, content=content)


def _encode_list(encoder: Encoder, key: bytes, value: list[Any]) -> None:
    encoder.segment += b"\x04" + key
    encoder.array(value)


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
    SmallArray: lambda encoder, key, value: encoder.small_arrays([key], value[:1], value[1:]),
    Filled: lambda encoder, key, value: encoder.filled([key], [value]),
    np.ndarray: lambda encoder, key, value: encoder.payload(key, _small(value)),
    Encoded: lambda encoder, key, value: encoder.encoded([key], [value]),
}


@functools.cache
def int64() -> type[int]:
    """Return the class of BSON's int64 (a subclass of int), known to the encoder from then on."""
    from bson.int64 import Int64

    _ENCODERS[Int64] = _encode_int64
    return Int64
