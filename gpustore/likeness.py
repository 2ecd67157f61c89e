"""Array documents that are read in the likeness of others: one by one, and runs of them at once.

A document that was read is the likeness of all that differ from it in their payload, or the place
of it, and digest only. Such documents share the `type` and `size` of their nodes.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpustore import rows
from gpustore.digest import DIGEST_NBYTES, contents
from gpustore.encoder import int64
from gpustore.layout import (
    DATA_ELEMENT,
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    INT64,
    MAX_NAME_NBYTES,
    PAGE_NBYTES,
    PLACE_ELEMENT,
    ROW_NBYTES,
    Slot,
)

OF_ONE_FILE = (b"backref", b"offset", b"Main")  # references; how a file spells modules
_HEAD_NBYTES, _LIKES = 8192, 256  # of what is kept for other files, and how many
FEW, MANY = 24, 4096  # elements that are looked at for others alike: at first, at most
_SHAPES = 8  # of documents of one size, that are remembered
_FARTHEST = 2**61  # of places: sums stay numbers of 64 bits


class Like(NamedTuple):
    """An array document that was read, in whose likeness others of its size are read."""

    before: bytes  # all until what differs: the payload, or where it lies
    after: bytes  # all from there to the digest
    behind: bytes  # the terminators
    node: dict[str, Any]
    placed_nbytes: int | None  # of a detached payload
    nbytes: int

    @classmethod
    def of(cls, buffer: Any, start: int, end: int, node: dict[str, Any]) -> Like | None:
        """Return that of a document at `start`; None for one without a digest, or of another kind.

        `node` is the document or a struct of which it is the only field.
        """
        inner = rows.array_in(node)
        if type(inner) is not dict or list(inner)[-2:] != ["data", "blake3"]:
            return None
        data, placed_nbytes = inner["data"], None
        if type(data) is dict:
            placed_nbytes = data.get("nbytes")
            if type(placed_nbytes) is not int64() or not 0 <= placed_nbytes < _FARTHEST:
                return None
            varied_nbytes, opened = 8, PLACE_ELEMENT
            closed = DETACHED_TAIL[:8] + INT64.pack(placed_nbytes) + b"\0"
        elif type(data) is bytes or type(data) is Slot:
            varied_nbytes, closed = rows.nbytes_of(data), b""
            opened = DATA_ELEMENT + INT32.pack(varied_nbytes) + b"\0"
        else:
            return None
        after, behind = closed + DIGEST_ELEMENT, bytes(1 if inner is node else 3)
        digest = end - len(behind) - DIGEST_NBYTES
        first = digest - len(after) - varied_nbytes
        before = bytes(buffer[start : max(first, start)])
        is_usual = buffer[first + varied_nbytes : digest] == after and before.endswith(opened)
        if not is_usual or buffer[end - len(behind) : end] != behind:
            return None
        return cls(before, after, behind, node, placed_nbytes, end - start)

    @property
    def inner(self) -> dict[str, Any]:
        """The array document."""
        node: dict[str, Any] = self.node
        return node if "size" in node else node["data"][0]

    def read(self, buffer: Any, start: int, end: int) -> dict[str, Any] | None:
        """Return the document from `start` to `end`, or None where it is not like this one."""
        first = start + len(self.before)
        if buffer[start:first] != self.before:
            return None
        inner, behind = self.inner, end - len(self.behind)
        stop = behind - DIGEST_NBYTES - len(self.after)
        rest = bytes(buffer[stop:end])
        if not (rest.startswith(self.after) and rest.endswith(self.behind)):
            return None
        data = inner["data"]
        if type(data) is bytes:
            data = bytes(buffer[first:stop])
        elif type(data) is Slot:
            data = Slot(first, stop - first)
        else:
            data = {**data, "offset": type(data["offset"])(INT64.unpack_from(buffer, first)[0])}
        digest: Any = rest[len(self.after) : behind - stop]
        if type(inner["blake3"]) is Slot:
            digest = Slot(behind - DIGEST_NBYTES, DIGEST_NBYTES)
        inner = {**inner, "data": data, "blake3": digest}
        return inner if "size" in self.node else {**self.node, "data": [inner]}

    def are_like(self, buffer: Any, starts: Any) -> Any:
        """Return which of the documents of this size at `starts` are like this one."""
        varied, _ = self.varied
        heads = _cut(buffer, starts, slice(0, varied.start))
        tails = _cut(buffer, starts, slice(varied.stop, self.nbytes))
        are_like: Any = (heads == np.frombuffer(self.before, np.uint8)).all(1)
        are_like &= (tails[:, : len(self.after)] == np.frombuffer(self.after, np.uint8)).all(1)
        are_like &= (tails[:, -len(self.behind) :] == np.frombuffer(self.behind, np.uint8)).all(1)
        return are_like

    @property
    def varied(self) -> tuple[slice, slice]:
        """Where in the document the payload is, or the place of it, and where the digest."""
        digest = self.nbytes - len(self.behind) - DIGEST_NBYTES
        own = slice(len(self.before), digest - len(self.after))
        return own, slice(digest, digest + DIGEST_NBYTES)

    def places(self, buffer: Any, starts: Any) -> Any:
        """Return the offsets of the payloads of detached documents at `starts`."""
        octets = _cut(buffer, starts, self.varied[0])
        return np.ascontiguousarray(octets).view("<i8").ravel()

    def nodes(self, buffer: Any, starts: Any) -> list[dict[str, Any]]:
        """Return the documents at `starts`, which are like this one."""
        inner, (varied, digest) = self.inner, self.varied
        payloads: Any
        if self.placed_nbytes is not None:
            places = self.places(buffer, starts).tolist()
            payloads = map(Slot, places, itertools.repeat(self.placed_nbytes))
        else:
            payloads = _column(buffer, starts, varied, inner["data"])
        checks = _column(buffer, starts, digest, inner["blake3"])
        pairs = zip(payloads, checks, strict=False)
        nodes = [{**inner, "data": payload, "blake3": check} for payload, check in pairs]
        return nodes if "size" in self.node else [{**self.node, "data": [one]} for one in nodes]


def _cut(buffer: Any, starts: Any, columns: slice) -> Any:
    """Return these bytes of what begins at each of `starts`, as a matrix: a view for a range."""
    nbytes = columns.stop - columns.start
    windows: Any = np.ndarray((len(buffer) - nbytes + 1, nbytes), np.uint8, buffer, 0, (1, 1))
    if type(starts) is range:
        first, last = starts[0] + columns.start, starts[-1] + columns.start
        return windows[first : last + 1 : starts.step]
    return windows[starts + columns.start]


def _column(buffer: Any, starts: Any, columns: slice, like: Any) -> Any:
    """Return the binaries of a column: slots where the first one is a slot, else their bytes."""
    if type(like) is Slot:
        offsets = (np.asarray(starts, np.int64) + columns.start).tolist()
        return map(Slot, offsets, itertools.repeat(like.nbytes))
    return contents(_cut(buffer, starts, columns))


def read_row(
    buffer: Any, position: int, name_end: int, limit: int, pitch: int, node: dict[str, Any]
) -> rows.Row | None:
    """Read the elements at a constant pitch from `position` on, whose first one holds `node`.

    None where there are too few, or where it is for the plain way to say what is wrong.
    """
    like = Like.of(buffer, name_end + 1, position + pitch, node)
    if like is None:
        return None
    end = position + min(limit - position, ROW_NBYTES) // pitch * pitch
    starts = range(name_end + 1, end, pitch)
    starts = starts[: _count_alike(buffer, starts, pitch, like)]
    placed = None
    if len(starts) >= rows.FEWEST and like.placed_nbytes is not None:
        places = like.places(buffer, starts)
        starts = starts[: _well_placed(places, like.placed_nbytes)]
        placed = int(places[0]), int(places[len(starts) - 1]) + like.placed_nbytes
    if len(starts) < rows.FEWEST:
        return None
    try:
        names = _cut(buffer, starts, slice(position - name_end, 0)).tobytes().decode()
    except UnicodeDecodeError:
        return None
    nodes = like.nodes(buffer, starts)
    return rows.Row(names.split("\0")[:-1], nodes, position + pitch * len(nodes), placed)


def _count_alike(buffer: Any, starts: range, pitch: int, like: Like) -> int:
    """Return how many documents, from the first one on, are like it, with names of one length.

    They are looked at in ever larger parts, so that a short row costs little.
    """
    done, count = 0, rows.FEWEST
    while done < len(starts):
        part = starts[done : done + count]
        heads = _cut(buffer, part, slice(like.nbytes - pitch, 0))
        are_alike = like.are_like(buffer, part) & (heads[:, 0] == 3) & (heads[:, -1] == 0)
        are_alike &= (heads[:, 1:-1] != 0).all(1)
        if not are_alike.all():
            return done + int(are_alike.argmin())
        done, count = done + len(part), 4 * count
    return done


class Likes:
    """Documents of one size that were read, each a Like once another of the size is met."""

    __slots__ = ("_last", "_left", "known")

    def __init__(self, *known: Like) -> None:
        self.known = [*known]
        self._left = _SHAPES  # that are looked at yet
        self._last: tuple[int, int, dict[str, Any]] | None = None

    def read(self, buffer: Any, start: int, end: int) -> dict[str, Any] | None:
        """Return the document from `start` to `end`, or None where it is like none of these."""
        if self._last is not None:
            like = Like.of(buffer, *self._last)
            self._last = None
            self._left -= 1
            if like is not None:
                self.known.append(like)
        for like in self.known:
            node = like.read(buffer, start, end)
            if node is not None:
                return node
        return None

    def add(self, start: int, end: int, node: dict[str, Any]) -> None:
        """Take in a document that was read plainly."""
        if self._left > 0:
            self._last = start, end, node


def read_run(
    buffer: Any, position: int, limit: int, likes: Mapping[int, Likes], most: int
) -> rows.Row:
    """Read up to `most` elements from `position` on, as far as each is like one that was read.

    `likes` are by the nbytes of documents. A Row of no nodes says until where fewer than
    `rows.FEWEST` were found: those are for the plain way.
    """
    names: list[bytes] = []
    edges, starts = [position], []
    members: defaultdict[int, list[int]] = defaultdict(list)
    while len(names) < most and buffer[position] == 3:
        name_end = buffer.find(b"\0", position + 1, position + 2 + MAX_NAME_NBYTES)
        if name_end < 0 or limit - name_end < 5:
            break
        nbytes: int = INT32.unpack_from(buffer, name_end + 1)[0]
        own = likes.get(nbytes)
        if own is None or not own.known or nbytes >= limit - name_end - 1:
            break
        members[nbytes].append(len(names))
        names.append(buffer[position + 1 : name_end])
        starts.append(name_end + 1)
        position = name_end + 1 + nbytes
        edges.append(position)
    if len(names) < rows.FEWEST:
        return rows.Row([], [], position, None)
    found = _Found(buffer, np.array(starts, np.int64))
    for nbytes, indices in members.items():
        found.match(likes[nbytes].known, np.array(indices))
    placed = found.place()
    if found.count < rows.FEWEST:  # soon after a long run there may be another one
        return rows.Row([], [], position if most == FEW else edges[found.count + 1], None)
    try:
        texts = b"\0".join(names[: found.count]).decode().split("\0")
    except UnicodeDecodeError:
        return rows.Row([], [], position, None)
    return rows.Row(texts, found.nodes(), edges[found.count], placed)


class _Found:
    """The documents at `starts`, the first `count` of which are like others."""

    def __init__(self, buffer: Any, starts: Any) -> None:
        self.buffer, self.starts, self.count = buffer, starts, len(starts)
        self.sizes = np.full(self.count, -1, np.int64)  # of the payloads of detached documents
        self.groups: list[tuple[Like, Any]] = []  # what they are like, and which

    def match(self, likes: list[Like], indices: Any) -> None:
        """Find what the documents of these indices, all of one size, are like."""
        for like in likes:
            are_like = like.are_like(self.buffer, self.starts[indices])
            own, indices = indices[are_like], indices[~are_like]
            self.groups.append((like, own))
            if like.placed_nbytes is not None:
                self.sizes[own] = like.placed_nbytes
            if indices.size == 0:
                return
        self.count = min(self.count, int(indices[0]))

    def place(self) -> tuple[int, int] | None:
        """Return from where to where detached payloads lie; count those that lie well only."""
        sizes = self.sizes[: self.count]
        if not (sizes >= 0).any():
            return None
        places = np.full(len(self.starts), -1, np.int64)
        for like, indices in self.groups:
            if like.placed_nbytes is not None:
                places[indices] = like.places(self.buffer, self.starts[indices])
        self.count = _well_placed(places[: self.count], sizes)
        if self.count == 0:
            return None
        return int(places[0]), int(places[self.count - 1] + sizes[self.count - 1])

    def nodes(self) -> list[dict[str, Any]]:
        nodes: list[Any] = [None] * self.count
        for like, indices in self.groups:
            within = indices[indices < self.count]
            made = like.nodes(self.buffer, self.starts[within])
            for index, node in zip(within.tolist(), made, strict=True):
                nodes[index] = node
        return nodes


def _well_placed(places: Any, sizes: Any) -> int:
    """Return how many payloads, from the first one on, are aligned and soon after one another."""
    are_well = (places % 64 == 0) & (places >= 0) & (places < _FARTHEST)
    gaps = places[1:] - (places + sizes)[:-1]
    are_well[1:] &= (gaps >= 0) & (gaps < PAGE_NBYTES)
    return len(places) if are_well.all() else int(are_well.argmin())


def keep_like(buffer: Any, start: int, end: int, node: dict[str, Any]) -> None:
    """Remember a document of a large array for other files, when one of its size is met again."""
    nbytes = end - start
    if nbytes not in _met:
        if len(_met) < _LIKES:
            _met.add(nbytes)
        return
    like = Like.of(buffer, start, end, node) if nbytes not in likes else None
    if like is None or len(like.before) > _HEAD_NBYTES or len(likes) >= _LIKES:
        return
    if not any(word in like.before for word in OF_ONE_FILE):
        likes[nbytes] = like


likes: dict[int, Like] = {}  # of all files: large arrays, by the nbytes of their documents
_met: set[int] = set()
