"""The arrays of the fake CuPy: they compute by NumPy on memory of their own.

They refuse, as CuPy's do, every conversion that nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpustore.devices import is_array
from gpustore.fake_streams import Machine, MemoryPointer

_ATTRIBUTES = frozenset({"shape", "dtype", "ndim", "size", "itemsize", "nbytes", "strides"})
_METHODS = frozenset({
    "all", "any", "argmax", "argmin", "argsort", "astype", "clip", "conj", "cumprod", "cumsum",
    "diagonal", "dot", "fill", "flatten", "max", "mean", "min", "nonzero", "prod", "ravel",
    "repeat", "reshape", "round", "sort", "squeeze", "std", "sum", "swapaxes", "take", "trace",
    "transpose", "var", "view",
})  # fmt: skip
# NumPy's functions that CuPy 13 does not have under the same name.
_ABSENT = frozenset({
    "apply_over_axes", "bitwise_count", "block", "cumulative_prod", "cumulative_sum",
    "einsum_path", "geomspace", "histogram_bin_edges", "insert", "isnat", "matrix_norm",
    "matrix_transpose", "matvec", "multi_dot", "nanpercentile", "nanquantile", "put_along_axis",
    "spacing", "svdvals", "trapezoid", "unique_all", "unique_counts", "unique_inverse",
    "unique_values", "unstack", "vecdot", "vecmat", "vector_norm",
})  # fmt: skip


class FakeDevice:
    """cupy.cuda.Device."""

    def __init__(self, machine: Machine, ordinal: int | None = None) -> None:
        self._machine = machine
        self._outer: list[int] = []
        self.id = machine.current if ordinal is None else int(ordinal)

    def __enter__(self) -> FakeDevice:
        self._outer.append(self._machine.current)
        self._machine.current = self.id
        return self

    def __exit__(self, *exception: object) -> None:
        self._machine.current = self._outer.pop()

    def synchronize(self) -> None:
        self._machine.check()
        self._machine.synchronize(self.id)


def _converted(convert: Callable[[Any], Any]) -> Callable[[FakeCudaArray], Any]:
    return lambda array: convert(array.get())


class FakeCudaArray(np.lib.mixins.NDArrayOperatorsMixin):
    """cupy.ndarray over a private NumPy array; made by the functions of `fake_cuda`'s module."""

    __slots__ = ("_host", "_machine", "_ordinal")

    def __init__(self, host: NDArray[Any], machine: Machine, ordinal: int) -> None:
        self._host = host
        self._machine = machine
        self._ordinal = ordinal

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._host.flags
        names = ("c_contiguous", "f_contiguous", "fnc", "forc", "owndata")
        return SimpleNamespace(**{name: getattr(flags, name) for name in names})

    @property
    def device(self) -> FakeDevice:
        return FakeDevice(self._machine, self._ordinal)

    @property
    def data(self) -> MemoryPointer:
        flat = self._host.reshape(-1, order="A" if self._host.flags.forc else "C")
        return MemoryPointer(self._machine, flat.view(np.uint8))

    @property
    def T(self) -> FakeCudaArray:
        return self._like(self._host.T)

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self._host, name)
        if name not in _METHODS:
            raise AttributeError(f"the fake cupy.ndarray has no attribute {name!r}")
        return lambda *args, **kwargs: self._wrap(
            getattr(self._host, name)(*self._unwrap(args), **self._unwrap(kwargs))
        )

    def __array__(self, dtype: object = None, copy: object = None) -> NDArray[Any]:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        self._machine.check()
        return 2, self._ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Copy to the host when asked for it; else only for a consumer on CUDA: it has a stream."""
        if dl_device == (1, 0) and copy is not False:
            return self.get(order="A").__dlpack__(max_version=max_version)
        if stream is None or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("unsupported device requested.")
        return self._host.__dlpack__(max_version=max_version)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if ufunc.__name__ in _ABSENT:
            return NotImplemented
        operands = [self._operand(x) for x in inputs]
        result = getattr(ufunc, method)(*operands, **self._unwrap(kwargs))
        out = kwargs.get("out")
        if out is not None:
            return out[0] if len(out) == 1 else out
        return self._wrap(result)

    def __array_function__(
        self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if func.__name__ in _ABSENT or not all(issubclass(t, FakeCudaArray) for t in types):
            return NotImplemented
        self._machine.current_stream().synchronize()
        return self._wrap(func(*self._unwrap(args), **self._unwrap(kwargs)))

    def __getitem__(self, key: Any) -> FakeCudaArray:
        index = self._unwrap(key if isinstance(key, tuple) else (key,))
        if not any(k is Ellipsis for k in index):
            index = (*index, Ellipsis)  # a view, of 0 dimensions too
        return self._like(self._host[index])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._host[self._unwrap(key)] = self._operand(value)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[FakeCudaArray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"FakeCudaArray({self._host!r}, device={self._ordinal})"

    __bool__ = _converted(bool)
    __int__ = _converted(int)
    __float__ = _converted(float)
    __complex__ = _converted(complex)

    def item(self, *index: int) -> Any:
        return self.get().item(*index)

    def tolist(self) -> Any:
        return self.get().tolist()

    def get(
        self,
        stream: object = None,
        order: Literal["C", "F", "A"] = "C",
        out: NDArray[Any] | None = None,
        blocking: bool = True,
    ) -> NDArray[Any]:
        self._machine.current_stream().synchronize()
        self._machine.transfers.append(("d2h", self.nbytes))
        if out is None:
            return np.array(self._host, order=order, copy=True)
        if out.dtype != self.dtype or out.shape != self.shape:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        out[...] = self._host
        return out

    def set(self, arr: NDArray[Any], stream: object = None) -> None:
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError("only a numpy.ndarray of the same dtype and shape can be set")
        self._machine.current_stream().synchronize()
        self._machine.transfers.append(("h2d", self.nbytes))
        self._host[...] = arr

    def copy(self, order: Literal["C", "F", "A", "K"] = "C") -> FakeCudaArray:
        """Copy to the current device."""
        self._machine.current_stream().synchronize()
        host = self._host.copy(order=order)
        ordinal = self._machine.current
        if ordinal != self._ordinal:
            if not host.flags.forc:
                raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
            self._machine.transfers.append(("d2d", self.nbytes))
        return FakeCudaArray(host, self._machine, ordinal)

    def __copy__(self) -> FakeCudaArray:
        return self.copy()

    def __deepcopy__(self, memo: object) -> FakeCudaArray:
        return self._like(self._host.copy())

    def _like(self, host: NDArray[Any]) -> FakeCudaArray:
        return FakeCudaArray(host, self._machine, self._ordinal)

    def _wrap(self, result: Any) -> Any:
        if isinstance(result, (np.ndarray, np.generic)):
            return self._like(np.asarray(result))
        if isinstance(result, list):
            return [self._wrap(item) for item in result]
        if isinstance(result, tuple):
            return tuple(self._wrap(item) for item in result)
        return result

    def _unwrap(self, value: Any) -> Any:
        """Return arguments with the private arrays in place of fake ones, at any depth."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._unwrap, value))
        if isinstance(value, dict):
            return {key: self._unwrap(item) for key, item in value.items()}
        return self._operand(value) if is_array(value) else value

    def _operand(self, value: Any) -> Any:
        if isinstance(value, FakeCudaArray):
            if (value._machine, value._ordinal) != (self._machine, self._ordinal):
                raise TypeError(f"arrays on two devices: {self._ordinal} and {value._ordinal}")
            return value._host
        if not isinstance(value, (bool, int, float, complex, np.bool_, np.number)):
            raise TypeError(f"Unsupported type {type(value)}")
        return value
