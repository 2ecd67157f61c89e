"""docs/command.md: every command on the page is run, and prints what stands there.

`GPUSTORE_WRITE_DOCS=1 make test` writes the outputs anew.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from gpustore import cli

PAGE = Path(__file__).parents[1] / "docs" / "command.md"
COMMAND = re.compile(r"```\n\$ gpustore ([^\n]*)\n(.*?)```", re.DOTALL)


@pytest.fixture
def page(run, tmp_path, monkeypatch):
    """Return the page as it is, and as it would be with what its commands print now."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    text = PAGE.read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(script, str(PAGE), "exec"), {})

    def printed(block: re.Match[str]) -> str:
        code, out, err = run(*shlex.split(block[1]))
        assert code == (1 if block[1].startswith("diff m") else 0) and err == ""
        return f"```\n$ gpustore {block[1]}\n{out}```"

    return text, COMMAND.sub(printed, text)


def test_the_commands_on_the_page_print_what_stands_there(page):
    text, expected = page
    if os.environ.get("GPUSTORE_WRITE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected


def test_every_command_and_its_help_is_on_the_page():
    shown = [arguments for arguments, _ in COMMAND.findall(PAGE.read_text(encoding="utf-8"))]
    assert "--help" in shown
    for name in cli.cli.commands:
        assert f"{name} --help" in shown
        assert any(a.startswith(f"{name} ") and not a.endswith("--help") for a in shown)
