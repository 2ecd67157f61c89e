"""Plans into files: payloads are written and hashed, large ones by several threads."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import storage
from gpustore.digest import blake3_digest, hasher
from gpustore.layout import PAYLOAD_DIGEST, STRUCTURE_DIGEST, Payload, Plan
from gpustore.newfile import DIRECT_THREADS, NewFile
from gpustore.workers import Crew

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_GATHER_NBYTES = 1024 * 1024  # smaller pieces are gathered into writes of this size
_LARGE_NBYTES = 1024 * 1024  # payloads from this size on are hashed by other threads too
_THREADS = 3  # at most: each may hold 8 MiB
_LAG = 4  # chunks that are written and not hashed yet
Progress = Callable[[int, int], None]
Report = Callable[[int], None]


def write_plan(
    path: str | os.PathLike[str], plan: Plan, durable: bool, progress: Progress | None
) -> None:
    """Stream a plan into a new file at `path`, filling in the digests on the way."""
    with storage.replacing(path, nbytes=plan.nbytes, durable=durable) as file:
        out = _Output(file, plan.nbytes, progress)
        if any(payload.device_array is not None for payload in plan.payloads):
            from gpustore import ring  # 4 ms, for arrays of devices only

            ring.write_device_arrays(file, plan.payloads, _offsets(plan), out.report)
        _write_side_by_side(file, plan, out.report)
        with _hashing_thread(plan, file) as beside:
            write = _write_detached if plan.places else _write_inline
            write(file, out, plan, beside)


def _offsets(plan: Plan) -> list[int]:
    """Return where in the file each payload lies."""
    if plan.places:
        return [place.offset for place in plan.places]
    offsets, position = [], 0
    for structure, payload in zip(plan.structures, plan.payloads, strict=False):
        offsets.append(position + len(structure))
        position = offsets[-1] + payload.nbytes
    return offsets


def _write_side_by_side(file: NewFile, plan: Plan, report: Report) -> None:
    """Have large payloads of the host written and hashed by threads, each by one, before all else.

    One that is larger than the others together is left: `_stream` has two threads for it. So are
    all where a direct file's threads would find no core.
    """
    large = [payload.nbytes for payload in plan.payloads if _is_for_several(payload)]
    half = sum(large) // 2
    cores = (os.cpu_count() or 1) - (DIRECT_THREADS if file.direct else 0)
    count = min(_THREADS, cores, sum(nbytes <= half for nbytes in large))
    if count < 2 or not hasattr(os, "pwrite"):
        return
    placed = zip(plan.payloads, _offsets(plan), strict=True)
    pieces = [pair for pair in placed if _is_for_several(pair[0]) and pair[0].nbytes <= half]
    pieces.sort(key=lambda pair: -pair[0].nbytes)  # so that all end at about the same time
    crew = Crew(iter(pieces), count, "gpustore-writing")

    def work() -> None:
        with file.stream() as write:
            for payload, position in crew.pieces():
                own = hasher()
                for chunk in payload.chunks():
                    if crew.is_stopped:
                        return
                    octets = np.frombuffer(chunk, np.uint8)
                    write(octets, position, own)
                    position += octets.size
                    crew.say_done(octets.size)
                payload.digest, payload.is_written = own.digest(), True

    crew.run(work, report)


def _is_for_several(payload: Payload) -> bool:
    return payload.is_host and not payload.is_bare and payload.nbytes >= _LARGE_NBYTES


@contextlib.contextmanager
def _hashing_thread(plan: Plan, file: NewFile) -> Iterator[ThreadPoolExecutor | None]:
    """Give one thread that hashes what another makes and writes; None where it does not pay."""
    if not any(_is_hashed_beside(payload, file) for payload in plan.payloads):
        yield None
        return
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, for large arrays only

    with ThreadPoolExecutor(1, "gpustore-hashing") as beside:
        yield beside


def _is_hashed_beside(payload: Payload, file: NewFile) -> bool:
    """Whether that pays: a direct file hashes what it copies, which is less than making it."""
    is_large = payload.make_row is None and payload.nbytes >= _LARGE_NBYTES
    is_unhashed = payload.digest is None and not payload.is_written
    return is_large and is_unhashed and (payload.is_made or file.direct is None)


def _stream(payload: Payload, out: _Output, beside: ThreadPoolExecutor | None, into: Any) -> None:
    """Write the chunks of a payload and hash them, on the thread beside if that pays.

    There they are hashed while they are written and the next are made.
    """
    if into is None or beside is None or not _is_hashed_beside(payload, out.file):
        for chunk in payload.chunks():
            out.write(chunk, into)
        return
    lag = 1 if payload.is_made else _LAG
    hashing: deque[Future[Any]] = deque()
    try:
        for chunk in payload.chunks():
            if len(hashing) == lag:
                hashing.popleft().result()
            hashing.append(beside.submit(into.update, chunk))
            out.write(chunk)
    finally:
        for future in hashing:
            future.result()


def _stream_hashed(payload: Payload, out: _Output, beside: ThreadPoolExecutor | None) -> bytes:
    """Write the chunks of a payload, as far as it has not been done; return its digest."""
    if payload.content is not None:
        octets = payload.content.tobytes()
        out.write(octets)
        return blake3_digest(octets)
    if payload.is_written:
        out.skip(payload.nbytes)
    elif payload.digest is not None:
        _stream(payload, out, beside, None)
    if payload.digest is not None:
        return payload.digest
    own = hasher(payload.nbytes if _is_hashed_beside(payload, out.file) else 0)
    _stream(payload, out, beside, own)
    return own.digest()


def _write_inline(
    file: NewFile, out: _Output, plan: Plan, beside: ThreadPoolExecutor | None
) -> None:
    """Write structures and payloads in turn; the digest of a payload follows it."""
    whole = hasher()
    for index, payload in enumerate(plan.payloads):
        whole.update(plan.structures[index])
        out.write(plan.structures[index])
        if payload.make_row is not None:  # the digests are in it
            for octets, structure in payload.make_row():
                whole.update(structure)
                out.write(octets)
        elif payload.is_bare:
            _stream(payload, out, beside, whole)
        else:
            plan.structures[index + 1][PAYLOAD_DIGEST] = _stream_hashed(payload, out, beside)
    last = plan.structures[-1]
    whole.update(last[: STRUCTURE_DIGEST.start])
    whole.update(last[STRUCTURE_DIGEST.stop :])
    last[STRUCTURE_DIGEST] = whole.digest()
    out.write(last)
    out.flush()


def _write_detached(
    file: NewFile, out: _Output, plan: Plan, beside: ThreadPoolExecutor | None
) -> None:
    """Stream the payloads to their places, then the document, which holds their digests."""
    (structure,) = plan.structures
    position, gaps = len(structure), []
    file.seek(position)
    for payload, place in zip(plan.payloads, plan.places, strict=True):
        gaps.append(bytes(place.offset - position))
        out.write(gaps[-1])
        if payload.make_row is not None:  # the digests are in the document
            for octets, gap in payload.make_row():
                gaps.append(gap)
                out.write(octets)
        elif place.digest is not None:
            structure[place.digest] = _stream_hashed(payload, out, beside)
        position = place.offset + payload.nbytes
    out.flush()
    whole, view = hasher(), memoryview(structure)
    whole.update(view[: STRUCTURE_DIGEST.start])
    whole.update(view[STRUCTURE_DIGEST.stop :])
    whole.update(b"".join(gaps))
    structure[STRUCTURE_DIGEST] = whole.digest()
    file.seek(0)
    out.write(structure)
    out.flush()


class _Output:
    """Gathers small pieces into writes of `_GATHER_NBYTES`, and reports what is written."""

    def __init__(self, file: NewFile, nbytes: int, progress: Progress | None) -> None:
        self.file, self.nbytes, self.progress = file, nbytes, progress
        self.done, self.gathered = 0, bytearray()

    def write(self, piece: Any, hasher: Any = None) -> None:
        view = memoryview(piece)
        if len(self.gathered) + view.nbytes < _GATHER_NBYTES:
            self.gathered += view
            if hasher is not None:
                hasher.update(view)
            return
        self.flush()
        self.file.write(view, hasher)
        self.report(view.nbytes)

    def flush(self) -> None:
        gathered, self.gathered = self.gathered, bytearray()
        if gathered:
            self.file.write(gathered)
            self.report(len(gathered))

    def skip(self, nbytes: int) -> None:
        """Go on after bytes that are in the file already, and reported."""
        self.flush()
        self.file.skip(nbytes)

    def report(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.nbytes)
