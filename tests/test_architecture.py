"""The shape of the house: who imports whom, and what must not be there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpustore

PACKAGE = Path(gpustore.__file__).parent
ORDER = [
    "version",
    "errors",
    "workers",
    "gds",
    "devices",
    "staging",
    "digest",
    "kernels",
    "layout",
    "rows",
    "small",
    "encoder",
    "likeness",
    "runs",
    "tagged",
    "repeats",
    "scanner",
    "document",
    "sharing",
    "newfile",
    "storage",
    "foreign",
    "tree",
    "parameters",
    "notebook",
    "julia",
    "dtypes",
    "kinds",
    "model_state",
    "activations",
    "layers",
    "functions",
    "composition",
    "normalisation",
    "attention",
    "recurrent",
    "correlation",
    "convolution",
    "pooling",
    "eras",
    "flux",
    "limits",
    "arithmetic",
    "broadcasting",
    "semantics",
    "reductions",
    "networks",
    "allowlist",
    "code",
    "listing",
    "calls",
    "interpret",
    "values",
    "wrappers",
    "specs",
    "datatypes",
    "dictionaries",
    "twins",
    "memo",
    "clones",
    "lift",
    "typeof",
    "arrays",
    "survey",
    "templates",
    "lower",
    "transfer",
    "ring",
    "output",
    "placement",
    "torch_modules",
    "interop",
    "save",
    "verify",
    "entries",
    "stored",
    "load",
    "safetensors_format",
    "npz_format",
    "convert",
    "figures",
    "origin",
    "inspection",
    "difference",
    "plot",
    "fake_streams",
    "fake_arrays",
    "fake_cuda",
    "testing",
    "fixtures",
    "terminal",
    "outline",
    "cli",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FORBIDDEN = {"utils", "helpers", "common", "base", "core"}


def parsed(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gpustore":
            names |= {f"gpustore.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_every_module_is_in_the_order_and_none_has_a_forbidden_name():
    assert set(MODULES) == set(ORDER)
    assert not FORBIDDEN & set(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_those_above_it(module):
    above = ORDER[: ORDER.index(module)]
    ours = {name.split(".")[1] for name in imported(parsed(module)) if name.startswith("gpustore.")}
    assert ours <= set(above)


@pytest.mark.parametrize(
    "module",
    sorted(
        set(MODULES) - {"devices", "staging", "kernels", "fake_arrays", "fake_cuda", "fake_streams"}
    ),
)
def test_only_those_below_the_waist_name_cupy(module):
    for node in ast.walk(parsed(module)):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or ""
        assert "cupy" not in str(name).lower()
    assert not any(name.startswith("cupy") for name in imported(parsed(module)))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"terminal", "outline", "cli"}))
def test_only_the_command_needs_click_and_rich(module):
    packages = {name.partition(".")[0] for name in imported(parsed(module))}
    assert not packages & {"click", "rich"}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_runs_code_from_a_file_is_there(module):
    tree = parsed(module)
    assert not {"pickle", "marshal", "shelve", "runpy"} & imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("module", MODULES)
def test_modules_can_be_read_in_one_sitting(module):
    assert len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines()) <= 445


def test_importing_gpustore_imports_nothing_optional():
    code = "import sys, gpustore; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in shown.stdout.split()}
    assert not loaded & {"cupy", "torch", "jax", "click", "rich", "hypothesis", "pytest", "bson"}


def test_importing_gpustore_imports_no_layers_until_one_is_asked_for():
    """Files of arrays need none; every name is there all the same."""
    code = (
        "import sys, gpustore; print('gpustore.eras' in sys.modules, 'gpustore.layers' in "
        "sys.modules); from gpustore import *; print({*gpustore.__all__} <= {*dir()}, "
        "{*gpustore.__all__} <= {*dir(gpustore)}, {*gpustore.activations.__all__} <= "
        "{*gpustore.__all__}, Dense is gpustore.layers.Dense, hasattr(gpustore, 'Densee'))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False", "True", "True", "True", "True", "False"]
    assert {*gpustore.activations.__all__} == {*gpustore._LAYERS["activations"].split()}


@pytest.mark.parametrize(
    "use",
    [
        "gs.load(path, 'model')",
        "gs.open_file(path)['model']",
        "gs.save(path, gs.load(path))",
        "print(gs.tree.TrackedArray(1)._repr_html_())",
        "gs.save(path, gs.tree.TrackedArray(np.ones(3))); gs.load(path)",
        "gs.save(path, function=np.add); assert gs.load(path, 'function') is gs.functions.add",
    ],
)
def test_layers_are_imported_where_a_model_needs_them(tmp_path, use):
    """In a fresh process, which has not asked for one."""
    path = tmp_path / "model.bson"
    gpustore.save(path, model=gpustore.Chain(gpustore.Dense(2, 2, gpustore.relu)))
    code = f"import numpy as np, gpustore as gs, gpustore.tree; path = {str(path)!r}; {use}"
    subprocess.run([sys.executable, "-c", code], check=True)
