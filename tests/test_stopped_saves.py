"""Whatever happens to a save at whichever system call: the old file or the new one, no litter."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from stopped_saves import CALLS, Order

import gpustore as gs

HERE = Path(__file__).parent
IS_LONG = "GPUSTORE_TEST_LONG" in os.environ
WAYS = [
    (layout, durable, large)
    for layout in ("inline", "detached")
    for durable in (True, False)
    for large in (False, True)
]
SOME = WAYS if IS_LONG else WAYS[::3]

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.timeout(600),
]


class Saver:
    """A process that saves `model.bson` in a folder again and again, as it is told."""

    def __init__(self, folder):
        self.folder, self.path, self.version = folder, folder / "model.bson", 0
        self.process = subprocess.Popen(
            [sys.executable, HERE / "stopped_saves.py", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        gs.save(self.path, version=0, arrays=[np.zeros(3, "f4"), np.zeros(2)], small=[0] * 9)

    def save(self, way, at=0, happens=""):
        """Return how it ended, with the version that should be there if it did well."""
        self.version += 1
        order = Order(self.version, *way, at=at, happens=happens)
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def found(self):
        """Return the version of the file that is there, which is whole."""
        found = gs.load(self.path, verify=True)
        version = found["version"]
        assert all((array == version).all() for array in found["arrays"])
        assert found["small"] == [version] * 9
        return version

    def litter(self):
        return [name for name in os.listdir(self.folder) if name.endswith(".gpustore-tmp")]


@pytest.fixture
def saver(tmp_path):
    saver = Saver(tmp_path)
    yield saver
    saver.process.stdin.close()
    saver.process.wait()
    saver.process.stdout.close()


def test_the_calls_are_all_that_the_module_makes():
    modules = [HERE.parent / "gpustore" / name for name in ("storage.py", "newfile.py")]
    source = "".join(module.read_text(encoding="utf-8") for module in modules)
    made = set(re.findall(r"\bos\.(\w+)\(", source)) | {"flock"}
    pure = {"fsdecode", "fsencode", "register_at_fork"}
    of_devices = {"preadv"}  # see test_ring.py
    assert made - pure - of_devices == set(CALLS)


@pytest.mark.parametrize("way", SOME)
def test_a_save_killed_at_any_system_call_leaves_the_old_file_or_the_new_one(saver, way):
    calls = saver.save(way)["calls"]
    old, litter, kills = saver.found(), 0, 0
    for at, name in enumerate(calls, 1):
        tears = ["tear"] if name in ("write", "pwrite") else []
        for happens in ("kill before", "kill after", *tears):
            assert saver.save(way, at, happens)["signal"] == signal.SIGKILL
            kills += 1
            found = saver.found()
            is_renamed = "replace" in calls[: at if happens == "kill after" else at - 1]
            assert found == (saver.version if is_renamed else old)
            litter += len(saver.litter())
            ended = saver.save(way)
            old = saver.version
            assert ended["failed"] == "" and saver.found() == old and not saver.litter()
    assert kills >= 2 * len(calls) and litter > 0


@pytest.mark.parametrize("happens", ["ENOSPC", "EIO", "EDQUOT", "EINTR", "short"])
@pytest.mark.parametrize("way", SOME)
def test_a_system_call_that_fails_once_leaves_the_old_file_or_the_new_one(saver, way, happens):
    calls = saver.save(way)["calls"]
    old = saver.found()
    for at, name in enumerate(calls, 1):
        ended = saver.save(way, at, happens)
        assert ended["signal"] == 0 and ended["failed"] in ("", "OSError"), (name, ended)
        found = saver.found()
        is_synced_late = "replace" in calls[: at - 1] and name == "fsync"
        assert found == (saver.version if not ended["failed"] or is_synced_late else old), name
        assert happens != "short" or not ended["failed"]
        assert not saver.litter(), name
        old = found


@pytest.mark.parametrize("way", SOME)
def test_ctrl_c_at_any_system_call_leaves_no_temporary(saver, way):
    calls = saver.save(way)["calls"]
    old = saver.found()
    for at, name in enumerate(calls, 1):
        ended = saver.save(way, at, "interrupt")
        assert ended["failed"] == "KeyboardInterrupt()", name
        assert saver.found() == (saver.version if "replace" in calls[:at] else old), name
        assert not saver.litter(), name
        old = saver.found()


# --- seen from outside Python -----------------------------------------------------------------

SAVE = """
import sys, numpy as np, gpustore as gs
gs.save(sys.argv[1], {"new": np.ones(2**19, "f4"), "b": np.ones(9)}, layout=sys.argv[2])
"""
TRACED = "openat,ftruncate,fallocate,write,fsync,rename,renameat,renameat2,close,lseek,flock"


def traced(path, log, layout="inline", inject=""):
    """Save in a process under strace; return its exit status and the lines of the trace."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    command = [strace, "-f", "-qq", "-y", "-o", log, "-e", f"trace={TRACED}"]
    command += ["-e", f"inject={inject}"] if inject else []
    command += [sys.executable, "-c", SAVE, path, layout]
    ended = subprocess.run(command, capture_output=True, text=True)
    if "PTRACE" in ended.stderr or not log.exists():
        pytest.skip(f"strace may not trace here: {ended.stderr[:80]}")
    return ended.returncode, log.read_text(errors="replace").splitlines()


def own(lines, folder):
    """Return (name, number among calls of this name) of the calls on files of the folder."""
    found, counts = [], {}
    for line in lines:
        match = re.match(r"\d+ +(\w+)\(", line)
        if match is None:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        if str(folder) in line and "ENOENT" not in line:
            found.append((name, counts[name]))
    return found


@pytest.mark.parametrize("layout", ["inline", "detached"])
def test_the_kernel_sees_write_sync_rename_and_folder_sync_in_this_order(tmp_path, layout):
    folder = tmp_path / "store"
    folder.mkdir()
    status, lines = traced(folder / "m.bson", tmp_path / "log", layout)
    assert status == 0
    names = [re.sub("rename.*", "rename", name) for name, _ in own(lines, folder)]
    kept = [name for name in names if name in ("write", "fsync", "rename")]
    assert re.fullmatch(r"(write )+fsync rename fsync", " ".join(kept))
    last_sync = [line for line in lines if "fsync(" in line][-1]
    assert f"<{folder}>" in last_sync and names.index("ftruncate") < names.index("write")


def test_saves_killed_by_the_kernel_at_a_system_call_leave_a_whole_file(tmp_path):
    folder, log = tmp_path / "store", tmp_path / "log"
    folder.mkdir()
    path = folder / "m.bson"
    gs.save(path, old=np.ones(9))
    _, lines = traced(folder / "dry.bson", log)
    points = own(lines, folder)
    (folder / "dry.bson").unlink()
    points = points if IS_LONG else [point for point in points if point[0].startswith("rename")]
    assert points
    for name, number in points:
        status, _ = traced(path, log, inject=f"{name}:signal=KILL:when={number}")
        assert status != 0
        found = gs.load(path, verify=True)
        assert list(found) in (["old"], ["new", "b"])
        gs.save(path, old=np.ones(9))
        assert os.listdir(folder) == ["m.bson"]


CODES = ("ENOSPC", "EIO", "EDQUOT", "EINTR") if IS_LONG else ("ENOSPC",)


@pytest.mark.parametrize("code", CODES)
def test_a_call_that_the_kernel_fails_once_leaves_the_old_file(tmp_path, code):
    folder, log = tmp_path / "store", tmp_path / "log"
    folder.mkdir()
    path = folder / "m.bson"
    gs.save(path, old=np.ones(9))
    _, lines = traced(folder / "dry.bson", log)
    (folder / "dry.bson").unlink()
    first = {name: number for name, number in reversed(own(lines, folder)) if name != "openat"}
    for name, number in first.items():
        status, _ = traced(path, log, inject=f"{name}:error={code}:when={number}")
        expected = ["new", "b"] if status == 0 else ["old"]
        assert list(gs.load(path, verify=True)) == expected, name
        assert os.listdir(folder) == ["m.bson"], name
        assert code == "EINTR" or status != 0 or name in ("flock", "close"), name
        gs.save(path, old=np.ones(9))
