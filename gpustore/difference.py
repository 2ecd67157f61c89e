"""What differs between two files: structure first, then values, and by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore import devices, listing, notebook, tree
from gpustore.figures import Deviation, deviation
from gpustore.julia import JuliaType, LostArray, OpaqueFunction, Struct
from gpustore.stored import StoredFile
from gpustore.values import Entries, JuliaSet
from gpustore.verify import Progress, Report, counted

_Part = tuple[str, Any]
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Change:
    """A difference at one path: `kind` is "added", "removed" or "changed"; `text` says what."""

    kind: str
    path: str
    text: str
    deviation: Deviation | None = None


@dataclass(slots=True)
class Difference:
    """All changes from one file to another, in the order of their values; `same` counts the rest.

    It is true where something differs.
    """

    changes: list[Change] = field(default_factory=list)
    same: int = 0

    def __bool__(self) -> bool:
        return bool(self.changes)

    def count(self, kind: str) -> int:
        return sum(change.kind == kind for change in self.changes)


def difference(
    a: StoredFile, b: StoredFile, *, tolerance: float = 0.0, progress: Progress | None = None
) -> Difference:
    """Return what was added, removed and changed from one open file to another.

    Values are compared by path. Numbers at most `tolerance` apart are the same, as are NaN and NaN;
    devices, memory order and digests are no part of a value. What is one array or object in one
    file and two in the other has changed. Arrays are streamed.

    >>> import gpustore as gs, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     old, new = (os.path.join(folder, name) for name in ("old.bson", "new.bson"))
    ...     gs.save(old, epoch=3, w=np.array([3.0, 4.0]))
    ...     gs.save(new, epoch=4, w=np.array([3.0, 4.5]))
    ...     with gs.open_file(old) as a, gs.open_file(new) as b:
    ...         for change in difference(a, b).changes:
    ...             print(change.kind, change.path, change.text, sep=": ")
    changed: epoch: 3 -> 4
    changed: w: float64 (2,): 1 of 2 elements differ, by 0.5 at most (0.1 of the norm)
    """
    total = sum(entry.nbytes for stored in (a, b) for entry in stored.arrays)
    return _Comparison(tolerance, counted(progress, total)).of(a.value(), b.value())


class _Comparison:
    """One walk over two values side by side."""

    def __init__(self, tolerance: float, report: Report) -> None:
        self.tolerance, self.report = tolerance, report
        self.found = Difference()
        self.first: tuple[dict[int, str], dict[int, str]] = {}, {}  # the paths of objects, by id
        self.compared: set[tuple[int, int]] = set()

    def of(self, a: Any, b: Any) -> Difference:
        stack = _pairs("", _entries(a), _entries(b))
        while stack:
            path, x, y = stack.pop()
            if x is _ABSENT or y is _ABSENT:
                kind, part = ("added", y) if x is _ABSENT else ("removed", x)
                self.change(kind, path, _described(part))
                continue
            parts = _parts(x), _parts(y)
            if any(parts) or devices.is_array(x) or devices.is_array(y):
                self.compare_sharing(path, x, y)
                if (id(x), id(y)) in self.compared:
                    continue
                self.compared.add((id(x), id(y)))
            if not all(parts):
                self.compare_leaves(path, x, y)
                continue
            if (titles := (_title(x), _title(y)))[0] != titles[1]:
                self.change("changed", path, f"{titles[0]} -> {titles[1]}")
            stack.extend(_pairs(path, *parts))
        return self.found

    def change(self, kind: str, path: str, text: str, found: Deviation | None = None) -> None:
        self.found.changes.append(Change(kind, path, text, found))

    def compare_sharing(self, path: str, x: Any, y: Any) -> None:
        """Note where an object has been met before in one file, and not so in the other."""
        if isinstance(x, tuple) or isinstance(y, tuple):
            return
        firsts = [
            known.setdefault(id(node), path) for known, node in zip(self.first, (x, y), strict=True)
        ]
        if firsts[0] != firsts[1]:
            before, after = (
                "its own" if first == path else f"one with {first}" for first in firsts
            )
            self.change("changed", path, f"{before} -> {after}")

    def compare_leaves(self, path: str, x: Any, y: Any) -> None:
        if devices.is_array(x) and devices.is_array(y):
            self.compare_arrays(path, x, y)
        elif _is_same(x, y, self.tolerance):
            self.found.same += 1
        else:
            self.change("changed", path, f"{_described(x)} -> {_described(y)}")

    def compare_arrays(self, path: str, x: Any, y: Any) -> None:
        kinds = [f"{array.dtype} {array.shape}" for array in (x, y)]
        is_numeric = tree.is_numeric(x) and tree.is_numeric(y)
        found = None
        if x.shape == y.shape and (is_numeric or x.dtype == y.dtype):
            found = deviation(x, y, self.tolerance, self.report)
        if kinds[0] != kinds[1]:
            values = f": {_apart(found)}" if found and found.differing else ""
            self.change("changed", path, f"{kinds[0]} -> {kinds[1]}{values}", found)
        elif found and found.differing:
            self.change("changed", path, f"{kinds[0]}: {_apart(found)}", found)
        else:
            self.found.same += 1


def _pairs(path: str, ours: list[_Part], theirs: list[_Part]) -> list[tuple[str, Any, Any]]:
    """Return the parts of both by path, last one first: _ABSENT where only one has it."""
    others = dict(theirs)
    pairs = [(path + suffix, part, others.pop(suffix, _ABSENT)) for suffix, part in ours]
    return (pairs + [(path + suffix, _ABSENT, part) for suffix, part in others.items()])[::-1]


def _entries(value: Any) -> list[_Part]:
    """Return the parts of a file's value; entries begin paths by their names."""
    if type(value) in (dict, Entries) and all(isinstance(key, str) for key in value):
        return list(value.items())
    return [("value", value)]


def _parts(node: Any) -> list[_Part]:
    """Return the parts of a container; members of a set that are themselves alone, by order."""
    if isinstance(node, JuliaSet) and any(_is_itself_alone(member) for member in node.order):
        return [(f"{{{number}}}", member) for number, member in enumerate(node.order)]
    return [] if devices.is_array(node) else tree.children(node)


def _is_itself_alone(member: Any) -> bool:
    hashing: Any = type(member).__hash__
    return hashing is object.__hash__


def _title(node: Any) -> str:
    """Return what two containers must have in common, whatever is in them."""
    if isinstance(node, OpaqueFunction):
        return listing.rendered(node)
    if isinstance(node, Struct):
        return repr(node.type)
    return "dict" if type(node) is Entries else type(node).__name__


def _described(node: Any) -> str:
    if isinstance(node, OpaqueFunction):
        return f"Julia function {listing.rendered(node)}"
    if not _parts(node):
        return notebook.leaf_text(node)
    held = notebook.arrays_text(node)
    return notebook.title_text(node) + (f", {held}" if held else "")


def _is_same(x: Any, y: Any, tolerance: float) -> bool:
    if type(x) is not type(y):
        return False
    if isinstance(x, OpaqueFunction):
        return listing.rendered(x) == listing.rendered(y)
    if isinstance(x, Struct):
        return repr(x.type) == repr(y.type) and x.data == y.data
    if isinstance(x, LostArray):
        return repr(x) == repr(y)
    if isinstance(x, (float, np.inexact)):
        is_nan = bool(np.isnan(x)) and bool(np.isnan(y))
        return is_nan or bool(x == y) or bool(abs(x - y) <= tolerance)
    if isinstance(x, (str, bytes, int, set, frozenset, JuliaType)):
        return bool(x == y)
    return x is y or repr(x) == repr(y)


def _apart(found: Deviation) -> str:
    text = f"{found.differing} of {found.count} elements differ"
    if found.largest is None or found.relative is None:
        return text
    if math.isnan(found.largest):
        return f"{text}, numbers and NaN among them"
    return f"{text}, by {found.largest:.3g} at most ({found.relative:.3g} of the norm)"
