"""What lies where in a file: slots, payloads and plans, and the numbers of the format.

docs/format.md has the layout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpustore.digest import DIGEST_NBYTES

FORMAT_VERSION = 1
STAMP = "_gpustore"  # the last element of a file, which ends with the digest
SLOT_NBYTES = 64 * 1024  # binaries from this size on are left where they lie
MAX_NAME_NBYTES = 64 * 1024
MAX_DEPTH = 200
INLINE_LIMIT = 2**31 - 1  # BSON lengths are signed 32-bit numbers
PAGE_ALIGNED_NBYTES = 1024 * 1024  # payloads from this size on begin on a page
PAGE_NBYTES = 4096  # between payloads there is less than that
ROW_NBYTES = 1024 * 1024  # of small documents in a row that are handled at once
TURNED_NBYTES = 2048  # arrays up to this size are turned into their order while a file is planned
# the code of a function, of so many bytes and not more, is decoded when it is used
DEFERRED_NBYTES, MOST_DEFERRED_NBYTES = 4096, 16 * 1024 * 1024
SMALL_NBYTES = 16 * 1024  # arrays up to this size are written in rows

INT32 = struct.Struct("<i")
INT64 = struct.Struct("<q")
DOUBLE = struct.Struct("<d")


class Slot(NamedTuple):
    """Where a binary lies in a file: `offset` from the start of the file, both in bytes."""

    offset: int
    nbytes: int


class Deferred:
    """A part of a document that is decoded when it is first asked for; `value` is what it is.

    That raises FormatError where the part is malformed.
    """

    def __init__(self, decode: Callable[[], Any]) -> None:
        self._decode: Callable[[], Any] | None = decode

    @property
    def value(self) -> Any:
        decode, known = self._decode, vars(self)
        if decode is not None:
            known.setdefault("known", decode())  # one and the same for all threads
            self._decode = None
        return known["known"]


@dataclass(slots=True, eq=False, repr=False)
class Payload:
    """Bytes to be streamed into a file: `chunks()` yields C-contiguous buffers, `nbytes` in all.

    A bare one is neither aligned nor given a digest: it counts as part of the structure. So it is
    with a row of elements, but for the payloads and digests in it: `make_row` yields buffers and
    what of them is structure. `content` is the C-contiguous host array of a small one,
    `device_array` the array of CuPy whose row-major bytes they are, where there is one; then they
    may be hashed, and written, before their turn comes. `is_host` says that any thread may ask for
    the chunks, `is_made` that they are made on the way, which takes as long as writing them: then
    each stays as it is until the next but one.
    """

    nbytes: int
    make_chunks: Callable[[], Iterable[Any]] | None
    is_bare: bool = False
    content: Any = None
    make_row: Callable[[], Iterable[tuple[Any, Any]]] | None = None
    device_array: Any = None
    digest: bytes | None = None
    is_written: bool = False
    is_host: bool = False
    is_made: bool = False

    def chunks(self) -> Iterable[Any]:
        if self.make_row is not None:
            return (octets for octets, _ in self.make_row())
        if self.make_chunks is None:
            return (self.content.reshape(-1).view("u1"),)
        return self.make_chunks()


class Encoded(NamedTuple):
    """A subtree that is already encoded: a BSON document, or with `kind` 4 an array.

    `depth` is how many levels of documents and arrays it has.
    """

    bson: bytes
    kind: int = 3
    depth: int = 1


class Place(NamedTuple):
    """Where a detached payload lies in the file, and where in the document its digest belongs.

    No digest belongs there for a row of payloads, which have theirs already.
    """

    offset: int
    digest: slice | None


class Plan(NamedTuple):
    """What lies where in a file: structures[0], payloads[0], structures[1], ..., structures[-1].

    The digest of payloads[i] belongs at `PAYLOAD_DIGEST` of structures[i + 1], that of all
    structures (without itself) at `STRUCTURE_DIGEST` of the last one.
    """

    structures: list[bytearray]
    payloads: list[Payload]
    nbytes: int
    places: tuple[Place, ...] = ()  # of the payloads of a detached layout, after the document


# how the documents of arrays and structs begin, and what is before the data of arrays
ARRAY_HEAD = b"\x02tag\0\x06\0\0\0array\0\x03type\0"
STRUCT_HEAD = b"\x02tag\0\x07\0\0\0struct\0\x03type\0"
DATA_ELEMENT = b"\x05data\0"
PLACE_ELEMENT = b"\x03data\0" + INT32.pack(37) + b"\x12offset\0"
DIGEST_ELEMENT = b"\x05blake3\0" + INT32.pack(DIGEST_NBYTES) + b"\0"
DETACHED_TAIL = b"\x12nbytes\0" + bytes(8) + b"\0"  # what follows an offset in `data`
PAYLOAD_DIGEST = slice(len(DIGEST_ELEMENT), len(DIGEST_ELEMENT) + DIGEST_NBYTES)
STRUCTURE_DIGEST = slice(-2 - DIGEST_NBYTES, -2)  # two terminators follow it


class TooLong(Exception):
    """A document that does not fit the inline layout; never leaves this package."""
