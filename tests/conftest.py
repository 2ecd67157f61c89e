"""Hypothesis profiles, the device of the run, and the count of skips by reason."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import gpustore as gs
from gpustore.testing import fake_cuda

collect_ignore = ["fuzz"]  # needs atheris: `make fuzz`
_COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", max_examples=25, **_COMMON)
settings.register_profile("default", max_examples=150, **_COMMON)
settings.register_profile("ci10k", max_examples=1700, **_COMMON)
settings.register_profile(
    "mutations", max_examples=10_000, derandomize=True, database=None, **_COMMON
)
settings.load_profile(os.environ.get("GPUSTORE_HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart() -> None:
    """Stop at once where the real device that the run is for is not there."""
    if os.environ.get("GPUSTORE_TEST_DEVICE") == "cuda" and not (status := gs.cuda_status()):
        pytest.exit(f"GPUSTORE_TEST_DEVICE=cuda: {status.message}", returncode=1)


@pytest.fixture
def cuda() -> Iterator[Any]:
    """Yield the module in the role of CuPy: the strict fake, or the real one under test-gpu."""
    if os.environ.get("GPUSTORE_TEST_DEVICE") == "cuda":
        import cupy

        yield cupy
    else:
        with fake_cuda(2) as cupy:
            yield cupy


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Return what runs the command in this process: exit code, standard output and error."""
    from gpustore.cli import main

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpustore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests were skipped, by reason."""
    reasons = Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"{count} skipped: {reason}")
