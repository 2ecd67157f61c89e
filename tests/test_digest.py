"""BLAKE3 against the official vectors, on one thread and many, whole and in pieces."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3

from gpustore.digest import DIGEST_NBYTES, blake3_digest, hasher

# github.com/BLAKE3-team/BLAKE3, test_vectors/test_vectors.json, the first 32 bytes of `hash`
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2048: "e776b6028c7cd22a4d0ba182a8bf62205d2ef576467e838ed6f2529b85fba24a",
    4097: "9b4052b38f1c5fc8b1f9ff7ac7b27cd242487b3d890d15c96a1c25b8aa0fb995",
    7169: "a003fc7a51754a9b3c7fae0367ab3d782dccf28855a03d435f8cfe74605e7817",
}


def octets(nbytes: int) -> bytes:
    """Return the input of the official vectors: 0, 1, ..., 250, 0, 1, ..."""
    return (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]


@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize(("nbytes", "expected"), VECTORS.items())
def test_official_vectors(nbytes, expected, threads):
    digest = blake3_digest(octets(nbytes), threads=threads)
    assert digest.hex() == expected and len(digest) == DIGEST_NBYTES


@pytest.mark.parametrize("nbytes", [2**20 - 1, 2**20, 2**20 + 1, 5_000_000])
def test_large_buffers_have_the_digest_that_one_thread_finds(nbytes):
    expected = blake3(octets(nbytes), max_threads=1).digest()
    assert blake3_digest(octets(nbytes)) == expected
    pieces = hasher(nbytes)
    for start in range(0, nbytes, 700_001):
        pieces.update(memoryview(octets(nbytes))[start : start + 700_001])
    assert pieces.digest() == expected


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.zeros((3, 2), ml_dtypes.bfloat16),
        np.array(["2020-02-02"], "M8[ns]"),
        np.float32(1.5).reshape(()),
        np.empty((0, 3), "f4"),
        np.zeros(2, [("a", "i1"), ("b", "f8")]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_contiguous_buffers_of_every_dtype_and_shape_are_hashed_as_they_lie(array):
    assert blake3_digest(array) == blake3_digest(array.tobytes())


def test_a_buffer_with_gaps_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        blake3_digest(np.zeros(10)[::2])


FORKED = """
import os, signal, sys
import numpy as np, gpustore as gs

def use(path):
    gs.save(path, a=np.ones(2**21, "f4"), durable=False)
    gs.load(path, verify=True)

use(sys.argv[1])
child = os.fork()
if child == 0:
    signal.alarm(60)  # which ends it
    use(sys.argv[1])
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_after_hashing_on_all_cores_can_save_and_verify_too(tmp_path):
    """The threads of the parent's pool are not there in the child, which would wait for them."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, tmp_path / "a"], timeout=90)
    assert ran.returncode == 7
