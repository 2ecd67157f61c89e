"""Device memory to a file and back: large arrays in pieces, small ones in groups.

A ring of lanes (pinned buffers, each with its streams and a thread of its own) moves the pieces, so
that copies and file I/O overlap and host memory stays within GPUSTORE_RING_MIB; past the host where
GPUDirect Storage is active and found faster. Without it, with a ring of 0 MiB, `devices` copies
each array whole: the same bytes, slower.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpustore import devices, gds, kernels, staging
from gpustore.digest import hasher
from gpustore.errors import DeviceMemoryError
from gpustore.layout import Payload
from gpustore.newfile import NewFile
from gpustore.storage import NO_FILE, Reader
from gpustore.workers import Crew

GROUP_NBYTES = 256 * 1024  # arrays below this size share a copy
_ALIGNMENT = 256  # of the arrays in a group, as cudaMalloc aligns
_MAX_LANES = 16
_TRIAL_PIECES = 32  # moved each way to see which is the fastest

Report = Callable[[int], None]


# --- saving -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Whole:
    """What the pieces of one array have in common; hashed in order, whichever lane brings them."""

    payload: Payload
    octets: Any
    offset: int
    hasher: Any = field(default_factory=hasher)
    hashed: int = 0


def write_device_arrays(
    file: NewFile,
    payloads: list[Payload],
    offsets: list[int],
    report: Report,
) -> None:
    """Write the payloads that are large arrays of devices at their offsets, and mark them so.

    Small ones are arranged to be fetched in groups when their chunks are asked for; those for whose
    row-major copy the device has no room are left too. Where the device can, it hashes them all.
    """
    _arrange_groups(payloads)
    _hash_on_devices(payloads)
    large = [pair for pair in zip(payloads, offsets, strict=True) if _is_large(pair[0])]
    if not large:
        return

    def by_host(ring: Crew, lane: staging.Lane, piece: _PieceToWrite) -> int:
        whole, start, nbytes = piece
        host = lane.to_host(whole.octets, start, nbytes)
        file.write_at(host, whole.offset + start)
        if whole.payload.digest is None:
            with ring.turn(lambda: whole.hashed == start):
                whole.hasher.update(host)
                whole.hashed += nbytes
                if whole.hashed == whole.octets.size:
                    whole.payload.digest = whole.hasher.digest()
        return nbytes

    def directly(ring: Crew, lane: staging.Lane, piece: _PieceToWrite) -> int:
        whole, start, nbytes = piece
        if direct is None or whole.payload.digest is None:  # the host hashes
            return by_host(ring, lane, piece)
        with lane.past_the_host(whole.octets):
            direct.write(whole.octets[start : start + nbytes], whole.offset + start)
        return nbytes

    starts = staging.origins({_device(payload) for payload, _ in large})
    pieces, count = _pieces_to_write(large, starts), _count(p.nbytes for p, _ in large)
    with gds.opened(file.descriptor, "r+", file.target) as direct:
        _move(pieces, count, [by_host, directly] if direct else [by_host], starts, report)


def _is_large(payload: Payload) -> bool:
    return (
        payload.device_array is not None
        and not payload.is_bare
        and payload.nbytes >= GROUP_NBYTES
        and hasattr(os, "pwrite")
    )


def _device(payload: Payload) -> str:
    return devices.array_device(payload.device_array)


def _hash_on_devices(payloads: list[Payload]) -> None:
    """Give the payloads that lie row-major on a device their digests, all of one at once."""
    there: dict[str, list[Payload]] = {}
    for payload in payloads:
        array = payload.device_array
        if array is not None and not payload.is_bare and array.flags.c_contiguous:
            there.setdefault(_device(payload), []).append(payload)
    for members in there.values():
        found = kernels.digests([payload.device_array for payload in members])
        for payload, digest in zip(members, found or (), strict=False):
            payload.digest = digest


def _pieces_to_write(
    large: list[tuple[Payload, int]], starts: staging.Origins
) -> Iterator[tuple[_Whole, int, int]]:
    for payload, offset in large:
        try:
            octets = kernels.flat_octets(payload.device_array, starts[_device(payload)])
        except DeviceMemoryError:  # for a row-major copy; the host has it chunk by chunk
            continue
        if payload.digest is None:
            found = kernels.digests([octets])
            payload.digest = found[0] if found else None
        payload.is_written = True  # if not, the whole file is not
        whole = _Whole(payload, octets, offset)
        for start in range(0, octets.size, staging.LANE_NBYTES):
            yield whole, start, min(staging.LANE_NBYTES, octets.size - start)


class _Group:
    """Small arrays of one device that are fetched at once when the first of them is asked for."""

    def __init__(self) -> None:
        self.payloads: list[Payload] = []
        self.nbytes = 0
        self._chunks: list[Any] = []

    def add(self, payload: Payload) -> None:
        index = len(self.payloads)
        self.nbytes += payload.nbytes
        payload.make_chunks = lambda: self._fetch(index)
        self.payloads.append(payload)

    def _fetch(self, index: int) -> Iterable[Any]:
        if not self._chunks:
            self._chunks = kernels.gathered([member.device_array for member in self.payloads])
        chunk = self._chunks[index]
        if index == len(self._chunks) - 1:
            self._chunks = []
        return (chunk,)


def _arrange_groups(payloads: list[Payload]) -> None:
    open_groups: dict[str, _Group] = {}
    for payload in payloads:
        if payload.device_array is None or payload.nbytes >= GROUP_NBYTES:
            continue
        device = _device(payload)
        group = open_groups.get(device)
        if group is None or group.nbytes + payload.nbytes > staging.LANE_NBYTES:
            group = open_groups[device] = _Group()
        group.add(payload)


# --- loading ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Slab:
    """Memory of a device that is filled piece by piece, for one array or a group of them."""

    device: str
    members: list[tuple[int, Any, int]] = field(default_factory=list)  # index, host octets, start
    nbytes: int = 0
    octets: Any = None

    def add(self, index: int, host: Any) -> None:
        start = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.members.append((index, host, start))
        self.nbytes = start + host.size


def to_devices(
    arrays: list[tuple[Any, str]],
    reader: Reader = NO_FILE,
    report: Report = lambda nbytes: None,
) -> list[Any]:
    """Return host arrays on CUDA devices, each of the pairs on its own; memory order is kept.

    `reader` is that of the file they are views of. Arrays below GROUP_NBYTES share the memory of up
    to 8 MiB.
    Dtypes that CuPy lacks raise UnsupportedValueError, a device without room DeviceMemoryError:
    what was placed so far is released.
    """
    placed: list[Any] = [None] * len(arrays)
    slabs: list[_Slab] = []

    def by_host(ring: Crew, lane: staging.Lane, piece: _PieceToRead) -> int:
        slab, start, nbytes = piece
        if len(slab.members) == 1:
            reader.read(lane.host[:nbytes], slab.members[0][1][start : start + nbytes])
        else:
            for _, host, begin in slab.members:
                reader.read(lane.host[begin : begin + host.size], host)
        lane.to_device(slab.octets, start, nbytes)
        return nbytes

    def directly(ring: Crew, lane: staging.Lane, piece: _PieceToRead) -> int:
        slab, start, nbytes = piece
        offset = reader.offset_of(slab.members[0][1])
        if direct is None or offset is None or len(slab.members) > 1:
            return by_host(ring, lane, piece)
        with lane.past_the_host(slab.octets):
            direct.read(slab.octets[start : start + nbytes], offset + start)
        return nbytes

    try:
        slabs += _slabs_for(arrays, placed, report)
        for slab in slabs:
            slab.octets = staging.empty_octets(slab.nbytes, slab.device)
        if slabs:
            starts = staging.origins({slab.device for slab in slabs})
            with gds.opened(reader.descriptor, "r", reader.path) as direct:
                ways = [by_host, directly] if direct else [by_host]
                count = _count(slab.nbytes for slab in slabs)
                _move(_pieces_to_read(slabs), count, ways, starts, report)
    except BaseException:
        placed.clear()
        for slab in slabs:
            slab.octets = None
        staging.free_pooled_memory()
        raise
    for slab in slabs:
        for index, host, start in slab.members:
            array = arrays[index][0]
            order = "C" if array.flags.c_contiguous else "F"
            octets = slab.octets[start : start + host.size]
            placed[index] = staging.shaped(octets, array.dtype, array.shape, order)
    return placed


def _slabs_for(arrays: list[tuple[Any, str]], placed: list[Any], report: Report) -> Iterator[_Slab]:
    """Yield what is to be filled by the ring; arrays that are not for it are placed at once."""
    open_slabs: dict[str, _Slab] = {}
    known = {dtype: staging.has_dtype(dtype) for dtype in {array.dtype for array, _ in arrays}}
    for index, (array, device) in enumerate(arrays):
        if not (known[array.dtype] and array.flags.forc and array.nbytes and staging.ring_nbytes()):
            with staging.explained(device, array.nbytes):
                placed[index] = devices.to_device(array, device)
            report(array.nbytes)
            continue
        host = (array if array.flags.c_contiguous else array.T).reshape(-1).view(np.uint8)
        slab = open_slabs.get(device)
        if host.size >= GROUP_NBYTES:
            slab = _Slab(device)
            yield slab
        elif slab is None or slab.nbytes + _ALIGNMENT + host.size > staging.LANE_NBYTES:
            slab = open_slabs[device] = _Slab(device)
            yield slab
        slab.add(index, host)


def _pieces_to_read(slabs: list[_Slab]) -> Iterator[tuple[_Slab, int, int]]:
    for slab in slabs:
        for start in range(0, slab.nbytes, staging.LANE_NBYTES):
            yield slab, start, min(staging.LANE_NBYTES, slab.nbytes - start)


# --- the ring ---------------------------------------------------------------------------------


def _count(sizes: Iterable[int]) -> int:
    return sum(-(-nbytes // staging.LANE_NBYTES) for nbytes in sizes)


def _move(
    pieces: Iterator[Any],
    count: int,
    ways: Sequence[_Way],
    starts: staging.Origins,
    report: Report,
) -> None:
    """Move all pieces, the first ones each way in turn, the rest the way that was the fastest."""
    seconds = []
    for way in ways if len(ways) > 1 else ():
        began = time.perf_counter()
        _run(itertools.islice(pieces, _TRIAL_PIECES), count, way, starts, report)
        seconds.append(time.perf_counter() - began)
    fastest = ways[seconds.index(min(seconds))] if seconds else ways[0]
    _run(pieces, count, fastest, starts, report)


def _run(
    pieces: Iterator[Any],
    count: int,
    way: _Way,
    starts: staging.Origins,
    report: Report,
) -> None:
    """Move the pieces, `count` at most, this `way`: no lane touches a thing when this is over."""
    room = staging.ring_nbytes() // staging.LANE_NBYTES
    lanes = max(min(room, _MAX_LANES, 2 * (os.cpu_count() or 1), count), 1)
    ring = Crew(pieces, lanes, "gpustore-lane")

    def work() -> None:
        with staging.Lane(staging.LANE_NBYTES, starts) as lane:
            for piece in ring.pieces():
                ring.say_done(way(ring, lane, piece))

    ring.run(work, report)


_Way = Callable[[Crew, staging.Lane, Any], int]
_PieceToWrite = tuple[_Whole, int, int]  # from a byte on, so many
_PieceToRead = tuple[_Slab, int, int]
