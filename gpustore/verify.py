"""Integrity: every digest of a file against the bytes it was made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpustore import document
from gpustore.digest import blake3_digest, hasher
from gpustore.document import Slot
from gpustore.storage import MappedFile

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found: names of damaged parts, and how many arrays were checked."""

    damaged: tuple[str, ...]
    arrays: int
    has_structure_digest: bool

    def __bool__(self) -> bool:
        return not self.damaged


def verify_file(
    file: MappedFile, progress: Progress | None, path_at: Callable[[int], str]
) -> Verification:
    """Check every digest of a file against the bytes it was made of.

    `path_at(offset)` names the array whose payload begins there.

    `damaged` holds the paths of arrays, and "structure" where the rest of the file differs. A
    file that Julia wrote has no digests: nothing is checked.
    """
    content = document.scan(file.buffer, name=file.path, slot_nbytes=0)
    payloads: list[tuple[Slot, Slot]] = []
    for node in document.walk(content):
        data, digest = node.get("data"), node.get("blake3")
        if node.get("tag") == "array" and isinstance(data, Slot) and isinstance(digest, Slot):
            payloads.append((data, digest))
    damaged: list[str] = []
    view = memoryview(file.buffer)
    done = 0
    for data, digest in payloads:
        expected = bytes(view[digest.offset : digest.offset + digest.nbytes])
        if blake3_digest(view[data.offset : data.offset + data.nbytes]) != expected:
            damaged.append(path_at(data.offset))
        done += data.nbytes
        if progress is not None:
            progress(done, file.nbytes)
    stamp = content.get("_gpustore", {})
    digest = stamp.get("blake3") if isinstance(stamp, dict) else None
    if not isinstance(digest, Slot):
        if payloads or any(map(_is_stamp, content.values())):
            damaged.append("structure")  # its own digest is gone: a file of ours has one
    elif not _is_structure_whole(view, [data for data, _ in payloads], digest):
        damaged.append("structure")
    return Verification(tuple(damaged), len(payloads), isinstance(digest, Slot))


def _is_stamp(node: Any) -> bool:
    """Whether a top-level value is the `_gpustore` of a file whose key for it was damaged."""
    return isinstance(node, dict) and node.keys() >= {"version", "writer", "layout", "blake3"}


def _is_structure_whole(view: memoryview, payloads: list[Slot], digest: Slot) -> bool:
    """Whether the digest is that of all bytes outside payloads and outside the digest itself."""
    whole, position = hasher(), 0
    for slot in sorted([*payloads, digest], key=lambda slot: slot.offset):
        whole.update(view[position : slot.offset])
        position = slot.offset + slot.nbytes
    whole.update(view[position:])
    found: bytes = whole.digest()
    return found == bytes(view[digest.offset : digest.offset + digest.nbytes])
