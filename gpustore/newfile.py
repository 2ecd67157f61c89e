"""A file that is being written: in order, at places, and past the page cache where that pays."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_DIRECT_NBYTES = 32 * 1024 * 1024  # durable files from this size on go past the page cache
_DIRECT_PIECE_NBYTES = 1024 * 1024  # in pieces from this size on
_BLOCK_NBYTES = 4096  # of positions, sizes and addresses; no disk asks for more
_STAGE_NBYTES = 4 * 1024 * 1024
_STAGES = 4
_THREADS = 2
_NO_FALLOCATE = (errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class NewFile:
    """The file that is being written in the place of another; `written` counts its bytes."""

    __slots__ = ("_nbytes", "descriptor", "direct", "target", "written")

    def __init__(
        self,
        descriptor: int,
        nbytes: int,
        target: str,
        direct: DirectWriter | None = None,
    ) -> None:
        self.descriptor, self._nbytes, self.target = descriptor, nbytes, target
        self.direct, self.written = direct, 0

    def write(self, buffer: Any) -> None:
        """Append all bytes of a C-contiguous buffer of any dtype."""
        flat = np.frombuffer(buffer, np.uint8)
        done, octets = self._write_directly(flat), flat.data
        while done < octets.nbytes:  # one call writes 2 GiB at most, and less where it likes
            with self._explained():
                count = os.write(self.descriptor, octets[done:])
                if count == 0:
                    raise OSError(errno.EIO, "the file system took no bytes")
            done += count
        self.written += done

    def _write_directly(self, flat: Any) -> int:
        """Write the whole blocks of much that begins at one past the page cache; say how many."""
        if self.direct is None or flat.size < _DIRECT_PIECE_NBYTES:
            return 0
        with self._explained():
            position = os.lseek(self.descriptor, 0, os.SEEK_CUR)
            if position % _BLOCK_NBYTES:
                return 0
            nbytes = flat.size - flat.size % _BLOCK_NBYTES
            self.direct.write(flat[:nbytes], position)
            os.lseek(self.descriptor, nbytes, os.SEEK_CUR)
        return int(nbytes)

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

    def skip(self, nbytes: int) -> None:
        """Go on writing after bytes that `write_at` has written here."""
        with self._explained():
            os.lseek(self.descriptor, nbytes, os.SEEK_CUR)
        self.written += nbytes

    def seek(self, position: int) -> None:
        """Go on writing at this byte of the file."""
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
        if self.direct is not None:
            with self._explained():
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
    """Writes whole blocks past the page cache (O_DIRECT): how much data reaches the disk soonest.

    The kernel takes them from page-aligned memory only, so pieces are copied into a few buffers of
    such memory and written from there by threads, while the next ones are filled. The `plain`
    descriptor takes what the file system refuses.
    """

    def __init__(self, descriptor: int, plain: int, threads: ThreadPoolExecutor) -> None:
        self._descriptors, self._threads = (descriptor, plain), threads
        self._stages: deque[tuple[Any, Future[None] | None]] = deque()

    def write(self, octets: Any, position: int) -> None:
        """Have flat octets written at `position`; both are multiples of _BLOCK_NBYTES.

        They have been copied when this returns. Errors come from later calls, or `drain`.
        """
        if not self._stages:
            stages = [mmap.mmap(-1, _STAGE_NBYTES) for _ in range(_STAGES)]
            self._stages.extend((np.frombuffer(stage, np.uint8), None) for stage in stages)
        for start in range(0, octets.size, _STAGE_NBYTES):
            piece = octets[start : start + _STAGE_NBYTES]
            stage, writing = self._stages[0]
            if writing is not None:
                writing.result()
            np.copyto(stage[: piece.size], piece)
            writing = self._threads.submit(self.write_from, stage[: piece.size], position + start)
            self._stages[0] = stage, writing
            self._stages.rotate(-1)

    def write_from(self, aligned: Any, position: int) -> None:
        """Write whole blocks from page-aligned memory, by the thread that calls."""
        done, descriptors = 0, iter(self._descriptors)
        descriptor = next(descriptors)
        while done < aligned.size:
            try:
                count = os.pwrite(descriptor, aligned[done:].data, position + done)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor == self._descriptors[-1]:
                    raise
                descriptor = next(descriptors)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file system took no bytes")
            done += count

    def drain(self) -> None:
        """Wait until all is written, and raise what went wrong."""
        for _, writing in self._stages:
            if writing is not None:
                writing.result()


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

        with ThreadPoolExecutor(_THREADS, "gpustore-writing") as threads:
            yield DirectWriter(descriptor, plain, threads)
    finally:
        with contextlib.suppress(OSError):  # synced through the plain one
            os.close(descriptor)
