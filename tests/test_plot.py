"""plot: histograms of few and of many arrays; what cannot be drawn is one sentence."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

import gpustore as gs
from gpustore import plot as module
from gpustore.plot import plot

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.bson"
    rng = np.random.default_rng(0)
    odd = {
        "$x_1$ μ": rng.random(9),
        "nan": np.array([np.nan, np.inf, 1, 2]),
        "one": np.ones(5),
        "empty": np.zeros((0, 3)),
        "when": np.zeros(2, "M8[D]"),
        "none": np.full(3, np.nan),
        "b16": rng.random(40).astype(ml_dtypes.bfloat16),
        "漢": np.array([True, False]),
    }
    gs.save(path, model=gs.Chain(gs.Dense(4, 3), gs.Dense(3, 2)), odd=odd)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """Record the figures that are drawn."""
    figures = []
    new = module._new_figure

    def recording():
        figures.append(new())
        return figures[-1]

    monkeypatch.setattr(module, "_new_figure", recording)
    return figures


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


@pytest.mark.parametrize(("suffix", "start"), [
    (".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG"),
])  # fmt: skip
def test_a_file_of_each_kind_is_written(file, tmp_path, run, suffix, start):
    target = tmp_path / f"weights{suffix}"
    assert run("plot", file, "-o", target) == (0, f"{target}: written, 10 arrays\n", "")
    assert target.read_bytes().startswith(start)


def test_few_arrays_have_a_panel_each(file, tmp_path, drawn):
    with gs.open_file(file) as stored:
        assert plot(stored, tmp_path / "a.png") == 10
    found = texts(drawn[0])
    assert "model.bson: 10 arrays" in found and "model.layers[0].weight" in found
    assert len(drawn[0].axes) == 10
    assert "float64 (5,)\nall 1" in found and "float64 (4,)\n50.0% not finite" in found
    titles = [panel.get_title(loc="left") for panel in drawn[0].axes]
    assert "odd['$x_1$ μ']" in titles and not any("empty" in t or "when" in t for t in titles)


def many(path, count: int) -> None:
    rng = np.random.default_rng(0)
    gs.save(path, {f"layer{i}": {"w": rng.standard_normal(i % 50 + 1)} for i in range(count)})


def test_many_arrays_are_rows_of_one_readable_size(tmp_path, drawn):
    many(tmp_path / "a.bson", 500)
    with gs.open_file(tmp_path / "a.bson") as stored:
        assert plot(stored, tmp_path / "a.png") == 500
    (figure,) = drawn
    width, height = figure.get_size_inches() * figure.dpi
    assert len(figure.axes) == 5 and width < 4000 and height < 3000
    found = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().startswith("layer")]
    assert len(found) == 500 and all(text.get_fontsize() >= 6 for text in found)
    for panel in figure.axes:  # no row lies on its neighbour
        heights = sorted(t.get_window_extent().y0 for t in panel.texts if "layer" in t.get_text())
        assert min(np.diff(heights)) >= 6 / 72 * figure.dpi
    assert "layer7['w']" in texts(figure)


@pytest.mark.parametrize("count", [1, 5, 30, 150])
def test_the_title_fits_the_page(tmp_path, drawn, count):
    path = tmp_path / f"{'a_long_name_of_a_file_' * 6}.bson"
    many(path, count)
    with gs.open_file(path) as stored:
        plot(stored, tmp_path / "a.png")
    (figure,) = drawn
    (title,) = (t for t in figure.findobj(matplotlib.text.Text) if ".bson: " in t.get_text())
    found = title.get_window_extent()
    assert found.x0 >= 0 and found.x1 <= figure.get_size_inches()[0] * figure.dpi


def test_of_too_many_arrays_the_largest_are_drawn(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ROWS", 30)
    many(tmp_path / "a.bson", 60)
    with gs.open_file(tmp_path / "a.bson") as stored:
        assert plot(stored, tmp_path / "a.png") == 30
    found = texts(drawn[0])
    assert any("60 arrays, of which the 30 largest" in text for text in found)
    assert "layer49['w']" in found and "layer3['w']" not in found


def test_the_histogram_drawn_is_that_of_the_values(tmp_path, drawn):
    values = np.random.default_rng(0).standard_normal(10_000)
    gs.save(tmp_path / "a.bson", w=values)
    with gs.open_file(tmp_path / "a.bson") as stored:
        plot(stored, tmp_path / "a.svg")
    (patch,) = drawn[0].axes[0].patches
    counts, edges, _ = patch.get_data()
    np.testing.assert_array_equal(counts, np.histogram(values, len(counts))[0])
    np.testing.assert_allclose((edges[0], edges[-1]), (values.min(), values.max()))


@pytest.mark.parametrize(("values", "target", "match"), [
    ({"a": np.ones(3)}, "a.gif", r"a.gif: expected a name that ends in .png, .svg, .pdf, found"),
    ({"a": np.ones(3)}, "a", "found 'no suffix'"),
    ({"a": 1, "b": np.zeros(0)}, "a.png", "nothing to draw"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_one_sentence(run, tmp_path, values, target, match):
    gs.save(tmp_path / "m.bson", values)
    code, out, err = run("plot", tmp_path / "m.bson", "-o", tmp_path / target)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert match.replace(r"\.", ".") in err
    assert [path.name for path in tmp_path.iterdir()] == ["m.bson"]


def test_without_matplotlib_the_extra_is_named(run, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("plot", file, "-o", tmp_path / "a.png")
    assert code == 1 and err == "gpustore: plot needs matplotlib: pip install 'gpustore[plot]'\n"
    with gs.open_file(file) as stored, pytest.raises(gs.MissingExtraError):
        plot(stored, tmp_path / "a.png")


def test_progress_counts_both_readings(file, tmp_path):
    counted: list[tuple[int, int]] = []
    with gs.open_file(file) as stored:
        plot(stored, tmp_path / "a.png", progress=lambda *now: counted.append(now))
    assert counted[-1][0] == counted[-1][1]
