"""Bytes <-> neutral document: the layout of a file, with no Julia, no dtypes and no GPU.

A neutral document is what PyMongo's codec gives: dict, list, str, bytes, float, bool, None, `int`
(BSON int32) and `bson.int64.Int64` (BSON int64). Leaves are added. `scan` puts a `Slot` in the
place of each large binary, so that nothing large is read, and where it is lazy a `Deferred` in that
of the code of each long function; `plan` takes a `Payload` in the place of bytes that are to be
streamed into the file, and a `SmallArray`, or a `Row` of them, in that of their documents.
docs/format.md has the layout.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from gpustore.encoder import DetachedEncoder, Encoder, int64
from gpustore.errors import FormatError, UnsupportedValueError
from gpustore.layout import (
    FORMAT_VERSION,
    INLINE_LIMIT,
    MAX_DEPTH,
    MAX_NAME_NBYTES,
    PAGE_ALIGNED_NBYTES,
    PAGE_NBYTES,
    PAYLOAD_DIGEST,
    SLOT_NBYTES,
    STAMP,
    STRUCTURE_DIGEST,
    Deferred,
    Encoded,
    Payload,
    Place,
    Plan,
    Slot,
    TooLong,
)  # fmt: skip
from gpustore.scanner import Scanner
from gpustore.small import Row, SmallArray

__all__ = [
    "FORMAT_VERSION", "INLINE_LIMIT", "MAX_DEPTH", "MAX_NAME_NBYTES", "PAGE_ALIGNED_NBYTES",
    "PAYLOAD_DIGEST", "SLOT_NBYTES", "STRUCTURE_DIGEST", "Deferred", "Encoded", "Found", "Parts",
    "Payload", "Place", "Plan", "Slot", "depth", "encode", "int64", "parts", "plan", "scan",
]  # fmt: skip


def plan(document: dict[str, Any], *, writer: str, layout: str = "auto") -> Plan:
    """Lay out the segments of a file that holds `document`, `_gpustore` last.

    "inline": payloads lie in the document, aligned to 64 bytes (4096 from 1 MiB on) by a binary `_`
    of zeros before each, and followed by a place for the digest. "detached": they follow it. "auto"
    is inline while the file stays below 2**31 bytes. Inline beyond that gives -1 for lengths that
    BSON cannot say; one payload must be below 2**31 bytes, or UnsupportedValueError is raised.

    >>> laid_out = plan({"epoch": 3}, writer="example")
    >>> laid_out.nbytes == len(laid_out.structures[0])
    True
    """
    if layout != "detached":
        encoder = Encoder(may_be_long=layout == "inline")
        try:
            encoder.document(document, trailer=trailer(writer, "inline"))
            return encoder.finish()
        except TooLong as error:
            if layout == "inline":
                raise UnsupportedValueError(
                    f"layout='inline': {error}; leave layout at 'auto', or ask for 'detached'"
                ) from None
    encoder = DetachedEncoder()
    encoder.document(document, trailer=trailer(writer, "detached"))
    return encoder.finish()


def trailer(writer: str, layout: str) -> dict[str, Any]:
    """Return what `_gpustore` says, but for the digest."""
    return {"version": int64()(FORMAT_VERSION), "writer": writer, "layout": layout}


def encode(node: dict[str, Any] | list[Any]) -> Encoded:
    """Return a document or array without payloads, encoded by PyMongo's codec."""
    import bson

    if isinstance(node, dict):
        return Encoded(bson.encode(node), depth=depth(node))
    return Encoded(bson.encode({"": node})[6:-1], kind=4, depth=depth(node))


def depth(node: Any) -> int:
    """Return how many levels of documents and arrays a node has."""
    if isinstance(node, (SmallArray, Row)):
        return node.alike.levels
    if isinstance(node, Encoded):
        return node.depth
    if not isinstance(node, (dict, list)):
        return 0
    return 1 + max(map(depth, node.values() if isinstance(node, dict) else node), default=0)


class Found:
    """What was found in a document, but for parts of it that were decoded whole.

    `arrays` are the nodes that may be arrays, or structs around them, in lists of which those of
    more than one node are of nodes alike. `alike` says by the ids of nodes which are alike: those
    that have the same value. Nodes alike differ in payloads and digests only.
    """

    def __init__(self) -> None:
        self.arrays: list[list[Any]] = []
        self.alike: Mapping[int, Any] = {}


def scan(
    buffer: Any,
    *,
    name: str = "buffer",
    slot_nbytes: int = SLOT_NBYTES,
    found: Found | None = None,
    is_lazy: bool = False,
) -> dict[str, Any]:
    """Return the document at the start of `buffer` (bytes, bytearray or mmap), checked.

    Each binary of `slot_nbytes` or more is a `Slot`, and in large documents the data of an array
    from a page on; documents smaller than that are decoded whole by PyMongo's codec. What follows
    the document is not looked at. A length of -1 means that the document ends at its terminator
    (docs/format.md). What is found on the way is put into `found`. Where the scan `is_lazy`, the
    code of long functions is `Deferred`. Raises TruncatedFileError or FormatError.

    >>> scan(bytes.fromhex("0c0000001061000100000000"))
    {'a': 1}
    """
    scanner = Scanner(buffer, name, slot_nbytes, is_lazy=is_lazy)
    document, end = scanner.document(0, len(buffer), 0)
    assert isinstance(document, dict)
    stamp = document.get(STAMP)
    if isinstance(stamp, dict) and stamp.get("layout") == "detached":
        if scanner.has_deferred:  # where its payloads lie is to be checked
            return scan(buffer, name=name, slot_nbytes=slot_nbytes, found=found)
        _attach(document, end, len(buffer), scanner)
    elif scanner.repeats.is_detached:
        raise _nothing_behind(name)
    if found is not None:
        found.arrays, found.alike = scanner.repeats.arrays, scanner.repeats.alike
    return document


class Parts:
    """The elements of an outermost document, each decoded when it is first asked for."""

    def __init__(self, scanner: Scanner, spans: dict[str, tuple[int, int, int]]) -> None:
        self._scanner, self._spans = scanner, spans
        self._decoded: dict[str, Any] = {}
        self.alike: Mapping[int, Any] = scanner.repeats.alike  # as in Found, of what is decoded

    def __contains__(self, key: str) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def document(self, *keys: str) -> dict[str, Any]:
        """Return the document of these elements only, of those that there are."""
        for key in self._spans.keys() & keys - self._decoded.keys():
            kind, start, end = self._spans[key]
            self._decoded[key], _ = self._scanner.value(kind, start, end, 0)
        if self._scanner.repeats.is_detached:
            raise _nothing_behind(self._scanner.name)
        return {key: self._decoded[key] for key in keys if key in self._spans}


def parts(buffer: Any, *, name: str = "buffer") -> Parts | None:
    """Return the elements of the document that `scan` would decode whole.

    None where it is to be scanned: payloads follow it, it has many elements, or is malformed.
    """
    scanner = Scanner(buffer, name, SLOT_NBYTES, is_lazy=True)
    spans = scanner.spans(0)
    if spans is None:
        return None
    found = Parts(scanner, spans)
    stamp = found.document(STAMP).get(STAMP)
    return None if isinstance(stamp, dict) and stamp.get("layout") == "detached" else found


def _nothing_behind(name: str) -> FormatError:
    return FormatError(f"{name}: arrays are said to lie after a document that has none there")


def _attach(document: dict[str, Any], end: int, limit: int, scanner: Scanner) -> None:
    """Put a Slot in the place of each `data: {offset, nbytes}` of a detached layout, checked.

    Payloads lie after the `end` of the document, within the file, aligned, in the order of the
    document. Those of rows are Slots already.
    """
    start = end
    shared = {id(kind) for kind, _ in scanner.shared.values()} | scanner.repeats.types
    stack: list[Iterator[Any]] = [iter(document.values())]
    while stack:
        for node in stack[-1]:
            if type(node) is list:
                stack.append(iter(node))
                break
            if type(node) is not dict:
                continue
            data: Any = node.get("data")
            if id(node) in shared:
                continue
            count, placed = scanner.repeats.runs.get(id(node), (1, None))
            if count > 1:  # the rest lies as the first one does
                collections.deque(itertools.islice(stack[-1], count - 1), maxlen=0)
                if placed is None:
                    continue
                data = Slot(placed[0], placed[1] - placed[0])
            elif type(data) is dict and node.get("tag") == "array" and "offset" in data:
                data = node["data"] = _slot(data, scanner.name)
            elif type(data) is list and id(node.get("type")) in shared:
                stack.append(iter(data))  # its type holds no payload
                break
            else:
                stack.append(iter(node.values()))
                break
            if data.offset < start or data.offset % 64:
                raise _misplaced(scanner.name, start, data.offset)
            if data.offset + data.nbytes > limit:
                found = max(limit - data.offset, 0)
                raise scanner.truncated(data.offset, data.nbytes, found)
            if data.offset >= start + PAGE_NBYTES:
                raise _misplaced(scanner.name, start, data.offset)
            start = data.offset + data.nbytes
        else:
            stack.pop()
    if start != limit and start > end:
        raise FormatError(
            f"{scanner.name}: expected the file to end with its last array at byte {start}, found "
            f"{limit - start} bytes more; the file is damaged"
        )


def _slot(data: dict[str, Any], name: str) -> Slot:
    for number in (data["offset"], data.get("nbytes")):
        if type(number) is not int64() or number < 0:
            raise FormatError(f"{name}: a detached array is said to lie at {data!r}; it is damaged")
    return Slot(data["offset"], data["nbytes"])


def _misplaced(name: str, start: int, found: int) -> FormatError:
    return FormatError(
        f"{name}: expected a detached array at a multiple of 64 from byte {start} on, and within "
        f"{PAGE_NBYTES} bytes of it, found one at {found}; the file is damaged"
    )
