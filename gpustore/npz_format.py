"""NumPy's .npz: arrays mapped from members that are stored as they are, and streamed into new ones.

NumPy itself holds every array of a .npz at once in memory. Members that are compressed are read so
here too.
"""

from __future__ import annotations

import errno
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore import devices, storage, transfer
from gpustore.errors import FormatError, IntegrityError, UnsupportedValueError
from gpustore.storage import MappedFile

_LOCAL_HEADER_NBYTES = 30  # of a member, before its name; PKWARE's APPNOTE, section 4.3.7
_CHUNK_NBYTES = 8 * 1024 * 1024


def read(
    path: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Return the arrays of a file by name, views of the mapped file where they can be.

    The checksum of every member is checked. Raises FormatError for what is no .npz of plain arrays,
    IntegrityError where a checksum differs.
    """
    file = MappedFile.open(path)
    found: dict[str, Any] = {}
    name = ""
    try:
        with zipfile.ZipFile(path) as members:
            for member in members.infolist():
                name = member.filename.removesuffix(".npy")
                if name in found:
                    raise ValueError(f"{name} is in it twice")
                found[name] = _member(file, members, member)
                if progress is not None:
                    progress(member.header_offset, file.nbytes)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error,
            NotImplementedError, RuntimeError) as error:  # fmt: skip
        if isinstance(error, IntegrityError) or getattr(error, "errno", 0) == errno.EIO:
            raise
        if "CRC" in str(error):  # of a member that zipfile has read to its end
            raise _damaged(file.path, name) from None
        raise FormatError(f"{file.path}: no .npz file of plain arrays: {error}") from None
    return found


def _member(file: MappedFile, members: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    with members.open(member) as stream:
        shape, is_fortran, dtype = _header(stream)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds Python objects")
        header_nbytes, order = stream.tell(), "F" if is_fortran else "C"
        nbytes = header_nbytes + math.prod(shape) * dtype.itemsize
        if member.file_size != nbytes:
            raise ValueError(f"{member.filename}: {nbytes} bytes, found {member.file_size}")
        if member.compress_type != zipfile.ZIP_STORED:
            octets = bytearray(stream.read())  # to its end, where the checksum is checked
            return transfer.host_view(octets, 0, dtype, shape, order)
    start = _payload_offset(file, member)
    stored = memoryview(file.buffer)[start : start + nbytes]
    if len(stored) != nbytes:
        raise ValueError(f"{member.filename} ends after the file")
    _check(stored, member, file.path)
    return transfer.host_view(stored, header_nbytes, dtype, shape, order)


def _header(stream: Any) -> tuple[tuple[int, ...], bool, Any]:
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"expected version 1.0 or 2.0 of .npy, found {version}")
    return readers[version](stream)


def _payload_offset(file: MappedFile, member: zipfile.ZipInfo) -> int:
    header = bytes(memoryview(file.buffer)[member.header_offset :][:_LOCAL_HEADER_NBYTES])
    name_nbytes, extra_nbytes = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return member.header_offset + _LOCAL_HEADER_NBYTES + name_nbytes + extra_nbytes


def _check(octets: memoryview, member: zipfile.ZipInfo, path: str) -> None:
    checksum = 0
    for start in range(0, len(octets), _CHUNK_NBYTES):
        checksum = zlib.crc32(octets[start : start + _CHUNK_NBYTES], checksum)
    if checksum != member.CRC:
        raise _damaged(path, member.filename.removesuffix(".npy"))


def _damaged(path: str, name: str) -> IntegrityError:
    return IntegrityError(f"{path}: the checksum differs for {name}; restore the file from a copy")


def write(
    path: str | os.PathLike[str],
    arrays: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Stream arrays of any device into a new file, which appears whole or not at all.

    Raises UnsupportedValueError for a dtype that NumPy writes as an object only.
    """
    hosts = {name: devices.to_host(array) for name, array in arrays.items()}
    for name, host in hosts.items():
        if host.dtype.kind not in "biufcSUmM":
            raise UnsupportedValueError(
                f"{name}: a .npz file has no {host.dtype}; convert the array first"
            )
    done, total = 0, sum(host.nbytes for host in hosts.values())
    with storage.replacing_by_name(path) as name, zipfile.ZipFile(name, "w") as members:
        for key, host in hosts.items():
            with members.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, host, allow_pickle=False)
            done += host.nbytes
            if progress is not None:
                progress(done, total)
