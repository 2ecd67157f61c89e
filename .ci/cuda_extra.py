"""Print the extra of gpustore that fits this machine's CUDA driver: cuda12, cuda13 or nothing."""

import ctypes


def cuda_extra() -> str:
    """Ask the driver itself: nothing of CUDA need be installed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return ""
    return "cuda13" if version.value >= 13000 else "cuda12" if version.value >= 12000 else ""


print(cuda_extra())
