"""Documents of arrays, and of structs and types, that are read without the codec.

They lie as this package and BSON.jl write them: `tag`, `type`, then the rest. What many have in
common is decoded once, and shared. Anything else is None, for the plain way to read or refuse.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

from gpustore.digest import DIGEST_NBYTES
from gpustore.encoder import int64
from gpustore.errors import FormatError
from gpustore.layout import (
    ARRAY_HEAD,
    DATA_ELEMENT,
    DEFERRED_NBYTES,
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    MOST_DEFERRED_NBYTES,
    PAGE_NBYTES,
    PLACE_ELEMENT,
    STRUCT_HEAD,
    Slot,
)  # fmt: skip
from gpustore.likeness import OF_ONE_FILE

_TYPE_HEAD = b"\x02tag\0\x09\0\0\0datatype\0"
_SIZE, _FIELDS, _PADDING = b"\x04size\0", b"\x04data\0", b"\x05_\0"
_BACKREF, _TYPE_NAME = b"\x02tag\0\x08\0\0\0backref\0", b"\x09\0\0\0TypeName\0"
_SYMBOL = b"\x02tag\0\x07\0\0\0symbol\0"
_TEXT, _DOCUMENT, _LIST = 2, 3, 4
_PAIR = struct.Struct("<q8xq")  # of a place: its offset and size
_TYPE_NBYTES = 256  # smaller ones are faster with the codec
_HEAD_NBYTES, _HEADS = 4096, 256  # of what is kept, and how many
_KEPT_NBYTES, _STAMP_NBYTES = 1024, 256  # of types and stamps that are kept for other files


def read(scanner: Any, start: int, end: int, depth: int) -> dict[str, Any] | None:
    """Return the document from `start` to `end`: of an array, a type, or some kinds of structs."""
    buffer, first = scanner.buffer, start + 4 + len(ARRAY_HEAD)
    tag = buffer[start + 4 : first]
    if tag[: len(_TYPE_HEAD)] == _TYPE_HEAD:
        kind = _head(scanner, start, end, end) if end - start >= _TYPE_NBYTES else None
        return kind and kind[0]
    is_array = tag == ARRAY_HEAD
    if not is_array:
        if tag != STRUCT_HEAD[:-1] or buffer[first] != STRUCT_HEAD[-1]:
            return None
        first += 1
    after_type = first + INT32.unpack_from(buffer, first)[0]
    if not first < after_type < end - 11:
        return None
    after = after_type + 6 + INT32.unpack_from(buffer, after_type + 6)[0]
    name = buffer[after_type : after_type + 6]
    if not after_type + 10 < after < end:
        return None
    if is_array:
        return _array(scanner, first, after_type, after, end) if name == _SIZE else None
    if name != _FIELDS:
        return None
    if scanner.is_lazy and after - after_type > DEFERRED_NBYTES:
        node = _code(scanner, first, after_type, after, end, depth)
        if node is not None:
            return node
    # those of no fields, around an array, and large ones; others are faster with the codec
    is_around = buffer[after_type + 17 : after_type + 17 + len(ARRAY_HEAD)] == ARRAY_HEAD
    is_for_here = is_around or after == after_type + 11 or end - start >= scanner.slot_nbytes
    return _struct(scanner, first, after_type, after, end, depth) if is_for_here else None


def _code(
    scanner: Any, first: int, after_type: int, after: int, end: int, depth: int
) -> dict[str, Any] | None:
    """Return the TypeName of an anonymous function from its type on, its methods deferred.

    BSON.jl writes it as a struct (src/anonymous.jl): the version of Julia comes first, the methods
    last. Its type may be a backref: then it is known by how it begins.
    """
    buffer, fields = scanner.buffer, after_type + 6
    is_backref = buffer[first + 4 : first + 4 + len(_BACKREF)] == _BACKREF
    if not is_backref and buffer.find(_TYPE_NAME, first, after_type) < 0:
        return None
    if after != end - 1 or buffer[after] or buffer[fields + 4] != _TEXT:
        return None
    try:
        spans = scanner.spans(fields)
    except FormatError:  # the plain way says more, and knows of names that are not looked at
        return None
    if spans is None or len(spans) < 3:
        return None
    (_, version, _), (_, name, _), *_, (kind, methods, stop) = spans.values()
    if kind != _LIST or not DEFERRED_NBYTES <= stop - methods <= MOST_DEFERRED_NBYTES:
        return None
    begins = b"0" <= buffer[version + 4 : version + 5] <= b"9"
    if not begins or buffer[name + 4 : name + 4 + len(_SYMBOL)] != _SYMBOL:
        return None
    others = [*spans.values()][:-1]
    julia_type, _ = scanner.value(_DOCUMENT, first, after_type, depth)
    values = [scanner.value(kind, begin, limit, depth + 1)[0] for kind, begin, limit in others]
    values.append(scanner.deferred(methods, stop, depth + 2))
    return {"tag": "struct", "type": julia_type, "data": values}


def _struct(
    scanner: Any, first: int, after_type: int, after: int, end: int, depth: int
) -> dict[str, Any] | None:
    """Return the struct document from the type at `first` to the fields that end at `after`."""
    kind = _head(scanner, first, after_type, after_type)
    if kind is None:
        return None
    node = {"tag": "struct", "type": kind[0]}
    _, node["data"], stop = scanner.elements(after_type + 10, after, depth + 1, True)
    if stop != after:
        raise scanner.malformed(stop, f"fields end {after - stop} bytes early")
    if end - after > 1 or scanner.buffer[after]:
        keys, values, stop = scanner.elements(after, end, depth, False)
        node.update(zip(keys, values, strict=True))
        if stop != end:
            raise scanner.malformed(stop, f"a struct document ends {end - stop} bytes early")
        if len(node) != 3 + len(keys):
            raise scanner.malformed(after, "a key occurs twice in a struct document")
    return node


def _array(scanner: Any, first: int, after_type: int, at: int, end: int) -> dict[str, Any] | None:
    """Return the array document whose type begins at `first`, and whose size ends at `at`."""
    if end - at < 16:
        return None
    buffer, head = scanner.buffer, _head(scanner, first, after_type, at)
    if head is None:
        return None
    node: dict[str, Any] = {"tag": "array", "type": head[0], "size": head[1]}
    if buffer[at : at + 3] == _PADDING:
        nbytes = INT32.unpack_from(buffer, at + 3)[0]
        if buffer[at + 7] or not 0 <= nbytes < end - at - 24:
            return None
        node["_"] = _binary(buffer, at + 8, at + 8 + nbytes, scanner.slot_nbytes)
        at += 8 + nbytes
    name, start = bytes(buffer[at : at + 6]), at + 11
    nbytes = INT32.unpack_from(buffer, at + 6)[0]
    stop = start + nbytes
    if name == DATA_ELEMENT and buffer[at + 10] == 0 and start <= stop < end:
        # so it is copied once at most
        node["data"] = _binary(buffer, start, stop, min(scanner.slot_nbytes, PAGE_NBYTES))
    elif name == PLACE_ELEMENT[:6] and end - at > len(PLACE_ELEMENT) + len(DETACHED_TAIL) + 8:
        stop = at + len(PLACE_ELEMENT) + 8 + len(DETACHED_TAIL)
        numbers = buffer[at + len(PLACE_ELEMENT) : stop]
        if bytes(buffer[at : at + len(PLACE_ELEMENT)]) != PLACE_ELEMENT or numbers[-1]:
            return None
        if bytes(numbers[8:16]) != DETACHED_TAIL[:8]:
            return None
        offset, nbytes = _PAIR.unpack_from(numbers)
        node["data"] = {"offset": int64()(offset), "nbytes": int64()(nbytes)}
    else:
        return None
    if end - stop == len(DIGEST_ELEMENT) + DIGEST_NBYTES + 1:
        if bytes(buffer[stop : stop + len(DIGEST_ELEMENT)]) != DIGEST_ELEMENT:
            return None
        digest = end - 1 - DIGEST_NBYTES
        node["blake3"] = _binary(buffer, digest, end - 1, scanner.slot_nbytes)
    elif end - stop != 1:
        return None
    return None if buffer[end - 1] else node


def _has_binary(node: Any) -> bool:
    if type(node) is dict:
        node = [*node.values()]
    if type(node) in (list, tuple):
        return any(map(_has_binary, node))
    return type(node) is bytes


def _binary(buffer: Any, start: int, stop: int, slot_nbytes: int) -> bytes | Slot:
    is_large = stop - start >= slot_nbytes
    return Slot(start, stop - start) if is_large else bytes(buffer[start:stop])


def _head(scanner: Any, start: int, stop: int, end: int) -> tuple[Any, Any] | None:
    """Return the type from `start` to `stop` and the size that may follow, decoded once."""
    octets = bytes(scanner.buffer[start:end])
    found: tuple[Any, Any] | None = scanner.shared.get(octets)
    if found is None:
        if len(octets) > _HEAD_NBYTES:
            return None
        try:
            size = _size(scanner, stop + 6, end) if end > stop else None
            found = _kind(scanner, start, stop), size
        except FormatError:  # the plain way says more
            return None
        # what says where in the file something lies is not the same for all
        has_slots = scanner.slot_nbytes <= _HEAD_NBYTES
        if b"\x12offset\0" in octets or (has_slots and _has_binary(found)):
            return None
        if len(scanner.shared) < _HEADS:
            scanner.shared[octets] = found
    return found


def _kind(scanner: Any, start: int, stop: int) -> Any:
    """Return the document of a type; those that any file may hold are remembered by their bytes."""
    octets = bytes(scanner.buffer[start:stop])
    names = _plain.get(octets)
    if names is not None:
        return {"tag": "datatype", "name": [*names], "params": []}
    known = _kept.get(octets)
    if known is not None:
        return known
    kind = scanner.decode_whole(start, stop, False)
    names = kind.get("name")
    is_short = len(octets) <= _KEPT_NBYTES and len(_kept) < _HEADS
    if is_short and kind.get("params") and not any(word in octets for word in OF_ONE_FILE):
        kind = _kept.setdefault(octets, kind)  # another thread may have been first
        lifted.setdefault(id(kind), None)
    if type(names) is not list or kind != {"tag": "datatype", "name": names, "params": []}:
        return kind
    is_small = len(octets) < _TYPE_NBYTES and len(_plain) < _HEADS
    if is_small and list(kind) == ["tag", "name", "params"] and {*map(type, names)} == {str}:
        _plain[octets] = tuple(names)
    return kind


def stamp(scanner: Any, start: int, end: int) -> dict[str, Any] | None:
    """Return a file's stamp, the element from `start` to `end`, in the likeness of another's."""
    buffer = scanner.buffer
    if end - start > min(_STAMP_NBYTES, scanner.slot_nbytes) or buffer[end - 1]:
        return None
    digest = end - 1 - DIGEST_NBYTES
    known = _stamps.get(bytes(buffer[start:digest]))
    return known and {**known, "blake3": bytes(buffer[digest : end - 1])}


def keep_stamp(element: bytes, node: Any) -> None:
    """Remember a stamp that was decoded, if it ends with the digest."""
    before, digest = element[: -1 - DIGEST_NBYTES], element[-1 - DIGEST_NBYTES : -1]
    is_last = type(node) is dict and [*node.items()][-1:] == [("blake3", digest)]
    is_short = len(element) <= _STAMP_NBYTES and len(_stamps) < _HEADS
    if is_last and is_short and before.endswith(DIGEST_ELEMENT):
        _stamps[before] = node


_stamps: dict[bytes, dict[str, Any]] = {}  # of all files
# of all files: names of types, whole types, and by the ids of these what they are lifted to
_plain: dict[bytes, tuple[str, ...]] = {}
_kept: dict[bytes, dict[str, Any]] = {}
lifted: dict[int, Any] = {}


def _size(scanner: Any, start: int, stop: int) -> Any:
    """Return the size of an array: a list of int64 numbers of at most ten dimensions is usual."""
    count, rest = divmod(stop - start - 5, 11)
    if rest == 0 and 0 < count <= 10:
        form, names = _sizes(count)
        nbytes, *parts = form.unpack(scanner.buffer[start:stop])
        if nbytes == stop - start and (*parts[::2],) == names:
            return [*map(int64(), parts[1::2])]
    return scanner.decode_whole(start, stop, True)


@functools.cache
def _sizes(count: int) -> tuple[struct.Struct, tuple[bytes, ...]]:
    """Return the form of the size of so many dimensions, and what is between its numbers."""
    names = (b"\x12%d\0" % number for number in range(count))
    return struct.Struct("<i" + "3sq" * count + "s"), (*names, b"\0")
