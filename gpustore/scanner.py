"""The bytes of a file -> a neutral document, every length checked before it is used."""

from __future__ import annotations

import collections
import sys
from typing import Any, cast

import numpy as np

from gpustore import likeness, rows, runs, tagged
from gpustore.encoder import int64
from gpustore.errors import FormatError, TruncatedFileError
from gpustore.layout import (
    DOUBLE,
    INT32,
    INT64,
    MAX_DEPTH,
    MAX_NAME_NBYTES,
    ROW_NBYTES,
    STAMP,
    Deferred,
    Slot,
)  # fmt: skip
from gpustore.repeats import MANY, Repeats

_FOREIGN_KINDS = {
    0x06: "undefined", 0x07: "ObjectId", 0x09: "UTC datetime", 0x0B: "regular expression",
    0x0C: "DBPointer", 0x0D: "JavaScript code", 0x0E: "symbol", 0x0F: "JavaScript code",
    0x11: "timestamp", 0x13: "decimal128", 0x7F: "max key", 0xFF: "min key",
}  # fmt: skip


_FIXED_NBYTES = {0x01: 8, 0x08: 1, 0x0A: 0, 0x10: 4, 0x12: 8}
_EXTRA_NBYTES = {0x02: 4, 0x03: 0, 0x04: 0, 0x05: 5}  # beside those that their length says
# what the codec raises beside its own; SystemError that of PyMongo 4.6 for a binary's subtype
_REFUSALS = (ValueError, OverflowError, RecursionError, SystemError)
_STAMP = b"\x03" + STAMP.encode()
_WHOLE_NBYTES = 8192  # smaller files are decoded whole
_HEAD_NBYTES = 4096


def _twice(keys: list[str]) -> str:
    return collections.Counter(keys).most_common(1)[0][0]


def _is_same(octets: Any, again: bytes) -> bool:
    """Whether a document is what its decoded values are encoded to, but for the keys of arrays.

    The codec gives None and str for MongoDB's undefined (6) and symbol (14), which it encodes to
    as many bytes.
    """
    if octets == again or len(octets) != len(again):
        return len(octets) == len(again)
    found = np.frombuffer(octets, np.uint8)
    differing = found[found != np.frombuffer(again, np.uint8)]
    return not ((differing == 6) | (differing == 14)).any()


class Scanner:
    """Reads the documents of a buffer, which begins in the file at `origin`.

    One that `is_plain` reads none in the likeness of others: such documents may hold others. One
    that `is_lazy` leaves the code of long functions to be decoded when it is asked for.
    """

    def __init__(
        self,
        buffer: Any,
        name: str,
        slot_nbytes: int,
        origin: int = 0,
        *,
        is_plain: bool = False,
        is_lazy: bool = False,
    ) -> None:
        self.buffer, self.name, self.slot_nbytes = buffer, name, slot_nbytes
        self.origin, self.is_plain, self.is_lazy = origin, is_plain, is_lazy
        self.has_deferred = False
        self.repeats = Repeats(len(buffer))
        # decoded once, and shared
        self.heads: dict[bytes, dict[str, Any] | list[Any]] = {}
        self.shared: dict[bytes, tuple[Any, Any]] = {}  # types, and sizes that follow them
        int64()

    def where(self, position: int) -> str:
        return f"{self.name}: byte {self.origin + position}"

    def truncated(self, start: int, nbytes: int, found: int) -> TruncatedFileError:
        return TruncatedFileError(
            f"{self.where(start)}: expected {nbytes} bytes, found {found}; the file is cut "
            "off or damaged: copy or download it again"
        )

    def malformed(self, position: int, what: str) -> FormatError:
        return FormatError(f"{self.where(position)}: {what}; the file is damaged or not BSON")

    def need(self, position: int, nbytes: int, limit: int) -> None:
        if limit - position >= nbytes:
            return
        if limit == len(self.buffer):
            raise self.truncated(position, nbytes, max(limit - position, 0))
        raise self.malformed(position, f"{nbytes} bytes do not fit into the enclosing document")

    def int32(self, position: int, limit: int) -> int:
        self.need(position, 4, limit)
        value: int = INT32.unpack_from(self.buffer, position)[0]
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
            if nbytes < (self.slot_nbytes if depth else min(self.slot_nbytes, _WHOLE_NBYTES)):
                return self.decode_whole(start, limit, is_array), limit
        keys, values, end = self.elements(start + 4, limit, depth, is_array)
        if not is_array and len(set(keys)) != len(keys):
            raise self.malformed(start, f"the key {_twice(keys)!r} occurs twice in a document")
        if nbytes != -1 and end != limit:
            raise self.malformed(
                end, f"a document of {nbytes} bytes ends {limit - end} bytes early"
            )
        return (values if is_array else dict(zip(keys, values, strict=True))), end

    def spans(self, start: int) -> dict[str, tuple[int, int, int]] | None:
        """Return kind, start and end of each value of the document at `start`, decoding none.

        None where there are many, or where a length does not say the end.
        """
        limit = start + self.int32(start, len(self.buffer))
        if limit < start + 5:
            return None
        self.need(start, limit - start, len(self.buffer))
        position = start + 4
        found: dict[str, tuple[int, int, int]] = {}
        while len(found) <= MANY:
            self.need(position, 1, limit)
            kind = self.buffer[position]
            if kind == 0:
                return found if position + 1 == limit else None
            name_end = self.name_end(position, limit)
            key, start = self.text(position + 1, name_end), name_end + 1
            nbytes = _FIXED_NBYTES.get(kind)
            if nbytes is None and kind in _EXTRA_NBYTES:
                nbytes = self.int32(start, limit) + _EXTRA_NBYTES[kind]
            if key in found or nbytes is None or nbytes < _EXTRA_NBYTES.get(kind, 0):
                return None
            self.need(start, nbytes, limit)
            position = start + nbytes
            found[key] = kind, start, position
        return None

    def elements(
        self, position: int, limit: int, depth: int, is_array: bool
    ) -> tuple[list[str], list[Any], int]:
        """Return names and values up to the terminator; small documents in a row at once."""
        keys: list[str] = []
        values: list[Any] = []
        run = position  # where a row of small documents begins; none where it is `position`
        is_alike = False  # whether the last element was read in the likeness of another
        # how many elements to look at for others alike, and until where that was done
        most, looked_at = runs.FEW, position
        # where to look for a row again, of how many in vain
        row_from, misses = limit if self.is_plain else position, 0
        while True:
            if position >= limit:
                self.need(position, 1, limit)
            kind = self.buffer[position]
            name_end = position if kind == 0 else self.name_end(position, limit)
            if kind == 3 and depth == 0 and self.is_stamp(position, name_end):
                known = tagged.stamp(self, position, limit - 1)
                if known is not None:
                    if run != position:
                        self.decode_run(run, position, is_array, keys, values)
                    keys.append(STAMP)
                    values.append(known)
                    run = position = limit - 1
                    continue
            elif kind == 3:
                pitch = None
                if position >= row_from:
                    pitch = rows.pitch_at(self.buffer, position, name_end, limit)
                if pitch is not None:
                    row = None
                    if depth <= likeness.DEEPEST:
                        row = self.repeats.row(self, position, name_end, limit, pitch)
                    misses = misses + 1 if row is None else 0
                    if row is not None:
                        self.decode_run(run, position, is_array, keys, values)
                        position = run = self.add(row, is_array, keys, values)
                        continue
                    row_from = position + (pitch << misses)
                is_long = is_alike and limit - position > runs.FEW * rows.FEWEST_NBYTES
                if is_long and position >= looked_at:
                    alike = runs.read_run(self.buffer, position, limit, self.repeats.likes, most)
                    looked_at = alike.end
                    is_whole = len(alike.nodes) == most
                    most = min(4 * most, runs.MANY) if is_whole else runs.FEW
                    if alike.nodes:
                        self.decode_run(run, position, is_array, keys, values)
                        position = run = self.add(alike, is_array, keys, values)
                        continue
                found = self.tagged_at(name_end + 1, limit, depth + 1)
                if found is not None:
                    if run != position:
                        self.decode_run(run, position, is_array, keys, values)
                    keys.append("" if is_array else self.text(position + 1, name_end))
                    values.append(found[0])
                    _, position, is_alike = found
                    run = position
                    continue
            end = self.end_of_small(name_end + 1, limit) if kind in (3, 4) else None
            if end is not None and end - run < ROW_NBYTES:
                position = end
                continue
            if run != position:
                self.decode_run(run, position, is_array, keys, values)
                run = position
                continue
            if kind == 0:
                return keys, values, position + 1
            keys.append("" if is_array else self.text(position + 1, name_end))
            value, position = self.value(kind, name_end + 1, limit, depth)
            values.append(value)
            run = position

    def tagged_at(
        self, start: int, limit: int, depth: int
    ) -> tuple[dict[str, Any], int, bool] | None:
        """Return the document of an array, a struct or a type, and the offset after it.

        The last is whether it was read in the likeness of another. None for anything else, and
        where it is for the plain way to say what is wrong. Types and sizes that are alike are
        decoded once, and shared.
        """
        if limit - start < rows.FEWEST_NBYTES or depth > likeness.DEEPEST:
            return None
        nbytes = INT32.unpack_from(self.buffer, start)[0]
        if not rows.FEWEST_NBYTES <= nbytes <= limit - start:
            return None
        if not self.is_plain:
            return self.repeats.read(self, start, start + nbytes, depth)
        node = tagged.read(self, start, start + nbytes, depth)
        return None if node is None else (node, start + nbytes, False)

    def plain(self, slot_nbytes: int) -> Scanner:
        """Return a scanner of the same buffer that reads nothing in the likeness of others."""
        return Scanner(self.buffer, self.name, slot_nbytes, self.origin, is_plain=True)

    def deferred(self, start: int, end: int, depth: int) -> Deferred:
        """Return what decodes an array when it is asked for, whatever the file is by then."""
        self.has_deferred = True
        octets, origin = self.buffer[start:end], self.origin + start
        own = Scanner(octets, self.name, sys.maxsize, origin, is_plain=True)
        return Deferred(lambda: own.document(0, len(octets), depth, is_array=True)[0])

    def add(self, run: runs.Run, is_array: bool, keys: list[str], values: list[Any]) -> int:
        """Take elements that were read at once; return the offset after them."""
        keys.extend([""] * len(run.nodes) if is_array else run.names)
        values.extend(run.nodes)
        self.repeats.note(run)
        return run.end

    def name_end(self, position: int, limit: int) -> int:
        """Return where the name of the element at `position` has its terminator."""
        end: int = self.buffer.find(b"\0", position + 1, position + 2 + MAX_NAME_NBYTES)
        if end < 0 or end >= limit:
            if limit - position <= MAX_NAME_NBYTES:
                self.need(position, limit - position + 1, limit)
            raise self.malformed(position, f"a name is longer than {MAX_NAME_NBYTES} bytes")
        return end

    def is_stamp(self, position: int, name_end: int) -> bool:
        """Whether the element at `position` is the one that is in every file of this package."""
        is_as_long = name_end - position == len(_STAMP)
        return is_as_long and bool(self.buffer[position:name_end] == _STAMP)

    def end_of_small(self, start: int, limit: int) -> int | None:
        """Return the end of a document that the codec can decode whole, else None."""
        if limit - start < 5:
            return None
        nbytes: int = INT32.unpack_from(self.buffer, start)[0]
        is_small = 5 <= nbytes < min(self.slot_nbytes, ROW_NBYTES) and start + nbytes <= limit
        return start + nbytes if is_small else None

    def decode_run(
        self, start: int, end: int, is_array: bool, keys: list[str], values: list[Any]
    ) -> None:
        """Decode elements that lie in a row, if any, as one document, or as one array."""
        if start == end:
            return
        run = bytes(self.buffer[start:end])
        # a type and a size, between the tag and the data of an array: many are alike
        is_head = keys == ["tag"] and values[0] == "array"
        found = self.heads.get(run) if is_head else None
        if found is None:
            framed = INT32.pack(len(run) + 5) + run + b"\0"
            found = self.decode_whole(0, len(framed), is_array, framed, start - 4)
            if is_head and len(run) <= _HEAD_NBYTES and len(self.heads) < MANY:
                self.heads[run] = found
            elif isinstance(found, dict) and [*found] == [STAMP]:
                tagged.keep_stamp(run, found[STAMP])
        keys.extend(found if isinstance(found, dict) else [""] * len(found))
        values.extend(found.values() if isinstance(found, dict) else found)

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
        nbytes = _FIXED_NBYTES.get(kind)
        if nbytes is None:
            raise self.foreign(kind, position)
        self.need(position, nbytes, limit)
        value: Any = None
        if kind == 0x01:
            value = DOUBLE.unpack_from(self.buffer, position)[0]
        elif kind == 0x08:
            value = self.buffer[position] != 0
        elif kind == 0x10:
            value = INT32.unpack_from(self.buffer, position)[0]
        elif kind == 0x12:
            value = int64()(INT64.unpack_from(self.buffer, position)[0])
        return value, position + nbytes

    def foreign(self, kind: int, position: int) -> FormatError:
        if kind not in _FOREIGN_KINDS:
            return self.malformed(position, f"0x{kind:02x} is no BSON element type")
        return FormatError(
            f"{self.where(position)}: found an element of type {_FOREIGN_KINDS[kind]}, which "
            "BSON.jl never writes; this is a MongoDB document: read it with PyMongo or bsondump"
        )

    def decode_whole(
        self, start: int, end: int, is_array: bool, buffer: Any = None, origin: int = 0
    ) -> dict[str, Any] | list[Any]:
        """Decode a small document with PyMongo's codec, which checks every length in it.

        It lies in `buffer`, which begins in the file at `origin`; by default the file itself.
        """
        import bson

        source = self.buffer if buffer is None else buffer
        octets = bytes(source[start:end])
        try:  # an array as a document: its names need not be numbers from 0 on
            decoded: dict[str, Any] = bson.decode(octets)
            if _is_same(octets, bson.encode(decoded)):
                return list(decoded.values()) if is_array else decoded
        except (bson.errors.BSONError, *_REFUSALS) as error:
            if not is_array:
                raise self.malformed(origin + start, f"PyMongo's codec says: {error}") from error
        # of a key given twice the codec takes the last, and an undefined for a null
        Scanner(source, self.name, 0, origin).document(start, end, 0, is_array)
        if not is_array:
            return decoded
        try:  # BSON.jl ignores the names in an array
            framed = INT32.pack(end - start + 7) + b"\x04\0" + octets + b"\0"
            return cast("list[Any]", bson.decode(framed)[""])
        except (bson.errors.BSONError, *_REFUSALS) as error:
            raise self.malformed(origin + start, f"PyMongo's codec says: {error}") from error
