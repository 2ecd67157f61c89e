"""The script that `make lint` checks by `mypy --strict` also runs."""

from __future__ import annotations

import typed_usage


def test_the_typed_script_runs(tmp_path):
    typed_usage.run(tmp_path)
