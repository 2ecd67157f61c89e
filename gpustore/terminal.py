"""How the command speaks: colours and bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from gpustore.notebook import printable

_PLAIN_WIDTH = 100_000  # where nobody looks at the width, no line is broken
_QUIET_SECONDS = 1.0


def console(*, is_error: bool = False) -> Console:
    """Return the console of standard output or error; NO_COLOR takes its colours away."""
    stream = sys.stderr if is_error else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(
        file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False
    )


def shown(text: str) -> str:
    """Return text for a terminal: its lines, and in them nothing that would steer it."""
    return "\n".join(map(printable, text.split("\n")))


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Give a callback that shows a bar on a terminal, once the work has taken a second.

    The callback is told bytes done and bytes in all; a second phase begins again at 0. The bar is
    gone when the work is.
    """
    start, bar, is_shown = time.monotonic(), None, sys.stderr.isatty()

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and is_shown and time.monotonic() - start > _QUIET_SECONDS:
            bar = _bar()
            bar.start()
            bar.add_task(label, total=total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Any:
    from rich import progress as parts  # 20 ms, for work that takes a second

    return parts.Progress(
        parts.TextColumn("{task.description}"),
        parts.BarColumn(),
        parts.TaskProgressColumn(),
        parts.DownloadColumn(binary_units=True),
        parts.TransferSpeedColumn(),
        parts.TimeRemainingColumn(),
        console=console(is_error=True),
        transient=True,
    )
