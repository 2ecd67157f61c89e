"""A file that is being written: in order, at places, and past the page cache where that pays."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from queue import SimpleQueue

_DIRECT_NBYTES = 32 * 1024 * 1024  # durable files from this size on go past the page cache
_BLOCK_NBYTES = 4096  # of positions, sizes and addresses; no disk asks for more
_HUGE_NBYTES = 2 * 1024 * 1024
_STAGE_NBYTES = 4 * 1024 * 1024
_STAGES = 4  # more than threads that fill them (see `output`)
_CACHED_NBYTES = 64 * 1024  # copied and then hashed
DIRECT_THREADS = 2
_NO_FALLOCATE = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class NewFile:
    """The file that is being written in the place of another; `written` counts its bytes."""

    __slots__ = ("_nbytes", "_position", "_stream", "descriptor", "direct", "target", "written")

    def __init__(
        self,
        descriptor: int,
        nbytes: int,
        target: str,
        direct: DirectWriter | None = None,
    ) -> None:
        self.descriptor, self._nbytes, self.target = descriptor, nbytes, target
        self.direct, self.written, self._position = direct, 0, 0
        self._stream = None if direct is None else _DirectStream(direct)

    def write(self, buffer: Any, hasher: Any = None) -> None:
        """Append all bytes of a C-contiguous buffer of any dtype, and update the `hasher`."""
        flat = np.frombuffer(buffer, np.uint8)
        with self._explained():
            if self._stream is not None:
                self._stream.write(flat, self._position, hasher)
            else:
                self._write_plainly(flat.data)
                if hasher is not None:
                    hasher.update(flat.data)
        self._position += flat.size
        self.written += flat.size

    def _write_plainly(self, octets: memoryview) -> None:
        done = 0
        while done < octets.nbytes:  # one call writes 2 GiB at most, and less where it likes
            count = os.write(self.descriptor, octets[done:])
            if count == 0:
                raise OSError(errno.EIO, "the file system took no bytes")
            done += count

    def write_at(self, buffer: Any, position: int) -> None:
        """Write all bytes of a flat buffer of bytes at this place; `skip` counts them later.

        For several threads at once; the place where `write` goes on stays as it is.
        """
        octets, done = memoryview(buffer), 0
        if self.direct is not None:
            flat = np.frombuffer(buffer, np.uint8)
            if _is_aligned(flat, position):
                with self._explained():
                    self.direct.write_from(flat, position)
                return
        while done < octets.nbytes:
            with self._explained():
                count = os.pwrite(self.descriptor, octets[done:], position + done)
                if count == 0:
                    raise OSError(errno.EIO, "the file system took no bytes")
            done += count

    @contextlib.contextmanager
    def stream(self) -> Iterator[Callable[[Any, int, Any], None]]:
        """Give one thread of several what writes flat octets at a position and hashes them.

        `skip` counts them later.
        """
        if self.direct is None:

            def write(octets: Any, position: int, hasher: Any) -> None:
                hasher.update(octets.data)
                self.write_at(octets, position)

            yield write
            return
        stream = _DirectStream(self.direct)
        with self._explained():
            yield stream.write
            stream.submit()

    def skip(self, nbytes: int) -> None:
        """Go on writing after bytes that `write_at` has written here."""
        self.seek(self._position + nbytes)
        self.written += nbytes

    def seek(self, position: int) -> None:
        """Go on writing at this byte of the file."""
        self._position = position
        if self.direct is None:
            with self._explained():
                os.lseek(self.descriptor, position, os.SEEK_SET)

    def reserve(self) -> None:
        """Have the space set aside: writing is faster, and a full disk shows before the work."""
        if self._nbytes == 0 or not hasattr(os, "posix_fallocate"):
            return
        with self._explained():
            # Where the file system lacks fallocate(2), glibc writes into every 4 KiB instead. It
            # reads them first, as far as the file goes, so here it gives up at once with EBADF.
            os.ftruncate(self.descriptor, min(self._nbytes, 4096))
            try:
                os.posix_fallocate(self.descriptor, 0, self._nbytes)
            except OSError as error:
                if error.errno not in _NO_FALLOCATE:
                    raise

    def finish(self, *, durable: bool) -> None:
        """Check that all was written, and have it reach the disk."""
        if self.direct is not None and self._stream is not None:
            with self._explained():
                self._stream.submit()
                self.direct.drain()
        if self.written != self._nbytes:
            raise AssertionError(
                f"{self.target}: planned {self._nbytes} bytes, wrote {self.written}"
            )
        if durable:
            with self._explained():
                os.fsync(self.descriptor)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Name the target in an error of the file system, and the numbers in one of space."""
        try:
            yield
        except OSError as error:
            sentence = error.strerror
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                sentence = (
                    f"{sentence}: expected room for {self._nbytes} bytes, found {self._free()} "
                    "free; make room or save elsewhere (nothing was changed)"
                )
            raise OSError(error.errno, sentence, self.target) from error

    def _free(self) -> int:
        """Return how many bytes there were before this file took its share."""
        import shutil  # 2 ms, for this error only

        held = getattr(os.fstat(self.descriptor), "st_blocks", 0) * 512
        return shutil.disk_usage(os.path.dirname(self.target)).free + held


class DirectWriter:
    """Writes past the page cache (O_DIRECT): how much data reaches the disk soonest.

    The kernel takes whole blocks from page-aligned memory only, so all is copied into a few buffers
    of such memory and written from there by threads, while others are filled. Parts of blocks, at
    the ends and beside places that were left out, go to the `plain` descriptor last: written in
    between, they would wait for all that is under way. So does what the file system refuses.
    """

    def __init__(self, descriptor: int, plain: int, threads: ThreadPoolExecutor) -> None:
        self._descriptors, self._threads = (descriptor, plain), threads
        from queue import SimpleQueue  # 1 ms, for large files only

        self._free: SimpleQueue[Any] = SimpleQueue()
        for stage in _aligned_memory(_STAGES * _STAGE_NBYTES).reshape(_STAGES, -1):
            self._free.put(stage)
        self._failure: BaseException | None = None
        self._edges: list[tuple[int, Any]] = []

    def stage(self) -> Any:
        """Return memory to be filled, as soon as some is free; `submit` takes it back."""
        stage = self._free.get()
        if self._failure is not None:
            self._free.put(stage)
            raise self._failure
        return stage

    def submit(self, stage: Any, filled: slice, base: int) -> None:
        """Have what is filled of a stage, which begins at `base` of the file, written."""
        first, last = filled.start, filled.stop
        start = min(-(-first // _BLOCK_NBYTES) * _BLOCK_NBYTES, last)
        stop = max(last - last % _BLOCK_NBYTES, start)
        edges = (first, start), (stop, last)
        self._edges += [(base + one, bytes(stage[one:end])) for one, end in edges if one < end]
        if start < stop:
            self._threads.submit(self._write_stage, stage, start, stop, base)
        else:
            self._free.put(stage)

    def _write_stage(self, stage: Any, start: int, stop: int, base: int) -> None:
        try:
            self.write_from(stage[start:stop], base + start)
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self._free.put(stage)

    def write_from(self, octets: Any, position: int, *, past: bool = True) -> None:
        """Write octets by the thread that calls, `past` the page cache: blocks in whole pages."""
        done = 0
        while done < octets.size:
            try:
                count = os.pwrite(self._descriptors[not past], octets[done:].data, position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not past:
                    raise
                past = False
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file system took no bytes")
            done += count

    def drain(self) -> None:
        """Have all written that was not yet, wait for it, and raise what went wrong."""
        for stage in [self._free.get() for _ in range(_STAGES)]:
            self._free.put(stage)
        if self._failure is not None:
            raise self._failure
        for position, edge in self._edges:
            self.write_from(np.frombuffer(edge, np.uint8), position, past=False)


class _DirectStream:
    """What one thread writes past the page cache, piece by piece: the stage that it fills."""

    def __init__(self, writer: DirectWriter) -> None:
        self._writer = writer
        self._stage: Any = None
        # where in the file the stage lies, and what of it is filled
        self._base, self._filled = 0, slice(0, 0)

    def write(self, octets: Any, position: int, hasher: Any = None) -> None:
        """Have flat octets written at `position`, and the `hasher` updated with them.

        They have been copied when this returns, in pieces that are hashed while they lie in the
        core's cache. Errors come from later calls, or the writer's `drain`.
        """
        if position != self._base + self._filled.stop:
            self.submit()
            first = position % _BLOCK_NBYTES
            self._base, self._filled = position - first, slice(first, first)
        done = 0
        while done < octets.size:
            if self._stage is None:
                self._stage = self._writer.stage()
            first, last = self._filled.start, self._filled.stop
            copied = self._stage[last : last + min(octets.size - done, _CACHED_NBYTES)]
            np.copyto(copied, octets[done : done + copied.size])
            if hasher is not None:
                hasher.update(copied.data)
            self._filled = slice(first, last + copied.size)
            done += copied.size
            if self._filled.stop == _STAGE_NBYTES:
                self.submit()

    def submit(self) -> None:
        """Have what is in the stage written, and go on after it with another."""
        if self._stage is not None:
            self._writer.submit(self._stage, self._filled, self._base)
        self._stage = None
        self._base, self._filled = self._base + self._filled.stop, slice(0, 0)


def _aligned_memory(nbytes: int) -> Any:
    """Return fresh octets that begin at a page, a huge one where there are: fewer to pin."""
    memory = mmap.mmap(-1, nbytes + _HUGE_NBYTES)
    with contextlib.suppress(AttributeError, OSError):  # not Linux; a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    octets = np.frombuffer(memory, np.uint8)
    first = -octets.ctypes.data % _HUGE_NBYTES
    return octets[first : first + nbytes]


def _is_aligned(octets: Any, position: int) -> bool:
    """Whether flat octets can be written at `position` from where they are."""
    return not (octets.ctypes.data | octets.size | position) % _BLOCK_NBYTES


@contextlib.contextmanager
def direct_writer(path: str, plain: int, nbytes: int) -> Iterator[DirectWriter | None]:
    """Give a DirectWriter of the file that `plain` is open for; None where it does not pay or work.

    At the end its threads have stopped, whatever became of their work.
    """
    if nbytes < _DIRECT_NBYTES:
        yield None
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):  # macOS, Windows; a file system without it
        yield None
        return
    try:
        from concurrent.futures import ThreadPoolExecutor  # 10 ms, for large files only

        with ThreadPoolExecutor(DIRECT_THREADS, "gpustore-writing") as threads:
            yield DirectWriter(descriptor, plain, threads)
    finally:
        with contextlib.suppress(OSError):  # synced through the plain one
            os.close(descriptor)
