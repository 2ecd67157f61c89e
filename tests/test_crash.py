"""A process killed while it saves leaves the old file or the new one, whole, and no litter.

300 kills with GPUSTORE_TEST_LONG=1 (`make test-long`), else 12.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore import storage

KILLS = 300 if "GPUSTORE_TEST_LONG" in os.environ else 12
SAVER = """
import sys, itertools, numpy as np, gpustore as gs
print("ready", flush=True)
for version in itertools.count(int(sys.argv[2])):
    model = {"version": version, "large": np.full(2**19, version, "f4"), "small": [1] * 99}
    layout = ["inline", "detached"][version % 3 == 0]
    gs.save(sys.argv[1], model, durable=version % 2 == 0, layout=layout)
    print("saved", flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.endswith(".gpustore-tmp")]


@pytest.mark.timeout(600)
def test_a_killed_save_leaves_a_whole_file_and_the_next_one_removes_its_litter(tmp_path):
    path, delays = tmp_path / "model.bson", random.Random(0)
    gs.save(path, version=0, large=np.zeros(2**19, "f4"))
    version, litter = 0, 0
    for _ in range(KILLS):
        arguments = [sys.executable, "-c", SAVER, str(path), str(version + 1)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as saver:
            assert saver.stdout.readline() == "ready\n"
            time.sleep(delays.uniform(0, 0.05))
            saver.kill()
        found = gs.load(path, verify=True)
        assert found["version"] >= version
        assert (found["large"] == found["version"]).all()
        version = found["version"]
        assert len(temporaries(tmp_path)) <= 1
        litter += len(temporaries(tmp_path))
    gs.save(path, version=-1)
    assert not temporaries(tmp_path)
    assert litter > 0 or KILLS < 100


def test_a_temporary_in_use_is_left_alone(tmp_path):
    path = tmp_path / "model.bson"
    seen = []

    def save_beside(done, total):
        if not seen:
            seen.append(temporaries(tmp_path))
            gs.save(path, inner=1)
            seen.append(temporaries(tmp_path))

    gs.save(path, outer=np.ones(2**18), progress=save_beside)
    assert seen[0] == seen[1] and len(seen[0]) == 1
    assert list(gs.load(path)) == ["outer"] and not temporaries(tmp_path)


def test_a_file_of_another_name_is_no_litter(tmp_path):
    names = [".other.bson.0123456789abcdef.gpustore-tmp", ".model.bson.0123.gpustore-tmp"]
    stale = tmp_path / ".model.bson.0123456789abcdef.gpustore-tmp"
    for name in (*names, stale.name):
        (tmp_path / name).write_bytes(b"")
    gs.save(tmp_path / "model.bson", a=1)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model.bson"])


def test_a_name_removed_and_taken_again_meanwhile_is_left_alone(tmp_path, monkeypatch):
    stale = tmp_path / ".model.bson.0123456789abcdef.gpustore-tmp"
    stale.write_bytes(b"")
    lock = storage._lock

    def take_first(descriptor, *, wait):
        if not wait:  # between opening and locking, the name becomes another save's
            stale.unlink()
            stale.write_bytes(b"of another save")
        return lock(descriptor, wait=wait)

    monkeypatch.setattr(storage, "_lock", take_first)
    gs.save(tmp_path / "model.bson", a=1)
    assert stale.read_bytes() == b"of another save"


@pytest.mark.timeout(60)
def test_of_two_processes_that_save_one_path_one_wins_whole(tmp_path):
    path = tmp_path / "model.bson"
    arguments = [sys.executable, "-c", SAVER, str(path)]
    savers = [
        subprocess.Popen([*arguments, start], stdout=subprocess.PIPE, text=True)
        for start in ("1", "1000000")
    ]
    try:
        for _ in range(5):  # each has saved while the other did
            for saver in savers:
                assert saver.stdout.readline() in ("ready\n", "saved\n")
    finally:
        for saver in savers:
            saver.kill()
            saver.communicate()
    found = gs.load(path, verify=True)
    assert (found["large"] == np.float32(found["version"])).all()
    gs.save(path, a=1)
    assert not temporaries(tmp_path)


def test_of_many_threads_that_save_one_path_one_wins_whole(tmp_path):
    path = tmp_path / "model.bson"
    failed = []

    def save_often(n):
        try:
            for _ in range(20):
                gs.save(path, {"n": n, "a": np.full(2**15, n)}, durable=False)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save_often, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    found = gs.load(path, verify=True)
    assert (found["a"] == found["n"]).all() and not temporaries(tmp_path)


def test_many_threads_save_models_of_their_own_at_once(tmp_path):
    failed = []

    def save_and_load(n):
        try:
            model = {"n": n, "large": np.full(2**19, n, "f4"), "cycle": [n]}
            model["cycle"].append(model["cycle"])
            for layout in ("inline", "detached") * 3:
                gs.save(tmp_path / f"{n}.bson", model, layout=layout, durable=False)
                found = gs.load(tmp_path / f"{n}.bson", verify=True)
                assert found["n"] == n and (found["large"] == n).all()
                assert found["cycle"][1] is found["cycle"]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=save_and_load, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(os.listdir(tmp_path)) == 8


def test_one_handle_serves_many_threads_in_all_its_ways(tmp_path):
    path, failed = tmp_path / "model.bson", []
    gs.save(path, {f"a{n}": np.full(2**15, n) for n in range(8)}, code=gs.relu)
    with gs.open_file(path) as stored:

        def use(n):
            try:
                for _ in range(10):
                    assert (stored[f"a{n}"] == n).all() and stored["code"] is gs.relu
                    assert (stored.read(f"a{n}", region=slice(5)) == n).all()
                    assert len(stored) == 9 and stored.verify() and len(stored.value()) == 9
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_many_threads_call_one_function_of_a_file(tmp_path):
    folder = Path(__file__).parent / "fixtures"
    function = gs.load(folder / "code_julia15.bson")["functions"]["reshape_rest"]
    found = []

    def call(n):
        array = np.full((2, 3, n), n, "f4")
        found.append(all((function(array) == n).all() for _ in range(50)))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_many_threads_load_and_verify_one_file(tmp_path):
    path = tmp_path / "model.bson"
    gs.save(path, {f"a{n}": np.full(2**15, n) for n in range(16)})
    found = []
    with gs.open_file(path) as stored:

        def read(n):
            array, whole = stored.read(f"a{n}"), gs.load(path, verify=n % 2 == 0)
            found.append(bool((array == n).all() and (whole[f"a{n}"] == n).all()))

        threads = [threading.Thread(target=read, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 16
