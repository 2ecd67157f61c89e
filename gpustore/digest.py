"""BLAKE3 of host memory: 32-byte digests, on all cores where that pays."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from blake3 import blake3

DIGEST_NBYTES = 32
# all cores pay from 256 KiB on with 2 threads and from 512 KiB on with 16 (blake3 1.0.11)
_THREADED_NBYTES = 1024 * 1024
_all_threads = blake3.AUTO


def _after_fork() -> None:
    """Have a child make threads for each hasher: blake3's own are the parent's, and not here."""
    global _all_threads
    _all_threads = os.cpu_count() or 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def hasher(nbytes: int = 0, *, threads: int | None = None) -> blake3:
    """Return an incremental hasher (`update(octets)`, `digest()`) for about `nbytes` bytes.

    `threads=None`: one below 1 MiB, all cores from there on. `update` takes buffers of bytes only.

    >>> hasher().update(b"IE").update(b"TF").digest() == blake3_digest(b"IETF")
    True
    """
    if threads is None:
        threads = _all_threads if nbytes >= _THREADED_NBYTES else 1
    return blake3(max_threads=threads)


def blake3_digest(buffer: Any, *, threads: int | None = None) -> bytes:
    """Return the 32-byte BLAKE3 digest of a C-contiguous host buffer of any dtype.

    `threads` is that of `hasher`.

    >>> blake3_digest(b"").hex()[:16]
    'af1349b9f5f9a1a6'
    """
    if type(buffer) is bytes and len(buffer) < _THREADED_NBYTES:
        return blake3(buffer).digest()
    octets = np.frombuffer(buffer, np.uint8).data  # memoryview.cast takes not every dtype
    return hasher(octets.nbytes, threads=threads).update(octets).digest()


def digests(octets: Iterable[bytes]) -> list[bytes]:
    """Return the digest of each of many small bytes."""
    whole, found = blake3(), []
    update, digest, reset = whole.update, whole.digest, whole.reset
    for each in octets:  # by one hasher: to make one takes as long as to hash these
        update(each)
        found.append(digest())
        reset()
    return found


def contents(rows: Any) -> list[bytes]:
    """Return the bytes of each row of a matrix of bytes."""
    if rows.shape[1] == 0:
        return [b""] * len(rows)
    whole: list[bytes] = np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel().tolist()
    return whole
