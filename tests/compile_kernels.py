"""Compile every kernel for real architectures with NVRTC, as CuPy does; no GPU is needed.

python tests/compile_kernels.py LIBNVRTC...: each library compiles each source for each
architecture, and prints what each kernel takes. Warnings, spilled registers and stack frames are
failures.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "kernels"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--ptxas-options=-warn-spills")


def compiled(nvrtc: Any, source: Path, architecture: str) -> str:
    """Return what the compiler says; raises ValueError with it if it does not compile."""
    program = ctypes.c_void_p()
    code = source.read_bytes()
    called(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, source.name.encode(), 0, None, None)
    )
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*options)
    )
    nbytes = ctypes.c_size_t()
    called(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(nbytes)))
    log = ctypes.create_string_buffer(nbytes.value)
    called(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.value.decode()
    if status:
        raise ValueError(said)
    called(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(nbytes)))
    assert nbytes.value > 1000, "no machine code"
    called(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)))
    return said


def called(status: int) -> None:
    assert status == 0, f"NVRTC gives status {status}"


def kernels_in(said: str) -> dict[str, tuple[int, int]]:
    """Return the registers, and the bytes of stack and spills, of each kernel in ptxas's words."""
    pattern = (
        r"Function properties for (\w+)\s+(?:ptxas\s+\.\s+)?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s.*?Used (\d+) registers"
    )
    return {
        name: (int(registers), sum(map(int, spilled)))
        for name, *spilled, registers in re.findall(pattern, said, re.DOTALL)
    }


def main() -> None:
    for library in sys.argv[1:]:
        nvrtc = ctypes.CDLL(library)
        major, minor = ctypes.c_int(), ctypes.c_int()
        called(nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        for source in sorted(KERNELS.glob("*.cu")):
            for architecture in ARCHITECTURES:
                said = compiled(nvrtc, source, architecture)
                found = kernels_in(said)
                assert found, f"nothing was compiled: {said}"
                assert "warning" not in said, said
                assert not any(spilled for _, spilled in found.values()), said
                taken = ", ".join(f"{name} {registers}" for name, (registers, _) in found.items())
                print(f"NVRTC {major.value}.{minor.value} {architecture} registers: {taken}")


if __name__ == "__main__":
    main()
