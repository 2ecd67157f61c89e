"""Small arrays, many of which are written at once: what those alike have in common is kept.

So it is with objects that hold a few of them, whose documents differ in nothing else.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, repeat
from operator import methodcaller
from typing import Any, NamedTuple

import numpy as np

from gpustore.digest import DIGEST_NBYTES, contents, digests
from gpustore.layout import (
    ARRAY_HEAD,
    DATA_ELEMENT,
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    INT64,
    PLACE_ELEMENT,
    SMALL_NBYTES,
    STRUCT_HEAD,
    Encoded,
)
from gpustore.rows import FEWEST

_DIGESTED_NBYTES = len(DIGEST_ELEMENT) + DIGEST_NBYTES
_PADDINGS = [b"\x05_\0" + INT32.pack(n) + b"\0" + bytes(n) for n in range(64)]
_ZEROS = [bytes(n) for n in range(64)]
_bytes_of = methodcaller("tobytes")
_AT_ONCE_NBYTES = 2 * 1024 * 1024


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
        # detached: where in the document their offsets belong, and their nbytes
        self.at, self.sizes = array("q"), array("q")
        self._document = bytearray()
        # where they lie among themselves, and the nbytes of zeros after each
        self._starts: Any = None
        self._gaps: Any = None

    def inline(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the bytes from the first payload to the last digest, and the structure in them."""
        for part in _parts(len(self.arrays), SMALL_NBYTES):
            payloads = [*map(_bytes_of, self.arrays[part])]
            before, after = self.befores[part], (repeat(DIGEST_ELEMENT), digests(payloads))
            yield _joined(before, payloads, *after), _joined(before, *after)

    def add_detached(
        self,
        segment: bytearray,
        keys: list[bytes],
        alikes: Sequence[Alike],
        contents: Sequence[Any],
    ) -> None:
        """Take in arrays, whose elements follow in the segment."""
        self.arrays += contents
        wholes = {alike: b"".join(alike.detached) for alike in {*alikes}}
        if len(wholes) == 1 and len(keys) >= FEWEST:
            ((alike, whole),) = wholes.items()
            sizes = np.fromiter(map(len, keys), np.int64, len(keys)) + (1 + len(whole))
            ends = len(segment) + np.cumsum(sizes)
            self.at.frombytes((ends - len(alike.detached[1])).tobytes())
            self.sizes += array("q", [alike.nbytes]) * len(keys)
            for octets in (b"\x03", (whole + b"\x03").join(keys), whole):
                segment += octets
            return
        around = {alike: [*map(len, alike.detached)] for alike in wholes}
        at = len(segment)
        for key, alike in zip(keys, alikes, strict=True):
            before, after = around[alike]
            at += 1 + len(key) + before
            self.at.append(at)
            at += after
            self.sizes.append(alike.nbytes)
        segment += _joined(repeat(b"\x03"), keys, map(wholes.__getitem__, alikes))

    def add_filled(self, segment: bytearray, keys: list[bytes], values: list[Filled]) -> None:
        """Take in the arrays of objects as `add_detached` does those by themselves."""
        wholes = [template.detached for template, _ in values]
        sizes = [1 + len(key) + len(whole) for key, (whole, _) in zip(keys, wholes, strict=True)]
        starts = accumulate(sizes, initial=len(segment))
        self.at.extend(
            at + 1 + len(key) + place
            for at, key, (_, places) in zip(starts, keys, wholes, strict=False)
            for place in places
        )
        members = [member for _, parts in values for member in parts]
        self.arrays += [content for _, content in members]
        self.sizes.extend([alike.nbytes for alike, _ in members])
        segment += _joined(repeat(b"\x03"), keys, [whole for whole, _ in wholes])

    def place(self) -> int:
        """Let detached payloads follow one another, aligned to 64; return where they end."""
        sizes = np.frombuffer(self.sizes, np.int64)
        self._gaps = -sizes % 64
        self._gaps[-1] = 0  # nothing is behind the last one
        ends = np.cumsum(sizes + self._gaps)
        self._starts = ends - sizes - self._gaps
        return int(ends[-1])

    def locate(self, document: bytearray, position: int) -> None:
        """Put offsets, counted from `position` of the file on, into the document, which is whole.

        The digests come there when the payloads are written.
        """
        offsets = (self._starts + position).astype("<i8")
        at = np.frombuffer(self.at, np.int64)
        _windows(document, 8)[at] = offsets.view(np.uint8).reshape(-1, 8)
        self._document = document

    def detached(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the payloads, each aligned to 64, and the zeros between them."""
        at = np.frombuffer(self.at, np.int64) + (8 + len(DETACHED_TAIL) + len(DIGEST_ELEMENT))
        for part in _parts(len(self.arrays), max(self.sizes)):
            zeros = [_ZEROS[nbytes] for nbytes in self._gaps[part].tolist()]
            between = b"".join(zeros)
            own = self.arrays[part]
            octets = _joined(own, zeros) if between else b"".join(own)
            starts = (self._starts[part] - self._starts[part.start]).tolist()
            found = b"".join(digests(_cut(octets, starts, self.sizes[part])))
            rows = np.frombuffer(found, np.uint8).reshape(-1, DIGEST_NBYTES)
            _windows(self._document, DIGEST_NBYTES)[at[part]] = rows
            yield octets, between


def _parts(count: int, nbytes: int) -> Iterator[slice]:
    """Yield slices of as many of `count` arrays, of at most `nbytes` each, as are at once."""
    at_once = _AT_ONCE_NBYTES // max(nbytes, 64)  # with the zeros between them
    for start in range(0, count, at_once):
        yield slice(start, start + at_once)


def _cut(octets: bytes, starts: list[int], sizes: array[int]) -> list[bytes]:
    """Return the bytes of these sizes from each of `starts` on."""
    nbytes, pitch = sizes[0], starts[-1] // max(len(starts) - 1, 1)
    if sizes.count(nbytes) == len(sizes):  # then they lie at one pitch
        return contents(np.ndarray((len(sizes), nbytes), np.uint8, octets, 0, (pitch, 1)))
    return [octets[at : at + size] for at, size in zip(starts, sizes, strict=True)]


def _joined(*columns: Iterable[Any]) -> bytes:
    return b"".join(chain.from_iterable(zip(*columns, strict=False)))


def _windows(octets: bytearray, nbytes: int) -> Any:
    """Return the matrix of the `nbytes` from each byte on."""
    shape = len(octets) - nbytes + 1, nbytes
    return np.ndarray(shape, np.uint8, octets, 0, (1, 1))
