"""The machine of the fake CuPy: devices, streams, events, pinned and device memory, and faults.

What is queued on a stream happens only when somebody waits for it, so that a missing wait shows as
wrong values. `faults` makes a stage fail, `violations` lists what a real device would not forgive.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATUS_TEXT = {
    2: "cudaErrorMemoryAllocation: out of memory",
    35: "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version",
    46: "cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable",
    100: "cudaErrorNoDevice: no CUDA-capable device is detected",
    101: "cudaErrorInvalidDevice: invalid device ordinal",
    400: "cudaErrorInvalidResourceHandle: invalid resource handle",
    700: "cudaErrorIllegalAddress: an illegal memory access was encountered",
    719: "cudaErrorLaunchFailure: unspecified launch failure",
}
_STICKY = (700, 719)  # every later call fails with the same status
FAULT_STAGES = ("pinned", "memory", "stream", "event", "copy", "record", "run", "wait")


class CUDARuntimeError(RuntimeError):
    """CuPy's error of this name: `status` is CUDA's code."""

    def __init__(self, status: int) -> None:
        super().__init__(STATUS_TEXT[status])
        self.status = status


class CUDADriverError(RuntimeError):
    """CuPy's error of this name, which launches of kernels raise."""

    def __init__(self, status: int) -> None:
        super().__init__(STATUS_TEXT[status].replace("cudaError", "CUDA_ERROR_"))
        self.status = status


class OutOfMemoryError(MemoryError):
    """CuPy's error of this name."""


@dataclass(slots=True)
class _Pinned:
    """One block of pinned memory, and how many queued copies have yet to touch it."""

    block: weakref.ref[Any]
    nbytes: int
    pending: int = 0


class _PinnedBlock(np.ndarray[Any, Any]):
    """cupy.cuda.PinnedMemoryPointer: a buffer with an address."""

    @property
    def ptr(self) -> int:
        return int(self.ctypes.data)


@dataclass(eq=False)
class Machine:
    """What all arrays of one fake share.

    `faults[stage] = (n, status)` lets the n-th use of a stage from now on (0: the next) fail with a
    status of CUDA; `memory_nbytes` is how much each device has.
    """

    device_count: int
    status: int | None = None
    memory_nbytes: int = 2**40
    transfers: list[tuple[str, int]] = field(default_factory=list)
    faults: dict[str, tuple[int, int]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    pinned: dict[int, _Pinned] = field(default_factory=dict)
    pinned_peak_nbytes: int = 0
    used_devices: set[int] = field(default_factory=set)  # by memory, a stream or an event
    lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.used_nbytes = [0] * self.device_count
        self.null_streams = [Stream(self, ordinal) for ordinal in range(self.device_count)]
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet(self.null_streams)
        self._local = threading.local()

    def check(self) -> None:
        if self.status is not None:
            raise CUDARuntimeError(self.status)

    def reach(self, stage: str) -> None:
        """Fail here if a fault of this stage is due."""
        with self.lock:
            self.check()
            if stage in ("pinned", "memory", "stream", "event"):
                self.used_devices.add(self.current)
            left, status = self.faults.get(stage, (-1, 0))
            if left >= 0:
                self.faults[stage] = (left - 1, status)
            if left == 0:
                self.status = status if status in _STICKY else None
                raise CUDARuntimeError(status)

    @property
    def current(self) -> int:
        self.check()
        ordinal: int = getattr(self._local, "ordinal", 0)
        return ordinal

    @current.setter
    def current(self, ordinal: int) -> None:
        if not 0 <= ordinal < self.device_count:
            raise CUDARuntimeError(101)
        self._local.ordinal = ordinal

    @property
    def current_streams(self) -> dict[int, Stream]:
        """This thread's current stream of each device, where it is not the null stream."""
        if not hasattr(self._local, "streams"):
            self._local.streams = {}
        streams: dict[int, Stream] = self._local.streams
        return streams

    def synchronize(self, ordinal: int) -> None:
        """Run all that is queued on a device."""
        for stream in [stream for stream in self.streams if stream.device_id == ordinal]:
            stream.synchronize()

    def current_stream(self) -> Stream:
        return self.current_streams.get(self.current, self.null_streams[self.current])

    def allocate(self, shape: Any, dtype: Any, order: Any) -> NDArray[Any]:
        """Return zeroed memory of the current device, counted until the last view of it is gone."""
        ordinal = self.current
        nbytes = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        with self.lock:
            try:
                self.reach("memory" if nbytes else "")
                if self.used_nbytes[ordinal] + nbytes > self.memory_nbytes:
                    raise CUDARuntimeError(2)
            except CUDARuntimeError as error:
                if error.status != 2:
                    raise
                raise OutOfMemoryError(f"Out of memory allocating {nbytes:,} bytes") from None
            self.used_nbytes[ordinal] += nbytes
        host = np.full(shape, 0, dtype, order=order)
        weakref.finalize(host, self._release, ordinal, nbytes)
        return host

    def _release(self, ordinal: int, nbytes: int) -> None:
        self.used_nbytes[ordinal] -= nbytes

    def allocate_pinned(self, nbytes: int) -> Any:
        self.reach("pinned")
        block = np.full(nbytes, 0xEE, np.uint8).view(_PinnedBlock)
        self.pinned[block.ptr] = _Pinned(weakref.ref(block), nbytes)
        weakref.finalize(block, self._release_pinned, block.ptr)
        self.pinned_peak_nbytes = max(self.pinned_peak_nbytes, self.pinned_nbytes)
        return block

    def _release_pinned(self, address: int) -> None:
        if self.pinned.pop(address).pending and self.status not in _STICKY:
            self.violations.append("pinned memory was freed before the copies that use it")

    @property
    def pinned_nbytes(self) -> int:
        return sum(pinned.nbytes for pinned in list(self.pinned.values()))

    def copy_async(self, stream: Stream, device: Any, mem: Any, nbytes: int, kind: str) -> None:
        """Queue a copy between octets of a device and pinned memory at an address."""
        address = mem if isinstance(mem, int) else mem.value
        self.reach("copy")
        stream.refuse_capture()
        if nbytes > device.size:
            raise CUDARuntimeError(700)
        for start, pinned in list(self.pinned.items()):
            if start <= address and address + nbytes <= start + pinned.nbytes:
                break
        else:
            self.violations.append("an asynchronous copy of memory that is not pinned")
            return
        part = slice(address - start, address - start + nbytes)

        def copy() -> None:
            pinned.pending -= 1
            self.reach("run")
            block = pinned.block()
            if block is None:
                self.violations.append("a copy ran after its pinned memory was freed")
            elif kind == "h2d":
                device[:nbytes] = block[part]
            else:
                block[part] = device[:nbytes]

        pinned.pending += 1
        self.transfers.append((kind, nbytes))
        stream.launch(copy)


class Stream:
    """cupy.cuda.Stream: a queue that runs when it is waited for."""

    def __init__(self, machine: Machine, ordinal: int | None = None, **options: bool) -> None:
        if ordinal is None:
            machine.reach("stream")
        self.machine = machine
        self.device_id = machine.current if ordinal is None else ordinal
        self._queue: deque[Callable[[], None]] = deque()
        if ordinal is None:
            machine.streams.add(self)
        self._outer: list[Stream | None] = []
        self.queued = self.done_count = 0
        self.is_captured = False  # into a CUDA graph

    def refuse_capture(self) -> None:
        if self.is_captured:
            raise RuntimeError("the current stream is capturing, so transfers are disallowed")

    def launch(self, operation: Callable[[], None]) -> None:
        """Queue an operation, as a kernel is queued."""
        with self.machine.lock:
            self._queue.append(operation)
            self.queued += 1

    def run(self, count: int) -> None:
        """Run the queue up to its `count`-th operation since the stream was made."""
        with self.machine.lock:
            while self.done_count < count:
                self.done_count += 1
                self._queue.popleft()()

    def synchronize(self) -> None:
        self.machine.reach("wait")
        self.run(self.queued)

    def record(self, event: Event) -> Event:
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.machine.check()
        self.is_captured |= event.is_captured
        self.launch(event.run)

    def __enter__(self) -> Stream:
        streams = self.machine.current_streams
        if self.device_id != self.machine.current:
            raise RuntimeError("The device that the stream is created on does not match")
        self._outer.append(streams.get(self.device_id))
        streams[self.device_id] = self
        return self

    def __exit__(self, *exception: object) -> None:
        outer = self._outer.pop()
        if outer is None:
            del self.machine.current_streams[self.device_id]
        else:
            self.machine.current_streams[self.device_id] = outer


class Event:
    """cupy.cuda.Event."""

    def __init__(self, machine: Machine, block: bool = False, disable_timing: bool = False) -> None:
        machine.reach("event")
        self._machine = machine
        self._device_id = machine.current
        self._until: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._machine.reach("record")
        stream = self._machine.current_stream() if stream is None else stream
        if stream.device_id != self._device_id:
            raise CUDARuntimeError(400)
        self._until = stream, stream.queued

    @property
    def is_captured(self) -> bool:
        return self._until is not None and self._until[0].is_captured

    def run(self) -> None:
        if self._until is not None:
            stream, count = self._until
            stream.run(count)

    def synchronize(self) -> None:
        self._machine.reach("wait")
        self.run()


class MemoryPointer:
    """cupy.cuda.MemoryPointer: octets of a device from one address on."""

    def __init__(self, machine: Machine, octets: NDArray[Any]) -> None:
        self._machine, self._octets = machine, octets

    @property
    def ptr(self) -> int:
        return int(self._octets.ctypes.data)

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self._machine, self._octets[offset:])

    def copy_to_host_async(self, mem: Any, size: int, stream: Stream) -> None:
        self._machine.copy_async(stream, self._octets, mem, size, "d2h")

    def copy_from_host_async(self, mem: Any, size: int, stream: Stream) -> None:
        self._machine.copy_async(stream, self._octets, mem, size, "h2d")
