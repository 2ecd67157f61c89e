"""Small arrays, many of which are written at once: what those alike have in common is kept.

So it is with objects that hold a few of them, whose documents differ in nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, repeat
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np

from gpustore.digest import DIGEST_NBYTES, digests
from gpustore.layout import (
    ARRAY_HEAD,
    DATA_ELEMENT,
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    INT64,
    PLACE_ELEMENT,
    STRUCT_HEAD,
    Encoded,
)

_DIGESTED_NBYTES = len(DIGEST_ELEMENT) + DIGEST_NBYTES
_PADDINGS = [b"\x05_\0" + INT32.pack(n) + b"\0" + bytes(n) for n in range(64)]
_ZEROS = [bytes(n) for n in range(64)]
_bytes_of = methodcaller("tobytes")
_AT_ONCE = 128  # arrays, of 16 KiB at most


class SmallArray(NamedTuple):
    """The document of a small array, or of a struct around it: a leaf of a neutral document.

    `content` is C-contiguous, with the bytes in the order of the file.
    """

    alike: Alike
    content: Any

    def document(self) -> dict[str, Any]:
        """Return the document that this stands for."""
        kind, size, outer = self.alike.parts
        inner = {"tag": "array", "type": kind, "size": size, "data": self.content}
        return inner if outer is None else {"tag": "struct", "type": outer, "data": [inner]}


small_array = functools.partial(tuple.__new__, SmallArray)  # of a pair, faster than its name


class Row:
    """Small arrays that are alike and follow one another in `node`: a leaf under each of `keys`.

    `contents` are those of a SmallArray each, in the order of the keys; `arrays` are what they were
    made of.
    """

    def __init__(
        self, node: Any, keys: list[Any], alike: Alike, contents: list[Any], arrays: list[Any]
    ) -> None:
        self.node, self.keys, self.arrays = node, keys, arrays
        self.alike, self.contents = alike, contents

    @functools.cached_property
    def places(self) -> dict[int, tuple[Any, Any, Any]]:
        """Where each array is, by its id: node, key, the array."""
        found = zip(repeat(self.node), self.keys, self.arrays)
        return dict(zip(map(id, self.arrays), found, strict=True))

    def dissolve(self) -> None:
        """Put each by itself into the node, so that one of them may go elsewhere."""
        pairs = zip(repeat(self.alike), self.contents)
        for key, member in zip(self.keys, map(small_array, pairs), strict=True):
            self.node[key] = member


class Alike:
    """What the documents of arrays of one type and size have around their payloads.

    `nbytes` are those of each; `outer` is the type of the struct around them, if there is one.
    """

    def __init__(
        self, nbytes: int, kind: Encoded, size: Encoded, outer: Encoded | None = None
    ) -> None:
        self.nbytes, self.parts = nbytes, (kind, size, outer)
        self._head = ARRAY_HEAD + kind.bson + b"\x04size\0" + size.bson
        self._outer, self.behind = b"", b"\0"
        self.levels = 1 + max(kind.depth, size.depth)
        if outer is not None:
            self._outer, self.behind = STRUCT_HEAD + outer.bson + b"\x04data\0", b"\0\0\0"
            self.levels = 1 + max(outer.depth, 1 + self.levels)
        self.behind_nbytes = _DIGESTED_NBYTES + len(self.behind)
        self._inline: dict[tuple[int, int], bytes] = {}

    def inline(self, key: bytes, position: int) -> bytes:
        """Return what is between the key of an element at `position` and its payload."""
        form = len(key), position % 64
        known = self._inline.get(form)
        if known is None:
            opened_nbytes = len(self._outer) + 11 if self._outer else 0
            at = position + 1 + len(key) + opened_nbytes + 4 + len(self._head)
            data, padding = DATA_ELEMENT + INT32.pack(self.nbytes) + b"\0", b""
            if (at + len(data)) % 64:
                padding = _PADDINGS[-(at + 8 + len(data)) % 64]
            content = self._head + padding + data
            known = self._inline[form] = self._opened(len(content) + self.nbytes) + content
        return known

    @functools.cached_property
    def detached(self) -> tuple[bytes, bytes]:
        """What is between a key and the offset of a payload, and from there on.

        There are zeros where offset and digest belong.
        """
        content = self._head + PLACE_ELEMENT
        tail = bytes(8) + DETACHED_TAIL[:8] + INT64.pack(self.nbytes) + b"\0"
        before = self._opened(len(content) + len(tail)) + content
        return before, tail + DIGEST_ELEMENT + bytes(DIGEST_NBYTES) + self.behind

    def _opened(self, nbytes: int) -> bytes:
        """Return the lengths of documents with `nbytes` before the digest, and the outer one."""
        nbytes += 4 + _DIGESTED_NBYTES + 1
        if not self._outer:
            return INT32.pack(nbytes)
        whole = INT32.pack(4 + len(self._outer) + nbytes + 9)
        return whole + self._outer + INT32.pack(nbytes + 8) + b"\x030\0" + INT32.pack(nbytes)


class Template:
    """What the documents of objects that are alike have around the payloads in them.

    `node` is one of these documents; `names` says where its small arrays are: the keys, or the
    indices of a struct's fields. `levels` is how deep it is.
    """

    def __init__(self, node: dict[str, Any], names: list[Any], levels: int) -> None:
        self.node, self.names, self.levels = node, names, levels
        # by the nbytes of a key and the position in 64 bytes: what is before each payload, what is
        # behind the last one, and the nbytes of it all from the key on
        self.inline: dict[tuple[int, int], tuple[list[bytes], bytes, int]] = {}
        # all of it, with zeros where offsets and digests belong, and where offsets do
        self.detached: tuple[bytes, list[int]] = b"", []


class Filled(NamedTuple):
    """The document of an object, like its template: a leaf of a neutral document.

    `parts` are the nodes in the place of those that the template has under its names: small arrays
    of the same kinds, or what has come there since.
    """

    template: Template
    parts: list[Any]

    def document(self) -> dict[str, Any]:
        """Return the document that this stands for."""
        node = dict(self.template.node)
        parts = zip(self.template.names, self.parts, strict=True)
        if node.get("tag") != "struct":
            return node | dict(parts)
        node["data"] = [*node["data"]]
        for index, part in parts:
            node["data"][index] = part
        return node


class Batch:
    """Small arrays that are written at once."""

    def __init__(self) -> None:
        self.arrays: list[Any] = []
        self.befores: list[bytes | bytearray] = []  # inline: the structure before each
        self.at: list[int] = []  # detached: where in the document their offsets belong
        self._places: Any = None  # where they lie among themselves
        self._gaps: list[int] = []  # the nbytes of zeros after each

    def inline(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the bytes from the first payload to the last digest, and the structure in them."""
        for part in _parts(len(self.arrays)):
            payloads = [*map(_bytes_of, self.arrays[part])]
            before, after = self.befores[part], (repeat(DIGEST_ELEMENT), digests(payloads))
            yield _joined(before, payloads, *after), _joined(before, *after)

    def add_detached(
        self, keys: list[bytes], alikes: Sequence[Alike], contents: Iterable[Any], start: int
    ) -> bytes:
        """Take in arrays; return their elements, the first of which is at byte `start`."""
        wholes = {alike: b"".join(alike.detached) for alike in {*alikes}}
        sizes = {alike: [*map(len, alike.detached)] for alike in wholes}
        at = start
        for key, alike in zip(keys, alikes, strict=True):
            before, after = sizes[alike]
            at += 1 + len(key) + before
            self.at.append(at)
            at += after
        self.arrays += contents
        return _joined(repeat(b"\x03"), keys, map(wholes.__getitem__, alikes))

    def add_filled(self, keys: list[bytes], values: list[Filled], start: int) -> bytes:
        """Take in the arrays of objects as `add_detached` does, and return the elements."""
        wholes = [template.detached for template, _ in values]
        sizes = [1 + len(key) + len(whole) for key, (whole, _) in zip(keys, wholes, strict=True)]
        starts = accumulate(sizes, initial=start)
        self.at += [
            at + 1 + len(key) + place
            for at, key, (_, places) in zip(starts, keys, wholes, strict=False)
            for place in places
        ]
        self.arrays += [content for _, parts in values for _, content in parts]
        return _joined(repeat(b"\x03"), keys, [whole for whole, _ in wholes])

    def detached(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the payloads, each aligned to 64, and the zeros between them."""
        for part in _parts(len(self.arrays)):
            if any(self._gaps[part]):
                gaps = [_ZEROS[nbytes] for nbytes in self._gaps[part]]
                yield _joined(self.arrays[part], gaps), b"".join(gaps)
            else:
                yield b"".join(self.arrays[part]), b""

    def place(self) -> int:
        """Let detached payloads follow one another, aligned to 64; return where they end."""
        sizes = np.array([array.nbytes for array in self.arrays], np.int64)
        gaps = -sizes % 64
        gaps[-1] = 0  # nothing is behind the last one
        ends = np.cumsum(sizes + gaps)
        self._places, self._gaps = ends - sizes - gaps, gaps.tolist()
        return int(ends[-1])

    def fill(self, document: bytearray, position: int) -> None:
        """Put offsets, counted from `position` of the file on, and digests into the document."""
        offsets = self._places.astype("<i8") + position
        own = b"".join(digests(map(_bytes_of, self.arrays)))
        at = np.array(self.at)
        _windows(document, 8)[at] = offsets.view(np.uint8).reshape(-1, 8)
        at += 8 + len(DETACHED_TAIL) + len(DIGEST_ELEMENT)
        _windows(document, DIGEST_NBYTES)[at] = np.frombuffer(own, np.uint8).reshape(len(at), -1)


def _parts(count: int) -> Iterator[slice]:
    """Yield slices of a few arrays each."""
    for start in range(0, count, _AT_ONCE):
        yield slice(start, start + _AT_ONCE)


def _joined(*columns: Iterable[Any]) -> bytes:
    return b"".join(chain.from_iterable(zip(*columns, strict=False)))


def _windows(octets: bytearray, nbytes: int) -> Any:
    """Return the matrix of the `nbytes` from each byte on."""
    shape = len(octets) - nbytes + 1, nbytes
    return np.ndarray(shape, np.uint8, octets, 0, (1, 1))
