"""The command: inspect, verify, cpu; errors are one sentence and exit code 1."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore.cli import main
from gpustore.testing import fake_cuda

JULIA = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).parents[2] / "shared" / "fixtures" / "wild"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpustore", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture
def tagged(tmp_path):
    path = tmp_path / "tagged.bson"
    chain = gs.Chain(gs.Dense(10, 5, gs.relu), gs.Dense(5, 2))
    with fake_cuda(1):
        gs.save(path, model=gs.gpu(chain), epoch=3, on_gpu="tag")
    return path


def test_inspect_shows_the_tree_and_whether_a_gpu_is_needed(run, tagged):
    code, out, _ = run("inspect", tagged)
    assert code == 0
    for part in (
        "model: Chain", "layers[0]", "weight: float32 (5, 10), cuda:0, 200 bytes", "epoch: 3",
        "4 arrays", "Loads without a GPU: only with device='cpu' (4 arrays on cuda:0)",
    ):  # fmt: skip
        assert part in out.replace("[0]: Dense", "layers[0]"), out


def test_inspect_says_what_the_machine_has_for_a_tagged_file(run, tagged):
    with fake_cuda():
        assert "Here: arrays travel through pinned host memory (" in run("inspect", tagged)[1]
    with fake_cuda(fail="no-driver"):
        assert "Here: no NVIDIA driver is loaded" in run("inspect", tagged)[1]


def test_cpu_makes_a_tagged_file_load_anywhere(run, tagged, tmp_path):
    code, out, _ = run("cpu", tagged, "-o", tmp_path / "cpu.bson")
    assert code == 0 and "4 arrays" in out
    expected = gs.load(tagged, "model", device="cpu")
    with fake_cuda(fail="cupy-missing"):
        loaded = gs.load(tmp_path / "cpu.bson", "model", verify=True)
    assert np.array_equal(loaded[0].weight, expected[0].weight)
    assert run("inspect", tmp_path / "cpu.bson")[1].rstrip().endswith("yes")


@pytest.mark.parametrize("name", ["conv_anon_flux08_v1", "functions_v1", "bitarrays_v1"])
def test_cpu_keeps_all_that_a_file_of_julia_holds(run, tmp_path, name):
    assert run("cpu", JULIA / f"{name}.bson", "-o", tmp_path / "out.bson")[0] == 0
    assert run("verify", tmp_path / "out.bson")[0] == 0
    before, after = gs.load(JULIA / f"{name}.bson"), gs.load(tmp_path / "out.bson")
    gs.testing.assert_same(after, before)


def test_cpu_refuses_lost_arrays(run, tmp_path):
    code, _, err = run("cpu", JULIA / "gpu_model_g3_v1.bson", "-o", tmp_path / "out.bson")
    assert code == 1 and "save cpu(model) in Julia" in err and not (tmp_path / "out.bson").exists()


def test_verify_says_ok_damaged_or_that_there_is_nothing_to_verify(run, tagged):
    assert run("verify", tagged)[1].rstrip().endswith("ok, 4 arrays and the structure")
    assert "nothing to verify" in run("verify", JULIA / "dicts_v1.bson")[1]
    with gs.open_file(tagged) as stored:
        offset = stored.arrays[0].offset
    damaged = bytearray(tagged.read_bytes())
    damaged[offset] ^= 1
    tagged.write_bytes(damaged)
    code, _, err = run("verify", tagged)
    assert code == 1 and "model.layers[0].weight" in err and err.count("\n") == 1


BAD = {
    "empty.bson": b"",
    "json.bson": b'{"a": 1}',
    "lfs.bson": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "pickle.bson": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00K\x01.",
    "zip.bson": b"PK\x03\x04" + bytes(60),
    "safetensors.bson": b"\x02\0\0\0\0\0\0\0{}",
    "mongo.bson": b"\x16\0\0\0\x07_id\0" + bytes(12) + b"\0",
    "julia.bson": b"7JL\x1e\x04\x00\x00\x00" + bytes(40),
    "truncated.bson": (JULIA / "doc_model_flux08_v1.bson").read_bytes()[:5000],
}
WORDS = {
    "empty.bson": "empty", "json.bson": "JSON", "lfs.bson": "git lfs pull",
    "pickle.bson": "pickle", "zip.bson": "zip", "safetensors.bson": "safetensors",
    "mongo.bson": "MongoDB", "julia.bson": "Serialization", "truncated.bson": "cut off",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["inspect", "verify", "cpu"])
def test_every_kind_of_bad_file_gets_its_own_sentence(run, tmp_path, name, command):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    options = ["-o", tmp_path / "out.bson"] if command == "cpu" else []
    code, out, err = run(command, path, *options)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert WORDS[name].lower() in err.lower(), err
    with pytest.raises(gs.FormatError):
        gs.load(path)


def test_missing_files_folders_and_wrong_use_are_one_sentence(run, tmp_path):
    for arguments in (
        ["inspect", tmp_path / "none.bson"], ["inspect", tmp_path], ["inspect"], ["nonsense"],
        ["cpu", tmp_path / "none.bson", "-o", tmp_path / "x"], ["inspect", "--wrong", "x"],
    ):  # fmt: skip
        code, _, err = run(*arguments)
        assert code == 1 and err.count("\n") == 1 and "Traceback" not in err
    with pytest.raises(FileNotFoundError, match=r"none\.bson"):
        gs.load(tmp_path / "none.bson")
    with pytest.raises(IsADirectoryError):
        gs.load(tmp_path)


def _real_files() -> list[Path]:
    return sorted(JULIA.glob("*.bson")) + sorted(WILD.glob("*.bson"))


@pytest.mark.parametrize("path", _real_files(), ids=lambda path: path.stem[:60])
def test_inspect_ends_with_0_or_one_sentence_on_every_real_file(run, path):
    code, out, err = run("inspect", path)
    assert (code == 0 and " array" in out) or (code == 1 and err.count("\n") == 1)


@pytest.mark.skipif(not WILD.exists(), reason="the folder of other people's files is absent")
def test_every_file_of_other_people_that_julia_wrote_can_be_inspected(run):
    import json

    manifest = json.loads((WILD / "manifest.json").read_text())
    files = manifest if isinstance(manifest, list) else manifest["files"]
    failed = [
        about["name"]
        for about in files
        if about["written_by_bson_jl"] and about["category"] != "broken"
        if run("inspect", WILD / about["name"])[0] != 0
    ]
    assert failed == []


def test_the_command_is_installed_and_its_help_names_the_commands():
    try:
        importlib.metadata.distribution("gpustore")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the checkout is on the path, but not installed")
    command = os.path.join(os.path.dirname(sys.executable), "gpustore")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("inspect", "verify", "cpu"):
        assert name in shown


def test_a_bar_is_shown_on_a_terminal_once_the_work_takes_a_second(monkeypatch, capsys):
    from gpustore import cli

    clock = iter([0.0, 0.5, 1.5, 1.6, 1.7])
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: True, raising=False)
    with cli._progress("verifying") as report:
        report(1, 10)
        assert "verifying" not in capsys.readouterr().err
        report(5, 10)
        report(10, 10)
    assert "100%" in capsys.readouterr().err
    with cli._progress("verifying") as report:
        pass
    assert capsys.readouterr().err == ""
