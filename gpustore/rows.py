"""Rows of array documents alike, as many small arrays make them: by columns, not one by one.

Elements whose documents differ only in the bytes of their name, payload or place, and digest lie
at a constant pitch. One of a row is read or written as any other; the rest is compared with it, or
made of it, as a matrix of bytes. Nodes of a row share their `type` and `size` objects.

Row-major arrays are such documents within a struct of one field; "the array document of a node" is
the node itself or that field.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from gpustore.digest import DIGEST_NBYTES, contents
from gpustore.layout import (
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    PAGE_NBYTES,
    ROW_NBYTES,
    Slot,
)

# what a document of this package begins with -> the terminators after its digest
_TAGS = {b"\x02tag\0\x06\0\0\0array\0": 1, b"\x02tag\0\x07\0\0\0struct": 3}
_TAG_NBYTES = len(next(iter(_TAGS)))
FEWEST = 12  # elements from this number on are faster as a row


def array_in(node: Any) -> Any:
    """Return the array document of a node; None where there is none."""
    if type(node) is not dict or "size" in node:
        return node
    fields: Any = node.get("data")
    is_wrapped = type(fields) is list and len(fields) == 1 and node.get("tag") == "struct"
    return fields[0] if is_wrapped else None


def groups(nodes: Iterable[Any]) -> list[tuple[list[Any], list[Any]]]:
    """Return nodes that share types and size, wherever they are, and the array documents in them.

    There are FEWEST or more in each group, either all with padding or all without.
    """
    found: defaultdict[tuple[int, ...], tuple[list[Any], list[Any]]]
    found = defaultdict(lambda: ([], []))
    own: list[Any] = []
    inners: list[Any] = []
    size = kind = outer = length = None
    for node in nodes:
        if type(node) is not dict:
            continue
        inner = node if "size" in node else array_in(node)
        if type(inner) is not dict or "size" not in inner:
            continue
        is_of_last = inner["size"] is size and inner.get("type") is kind and len(inner) == length
        if not is_of_last or node.get("type") is not outer:
            size, kind, outer = inner["size"], inner.get("type"), node.get("type")
            length = len(inner)
            own, inners = found[id(size), id(kind), id(outer), length]
        own.append(node)
        inners.append(inner)
    return [group for group in found.values() if len(group[0]) >= FEWEST]


class Row(NamedTuple):
    names: list[str]
    nodes: list[dict[str, Any]]
    end: int  # the offset just after the last element
    placed: tuple[int, int] | None  # from where to where detached payloads lie


def pitch_at(buffer: Any, start: int, name_end: int, limit: int) -> int | None:
    """Return the nbytes of the element at `start` where a row may begin there, else None."""
    nbytes = INT32.unpack_from(buffer, name_end + 1)[0] if name_end + 5 <= limit else 0
    head = name_end + 1, name_end + 5 + _TAG_NBYTES
    pitch: int = name_end + 1 + nbytes - start
    if nbytes <= _TAG_NBYTES or FEWEST * pitch > min(limit - start, ROW_NBYTES):
        return None
    last = name_end + 1 + (FEWEST - 1) * pitch
    if INT32.unpack_from(buffer, last)[0] != nbytes:
        return None
    first = buffer[head[0] : head[1]]
    tail = _TAGS.get(bytes(first[4:]))
    if tail is None:
        return None
    digest = start + pitch - tail - DIGEST_NBYTES
    is_row = (
        first == buffer[head[0] + pitch : head[1] + pitch]
        and buffer[digest - len(DIGEST_ELEMENT) : digest] == DIGEST_ELEMENT
    )
    return pitch if is_row else None


def read(
    buffer: Any, start: int, name_end: int, limit: int, pitch: int, first: dict[str, Any]
) -> Row | None:
    """Return the row of elements from `start` on, whose first one holds `first`.

    None where there are too few, or where it is for the plain way to say what is wrong.
    """
    inner = array_in(first)
    tail, last = (1, "blake3") if inner is first else (3, "data")
    if type(inner) is not dict or list(first)[-1] != last or "size" not in inner:
        return None
    if list(inner)[-2:] != ["data", "blake3"] or "type" not in inner or "type" not in first:
        return None
    data, digest = inner["data"], inner["blake3"]
    is_detached = type(data) is dict and list(data) == ["offset", "nbytes"]
    if nbytes_of(digest) != DIGEST_NBYTES or not (is_detached or type(data) in (bytes, Slot)):
        return None
    if is_detached and not _is_small_place(data["offset"], data["nbytes"]):
        return None
    name = slice(1, name_end - start)
    digests = slice(pitch - tail - DIGEST_NBYTES, pitch - tail)
    stop = digests.start - len(DIGEST_ELEMENT)
    varied = slice(stop - nbytes_of(data), stop)
    if is_detached:
        varied = slice(stop - len(DETACHED_TAIL) - 8, stop - len(DETACHED_TAIL))
    count = min(limit - start, ROW_NBYTES) // pitch
    matrix = np.frombuffer(buffer, np.uint8, count * pitch, start).reshape(count, pitch)
    fixed = [slice(0, 1), slice(name.stop, varied.start), slice(varied.stop, digests.start)]
    count = _alike(matrix, name, [*fixed, slice(digests.stop, pitch)])
    if count < FEWEST:
        return None
    try:
        names = matrix[:count, 1 : name.stop + 1].tobytes().decode().split("\0")[:-1]
    except UnicodeDecodeError:
        return None
    offsets = range(start, start + count * pitch, pitch)
    placed = None
    if is_detached:
        places = np.frombuffer(matrix[:count, varied].tobytes(), "<i8")
        nbytes = data["nbytes"]
        if not _is_placed_well(places, nbytes):
            return None
        payloads: Any = map(Slot._make, zip(places.tolist(), itertools.repeat(int(nbytes))))
        placed = int(places[0]), int(places[-1]) + nbytes
    else:
        payloads = _column(matrix[:count, varied], offsets, varied.start, data)
    checks = _column(matrix[:count, digests], offsets, digests.start, digest)
    nodes = [
        {**inner, "data": payload, "blake3": check}
        for payload, check in zip(payloads, checks, strict=True)
    ]
    if inner is not first:
        nodes = [{**first, "data": [node]} for node in nodes]
    return Row(names, nodes, offsets.stop, placed)


def _alike(matrix: Any, name: slice, fixed: list[slice]) -> int:
    """Return how many rows have a whole name and the `fixed` columns of the first one.

    They are looked at in ever larger parts, so that a short row costs little.
    """
    done, part = 0, FEWEST
    while done < len(matrix):
        rows = matrix[done : done + part]
        is_alike = (rows[:, name] != 0).all(1)
        for columns in fixed:
            is_alike &= (rows[:, columns] == matrix[0, columns]).all(1)
        if not is_alike.all():
            return done + int(is_alike.argmin())
        done, part = done + len(rows), 4 * part
    return done


def _is_small_place(offset: Any, nbytes: Any) -> bool:
    """Whether two numbers of 64 bits are where a small payload lies."""
    are_64_bit = all(isinstance(n, int) and type(n) not in (int, bool) for n in (nbytes, offset))
    return are_64_bit and 0 <= nbytes <= ROW_NBYTES


def _is_placed_well(places: Any, nbytes: int) -> bool:
    """Whether payloads at these offsets are aligned, and each soon after the one before."""
    gaps = places[1:] - places[:-1] - nbytes
    is_well: bool = (gaps >= 0).all() and (gaps < PAGE_NBYTES).all() and not (places % 64).any()
    return is_well and bool(places[0] >= 0)


def _column(matrix: Any, offsets: range, at: int, like: Any) -> list[Any]:
    """Return the binaries of a column: slots where the first one is a slot, else their bytes."""
    if type(like) is Slot:
        return [Slot(offset + at, like.nbytes) for offset in offsets]
    return contents(matrix)


def nbytes_of(binary: Any) -> int:
    return binary.nbytes if type(binary) is Slot else len(binary)
