"""Bytes <-> neutral document: the layout of a file, with no Julia, no dtypes and no GPU.

A neutral document is what PyMongo's codec gives: dict, list, str, bytes, float, bool, None, `int`
(BSON int32) and `bson.int64.Int64` (BSON int64). Two kinds of leaf are added. `scan` puts a `Slot`
in the place of each large binary, so that nothing large is read; `plan` takes a `Payload` in the
place of bytes that are to be streamed into the file. docs/format.md has the layout.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpustore.digest import DIGEST_NBYTES
from gpustore.errors import FormatError, TruncatedFileError, UnsupportedValueError

FORMAT_VERSION = 1
SLOT_NBYTES = 64 * 1024  # binaries from this size on are left where they lie
MAX_NAME_NBYTES = 64 * 1024
MAX_DEPTH = 200
INLINE_LIMIT = 2**31 - 1  # BSON lengths are signed 32-bit numbers
PAGE_ALIGNED_NBYTES = 1024 * 1024  # payloads from this size on begin on a page

_INT32 = struct.Struct("<i")
_INT64 = struct.Struct("<q")
_DOUBLE = struct.Struct("<d")
_FOREIGN_KINDS = {
    0x06: "undefined", 0x07: "ObjectId", 0x09: "UTC datetime", 0x0B: "regular expression",
    0x0C: "DBPointer", 0x0D: "JavaScript code", 0x0E: "symbol", 0x0F: "JavaScript code",
    0x11: "timestamp", 0x13: "decimal128", 0x7F: "max key", 0xFF: "min key",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a binary lies in a file: `offset` from the start of the file, both in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes to be streamed into a file: `chunks()` yields C-contiguous buffers, `nbytes` in all.

    A bare one is neither aligned nor given a digest: it counts as part of the structure.
    """

    nbytes: int
    chunks: Callable[[], Iterable[Any]]
    is_bare: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A subtree that is already encoded as a BSON document."""

    bson: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What lies where in a file: structures[0], payloads[0], structures[1], ..., structures[-1].

    The digest of payloads[i] belongs at `PAYLOAD_DIGEST` of structures[i + 1], that of all
    structures (without itself) at `STRUCTURE_DIGEST` of the last one.
    """

    structures: list[bytearray]
    payloads: list[Payload]
    nbytes: int


_DIGEST_ELEMENT = b"\x05blake3\0" + _INT32.pack(DIGEST_NBYTES) + b"\0"
PAYLOAD_DIGEST = slice(len(_DIGEST_ELEMENT), len(_DIGEST_ELEMENT) + DIGEST_NBYTES)
STRUCTURE_DIGEST = slice(-2 - DIGEST_NBYTES, -2)  # two terminators follow it


# --- writing ----------------------------------------------------------------------------------


def plan(document: dict[str, Any], *, writer: str) -> Plan:
    """Lay out the segments of a file that holds `document`, `_gpustore` last.

    A `Payload` is aligned to 64 bytes (4096 from 1 MiB on) by a binary `_` of zeros before it and
    followed by a place for its digest. Raises UnsupportedValueError where the file would pass
    2**31 - 1 bytes, the limit of BSON's lengths.

    >>> laid_out = plan({"epoch": 3}, writer="example")
    >>> laid_out.nbytes == len(laid_out.structures[0])
    True
    """
    from bson.int64 import Int64

    trailer = {"version": Int64(FORMAT_VERSION), "writer": writer, "layout": "inline"}
    encoder = _Encoder()
    encoder.document(document, trailer=trailer)
    return encoder.finish()


class _Encoder:
    """Encodes a document into segments; `position` is the offset in the file."""

    def __init__(self) -> None:
        self.segment = bytearray()
        self.base = 0  # offset in the file of the current segment's first byte
        self.structures = [self.segment]
        self.payloads: list[Payload] = []

    def position(self) -> int:
        return self.base + len(self.segment)

    def document(self, value: dict[str, Any], trailer: dict[str, Any] | None = None) -> None:
        segment, start, position = self.segment, len(self.segment), self.position()
        segment += b"\0\0\0\0"
        for key, child in value.items():
            self.element(_cstring(key), child)
        if trailer is not None:
            self.trailer(trailer)
        self.segment.append(0)
        self.length(segment, start, self.position() - position)

    def array(self, values: Iterable[Any]) -> None:
        segment, start, position = self.segment, len(self.segment), self.position()
        segment += b"\0\0\0\0"
        for index, child in enumerate(values):
            self.element(b"%d\0" % index, child)
        self.segment.append(0)
        self.length(segment, start, self.position() - position)

    def trailer(self, value: dict[str, Any]) -> None:
        self.segment += b"\x03_gpustore\0"
        segment, start = self.segment, len(self.segment)
        segment += b"\0\0\0\0"
        for key, child in value.items():
            self.element(_cstring(key), child)
        segment += _DIGEST_ELEMENT + bytes(DIGEST_NBYTES) + b"\0"
        self.length(segment, start, len(segment) - start)

    @staticmethod
    def length(segment: bytearray, start: int, nbytes: int) -> None:
        if nbytes > INLINE_LIMIT:
            raise UnsupportedValueError(
                f"expected at most {INLINE_LIMIT} bytes in a file of the inline layout, found "
                f"{nbytes}; save the entries to several files"
            )
        _INT32.pack_into(segment, start, nbytes)

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
            self.length(self.segment, 0, value.nbytes)
        if (self.position() + header) % alignment:
            padding = -(self.position() + 8 + header) % alignment
            self.segment += b"\x05_\0" + _INT32.pack(padding) + b"\0" + bytes(padding)
        self.segment += b"\x05" + key + _INT32.pack(value.nbytes) + b"\0"
        self.base = self.position() + value.nbytes
        self.payloads.append(value)
        after = b"" if value.is_bare else _DIGEST_ELEMENT + bytes(DIGEST_NBYTES)
        self.segment = bytearray(after)
        self.structures.append(self.segment)

    def finish(self) -> Plan:
        return Plan(self.structures, self.payloads, self.position())


def _cstring(key: str) -> bytes:
    encoded = key.encode()
    if b"\0" in encoded:
        raise UnsupportedValueError(f"a key cannot hold a NUL character: {key!r}")
    return encoded + b"\0"


def _encode_int(encoder: _Encoder, key: bytes, value: int) -> None:
    if -(2**31) <= value < 2**31:
        encoder.segment += b"\x10" + key + _INT32.pack(value)
    else:
        _encode_int64(encoder, key, value)


def _encode_int64(encoder: _Encoder, key: bytes, value: int) -> None:
    encoder.segment += b"\x12" + key + _INT64.pack(value)


def _encode_float(encoder: _Encoder, key: bytes, value: float) -> None:
    encoder.segment += b"\x01" + key + _DOUBLE.pack(value)


def _encode_str(encoder: _Encoder, key: bytes, value: str) -> None:
    text = value.encode()
    encoder.segment += b"\x02" + key + _INT32.pack(len(text) + 1) + text + b"\0"


def _encode_bytes(encoder: _Encoder, key: bytes, value: bytes) -> None:
    encoder.segment += b"\x05" + key + _INT32.pack(len(value)) + b"\0" + value


def _encode_bool(encoder: _Encoder, key: bytes, value: bool) -> None:
    encoder.segment += b"\x08" + key + (b"\1" if value else b"\0")


def _encode_none(encoder: _Encoder, key: bytes, value: None) -> None:
    encoder.segment += b"\x0a" + key


def _encode_dict(encoder: _Encoder, key: bytes, value: dict[str, Any]) -> None:
    encoder.segment += b"\x03" + key
    encoder.document(value)


def _encode_list(encoder: _Encoder, key: bytes, value: list[Any]) -> None:
    encoder.segment += b"\x04" + key
    encoder.array(value)


def _encode_encoded(encoder: _Encoder, key: bytes, value: Encoded) -> None:
    encoder.segment += b"\x03" + key + value.bson


_ENCODERS: dict[type, Callable[[_Encoder, bytes, Any], None]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    bytes: _encode_bytes,
    bool: _encode_bool,
    type(None): _encode_none,
    dict: _encode_dict,
    list: _encode_list,
    Payload: _Encoder.payload,
    Encoded: _encode_encoded,
}


def encode(document: dict[str, Any]) -> Encoded:
    """Return a document without payloads, encoded by PyMongo's codec."""
    import bson

    return Encoded(bson.encode(document))


@functools.cache
def int64() -> type[int]:
    """Return the class of BSON's int64 (a subclass of int), known to the encoder from then on."""
    from bson.int64 import Int64

    _ENCODERS[Int64] = _encode_int64
    return Int64


# --- reading ----------------------------------------------------------------------------------


def scan(buffer: Any, *, name: str = "buffer", slot_nbytes: int = SLOT_NBYTES) -> dict[str, Any]:
    """Return the document at the start of `buffer` (bytes, bytearray or mmap), checked.

    Each binary of `slot_nbytes` or more is a `Slot`; documents smaller than that are decoded whole
    by PyMongo's codec. What follows the document is not looked at. A length of -1 means that the
    document ends at its terminator (docs/format.md). Raises TruncatedFileError or FormatError.

    >>> scan(bytes.fromhex("0c0000001061000100000000"))
    {'a': 1}
    """
    scanner = _Scanner(buffer, name, slot_nbytes)
    document, _ = scanner.document(0, len(buffer), 0)
    assert isinstance(document, dict)
    return document


class _Scanner:
    def __init__(self, buffer: Any, name: str, slot_nbytes: int) -> None:
        self.buffer, self.name, self.slot_nbytes = buffer, name, slot_nbytes
        int64()

    def truncated(self, start: int, nbytes: int, found: int) -> TruncatedFileError:
        return TruncatedFileError(
            f"{self.name}: byte {start}: expected {nbytes} bytes, found {found}; the file is cut "
            "off or damaged: copy or download it again"
        )

    def malformed(self, position: int, what: str) -> FormatError:
        return FormatError(f"{self.name}: byte {position}: {what}; the file is damaged or not BSON")

    def need(self, position: int, nbytes: int, limit: int) -> None:
        if limit - position >= nbytes:
            return
        if limit == len(self.buffer):
            raise self.truncated(position, nbytes, max(limit - position, 0))
        raise self.malformed(position, f"{nbytes} bytes do not fit into the enclosing document")

    def int32(self, position: int, limit: int) -> int:
        self.need(position, 4, limit)
        value: int = _INT32.unpack_from(self.buffer, position)[0]
        return value

    def document(
        self, start: int, limit: int, depth: int, is_array: bool = False
    ) -> tuple[dict[str, Any] | list[Any], int]:
        """Return the document at `start` and the offset just after it."""
        if depth > MAX_DEPTH:
            raise self.malformed(start, f"documents are nested deeper than {MAX_DEPTH} levels")
        nbytes = self.int32(start, limit)
        if nbytes != -1:
            if nbytes < 5:
                raise self.malformed(start, f"expected a document of 5 bytes or more, not {nbytes}")
            self.need(start, nbytes, limit)
            limit = start + nbytes
            if nbytes < self.slot_nbytes:
                return self.decode_whole(start, limit, is_array), limit
        keys, values, end = self.elements(start + 4, limit, depth)
        if nbytes != -1 and end != limit:
            raise self.malformed(
                end, f"a document of {nbytes} bytes ends {limit - end} bytes early"
            )
        return (values if is_array else dict(zip(keys, values, strict=True))), end

    def elements(self, position: int, limit: int, depth: int) -> tuple[list[str], list[Any], int]:
        keys: list[str] = []
        values: list[Any] = []
        while True:
            self.need(position, 1, limit)
            kind = self.buffer[position]
            if kind == 0:
                return keys, values, position + 1
            name_end = self.buffer.find(
                b"\0", position + 1, min(limit, position + 2 + MAX_NAME_NBYTES)
            )
            if name_end < 0:
                if limit - position <= MAX_NAME_NBYTES:
                    self.need(position, limit - position + 1, limit)
                raise self.malformed(position, f"a name is longer than {MAX_NAME_NBYTES} bytes")
            keys.append(self.text(position + 1, name_end))
            value, position = self.value(kind, name_end + 1, limit, depth)
            values.append(value)

    def text(self, start: int, stop: int) -> str:
        try:
            return bytes(self.buffer[start:stop]).decode()
        except UnicodeDecodeError:
            raise self.malformed(start, "text is not UTF-8") from None

    def value(self, kind: int, position: int, limit: int, depth: int) -> tuple[Any, int]:
        if kind in (3, 4):
            return self.document(position, limit, depth + 1, is_array=kind == 4)
        if kind == 5:
            return self.binary(position, limit)
        if kind == 2:
            nbytes = self.int32(position, limit)
            self.need(position + 4, max(nbytes, 1), limit)
            end = position + 4 + nbytes
            if nbytes < 1 or self.buffer[end - 1] != 0:
                raise self.malformed(position, "a string lacks its terminator")
            return self.text(position + 4, end - 1), end
        return self.scalar(kind, position, limit)

    def binary(self, position: int, limit: int) -> tuple[bytes | Slot, int]:
        nbytes = self.int32(position, limit)
        if nbytes < 0:
            raise self.malformed(position, f"a binary has {nbytes} bytes")
        start = position + 5
        self.need(position + 4, nbytes + 1, limit)
        if self.buffer[position + 4] != 0:
            raise self.malformed(position, "a binary is not of subtype 0")
        if nbytes >= self.slot_nbytes:
            return Slot(start, nbytes), start + nbytes
        return bytes(self.buffer[start : start + nbytes]), start + nbytes

    def scalar(self, kind: int, position: int, limit: int) -> tuple[Any, int]:
        nbytes = {0x01: 8, 0x08: 1, 0x0A: 0, 0x10: 4, 0x12: 8}.get(kind)
        if nbytes is None:
            raise self.foreign(kind, position)
        self.need(position, nbytes, limit)
        value: Any = None
        if kind == 0x01:
            value = _DOUBLE.unpack_from(self.buffer, position)[0]
        elif kind == 0x08:
            value = self.buffer[position] != 0
        elif kind == 0x10:
            value = _INT32.unpack_from(self.buffer, position)[0]
        elif kind == 0x12:
            value = int64()(_INT64.unpack_from(self.buffer, position)[0])
        return value, position + nbytes

    def foreign(self, kind: int, position: int) -> FormatError:
        if kind not in _FOREIGN_KINDS:
            return self.malformed(position, f"0x{kind:02x} is no BSON element type")
        return FormatError(
            f"{self.name}: byte {position}: found an element of type {_FOREIGN_KINDS[kind]}, which "
            "BSON.jl never writes; this is a MongoDB document: read it with PyMongo or bsondump"
        )

    def decode_whole(self, start: int, end: int, is_array: bool) -> dict[str, Any] | list[Any]:
        """Decode a small document with PyMongo's codec, which checks every length in it."""
        import bson

        document = memoryview(self.buffer)[start:end]
        try:
            if not is_array:
                decoded: dict[str, Any] = bson.decode(document)
                return decoded
            framed = _INT32.pack(end - start + 7) + b"\x04\0" + document + b"\0"
            elements: list[Any] = bson.decode(framed)[""]
            return elements
        except (bson.errors.BSONError, ValueError, OverflowError, RecursionError) as error:
            raise self.malformed(start, f"PyMongo's codec says: {error}") from error
        finally:
            document.release()


def walk(document: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict in `document`, outermost first."""
    stack = [document]
    while stack:
        node = stack.pop()
        if type(node) is dict:
            yield node
            stack.extend(reversed(node.values()))
        elif type(node) is list:
            stack.extend(reversed(node))
