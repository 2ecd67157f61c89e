"""The script that `make lint` checks by `mypy --strict` uses the whole interface, and runs."""

from __future__ import annotations

import ast
from pathlib import Path

import typed_usage

import gpustore
from gpustore import errors, testing


def test_the_typed_script_runs(tmp_path):
    typed_usage.run(tmp_path)


def test_the_typed_script_uses_every_public_name():
    tree = ast.parse(Path(typed_usage.__file__).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not {*gpustore.__all__, *testing.__all__} - used
    classes = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert not classes - set(gpustore.__all__)
