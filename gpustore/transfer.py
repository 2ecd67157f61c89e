"""Payloads between the memory of any device and a file."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import devices, staging
from gpustore.layout import SLOT_NBYTES, SMALL_NBYTES, TURNED_NBYTES, Payload

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_NBYTES = 8 * 1024 * 1024
_BLOCK_NBYTES = 4 * 1024 * 1024  # of bytes that are made, at once
_TILE_NBYTES = 256 * 1024  # of them, made within a core's own caches
_TILE_COLUMNS = 128  # where there are as many
_LINE_NBYTES = 64  # of a core's cache
_KERNEL_SIZE = 64  # of convolutions, whose weights are as many matrices
_PLAIN = frozenset(
    np.dtype("<" + code) for code in np.typecodes["All"] if code in "?bBhHiIlLqQefdFD"
)


class Scratch(threading.local):
    """Memory for what a thread makes on the way, used again and again: fresh pages take long."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return the array of this name: as large as asked, holding whatever it does."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._held.get(name, _NO_OCTETS).size:
            self._held[name] = np.empty(nbytes, np.uint8)
        return self._held[name][:nbytes].view(dtype).reshape(shape)


_NO_OCTETS = np.empty(0, np.uint8)


def payload_of(
    array: Any, dtype: np.dtype[Any], order: str, scratch: Scratch
) -> Payload | NDArray[Any]:
    """Return the payload of an array on any device: its little-endian bytes in `order` "C" or "F".

    Nothing is copied until `chunks()` is consumed; a GPU array is then brought to the host whole,
    a host array that lies as it is to be written is not copied at all, others chunk by chunk. A
    small array is its own payload: a C-contiguous view of it, a copy where that is smaller still.
    """
    if type(array) is np.ndarray and 0 < array.nbytes <= SMALL_NBYTES and dtype in _PLAIN:
        content = array.T if order == "F" else array
        if content.flags.c_contiguous:
            return content
        if content.nbytes <= TURNED_NBYTES:
            return np.ascontiguousarray(content)
    dtype = dtype.newbyteorder("<")
    nbytes = math.prod(int(size) for size in array.shape) * dtype.itemsize
    device = devices.array_device(array)

    def chunks() -> Iterator[Any]:
        with contextlib.nullcontext() if device == "cpu" else staging.explained(device, nbytes):
            host = devices.to_host(array)
        return _host_chunks(host.T if order == "F" else host, dtype, scratch)

    there = staging.cuda_array(array) if nbytes else None
    if there is not None and order == "F":
        there = there.T
    is_numpy = type(array) is np.ndarray
    is_made = is_numpy and not _lies(array.T if order == "F" else array, dtype)
    is_host = device == "cpu"
    return Payload(nbytes, chunks, device_array=there, is_host=is_host, is_made=is_made)


def _lies(host: Any, dtype: np.dtype[Any]) -> bool:
    """Whether a host array lies in memory as the C-order bytes of the dtype."""
    return bool(host.flags.c_contiguous) and host.dtype == dtype


def _host_chunks(host: Any, dtype: np.dtype[Any], scratch: Scratch) -> Iterator[Any]:
    """Yield the C-order bytes of a host array, at most CHUNK_NBYTES at a time.

    Each stays as it is until the next but one is asked for.
    """
    if host.size == 0:
        return
    if _lies(host, dtype):
        octets = host.reshape(-1).view(np.uint8)
        for start in range(0, octets.size, CHUNK_NBYTES):
            yield octets[start : start + CHUNK_NBYTES]
        return
    is_turned = host.ndim > 1 and host.flags.f_contiguous and host.dtype == dtype
    if is_turned and math.prod(host.shape[2:]) <= _KERNEL_SIZE:
        yield from _transposed_chunks(host, scratch)
        return
    blocks: Any = np.nditer(
        host,
        flags=["external_loop", "buffered"],
        op_dtypes=[dtype],
        casting="equiv",
        order="C",
        buffersize=max(_BLOCK_NBYTES // dtype.itemsize, 1),
    )
    for block, name in zip(blocks, itertools.cycle(("one", "other")), strict=False):
        copied = scratch.empty(name, block.shape, dtype)
        np.copyto(copied, block)
        yield copied.view(np.uint8)


def _transposed_chunks(host: Any, scratch: Scratch) -> Iterator[Any]:
    """Yield the C-order bytes of a column-major matrix, or of an array with a few more axes."""
    rows, columns, *more = host.shape
    nbytes = math.prod(more) * host.itemsize  # 1 KiB at most
    height = min(max(_BLOCK_NBYTES // (columns * nbytes), 1), rows)
    width = min(_BLOCK_NBYTES // nbytes, columns)
    places = itertools.product(range(0, rows, height), range(0, columns, width))
    for (row, column), name in zip(places, itertools.cycle(("one", "other")), strict=False):
        part = host[row : row + height, column : column + width]
        block = scratch.empty(name, part.shape, host.dtype)
        for index in np.ndindex(*more):
            matrix = (..., *index)
            _copy_transposed(block[matrix], part[matrix], scratch)
        yield block.reshape(-1).view(np.uint8)


def _copy_transposed(into: Any, host: Any, scratch: Scratch) -> None:
    """Copy a column-major matrix into a row-major one, tile by tile.

    A tile is copied first, column by column, to where its columns begin in other cache lines than
    one another's: at a distance of a power of two, as in many a matrix, they drive each other out.
    """
    rows, columns = host.shape
    height = min(_TILE_NBYTES // (min(columns, _TILE_COLUMNS) * host.itemsize), rows)
    width = min(_TILE_NBYTES // (height * host.itemsize), columns)
    apart = _LINE_NBYTES // host.itemsize
    whole_tile = scratch.empty("tile", (width, height + apart), host.dtype).T
    for row, column in itertools.product(range(0, rows, height), range(0, columns, width)):
        place = slice(row, row + height), slice(column, column + width)
        part = host[place]
        tile = whole_tile[: part.shape[0], : part.shape[1]]
        np.copyto(tile, part)
        np.copyto(into[place], tile)


def host_view(buffer: Any, offset: int, dtype: np.dtype[Any], shape: Any, order: str) -> Any:
    """Return the array of `shape` in memory `order` at `offset` of a buffer: a view, no copy."""
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype, order="F" if order == "F" else "C")
    return np.ndarray(shape, dtype, buffer, offset, order="F" if order == "F" else "C")


def host_row(
    buffer: Any, payloads: list[Any], dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> Any:
    """Return arrays of one dtype, shape and memory order: `host_view` of each, made at once.

    They are views of one copy where the payloads are bytes or small slots, else of the buffer.
    """
    in_memory = shape if order == "C" else shape[::-1]
    stacked_shape = (len(payloads), *in_memory)
    is_small = type(payloads[0]) is bytes or payloads[0].nbytes < SLOT_NBYTES
    if is_small and type(payloads[0]) is bytes:
        flat = np.frombuffer(bytearray().join(payloads), dtype)
        stacked = flat.reshape(stacked_shape)
    else:
        first, nbytes = payloads[0]
        offsets = [payload.offset for payload in payloads]
        pitch = offsets[1] - first
        if offsets == list(range(first, first + pitch * len(offsets), pitch or 1)):
            inner = np.empty(in_memory, dtype).strides
            stacked = np.ndarray(stacked_shape, dtype, buffer, first, (pitch, *inner))
            stacked = stacked.copy() if is_small else stacked
        elif is_small:
            whole = memoryview(buffer)
            parts = [whole[offset : offset + nbytes] for offset in offsets]
            stacked = np.frombuffer(bytearray().join(parts), dtype).reshape(stacked_shape)
        else:
            each = [np.ndarray(in_memory, dtype, buffer, offset) for offset in offsets]
            return each if order == "C" else [array.T for array in each]
    return list(stacked if order == "C" else stacked.transpose(0, *range(len(shape), 0, -1)))
