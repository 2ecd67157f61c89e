"""devices.py on machines that are faked, and on the one at hand."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from gpustore import fake_arrays, fake_streams
from gpustore import fake_cuda as testing
from gpustore.devices import (
    array_device,
    cuda_status,
    current_device,
    is_array,
    parse_device,
    require_cuda,
    to_device,
    to_host,
)
from gpustore.errors import CUDAUnavailableError, UnsupportedValueError
from gpustore.testing import FakeCudaArray, fake_cuda

FAILURES = {
    "cupy-missing": ("cupy-missing", r"CuPy is not installed; run pip install 'gpustore\[cuda12\]"),
    "broken": ("cupy-broken", "ImportError: libcublas.so.12: cannot open"),
    "no-driver": ("no-driver", "no NVIDIA driver is loaded .*InsufficientDriver"),
    "no-device": ("no-device", "no CUDA device is visible"),
}


@dataclass
class Duck:
    """An array of another library, seen through DLPack alone."""

    host: np.ndarray
    device: tuple[int, int] = (1, 0)
    before_dlpack_1: bool = False
    exports: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dtype(self) -> np.dtype:
        return self.host.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if self.before_dlpack_1 and options:
            raise TypeError(f"unexpected keyword arguments {sorted(options)}")
        self.exports.append(options)
        is_for_here = options.get("dl_device") in (None, self.device)
        if is_for_here and self.device[0] == 2 and stream is None:
            raise BufferError("not to the CPU")
        return self.host.__dlpack__(max_version=options.get("max_version"))


@dataclass
class TorchLike(Duck):
    """A tensor: has no NumPy dtype, may hold a gradient, copies itself to the CPU."""

    torch_dtype: Any = "torch.float32"
    requires_grad: bool = False

    @property
    def dtype(self) -> Any:
        return self.torch_dtype

    def detach(self) -> TorchLike:
        return TorchLike(self.host, self.device, torch_dtype=self.torch_dtype)

    def cpu(self) -> TorchLike:
        return TorchLike(self.host.copy(order="K"), torch_dtype=self.torch_dtype)

    def view(self, dtype: Any) -> TorchLike:
        return TorchLike(self.host.view(dtype), self.device, torch_dtype=dtype)

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient")
        if "float" in str(self.torch_dtype) and self.torch_dtype != "torch.float32":
            raise BufferError(f"no {self.torch_dtype} in this DLPack")
        return super().__dlpack__(**options)


def column_major() -> np.ndarray:
    return np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))


def test_importing_devices_imports_no_cupy() -> None:
    code = "import sys, gpustore.devices; sys.exit(any('cupy' in name for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("x", [np.zeros(2), np.zeros(()), np.ma.zeros(2), Duck(np.zeros(2))])
def test_arrays_of_any_library_are_arrays(x: object) -> None:
    assert is_array(x)


@pytest.mark.parametrize("x", [np.float32(1), 1.0, [1], None, "cpu", Duck, np.ndarray, object()])
def test_scalars_lists_and_classes_are_not_arrays(x: object) -> None:
    assert not is_array(x)


@pytest.mark.parametrize(
    ("dlpack", "device"),
    [((1, 0), "cpu"), ((3, 1), "cpu"), ((2, 0), "cuda:0"), ((2, 3), "cuda:3"), ((13, 1), "cuda:1")],
)
def test_array_device_is_what_dlpack_says(dlpack: tuple[int, int], device: str) -> None:
    assert array_device(Duck(np.zeros(2), dlpack)) == device


@pytest.mark.parametrize(
    ("device_type", "name"), [(8, "Metal"), (10, "ROCm"), (14, "oneAPI"), (99, "device type 99")]
)
def test_other_devices_are_refused_by_name(device_type: int, name: str) -> None:
    with pytest.raises(UnsupportedValueError, match=f"Duck: expected cpu or cuda, found {name}"):
        array_device(Duck(np.zeros(2), (device_type, 0)))


def test_array_device_of_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match="list: expected an array"):
        array_device([1.0])


@pytest.mark.parametrize("name", ["cpu", "cuda:0", "cuda:1", "cuda:10", "cuda:999"])
def test_full_device_names_stay_as_they_are(name: str) -> None:
    assert parse_device(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:01", "cuda:1000", "cuda:1 ", "cuda:1\n",
     "cuda:٣", " cuda", "cuda:1.0", None, 0],
)  # fmt: skip
def test_other_device_names_are_refused(name: Any) -> None:
    with pytest.raises(UnsupportedValueError, match="expected 'cpu', 'cuda' or 'cuda:N'"):
        parse_device(name)


def test_cuda_is_the_current_device() -> None:
    with fake_cuda() as cupy, cupy.cuda.Device(1):
        assert current_device() == "cuda:1"
        assert parse_device("cuda") == "cuda:1"
        assert array_device(to_device(np.zeros(2), "cuda")) == "cuda:1"


def test_cuda_is_device_0_where_cuda_is_not_available() -> None:
    with fake_cuda(fail="no-driver"):
        assert parse_device("cuda") == "cuda:0"


def test_status_of_a_working_machine() -> None:
    with fake_cuda(3):
        status = cuda_status()
    assert status
    assert status.available
    assert status.cause is None
    assert (status.device_count, status.cupy_version) == (3, "13.6.0")


@pytest.mark.parametrize("fail", FAILURES)
def test_each_failing_machine_has_its_cause_and_message(fail: Any) -> None:
    cause, text = FAILURES[fail]
    with fake_cuda(fail=fail):
        status = cuda_status()
        assert not status
        assert (status.available, status.cause, status.device_count) == (False, cause, 0)
        with pytest.raises(CUDAUnavailableError, match=f"cuda:0 is not available: .*{text}") as e:
            require_cuda("cuda")
        assert e.value.cause == cause
        with pytest.raises(CUDAUnavailableError, match=text):
            to_device(np.zeros(2), "cuda:0")
        require_cuda("cpu")
    assert cuda_status() == cuda_status()


def test_status_is_asked_anew_each_time() -> None:
    with fake_cuda(fail="no-device"):
        assert not cuda_status()
        with fake_cuda():
            assert cuda_status()
        assert not cuda_status()


@pytest.mark.parametrize(
    ("status", "text"),
    [(35, "driver is too old for this CuPy, it knows CUDA 11.4; run pip install"),
     (101, "no CUDA device is visible"), (3, "CUDA does not start .*initialization")],
)  # fmt: skip
def test_a_loaded_driver_that_fails_is_not_called_missing(
    status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        fake_streams.STATUS_TEXT,
        3,
        "cudaErrorInitializationError: initialization",
    )
    with fake_cuda() as cupy:
        runtime = cupy.cuda.runtime

        def fail() -> int:
            raise runtime.CUDARuntimeError(status)

        runtime.getDeviceCount = fail
        runtime.driverGetVersion = lambda: 11040
        with pytest.raises(CUDAUnavailableError, match=text):
            require_cuda("cuda:0")


def test_zero_devices_are_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with fake_cuda(0):
        status = cuda_status()
    assert status.cause == "no-device"
    assert "CUDA_VISIBLE_DEVICES='' hides" in status.message


def test_an_ordinal_beyond_the_devices_is_its_own_cause() -> None:
    with fake_cuda(2):
        require_cuda("cuda:1")
        with pytest.raises(CUDAUnavailableError, match="cuda:2 .*: expected one of 2 device") as e:
            require_cuda("cuda:2")
        assert e.value.cause == "no-such-ordinal"
        with pytest.raises(CUDAUnavailableError):
            to_device(np.zeros(2), "cuda:2")


@pytest.mark.parametrize(
    "error",
    [ModuleNotFoundError("No module named 'cupy_backends'", name="cupy_backends"),
     AttributeError("module 'cupy' has no attribute 'cuda'"), RuntimeError("numpy.dtype size")],
)  # fmt: skip
def test_any_other_error_of_the_import_is_broken_and_one_line(error: Exception) -> None:
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name != "cupy":
                return
            if isinstance(error, ModuleNotFoundError):
                raise error
            raise ImportError("====\n\n  page of advice") from error

    with fake_cuda(fail="broken"):
        sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
        try:
            status = cuda_status()
        finally:
            del sys.meta_path[0]
    assert status.cause == "cupy-broken"
    assert f"({type(error).__name__}: {error})" in status.message
    assert "\n" not in status.message


def test_a_folder_named_cupy_is_broken_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    assert cuda_status().cause == "cupy-broken"
    assert to_host(Duck(np.arange(2))).tolist() == [0, 1]


def test_warnings_of_the_import_stay_in(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text(
        "import warnings; warnings.warn('CUDA path could not be detected')"
    )
    with fake_cuda(fail="cupy-missing"):
        monkeypatch.syspath_prepend(tmp_path)
        del sys.modules["cupy"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "no attribute" in cuda_status().message


def test_numpy_arrays_are_not_copied_to_the_host() -> None:
    array = column_major()
    assert to_host(array) is array
    assert to_device(array, "cpu") is array


def test_cpu_arrays_of_other_libraries_are_viewed_not_copied() -> None:
    duck = Duck(column_major())
    host = to_host(duck)
    assert np.shares_memory(host, duck.host)
    assert host.strides == duck.host.strides
    assert to_device(duck, "cpu") is duck


def test_gradients_are_left_behind() -> None:
    tensor = TorchLike(column_major(), requires_grad=True)
    assert np.shares_memory(to_host(tensor), tensor.host)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("device", [(1, 0), (2, 0)])
def test_dtypes_of_ml_dtypes_go_by_their_bits(name: str, device: tuple[int, int]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = column_major().astype(getattr(ml_dtypes, name))
    dtype = TorchDtype(name, array.dtype.itemsize)
    host = to_host(TorchLike(array, device, torch_dtype=dtype))
    assert host.dtype == array.dtype
    assert host.tobytes("A") == array.tobytes("A")
    assert np.shares_memory(host, array) == (device == (1, 0))


class TorchDtype:
    """torch.bfloat16 and its like; this module plays torch, and int8 and int16 are torch's."""

    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize

    def __str__(self) -> str:
        return f"torch.{self.name}"


int8, int16 = np.int8, np.int16


def test_a_dtype_that_numpy_cannot_take_is_refused_with_a_hint() -> None:
    tensor = TorchLike(np.zeros(2), torch_dtype="torch.float4_e2m1fn_x2")
    with pytest.raises(UnsupportedValueError, match="TorchLike of torch.float4.*convert it"):
        to_host(tensor)


def test_without_ml_dtypes_bfloat16_is_refused_with_a_hint(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    tensor = TorchLike(np.zeros(2), torch_dtype=TorchDtype("bfloat16", 2))
    with pytest.raises(UnsupportedValueError, match="pip install ml_dtypes"):
        to_host(tensor)


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_survives_both_ways(order: Any) -> None:
    array = np.asarray(np.arange(24.0).reshape(2, 3, 4), order=order)
    with fake_cuda() as cupy:
        there = to_device(array, "cuda:1")
        assert isinstance(there, FakeCudaArray)
        assert array_device(there) == "cuda:1"
        assert there.strides == array.strides
        back = to_host(there)
        assert cupy.transfers == [("h2d", array.nbytes), ("d2h", array.nbytes)]
    assert back.strides == array.strides
    np.testing.assert_array_equal(back, array)
    assert not np.shares_memory(back, array)


@pytest.mark.parametrize(
    "array",
    [np.zeros(()), np.zeros((0, 3)), np.arange(10)[::-2], np.arange(24).reshape(2, 3, 4).T[1],
     np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), np.ones(3, ">f4"), np.array([True])],
)  # fmt: skip
def test_arrays_of_any_shape_and_stride_arrive_whole(array: np.ndarray) -> None:
    with fake_cuda():
        back = to_device(to_device(array, "cuda:0"), "cpu")
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


def test_copies_run_with_the_arrays_device_current_and_restore_it() -> None:
    current = []
    with fake_cuda() as cupy:
        there = to_device(np.ones(2), "cuda:1")
        get = FakeCudaArray.get
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                FakeCudaArray,
                "get",
                lambda array, **options: (
                    current.append(cupy.cuda.runtime.getDevice()) or get(array, **options)
                ),
            )
            to_host(there)
        assert current == [1]
        assert cupy.cuda.runtime.getDevice() == 0


def test_an_array_on_the_device_already_is_the_same_object() -> None:
    with fake_cuda() as cupy:
        there = to_device(np.ones(2), "cuda:1")
        assert to_device(there, "cuda:1") is there
        foreign = Duck(np.ones(2), (2, 0))
        assert to_device(foreign, "cuda:0") is foreign
        assert len(cupy.transfers) == 1


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_arrays_cross_from_device_to_device(axes: tuple[int, ...]) -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    with fake_cuda() as cupy:
        first = to_device(array, "cuda:0").transpose(axes)
        second = to_device(first, "cuda:1")
        assert array_device(second) == "cuda:1"
        assert cupy.transfers == [("h2d", 192), ("d2d", 192)]
        assert second.flags.f_contiguous == first.flags.f_contiguous
        np.testing.assert_array_equal(to_host(second), array.transpose(axes))


def test_foreign_cuda_arrays_copy_themselves_without_cupy() -> None:
    with fake_cuda(fail="cupy-missing"):
        tensor = TorchLike(column_major(), (2, 1), requires_grad=True)
        host = to_host(tensor)
        assert host.flags.f_contiguous
        assert not np.shares_memory(host, tensor.host)
        duck = Duck(column_major(), (2, 0))
        np.testing.assert_array_equal(to_host(duck), duck.host)
        assert duck.exports[-1]["dl_device"] == (1, 0)
        assert duck.exports[-1]["copy"] is True


def test_foreign_cuda_arrays_before_dlpack_1_go_through_cupy() -> None:
    duck = Duck(column_major(), (2, 1), before_dlpack_1=True)
    with fake_cuda() as cupy:
        host = to_host(duck)
        assert cupy.transfers == [("d2h", duck.host.nbytes)]
    assert host.flags.f_contiguous
    np.testing.assert_array_equal(host, duck.host)
    with (
        fake_cuda(fail="cupy-missing"),
        pytest.raises(CUDAUnavailableError, match="CuPy is not installed") as e,
    ):
        to_host(duck)
    assert e.value.cause == "cupy-missing"


def test_foreign_arrays_move_to_another_device() -> None:
    for source in (TorchLike(column_major()), Duck(column_major(), (2, 0))):
        with fake_cuda():
            there = to_device(source, "cuda:1")
            assert array_device(there) == "cuda:1"
            np.testing.assert_array_equal(to_host(there), source.host)


def test_dtypes_that_cupy_lacks_are_refused_by_name() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (object, "U3", "M8[s]", ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16):
        name = str(np.dtype(dtype))
        with (
            fake_cuda(),
            pytest.raises(UnsupportedValueError, match=f"{re.escape(name)}.*convert it"),
        ):
            to_device(np.zeros(2, np.int8).astype(dtype), "cuda:0")


def test_out_of_memory_passes_unchanged() -> None:
    with fake_cuda() as cupy:
        error = cupy.cuda.memory.OutOfMemoryError("Out of memory allocating 16 bytes")

        def fail(*args: Any, **options: Any) -> None:
            raise error

        cupy.asarray = fail
        with pytest.raises(MemoryError) as e:
            to_device(np.zeros(2), "cuda:0")
        assert e.value is error
        assert cupy.cuda.runtime.getDevice() == 0


# The fake itself.


def test_the_fake_refuses_implicit_conversion() -> None:
    with fake_cuda() as cupy:
        x = cupy.asarray(np.ones((2, 2)))
        for convert in (np.asarray, np.array, np.from_dlpack, memoryview):
            with pytest.raises((TypeError, BufferError)):
                convert(x)
        for mix in (
            lambda: x + np.ones(2),
            lambda: np.ones((2, 2)) @ x,
            lambda: np.concatenate([x, np.ones((2, 2))]),
            lambda: np.where(np.ones((2, 2), bool), x, 0),
            lambda: x[np.array([0])],
            lambda: x.__setitem__(0, np.ones(2)),
            lambda: np.add(x, [1, 2]),
            lambda: np.ones(3)[x],
            lambda: np.block([x, x]),
            lambda: np.vecdot(x, x),
            lambda: np.ones((2, 2)).__setitem__(0, x),
            lambda: x + None,
        ):
            with pytest.raises((TypeError, ValueError)):
                mix()
        assert cupy.transfers == [("h2d", 32)]


def test_the_fake_refuses_arrays_of_two_devices() -> None:
    with fake_cuda():
        x, y = to_device(np.ones(2), "cuda:0"), to_device(np.ones(2), "cuda:1")
        for mix in (lambda: x + y, lambda: np.stack([x, y]), lambda: np.add(x, 1, out=y)):
            with pytest.raises(TypeError, match="arrays on two devices"):
                mix()


def test_the_fake_computes_what_numpy_does() -> None:
    a = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)

    def compute(x: Any) -> list[Any]:
        y = x.copy()
        y[0] = 7
        y[y > 6] += 1
        y -= x.mean(axis=1, keepdims=True)
        return [
            y, np.maximum(x, 0), np.exp(x) / np.exp(x).sum(axis=0), np.where(x > 0, x, 0.1 * x),
            x @ x.T, -x, 2 - x, x**2, abs(x), x == y, x.max(axis=0, keepdims=True), x.sum(),
            np.concatenate([x, x], axis=1), np.stack([x, y]), np.einsum("ij,kj->ik", x, y),
            x.reshape(-1)[1:5:2], x[..., None], x[1, 2], np.tanh(x).astype(np.float64),
            np.add.reduce(x, axis=0), np.divmod(x, 2)[1], *np.split(x, 3, axis=1),
            np.zeros_like(x), x.transpose(1, 0), np.clip(x, 0, None), x.var(axis=0),
        ]  # fmt: skip

    with fake_cuda() as cupy:
        results = compute(cupy.asarray(a))
        assert all(isinstance(result, FakeCudaArray) for result in results)
        hosts = [result.get(order="A") for result in results]
    for host, expected in zip(hosts, compute(a), strict=True):
        assert host.dtype == np.asarray(expected).dtype
        np.testing.assert_array_equal(host, expected)


def test_the_fake_is_copied_on_its_device() -> None:
    with fake_cuda() as cupy:
        there = to_device(np.ones(2), "cuda:1")
        for copied in (copy.deepcopy(there), copy.copy(there)):
            assert copied.get().tolist() == [1, 1]
        assert array_device(copy.deepcopy(there)) == "cuda:1"
        assert array_device(there.copy()) == "cuda:0"  # CuPy copies to the current device
        with pytest.raises(NotImplementedError):
            cupy.array(to_device(np.ones((2, 3, 4)), "cuda:1").transpose(1, 0, 2))


def test_the_fake_views_share_memory_and_in_place_operators_keep_the_object() -> None:
    with fake_cuda() as cupy:
        x = y = cupy.zeros((2, 3), np.float32, order="F")
        assert x.flags.f_contiguous
        x += 1
        assert x is y
        x[1, 2][...] = 5
        x.T[0] = 3
        assert x.get().tolist() == [[3, 1, 1], [3, 1, 5]]
        assert float(x[1, 2]) == 5
        assert bool(x.any())
        assert len(x) == 2
        assert [row.shape for row in x] == [(3,), (3,)]
        assert cupy.get_array_module(x) is cupy
        assert cupy.get_array_module(1) is np


def test_the_fake_leaves_no_trace() -> None:
    before, path = sys.modules.get("cupy"), list(sys.meta_path)
    for fail in (None, *FAILURES):
        with pytest.raises(ZeroDivisionError), fake_cuda(fail=fail):  # type: ignore[arg-type]
            raise ZeroDivisionError
        assert sys.modules.get("cupy") is before
        assert sys.meta_path == path


# The machine at hand.


def real_cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)


def test_real_cupy_missing_is_reported() -> None:
    try:
        import cupy  # noqa: F401
    except ModuleNotFoundError:
        assert cuda_status().cause == "cupy-missing"
    else:
        pytest.skip("CuPy is installed")


def test_real_cupy_without_a_gpu_is_reported() -> None:
    cupy = real_cupy()
    status = cuda_status()
    if status:
        pytest.skip("there is a GPU")
    assert status.cause in ("no-driver", "no-device")
    assert status.cupy_version == cupy.__version__
    with pytest.raises(CUDAUnavailableError) as e:
        to_device(np.zeros(2), "cuda")
    assert e.value.cause == status.cause
    assert "\n" not in str(e.value)


def test_the_fake_offers_no_more_than_real_cupy() -> None:
    cupy = real_cupy()
    for name in fake_arrays._ATTRIBUTES | fake_arrays._METHODS | set(vars(FakeCudaArray)):
        assert name.startswith("_") or hasattr(cupy.ndarray, name), name
    for name in vars(testing._fake_cupy(fake_streams.Machine(1))):
        assert name in ("transfers", "machine") or hasattr(cupy, name), name
    if cupy.__version__.startswith("13."):
        assert [name for name in fake_arrays._ABSENT if hasattr(cupy, name)] == []


@pytest.mark.parametrize("order", ["C", "F"])
def test_real_gpu_keeps_memory_order_and_values(order: Any) -> None:
    real_cupy()
    if not cuda_status():
        pytest.skip(cuda_status().message)
    array = np.asarray(np.random.default_rng(0).normal(size=(5, 7, 3)), order=order)
    there = to_device(array, "cuda:0")
    assert array_device(there) == "cuda:0"
    assert there.strides == array.strides
    back = to_host(there)
    assert back.strides == array.strides
    np.testing.assert_array_equal(back, array)
    np.testing.assert_array_equal(to_host(there.transpose(1, 0, 2)), array.transpose(1, 0, 2))
    with pytest.raises(CUDAUnavailableError, match="expected one of"):
        to_device(array, "cuda:999")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(UnsupportedValueError, match="float8_e4m3fn"):
        to_device(array.astype(ml_dtypes.float8_e4m3fn), "cuda:0")
