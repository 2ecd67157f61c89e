"""The parts of a document that are read in the likeness of others, and which these were."""

from __future__ import annotations

import itertools
from typing import Any

from gpustore import likeness, rows, runs, tagged
from gpustore.errors import FormatError
from gpustore.layout import DIGEST_ELEMENT, ROW_NBYTES, SLOT_NBYTES

_MOST = 2  # times the bytes of a buffer
MANY = 256  # kinds of elements, and of what is kept of them


class Repeats:
    """What was read at once or in the likeness of others, by one scanner.

    `arrays` are the nodes of what may be an array, or be around one, in lists of those alike;
    `alike` says what a node was read like, by id.
    """

    def __init__(self, nbytes: int) -> None:
        self.left = _MOST * nbytes  # of documents that hold arrays, and may hold one another
        # id of a run's first node -> how many it has, and from where to where their payloads lie
        self.runs: dict[int, tuple[int, tuple[int, int] | None]] = {}
        self.is_detached = False  # whether payloads of a run lie after the document
        self.likes: dict[int, likeness.Likes] = {}  # by the nbytes of documents
        self.arrays: list[list[Any]] = []
        self.alike: dict[int, likeness.Like] = {}
        self.kept: list[Any] = []  # nodes whose ids are noted, should what they are in be refused
        self.types: set[int] = set()  # ids of those that stand for many

    def read(
        self, scanner: Any, start: int, end: int, depth: int
    ) -> tuple[dict[str, Any], int, bool] | None:
        """Return what `Scanner.tagged_at` does, of the document from `start` to `end`."""
        nbytes = end - start
        is_of_any_file = nbytes >= scanner.slot_nbytes == SLOT_NBYTES
        likes = self.likes.get(nbytes)
        if likes is None and is_of_any_file and nbytes in likeness.likes:
            likes = self.likes[nbytes] = likeness.Likes(likeness.likes[nbytes])
        alike = None if likes is None else likes.read(scanner, start, like_of)
        if alike is not None:
            like, known, arrays = alike
            self.arrays += arrays
            if like.is_object or likeness.likes.get(nbytes) is like:
                self.alike[id(known)] = like
                self.kept.append(known)
            return known, end, True
        node = tagged.read(scanner, start, end, depth)
        # objects are read with others, by the codec, until one is found that is like another
        is_array = node is not None and rows.is_array(rows.array_in(node))
        may_repeat = is_array or self.may_hold_arrays(scanner, start, end)
        if may_repeat and (nbytes in self.likes or len(self.likes) < MANY):
            self.likes.setdefault(nbytes, likeness.Likes()).add(start, end, node)
        if node is None:
            return None
        if is_of_any_file and is_array:
            likeness.keep_like(nbytes, lambda: like_of(scanner, start, end, node))
        if "data" in node:
            self.arrays.append([node])
        return node, end, False

    def may_hold_arrays(self, scanner: Any, start: int, end: int) -> bool:
        """Whether a document that others are read with holds a digest.

        Of those within one another so many are looked at that it takes no more than a few times
        as long as reading the buffer.
        """
        if end - start >= min(scanner.slot_nbytes or ROW_NBYTES, ROW_NBYTES) or self.left < 0:
            return False
        self.left -= end - start
        found: int = scanner.buffer.find(DIGEST_ELEMENT, start, end)
        return found >= 0

    def row(
        self, scanner: Any, position: int, name_end: int, limit: int, pitch: int
    ) -> runs.Run | None:
        """Read a row of documents alike; None where there is none."""
        like = like_of(scanner, name_end + 1, position + pitch)
        if like is None:
            return None
        return runs.read_row(scanner.buffer, position, name_end, limit, pitch, like)

    def note(self, run: runs.Run) -> None:
        """Take in a run that is part of the document."""
        for found in run.arrays:
            self.arrays += found
        self.kept.append(run.nodes)
        for like, nodes in run.groups:
            if like.is_object:
                self.alike.update(zip(map(id, nodes), itertools.repeat(like), strict=False))
        first = run.nodes[0]
        if run.groups[0][0].is_type:  # one node for all of a row
            self.types.add(id(first))
        else:
            self.runs[id(first)] = len(run.nodes), run.placed
        self.is_detached = self.is_detached or run.placed is not None


def like_of(scanner: Any, start: int, end: int, node: Any = None) -> likeness.Like | None:
    """Return what documents like the one from `start` to `end` are read by, if there is that.

    `node` is what it was read as; without it, it is read here.
    """
    own, again = scanner.plain(scanner.slot_nbytes), scanner.plain(0)
    own.shared = scanner.shared
    try:
        if node is None:
            node, *_ = own.tagged_at(start, end, 1) or own.document(start, end, 1)
        slots, _ = again.document(start, end, 1)
    except FormatError:
        return None
    are_dicts = type(node) is dict and type(slots) is dict
    return likeness.Like.of(scanner.buffer, start, end, node, slots) if are_dicts else None
