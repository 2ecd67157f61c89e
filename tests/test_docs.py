"""The README's tour runs as printed, and the demo prints what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpustore.testing import fake_cuda

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_tour_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with fake_cuda(fail="no-driver"), pytest.warns(UserWarning, match="stays on the CPU"):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    expected = re.findall(r"(?:print\(.*\)) +# (.*)", code)
    assert printed == expected and len(printed) == 2


def test_the_demo_prints_what_the_readme_says():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    demo = [sys.executable, "-W", "error", str(ROOT / "docs" / "demo.py")]
    shown = subprocess.run(demo, capture_output=True, text=True, check=True, env=environment).stdout
    (block,) = re.findall(r"`make demo` prints:\n\n```\n(.*?)```", README, re.DOTALL)

    def without_cupy(text: str) -> list[str]:  # what is said of CuPy depends on the machine
        return [re.sub(r"(CUDA(?: here)?:|not available:).*", r"\1", x) for x in text.splitlines()]

    assert without_cupy(shown) == without_cupy(block)


def test_every_module_and_public_name_has_a_docstring():
    import gpustore

    for name in gpustore.__all__:
        thing = getattr(gpustore, name)
        assert callable(thing) is False or thing.__doc__, name
