"""Saves in forked children, each of which something happens to at one system call.

Run as a process of its own, which has no other threads: python stopped_saves.py FOLDER. Each line
it reads is a JSON object (see `Order`), each line it answers says how the child ended.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import signal
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

import gpustore as gs
from gpustore import newfile, storage

CALLS = (
    "stat", "listdir", "urandom", "open", "flock", "fstat", "fchmod", "dup", "ftruncate",
    "posix_fallocate", "write", "pwrite", "lseek", "fsync", "close", "replace", "unlink",
)  # fmt: skip


@dataclass
class Order:
    """What to save, and what is to happen at the system call of this number (from 1).

    "kill before", "kill after"; "tear": a write of half the bytes, then a kill; "interrupt":
    Ctrl-C after it; "short": a write of half the bytes; the name of an errno: that failure.
    """

    version: int
    layout: str
    durable: bool
    large: bool
    at: int = 0
    happens: str = ""


class Calls:
    """Stands for `os` in the modules that save, and counts what it is asked, by any thread."""

    def __init__(self, order: Order) -> None:
        self.order, self.names, self.numbers = order, [], itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return functools.partial(self.call, name, real) if name in CALLS else real

    def call(self, name: str, real: Any, *arguments: Any) -> Any:
        self.names.append(name)
        if next(self.numbers) != self.order.at:
            return real(*arguments)
        happens = self.order.happens
        if happens in ("tear", "short") and name in ("write", "pwrite"):
            half = arguments[1][: max(1, len(arguments[1]) // 2)]
            count = real(arguments[0], half, *arguments[2:])
            if happens == "short":
                return count
            os.kill(os.getpid(), signal.SIGKILL)
        if happens == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if happens.startswith("E"):
            raise OSError(getattr(errno, happens), f"{happens} is made to happen")
        value = real(*arguments)
        if happens == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)
        if happens == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        return value


def model(order: Order) -> dict[str, Any]:
    """Return what is saved: its version is in each part of it.

    Large arrays are two of a size, which two threads write, and one larger than both.
    """
    counts = (400_000, 900_000, 400_000) if order.large else (300,)
    arrays = [np.full(count, order.version, "f4") for count in counts]
    arrays.append(np.full((3, 5), order.version))
    return {"version": order.version, "arrays": arrays, "small": [order.version] * 9}


def saved(folder: str, order: Order) -> dict[str, Any]:
    """Save, and return how it ended and which system calls there were.

    Large files that are durable go past the page cache.
    """
    import fcntl

    calls = Calls(order)
    storage.os = newfile.os = calls  # type: ignore[assignment]
    newfile._DIRECT_NBYTES = 2**20
    fcntl.flock = functools.partial(calls.call, "flock", fcntl.flock)
    failed = ""
    try:
        path = os.path.join(folder, "model.bson")
        gs.save(path, model(order), layout=order.layout, durable=order.durable)
    except BaseException as error:
        failed = "OSError" if isinstance(error, OSError) else repr(error)
    return {"failed": failed, "calls": calls.names}


def main() -> None:
    folder = sys.argv[1]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where all is in background
    for line in sys.stdin:
        order, answer = Order(**json.loads(line)), os.path.join(folder, "answer")
        child = os.fork()
        if child == 0:
            found = json.dumps(saved(folder, order))
            with open(answer, "w", encoding="utf-8") as file:
                file.write(found)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        reply = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        with contextlib.suppress(FileNotFoundError), open(answer, encoding="utf-8") as file:
            reply |= json.load(file)
            os.unlink(answer)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
