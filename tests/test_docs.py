"""What the documentation tells to type runs, its links lead somewhere, and nothing is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_page as pages

import gpustore as gs
from gpustore import allowlist, calls, eras, flux, testing
from gpustore.testing import fake_cuda

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages speak of."""
    julia = ROOT / "tests" / "fixtures" / "julia"
    shutil.copy(julia / "doc_model_flux08_v1.bson", tmp_path / "mymodel.bson")
    shutil.copy(julia / "custom_struct_flux012_v1.bson", tmp_path / "autoenc.bson")
    shutil.copy(julia / "gpu_conv_g3_v1.bson", tmp_path / "lost.bson")
    monkeypatch.chdir(tmp_path)
    with fake_cuda(1):
        gs.save("tagged.bson", model=gs.gpu(gs.Chain(gs.Dense(2, 2)), "cuda:0"), on_gpu="tag")
    double = gs.OpaqueFunction(gs.JuliaType.named("Main.#double"), [])
    gs.save("named.bson", model=gs.Chain(double, gs.Dense(10, 10)))
    return tmp_path


def run_page(page: Path) -> None:
    run = [sys.executable, "-W", "error", str(ROOT / "tests" / "run_page.py"), str(page)]
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


OWN_TEST = {"docs/tutorial.md", "docs/howto/ci.md"}
TYPED = [page for page in PAGES if pages.blocks(page) and name_of(page) not in OWN_TEST]


@pytest.mark.parametrize("page", TYPED, ids=name_of)
def test_what_a_page_tells_to_type_runs(page, folder):
    code = "".join(text for language, _, text, _ in pages.blocks(page) if language == "python")
    for library in sorted(set(re.findall(r"^import (torch|jax)\b", code, re.MULTILINE))):
        pytest.importorskip(library, exc_type=ImportError)
    run_page(page)


def test_every_block_of_a_page_is_of_a_language_that_is_run_or_named():
    known = {"python", "console", "julia", "text", ""}
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert {fence.split(" ")[0] for fence in fences} <= known, page


def test_the_tutorials_model_is_trained_on_a_gpu_and_served_without(folder):
    run_page(ROOT / "docs" / "tutorial.md")  # writes train.py and serve.py, and trains on the CPU
    with fake_cuda(1):
        names: dict[str, Any] = {}
        exec(compile(Path("train.py").read_text(), "train.py", "exec"), names)
        assert gs.device_of(names["model"]) == "cuda:0" and names["accuracy"] > 0.95
    serve = [sys.executable, "-W", "error", "serve.py", "0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as server:
        try:
            url = server.stdout.readline().split()[-1]
            status, answer = post(url, b"[[1, 1, 0, 0], [1, -1, 0, 0]]")
            assert status == 200 and answer[0][0] > 0.9 and answer[1][0] < 0.1
            np.testing.assert_allclose(np.sum(answer, axis=1), 1, rtol=1e-5)
            for wrong in (b"[[1, 2]]", b"no json", b'{"a": 1}', b"[1, 2, 3, 4]"):
                status, answer = post(url, wrong)
                assert status == 400 and list(answer) == ["error"]
        finally:
            server.terminate()


def post(url: str, body: bytes) -> tuple[int, Any]:
    """Return status and answer of a request, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data=body), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_tests_that_the_page_for_ci_shows_pass(folder):
    run_page(ROOT / "docs" / "howto" / "ci.md")  # writes them
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "."]
    done = subprocess.run(run, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and int(passed) >= 5, done.stdout


def test_every_file_that_a_page_shows_is_run_by_a_test():
    shown = {title for page in PAGES for _, title, _, _ in pages.blocks(page) if title}
    assert {name for name in shown if not name.startswith("test_")} == {
        "train.py", "serve.py", "conftest.py"
    }  # fmt: skip


def test_the_demo_prints_what_the_readme_says():
    demo = [sys.executable, "-W", "error", str(ROOT / "docs" / "demo.py")]
    shown = subprocess.run(demo, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    (block,) = re.findall(r"`make demo` prints:\n\n```\n(.*?)```", README, re.DOTALL)

    def without_cupy(text: str) -> list[str]:  # what is said of CuPy depends on the machine
        return [re.sub(r"(CUDA(?: here)?:|not available:).*", r"\1", x) for x in text.splitlines()]

    assert without_cupy(shown) == without_cupy(block)


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
    held = sorted(name.replace("#", "") for name in flux.known_functions())
    known = sorted([*allowlist.TABLE, *calls.SPECIAL, *allowlist.CONSTANTS])
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


# --- links and completeness -------------------------------------------------------------------


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs both make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", prose(page)):
        if ":" in target:
            continue
        other = page.parent / target if target else page
        made_by_the_site = other.name == "changelog.md"
        assert made_by_the_site or other.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(other), f"{page.name}: {target}#{anchor}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    assert set(listed) - {"changelog.md"} == there


def test_the_reference_has_every_public_name_once():
    folder, shown = ROOT / "docs" / "reference", []
    for page in folder.glob("*.md"):
        shown += re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    names = [name.removeprefix("gpustore.") for name in shown]
    assert len(names) == len(set(names))
    values = {"__version__"}
    public = {"save.save" if n == "save" else "load.load" if n == "load" else n for n in gs.__all__}
    public |= {f"testing.{name}" for name in testing.__all__}
    public |= {f"fixtures.{name}" for name in ("gpustore_device",)}
    public |= {f"interop.{name}" for name in ("in_framework", "tensor", "to_torch")}
    public |= {"convert.convert", "stored.ArrayEntry", "verify.Verification", "plot.plot"}
    public |= {f"inspection.{name}" for name in ("inspect", "Inspection", "figures_of")}
    public |= {"figures.figures", "figures.Figures"}
    public |= {"difference.difference", "difference.Difference"}
    assert set(names) == public - values
