"""What was made of which document: made once, given wherever it is met again, and let go of."""

from __future__ import annotations

import itertools
from typing import Any

from gpustore.document import Slot
from gpustore.julia import Source
from gpustore.specs import nbytes_of

MAX_SHARED = 100_000
MAX_WEIGHT = 1_000_000


class Memo:
    """What was made of the documents of one file, and how much of them several values share.

    Few bytes could else stand for many.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.resolve, self.malformed = source.resolve, source.malformed
        self.memo: dict[int, Any] = {}  # id of a document or list, -n of backref n -> its value
        self.parents: dict[int, Any] = {}  # id of an array document -> it in row-major order
        self.parts: dict[int, None] = {}  # ids of those that `once` was asked about
        self.weights: dict[int, tuple[int, Any]] = {}  # of tuples that hold tuples
        self.shared = 0  # elements and bytes of lists and binaries that are parts of several values

    def part(self, node: Any, path: str) -> Any:
        """Return what a node stands for; lists and binaries that several values share are counted.

        BSON.jl never shares the list of a struct's fields.
        """
        found = self.resolve(node, path)
        if found is not node and not isinstance(found, dict):
            self.count_shared(found, path)
        return found

    def once(self, node: Any, path: str) -> Any:
        """Return what a node stands for; it is counted when several values are made of it."""
        found = self.resolve(node, path)
        payload = found.get("data") if isinstance(found, dict) else found
        if id(found) in self.parts:
            self.count_shared(self.resolve(payload, path), path)
        self.parts[id(found)] = None
        return found

    def count_shared(self, found: Any, path: str) -> None:
        sized = isinstance(found, (list, str, bytes, Slot))
        self.shared += nbytes_of(found) if sized else 0
        if self.shared > MAX_SHARED:
            raise self.malformed(
                path, f"values share parts of more than {MAX_SHARED} elements or bytes in all"
            )

    def weigh(self, made: tuple[Any, ...], path: str) -> None:
        """Refuse a tuple that is large where nothing in it is shared.

        Hashing and comparing go through all of it.
        """
        inner = [part for part in made if type(part) is tuple]
        if inner:
            weight = len(made) + sum(self.weights.get(id(part), (len(part),))[0] for part in inner)
            if weight > MAX_WEIGHT:
                raise self.malformed(path, f"a tuple of tuples has more than {MAX_WEIGHT} parts")
            self.weights[id(made)] = weight, made

    def forget(self, since: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Let go of what is known of documents that may be gone; backrefs stay, and what they are.

        Their ids may soon be those of others. All from `since` on is looked at.
        """
        for known, count in zip((self.memo, self.parents, self.parts), since, strict=True):
            for key in [*itertools.islice(reversed(known), len(known) - count)]:
                if key not in self.source.alive:
                    del known[key]
        if since == (0, 0, 0):
            values = {*map(id, self.memo.values())}
            self.weights = {key: self.weights[key] for key in self.weights.keys() & values}
