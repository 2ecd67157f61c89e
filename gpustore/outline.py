"""A file's structure and arrays, drawn as a tree and a table for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from gpustore import listing, notebook, tree
from gpustore.figures import Figures
from gpustore.inspection import Inspection
from gpustore.julia import ArraySpec, LostArray, OpaqueFunction, Struct
from gpustore.notebook import as_julia_shows, printable, size_text
from gpustore.stored import ArrayEntry
from gpustore.terminal import shown
from gpustore.values import JuliaArray

_MAX_CHILDREN = 60  # of one list; the rest is counted
_MAX_BRIEF = 8  # numbers of a list that are said in a line
_MAX_CODE_LINES = 12
_MAX_WIDTH = 100


def entry_trees(found: Inspection) -> list[Tree]:
    """Return a tree for each entry of a file; a shared container is drawn once."""
    seen: set[int] = set()
    return [_node(Tree, str(name), value, seen) for name, value in found.entries]


def _node(add: Any, label: str, node: Any, seen: set[int]) -> Any:
    """Draw a node with `add`, and all below it; return what it was drawn as."""
    below = _below(node)
    if not below or _is_brief(node):
        return add(_line(label, leaf_text(node), _leaf_style(node)))
    title = title_text(node)
    if id(node) in seen:
        return add(_line(label, title.partition("\n")[0] + " (shared, shown above)", "dim"))
    seen.add(id(node))
    drawn = add(_line(label, title, ""))
    for suffix, child in below[:_MAX_CHILDREN]:
        _node(drawn.add, suffix.removeprefix("."), child, seen)
    if len(below) > _MAX_CHILDREN:
        drawn.add(Text(f"... {len(below) - _MAX_CHILDREN} more", "dim"))
    return drawn


def _below(node: Any) -> list[tuple[str, Any]]:
    """Return what is drawn below a node; the fields of a struct stand right below it."""
    if isinstance(node, (ArraySpec, LostArray)):
        return []
    if isinstance(node, OpaqueFunction) and not node.captured:
        return []
    if isinstance(node, JuliaArray) and isinstance(node.data, bytes):
        return []
    if isinstance(node, Struct) and isinstance(node.data, list):
        return [(f".data{suffix}", child) for suffix, child in tree.children(node.data)]
    if isinstance(node, dict):
        return [(f"[{_key(key)}]", child) for key, child in node.items()]
    return tree.children(node)


def _key(key: Any) -> str:
    return leaf_text(key) if isinstance(key, (ArraySpec, Struct)) else repr(key)


def _line(label: str, text: str, style: str) -> Text:
    return Text.assemble((_short(printable(label)), "bold cyan"), ": ", (shown(text), style))


def _is_brief(node: Any) -> bool:
    """Whether a list is said in a line better than in a tree: a stride, a padding."""
    is_list = type(node) in (list, tuple) and len(node) <= _MAX_BRIEF
    return is_list and all(type(part) in (int, float, bool, NoneType) for part in node)


def title_text(node: Any) -> str:
    """Return what is said of a container."""
    if isinstance(node, (dict, list, tuple)) and not hasattr(node, "_fields"):
        return f"{type(node).__name__} of {len(node)}"
    if isinstance(node, Struct):
        return _short(as_julia_shows(repr(node.type)))
    if isinstance(node, OpaqueFunction):
        return _function(node)
    if isinstance(node, JuliaArray):
        return _short(f"{as_julia_shows(repr(node.element_type))} {node.shape}")
    return type(node).__name__


def leaf_text(node: Any) -> str:
    """Return what is said of a value without children."""
    if isinstance(node, (OpaqueFunction, Struct, JuliaArray)):
        return title_text(node)
    if isinstance(node, ArraySpec) and node.order == "C":
        return notebook.leaf_text(node).replace("), ", "), row-major, ", 1)
    return notebook.leaf_text(node)


def _leaf_style(node: Any) -> str:
    if isinstance(node, LostArray):
        return "red"
    is_elsewhere = isinstance(node, ArraySpec) and node.device != "cpu"
    return "magenta" if is_elsewhere else "green" if isinstance(node, ArraySpec) else ""


def _function(node: OpaqueFunction) -> str:
    """Return what a Julia function does, in a few lines; its name where that is not known."""
    lines = listing.rendered(node).split("\n")
    if len(lines) > _MAX_CODE_LINES:
        more = len(lines) - _MAX_CODE_LINES
        lines[_MAX_CODE_LINES:] = [f"  ... {more} more lines"]
    return "Julia function " + "\n".join(map(_short, lines))


def _short(text: str) -> str:
    return text if len(text) <= _MAX_WIDTH else text[: _MAX_WIDTH - 3] + "..."


def array_table(found: Inspection, measured: Sequence[Figures | None] | None) -> Table:
    """Return a table of a file's arrays, lost ones last; with their figures where `measured`.

    The device is left out where all is on the CPU, and so are order and size beside figures: the
    table fits a terminal of 80 columns for paths of common length.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("array", overflow="fold", style="cyan", min_width=10)
    left_out = {"device"} if found.loads_without_gpu else set()
    left_out |= set(_FIGURES) if measured is None else {"order", "size"}
    names = [name for name in _COLUMNS if name not in left_out]
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in _WORDS else "right")
    for number, entry in enumerate(found.arrays):
        cells = _cells(entry) | _figures_cells(measured[number] if measured is not None else None)
        table.add_row(Text(printable(entry.path)), *(cells[name] for name in names))
    for path, lost in found.lost.items():
        words = {
            "dtype": as_julia_shows(lost.element_type),
            "shape": str(lost.shape),
            "device": "lost",
        }
        cells = {name: Text(printable(word), "red") for name, word in words.items()}
        table.add_row(Text(printable(path)), *(cells.get(name, Text()) for name in names))
    return table


_WORDS = ("dtype", "shape", "order", "device")
_FIGURES = ("min", "max", "mean", "NaN", "zeros")
_COLUMNS = (*_WORDS, "size", *_FIGURES)


def _cells(entry: ArrayEntry) -> dict[str, Text]:
    return {
        "dtype": Text(str(entry.dtype)),
        "shape": Text(str(entry.shape)),
        "order": Text("row" if entry.order == "C" else "column"),
        "device": Text(entry.device, "" if entry.device == "cpu" else "magenta"),
        "size": Text(size_text(entry.nbytes)),
    }


def _figures_cells(figures: Figures | None) -> dict[str, Text]:
    if figures is None:
        return dict.fromkeys(_FIGURES, Text())
    numbers = {"min": figures.min, "max": figures.max, "mean": figures.mean}
    return {name: Text("" if n is None else f"{n:.4g}") for name, n in numbers.items()} | {
        "NaN": Text(_percent(figures.nan_share), "red" if figures.nan else ""),
        "zeros": Text(_percent(figures.zero_share)),
    }


def _percent(share: float) -> str:
    """Return a share in percent: neither 0% nor 100% where it is not.

    >>> [_percent(share) for share in (0, 1e-9, 0.25, 0.99999, 1)]
    ['0%', '<0.1%', '25%', '>99.9%', '100%']
    """
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share * 100:.3g}%"
