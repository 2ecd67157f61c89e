"""A strict fake of CuPy for tests that must run on machines without a GPU.

`fake_cuda` stands in for the module in `sys.modules`. Its arrays compute by NumPy on memory of
their own and refuse, as CuPy's do, every conversion that nobody asked for; copies between host and
device are counted. Unlike CuPy's, results stay on the operands' device, not the current one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpustore.devices import is_array
from gpustore.fake_arrays import FakeCudaArray, FakeDevice
from gpustore.fake_streams import (
    CUDADriverError,
    CUDARuntimeError,
    Event,
    Machine,
    OutOfMemoryError,
    Stream,
)

FailMode = Literal["cupy-missing", "broken", "no-driver", "no-device"]

_FAIL_STATUS = {"no-driver": 35, "no-device": 100}
_DTYPE_CHARS = "?bhilqBHILQefdFD"  # CuPy 13: cupy/_core/_dtype.pyx


def _array(
    machine: Machine,
    obj: Any,
    dtype: Any = None,
    copy: bool | None = True,
    order: Literal["C", "F", "A", "K"] | None = "K",
    *,
    blocking: bool = False,
) -> FakeCudaArray:
    """cupy.array: on the current device, row-major unless the source is column-major."""
    ordinal = machine.current
    if isinstance(obj, FakeCudaArray):
        here = obj if obj.device.id == ordinal and not copy else obj.copy(order or "K")
        return here if dtype is None else here.astype(dtype, copy=False)
    if is_array(obj) and not isinstance(obj, np.ndarray):
        raise TypeError(f"Unsupported type {type(obj)}")
    source = np.asarray(obj, dtype)
    if source.dtype.char not in _DTYPE_CHARS:
        raise ValueError(f"Unsupported dtype {source.dtype}")
    layout = "A" if order in (None, "K") else order
    machine.current_stream().refuse_capture()
    host = np.array(source, source.dtype.newbyteorder("<"), order=layout, copy=True)
    machine.transfers.append(("h2d", host.nbytes))
    return FakeCudaArray(host, machine, ordinal)


def _asarray(
    machine: Machine,
    a: Any,
    dtype: Any = None,
    order: Literal["C", "F", "A", "K"] | None = None,
    *,
    copy: bool | None = None,
    blocking: bool = False,
) -> FakeCudaArray:
    return _array(machine, a, dtype, copy, order)


def _zeros(
    machine: Machine, shape: Any, dtype: Any = float, order: Literal["C", "F"] = "C"
) -> FakeCudaArray:
    if np.dtype(dtype).char not in _DTYPE_CHARS:
        raise ValueError(f"Unsupported dtype {np.dtype(dtype)}")
    return FakeCudaArray(machine.allocate(shape, dtype, order), machine, machine.current)


def _ascontiguousarray(a: FakeCudaArray, dtype: Any = None) -> FakeCudaArray:
    return a if a.flags.c_contiguous and dtype in (None, a.dtype) else a.copy("C")


def _asnumpy(
    a: Any,
    stream: object = None,
    order: Literal["C", "F", "A"] = "C",
    out: NDArray[Any] | None = None,
    *,
    blocking: bool = True,
) -> NDArray[Any]:
    return a.get(stream, order, out) if isinstance(a, FakeCudaArray) else np.asarray(a, order=order)


class _HostCapsule:
    """What a CUDA array exports to the fake, shown to NumPy as the host memory that it is."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(stream=1)


def _from_dlpack(machine: Machine, array: Any, *, device: None = None, copy: None = None) -> Any:
    """cupy.from_dlpack: the same memory, which must be a CUDA array's."""
    device_type, ordinal = array.__dlpack_device__()
    if device_type not in (2, 13):
        raise TypeError("CPU arrays cannot be directly imported to CuPy.")
    machine.check()
    return FakeCudaArray(np.from_dlpack(_HostCapsule(array)), machine, int(ordinal))


def _device_count(machine: Machine) -> int:
    machine.check()
    return machine.device_count


def _is_available(machine: Machine) -> bool:
    """cupy.cuda.is_available as in CuPy 13, which raises where there is no driver."""
    if machine.status != 100:
        machine.check()
    return machine.status is None


def _fake_cupy(machine: Machine) -> ModuleType:
    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDevice=lambda: machine.current,
        getDeviceCount=partial(_device_count, machine),
        driverGetVersion=lambda: 0 if machine.status == 35 else 12090,
        runtimeGetVersion=lambda: 12090,
        memGetInfo=lambda: (
            machine.memory_nbytes - machine.used_nbytes[machine.current],
            machine.memory_nbytes,
        ),
    )
    module = ModuleType("cupy")
    vars(module).update(
        __version__="13.6.0",
        transfers=machine.transfers,
        machine=machine,
        ndarray=FakeCudaArray,
        array=partial(_array, machine),
        asarray=partial(_asarray, machine),
        asnumpy=_asnumpy,
        ascontiguousarray=_ascontiguousarray,
        concatenate=np.concatenate,
        empty=partial(_zeros, machine),
        zeros=partial(_zeros, machine),
        from_dlpack=partial(_from_dlpack, machine),
        get_array_module=lambda *args: (
            module if any(isinstance(x, FakeCudaArray) for x in args) else np
        ),
        cuda=SimpleNamespace(
            Device=partial(FakeDevice, machine),
            Event=partial(Event, machine),
            Stream=partial(Stream, machine, None),
            alloc_pinned_memory=machine.allocate_pinned,
            get_current_stream=machine.current_stream,
            is_available=partial(_is_available, machine),
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=runtime,
        ),
    )
    return module


class _BrokenImport:
    """A finder of modules that fails for cupy as a missing CUDA library does."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "cupy":
            raise ImportError("libcublas.so.12: cannot open shared object file")


@contextlib.contextmanager
def fake_cuda(
    device_count: int = 2, *, fail: FailMode | None = None, memory_nbytes: int = 2**40
) -> Iterator[Any]:
    """Give the block a machine with CUDA devices that are not there, or one that fails so.

    The value is the module that stands for CuPy; its `transfers` lists each copy so far as
    ("h2d" | "d2h" | "d2d", nbytes), its `machine` is that of `gpustore.fake_streams`. Import
    nothing from the real CuPy inside.

    >>> with fake_cuda() as cupy:
    ...     weight = cupy.asarray(np.ones(2))
    ...     (weight + 1).get(), cupy.transfers
    (array([2., 2.]), [('h2d', 16), ('d2h', 16)])
    """
    fake = _fake_cupy(Machine(device_count, _FAIL_STATUS.get(fail or ""), memory_nbytes))
    modules: dict[str, Any] = sys.modules
    outer = {"cupy": modules.pop("cupy")} if "cupy" in modules else {}
    finder = _BrokenImport()
    if fail == "broken":
        sys.meta_path.insert(0, finder)
    else:
        modules["cupy"] = None if fail == "cupy-missing" else fake
    try:
        yield fake
    finally:
        if fail == "broken":
            sys.meta_path.remove(finder)
        modules.pop("cupy", None)
        modules.update(outer)
