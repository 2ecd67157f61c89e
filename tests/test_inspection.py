"""inspect: tables, figures, JSON, and with which Flux a file was written."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpustore as gs
from gpustore import inspection, origin
from gpustore.flux import version_of
from gpustore.testing import fake_cuda
from gpustore.values import JuliaArray

JULIA = Path(__file__).parent / "fixtures" / "julia"
OF_AN_ERA = sorted(JULIA.glob("*_flux0*.bson"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.bson"
    chain = gs.Chain(gs.Conv((3, 3), (1, 2)), gs.flatten, gs.Dense(8, 2))
    chain[2].weight[0, :4] = [np.nan, 0, 0, 9]
    gs.save(path, model=chain, rows=np.arange(6.0).reshape(2, 3), when=np.zeros(2, "M8[D]"))
    return path


def row_of(out: str, name: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
    return re.split(r"  +", line.strip())


def test_the_table_names_every_array(run, file):
    out = run("inspect", file, "--arrays")[1]
    assert row_of(out, "model.layers[0].weight") == [
        "model.layers[0].weight", "float32", "(3, 3, 1, 2)", "column", "72 bytes",
    ]  # fmt: skip
    assert row_of(out, "rows") == ["rows", "float64", "(2, 3)", "row", "48 bytes"]
    assert "written by gpustore" in out and "6 arrays" in out
    assert not any(len(line) > len(line.rstrip()) + 1 for line in out.splitlines())


def test_the_figures_are_in_the_table(run, file):
    out = run("inspect", file, "--stats")[1]
    assert row_of(out, "rows")[3:] == ["0", "5", "2.5", "0%", "16.7%"]
    found = row_of(out, "model.layers[2].weight")
    assert found[4] == "9" and found[6:] == ["6.25%", "12.5%"]
    assert row_of(out, "when") == ["when", "datetime64[D]", "(2,)"]


def test_tagged_and_lost_arrays_show_their_device(run, tmp_path):
    with fake_cuda(2):
        gs.save(tmp_path / "a.bson", w=gs.gpu(np.zeros((2, 3), "f4"), "cuda:1"), on_gpu="tag")
    assert row_of(run("inspect", tmp_path / "a.bson", "--arrays")[1], "w")[4] == "cuda:1"
    out = run("inspect", JULIA / "gpu_model_g3_v1.bson", "--arrays")[1]
    assert "model.layers[0].weight  Float32  (5, 9)         lost" in out
    assert "their values are lost" in out


def test_json_says_all_of_it(run, file):
    found = json.loads(run("inspect", file, "--json", "--stats")[1])
    assert found["nbytes"] == file.stat().st_size and found["writer"].startswith("gpustore ")
    assert found["flux"] == [{"from": "0.12.6", "before": None}]
    assert found["loads_without_gpu"] is True and found["entries"]["model"] == "Chain"
    with gs.open_file(file) as stored:
        assert [about["path"] for about in found["arrays"]] == [e.path for e in stored.arrays]
        assert found["arrays"][0]["blake3"] == stored.arrays[0].digest.hex()
    rows = next(about for about in found["arrays"] if about["path"] == "rows")
    assert rows["stats"] == {"min": 0, "max": 5, "mean": 2.5, "nan_share": 0, "zero_share": 1 / 6}
    assert (rows["order"], rows["shape"], rows["dtype"]) == ("C", [2, 3], "float64")
    assert "stats" not in json.loads(run("inspect", file, "--json")[1])["arrays"][0]


def test_json_has_no_numbers_that_json_lacks(run, tmp_path):
    gs.save(tmp_path / "a.bson", a=np.array([np.inf, 1]), b=np.array([np.nan]))
    out = run("inspect", tmp_path / "a.bson", "--json", "--stats")[1]

    def refuse(text):
        raise AssertionError(text)

    a, b = (about["stats"] for about in json.loads(out, parse_constant=refuse)["arrays"])
    assert (a["max"], a["mean"], b["min"], b["nan_share"]) == ("inf", "inf", None, 1)


def test_json_names_what_is_lost(run):
    found = json.loads(run("inspect", JULIA / "gpu_model_g3_v1.bson", "--json")[1])
    assert found["loads_without_gpu"] is False and found["writer"] is None
    first = {"path": "model.layers[0].weight", "element_type": "Core.Float32", "shape": [5, 9]}
    assert found["lost"][0] == first


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
def test_figures_of_a_file_need_no_memory_of_its_size(tmp_path):
    gs.save(tmp_path / "a.bson", a=np.zeros((2, 2**24), "f4"), durable=False)  # 128 MiB
    code = (
        "import sys, re, gpustore as gs; from gpustore import inspection\n"
        "def own():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'RssAnon:\\s*(\\d+)', status)[1])\n"
        "peak = before = None\n"
        "def note(done, total):\n"
        "    global peak; peak = max(peak, own())\n"
        "with gs.open_file(sys.argv[1]) as stored:\n"
        "    peak = before = own(); found = inspection.figures_of(stored, note)\n"
        "print(peak - before, found[0].zeros)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.bson")],
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    grown_kib, zeros = map(int, shown.split())
    assert zeros == 2**25 and grown_kib < 16 * 1024


# --- with which Flux --------------------------------------------------------------------------


def era_of(path: Path) -> origin.Era | None:
    with gs.open_file(path) as stored:
        return inspection.inspect(stored).era


@pytest.mark.parametrize("path", OF_AN_ERA, ids=lambda path: path.stem)
def test_the_flux_that_wrote_a_file_is_among_those_told(path):
    minor = int(re.search(r"_flux0(\d+)_", path.stem)[1])
    era = era_of(path)
    if era is None:
        assert path.stem.startswith("doc_weights")  # plain arrays, no struct of Flux
        return
    assert any(
        version_of(first) < (0, minor + 1) and (end is None or (0, minor) < version_of(end))
        for first, end in era.spans
    ), str(era)


@pytest.mark.parametrize(("name", "told"), [
    ("conv_anon_flux07_v1", "Flux 0.7 or newer, before 0.8"),
    ("conv_flux012_v1", "Flux 0.8.3 or newer, before 0.12.6"),
    ("conv_flux013_v2", "Flux 0.12.6 or newer"),
    ("norms_flux013_v2", "Flux 0.13 or newer, before 0.14"),
    ("batchnorm_flux08_v1", "Flux 0.8.3 or newer, before 0.10, or 0.10.2 or newer, before 0.12"),
])  # fmt: skip
def test_eras_are_told_by_the_layouts(name, told, run):
    assert str(era_of(JULIA / f"{name}.bson")) == told
    assert f"layers laid out as by {told}\n" in run("inspect", JULIA / f"{name}.bson")[1]


@pytest.mark.parametrize("flux", ["0.9", "0.12", "0.13", "0.14", "0.16"])
def test_a_model_saved_for_a_flux_is_told_as_of_it(tmp_path, flux):
    chain = gs.Chain(gs.Conv((3, 3), (1, 2)), gs.BatchNorm(2), gs.Dropout(0.5), gs.Dense(8, 2))
    gs.save(tmp_path / "a.bson", model=chain, flux=flux)
    spans = era_of(tmp_path / "a.bson").spans
    assert any(version_of(first) <= version_of(flux) for first, _ in spans)
    assert any(end is None or version_of(flux) < version_of(end) for _, end in spans)


def test_layers_of_two_eras_are_said_to_be():
    old, new = (gs.load(JULIA / f"conv_flux{n}.bson") for n in ("012_v1", "013_v2"))
    assert str(origin.era_of([old, new])) == "structs of several eras of Flux side by side"
    assert origin.era_of({"a": 1}) is None


def test_nothing_is_said_of_flux_where_nothing_of_it_is_there(run, tmp_path):
    gs.save(tmp_path / "a.bson", a=1)
    assert "Flux" not in run("inspect", tmp_path / "a.bson")[1]
    assert os.fspath(tmp_path) in run("inspect", tmp_path / "a.bson")[1]


def test_what_julia_has_of_its_own_reads_as_in_julia(run, tmp_path):
    inner = gs.JuliaType.named("Core.Array", gs.JuliaType.named("Core.Float32"), 1)
    net = gs.Struct(gs.JuliaType.named("Main.Net", inner), [np.float32(0.01), [1, 2]])
    empty = gs.Struct(gs.JuliaType.named("Main.Base.Zero"), [])
    when = datetime.datetime(2026, 1, 16, 21, 2)
    pair = gs.JuliaType.named("Core.Tuple", *[gs.JuliaType.named("Core.Float64")] * 2)
    pairs = JuliaArray(pair, (2,), bytes(32))
    gs.save(tmp_path / "a.bson", net=net, empty=empty, when=when, pairs=pairs)
    assert run("inspect", tmp_path / "a.bson")[1].splitlines()[1:-1] == [
        "net: Main.Net{Array{Float32, 1}}",
        "├── data[0]: float32 0.01",
        "└── data[1]: [1, 2]",
        "empty: Zero",
        "when: 2026-01-16 21:02:00",
        "pairs: Tuple{Float64, Float64} (2,)",
    ]


def test_a_function_that_captures_nothing_is_one_line(run):
    out = run("inspect", JULIA / "conv_anon_flux012_v1.bson")[1]
    assert "captured" not in out and "Julia function x -> reshape(" in out


def test_arrays_of_tracked_ones_are_named_by_their_layer():
    with gs.open_file(JULIA / "batchnorm_flux07_v1.bson") as stored:
        paths = {entry.path for entry in stored.arrays}
        weight = stored.read("model.layers[0].weight.data")
    assert not any("tracker" in path for path in paths)
    assert "model.layers[0].weight.grad" in paths and weight.shape == (4, 4)
