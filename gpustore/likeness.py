"""Documents that are read in the likeness of others of their size that were read before.

A document that was read is the likeness of all that differ from it in nothing but payloads, or the
places of them, and digests. Such documents share the types and sizes in their nodes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gpustore import rows
from gpustore.digest import contents
from gpustore.encoder import int64
from gpustore.layout import (
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT64,
    MAX_DEPTH,
    PLACE_ELEMENT,
    Slot,
)

OF_ONE_FILE = (b"backref", b"offset", b"Main")  # references; how a file spells modules
_OFFSET = b"\x12offset\0"
_HEAD_NBYTES, _LIKES = 8192, 256  # of what is kept for other files, and how many
_SHAPES = 8  # of documents of one size, that are remembered
_HOLES = 64  # of a document
FARTHEST = 2**61  # of places: sums stay numbers of 64 bits
DEEPEST = MAX_DEPTH // 2  # how deep such a document has others in it, and lies in others

Columns = list[Any]  # for each hole what is in it, in each of some documents
Make = Callable[[Columns, int, list[Any]], Iterable[Any]]


class Hole(NamedTuple):
    """Where in a document something is that others have otherwise.

    A binary, which is a slot in the nodes or not, or the place of a payload of `placed_nbytes`.
    """

    start: int
    stop: int
    is_slot: bool = False
    placed_nbytes: int | None = None


@dataclass(slots=True, eq=False)
class Like:
    """A document that was read, in whose likeness others of its size are read.

    `lifted` is for who makes values of such documents: what is the same for all of them.
    """

    nbytes: int
    parts: list[tuple[int, int, bytes]]  # from where to where, before and after the holes, what is
    holes: list[Hole]
    make: Make  # nodes of what is in the holes
    is_object: bool  # no array, and no struct around one
    is_type: bool  # whether one node stands for all
    is_detached: bool  # whether there are places of payloads in it
    lifted: Any = None

    @classmethod
    def of(cls, buffer: Any, start: int, end: int, node: Any, slots: Any) -> Like | None:
        """Return that of the document at `start`, or None for one without.

        `node` is what it was read as, and `slots` the same with a slot for each binary.
        """
        maker = _Maker(buffer, start)
        try:
            make = maker.of(node, slots, 0)
        except _Unlike:
            return None
        holes, edges = maker.holes, [start]
        for hole in holes:
            edges += (start + hole.start, start + hole.stop)
        edges.append(end)
        if edges != sorted(edges) or len(holes) > _HOLES:
            return None
        pairs = zip(edges[::2], edges[1::2], strict=True)
        parts = [(a - start, b - start, bytes(buffer[a:b])) for a, b in pairs if a < b]
        places = sum(hole.placed_nbytes is not None for hole in holes)
        if sum(part.count(_OFFSET) for *_, part in parts) != places:  # one may be in a type
            return None
        is_object = node.get("tag") == "struct" and not rows.is_array(rows.array_in(node))
        own_make, is_type = make or _shared(node), make is None
        return cls(end - start, parts, holes, own_make, is_object, is_type, places > 0)

    def read(self, buffer: Any, start: int) -> tuple[dict[str, Any], list[Any]] | None:
        """Return the document at `start` and lists of the arrays in it; None if it is unlike."""
        for first, last, part in self.parts:
            if buffer[start + first : start + last] != part:
                return None
        columns: Columns = []
        for own, stop, is_slot, placed_nbytes in self.holes:
            if placed_nbytes is not None:
                offset = int64()(INT64.unpack_from(buffer, start + own)[0])
                columns.append([{"offset": offset, "nbytes": int64()(placed_nbytes)}])
            elif is_slot:
                columns.append([_slot((start + own, stop - own))])
            else:
                columns.append([bytes(buffer[start + own : start + stop])])
        arrays: list[Any] = []
        (node,) = self.make(columns, 1, arrays)
        return node, arrays

    def are_like(self, buffer: Any, starts: Any) -> Any:
        """Return which of the documents of this size at `starts` are like this one."""
        are_like = np.ones(len(starts), bool)
        for first, last, part in self.parts:
            found = cut(buffer, starts, slice(first, last))
            are_like &= (found == np.frombuffer(part, np.uint8)).all(1)
        return are_like

    def places(self, buffer: Any, starts: Any) -> tuple[Any, Any]:
        """Return offsets and nbytes of the payloads of detached documents, a row for each."""
        holes = [hole for hole in self.holes if hole.placed_nbytes is not None]
        columns = [cut(buffer, starts, slice(hole.start, hole.stop)) for hole in holes]
        offsets = [np.ascontiguousarray(octets).view("<i8")[:, 0] for octets in columns]
        sizes = np.array([hole.placed_nbytes for hole in holes], np.int64)
        return np.array(offsets, np.int64).reshape(len(holes), -1).T, sizes

    def nodes(self, buffer: Any, starts: Any) -> tuple[list[dict[str, Any]], list[Any]]:
        """Return the documents at `starts`, which are like this one, and the arrays in them.

        Those are lists of arrays that are alike.
        """
        columns: Columns = []
        for start, stop, is_slot, placed_nbytes in self.holes:
            if is_slot:  # of which nothing is read
                offsets = (np.asarray(starts, np.int64) + start).tolist()
                columns.append(_slots(offsets, stop - start))
                continue
            octets = cut(buffer, starts, slice(start, stop))
            if placed_nbytes is None:
                columns.append(contents(octets))
            else:
                offsets = np.ascontiguousarray(octets).view("<i8")[:, 0].tolist()
                columns.append(_slots(offsets, placed_nbytes))
        arrays: list[Any] = []
        return [*self.make(columns, len(starts), arrays)], arrays


def _slots(offsets: list[int], nbytes: int) -> Iterable[Slot]:
    return map(_slot, zip(offsets, itertools.repeat(nbytes), strict=False))


_slot = functools.partial(tuple.__new__, Slot)  # of a pair, faster than its name


class _Unlike(Exception):
    """A document of which no others are said to be alike."""


class _Maker:
    """Finds the holes of the document at `start`, and how to make nodes that are like its own."""

    def __init__(self, buffer: Any, start: int) -> None:
        self.buffer, self.start = buffer, start
        self.holes: list[Hole] = []

    def of(self, node: Any, slots: Any, depth: int, *, is_within: bool = False) -> Make | None:
        """Return what makes nodes like this one; None for one that may be shared.

        Arrays are noted as they are made: those `is_within` a struct around them by that.
        """
        if type(slots) is Slot and type(node) is bytes:
            return None
        if depth > DEEPEST or type(node) is not type(slots) or type(node) is Slot:
            raise _Unlike
        if type(node) is list:
            if len(node) != len(slots):
                raise _Unlike
            pairs = zip(node, slots, strict=True)
            makes = [self.of(*pair, depth + 1, is_within=is_within) for pair in pairs]
            return _lists(node, makes)
        if type(node) is not dict:
            return None
        if node.get("tag") == "datatype":
            _refuse_slots(node)
            return None
        if [*node] != [*slots]:
            raise _Unlike
        tag, found = node.get("tag"), {}
        is_array = rows.is_array(node)
        is_around = tag == "struct" and rows.is_array(rows.array_in(node))
        for key, child in node.items():
            make: Make | None
            is_slot = type(child) is Slot
            if tag in ("array", "struct") and key in ("type", "size"):
                _refuse_slots(child)
                make = None
            elif (
                type(slots[key]) is Slot and tag in ("array", "struct") and (key != "_" or is_slot)
            ):
                make = self.binary(slots[key], is_slot)
            elif is_array and key == "data" and type(child) is dict:
                make = self.place(child, slots)
            else:
                make = self.of(child, slots[key], depth + 1, is_within=is_around)
            if make is not None:
                found[key] = make
        return _dicts(node, found, is_noted=(is_array and not is_within) or is_around)

    def binary(self, slot: Slot, is_slot: bool) -> Make:
        start = slot.offset - self.start
        return self.hole(Hole(start, start + slot.nbytes, is_slot))

    def place(self, data: dict[str, Any], slots: dict[str, Any]) -> Make:
        """Return what gives where a payload lies; its place is just before the digest."""
        nbytes, digest = data.get("nbytes"), slots.get("blake3")
        if [*data] != ["offset", "nbytes"] or {*map(type, data.values())} != {int64()}:
            raise _Unlike
        if [*slots][-2:] != ["data", "blake3"] or type(digest) is not Slot or nbytes is None:
            raise _Unlike
        closed = DETACHED_TAIL[:8] + INT64.pack(nbytes) + b"\0" + DIGEST_ELEMENT
        at = digest.offset - len(closed) - 8
        is_there = self.buffer[at + 8 : digest.offset] == closed
        if not is_there or self.buffer[at - len(PLACE_ELEMENT) : at] != PLACE_ELEMENT:
            raise _Unlike
        if not 0 <= nbytes < FARTHEST:
            raise _Unlike
        return self.hole(Hole(at - self.start, at + 8 - self.start, placed_nbytes=int(nbytes)))

    def hole(self, hole: Hole) -> Make:
        index = len(self.holes)
        self.holes.append(hole)
        return lambda columns, count, arrays: columns[index]


def _refuse_slots(node: Any) -> None:
    """Let a node be that of all documents, unless it says where in one of them something is."""
    if type(node) is Slot:
        raise _Unlike
    if type(node) is dict or type(node) is list:
        for child in node.values() if type(node) is dict else node:
            _refuse_slots(child)


def _shared(node: Any) -> Make:
    return lambda columns, count, arrays: [node] * count


def _lists(node: list[Any], makes: list[Make | None]) -> Make:
    if not any(makes):
        return lambda columns, count, arrays: [[*node] for _ in range(count)]
    pairs = [*zip(node, makes, strict=True)]

    def make(columns: Columns, count: int, arrays: list[Any]) -> Iterable[Any]:
        elements = [
            itertools.repeat(child) if own is None else own(columns, count, arrays)
            for child, own in pairs
        ]
        return map(list, zip(*elements, strict=False))

    return make


def _dicts(node: dict[str, Any], makes: dict[str, Make], *, is_noted: bool) -> Make:
    """Return what makes dicts like `node`, and notes them as arrays if asked to."""
    keys, owns = [*makes], [*makes.values()]

    def make(columns: Columns, count: int, arrays: list[Any]) -> Iterable[Any]:
        values = [own(columns, count, arrays) for own in owns]
        if len(keys) == 1:
            (key,) = keys
            made = [{**node, key: value} for value in values[0]]
        elif len(keys) == 2:
            key, other = keys
            made = [{**node, key: a, other: b} for a, b in zip(*values, strict=True)]
        elif keys:
            rest = zip(*values, strict=True)
            made = [node | dict(zip(keys, own, strict=True)) for own in rest]
        else:
            made = [dict(node) for _ in range(count)]
        if is_noted:
            arrays.append(made)
        return made

    return make


def cut(buffer: Any, starts: Any, columns: slice) -> Any:
    """Return these bytes of what begins at each of `starts`, as a matrix: a view for a range."""
    nbytes = columns.stop - columns.start
    windows: Any = np.ndarray((len(buffer) - nbytes + 1, nbytes), np.uint8, buffer, 0, (1, 1))
    if type(starts) is range:
        first, last = starts[0] + columns.start, starts[-1] + columns.start
        return windows[first : last + 1 : starts.step]
    return windows[starts + columns.start]


class Likes:
    """Documents of one size that were read, each a Like once another of the size is met."""

    __slots__ = ("_last", "_left", "known")

    def __init__(self, *known: Like) -> None:
        self.known = [*known]
        self._left = _SHAPES  # that are looked at yet
        self._last: tuple[int, int, Any] | None = None

    def read(
        self, scanner: Any, start: int, like_of: Callable[[Any, int, int, Any], Like | None]
    ) -> tuple[Like, dict[str, Any], list[Any]] | None:
        """Return the document at `start` and what it is like; None where it is like none of these.

        `like_of(scanner, start, end, node)` makes a Like.
        """
        last, self._last = self._last, None
        if last is not None:
            like = like_of(scanner, *last)
            self._left -= 1
            if like is not None and not like.is_type:  # a type is shared, so in rows only
                self.known.append(like)
        for like in self.known:
            found = like.read(scanner.buffer, start)
            if found is not None:
                return like, *found
        return None

    def add(self, start: int, end: int, node: Any) -> None:
        """Take in a document that was read plainly, or is to be, if it is to be looked at."""
        if self._left > 0:
            self._last = start, end, node


def keep_like(nbytes: int, like_of: Callable[[], Like | None]) -> None:
    """Remember a document of a large array for other files, when one of its size is met again."""
    if nbytes not in _met:
        if len(_met) < _LIKES:
            _met.add(nbytes)
        return
    if nbytes in likes or len(likes) >= _LIKES:
        return
    like = like_of()
    if like is None or like.is_object or sum(len(part) for *_, part in like.parts) > _HEAD_NBYTES:
        return
    if not any(word in part for word in OF_ONE_FILE for *_, part in like.parts):
        likes[nbytes] = like


likes: dict[int, Like] = {}  # of all files: large arrays, by the nbytes of their documents
_met: set[int] = set()
