"""Elements that follow one another, read at once: each is like a document that was read before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpustore.layout import INT32, MAX_NAME_NBYTES, PAGE_NBYTES, ROW_NBYTES
from gpustore.likeness import FARTHEST, Like, Likes, cut
from gpustore.rows import FEWEST

FEW, MANY = 24, 4096  # elements that are looked at for others alike: at first, at most


class Run(NamedTuple):
    """Elements that were read: `groups` are of those that are like one document each.

    `arrays` are those in the nodes. A run of no nodes only says until where it was looked.
    """

    names: list[str]
    nodes: list[Any]
    end: int  # the offset just after the last element
    placed: tuple[int, int] | None = None  # from where to where detached payloads lie
    groups: tuple[tuple[Like, list[Any]], ...] = ()
    arrays: tuple[list[Any], ...] = ()


def read_row(
    buffer: Any, position: int, name_end: int, limit: int, pitch: int, like: Like
) -> Run | None:
    """Read the elements at a constant pitch from `position` on, of which the first one is `like`.

    None where there are too few, or where it is for the plain way to say what is wrong.
    """
    end = position + min(limit - position, ROW_NBYTES) // pitch * pitch
    starts = range(name_end + 1, end, pitch)
    starts = starts[: _count_alike(buffer, starts, pitch, like)]
    placed = None
    if len(starts) >= FEWEST and like.is_detached:
        found = _Found(buffer, np.arange(starts.start, starts.stop, starts.step))
        found.groups.append((like, np.arange(len(starts))))
        placed = found.place()
        starts = starts[: found.count]
    if len(starts) < FEWEST:
        return None
    try:
        names = cut(buffer, starts, slice(position - name_end, 0)).tobytes().decode()
    except UnicodeDecodeError:
        return None
    nodes, arrays = like.nodes(buffer, starts)
    own = names.split("\0")[:-1]
    return Run(own, nodes, position + pitch * len(nodes), placed, ((like, nodes),), (arrays,))


def _count_alike(buffer: Any, starts: range, pitch: int, like: Like) -> int:
    """Return how many documents, from the first one on, are like it, with names of one length.

    They are looked at in ever larger parts, so that a short row costs little.
    """
    done, count = 0, FEWEST
    while done < len(starts):
        part = starts[done : done + count]
        heads = cut(buffer, part, slice(like.nbytes - pitch, 0))
        are_alike = like.are_like(buffer, part) & (heads[:, 0] == 3) & (heads[:, -1] == 0)
        are_alike &= (heads[:, 1:-1] != 0).all(1)
        if not are_alike.all():
            return done + int(are_alike.argmin())
        done, count = done + len(part), 4 * count
    return done


def read_run(buffer: Any, position: int, limit: int, likes: Mapping[int, Likes], most: int) -> Run:
    """Read up to `most` elements from `position` on, as far as each is like one that was read.

    `likes` are by the nbytes of documents. A run of no nodes says until where fewer than FEWEST
    were found: those are for the plain way.
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
    if len(names) < FEWEST:
        return Run([], [], position)
    found = _Found(buffer, np.array(starts, np.int64))
    for nbytes, indices in members.items():
        found.match(likes[nbytes].known, np.array(indices))
    placed = found.place()
    if found.count < FEWEST:  # soon after a long run there may be another one
        return Run([], [], position if most == FEW else edges[found.count + 1])
    try:
        texts = b"\0".join(names[: found.count]).decode().split("\0")
    except UnicodeDecodeError:
        return Run([], [], position)
    return found.run(texts, edges[found.count], placed)


class _Found:
    """The documents at `starts`, the first `count` of which are like others."""

    def __init__(self, buffer: Any, starts: Any) -> None:
        self.buffer, self.starts, self.count = buffer, starts, len(starts)
        self.groups: list[tuple[Like, Any]] = []  # what they are like, and which

    def match(self, likes: list[Like], indices: Any) -> None:
        """Find what the documents of these indices, all of one size, are like."""
        for like in likes:
            are_like = like.are_like(self.buffer, self.starts[indices])
            own, indices = indices[are_like], indices[~are_like]
            if own.size:
                self.groups.append((like, own))
            if indices.size == 0:
                return
        self.count = min(self.count, int(indices[0]))

    def place(self) -> tuple[int, int] | None:
        """Return from where to where detached payloads lie; count those that lie well only.

        They do where they are aligned and soon after one another.
        """
        groups = [(like, own) for like, own in self.groups if like.is_detached]
        if not groups:
            return None
        first, last = np.zeros((2, len(self.starts)), np.int64)
        are_well, are_placed = np.ones(len(self.starts), bool), np.zeros(len(self.starts), bool)
        for like, indices in groups:
            offsets, sizes = like.places(self.buffer, self.starts[indices])
            own = (offsets % 64 == 0) & (offsets >= 0) & (offsets < FARTHEST)
            gaps = offsets[:, 1:] - (offsets + sizes)[:, :-1]
            own[:, 1:] &= (gaps >= 0) & (gaps < PAGE_NBYTES)
            first[indices], last[indices] = offsets[:, 0], offsets[:, -1] + sizes[-1]
            are_well[indices], are_placed[indices] = own.all(1), True
        having = np.flatnonzero(are_placed[: self.count])
        gaps = first[having[1:]] - last[having[:-1]]
        are_well[having[1:]] &= (gaps >= 0) & (gaps < PAGE_NBYTES)
        if not are_well[: self.count].all():
            self.count = int(are_well.argmin())
            having = having[having < self.count]
        return (int(first[having[0]]), int(last[having[-1]])) if having.size else None

    def run(self, names: list[str], end: int, placed: tuple[int, int] | None) -> Run:
        nodes: list[Any] = [None] * self.count
        groups, arrays = [], []
        for like, indices in self.groups:
            within = indices[indices < self.count]
            if not within.size:
                continue
            made, own = like.nodes(self.buffer, self.starts[within])
            groups.append((like, made))
            arrays.append(own)
            for index, node in zip(within.tolist(), made, strict=True):
                nodes[index] = node
        return Run(names, nodes, end, placed, tuple(groups), tuple(arrays))
