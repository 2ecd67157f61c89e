"""Integrity: every digest of a file against the bytes it was made of."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

from gpustore import document, rows
from gpustore.digest import digests, hasher
from gpustore.document import Slot
from gpustore.layout import STAMP
from gpustore.storage import MappedFile

Progress = Callable[[int, int], None]
Report = Callable[[int], None]
_SMALL_NBYTES, _AT_ONCE = 16 * 1024, 1000
_ARRAY_KEYS = {"tag", "type", "size", "_", "device", "dtype", "python", "data", "blake3"}


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found; true where nothing is damaged.

    `damaged` are the paths of damaged arrays, and "structure" for all that is no array. `arrays`
    is how many have a digest. Files of Julia have none, and `has_structure_digest` is False.
    """

    damaged: tuple[str, ...]
    arrays: int
    has_structure_digest: bool

    def __bool__(self) -> bool:
        return not self.damaged


class Digests:
    """The digests that a file holds, and the bytes that each was made of.

    A file that Julia wrote has none.
    """

    def __init__(self, file: MappedFile) -> None:
        found = document.Found()
        content = document.scan(file.buffer, name=file.path, slot_nbytes=0, found=found)
        self._view = memoryview(file.buffer)
        # of each array: its data and their digest
        self.payloads = _digested(content, found.arrays)
        stamp = content.get(STAMP, {})
        digest = stamp.get("blake3") if isinstance(stamp, dict) else None
        self.has_structure_digest = isinstance(digest, Slot)
        if isinstance(digest, Slot):
            self.is_structure_whole = self._is_whole(digest)
        else:  # its own digest may be gone: a file of ours has one
            self.is_structure_whole = not (self.payloads or any(map(_is_stamp, content.values())))

    def _is_whole(self, digest: Slot) -> bool:
        """Whether it is that of all bytes outside payloads and outside the digest itself."""
        whole, position = hasher(), 0
        for slot in sorted(
            [*(data for data, _ in self.payloads), digest], key=lambda slot: slot.offset
        ):
            whole.update(self._view[position : slot.offset])
            position = slot.offset + slot.nbytes
        whole.update(self._view[position:])
        return bool(whole.digest() == self._bytes(digest))

    def damaged(
        self, path_at: Callable[[int], str], report: Report, checked: Container[int] = ()
    ) -> tuple[str, ...]:
        """Return the paths of arrays whose digest differs, and "structure" where the rest does.

        `path_at(offset)` names the array whose payload begins there; arrays at offsets that are
        `checked` are not read. `report` is told the size of each of the others.
        """
        found = []
        for first in range(0, len(self.payloads), _AT_ONCE):
            part = self.payloads[first : first + _AT_ONCE]
            wanted = [pair for pair in part if pair[0].offset not in checked]
            small = [data for data, _ in wanted if data.nbytes < _SMALL_NBYTES]
            # together, as copies: faster than views of each
            own = dict(zip(small, digests(map(bytes, map(self._bytes, small))), strict=True))
            report(sum(data.nbytes for data in small))
            for data, digest in wanted:
                known = own.get(data)
                if known is None:
                    known = hasher(data.nbytes).update(self._bytes(data)).digest()
                    report(data.nbytes)
                if known != self._bytes(digest):
                    found.append(path_at(data.offset))
        return (*found, *([] if self.is_structure_whole else ["structure"]))

    def _bytes(self, slot: Slot) -> memoryview:
        return self._view[slot.offset : slot.offset + slot.nbytes]


def _digested(content: Any, groups: Iterable[list[Any]]) -> list[tuple[Slot, Slot]]:
    """Return the data and the digest of each array document that has both, in the order of data.

    The nodes in a group are alike: they are looked at together, all others in `content` one by one.
    """
    found: list[tuple[Slot, Slot]] = []
    known: set[int] = set()
    stack = [content]
    for nodes in groups:
        first = rows.array_in(nodes[0])
        is_usual = first is nodes[0] or [*nodes[0]] == ["tag", "type", "data"]
        if is_usual and _is_digested(first) and first.keys() <= _ARRAY_KEYS:
            inner = rows.arrays_in(nodes)
            fresh = [node for node in inner if id(node) not in known]  # one may be in two groups
            found += [(node["data"], node["blake3"]) for node in fresh]
            known.update(map(id, inner), map(id, nodes))
            stack += (nodes[0].get("type"), first.get("type"))
    while stack:
        node = stack.pop()
        if type(node) is list:
            stack += node
        elif type(node) is dict and id(node) not in known:
            known.add(id(node))  # types may be shared
            if _is_digested(node):
                found.append((node["data"], node["blake3"]))
            stack += node.values()  # its type may hold others
    return sorted(found)


def _is_digested(node: Any) -> bool:
    return rows.is_array(node) and type(node.get("data")) is type(node.get("blake3")) is Slot


def verify_file(
    file: MappedFile, progress: Progress | None, path_at: Callable[[int], str]
) -> Verification:
    """Check every digest of a file against the bytes it was made of.

    `path_at(offset)` names the array whose payload begins there.

    `damaged` holds the paths of arrays, and "structure" where the rest of the file differs. A
    file that Julia wrote has no digests: nothing is checked.
    """
    own = Digests(file)
    damaged = own.damaged(path_at, counted(progress, file.nbytes))
    return Verification(damaged, len(own.payloads), own.has_structure_digest)


def counted(progress: Progress | None, total: int) -> Report:
    """Return a function to be told numbers of bytes; `progress` hears their sum, up to `total`."""
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if progress is not None:
            progress(done, total)

    return report


def _is_stamp(node: Any) -> bool:
    """Whether a top-level value is the `_gpustore` of a file whose key for it was damaged."""
    return isinstance(node, dict) and node.keys() >= {"version", "writer", "layout", "blake3"}
