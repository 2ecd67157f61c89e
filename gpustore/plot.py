"""The weights of a file drawn as histograms, readable for five arrays and for hundreds."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpustore import notebook, storage, tree
from gpustore.errors import MissingExtraError, UnsupportedValueError
from gpustore.figures import histogram
from gpustore.stored import ArrayEntry, StoredFile
from gpustore.verify import Progress, counted

_SUFFIXES = (".png", ".svg", ".pdf")
_MIN_BINS, _MAX_BINS = 8, 60
_MAX_PANELS = 24  # above it arrays are drawn as rows
_MAX_ROWS = 2000  # of one drawing: the largest arrays
_ROWS_IN_COLUMN = 100
_COLOURS = ("#3b6fb6", "#d9822b")  # of one layer and the next
_DPI = 120


@dataclass(frozen=True, slots=True)
class _Drawn:
    """An array's histogram: `counts` in equal parts from `low` to `high`."""

    name: str
    about: str
    counts: NDArray[np.int64]
    low: float
    high: float
    warning: str
    colour: str

    @property
    def constant(self) -> str:
        return f"all {self.low:.3g}" if self.low == self.high and self.counts.any() else ""


def plot(
    stored: StoredFile, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> int:
    """Draw a histogram of each numeric array of an open file; return how many were drawn.

    `path` ends in .png, .svg or .pdf. Up to 24 arrays have a panel each, more are rows with a range
    of their own; of more than 2000 the largest are drawn. Neighbouring layers differ in colour.
    Arrays are streamed. Raises MissingExtraError without matplotlib.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UnsupportedValueError(
            f"{os.fspath(path)}: expected a name that ends in {', '.join(_SUFFIXES)}, found "
            f"{suffix or 'no suffix'!r}"
        )
    figure = _new_figure()
    every = [entry for entry in stored.arrays if _is_drawable(stored, entry)]
    if not every:
        raise UnsupportedValueError(f"{stored.path}: no array of numbers is in it, nothing to draw")
    largest = sorted(every, key=lambda entry: -entry.nbytes)[:_MAX_ROWS]
    chosen = {entry.path for entry in largest}
    entries = [entry for entry in every if entry.path in chosen]
    drawn = _histograms(stored, entries, progress)
    title = f"{os.path.basename(stored.path)}: {len(every)} array{'s' * (len(every) != 1)}"
    if len(entries) < len(every):
        title += f", of which the {len(entries)} largest"
    draw = _panels if len(drawn) <= _MAX_PANELS else _rows
    draw(figure, drawn, notebook.printable(title))
    with warnings.catch_warnings(), storage.replacing_by_name(path) as name:
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
        figure.savefig(name, format=suffix[1:], dpi=_DPI)
    return len(drawn)


def _new_figure() -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")  # not pyplot: no window, no state
    except ImportError as error:
        raise MissingExtraError("plot needs matplotlib: pip install 'gpustore[plot]'") from error
    return module.Figure()


def _is_drawable(stored: StoredFile, entry: ArrayEntry) -> bool:
    return entry.nbytes > 0 and tree.is_numeric(stored.view(entry))


def _histograms(
    stored: StoredFile, entries: Sequence[ArrayEntry], progress: Progress | None
) -> list[_Drawn]:
    report = counted(progress, 2 * sum(entry.nbytes for entry in entries))
    layers: dict[str, int] = {}
    found = []
    for entry in entries:
        array = stored.view(entry)
        bins = min(max(math.isqrt(array.size), _MIN_BINS), _MAX_BINS)
        counts, low, high = histogram(array, bins, report)
        if low == high:  # one value: one bar in the middle
            counts = np.array([0] * 10 + [int(counts.sum())] + [0] * 10)
        lacking = 1 - int(counts.sum()) / array.size
        layer = layers.setdefault(_layer_of(entry.path), len(layers))
        found.append(
            _Drawn(
                notebook.printable(entry.path), f"{entry.dtype} {entry.shape}", counts, low, high,
                f"{lacking:.1%} not finite" if lacking else "", _COLOURS[layer % 2],
            )
        )  # fmt: skip
    return found


def _layer_of(path: str) -> str:
    """Return the path of what an array belongs to.

    >>> _layer_of("model.layers[0].weight"), _layer_of("state['conv1.weight']"), _layer_of("w")
    ('model.layers[0]', "state['conv1", '')
    """
    return path.rpartition(".")[0]


_TITLE_LETTERS = 10  # in an inch, of those at 11 points


# --- few arrays: a panel each -------------------------------------------------------------------


def _panels(figure: Any, drawn: Sequence[_Drawn], title: str) -> None:
    columns = min(len(drawn), 2 if len(drawn) <= 4 else 3 if len(drawn) <= 9 else 4)
    rows = math.ceil(len(drawn) / columns)
    width = max(4.2 * columns, 6)
    figure.set_size_inches(width, 2.5 * rows + 0.6)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    title = _fitting(title, int(_TITLE_LETTERS * width))
    figure.suptitle(title, parse_math=False, fontsize=11)
    for number, one in enumerate(drawn, 1):
        panel = figure.add_subplot(rows, columns, number)
        around = 0.5 if one.low == one.high else 0
        edges = np.linspace(one.low - around, one.high + around, len(one.counts) + 1)
        panel.stairs(one.counts, edges, fill=True, color=one.colour)
        if one.low < 0 < one.high:
            panel.axvline(0, color="0.35", linewidth=0.7)
        panel.set_title(_fitting(one.name, 42), parse_math=False, fontsize=9, loc="left")
        panel.text(
            0.99, 0.97, "\n".join(filter(None, (one.about, one.constant, one.warning))), fontsize=7,
            transform=panel.transAxes, ha="right", va="top", color="0.35", parse_math=False,
        )  # fmt: skip
        panel.set_ylim(0, max(int(one.counts.max()), 1) * 1.25)
        panel.tick_params(labelsize=7)
        panel.xaxis.get_offset_text().set_fontsize(7)  # "1e-7" beside the axis
        panel.spines[["top", "right"]].set_visible(False)
    figure.supylabel("elements", fontsize=9)


# --- many arrays: a row each --------------------------------------------------------------------


def _rows(figure: Any, drawn: Sequence[_Drawn], title: str) -> None:
    """Draw rows in columns of the page: the name, the histogram over its own range, its ends."""
    columns = min(math.ceil(len(drawn) / _ROWS_IN_COLUMN), 6)
    rows = math.ceil(len(drawn) / columns)
    width, height = 5.0 * columns, 0.19 * rows + 0.9
    figure.set_size_inches(width, height)
    title = _fitting(title, int(_TITLE_LETTERS * width))
    figure.text(0.15 / width, 1 - 0.27 / height, title, fontsize=11, va="center", parse_math=False)
    figure.text(
        0.15 / width, 1 - 0.52 / height, "each over its own range (dot: zero)",
        fontsize=7, va="center", color="0.35",
    )  # fmt: skip
    for column in range(columns):
        shown = drawn[column * rows : (column + 1) * rows]
        if shown:
            bottom, top = 0.15 / height, 1 - 0.75 / height
            panel = figure.add_axes((column / columns, bottom, 1 / columns, top - bottom))
            panel.set(xlim=(0, 1), ylim=(rows, 0))
            panel.axis("off")
            for row, one in enumerate(shown):
                _row(panel, row, one)


_LEFT, _RIGHT = 0.44, 0.76  # of the histogram in its column; the name before it, the ends after


def _row(panel: Any, row: int, one: _Drawn) -> None:
    base, middle = row + 0.95, row + 0.6
    text = {"fontsize": 6.5, "va": "center", "parse_math": False}
    panel.text(_LEFT - 0.012, middle, _fitting(one.name, 44), ha="right", color=one.colour, **text)
    heights = one.counts / max(int(one.counts.max()), 1) * 0.9
    edges = np.linspace(_LEFT, _RIGHT, len(one.counts) + 1)
    panel.plot((_LEFT, _RIGHT), (base, base), color="0.8", linewidth=0.5)
    panel.stairs(base - heights, edges, baseline=base, fill=True, color=one.colour)
    if one.low < 0 < one.high:
        zero = _LEFT + (_RIGHT - _LEFT) * (-one.low / (one.high - one.low))
        panel.plot(zero, base, marker=".", markersize=2.5, color="black")
    ends = one.constant or (f"{one.low:.3g} … {one.high:.3g}" if one.counts.any() else "")
    panel.text(_RIGHT + 0.012, middle, ends, ha="left", color="0.3", **text)
    if one.warning:
        panel.text(0.99, middle, one.warning, ha="right", color="#c0392b", **text)


def _fitting(text: str, length: int) -> str:
    """Return the text, or its end: paths differ there.

    >>> _fitting("model.layers[0].weight", 12)
    '…[0].weight'
    """
    return text if len(text) <= length else "…" + text[len(text) - length + 2 :]
