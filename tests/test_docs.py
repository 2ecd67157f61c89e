"""The README's tour runs as printed, and the demo prints what the README says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpustore as gs
from gpustore import allowlist, eras, flux, interpret
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


def test_the_bench_for_gpus_runs_on_the_fake_device(tmp_path):
    bench = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--fake", "--mib", "1", str(tmp_path)]
    shown = subprocess.run(bench, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert shown.count("load: share of the ceiling") == 8  # of four models, verified and not
    assert list(tmp_path.iterdir()) == []


def test_every_module_and_public_name_has_a_docstring():
    import gpustore

    for name in gpustore.__all__:
        thing = getattr(gpustore, name)
        assert callable(thing) is False or thing.__doc__, name


# --- docs/flux.md is made of the tables -------------------------------------------------------


def eras_seen() -> dict[str, set[str]]:
    """Return the eras of the fixtures whose recorded outputs each layer's class takes part in."""
    folder, seen = ROOT / "tests" / "fixtures" / "julia", {}
    for file in sorted(folder.glob("*_flux0*.json")):
        records = json.loads(file.read_text()).get("forward") or []
        root = gs.load(file.with_suffix(".bson"), lost="placeholder")
        era = re.search(r"_flux0(\d+)", file.stem)[1]
        for record in records:
            for _, node in gs.tree.walk(root[record["model"]]):
                seen.setdefault(type(node).__name__, set()).add(f"0.{int(era)}")
    return seen


def flux_page() -> str:
    """Return docs/flux.md, made of the table of layers and the list of functions."""
    lines = [
        "# Layers and functions of Flux",
        "",
        "Made by the tests from `gpustore/eras.py` and `gpustore/allowlist.py`; "
        "`GPUSTORE_WRITE_DOCS=1 make test` writes it anew.",
        "",
        "## Layers",
        "",
        "Every layer runs forward. *Layouts* are the number of fields a file may hold, and the "
        "first Flux that writes it so; *checked* are the Flux versions whose recorded outputs it "
        "gives in the tests.",
        "",
        "| layer | struct in the file | layouts | checked |",
        "|---|---|---|---|",
    ]
    seen = eras_seen()
    rows: dict[tuple[str, str], list[Any]] = {}
    for kind in eras.TABLE:
        if kind.becomes is None:
            rows.setdefault((kind.cls.__name__, kind.name), []).append(kind)
    for (cls, name), kinds in sorted(rows.items()):
        counts: dict[int, str] = {}
        for kind in kinds:
            counts.setdefault(len(kind.fields), kind.since)
        layouts = ", ".join(f"{n} ({since})" if since != "0" else str(n)
                            for n, since in counts.items())  # fmt: skip
        checked = ", ".join(sorted(seen.get(cls, ()), key=lambda v: int(v[2:])))
        lines.append(f"| {cls} | `{name}` | {layouts} | {checked} |")
    held = sorted(name.replace("#", "") for name in flux.FUNCTIONS)
    known = sorted([*allowlist.TABLE, *interpret._SPECIAL, *allowlist.CONSTANTS])
    lines += [
        "", "## Functions", "", "Held by name in a file, as an activation or a connection:", "",
        ", ".join(f"`{name}`" for name in held) + ".",
        "", "Called by the code of anonymous functions:", "",
        ", ".join(f"`{name}`" for name in known) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def test_the_page_of_layers_and_functions_is_that_of_the_tables():
    page = ROOT / "docs" / "flux.md"
    if os.environ.get("GPUSTORE_WRITE_DOCS"):
        page.write_text(flux_page(), encoding="utf-8")
    assert page.read_text(encoding="utf-8") == flux_page()


def test_links_between_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
