"""Models and open files as collapsible trees of HTML, for notebooks; no script, no style sheet.

Nothing is computed and no array is read or copied: what is shown are names, shapes and devices.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpustore import devices, tree

MAX_NODES = 400  # of one tree; the rest is counted
MAX_CHILDREN = 60  # of one container
MAX_DEPTH = 30
_MAX_TEXT = 80
_OPEN_DEPTH = 2  # containers above it are shown open
_COUNTED_DEPTH = 4  # and above this one they say what arrays they hold


class Shown:
    """A value that notebooks show as a tree."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return html_tree(self)


def html_tree(root: Any, heading: str = "") -> str:
    """Return the value as nested <details>: names, types, shapes, devices, bytes.

    At most MAX_NODES nodes are shown, and said how many were left out; all text is escaped.
    """
    body = _Tree().node("", root, 0)
    title = f"<div>{_escaped(heading)}</div>" if heading else ""
    return f'<div class="gpustore" style="font-family: monospace">{title}{body}</div>'


class _Tree:
    """What one tree still may show, and the containers it has shown."""

    def __init__(self) -> None:
        self.left = MAX_NODES
        self.seen: set[int] = set()

    def node(self, label: str, node: Any, depth: int) -> str:
        name = f"<b>{_escaped(label)}</b> " if label else ""
        below = [] if _is_array(node) else tree.children(node)
        if not below:
            return f'<div style="margin-left: 1em">{name}{_escaped(leaf_text(node))}</div>'
        title = f"{name}{_escaped(title_text(node))}"
        if id(node) in self.seen:
            return f'<div style="margin-left: 1em">{title} <i>shared, shown above</i></div>'
        self.seen.add(id(node))
        if depth < _COUNTED_DEPTH and (held := arrays_text(node)):
            title += f" <small>{_escaped(held)}</small>"
        parts = list(self.parts(below, depth))
        if len(parts) < len(below):
            parts.append(f"<div><i>{len(below) - len(parts)} more not shown</i></div>")
        is_open = " open" if depth < _OPEN_DEPTH else ""
        inside = "".join(parts)
        return (
            f'<details{is_open}><summary style="cursor: pointer">{title}</summary>'
            f'<div style="margin-left: 1.5em">{inside}</div></details>'
        )

    def parts(self, below: list[tuple[str, Any]], depth: int) -> Iterator[str]:
        for suffix, child in below[:MAX_CHILDREN]:
            if self.left <= 0 or depth >= MAX_DEPTH:
                return
            self.left -= 1
            yield self.node(suffix.removeprefix("."), child, depth + 1)


def _is_array(node: Any) -> bool:
    """Whether a node is an array, or stands for one: an ArraySpec, a LostArray; no scalar."""
    if isinstance(node, np.generic):
        return False
    is_spec = all(hasattr(type(node), name) for name in ("shape", "dtype", "nbytes"))
    return devices.is_array(node) or is_spec or hasattr(type(node), "element_type")


def leaf_text(node: Any) -> str:
    """Return what is said of a value without children."""
    if hasattr(type(node), "element_type"):  # an array that is lost, or of no dtype
        is_lost = hasattr(node, "struct")
        element = node.element_type if is_lost else repr(node.element_type)
        text = f"{as_julia_shows(element)} {tuple(node.shape)}"
        return _short(text) + ", values lost on the GPU" * is_lost
    if _is_array(node):
        where = _device(node)
        return f"{node.dtype} {tuple(node.shape)}, {where}, {size_text(_nbytes(node))}"
    if isinstance(node, np.generic):
        return _short(f"{node.dtype} {node!s}")
    if isinstance(node, datetime.date):
        return str(node)
    if callable(node) and hasattr(node, "__name__"):
        return _short(str(node.__name__))
    if isinstance(node, (str, bytes, bytearray)):
        return _short(repr(node[:_MAX_TEXT]))
    try:
        return _short(repr(node))
    except Exception:
        return type(node).__name__


_BUILT_IN = re.compile(r"(?<![\w.#])(?:Core|Base)\.(?=[A-Z])")


def as_julia_shows(type_name: str) -> str:
    """Return the name of a type without the modules that Julia does not name when it shows one.

    >>> as_julia_shows("Main.Net{Core.Array{Core.Float32, 1}}")
    'Main.Net{Array{Float32, 1}}'
    """
    return _BUILT_IN.sub("", type_name)


def title_text(node: Any) -> str:
    """Return what is said of a container: layers print themselves, others are counted."""
    if isinstance(node, (dict, list, tuple)) and not hasattr(node, "_fields"):
        return f"{type(node).__name__} of {len(node)}"
    if not isinstance(node, Shown):  # a user's, which may print its arrays
        return type(node).__name__
    try:
        return _short(as_julia_shows(repr(node)))
    except RecursionError:  # a model that holds itself
        return type(node).__name__


def arrays_text(root: Any) -> str:
    """Return how many arrays a value holds, of how many bytes, on which devices; "" of none."""
    found = [node for _, node in tree.walk(root) if _is_array(node)]
    distinct = list({id(node): node for node in found}.values())
    kept = [node for node in distinct if not hasattr(type(node), "element_type")]
    count = f"{len(distinct)} array{'s' * (len(distinct) != 1)}" if distinct else ""
    places = ", ".join(sorted({_device(node) for node in kept}))
    nbytes = size_text(sum(map(_nbytes, kept)))
    return f"{count}, {nbytes}, {places}" if kept else count


def _device(array: Any) -> str:
    where = getattr(array, "device", None)
    return where if isinstance(where, str) else devices.array_device(array)


def _nbytes(array: Any) -> int:
    nbytes = getattr(array, "nbytes", None)
    return int(array.size * array.itemsize if nbytes is None else nbytes)


def size_text(nbytes: int) -> str:
    """Return a number of bytes for people.

    >>> size_text(200), size_text(3 * 1024**2)
    ('200 bytes', '3.0 MiB')
    """
    size = float(nbytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{nbytes} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


def _escaped(text: str) -> str:
    """Return text for HTML, with nothing in it that a browser would obey or turn around."""
    import html  # 3 ms, for notebooks only

    return html.escape(printable(text))


def printable(text: str) -> str:
    r"""Return text with nothing in it that would steer a terminal or a browser.

    >>> print(printable("a\x1b[2Jb"))
    a\x1b[2Jb
    """
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
