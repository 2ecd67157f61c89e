"""Files of other kinds, against the libraries that write them; skipped where those are absent."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpustore as gs
from gpustore import cli, npz_format, safetensors_format, testing
from gpustore.convert import convert

NATIVE = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
EXTENSIONS = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def weights() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    found = {np.dtype(d).name: (rng.random((3, 5)) * 9).astype(d) for d in NATIVE}
    found |= {"scalar": np.array(3, "f4"), "empty": np.zeros((0, 3))}
    return found | {"column": np.asfortranarray(rng.random((30, 40)))}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name], array)


# --- safetensors ------------------------------------------------------------------------------


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=60)
@given(
    st.dictionaries(TEXT, testing.arrays(dtypes=[*NATIVE, *EXTENSIONS]), max_size=5),
    st.dictionaries(TEXT, TEXT, max_size=2),
)
def test_what_is_written_is_read_back(tmp_path_factory, arrays, metadata):
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    safetensors_format.write(path, arrays, metadata)
    found, about = safetensors_format.read(path)
    assert about == metadata and found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


def test_the_package_reads_and_writes_the_same_files(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    arrays = weights()
    safetensors_format.write(tmp_path / "ours", arrays, {"format": "np"})
    same(package.load_file(tmp_path / "ours"), arrays)
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    package.save_file(rows, tmp_path / "theirs", {"format": "np"})
    found, metadata = safetensors_format.read(tmp_path / "theirs")
    same(found, arrays)
    assert metadata == {"format": "np"}


def header_file(path: Path, header: Any, payload: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return path


def about(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


MALFORMED = {
    "a hole": {"a": about(data_offsets=[0, 4], shape=[1]),
               "b": about(data_offsets=[8, 8], shape=[0])},
    "an overlap": {"a": about(), "b": about(data_offsets=[4, 12])},
    "a size that is not the shape's": {"a": about(shape=[3])},
    "a shape that overflows": {"a": about(shape=[2**62, 2**62])},
    "a negative size": {"a": about(shape=[-2])},
    "a size that is a boolean": {"a": about(shape=[True, 2])},
    "a rank of 33": {"a": about(shape=[1] * 31 + [2, 1])},
    "offsets in the wrong order": {"a": about(data_offsets=[8, 0])},
    "one offset": {"a": about(data_offsets=[0])},
    "no offsets": {"a": {"dtype": "F32", "shape": [2]}},
    "no object": {"a": 3},
    "a list": [1],
    "a name twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}',
    "no JSON": b"{",
    "no UTF-8": b'{"\xff":1}',
    "nested deeply": b"[" * 100_000,
    "metadata that is no text": {"__metadata__": {"a": 1}},
    "bytes after the last array": {"a": about(shape=[1], data_offsets=[0, 4])},
}  # fmt: skip


@pytest.mark.parametrize("header", MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_file_is_refused(tmp_path, header):
    with pytest.raises(gs.FormatError, match="in.safetensors: "):
        safetensors_format.read(header_file(tmp_path / "in.safetensors", header))


@pytest.mark.parametrize("code", ["F4", "F8_E8M0", "", None, 3])
def test_a_dtype_that_is_lacking_is_said(tmp_path, code):
    path = header_file(tmp_path / "in.safetensors", {"a": about(dtype=code)})
    with pytest.raises(gs.UnsupportedValueError, match="a: expected one of the dtypes BOOL"):
        convert(path, tmp_path / "out.bson")
    assert not (tmp_path / "out.bson").exists()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = header_file(tmp_path / "in.safetensors", {"a": about()})
    whole = path.read_bytes()
    for nbytes in range(len(whole)):
        path.write_bytes(whole[:nbytes])
        with pytest.raises(gs.FormatError):
            safetensors_format.read(path)


# --- between kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_arrays_go_there_and_back(tmp_path, kind):
    arrays = weights()
    gs.save(tmp_path / "a.bson", arrays)
    assert convert(tmp_path / "a.bson", tmp_path / f"b.{kind}") == len(arrays)
    assert convert(tmp_path / f"b.{kind}", tmp_path / "c.bson") == len(arrays)
    same(gs.load(tmp_path / "c.bson"), arrays)
    if kind == "npz":
        with np.load(tmp_path / "b.npz") as found:
            same(dict(found), arrays)


def test_metadata_is_kept(tmp_path):
    safetensors_format.write(tmp_path / "a.safetensors", weights(), {"epoch": "3"})
    convert(tmp_path / "a.safetensors", tmp_path / "b.bson")
    assert gs.load(tmp_path / "b.bson", "__metadata__") == {"epoch": "3"}
    convert(tmp_path / "b.bson", tmp_path / "c.safetensors")
    assert safetensors_format.read(tmp_path / "c.safetensors")[1] == {"epoch": "3"}
    with pytest.raises(gs.UnsupportedValueError, match=r"__metadata__\['epoch'\] \(str\)"):
        convert(tmp_path / "b.bson", tmp_path / "d.npz")


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_what_would_be_lost_is_refused_or_left_out(tmp_path, kind):
    model = gs.Chain(gs.Dense(2, 3, gs.relu), gs.Dense(3, 1))
    gs.save(tmp_path / "a.bson", model=model, epoch=3)
    target = tmp_path / f"b.{kind}"
    with pytest.raises(gs.UnsupportedValueError, match=r"cannot hold model \(Chain\), .*epoch"):
        convert(tmp_path / "a.bson", target)
    assert not target.exists()
    assert convert(tmp_path / "a.bson", target, arrays_only=True) == 4
    convert(target, tmp_path / "c.bson")
    found = gs.load(tmp_path / "c.bson")
    assert sorted(found) == sorted(
        f"model.layers[{i}].{name}" for i in (0, 1) for name in ("bias", "weight")
    )
    np.testing.assert_array_equal(found["model.layers[0].weight"], model[0].weight)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_shared_arrays_are_refused_or_written_twice(tmp_path, kind):
    array = np.arange(4.0)
    gs.save(tmp_path / "a.bson", a=array, b={"c": array})
    with pytest.raises(gs.UnsupportedValueError, match=r"a and b\['c'\] are one array"):
        convert(tmp_path / "a.bson", tmp_path / f"b.{kind}")
    assert convert(tmp_path / "a.bson", tmp_path / f"b.{kind}", unshare=True) == 2


def test_dtypes_that_a_kind_lacks_are_said(tmp_path):
    gs.save(tmp_path / "a.bson", a=np.zeros(3, ml_dtypes.bfloat16), c=np.zeros(3, "c16"))
    with pytest.raises(gs.UnsupportedValueError, match="a: a .npz file has no bfloat16"):
        convert(tmp_path / "a.bson", tmp_path / "a.npz")
    with pytest.raises(gs.UnsupportedValueError, match="c: a safetensors file has no complex128"):
        convert(tmp_path / "a.bson", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bson"]


def test_damage_is_found_before_it_is_carried_on(tmp_path):
    gs.save(tmp_path / "a.bson", a=np.arange(100.0))
    content = bytearray((tmp_path / "a.bson").read_bytes())
    content[content.index(np.arange(100.0).tobytes())] ^= 1
    (tmp_path / "a.bson").write_bytes(content)
    with pytest.raises(gs.IntegrityError, match="differs for a"):
        convert(tmp_path / "a.bson", tmp_path / "b.safetensors")


@pytest.mark.parametrize(("source", "target", "match"), [
    ("a.h5", "b.bson", "ends in .bson, .safetensors, .npz, .pt, .pth, found '.h5'"),
    ("a.bson", "b", "found 'no suffix'"),
    ("a.bson", "b.bson", "of one kind"),
    ("a.pt", "b.pth", "of one kind"),
])  # fmt: skip
def test_unknown_kinds_are_said(tmp_path, source, target, match):
    with pytest.raises(gs.UnsupportedValueError, match=match):
        convert(tmp_path / source, tmp_path / target)


def test_a_npz_that_holds_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "e.npz").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as members:
        members.writestr("a.npy", "text")
    for path in tmp_path.glob("*.npz"):
        with pytest.raises(gs.FormatError, match="no .npz file of plain arrays"):
            convert(path, tmp_path / "b.bson")
    assert not (tmp_path / "b.bson").exists()


@settings(max_examples=60)
@given(st.dictionaries(st.text("abz", min_size=1, max_size=5), testing.arrays(dtypes=NATIVE)),
       st.booleans())  # fmt: skip
def test_a_npz_is_read_as_numpy_reads_it(tmp_path_factory, arrays, is_compressed):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    (np.savez_compressed if is_compressed else np.savez)(path, **arrays)
    found = npz_format.read(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_the_arrays_of_a_npz_are_mapped(tmp_path):
    array = np.arange(100_000.0).reshape(100, 1000)
    np.savez(tmp_path / "a.npz", a=array, b=array.T)
    found = npz_format.read(tmp_path / "a.npz")
    assert not any(part.flags.owndata for part in found.values())
    assert found["b"].flags.f_contiguous
    bases = [part.__array_interface__["data"][0] for part in found.values()]
    assert bases[1] - bases[0] == array.nbytes + len("b.npy") + 30 + 20 + 128  # as in the file


def test_a_npz_that_is_damaged_anywhere_is_refused_or_read_as_it_was(tmp_path):
    array = np.arange(3.0)
    np.savez(tmp_path / "a.npz", a=array)
    whole = (tmp_path / "a.npz").read_bytes()
    found = []
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x11
        (tmp_path / "a.npz").write_bytes(damaged)
        try:
            for part in npz_format.read(tmp_path / "a.npz").values():
                same({"a": part}, {"a": array})
        except (gs.FormatError, gs.IntegrityError) as error:
            found.append(type(error))
    for nbytes in range(len(whole)):
        (tmp_path / "a.npz").write_bytes(whole[:nbytes])
        with pytest.raises(gs.FormatError):
            npz_format.read(tmp_path / "a.npz")
    assert gs.IntegrityError in found and gs.FormatError in found


def test_an_array_that_is_in_a_million_places_is_refused_at_once(tmp_path):
    value = [np.zeros(2)]
    for _ in range(40):
        value = [value, value]
    gs.save(tmp_path / "a.bson", value=value)
    with pytest.raises(gs.UnsupportedValueError, match="at most 1000000 values in all places"):
        convert(tmp_path / "a.bson", tmp_path / "b.npz", unshare=True)


_MEASURED = """
import re, sys
from gpustore.convert import convert
def own():
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\\s*(\\d+)", status.read())[1])
peak = before = own()
def note(done, total):
    global peak
    peak = max(peak, own())
convert(sys.argv[1], sys.argv[2], progress=note)
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_arrays_are_streamed_both_ways(tmp_path, kind):
    rows = {f"a{i}": np.zeros((2**11, 2**11), "f4") for i in range(6)}  # 96 MiB
    gs.save(tmp_path / "a.bson", rows, f=np.asfortranarray(np.ones((2**11, 2**11), "f4")))
    for source, target in (("a.bson", f"b.{kind}"), (f"b.{kind}", "c.bson")):
        names = [str(tmp_path / source), str(tmp_path / target)]
        done = subprocess.run([sys.executable, "-c", _MEASURED, *names],
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert int(done.stdout) < 32 * 1024, (source, target)


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_progress_counts_the_bytes_of_both_files(tmp_path, kind):
    gs.save(tmp_path / "a.bson", a=np.zeros(300_000), b=np.zeros(5))
    for source, target in (("a.bson", f"b.{kind}"), (f"b.{kind}", "c.bson")):
        told: list[tuple[int, int]] = []
        note = told.append
        convert(tmp_path / source, tmp_path / target, progress=lambda *now, note=note: note(now))
        assert told[-1][0] == told[-1][1] and all(0 <= done <= total for done, total in told)


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    gs.save(tmp_path / "a.bson", a=np.arange(4.0))
    for kind in ("npz", "safetensors"):
        target = tmp_path / f"b.{kind}"
        target.write_bytes(b"old")

        def failing(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", failing)
            with pytest.raises(OSError, match="No space"):
                convert(tmp_path / "a.bson", target)
        assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bson", "b.npz", "b.safetensors"]


# --- PyTorch ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def test_checkpoints_of_pytorch_come_and_go(torch, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
             "half": torch.ones(3, dtype=torch.bfloat16)}  # fmt: skip
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.bson")
    convert(tmp_path / "b.bson", tmp_path / "c.pt")
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    assert found["epoch"] == 3 and found["half"].dtype == torch.bfloat16
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    for name, tensor in state["model"].items():
        assert torch.equal(found["model"][name], tensor)


def test_tied_weights_stay_tied_in_both_directions(torch, tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": weight, "b": weight.view(2, 3)}, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.bson")
    found = gs.load(tmp_path / "b.bson")
    assert found["a"] is found["b"]
    convert(tmp_path / "b.bson", tmp_path / "c.pt")
    found = torch.load(tmp_path / "c.pt", weights_only=True)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    with pytest.raises(gs.UnsupportedValueError, match="a and b are one array"):
        convert(tmp_path / "a.pt", tmp_path / "d.safetensors")


def test_models_go_to_pytorch_as_arrays_only(torch, tmp_path):
    gs.save(tmp_path / "a.bson", model=gs.Chain(gs.Dense(2, 3)))
    with pytest.raises(gs.UnsupportedValueError, match=r"cannot hold model \(Chain\)"):
        convert(tmp_path / "a.bson", tmp_path / "b.pt")
    assert convert(tmp_path / "a.bson", tmp_path / "b.pt", arrays_only=True) == 2
    assert "model.layers[0].weight" in torch.load(tmp_path / "b.pt", weights_only=True)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of a file has run",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_checkpoint_is_never_run(torch, tmp_path, capsys, is_zip):
    torch.save({"a": Evil()}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(gs.UnsupportedValueError, match="reading it would run code .print.;"):
        convert(tmp_path / "a.pt", tmp_path / "b.bson")
    assert "has run" not in capsys.readouterr().out
    assert not (tmp_path / "b.bson").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"hello", b"\x80\x02}", b"PK\x03\x04"])
def test_what_is_no_checkpoint_is_one_sentence(torch, tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(gs.FormatError, match=r"a\.pt: PyTorch cannot read it: [^\n]+$"):
        convert(tmp_path / "a.pt", tmp_path / "b.bson")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_pytorch_warns_of_is_not_said_beside_the_sentence(torch, tmp_path, run):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil(), protocol=4))
        archive.writestr("a/version", "3")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        code, _, err = run("convert", tmp_path / "a.pt", tmp_path / "b.bson")
    assert code == 1 and err.count("\n") == 1 and not said


def test_arrays_of_a_npz_go_to_pytorch_wherever_they_lie_in_the_file(torch, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(7, dtype="f4"), bb=np.arange(9.0))
    convert(tmp_path / "a.npz", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(found["bb"], torch.arange(9.0, dtype=torch.float64))


def test_without_pytorch_its_files_are_refused_by_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(gs.MissingExtraError, match="pip install torch"):
        convert(tmp_path / "a.pt", tmp_path / "b.bson")


# --- the command ------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_or_one_sentence(tmp_path, monkeypatch, capsys):
    gs.save(tmp_path / "a.bson", a=np.arange(4.0), epoch=3)

    def run(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpustore", "convert", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    target = tmp_path / "b.safetensors"
    code, _, err = run(tmp_path / "a.bson", target)
    assert code == 1 and "epoch (int)" in err and err.count("\n") == 1
    code, out, _ = run(tmp_path / "a.bson", target, "--arrays-only")
    assert (code, out) == (0, f"{target}: written, 1 array\n")
