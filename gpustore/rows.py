"""Rows of array documents alike, as many small arrays make them: by columns, not one by one.

Elements whose documents differ only in the bytes of their name, payload or place, and digest lie
at a constant pitch. One of a row is read or written as any other; the rest is compared with it, or
made of it, as a matrix of bytes. Nodes of a row share their `type` and `size` objects.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpustore.digest import DIGEST_NBYTES, contents, digests
from gpustore.layout import (
    DETACHED_TAIL,
    DIGEST_ELEMENT,
    INT32,
    ROW_NBYTES,
    Slot,
)

_ARRAY_TAG = b"\x02tag\0\x06\0\0\0array\0"  # what a document of this package begins with
FEWEST = 4


def shared(nodes: Collection[Any]) -> Iterator[tuple[int, int]]:
    """Yield where rows begin and end: four or more array documents that share type and size."""
    start, size, kind = 0, None, None
    for position, node in enumerate((*nodes, None)):
        own = node.get("size") if type(node) is dict else None
        if own is None or own is not size or node["type"] is not kind:
            if position - start >= FEWEST and size is not None:
                yield start, position
            start, size = position, own
            kind = node.get("type") if own is not None else None


class Row(NamedTuple):
    names: list[str]
    nodes: list[dict[str, Any]]
    end: int  # the offset just after the last element
    placed: tuple[int, int] | None  # from where to where detached payloads lie


def pitch_at(buffer: Any, start: int, name_end: int, limit: int) -> int | None:
    """Return the nbytes of the element at `start` where a row may begin there, else None."""
    nbytes = INT32.unpack_from(buffer, name_end + 1)[0] if name_end + 5 <= limit else 0
    head = name_end + 1, name_end + 5 + len(_ARRAY_TAG)
    pitch: int = name_end + 1 + nbytes - start
    if nbytes <= len(_ARRAY_TAG) or start + FEWEST * pitch > limit or pitch > ROW_NBYTES:
        return None
    first = buffer[head[0] : head[1]]
    is_row = first[4:] == _ARRAY_TAG and first == buffer[head[0] + pitch : head[1] + pitch]
    return pitch if is_row else None


def read(
    buffer: Any, start: int, name_end: int, limit: int, pitch: int, first: dict[str, Any]
) -> Row | None:
    """Return the row of elements from `start` on, whose first one holds `first`.

    None where there are fewer than four, or where it is for the plain way to say what is wrong.
    """
    if list(first)[-2:] != ["data", "blake3"]:
        return None
    data, digest = first["data"], first["blake3"]
    is_detached = type(data) is dict and list(data) == ["offset", "nbytes"]
    if _nbytes(digest) != DIGEST_NBYTES or not (is_detached or type(data) in (bytes, Slot)):
        return None
    name = slice(1, name_end - start)
    digests = slice(pitch - 1 - DIGEST_NBYTES, pitch - 1)
    stop = digests.start - len(DIGEST_ELEMENT)
    varied = slice(stop - _nbytes(data), stop)
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
        if not _is_placed_well(places, nbytes, data["offset"]):
            return None
        payloads: Any = map(Slot._make, zip(places.tolist(), itertools.repeat(int(nbytes))))
        placed = int(places[0]), int(places[-1]) + nbytes
    else:
        payloads = _column(matrix[:count, varied], offsets, varied.start, data)
    checks = _column(matrix[:count, digests], offsets, digests.start, digest)
    nodes = [
        {**first, "data": payload, "blake3": check}
        for payload, check in zip(payloads, checks, strict=True)
    ]
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


def _is_placed_well(places: Any, nbytes: Any, offset: Any) -> bool:
    """Whether 64-bit offsets of payloads are aligned, and each behind the one before."""
    are_64_bit = all(isinstance(n, int) and type(n) not in (int, bool) for n in (nbytes, offset))
    if not are_64_bit or not 0 <= nbytes <= ROW_NBYTES:
        return False
    is_well: bool = (places[1:] - places[:-1] >= nbytes).all() and not (places % 64).any()
    return is_well and bool(places[0] >= 0)


def _column(matrix: Any, offsets: range, at: int, like: Any) -> list[Any]:
    """Return the binaries of a column: slots where the first one is a slot, else their bytes."""
    if type(like) is Slot:
        return [Slot(offset + at, like.nbytes) for offset in offsets]
    return contents(matrix)


def _nbytes(binary: Any) -> int:
    return binary.nbytes if type(binary) is Slot else len(binary)


def is_small(nodes: list[dict[str, Any]]) -> bool:
    """Whether array documents that share type and size have nothing else than a small payload."""
    payloads: list[Any] = [node.get("data") for node in nodes if len(node) == 4]
    if len(payloads) < len(nodes) or {*map(type, payloads)} != {np.ndarray}:
        return False
    return len({payload.nbytes for payload in payloads}) == 1


def stacked(contents: list[Any]) -> Any:
    """Return buffers of one size as the rows of a matrix of bytes."""
    return np.frombuffer(b"".join(contents), np.uint8).reshape(len(contents), -1)


def filled(template: Any, names: list[bytes], payloads: Any, digest: int) -> Any:
    """Return the matrix of elements made of the `template`: each with its name and its digest.

    The digests of the rows of `payloads` begin at byte `digest` of each.
    """
    matrix = np.empty((len(names), len(template)), np.uint8)
    matrix[:] = np.frombuffer(template, np.uint8)
    matrix[:, 1 : 1 + len(names[0])] = stacked(names)
    matrix[:, digest : digest + DIGEST_NBYTES] = stacked(digests(payloads))
    return matrix
