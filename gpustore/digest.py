"""BLAKE3 of host memory: 32-byte digests, on all cores where that pays."""

from __future__ import annotations

from typing import Any

DIGEST_NBYTES = 32
_THREADED_NBYTES = 1024 * 1024  # below this, starting threads costs more than it gains


def hasher(nbytes: int = 0) -> Any:
    """Return an incremental hasher (`update(buffer)`, `digest()`) for about `nbytes` bytes."""
    from blake3 import blake3

    return blake3(max_threads=blake3.AUTO if nbytes >= _THREADED_NBYTES else 1)


def blake3_digest(buffer: Any) -> bytes:
    """Return the 32-byte BLAKE3 digest of a contiguous host buffer.

    >>> blake3_digest(b"").hex()[:16]
    'af1349b9f5f9a1a6'
    """
    view = memoryview(buffer).cast("B") if not isinstance(buffer, bytes) else buffer
    whole = hasher(len(view))
    whole.update(view)
    digest: bytes = whole.digest()
    return digest
