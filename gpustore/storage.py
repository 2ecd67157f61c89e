"""Files: mapped reading, and atomic durable writing."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gpustore.errors import FormatError, TruncatedFileError, UnsupportedValueError
from gpustore.newfile import NewFile, direct_writer

_SLOWLY_FREED_NBYTES = 32 * 1024 * 1024
_READING = os.O_RDONLY  # a pipe is not waited for, a terminal does not become ours
for _flag in ("O_BINARY", "O_NONBLOCK", "O_NOCTTY"):
    _READING |= getattr(os, _flag, 0)
# a private mapping, without reserving memory for it: it may be larger than memory is
if hasattr(mmap, "MAP_PRIVATE"):
    # of <sys/mman.h>; Python has the name from 3.13 on
    _NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    _PRIVATE = {
        "flags": mmap.MAP_PRIVATE | _NORESERVE,
        "prot": mmap.PROT_READ | mmap.PROT_WRITE,
    }
    if sys.version_info >= (3, 13):  # older ones keep a duplicate of the descriptor open
        _PRIVATE["trackfd"] = False
else:  # Windows
    _PRIVATE = {"access": mmap.ACCESS_COPY}


class MappedFile:
    """A regular file mapped for reading; views of `buffer` are writable and private.

    A write to a view copies the page (copy on write) and never reaches the file or another
    mapping. Views keep the mapping alive after `close()` and after this object is gone. A file
    that is replaced meanwhile (as `replacing` does) stays as it was mapped; one that another
    program cuts short ends the process with SIGBUS where its lost pages are read: `mmap=False`
    is for such files.
    """

    __slots__ = ("_buffer", "_identity", "nbytes", "path")

    def __init__(
        self, path: str, buffer: mmap.mmap | bytearray, identity: tuple[int, int] | None = None
    ) -> None:
        self.path, self.nbytes, self._identity = path, len(buffer), identity
        self._buffer: mmap.mmap | bytearray | None = buffer

    @classmethod
    def open(cls, path: str | bytes | os.PathLike[str], *, mmap: bool = True) -> MappedFile:
        """Map the file; with `mmap=False`, or where it cannot be mapped, read it into memory.

        Raises FileNotFoundError, IsADirectoryError, PermissionError, or FormatError for what is
        no regular file.
        """
        name = path if type(path) is str else os.fsdecode(path)
        descriptor = _opened(name)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                is_folder = stat.S_ISDIR(found.st_mode)
                raise _is_a_folder(name) if is_folder else _is_no_file(name)
            if mmap:
                return cls(name, _mapped(descriptor), (found.st_dev, found.st_ino))
            return cls(name, _read(descriptor))
        finally:
            _let_go(descriptor)

    @property
    def buffer(self) -> mmap.mmap | bytearray:
        """The bytes of the file; `numpy.frombuffer` makes views of them."""
        if self._buffer is None:
            raise ValueError(f"{self.path}: the file is closed; open it again")
        return self._buffer

    @property
    def is_closed(self) -> bool:
        return self._buffer is None

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        """Give a Reader of the file, open as long as this lasts."""
        first = np.frombuffer(self.buffer, np.uint8).ctypes.data
        with contextlib.ExitStack() as held:
            yield Reader(self.path, self._reopened(held), first, self.nbytes)

    def _reopened(self, held: contextlib.ExitStack) -> int | None:
        if self._identity is None or not hasattr(os, "preadv"):
            return None
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:  # moved, or no longer ours to read
            return None
        held.callback(os.close, descriptor)
        return descriptor if _identity_of(descriptor) == self._identity else None

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view of it does."""
        self._buffer = None

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Reader(NamedTuple):
    """Reads the bytes of which arrays are views from the file: without the mapping's page faults.

    Without a `descriptor` (the file has been replaced since), and for views of other memory, they
    are copied from where they are.
    """

    path: str
    descriptor: int | None
    first: int  # address of the mapping
    nbytes: int

    def offset_of(self, octets: Any) -> int | None:
        """Return where in the file flat octets of host memory are to be read; None if nowhere."""
        offset = int(octets.ctypes.data) - self.first
        is_there = self.descriptor is not None and 0 <= offset <= self.nbytes - octets.size
        return offset if is_there else None

    def read(self, into: Any, octets: Any) -> None:
        """Copy octets into flat host memory of their size."""
        offset, done = self.offset_of(octets), 0
        if offset is None or self.descriptor is None:
            np.copyto(into, octets)
            return
        while done < octets.size:
            count = os.preadv(self.descriptor, [into[done:].data], offset + done)
            if count == 0:
                raise TruncatedFileError(
                    f"{self.path}: expected {self.nbytes} bytes, found {offset + done}; the file "
                    "was cut while it was being loaded"
                )
            done += count


NO_FILE = Reader("", None, 0, 0)  # copies from memory


def _identity_of(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _opened(name: str) -> int:
    try:
        return os.open(name, _READING)
    except FileNotFoundError as error:
        sentence = "there is no such file; check the path"
        raise FileNotFoundError(errno.ENOENT, sentence, name) from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket: Linux, macOS
            raise _is_no_file(name) from error
        if os.path.isdir(name):  # Windows opens none
            raise _is_a_folder(name) from error
        raise


def _is_no_file(name: str) -> FormatError:
    return FormatError(f"{name}: expected a regular file, found a device, pipe or socket")


def _is_a_folder(name: str) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, "expected a file, found a folder", name)


def _mapped(descriptor: int) -> mmap.mmap | bytearray:
    try:
        return mmap.mmap(descriptor, 0, **_PRIVATE)
    except (OSError, ValueError):  # a file system that cannot map, or an empty file
        return _read(descriptor)


def _read(descriptor: int) -> bytearray:
    with open(descriptor, "rb", closefd=False) as stream:
        whole = bytearray(os.fstat(descriptor).st_size)
        del whole[stream.readinto(whole) :]  # nothing, unless the file shrank meanwhile
    return whole


# --- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(
    path: str | bytes | os.PathLike[str], *, nbytes: int, durable: bool = True
) -> Iterator[NewFile]:
    """Give a NewFile that takes the place of `path` once `nbytes` bytes have been written.

    It is a temporary in the same folder; with `durable` it is written past the page cache where it
    is large, synced, renamed over the target, and the folder synced. The permissions are those of
    the file replaced, or what the umask says; its space is freed by a thread where it is large. A
    symlink stays, its target is replaced. On any error the old file is as it was and the temporary
    gone; only if syncing the folder fails is the new file already in place.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(os.path.join(folder, "new"), nbytes=5) as file:
    ...         file.write(b"hello")
    ...     os.listdir(folder)
    ['new']
    """
    target, old = _resolved(path)
    temporary = _temporary_beside(target)
    with contextlib.suppress(OSError):  # a folder that cannot be listed
        _remove_stale(target)
    _wait_for_freeing()
    with contextlib.ExitStack() as freed:
        try:
            with contextlib.ExitStack() as held:
                with _created(temporary, target, old) as descriptor:
                    if os.name == "posix":  # keeps the lock until the file has its name
                        held.callback(_let_go, os.dup(descriptor))
                    past = direct_writer(temporary, descriptor, nbytes if durable else 0)
                    with past as writer:
                        file = NewFile(descriptor, nbytes, target, writer)
                        file.reserve()
                        yield file
                        file.finish(durable=durable)
                is_large = old is not None and old.st_size >= _SLOWLY_FREED_NBYTES
                if is_large and os.name == "posix":  # Windows replaces no file that is open
                    freed.enter_context(_freed_beside(target))
                os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):  # the error that led here matters more
                os.unlink(temporary)
            raise
        if durable:
            _sync_folder(os.path.dirname(target))


@contextlib.contextmanager
def replacing_by_name(path: str | bytes | os.PathLike[str]) -> Iterator[str]:
    """Give the name of a temporary that takes the place of `path`, for a library to write.

    It is synced and renamed as in `replacing`; on any error the old file is as it was.
    """
    target, old = _resolved(path)
    temporary = _temporary_beside(target)
    try:
        with _created(temporary, target, old) as descriptor:
            yield temporary
            os.fsync(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that led here matters more
            os.unlink(temporary)
        raise
    _sync_folder(os.path.dirname(target))


def _resolved(path: str | bytes | os.PathLike[str]) -> tuple[str, os.stat_result | None]:
    """Return the path with its links followed, and the status of the file that is there.

    Refuses all but regular files and new names.
    """
    name = os.fsdecode(path)
    if not os.path.basename(name):  # empty, or with a separator at its end
        raise _is_a_folder(name)
    target = os.path.realpath(name)
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(old.st_mode):
        raise _is_a_folder(name)
    if not stat.S_ISREG(old.st_mode):
        raise UnsupportedValueError(
            f"{name}: expected a regular file or a new name, found a device, pipe or socket"
        )
    return target, old


def _temporary_beside(target: str) -> str:
    """Return a hidden name in the same folder, of 131 bytes at most (file systems take 255)."""
    prefix = _temporary_prefix(target)
    return os.path.join(os.path.dirname(target), f"{prefix}{os.urandom(8).hex()}.gpustore-tmp")


def _temporary_prefix(target: str) -> str:
    return f".{os.fsencode(os.path.basename(target))[:100].decode('utf-8', 'ignore')}."


def _remove_stale(target: str) -> None:
    """Remove temporaries for this target whose process is gone: nobody holds their lock."""
    folder = os.path.dirname(target)
    name = re.compile(re.escape(_temporary_prefix(target)) + r"[0-9a-f]{16}\.gpustore-tmp")
    for found in filter(name.fullmatch, os.listdir(folder)):
        path = os.path.join(folder, found)
        with contextlib.suppress(OSError):  # not ours to open, or gone meanwhile
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                # without the second question, a name taken again after another removed it
                if _lock(descriptor, wait=False) and os.fstat(descriptor).st_nlink:
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a temporary until it is closed or its process ends; False where that cannot be."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # Windows; in use; a file system without locks
        return False
    return True


@contextlib.contextmanager
def _created(temporary: str, target: str, old: os.stat_result | None) -> Iterator[int]:
    """Give the descriptor of a new file with the permissions of `old`, or those of the umask."""
    mode = None if old is None else old.st_mode & 0o777
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_BINARY"):  # Python itself adds O_CLOEXEC
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(temporary, flags, 0o666 if mode is None else 0o600)
        while _lock(descriptor, wait=True) and os.fstat(descriptor).st_nlink == 0:
            os.close(descriptor)  # another save took it for a stale one, before it was locked
            descriptor = os.open(temporary, flags, 0o666 if mode is None else 0o600)
    except FileNotFoundError as error:
        sentence = "there is no such folder; create it first"
        raise FileNotFoundError(errno.ENOENT, sentence, os.path.dirname(target)) from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, target) from error
    try:
        if mode is not None and hasattr(os, "fchmod"):
            os.fchmod(descriptor, mode)
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_folder(folder: str) -> None:
    """Have the new name reach the disk, where folders can be opened and synced."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, or a folder without the right to read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            sentence = f"{error.strerror}; the new file is in place, but may not outlast a crash"
            raise OSError(error.errno, sentence, folder) from error
    finally:
        _let_go(descriptor)


@contextlib.contextmanager
def _freed_beside(path: str) -> Iterator[None]:
    """Keep a file that loses its name in here until the end, and free its space by a thread.

    A file system takes about 0.1 s to free 1 GiB.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # not ours to read, or gone
        yield
        return
    import threading  # 1 ms, for large files only

    try:
        yield
    finally:
        freeing = threading.Thread(target=_let_go, args=(descriptor,), name="gpustore-freeing")
        try:
            freeing.start()
            _freeing.append(freeing)
        except RuntimeError:  # the interpreter is about to end
            _let_go(descriptor)


def _wait_for_freeing() -> None:
    """Wait until the space of files that were replaced is free, and no thread frees any."""
    with contextlib.suppress(IndexError):
        while True:
            _freeing.pop().join()


_freeing: list[Any] = []  # threads
if hasattr(os, "register_at_fork"):  # a child would keep the descriptor, and so the space
    os.register_at_fork(before=_wait_for_freeing)


def _let_go(descriptor: int) -> None:
    """Close what nothing was written through since it was closed or synced."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
