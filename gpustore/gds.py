"""GPUDirect Storage by kvikio: between a file and device memory without the host, where active."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from gpustore.errors import DeviceError, TruncatedFileError


def why_not() -> str | None:
    """Return why GPUDirect Storage is not used on this machine; None where it is active."""
    if os.environ.get("GPUSTORE_GDS") == "0":
        return "GPUSTORE_GDS is 0"
    return _probed()


@functools.lru_cache(maxsize=1)
def _probed() -> str | None:
    try:
        from kvikio import cufile_driver, defaults

        if defaults.is_compat_mode_preferred():
            return "kvikio is in its compatibility mode, without cuFile"
        if not cufile_driver.get("is_gds_available"):
            return "the driver offers no GPUDirect Storage"
    except ModuleNotFoundError:
        return "kvikio is not installed"
    except Exception as error:  # of loading libraries, or names that another kvikio has
        return f"kvikio cannot be used: {error}"
    return None


class DirectFile:
    """A file whose bytes go to device memory and come from there directly.

    Nothing here waits for streams: what was told to them before must be complete. The current
    device must be that of the memory.
    """

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name

    def read(self, octets: Any, offset: int) -> None:
        """Fill flat octets of a device with the bytes of the file from `offset` on."""
        self._move(self._file.raw_read, octets, offset)

    def write(self, octets: Any, offset: int) -> None:
        """Write flat octets of a device into the file from `offset` on."""
        self._move(self._file.raw_write, octets, offset)

    def _move(self, call: Callable[..., int], octets: Any, offset: int) -> None:
        done = 0
        while done < octets.size:
            try:
                count = call(octets, octets.size - done, offset + done, done)
            except RuntimeError as error:  # of cuFile, of CUDA and of the file alike
                raise DeviceError(
                    f"{self._name}: GPUDirect Storage failed: {error}; set GPUSTORE_GDS=0 to do "
                    "without it"
                ) from error
            if count == 0:
                raise TruncatedFileError(
                    f"{self._name}: expected {offset + octets.size} bytes or more, found "
                    f"{offset + done}; the file was cut while it was being loaded"
                )
            done += count


@contextlib.contextmanager
def opened(descriptor: int | None, flags: str, name: str) -> Iterator[DirectFile | None]:
    """Give the file of a descriptor for direct access, "r" or "r+"; None where that is not."""
    if descriptor is None or why_not() is not None:
        yield None
        return
    from kvikio import CuFile

    try:
        file = CuFile(f"/proc/self/fd/{descriptor}", flags)
    except (OSError, RuntimeError):  # a file system without direct access
        yield None
        return
    with file:
        yield DirectFile(file, name)
