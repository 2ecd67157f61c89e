"""CUDA kernels compiled for the host by g++: what the fake device runs in the tests."""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpustore.fake_streams import CUDADriverError, CUDARuntimeError

HEADER = Path(__file__).parent / "cuda.h"
KERNELS = Path(__file__).parents[2] / "kernels"
FLAGS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-sign-compare", "-Wno-unused-function"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-clobbered"]
FLAGS += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]


def kernel_names(code: str) -> list[str]:
    """Return the names of the kernels in a source, those made by TURN(nbytes, type) among them."""
    plain = re.findall(r'extern "C" __global__[^(]*\([^)]*\)\s*(\w+)\(const', code)
    return [*plain, *(f"turn_{n}" for n in re.findall(r"^TURN\((\d+),", code, re.MULTILINE))]


class HostModule:
    """cupy.RawModule whose kernels run on the host: on the arrays of one fake device's machine."""

    def __init__(self, folder: Path, machine: Any, code: str) -> None:
        self.machine, self.launches = machine, []
        self._library = _compiled(folder, code)

    def compile(self) -> None: ...

    def get_function(self, name: str) -> Callable[..., None]:
        sizes = (ctypes.c_uint * 16)()
        count = self._library.argument_sizes(name.encode(), sizes)
        assert count >= 0, f"no kernel {name}"

        def kernel(grid: tuple[int], block: tuple[int], args: tuple[Any, ...]) -> None:
            assert len(args) == count and len(grid) == len(block) == 1
            assert 0 < grid[0] < 2**31 and 0 < block[0] <= 1024
            values = [_value(arg, sizes[i]) for i, arg in enumerate(args)]
            try:
                self.machine.reach("launch")
            except CUDARuntimeError as error:  # launches are the driver's
                raise CUDADriverError(error.status) from None
            self.launches.append(name)

            def run(held: Any = args) -> None:  # as CuPy's pool, which gives memory on in order
                pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(v) for v in values))
                assert not self._library.launch(name.encode(), *grid, *block, pointers)

            self.machine.current_stream().launch(run)

        return kernel


def _value(arg: Any, nbytes: int) -> Any:
    if not isinstance(arg, np.generic):  # an array of the device: its address
        assert nbytes == 8
        return ctypes.c_uint64(arg.data.ptr)
    assert arg.nbytes == nbytes, "a number of another width than the kernel's"
    return (ctypes.c_char * nbytes).from_buffer_copy(arg.tobytes())


def _compiled(folder: Path, code: str) -> ctypes.CDLL:
    stem = folder / hashlib.sha256(code.encode()).hexdigest()[:16]
    library = stem.with_suffix(".so")
    if not library.exists():
        entries = "".join(f"KERNEL({name}), " for name in kernel_names(code))
        table = f"static const host::Entry entries[] = {{{entries}{{nullptr, nullptr, nullptr}}}};"
        source = stem.with_suffix(".cpp")
        source.write_text(f'#include "{HEADER}"\n{code}\n{table}\nLAUNCHER\n', encoding="utf-8")
        subprocess.run(["g++", *FLAGS, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))
