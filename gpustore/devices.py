"""What device an array is on, why CUDA is not there, and copies between host and device.

With `staging` the only module that names CuPy; what needs it imports it, this module never does.
Devices are named "cpu" and "cuda:N"; arrays of CuPy, torch and jax are asked theirs through DLPack.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from gpustore import gds
from gpustore.errors import CUDAUnavailableError, UnsupportedValueError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# DLDeviceType of dlpack.h; kDLCUDAHost is pinned host memory, kDLCUDAManaged counts as its device.
_CPU_TYPES, _CUDA_TYPES = (1, 3), (2, 13)
_OTHER_TYPES = {
    4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm host memory",
    12: "an extension device", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon", 17: "MAIA",
}  # fmt: skip

# cudaError_t of driver_types.h: cudaErrorInsufficientDriver; cudaErrorNoDevice, ...InvalidDevice.
_INSUFFICIENT_DRIVER, _NO_DEVICE = 35, (100, 101)

_DEVICE_NAME = r"cuda(:(0|[1-9][0-9]{0,2}))?"
_INSTALL = "run pip install 'gpustore[cuda12]' (or 'gpustore[cuda13]', as the NVIDIA driver is)"

# What libraries raise when an array cannot be exported or has a dtype that the other side lacks.
EXPORT_ERRORS = (AttributeError, BufferError, ImportError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class CUDAStatus:
    """Whether CUDA can be used here, and if not, why; true in a boolean context if it can.

    `cause` is None or one of "cupy-missing", "cupy-broken", "no-driver" (none, too old, or not
    working) and "no-device"; `message` is one sentence for the user, with the way out.
    `device_count` is 0 where it is not available, `cupy_version` None without CuPy.
    """

    available: bool
    cause: str | None
    message: str
    device_count: int
    cupy_version: str | None

    def __bool__(self) -> bool:
        return self.available

    @property
    def transfers(self) -> str:
        """How arrays go between files and devices, in words."""
        reason = gds.why_not()
        if reason is not None:
            return f"through pinned host memory ({reason})"
        return "by GPUDirect Storage or through pinned host memory, whichever is found faster"


def is_array(x: object) -> bool:
    """Return whether `x` is an array of NumPy or of any library that speaks DLPack.

    >>> is_array(np.zeros(2)), is_array(np.float32(2)), is_array([1, 2])
    (True, False, False)
    """
    return isinstance(x, np.ndarray) or hasattr(type(x), "__dlpack_device__")


def array_device(array: Any) -> str:
    """Return the device that holds the array's memory: "cpu" (pinned or not) or "cuda:N".

    Raises UnsupportedValueError for memory of any other kind of device.

    >>> array_device(np.zeros(2))
    'cpu'
    """
    if isinstance(array, np.ndarray):
        return "cpu"
    if is_cupy_array(array):  # its own record: a GPU in error answers no question about memory
        return f"cuda:{array.device.id}"
    try:
        device_type, ordinal = map(int, array.__dlpack_device__())
    except EXPORT_ERRORS as error:
        message = f"{type(array).__name__}: expected an array that knows its device"
        raise UnsupportedValueError(f"{message}, found: {error}") from error
    if device_type in _CPU_TYPES:
        return "cpu"
    if device_type in _CUDA_TYPES:
        return f"cuda:{ordinal}"
    found = _OTHER_TYPES.get(device_type, f"device type {device_type} of DLPack")
    raise UnsupportedValueError(
        f"{type(array).__name__}: expected cpu or cuda, found {found}; copy it to the CPU first"
    )


def parse_device(name: str) -> str:
    """Return the device's full name, "cpu" or "cuda:N", whether or not it exists.

    "cuda" is the current CUDA device. Raises UnsupportedValueError for any other form.

    >>> parse_device("cuda:1")
    'cuda:1'
    """
    if not isinstance(name, str) or (name != "cpu" and not re.fullmatch(_DEVICE_NAME, name)):
        raise UnsupportedValueError(
            f"device: expected 'cpu', 'cuda' or 'cuda:N' with N from 0 to 999, found {name!r}"
        )
    return current_device() if name == "cuda" else name


def current_device() -> str:
    """Return this thread's current CUDA device, "cuda:N"; "cuda:0" where CUDA cannot be used."""
    return f"cuda:{load_cupy().cuda.runtime.getDevice()}" if cuda_status() else "cuda:0"


def cuda_status() -> CUDAStatus:
    """Return whether CUDA can be used here and, if not, why; asked anew each time, never raises.

    >>> cuda_status().available == bool(cuda_status())
    True
    """
    try:
        return _probe(load_cupy())
    except Exception as error:
        return _unusable(error)


def require_cuda(device: str) -> None:
    """Raise CUDAUnavailableError, `cause` as in CUDAStatus or "no-such-ordinal", if not usable.

    >>> require_cuda("cpu")
    """
    target = parse_device(device)
    if target == "cpu":
        return
    status = cuda_status()
    if not status:
        raise CUDAUnavailableError(f"{target} is not available: {status.message}", status.cause)
    if int(target.removeprefix("cuda:")) >= status.device_count:
        message = f"{target} is not available: expected one of {status.device_count} device(s)"
        raise CUDAUnavailableError(message + _visible_devices(), "no-such-ordinal")


def to_host(array: Any) -> NDArray[Any]:
    """Return the array's values as a NumPy array of the same shape, dtype and memory order.

    A NumPy array comes back as it is, another library's CPU array as a view of the same memory
    (read-only where its library says so), a CUDA array as a copy, column-major if it is.

    Raises UnsupportedValueError if NumPy cannot take it, CUDAUnavailableError if only CuPy could.

    >>> to_host(np.arange(3))
    array([0, 1, 2])
    """
    device = array_device(array)
    if isinstance(array, np.ndarray):
        return array
    if is_cupy_array(array):
        return _cupy_to_host(array, device)
    try:
        return _foreign_to_host(array, device)
    except CUDAUnavailableError:
        raise
    except EXPORT_ERRORS as error:
        raise UnsupportedValueError(
            f"{type(array).__name__} of {getattr(array, 'dtype', '?')}: NumPy cannot take it, "
            f"found: {error}; convert it to a dense array of a NumPy dtype first (bfloat16 and "
            "float8 need pip install ml_dtypes)"
        ) from error


def memory_of(array: Any) -> Any:
    """Return a key that two tensors have in common which are the same memory, as tied weights are.

    Other arrays are themselves only, and so are views that negate or conjugate when they are read.
    """
    try:
        place = array.data_ptr(), tuple(array.stride()), _is_lazy(array)
    except (AttributeError, RuntimeError):  # no tensor, or one that is not dense
        return id(array)
    kind = tuple(array.shape), str(array.dtype), str(array.device)
    return (*place, *kind) if all(array.shape) else id(array)


def _is_lazy(tensor: Any) -> bool:
    """Whether what lies in a tensor's memory is yet to be conjugated or negated."""
    return bool(getattr(tensor, "is_conj", bool)() or getattr(tensor, "is_neg", bool)())


def to_device(array: Any, device: str) -> Any:
    """Return the array on `device`, memory order kept; the same object if it is there already.

    Otherwise a NumPy array ("cpu", see `to_host`) or a CuPy array ("cuda:N"), filled on CuPy's
    current stream there: until that has run, do not change the source if its memory is pinned.

    Raises CUDAUnavailableError, UnsupportedValueError for a dtype that CuPy lacks, and lets CuPy's
    OutOfMemoryError (a MemoryError) through.

    >>> to_device(np.arange(3), "cpu")
    array([0, 1, 2])
    """
    source, target = array_device(array), parse_device(device)
    if source == target:
        return array
    if target == "cpu":
        return to_host(array)
    require_cuda(target)
    if is_cupy_array(array):
        return _across_devices(array, source, target)
    return _host_to_cuda(to_host(array), target)


def load_cupy() -> Any:
    """Return the module, imported with its warnings (duplicate packages, CUDA's path) held back."""
    if "cupy" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("cupy")
    return importlib.import_module("cupy")


def _probe(cupy: Any) -> CUDAStatus:
    # Not cupy.cuda.is_available(): it keeps its first answer, and in CuPy 13 it raises once first.
    version, runtime = str(cupy.__version__), cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        if error.status not in _NO_DEVICE:
            return CUDAStatus(False, "no-driver", _driver_message(runtime, error), 0, version)
        count = 0
    if count == 0:
        message = "no CUDA device is visible; see whether nvidia-smi lists one" + _visible_devices()
        return CUDAStatus(False, "no-device", message, 0, version)
    return CUDAStatus(True, None, f"CuPy {version} with {count} CUDA device(s)", count, version)


def _driver_message(runtime: Any, error: Any) -> str:
    driver = int(runtime.driverGetVersion())  # 12020: CUDA 12.2; 0: no driver
    if driver == 0:
        return f"no NVIDIA driver is loaded ({error}); install it, or give the container the GPU"
    if error.status == _INSUFFICIENT_DRIVER:
        known = f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the NVIDIA driver is too old for this CuPy, it knows CUDA {known}; {_INSTALL}"
    return f"CUDA does not start ({error}); check nvidia-smi, and do not fork after using CUDA"


def _unusable(error: Exception) -> CUDAStatus:
    if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        return CUDAStatus(False, "cupy-missing", f"CuPy is not installed; {_INSTALL}", 0, None)
    reason = error.__cause__ or error  # CuPy wraps the real error in a page of advice
    text = " ".join(str(reason).split())[:300]
    message = f"CuPy is installed but does not work ({type(reason).__name__}: {text}); "
    message += f"remove every package that pip list shows as cupy*, then {_INSTALL}"
    return CUDAStatus(False, "cupy-broken", message, 0, None)


def _visible_devices() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r} hides the others)"


def cuda_device(name: str) -> Any:
    """Return CuPy's context manager that makes a device, "cuda:N", this thread's current one."""
    return load_cupy().cuda.Device(int(name.removeprefix("cuda:")))


def is_cupy_array(array: Any) -> bool:
    """Return whether it is an array of CuPy: whoever holds one has imported it."""
    return isinstance(array, getattr(sys.modules.get("cupy"), "ndarray", ()))


def _cupy_to_host(array: Any, device: str) -> NDArray[Any]:
    with cuda_device(device):
        return cast("NDArray[Any]", array.get(order="A"))


def _foreign_to_host(array: Any, device: str) -> NDArray[Any]:
    # A library copies its own CUDA arrays without CuPy, and in dtypes that CuPy does not have.
    bits, dtype = bits_of(array)
    if _is_lazy(bits):
        bits = bits.resolve_conj().resolve_neg()
    if device == "cpu":
        host = np.from_dlpack(bits)
    elif hasattr(bits, "cpu"):
        host = np.from_dlpack(bits.cpu())
    else:
        try:
            host = np.from_dlpack(bits, device="cpu", copy=True)
        except EXPORT_ERRORS:  # a library, or a NumPy, older than DLPack 1.0
            require_cuda(device)
            host = _cupy_to_host(load_cupy().from_dlpack(bits), device)
    return host if dtype is None else host.view(dtype)


def bits_of(array: Any) -> tuple[Any, np.dtype[Any] | None]:
    """Return the array and None; or, for types of ml_dtypes, its bits as integers and the type."""
    if getattr(array, "requires_grad", False):
        array = array.detach()
    name = str(array.dtype).rpartition(".")[2]  # "torch.bfloat16", "bfloat16"
    if not name.startswith(("bfloat16", "float8_")):
        return array, None
    import ml_dtypes

    bits_name = f"int{8 * array.dtype.itemsize}"
    library = np if isinstance(array.dtype, np.dtype) else sys.modules[type(array.dtype).__module__]
    return array.view(getattr(library, bits_name)), np.dtype(getattr(ml_dtypes, name))


def _host_to_cuda(host: NDArray[Any], device: str) -> Any:
    try:
        with cuda_device(device):
            return load_cupy().asarray(host, order="K")
    except ValueError as error:
        raise UnsupportedValueError(
            f"array of {host.dtype}: expected a dtype that CuPy has, found: {error}; convert it "
            "first, or keep it on the CPU (bfloat16 needs CuPy 14 and ml_dtypes)"
        ) from error


def _across_devices(array: Any, source: str, target: str) -> Any:
    # The copy runs on the target's stream, which waits for nothing on the source device. Order "K"
    # would fail for arrays that are neither row- nor column-major.
    cuda_device(source).synchronize()
    with cuda_device(target) as device:
        copied = array.copy(order="A")
        device.synchronize()
    return copied
