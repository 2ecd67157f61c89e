"""A fixture for pytest that runs a test on every device there is, and on a fake one.

It is there for those who ask for it: `pytest_plugins = ["gpustore.fixtures"]` in the topmost
conftest.py, or `pytest -p gpustore.fixtures`. That gpustore is installed changes no test run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpustore.devices import cuda_status
from gpustore.fake_cuda import fake_cuda

_FAKE = "fake-cuda:0"


@pytest.fixture
def gpustore_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the name of a device: "cpu", each CUDA device of this machine, then a fake "cuda:0".

    A test that takes it runs once for each. The fake one stands in the place of CuPy while the
    test runs, works on every machine, and refuses implicit copies as CuPy does.
    """
    if request.param != _FAKE:
        yield request.param
        return
    with fake_cuda(1):
        yield "cuda:0"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Look for devices, only where a test wants them."""
    if "gpustore_device" in metafunc.fixturenames:
        real = [f"cuda:{ordinal}" for ordinal in range(cuda_status().device_count)]
        metafunc.parametrize("gpustore_device", ["cpu", *real, _FAKE], indirect=True)
