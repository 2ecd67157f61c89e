"""Large durable files are written past the page cache: the same bytes, whatever the disk says."""

from __future__ import annotations

import errno
import mmap
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gpustore as gs
from gpustore import newfile, storage
from gpustore.digest import blake3_digest, hasher

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is no O_DIRECT here")
ARRAYS = {
    "small": np.arange(5.0),
    "large": np.arange(3 * 2**20, dtype="u4")[1:],  # neither aligned nor of whole blocks
    "turned": np.asfortranarray(np.arange(2.0**20).reshape(1024, -1)),
    "last": np.ones(2**20 + 1, "u1"),
}


@pytest.fixture(autouse=True)
def _small_files_are_written_directly(monkeypatch):
    monkeypatch.setattr(newfile, "_DIRECT_NBYTES", 2**20)


@pytest.fixture
def calls(monkeypatch):
    """The descriptors' flags and sizes of all calls of os.pwrite."""
    seen, real = [], os.pwrite

    def pwrite(descriptor, octets, position):
        seen.append((is_direct(descriptor), len(octets)))
        return real(descriptor, octets, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return seen


def is_direct(descriptor):
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def saved(path, **options):
    gs.save(path, ARRAYS, **options)
    return path.read_bytes()


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_the_file_is_the_one_that_is_written_through_the_page_cache(tmp_path, calls, layout):
    plain = saved(tmp_path / "a.bson", layout=layout, durable=False)
    assert not any(direct for direct, _ in calls)
    calls.clear()
    assert saved(tmp_path / "b.bson", layout=layout) == plain
    assert sum(nbytes for direct, nbytes in calls if direct) > 20 * 2**20
    gs.load(tmp_path / "b.bson", verify=True)


def test_a_file_system_without_it_is_written_all_the_same(tmp_path, monkeypatch, calls):
    plain = saved(tmp_path / "a.bson", durable=False)
    real = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    assert saved(tmp_path / "b.bson") == plain and not any(direct for direct, _ in calls)


@pytest.mark.parametrize("accepted", [0, 4096])
def test_what_is_refused_or_cut_short_is_written_through_the_page_cache(
    tmp_path, monkeypatch, accepted
):
    """Some file systems take the flag and then no write, or blocks of another size."""
    plain = saved(tmp_path / "a.bson", durable=False)
    real, asked = os.pwrite, []

    def pwrite(descriptor, octets, position):
        if not is_direct(descriptor):
            return real(descriptor, octets, position)
        asked.append(position)
        if len(asked) > 1 or not accepted:
            raise OSError(errno.EINVAL, "not aligned")
        return os.pwritev(descriptor, [octets[:accepted]], position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert saved(tmp_path / "b.bson") == plain and len(asked) > 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("failing", [0, 2, 5])
def test_a_write_that_fails_on_its_thread_leaves_the_old_file(tmp_path, monkeypatch, code, failing):
    old = saved(tmp_path / "a.bson", durable=False)
    count, real = iter(range(10**6)), os.pwrite

    def pwrite(descriptor, octets, position):
        if next(count) >= failing:
            raise OSError(code, os.strerror(code))
        return real(descriptor, octets, position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="a.bson") as caught:
        saved(tmp_path / "a.bson")
    assert caught.value.errno == code
    assert (code == errno.EIO) or "expected room for" in str(caught.value)
    assert (tmp_path / "a.bson").read_bytes() == old and os.listdir(tmp_path) == ["a.bson"]


def test_a_file_system_that_takes_no_bytes_is_an_error_not_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda descriptor, octets, position: 0)
    with pytest.raises(OSError, match="took no bytes"):
        saved(tmp_path / "a.bson")
    assert not os.listdir(tmp_path)


def test_an_interrupt_cleans_up(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "a.bson", progress=interrupt)
    assert not os.listdir(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=12), st.randoms())
def test_pieces_of_any_size_in_any_order_are_the_bytes_of_the_file(
    tmp_path, monkeypatch, sizes, order
):
    monkeypatch.setattr(newfile, "_STAGE_NBYTES", 8192)
    monkeypatch.setattr(newfile, "_DIRECT_NBYTES", 1)
    octets = np.arange(sum(sizes), dtype="u4").view("u1")[: sum(sizes)]
    stops = np.cumsum(sizes).tolist()
    pieces = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    order.shuffle(pieces)
    with storage.replacing(tmp_path / "a", nbytes=octets.size) as file:
        for start, stop in pieces:
            own = hasher()
            file.seek(start)
            file.write(octets[start:stop], own)
            assert own.digest() == blake3_digest(octets[start:stop])
    assert (tmp_path / "a").read_bytes() == octets.tobytes()


def test_what_lies_aligned_is_written_from_where_it_is(tmp_path, calls):
    octets = np.frombuffer(mmap.mmap(-1, 3 * 2**20), np.uint8)
    octets[:] = np.arange(octets.size) % 251
    with storage.replacing(tmp_path / "a", nbytes=octets.size) as file:
        file.write_at(octets[: 2**20], 0)
        file.write_at(octets[2**20 :], 2**20)
        file.skip(octets.size)
    assert calls in ([(True, 2**20), (True, 2**21)], [])
    assert (tmp_path / "a").read_bytes() == octets.tobytes()
    assert not newfile._is_aligned(octets[1:], 0) and not newfile._is_aligned(octets, 512)
