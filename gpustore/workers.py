"""Threads that share the pieces of one job."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Crew:
    """`count` threads that share `pieces`, and what they wait for: their turn, or the end."""

    def __init__(self, pieces: Iterator[Any], count: int, name: str) -> None:
        self._pieces, self._count, self._name = pieces, count, name
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._is_stopped = False
        self._done = self._working = 0

    def run(self, work: Callable[[], None], report: Callable[[int], None]) -> None:
        """Let each thread `work`, and report here how many bytes they say were done.

        Raises what failed first. When this returns or raises, no thread works any more.
        """
        self._working = self._count
        threads = [
            threading.Thread(target=self._work, args=(work,), name=self._name)
            for _ in range(self._count)
        ]
        try:
            for thread in threads:
                thread.start()
            while self._working or self._done:
                with self._changed:
                    self._changed.wait_for(lambda: self._done or not self._working)
                    done, self._done = self._done, 0
                report(done)
        finally:  # after Ctrl-C too, which arrives here
            self._stop(None)
            _join(threads)
        failure, self._failure = self._failure, None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # else it and this frame hold each other, and all that is placed

    @property
    def is_stopped(self) -> bool:
        """Whether something failed or was interrupted, so that what is under way is for nothing."""
        return self._is_stopped

    def pieces(self) -> Iterator[Any]:
        """Yield pieces to the thread that calls, until there are none or the crew has stopped."""
        while True:
            with self._changed:
                piece = None if self._is_stopped else next(self._pieces, None)
            if piece is None:
                return
            yield piece

    def say_done(self, nbytes: int) -> None:
        with self._changed:
            self._done += nbytes
            self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self, is_due: Callable[[], bool]) -> Iterator[None]:
        """Enter when it is due, or when the crew has stopped and it does not matter any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or is_due())
        yield
        with self._changed:
            self._changed.notify_all()

    def _work(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            let_go(error)
            self._stop(error)
        with self._changed:
            self._working -= 1
            self._changed.notify_all()

    def _stop(self, failure: BaseException | None) -> None:
        with self._changed:
            self._is_stopped = True
            self._failure = self._failure or failure
            self._changed.notify_all()


def _join(threads: list[threading.Thread]) -> None:
    """Wait for threads that end by themselves; Ctrl-C meanwhile is raised when they have.

    Were it raised at once, the caller would close files and free buffers that they still use.
    """
    late: BaseException | None = None
    while True:
        try:
            for thread in threads:
                while thread in threading.enumerate():
                    if thread.is_alive():
                        thread.join()
                    else:  # its start was interrupted
                        time.sleep(0.001)
            break
        except BaseException as error:
            late = late or error
    if late is not None:
        raise late


def let_go(error: BaseException) -> None:
    """Clear the frames that an error and its causes keep, which hold arrays of the device."""
    import traceback  # 1 ms, for errors only

    link: BaseException | None = error
    while link is not None:
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
