"""What lies where in a file: slots, payloads and plans, and the numbers of the format.

docs/format.md has the layout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from gpustore.digest import DIGEST_NBYTES

FORMAT_VERSION = 1
SLOT_NBYTES = 64 * 1024  # binaries from this size on are left where they lie
MAX_NAME_NBYTES = 64 * 1024
MAX_DEPTH = 200
INLINE_LIMIT = 2**31 - 1  # BSON lengths are signed 32-bit numbers
PAGE_ALIGNED_NBYTES = 1024 * 1024  # payloads from this size on begin on a page

INT32 = struct.Struct("<i")
INT64 = struct.Struct("<q")
DOUBLE = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a binary lies in a file: `offset` from the start of the file, both in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes to be streamed into a file: `chunks()` yields C-contiguous buffers, `nbytes` in all.

    A bare one is neither aligned nor given a digest: it counts as part of the structure.
    `device_array` is an array of CuPy whose row-major bytes they are, where there is one.
    """

    nbytes: int
    chunks: Callable[[], Iterable[Any]]
    is_bare: bool = False
    device_array: Any = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A subtree that is already encoded as a BSON document."""

    bson: bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Where a detached payload lies in the file, and where in the document its digest belongs."""

    offset: int
    digest: slice


@dataclass(frozen=True, slots=True)
class Plan:
    """What lies where in a file: structures[0], payloads[0], structures[1], ..., structures[-1].

    The digest of payloads[i] belongs at `PAYLOAD_DIGEST` of structures[i + 1], that of all
    structures (without itself) at `STRUCTURE_DIGEST` of the last one.
    """

    structures: list[bytearray]
    payloads: list[Payload]
    nbytes: int
    places: tuple[Place, ...] = ()  # of the payloads of a detached layout, after the document


DIGEST_ELEMENT = b"\x05blake3\0" + INT32.pack(DIGEST_NBYTES) + b"\0"
PAYLOAD_DIGEST = slice(len(DIGEST_ELEMENT), len(DIGEST_ELEMENT) + DIGEST_NBYTES)
STRUCTURE_DIGEST = slice(-2 - DIGEST_NBYTES, -2)  # two terminators follow it


class TooLong(Exception):
    """A document that does not fit the inline layout; never leaves this package."""
