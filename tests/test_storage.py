"""Files: private mappings, atomic replacement under failures of every system call, other kinds."""

from __future__ import annotations

import bz2
import errno
import gc
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import shutil
import socket
import stat
import sys
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import bson
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustore import storage
from gpustore.errors import FormatError, UnsupportedValueError
from gpustore.foreign import foreign_kind
from gpustore.storage import MappedFile, replacing

JULIA = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "wild"


def write(path, content, **options) -> None:
    with replacing(path, nbytes=memoryview(content).nbytes, **options) as file:
        file.write(content)


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


# --- reading ---


@pytest.mark.parametrize("mmap", [True, False])
def test_views_are_writable_private_and_outlive_the_file(tmp_path, mmap):
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    with MappedFile.open(path, mmap=mmap) as file:
        view = np.frombuffer(file.buffer, "<i4", 1024, 4096)
    del file
    gc.collect()
    other = np.frombuffer(MappedFile.open(path, mmap=mmap).buffer, "u1")
    view[:] = -1
    assert not other.any() and path.read_bytes() == bytes(8192)
    path.unlink()
    assert view.flags.writeable and view.sum() == -1024


def test_a_mapping_keeps_what_it_showed_when_the_file_is_replaced(tmp_path):
    write(tmp_path / "f", b"old")
    view = np.frombuffer(MappedFile.open(tmp_path / "f").buffer, "u1")
    write(tmp_path / "f", b"new")
    assert view.tobytes() == b"old"


def test_a_closed_file_says_so(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    with MappedFile.open(tmp_path / "f") as file:
        assert (file.path, file.nbytes) == (str(tmp_path / "f"), 3)
    with pytest.raises(ValueError, match="f: the file is closed; open it again"):
        file.buffer  # noqa: B018


@pytest.mark.parametrize("mmap", [True, False])
def test_an_empty_file_is_an_empty_buffer(tmp_path, mmap):
    (tmp_path / "f").touch()
    file = MappedFile.open(tmp_path / "f", mmap=mmap)
    assert file.nbytes == 0 and bytes(file.buffer) == b""


def test_a_sparse_file_larger_than_memory_is_mapped(tmp_path):
    path = tmp_path / "sparse"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    nbytes = max(2**36, 2 * memory)
    path.touch()
    try:
        os.truncate(path, nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of that size here: {error}")
    view = np.frombuffer(MappedFile.open(path).buffer, "u1")
    view[-1] = 1
    assert view.size == nbytes and view[0] == 0 and view[-1] == 1


def test_views_are_private_where_there_is_no_map_private(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PRIVATE", {"access": storage.mmap.ACCESS_COPY})  # as on Windows
    (tmp_path / "f").write_bytes(b"abc")
    np.frombuffer(MappedFile.open(tmp_path / "f").buffer, "u1")[:] = 0
    assert (tmp_path / "f").read_bytes() == b"abc"


def test_what_cannot_be_mapped_is_read(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"abc")

    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "no mapping here")

    monkeypatch.setattr(storage.mmap, "mmap", refuse)
    assert MappedFile.open(tmp_path / "f").buffer == b"abc"


@pytest.mark.skipif(sys.version_info < (3, 13), reason="mmap keeps a descriptor before 3.13")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are not listed here")
def test_mapped_files_hold_no_descriptors(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    files = [MappedFile.open(tmp_path / "f") for _ in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before and files


def test_paths_may_be_str_bytes_or_pathlike(tmp_path):
    path = tmp_path / "é"
    for given_path in (path, str(path), os.fsencode(path)):
        write(given_path, b"abc")
        assert MappedFile.open(given_path).path == str(path)


def test_missing_files_and_folders_are_told_apart_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such file; check the path: '.*/f'"):
        MappedFile.open(tmp_path / "f")
    with pytest.raises(IsADirectoryError, match="expected a file, found a folder"):
        MappedFile.open(tmp_path)


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    os.chdir(path.parent)  # a socket's path is limited to 108 bytes
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path.name)


def make_link_to_a_device(path):
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", [make_pipe, make_socket, make_link_to_a_device])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "f")
    with pytest.raises(FormatError, match="f: expected a regular file, found a device, pipe"):
        MappedFile.open(tmp_path / "f")
    with pytest.raises(UnsupportedValueError, match="f: expected a regular file or a new name"):
        write(tmp_path / "f", b"x")
    assert os.listdir(tmp_path) == ["f"]


# --- writing ---


@pytest.mark.parametrize("durable", [True, False])
def test_every_contiguous_buffer_is_written_as_it_lies(tmp_path, durable):
    buffers = [
        b"abc",
        bytearray(b"defg"),
        memoryview(b"0123456789")[2:5],
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.ones((2, 2), ml_dtypes.bfloat16),
        np.empty((0, 3)),
    ]
    expected = b"".join(
        buffer.tobytes() if isinstance(buffer, (np.ndarray, memoryview)) else buffer
        for buffer in buffers
    )
    with replacing(tmp_path / "f", nbytes=len(expected), durable=durable) as file:
        for buffer in buffers:
            file.write(buffer)
        with pytest.raises(ValueError, match="contiguous"):
            file.write(np.zeros(4)[::2])
    assert (tmp_path / "f").read_bytes() == expected
    assert os.listdir(tmp_path) == ["f"]


def test_an_empty_file_can_be_written(tmp_path):
    write(tmp_path / "f", b"")
    assert (tmp_path / "f").read_bytes() == b""


def test_the_mode_is_the_umasks_or_that_of_the_file_replaced(tmp_path):
    path = tmp_path / "f"
    with umask(0o027):
        write(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write(path, b"2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


def test_the_temporary_of_a_private_file_is_never_open_to_others(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.touch(0o600)
    monkeypatch.setattr(os, "fchmod", lambda *arguments: None)
    with umask(0):
        write(path, b"1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_symlink_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/real")
    for content in (b"first", b"second"):  # the link dangles at first
        write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "real").read_bytes() == content
    assert os.listdir(tmp_path / "folder") == ["real"]


def test_names_of_255_bytes_and_names_that_are_not_utf8_work(tmp_path):
    for name in ("x" * 255, "é" * 127, os.fsdecode(b"\xff" * 200)):
        write(tmp_path / name, b"1")
        assert (tmp_path / name).read_bytes() == b"1"


def test_folders_and_missing_folders_are_refused(tmp_path):
    for path in (tmp_path, f"{tmp_path}/new/", ""):
        with pytest.raises(IsADirectoryError, match="expected a file, found a folder"):
            write(path, b"1")
    with pytest.raises(FileNotFoundError, match=r"no such folder; create it first: '.*/none'"):
        write(tmp_path / "none" / "f", b"1")
    assert os.listdir(tmp_path) == []


def test_a_folder_without_the_right_to_write_is_told_by_the_targets_name(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", ".f.temporary")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/f'"):
        write(tmp_path / "f", b"1")


def failing(code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, None])
def test_a_file_system_without_fallocate_is_written_all_the_same(tmp_path, monkeypatch, code):
    if code is None:  # as on macOS and Windows
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", failing(code))
    for content in (bytes(10_000), b"12345"):
        write(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content


CALLS = ["open", "fchmod", "ftruncate", "posix_fallocate", "write", "fsync", "close", "replace"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_system_call_leaves_the_old_file_and_no_temporary(
    tmp_path, monkeypatch, call, code
):
    path = tmp_path / "f"
    write(path, b"old")
    real_close = os.close

    def close(descriptor):  # NFS tells of a full disk here
        real_close(descriptor)
        failing(code)()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, close if call == "close" else failing(code))
        with pytest.raises(OSError) as error:  # noqa: PT011
            write(path, b"new")
    assert error.value.errno == code
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    write(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch):
    path, real, held = tmp_path / "f", os.write, []
    write(path, b"old")

    def write_some(descriptor, octets):
        if len(octets) == 10_000:
            return real(descriptor, octets[:5])
        held.append(os.fstat(descriptor).st_blocks * 512)
        return failing(errno.ENOSPC)()

    usage = shutil.disk_usage(tmp_path)._replace(free=7)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_some)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match="No space left") as error:
            write(path, bytes(10_000))
    assert error.value.filename == str(path)  # what the temporary held counts as free
    assert f"expected room for 10000 bytes, found {held[0] + 7} free" in error.value.strerror
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_space_is_set_aside_in_a_file_of_one_block_so_that_glibc_never_writes_it(
    tmp_path, monkeypatch
):
    calls = []

    def fallocate(descriptor, offset, nbytes):
        calls.append((os.fstat(descriptor).st_size, offset, nbytes))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    write(tmp_path / "f", bytes(10_000))
    write(tmp_path / "f", bytes(10))
    assert calls == [(4096, 0, 10_000), (10, 0, 10)]


def test_a_call_that_writes_nothing_is_an_error_not_a_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda descriptor, octets: 0)
    with pytest.raises(OSError, match="took no bytes"):
        write(tmp_path / "f", b"x")
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, octets: real(descriptor, octets[:3]))
    write(tmp_path / "f", bytes(range(100)))
    assert (tmp_path / "f").read_bytes() == bytes(range(100))


@pytest.mark.parametrize("fallocate", [True, False])
def test_a_limit_on_file_size_is_met_without_harm(tmp_path, monkeypatch, fallocate):
    write(tmp_path / "f", b"old")
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(OSError, match=r"too large: '.*/f'"):
            write(tmp_path / "f", bytes(2**20 + 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "f").read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]


def test_an_interrupt_or_a_miscount_cleans_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "f", nbytes=3):
        raise KeyboardInterrupt
    with (
        pytest.raises(AssertionError, match="planned 3 bytes, wrote 2"),
        replacing(tmp_path / "f", nbytes=3) as file,
    ):
        file.write(b"12")
    assert os.listdir(tmp_path) == []


def test_an_error_stays_what_it_was_if_the_temporary_cannot_be_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "unlink", failing(errno.EROFS))
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "f", nbytes=3):
        raise ZeroDivisionError


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


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_folder_that_cannot_be_synced_is_told_and_the_new_file_is_there(
    tmp_path, monkeypatch, code
):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            failing(code)()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="the new file is in place, but may not outlast a crash"):
            write(tmp_path / "f", b"new")
    else:
        write(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]


@pytest.fixture
def freed_beside(monkeypatch):
    """What is replaced is freed by a thread, however small it is; gives what says whether it is."""
    monkeypatch.setattr(storage, "_SLOWLY_FREED_NBYTES", 1)
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("there is no /proc here")

    def held(path):
        found = [os.readlink(link) for link in map(str, links.iterdir()) if os.path.islink(link)]
        return [name for name in found if name.startswith(str(path))]

    yield held
    storage._wait_for_freeing()


def test_what_is_replaced_is_freed_by_a_thread_for_which_the_next_one_waits(
    tmp_path, monkeypatch, freed_beside
):
    let_go, gate = storage._let_go, threading.Event()

    def gated(descriptor):
        if threading.current_thread().name == "gpustore-freeing":
            gate.wait(60)
        let_go(descriptor)

    monkeypatch.setattr(storage, "_let_go", gated)
    write(tmp_path / "f", b"old")
    assert not freed_beside(tmp_path)
    write(tmp_path / "f", b"new")
    assert freed_beside(tmp_path) == [f"{tmp_path / 'f'} (deleted)"]
    assert (tmp_path / "f").read_bytes() == b"new"
    gate.set()
    write(tmp_path / "g", b"another")
    assert not freed_beside(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_keeps_no_file_that_was_replaced(tmp_path, freed_beside):
    for content in (b"old", b"new"):
        write(tmp_path / "f", content)
    child = os.fork()
    if child == 0:
        os._exit(len(freed_beside(tmp_path)))
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_replaced_is_freed_at_once_where_no_thread_starts(
    tmp_path, monkeypatch, freed_beside
):
    def refuse(thread):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for content in (b"old", b"new"):
        write(tmp_path / "f", content)
    assert not freed_beside(tmp_path) and (tmp_path / "f").read_bytes() == b"new"


def test_a_file_that_may_not_be_read_is_replaced_all_the_same(tmp_path, monkeypatch, freed_beside):
    write(tmp_path / "f", b"old")
    real = os.open

    def refuse(path, flags, *mode):
        if str(path) == str(tmp_path / "f"):
            raise PermissionError(errno.EACCES, "not yours to read", path)
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "f", b"new")
    assert not freed_beside(tmp_path) and (tmp_path / "f").read_bytes() == b"new"


# --- other kinds ---


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
FOREIGN = {
    "empty": [b""],
    "JSON": [b'{"a": [1]}', b'[\n  "a"]', b"{}\n\n\n", b"\xef\xbb\xbf[1, 2]", '{"é":1}'.encode()],
    "git lfs pull": [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"],
    "HTML": [b"<!DOCTYPE html>\n<html>", b"\n <HTML><head>", b"<?xml version='1.0'?>"],
    "text": [b"just some words", "[section]\nmödel = 1".encode(), b"a,b\n1,2\n"],
    "Serialization": [b"7JL\x0b\x04\0\0\0" + bytes(9), b"7JL\x1e\x08\0\0\x005\x10\x01\x07Machine"],
    "pickle": [
        pickle.dumps(value, protocol)
        for protocol in range(2, 6)
        for value in ({}, [], (), None, 1.5, "a", {"w": np.zeros(70_000)}, 1, -1, True, b"b", {1})
    ],
    "torch.load": [pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)],
    "zip": [zipped(), b"PK\x05\x06" + bytes(18)],
    "safetensors": [len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)],
    "HDF5": [b"\x89HDF\r\n\x1a\n\0\0\0\0\0\x08\x08\0"],
    "JLD2": [b"HDF5-based Julia Data Format, version 0.2.0\0\0 (Julia 1.11)" + bytes(400)],
    "numpy.load": [npy()],
    "GGUF": [b"GGUF\x03\0\0\0\x23\x01\0\0\0\0\0\0\x15\0\0\0\0\0\0\0"],
    "gzip": [gzip.compress(b"a" * 99, mtime=second) for second in (0, 1, 0x65000003, 0x65414201)],
    "bzip2": [bz2.compress(b"a")],
    "xz": [lzma.compress(b"a")],
    "zstd": [b"\x28\xb5\x2f\xfd\x04\x00\x41\0\0hello"],
}


@pytest.mark.parametrize(("word", "file"), [(word, f) for word in FOREIGN for f in FOREIGN[word]])
def test_files_of_other_kinds_are_named(word, file):
    assert word in (foreign_kind(file[:512], len(file)) or "")


@pytest.mark.parametrize("word", ["GGUF", "Serialization", "pickle", "HDF5", "zip"])
def test_files_of_other_kinds_are_named_when_larger_than_the_length_they_seem_to_begin_with(word):
    for file in FOREIGN[word]:
        assert word in (foreign_kind(file[:512], 2**33) or "")


BROKEN = {
    "ornellavolle__ImageClassification.jl__model.bson": "Serialization",
    "paulxshen__Luminescent.jl___sol.bson": "JSON",
    "sjrodahl__DNC.jl__2020-03-22-dnc-10000-1.bson": "empty",
    "FluxML__MetalheadWeights__squeezenet.bson": "git lfs pull",
}


@pytest.mark.skipif(not WILD.is_dir(), reason="the files from public repositories are not here")
def test_files_from_public_repositories_are_told_apart():
    for path in WILD.glob("*.bson"):
        kind = foreign_kind(path.read_bytes()[:512], path.stat().st_size)
        assert (BROKEN[path.name] in (kind or "")) if path.name in BROKEN else kind is None


def test_real_bson_files_are_not_taken_for_another_kind():
    paths = list(JULIA.glob("*.bson"))
    assert paths
    for path in paths:
        head, nbytes = path.read_bytes()[:512], path.stat().st_size
        assert foreign_kind(head, nbytes) is None
        assert foreign_kind(head, nbytes // 2) is None  # the same file cut off
        assert foreign_kind(head, nbytes + 99) is None  # more follows
        assert foreign_kind(b"\xff\xff\xff\xff" + head[4:], nbytes) is None  # length unknown


def test_a_document_whose_length_reads_as_another_kind_is_a_document():
    for magic in (b"GGUF", b"7JL\x1e", b"PK\x03\x04", b"\x1f\x8b\x08\0"):
        head = magic + b"\x03\0\x05\0\0\0\0"  # the first key is empty
        assert foreign_kind(head, int.from_bytes(magic, "little")) is None
        assert foreign_kind(head, 99) is not None


keys = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
values = st.one_of(st.none(), st.booleans(), st.floats(), st.binary(), st.text(), st.just({}))


@given(st.dictionaries(keys, values, min_size=1), st.binary(max_size=9), st.integers(0, 600))
def test_no_valid_document_is_taken_for_another_kind(document, rest, cut):
    file = bson.encode(document)
    assert foreign_kind(file[:512], len(file)) is None
    assert foreign_kind((file + rest)[:512], len(file + rest)) is None
    assert foreign_kind(file[: max(5, cut)][:512], len(file[: max(5, cut)])) is None
