"""Run what a page of the documentation tells its reader to type.

python tests/run_page.py docs/howto/rescue.md        # in a folder with the files it speaks of

Blocks of Python run in one namespace, in order, as on a machine without CuPy; each print's comment
is what it prints. In blocks of the console the commands `gpustore` and `python` run, and what
stands below one is its output. A block with a title is a file, written here.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

from gpustore.testing import fake_cuda

BLOCK = re.compile(
    r'^```(python|console)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE
)
GPUSTORE = [sys.executable, "-c", "import sys, gpustore.cli; sys.exit(gpustore.cli.main())"]


def blocks(page: Path) -> list[tuple[str, str, str, int]]:
    """Return language, title, text and line of each block that is to be run or written."""
    text = page.read_text(encoding="utf-8")
    return [(m[1], m[2] or "", m[3], text.count("\n", 0, m.start(3))) for m in BLOCK.finditer(text)]


def run_python(code: str, line: int, page: Path, namespace: dict[str, object]) -> None:
    """Run a block and compare what it prints with its comments."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    said = re.findall(r"^ *print\(.*\) +# (.*)$", code, re.MULTILINE)
    found = printed.getvalue().splitlines()
    assert found == said, f"{page}:{line}: expected {said}, found {found}"


def run_console(text: str, page: Path) -> None:
    """Run the commands of a block and compare what they print with what stands below them."""
    for command, said in re.findall(r"^\$ (.*)\n((?:(?!\$ ).+\n)*)", text, re.MULTILINE):
        program, *arguments = shlex.split(command, comments=True)
        start = {"gpustore": GPUSTORE, "python": [sys.executable]}[program]
        done = subprocess.run([*start, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {command}: {done.stderr}"
        assert said in ("", done.stdout), f"{page}: {command}: found {done.stdout}"


def run_page(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, title, text, line in blocks(page):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif language == "console":
            run_console(text, page)
        else:
            run_python(text, line, page, namespace)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=r"gpu\(\): the model stays on the CPU")
    with fake_cuda(fail="cupy-missing"):
        run_page(Path(sys.argv[1]))
