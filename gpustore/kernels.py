"""What is done to arrays within a device: digests, gathering, turning to row-major order.

The CUDA sources are in `kernels/` (in an installed package `cuda/`); CuPy compiles them with NVRTC
on first use and keeps them. Where it cannot, the host hashes, and CuPy's own copies move arrays.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpustore import devices, staging
from gpustore.digest import DIGEST_NBYTES
from gpustore.errors import DeviceMemoryError

# of blake3.cu and pack.cu
_CHUNK_NBYTES, _CHUNK_THREADS = 1024, 128
_TILE, _PARENT_THREADS = 256, 128
_PIECE_NBYTES, _COPY_THREADS = 16384, 256
_EDGE, _TURN_THREADS = 32, 256
_ALIGNMENT = 16  # of arrays in a gathered slab: the widest access of a thread

_LOG = logging.getLogger("gpustore")


def digests(arrays: list[Any]) -> list[bytes] | None:
    """Return the BLAKE3 digest of the bytes of each row-major CuPy array, all of one device.

    They are hashed where they lie, all in one launch and the trees above in one or two more, after
    what the current stream does there. None where there are no kernels, or no room for a
    thirty-second of the arrays' size.
    """
    if not arrays:
        return []
    device = devices.array_device(arrays[0])
    with staging.explained(device), devices.cuda_device(device):
        chunks, parents = _kernel("blake3", "blake3_chunks"), _kernel("blake3", "blake3_parents")
        if chunks is None or parents is None:
            return None
        try:
            nodes = _hashed(arrays, chunks, parents)
        except DeviceMemoryError:
            return None
        whole = nodes.get().tobytes()
    return [whole[i : i + DIGEST_NBYTES] for i in range(0, len(whole), DIGEST_NBYTES)]


def _hashed(arrays: list[Any], chunks: Any, parents: Any) -> Any:
    """Return the nodes that are left of each array's tree: its digest, 8 words of 32 bits."""
    nbytes = np.array([array.nbytes for array in arrays], np.uint64)
    counts = np.maximum(_ceil_div(nbytes, _CHUNK_NBYTES), 1)
    levels = [counts]
    while levels[-1].max() > 1:
        levels.append(_ceil_div(levels[-1], _TILE))
    firsts = [np.concatenate(([0], np.cumsum(level))) for level in levels]
    rows = _uploaded([_addresses(arrays), nbytes, *firsts])
    count, total = np.uint32(len(arrays)), int(firsts[0][-1])
    nodes = _empty(8 * total)
    grid = (-(-total // _CHUNK_THREADS),)
    chunks(grid, (_CHUNK_THREADS,), (*rows[:3], count, np.uint64(total), nodes))
    for level in range(1, len(levels)):
        merged = _empty(8 * int(firsts[level][-1]))
        arguments = rows[1 + level], rows[2 + level], count, nodes, merged
        parents((int(firsts[level][-1]),), (_PARENT_THREADS,), arguments)
        nodes = merged
    return nodes


def gathered(arrays: list[Any]) -> list[NDArray[np.uint8]]:
    """Return the row-major bytes of each CuPy array of one device in host memory, by one copy."""
    device = devices.array_device(arrays[0])
    with staging.explained(device, sum(a.nbytes for a in arrays)), devices.cuda_device(device):
        rows = [devices.load_cupy().ascontiguousarray(array) for array in arrays]
        nbytes = np.array([row.nbytes for row in rows], np.uint64)
        copy = _kernel("pack", "copy_arrays")
        if copy is None:
            starts = np.cumsum(nbytes) - nbytes
            host = devices.load_cupy().concatenate([_octets(row) for row in rows]).get()
        else:
            room = _ceil_div(nbytes, _ALIGNMENT) * _ALIGNMENT
            starts = np.cumsum(room) - room
            slab = devices.load_cupy().empty(int(room.sum()), np.uint8)
            pieces = np.concatenate(([0], np.cumsum(_ceil_div(nbytes, _PIECE_NBYTES))))
            to = starts + np.uint64(slab.data.ptr)
            table = _uploaded([_addresses(rows), to, nbytes, pieces])
            grid = (int(pieces[-1]),)
            copy(grid, (_COPY_THREADS,), (*table, np.uint32(len(rows))))
            host = slab.get()
        return [host[int(a) : int(a + n)] for a, n in zip(starts, nbytes, strict=True)]


def flat_octets(array: Any, start: Any) -> Any:
    """Return the bytes of a CuPy array in row-major order: a view, or where it must be a copy.

    A copy is made after the event `start`, and complete when this returns.
    """
    device = devices.array_device(array)
    if array.flags.c_contiguous:
        return _octets(array)
    with staging.explained(device, array.nbytes), devices.cuda_device(device):
        stream = devices.load_cupy().cuda.get_current_stream()
        stream.wait_event(start)
        row_major = _turned(array)
        stream.synchronize()
    return _octets(row_major)


def _turned(array: Any) -> Any:
    """Return a row-major copy of an array: of a column-major matrix by tiles."""
    turn = None
    if array.ndim == 2 and array.flags.f_contiguous and array.itemsize in (1, 2, 4, 8, 16):
        turn = _kernel("pack", f"turn_{array.itemsize}")
    if turn is None:
        return devices.load_cupy().ascontiguousarray(array)
    turned = devices.load_cupy().empty(array.shape, array.dtype)
    columns, rows = array.shape  # of the row-major matrix that the memory holds
    tiles = -(-rows // _EDGE) * -(-columns // _EDGE)
    turn((tiles,), (_TURN_THREADS,), (array, turned, np.uint64(rows), np.uint64(columns)))
    return turned


def _octets(row_major: Any) -> Any:
    return row_major.reshape(-1).view(np.uint8)


def _addresses(arrays: list[Any]) -> NDArray[np.uint64]:
    return np.array([array.data.ptr for array in arrays], np.uint64)


def _ceil_div(sizes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    counts: NDArray[np.uint64] = (sizes + np.uint64(size - 1)) // np.uint64(size)
    return counts


def _empty(words: int) -> Any:
    return devices.load_cupy().empty(words, np.uint32)


def _uploaded(rows: list[NDArray[Any]]) -> list[Any]:
    """Return rows of 64-bit numbers on the current device, by one copy."""
    whole = devices.load_cupy().asarray(np.concatenate(rows).astype(np.uint64))
    ends = np.cumsum([len(row) for row in rows])
    return [whole[end - len(row) : end] for row, end in zip(rows, ends.tolist(), strict=True)]


def _kernel(file: str, name: str) -> Any:
    """Return a kernel of `file`.cu, called with (grid, block, arguments); None without kernels."""
    module = _module(devices.load_cupy(), file)
    return None if module is None else module.get_function(name)


@functools.lru_cache(maxsize=8)
def _module(cupy: Any, file: str) -> Any:
    if not hasattr(cupy, "RawModule"):  # the fake device, unless a test gives it one
        return None
    folder = Path(__file__).parent / "cuda"
    if not folder.is_dir():
        folder = Path(__file__).parent.parent / "kernels"
    try:
        code = (folder / f"{file}.cu").read_text(encoding="utf-8")
        module = cupy.RawModule(code=code, options=("--std=c++17",))
        module.compile()
    except Exception as error:  # NVRTC missing or failing: many kinds
        _LOG.warning("kernels/%s.cu cannot be compiled, so the host does its work: %s", file, error)
        return None
    return module
