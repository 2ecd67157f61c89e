"""Files: mapped reading, atomic durable writing, and telling files of other kinds apart."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
from collections.abc import Iterator
from typing import Any

from gpustore.errors import FormatError, UnsupportedValueError

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0) if (
    hasattr(os, "uname")
) else 0  # fmt: skip
_SUFFIX = ".gpustore-tmp"
_MAX_NAME_NBYTES = 255


class MappedFile:
    """A regular file mapped for reading; views of `buffer` are writable and private.

    A write to a view copies the page (copy on write) and never reaches the file or another
    mapping. Views keep the mapping alive after `close()` and after this object is gone.
    """

    __slots__ = ("buffer", "nbytes", "path")

    def __init__(self, path: str, buffer: Any) -> None:
        self.path, self.buffer, self.nbytes = path, buffer, len(buffer)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, mmap: bool = True) -> MappedFile:
        """Map the file, or read it whole into private memory (`mmap=False`, or no mapping here).

        Raises FileNotFoundError, IsADirectoryError, PermissionError, or FormatError for what is
        no regular file.
        """
        name = os.fspath(os.fsdecode(path))
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "there is no such file; check the path", name
            ) from error
        except IsADirectoryError as error:
            raise _is_a_folder(name) from error
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise _is_a_folder(name)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(
                    f"{name}: expected a regular file, found a device, pipe or socket"
                )
            return cls(name, _mapped(descriptor, status.st_size, mmap))
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the mapping; it ends when the last view of it does."""
        self.buffer, self.nbytes = b"", 0


def _is_a_folder(name: str) -> IsADirectoryError:
    return IsADirectoryError(errno.EISDIR, "expected a file, found a folder", name)


def _mapped(descriptor: int, nbytes: int, wanted: bool) -> Any:
    if nbytes and wanted:
        try:
            if not hasattr(mmap, "MAP_PRIVATE"):
                return mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY)
            # without a reservation, as the file may be larger than memory
            flags = mmap.MAP_PRIVATE | _NORESERVE
            return mmap.mmap(descriptor, nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:  # a file system that cannot map
            pass
    whole = bytearray(nbytes)
    view, done = memoryview(whole), 0
    while done < nbytes:
        count = os.readv(descriptor, [view[done:]])
        if count == 0:
            break
        done += count
    view.release()
    del whole[done:]
    return whole


# --- writing ----------------------------------------------------------------------------------


class NewFile:
    """The file that is being written in place of another."""

    __slots__ = ("_descriptor", "written")

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self.written = descriptor, 0

    def write(self, buffer: Any) -> None:
        """Append all bytes of a contiguous buffer."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            done = 0
            while done < len(octets):
                with octets[done:] as rest:
                    count = os.write(self._descriptor, rest)
                if count == 0:
                    raise OSError(errno.EIO, "the file system wrote nothing")
                done += count
            self.written += done


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, nbytes: int, durable: bool = True
) -> Iterator[NewFile]:
    """Give a NewFile that takes the place of `path` once `nbytes` bytes have been written.

    It is a temporary in the same folder; with `durable` it is synced, renamed over the target, and
    the folder synced. The mode is that of the file replaced, or what the umask says. A symlink
    stays, its target is replaced. On any error the old file is untouched and the temporary gone.
    """
    target = os.path.realpath(os.fsdecode(path))
    mode = _mode_of_target(target)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, _temporary_name(name))
    descriptor = _create(temporary, folder)
    try:
        try:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)
            _preallocate(descriptor, nbytes, target)
            file = NewFile(descriptor)
            yield file
            if file.written != nbytes:
                raise AssertionError(f"planned {nbytes} bytes, wrote {file.written}")
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        _sync_folder(folder)


def _mode_of_target(target: str) -> int | None:
    """Return the permission bits of the file to be replaced; refuse what is no regular file."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise _is_a_folder(target)
    if not stat.S_ISREG(mode):
        raise UnsupportedValueError(
            f"{target}: expected a regular file or a new name, found a device, pipe or socket"
        )
    return stat.S_IMODE(mode)


def _temporary_name(name: str) -> str:
    """Return a hidden name in at most 255 bytes, the limit of file systems."""
    room = _MAX_NAME_NBYTES - len(_SUFFIX) - 18
    short = os.fsencode(name)[:room].decode("utf-8", "ignore")
    return f".{short}.{os.urandom(8).hex()}{_SUFFIX}"


def _create(temporary: str, folder: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        return os.open(temporary, flags, 0o666)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT, "there is no such folder; create it first", folder
        ) from error


def _preallocate(descriptor: int, nbytes: int, target: str) -> None:
    """Reserve the space, where the file system can: a full disk shows before the work is done."""
    if nbytes == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # not supported here: the writes will tell
        free = os.statvfs(os.path.dirname(target) or ".")
        raise OSError(
            error.errno,
            f"expected {nbytes} bytes of space, found {free.f_bavail * free.f_frsize} free; make "
            "room or save elsewhere (the old file is as it was)",
            target,
        ) from error


def _sync_folder(folder: str) -> None:
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without it
            raise
    finally:
        os.close(descriptor)


# --- other kinds of files ---------------------------------------------------------------------

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "this is a Git LFS pointer, not the file itself; run `git lfs pull` to fetch it",
    ),
    (
        rb"7JL",
        "this is a stream of Julia's Serialization, which only the same Julia version reads; load "
        "it there and save it with BSON.jl",
    ),
    (
        rb"PK\x03\x04",
        "this is a zip archive (torch.save, numpy.savez and Keras write them); open it with the "
        "library that wrote it",
    ),
    (
        rb"\x80[\x02-\x05](?:\x95|\}|\]|c|\(|\x8a|K|X|q|\.)",
        "this is a Python pickle, which runs code when it is loaded and is never opened here; load "
        "it where you trust it and save it with gpustore",
    ),
    (
        rb"\x89HDF\r\n\x1a\n|HDF5-based Julia Data Format",
        "this is an HDF5 or JLD2 file; open it with h5py or with JLD2.jl",
    ),
    (rb"\x93NUMPY", "this is a NumPy .npy file; load it with numpy.load"),
    (rb"GGUF", "this is a GGUF file; open it with the program it was made for"),
    (rb"\x1f\x8b", "this is a gzip file; unpack it with gunzip first"),
    (rb"BZh[1-9]", "this is a bzip2 file; unpack it with bunzip2 first"),
    (rb"\xfd7zXZ\0", "this is an xz file; unpack it with unxz first"),
    (rb"\x28\xb5\x2f\xfd", "this is a zstd file; unpack it with unzstd first"),
    (
        rb"(?s).{8}\{[\"\s}]",
        "this is a safetensors file; load it with the safetensors package and save its tensors",
    ),
    (
        rb"\s*(?:\{\s*[\"}]|\[[\s\S]{0,400}[\",\]])",
        "this is JSON text, not BSON; load it with Python's json module",
    ),
    (rb"(?i)\s*<(?:!doctype|html|\?xml)", "this is an HTML or XML page, not the file itself; "
     "download the file again"),
)  # fmt: skip


def foreign_kind(head: bytes, nbytes: int) -> str | None:
    """Say what a file of another kind is and what to do with it; None for what may be BSON.

    `head` are the first bytes (512 are enough) of a file of `nbytes` bytes.

    >>> foreign_kind(b"", 0)
    'the file is empty; copy or save it again'
    """
    if nbytes == 0:
        return "the file is empty; copy or save it again"
    if int.from_bytes(head[:4], "little") == nbytes:
        return None  # the length that BSON begins with
    for pattern, sentence in _MAGIC:
        if re.match(pattern, head):
            return sentence
    if len(head) >= 8 and all(octet in b"\t\n\r" or 32 <= octet < 127 for octet in head):
        return "this is text, not BSON; find the file that it describes"
    return None
