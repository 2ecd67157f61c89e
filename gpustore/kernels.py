"""What is done to arrays within a device: digests, gathering, scattering, turning to row-major.

The CUDA sources are in `kernels/` (in an installed package `cuda/`); CuPy compiles them with NVRTC
on first use and keeps them. Where it cannot, the host hashes, and CuPy's own copies move arrays.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import devices, staging
from gpustore.digest import DIGEST_NBYTES
from gpustore.errors import DeviceMemoryError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# of blake3.cu and pack.cu
_CHUNK_NBYTES, _CHUNK_THREADS = 1024, 128
_TILE, _PARENT_THREADS = 256, 128
_PIECE_NBYTES, _COPY_THREADS = 16384, 256
_EDGE, _TURN_THREADS = 32, 256
_ALIGNMENT = 16  # of arrays in a slab: the widest access of a thread
_SMALL_NBYTES, _SLAB_NBYTES = 256 * 1024, 32 * 1024 * 1024  # what is scattered, at most at once

# cudaError_t and CUresult of what does not say that kernels cannot be compiled here: no memory, a
# context in error, a graph being captured
_PASSING = frozenset({2, *range(700, 720), *range(900, 909)})
_BATCH_NBYTES = 2**32  # hashed at once, but for larger arrays


def digests(arrays: list[Any]) -> list[bytes] | None:
    """Return the BLAKE3 digest of the bytes of each row-major CuPy array, all of one device.

    They are hashed where they lie, up to 4 GiB of them in one launch and the trees above in one or
    two more, after what the current stream does there. None where there are no kernels, or no room
    for a thirty-second of the bytes that are hashed at once.
    """
    found: list[bytes] = []
    ends = np.cumsum([array.nbytes for array in arrays])
    batches = itertools.groupby(zip(ends // _BATCH_NBYTES, arrays, strict=True), lambda m: m[0])
    for _, batch in batches:
        some = _digests([array for _, array in batch])
        if some is None:
            return None
        found += some
    return found


def _digests(arrays: list[Any]) -> list[bytes] | None:
    device = devices.array_device(arrays[0])
    try:
        with staging.explained(device), devices.cuda_device(device):
            chunks, parents = (
                _kernel("blake3", "blake3_chunks"),
                _kernel("blake3", "blake3_parents"),
            )
            if chunks is None or parents is None:
                return None
            whole = _hashed(arrays, chunks, parents).get().tobytes()
    except DeviceMemoryError:
        return None
    return [whole[i : i + DIGEST_NBYTES] for i in range(0, len(whole), DIGEST_NBYTES)]


def _hashed(arrays: list[Any], chunks: Any, parents: Any) -> Any:
    """Return the nodes that are left of each array's tree: its digest, 8 words of 32 bits."""
    nbytes = np.array([array.nbytes for array in arrays], np.uint64)
    counts = np.maximum(_ceil_div(nbytes, _CHUNK_NBYTES), 1)
    levels = [counts]
    while levels[-1].max() > 1:
        levels.append(_ceil_div(levels[-1], _TILE))
    firsts = [_firsts(level) for level in levels]
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
    """Return the row-major bytes of each CuPy array of one device in host memory, by one copy.

    Where the device has no room for a slab of them all, by a copy for each.
    """
    device = devices.array_device(arrays[0])
    nbytes = np.array([array.nbytes for array in arrays], np.uint64)
    try:
        with staging.explained(device, int(nbytes.sum())), devices.cuda_device(device):
            starts, host = _gathered(arrays, nbytes)
    except DeviceMemoryError:
        with staging.explained(device, int(nbytes.max())):
            whole = [np.ascontiguousarray(devices.to_host(array)) for array in arrays]
        return [array.reshape(-1).view(np.uint8) for array in whole]
    return [host[int(a) : int(a + n)] for a, n in zip(starts, nbytes, strict=True)]


def _gathered(arrays: list[Any], nbytes: NDArray[np.uint64]) -> tuple[Any, Any]:
    """Return where each array begins in a slab of them all, and the slab in host memory."""
    rows = [devices.load_cupy().ascontiguousarray(array) for array in arrays]
    copy = _kernel("pack", "copy_arrays")
    if copy is None:
        whole = devices.load_cupy().concatenate([_octets(row) for row in rows])
        return np.cumsum(nbytes) - nbytes, whole.get()
    starts, total = _places(nbytes)
    slab = devices.load_cupy().empty(total, np.uint8)
    _copy(copy, _addresses(rows), starts + np.uint64(slab.data.ptr), nbytes)
    return starts, slab.get()


def scatter(pairs: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Copy small host arrays into CuPy arrays of their shape, many by one copy; return the rest.

    The rest of the (target, source) pairs is as it was: targets elsewhere, large or not contiguous,
    sources on a device, and all of them where there are no kernels. Values are cast.
    """
    rest: list[tuple[Any, Any]] = []
    slabs: dict[str, list[tuple[Any, Any]]] = {}
    for target, source in pairs:
        if _is_for_slab(target) and isinstance(source, np.ndarray):
            slabs.setdefault(devices.array_device(target), []).append((target, source))
        else:
            rest.append((target, source))
    for device, members in slabs.items():
        slab_at = np.cumsum([target.nbytes for target, _ in members]) // _SLAB_NBYTES
        for _, group in itertools.groupby(zip(slab_at, members, strict=True), lambda m: m[0]):
            some = [member for _, member in group]
            if not _is_scattered(device, some):
                rest += some
    return rest


def _is_for_slab(target: Any) -> bool:
    is_small = devices.is_cupy_array(target) and 0 < target.nbytes <= _SMALL_NBYTES
    return is_small and bool(target.flags.forc)


def _is_scattered(device: str, members: list[tuple[Any, Any]]) -> bool:
    """Copy the members by way of a slab; False without kernels, and without room for one."""
    nbytes = np.array([target.nbytes for target, _ in members], np.uint64)
    starts, total = _places(nbytes)
    try:
        with staging.explained(device, total), devices.cuda_device(device):
            copy = _kernel("pack", "copy_arrays")
            if copy is not None:
                _scatter(copy, members, starts, nbytes, np.empty(total, np.uint8))
    except DeviceMemoryError:
        return False
    return copy is not None


def _scatter(
    copy: Any, members: list[tuple[Any, Any]], starts: Any, nbytes: Any, host: Any
) -> None:
    for (target, source), start in zip(members, starts.tolist(), strict=True):
        order = "C" if target.flags.c_contiguous else "F"
        flat = host[start : start + target.nbytes].view(target.dtype)
        flat.reshape(target.shape, order=order)[...] = source
    slab = devices.load_cupy().asarray(host)
    addresses = _addresses([target for target, _ in members])
    _copy(copy, starts + np.uint64(slab.data.ptr), addresses, nbytes)
    devices.load_cupy().cuda.get_current_stream().synchronize()  # while the slab is there


def _places(nbytes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], int]:
    """Return where arrays of these sizes begin in a slab, and its size."""
    room = _ceil_div(nbytes, _ALIGNMENT) * np.uint64(_ALIGNMENT)
    ends = np.cumsum(room)
    return ends - room, int(ends[-1])


def _copy(copy: Any, sources: Any, targets: Any, nbytes: NDArray[np.uint64]) -> None:
    """Copy `nbytes` from each source address to its target address in one launch."""
    pieces = _firsts(_ceil_div(nbytes, _PIECE_NBYTES))
    table = _uploaded([sources, targets, nbytes, pieces])
    if pieces[-1]:
        copy((int(pieces[-1]),), (_COPY_THREADS,), (*table, np.uint32(len(nbytes))))


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
    is_aligned = array.data.ptr % array.itemsize == 0  # of complex numbers one may not be
    is_turnable = is_aligned and array.itemsize in (1, 2, 4, 8, 16)
    if array.ndim == 2 and array.flags.f_contiguous and is_turnable:
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


def _firsts(counts: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return how many come before each, and all."""
    return np.concatenate((np.zeros(1, np.uint64), np.cumsum(counts)))


def _empty(words: int) -> Any:
    return devices.load_cupy().empty(words, np.uint32)


def _uploaded(rows: list[NDArray[Any]]) -> list[Any]:
    """Return rows of 64-bit numbers on the current device, by one copy."""
    whole = devices.load_cupy().asarray(np.concatenate(rows))
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
    package = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.join(package, "cuda")
    if not os.path.isdir(folder):
        folder = os.path.join(os.path.dirname(package), "kernels")
    try:
        with open(os.path.join(folder, f"{file}.cu"), encoding="utf-8") as source:
            code = source.read()
        module = cupy.RawModule(code=code, options=("--std=c++17",))
        module.compile()
    except Exception as error:  # NVRTC missing or failing: many kinds
        of_cuda = cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError
        if isinstance(error, of_cuda) and error.status in _PASSING:
            raise
        import logging  # 6 ms, for this warning only

        logging.getLogger("gpustore").warning(
            "kernels/%s.cu cannot be compiled, so the host does its work: %s", file, error
        )
        return None
    return module
