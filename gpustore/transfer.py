"""Payloads between the memory of any device and a file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpustore import devices, staging
from gpustore.layout import SLOT_NBYTES, SMALL_NBYTES, TURNED_NBYTES, Payload

CHUNK_NBYTES = 8 * 1024 * 1024
_BLOCK_NBYTES = 4 * 1024 * 1024  # transposed at once
_PLAIN = frozenset(
    np.dtype("<" + code) for code in np.typecodes["All"] if code in "?bBhHiIlLqQefdFD"
)


def payload_of(array: Any, dtype: np.dtype[Any], order: str) -> Payload | NDArray[Any]:
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

    def chunks() -> Iterator[Any]:
        device = devices.array_device(array)
        with contextlib.nullcontext() if device == "cpu" else staging.explained(device, nbytes):
            host = devices.to_host(array)
        return _host_chunks(host.T if order == "F" else host, dtype)

    there = staging.cuda_array(array) if nbytes else None
    if there is not None and order == "F":
        there = there.T
    return Payload(nbytes, chunks, device_array=there)


def _host_chunks(host: Any, dtype: np.dtype[Any]) -> Iterator[Any]:
    """Yield the C-order bytes of a host array, at most CHUNK_NBYTES at a time."""
    if host.size == 0:
        return
    if host.flags.c_contiguous and host.dtype == dtype:
        octets = host.reshape(-1).view(np.uint8)
        for start in range(0, octets.size, CHUNK_NBYTES):
            yield octets[start : start + CHUNK_NBYTES]
        return
    if host.ndim == 2 and host.flags.f_contiguous and host.dtype == dtype:
        yield from _transposed_chunks(host)
        return
    blocks = np.nditer(
        host,
        flags=["external_loop", "buffered"],
        op_dtypes=[dtype],
        casting="equiv",
        order="C",
        buffersize=CHUNK_NBYTES // dtype.itemsize,
    )
    for block in blocks:
        yield np.ascontiguousarray(block).view(np.uint8)


def _transposed_chunks(host: Any) -> Iterator[Any]:
    """Yield the C-order bytes of a column-major matrix, copied in strips as wide as a cache line.

    Eight times as fast as NumPy's own order, which leaves each cache line after one element.
    """
    rows, columns = host.shape
    strip = max(64 // host.itemsize, 1)
    step = max(_BLOCK_NBYTES // (columns * host.itemsize), 1)
    for start in range(0, rows, step):
        block = np.empty((min(step, rows - start), columns), host.dtype)
        for column in range(0, columns, strip):
            strips = slice(column, column + strip)
            block[:, strips] = host[start : start + step, strips]
        yield block.reshape(-1).view(np.uint8)


def host_view(buffer: Any, offset: int, dtype: np.dtype[Any], shape: Any, order: str) -> Any:
    """Return the array of `shape` in memory `order` at `offset` of a buffer: a view, no copy."""
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype, order="F" if order == "F" else "C")
    flat = np.frombuffer(buffer, dtype, count, offset)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def host_row(
    buffer: Any, payloads: list[Any], dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> Any:
    """Return arrays of one dtype, shape and memory order: `host_view` of each, made at once.

    They are views of the buffer where the payloads are large slots at a constant distance, and of
    one copy where they are small or bytes; None for payloads that lie otherwise.
    """
    in_memory = shape if order == "C" else shape[::-1]
    stacked_shape = (len(payloads), *in_memory)
    if all(type(payload) is bytes for payload in payloads):
        flat = np.frombuffer(bytearray().join(payloads), dtype)
        stacked = flat.reshape(stacked_shape)
    else:
        offsets = [payload.offset for payload in payloads]
        pitch = offsets[1] - offsets[0]
        if offsets != list(range(offsets[0], offsets[0] + pitch * len(offsets), pitch or 1)):
            return None
        inner = np.empty(in_memory, dtype).strides
        stacked = np.ndarray(stacked_shape, dtype, buffer, offsets[0], (pitch, *inner))
        if payloads[0].nbytes < SLOT_NBYTES:
            stacked = stacked.copy()
    return list(stacked if order == "C" else stacked.transpose(0, *range(len(shape), 0, -1)))
