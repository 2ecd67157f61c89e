"""Lanes between host and device memory: pinned buffers, streams, events, asynchronous copies.

A lane moves one piece at a time and waits for it; lanes on threads of their own overlap. Beside
`devices` the only module that uses CuPy's arrays, streams and memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpustore import devices
from gpustore.errors import DeviceError, DeviceMemoryError, UnsupportedValueError

LANE_NBYTES = 8 * 1024 * 1024
_DEFAULT_RING_MIB = 128

# cudaError_t of driver_types.h
_OUT_OF_MEMORY, _CAPTURE = 2, range(900, 909)
_ADVICE = {
    46: "another process holds the GPU (nvidia-smi shows which, and the compute mode)",
    54: "another process holds the GPU (nvidia-smi shows which, and the compute mode)",
    214: "the GPU's memory has an error that it cannot correct; see nvidia-smi -q -d ECC",
}
_STOPPED = "an earlier kernel failed or the GPU was lost; what it held is gone, restart the process"
_CAPTURED = "a CUDA graph is being captured; save and load before or after that"

Origins = dict[str, Any]  # device -> the event after which its arrays hold their values


def ring_nbytes() -> int:
    """Return how much pinned host memory one save or load may use; 0 turns staging off.

    It is set by GPUSTORE_RING_MIB, in MiB.
    """
    text = os.environ.get("GPUSTORE_RING_MIB", str(_DEFAULT_RING_MIB))
    if not text.isascii() or not text.isdigit():
        raise UnsupportedValueError(
            f"GPUSTORE_RING_MIB: expected a number of MiB, 0 for no staging, found {text!r}"
        )
    return int(text) * 1024 * 1024


def cuda_array(array: Any) -> Any | None:
    """Return an array of a CUDA device as a CuPy array of the same memory, else None.

    None is for host arrays, and for those that CuPy cannot take: they go the plain way.
    """
    device = devices.array_device(array)
    if device == "cpu" or ring_nbytes() == 0:
        return None
    if devices.is_cupy_array(array):
        return array
    try:
        bits, _ = devices.bits_of(array)
        with devices.cuda_device(device):
            return devices.load_cupy().from_dlpack(bits)
    except devices.EXPORT_ERRORS:
        return None


def has_dtype(dtype: np.dtype[Any]) -> bool:
    """Return whether CuPy has arrays of this dtype, in this byte order."""
    try:
        with explained("cuda"):
            devices.load_cupy().empty(0, dtype)
    except (TypeError, ValueError):
        return False
    return dtype.isnative


def empty_octets(nbytes: int, device: str) -> Any:
    """Return uninitialised memory of a device, as a flat array of uint8.

    Raises DeviceMemoryError, with what was asked and what is free.
    """
    with explained(device, nbytes), devices.cuda_device(device):
        return devices.load_cupy().empty(nbytes, np.uint8)


def shaped(octets: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> Any:
    """Return flat octets of a device as an array of `shape` in memory `order`: a view."""
    flat = octets.view(dtype)
    return flat.reshape(shape[::-1]).T if order == "F" else flat.reshape(shape)


def origins(of: set[str]) -> Origins:
    """Return an event for each device after all that this thread's current stream there does."""
    events = {}
    for device in of:
        with explained(device), devices.cuda_device(device):
            events[device] = devices.load_cupy().cuda.get_current_stream().record(_event())
    return events


def _event() -> Any:
    return devices.load_cupy().cuda.Event(block=True, disable_timing=True)


def free_pooled_memory() -> None:
    """Give what CuPy's pool holds unused back to the device."""
    with contextlib.suppress(Exception):  # on the way out of a failure, which matters more
        devices.load_cupy().get_default_memory_pool().free_all_blocks()


class Lane:
    """A pinned buffer, `host`, and on each device a stream that waits for its origin.

    The buffer is there from the first use on.
    """

    def __init__(self, nbytes: int, starts: Origins) -> None:
        self._nbytes, self._starts = nbytes, starts
        self._streams: dict[str, tuple[Any, Any]] = {}
        self._pinned: Any = None
        self._host: Any = None

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for device, (stream, _) in self._streams.items():
            try:  # after an error: until nothing touches the buffer
                with devices.cuda_device(device):
                    stream.synchronize()
            except Exception:
                with contextlib.suppress(Exception), devices.cuda_device(device) as whole:
                    whole.synchronize()
        self._streams.clear()
        self._host = self._pinned = None

    @property
    def host(self) -> Any:
        """The buffer, as flat octets."""
        if self._host is None:
            one = next(iter(self._starts))  # else the thread would start to use cuda:0 as well
            with explained("pinned host memory", self._nbytes), devices.cuda_device(one):
                self._pinned = devices.load_cupy().cuda.alloc_pinned_memory(self._nbytes)
            self._host = np.frombuffer(self._pinned, np.uint8, self._nbytes)
        return self._host

    def to_host(self, octets: Any, start: int, nbytes: int) -> Any:
        """Return `nbytes` octets of a device from `start` on, in the pinned buffer."""
        host = self.host
        with self._on(octets) as (stream, event):
            (octets.data + start).copy_to_host_async(self._pinned.ptr, nbytes, stream)
            event.record(stream)
            event.synchronize()
        return host[:nbytes]

    def to_device(self, octets: Any, start: int, nbytes: int) -> None:
        """Copy the first `nbytes` octets of the pinned buffer to a device, from `start` on."""
        with self._on(octets) as (stream, event):
            (octets.data + start).copy_from_host_async(self._pinned.ptr, nbytes, stream)
            event.record(stream)
            event.synchronize()

    @contextlib.contextmanager
    def past_the_host(self, octets: Any) -> Iterator[None]:
        """Be on the device of `octets`, once what its origin waits for is done."""
        device = devices.array_device(octets)
        with explained(device), devices.cuda_device(device):
            self._starts[device].synchronize()
            yield

    @contextlib.contextmanager
    def _on(self, octets: Any) -> Iterator[tuple[Any, Any]]:
        device = devices.array_device(octets)
        with explained(device), devices.cuda_device(device):
            if device not in self._streams:
                stream = devices.load_cupy().cuda.Stream(non_blocking=True)
                self._streams[device] = stream, _event()
                stream.wait_event(self._starts[device])
            yield self._streams[device]


@contextlib.contextmanager
def explained(where: str, nbytes: int = 0) -> Iterator[None]:
    """Raise CuPy's errors as DeviceMemoryError, for `nbytes` asked, and DeviceError."""
    cuda = devices.load_cupy().cuda
    try:
        yield
    except cuda.memory.OutOfMemoryError as error:
        raise _memory_error(where, nbytes) from error
    except (cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError) as error:
        if error.status == _OUT_OF_MEMORY:
            raise _memory_error(where, nbytes) from error
        advice = _CAPTURED if error.status in _CAPTURE else _ADVICE.get(error.status, _STOPPED)
        raise DeviceError(f"{where}: {error}; {advice}") from error
    except RuntimeError as error:  # CuPy's own refusal, before CUDA's
        if type(error) is not RuntimeError or "capturing" not in str(error):
            raise
        raise DeviceError(f"{where}: {error}; {_CAPTURED}") from error


def _memory_error(where: str, nbytes: int) -> DeviceMemoryError:
    if not where.startswith("cuda"):
        return DeviceMemoryError(
            f"{where}: expected room for {nbytes} bytes, which the system did not give; set "
            "GPUSTORE_RING_MIB lower (0 does without)"
        )
    free = total = -1
    with contextlib.suppress(Exception), devices.cuda_device(where):
        free, total = devices.load_cupy().cuda.runtime.memGetInfo()
    return DeviceMemoryError(
        f"{where}: expected room for {nbytes} bytes, found {free} free of {total}; free arrays "
        "there, use another device or load to the CPU"
    )
