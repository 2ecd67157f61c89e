"""Files: private mappings, atomic replacement under failures of every system call, other kinds."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from gpustore import storage
from gpustore.errors import FormatError, UnsupportedValueError
from gpustore.storage import MappedFile, foreign_kind, replacing

JULIA = Path(__file__).parent / "fixtures" / "julia"


def write(path, content: bytes, **options) -> None:
    with replacing(path, nbytes=len(content), **options) as file:
        file.write(content)


# --- reading ---


@pytest.mark.parametrize("mmap", [True, False])
def test_views_are_writable_private_and_outlive_the_file(tmp_path, mmap):
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    file = MappedFile.open(path, mmap=mmap)
    view = np.frombuffer(file.buffer, "u1", 8192)
    file.close()
    del file
    view[:] = 1
    path.unlink()
    assert view.sum() == 8192
    path.write_bytes(bytes(8192))
    assert not np.frombuffer(MappedFile.open(path, mmap=mmap).buffer, "u1").any()


def test_an_empty_file_is_an_empty_buffer(tmp_path):
    (tmp_path / "f").touch()
    assert MappedFile.open(tmp_path / "f").nbytes == 0


def test_a_sparse_file_larger_than_memory_is_mapped(tmp_path):
    path = tmp_path / "sparse"
    nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + 2**30
    path.touch()
    try:
        os.truncate(path, nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of that size here: {error}")
    file = MappedFile.open(path)
    assert file.nbytes == nbytes and file.buffer[nbytes - 1] == 0


def test_what_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"abc")

    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "no mapping here")

    monkeypatch.setattr(storage.mmap, "mmap", refuse)
    assert MappedFile.open(tmp_path / "f").buffer == b"abc"


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        MappedFile.open(tmp_path / "pipe")
    with pytest.raises(UnsupportedValueError, match="regular file"):
        write(tmp_path / "pipe", b"x")


# --- writing ---


def test_the_mode_is_the_umasks_or_that_of_the_file_replaced(tmp_path):
    path = tmp_path / "f"
    before = os.umask(0o027)
    try:
        write(path, b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    write(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_a_symlink_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_names_of_255_bytes_and_non_ascii_names_work(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_folders_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(IsADirectoryError):
        write(tmp_path, b"1")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write(tmp_path / "none" / "f", b"1")
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_fallocate_is_written_all_the_same(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path / "f", b"12345")
    assert (tmp_path / "f").read_bytes() == b"12345"


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "fchmod", "posix_fallocate"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_system_call_leaves_the_old_file_and_no_temporary(
    tmp_path, monkeypatch, call, code
):
    path = tmp_path / "f"
    write(path, b"old")

    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as error:  # noqa: PT011
        write(path, b"new")
    assert error.value.errno == code
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_told_with_needed_and_free_bytes(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"expected room for 5 bytes, found \d+ free"):
        write(tmp_path / "f", b"12345")


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    write(tmp_path / "f", bytes(range(100)))
    monkeypatch.undo()
    assert (tmp_path / "f").read_bytes() == bytes(range(100))


def test_an_interrupt_cleans_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f", nbytes=3):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_write_sync_rename_and_folder_sync_come_in_this_order(tmp_path, monkeypatch):
    calls: list[str] = []

    def traced(name):
        real = getattr(os, name)
        return lambda *arguments: (calls.append(name), real(*arguments))[1]

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, traced(name))
    write(tmp_path / "f", b"1")
    write(tmp_path / "f", b"1", durable=False)
    assert calls == ["write", "fsync", "replace", "fsync", "write", "replace"]


# --- other kinds ---

KINDS = {
    b"": "empty",
    b'{"a": [1]}': "JSON",
    b'[\n  "a"]': "JSON",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"7JL\x0b\x04\0\0\0": "Serialization",
    b"\x80\x02}q\0.": "pickle",
    b"\x80\x05\x95" + bytes(9): "pickle",
    b"PK\x03\x04" + bytes(30): "zip",
    b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":1}}': "safetensors",
    b"\x89HDF\r\n\x1a\n" + bytes(9): "HDF5",
    b"HDF5-based Julia Data Format, version 0.1\0\0": "JLD2",
    b"\x93NUMPY\x01\0": "numpy.load",
    b"GGUF\x03\0\0\0": "GGUF",
    b"\x1f\x8b\x08" + bytes(9): "gzip",
    b"<!DOCTYPE html><html>": "HTML",
    b"just some words": "text",
}


@pytest.mark.parametrize(("head", "word"), KINDS.items())
def test_files_of_other_kinds_are_named(head, word):
    assert word in (foreign_kind(head, len(head)) or "")


def test_real_bson_files_are_not_taken_for_another_kind():
    for path in JULIA.glob("*.bson"):
        with path.open("rb") as file:
            assert foreign_kind(file.read(512), path.stat().st_size) is None
            file.seek(0)
            assert foreign_kind(file.read(512), 600) is None  # the same files cut off
