"""What a machine gives at most: copies between host and device, and plain file I/O."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cpu import Figures
from turns import in_turn, speeds

PIECE_NBYTES = 8 * 2**20


def ceilings(folder: Path, nbytes: int, cupy: Any, until: float) -> Figures:
    """Return GB/s of `nbytes`: pinned copies, copies within the device, plain file I/O."""
    octets, other = cupy.empty(nbytes, np.uint8), cupy.empty(nbytes, np.uint8)
    pinned = cupy.cuda.alloc_pinned_memory(nbytes)
    stream = cupy.cuda.Stream(non_blocking=True)
    host = np.frombuffer(pinned, np.uint8, nbytes)
    path, threads = folder / "ceiling", 2 * (os.cpu_count() or 1)
    host[...] = 1

    def to_host() -> None:
        octets.data.copy_to_host_async(pinned.ptr, nbytes, stream)
        stream.synchronize()

    def to_device() -> None:
        octets.data.copy_from_host_async(pinned.ptr, nbytes, stream)
        stream.synchronize()

    def within() -> None:
        other[...] = octets

    calls = {
        "pinned copy to host": to_host,
        "pinned copy to device": to_device,
        "copy within the device": within,
        "plain write 1 thread": lambda: write(path, host, 1),
        f"plain write {threads} threads": lambda: write(path, host, threads),
        f"plain write {threads} threads without fallocate": lambda: write(path, host, threads, 0),
        f"mapped write {threads} threads": lambda: write_mapped(path, host, threads),
        f"mapped write {threads} threads without fallocate": lambda: write_mapped(
            path, host, threads, 0
        ),
        "plain read 1 thread": lambda: read(path, host, 1),
        f"plain read {threads} threads": lambda: read(path, host, threads),
    }
    return speeds(nbytes, in_turn(calls, cupy, until, folder=folder))


def faster(folders: list[str], nbytes: int) -> str:
    """Return the folder of those with room for so much where a file of 256 MiB is written faster.

    In a virtual machine tmpfs may be the slower one, by far: it takes memory in small pages.
    """
    content, seconds = np.ones(2**28, np.uint8), {}
    for folder in folders:
        if os.path.isdir(folder) and shutil.disk_usage(folder).free > nbytes:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                for _ in range(2):
                    start = time.perf_counter()
                    write(Path(name) / "probe", content, 1)
                    seconds[folder] = time.perf_counter() - start
    return min(seconds, key=lambda folder: seconds[folder]) if seconds else folders[0]


def write(path: Path, host: Any, threads: int, reserved: int = 1) -> None:
    """Write a new file in pieces, each at its place."""
    with new_file(path, host.size * reserved) as descriptor:
        in_pieces(lambda part, start: os.pwrite(descriptor, part.data, start), host, threads)


def write_mapped(path: Path, host: Any, threads: int, reserved: int = 1) -> None:
    """Write a new file by way of a mapping of it, which several threads fill at once."""

    def copy(part: Any, start: int) -> int:
        np.copyto(there[start : start + part.size], part)
        return int(part.size)

    with new_file(path, host.size * reserved) as descriptor:
        os.ftruncate(descriptor, host.size)
        there = np.frombuffer(mmap.mmap(descriptor, host.size), np.uint8)
        in_pieces(copy, host, threads)


@contextlib.contextmanager
def new_file(path: Path, nbytes: int) -> Iterator[int]:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    if nbytes:
        os.posix_fallocate(descriptor, 0, nbytes)
    yield descriptor
    os.close(descriptor)


def read(path: Path, host: Any, threads: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    in_pieces(lambda part, start: os.preadv(descriptor, [part.data], start), host, threads)
    os.close(descriptor)


def in_pieces(move: Callable[[Any, int], int], host: Any, threads: int) -> None:
    starts = range(0, host.size, PIECE_NBYTES)
    with ThreadPoolExecutor(threads) as pool:
        moved = pool.map(lambda start: move(host[start : start + PIECE_NBYTES], start), starts)
        assert sum(moved) == host.size
