"""The command: how it speaks, fails and completes; inspect as a tree, verify, cpu."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore import cli, terminal
from gpustore.testing import fake_cuda

JULIA = Path(__file__).parent / "fixtures" / "julia"
WILD = Path(__file__).parents[2] / "shared" / "fixtures" / "wild"


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
    missing = tmp_path / "none.bson"
    for expected, arguments in (
        (1, ["inspect", missing]), (1, ["inspect", tmp_path]), (2, ["inspect"]), (2, ["nonsense"]),
        (1, ["cpu", missing, "-o", tmp_path / "x"]), (2, ["inspect", "--wrong", "x"]),
        (2, ["diff", missing, missing]), (2, ["diff", "a", "b", "--tolerance", "-1"]),
        (1, ["plot", missing, "-o", tmp_path / "x.png"]), (2, ["plot", missing]),
    ):  # fmt: skip
        code, _, err = run(*arguments)
        assert (code, err.count("\n")) == (expected, 1) and "Traceback" not in err, arguments
    with pytest.raises(FileNotFoundError, match=r"none\.bson"):
        gs.load(missing)
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


COMMAND = os.path.join(os.path.dirname(sys.executable), "gpustore")
installed = pytest.mark.skipif(
    not os.path.exists(COMMAND), reason="the checkout is on the path, but not installed"
)


@installed
def test_the_command_is_installed_and_its_help_names_the_commands():
    shown = subprocess.run([COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
    for name in ("inspect", "verify", "cpu", "convert", "diff", "plot"):
        assert f"\n  {name} " in shown


def test_the_command_alone_shows_its_help(run):
    assert run() == run("--help")
    assert "\n  inspect " in run()[1]


@installed
def test_the_help_says_what_each_command_does_in_80_columns():
    narrow = os.environ | {"COLUMNS": "80"}
    shown = subprocess.run([COMMAND], env=narrow, capture_output=True, text=True, check=True).stdout
    assert "..." not in shown.partition("Commands:")[2]


def test_errors_of_the_system_name_the_file_and_the_reason(run, tmp_path):
    missing = tmp_path / "none.bson"
    sentence = f"gpustore: {missing}: there is no such file; check the path\n"
    assert run("inspect", missing) == (1, "", sentence)
    gs.save(tmp_path / "a.bson", a=1)
    err = run("cpu", tmp_path / "a.bson", "-o", tmp_path / "none" / "b.bson")[2]
    assert err == f"gpustore: {tmp_path / 'none'}: there is no such folder; create it first\n"


@pytest.mark.parametrize("name", cli.cli.commands)
def test_the_help_of_each_command_has_examples(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and "Example" in out and f"gpustore {name} " in out


@installed
def test_a_shell_is_told_how_to_complete_and_what():
    def asked(**variables):
        environment = os.environ | variables
        return subprocess.run([COMMAND], capture_output=True, text=True, env=environment).stdout

    for shell in ("zsh", "fish"):
        assert "_GPUSTORE_COMPLETE" in asked(_GPUSTORE_COMPLETE=f"{shell}_source")
    given = {"_GPUSTORE_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    assert asked(**given, COMP_WORDS="gpustore ins") == "plain,inspect\n"
    given["COMP_CWORD"] = "2"
    assert "plain,--stats\n" in asked(**given, COMP_WORDS="gpustore inspect --s")
    assert asked(**given, COMP_WORDS="gpustore inspect mod") == "file,mod\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is absent")
@installed
def test_bash_completes_by_what_the_command_prints():
    script = (
        'eval "$(_GPUSTORE_COMPLETE=bash_source gpustore)" && COMP_WORDS=(gpustore ver) '
        'COMP_CWORD=1 && _gpustore_completion gpustore ver gpustore && echo "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join((os.path.dirname(COMMAND), os.environ["PATH"]))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True,
                          env=os.environ | {"PATH": path})  # fmt: skip
    assert done.stdout == "verify\n", done.stderr


def test_names_in_a_file_do_not_steer_the_terminal(run, tmp_path):
    name, tail = "a\x1b[2J\x07[bold]", "\u202e"
    gs.save(tmp_path / "a.bson", {name: np.zeros(2), "b": {tail: [name]}, "c": Other(name)})
    gs.save(tmp_path / "b.bson", {tail: 1})
    for arguments in (["inspect"], ["inspect", "--stats"], ["diff", tmp_path / "b.bson"]):
        out = "".join(run(*arguments, tmp_path / "a.bson")[1:])
        assert r"a\x1b[2J\x07[bold]" in out
        assert all(c.isprintable() or c == "\n" for c in out), arguments
    (tmp_path / "\x1b.bson").write_bytes(b"")
    err = run("verify", tmp_path / "\x1b.bson")[2]
    assert r"\x1b.bson" in err and "\x1b" not in err


@gs.model_type("Main.Other")
@dataclasses.dataclass
class Other:
    text: str


@pytest.mark.skipif(os.name == "nt", reason="there is no pseudo-terminal")
@pytest.mark.parametrize(("variables", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
@installed
def test_a_terminal_sees_colours_unless_told_not_to(tagged, variables, is_coloured):
    shown = on_a_terminal([COMMAND, "inspect", str(tagged)], {"TERM": "xterm"} | variables)
    assert (
        "weight" in shown and (re.search("\x1b\\[[0-9;]*3[0-7]m", shown) is not None) == is_coloured
    )


def on_a_terminal(command: list[str], variables: dict[str, str]) -> str:
    unset = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM")
    kept = {name: text for name, text in os.environ.items() if name not in unset}
    script = "import os, pty, sys; os.environ.clear(); os.environ.update({!r}); pty.spawn({!r})"
    done = subprocess.run([sys.executable, "-c", script.format(kept | variables, command)],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    return done.stdout


@installed
def test_what_an_old_encoding_cannot_say_is_escaped(tmp_path):
    gs.save(tmp_path / "a.bson", {"μ": np.zeros(2)})
    done = subprocess.run(
        [COMMAND, "inspect", str(tmp_path / "a.bson")],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0 and rb"\u03bc: float64" in done.stdout, done.stderr


def test_an_interrupt_is_one_word_and_code_130(run, tagged, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_file", interrupted)
    assert run("verify", tagged) == (130, "", "gpustore: interrupted\n")


def test_a_bar_is_shown_on_a_terminal_once_the_work_takes_a_second(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(terminal.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress("verifying") as report:
        now[0] = 0.5
        report(1, 10)
        assert "verifying" not in capsys.readouterr().err
        now[0] = 1.5
        report(10, 10)
    shown = capsys.readouterr()
    assert "verifying" in shown.err and "100%" in shown.err and shown.out == ""
    with terminal.progress("verifying"):
        pass
    assert capsys.readouterr().err == ""


def test_no_bar_is_shown_where_nobody_looks(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.progress("verifying") as report:
        report(5, 10)
    assert capsys.readouterr() == ("", "")


def test_rich_and_matplotlib_are_loaded_only_where_they_are_used():
    code = "import sys, gpustore, gpustore.plot, gpustore.inspection; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"rich", "click", "matplotlib"} & set(shown.stdout.split())
