"""What a file holds, without loading it: who wrote it, its arrays, and whether it needs a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpustore import devices, notebook, origin, tree
from gpustore.figures import Figures, figures
from gpustore.julia import ArraySpec, LostArray
from gpustore.origin import Era
from gpustore.stored import ArrayEntry, StoredFile
from gpustore.values import Entries
from gpustore.verify import Progress, counted


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is known of a file. `value` is what it holds, an ArraySpec in the place of each array.

    `lost` are arrays that Julia saved as GPU pointers, by path; `tags` count the arrays of each
    device tag; `era` is None where no struct of Flux is in the file.
    """

    path: str
    nbytes: int
    origin: str
    writer: str | None
    format_version: int | None
    era: Era | None
    value: Any
    arrays: tuple[ArrayEntry, ...]
    lost: dict[str, LostArray]
    tags: dict[str, int]

    @property
    def loads_without_gpu(self) -> bool:
        return not self.lost and not self.tags

    @property
    def entries(self) -> list[tuple[str, Any]]:
        """The entries of the file by name, or the one object that it is."""
        is_plain = type(self.value) in (dict, Entries)
        return list(self.value.items()) if is_plain else [("(the file)", self.value)]

    def verdict(self) -> str:
        """Return in words how much is in the file, and whether it loads without a GPU."""
        total = notebook.size_text(sum(entry.nbytes for entry in self.arrays))
        text = f"{counted_arrays(len(self.arrays))}, {total}. Loads without a GPU: "
        if self.lost:
            return text + (
                f"no, {counted_arrays(len(self.lost))} saved from the GPU as pointers; their "
                "values are lost (load the rest with lost='placeholder')"
            )
        if not self.tags:
            return text + "yes"
        tags = ", ".join(f"{counted_arrays(count)} on {tag}" for tag, count in self.tags.items())
        status = devices.cuda_status()
        here = f"arrays travel {status.transfers}" if status else status.message
        text += f"only with device='cpu' ({tags}); `gpustore cpu` makes a file that does"
        return f"{text}\nHere: {here}"


def inspect(stored: StoredFile) -> Inspection:
    """Return what is known of an open file; no array is read.

    >>> import gpustore as gs, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gs.save(os.path.join(folder, "a.bson"), model=gs.Chain(gs.Dense(2, 3)))
    ...     with gs.open_file(os.path.join(folder, "a.bson")) as stored:
    ...         found = inspect(stored)
    >>> found.loads_without_gpu, str(found.era)
    (True, 'Flux 0.7 or newer')
    """
    value = stored.value(make_array=lambda spec, path: spec)
    nodes = tree.walk_entries(value)
    lost = {path: node for path, node in nodes if isinstance(node, LostArray)}
    return Inspection(
        stored.path, stored.nbytes, stored.origin, stored.writer, stored.format_version,
        origin.era_of(value), value, stored.arrays, lost, stored.tags,
    )  # fmt: skip


def figures_of(stored: StoredFile, progress: Progress | None = None) -> list[Figures | None]:
    """Return the figures of each of the file's `arrays`, streamed; None where none are numbers."""
    report = counted(progress, sum(entry.nbytes for entry in stored.arrays))
    return [figures(stored.view(entry), report) for entry in stored.arrays]


def as_json(found: Inspection, measured: list[Figures | None] | None) -> dict[str, Any]:
    """Return what is known as values of JSON; numbers that JSON lacks are strings ("nan", "inf").

    With `measured`, the figures of each array are under "stats".
    """
    era = found.era
    return {
        "file": found.path,
        "nbytes": found.nbytes,
        "writer": found.writer,
        "format_version": found.format_version,
        "flux": era and [{"from": first, "before": end} for first, end in era.spans],
        "loads_without_gpu": found.loads_without_gpu,
        "tags": found.tags,
        "entries": {name: type_name(value) for name, value in found.entries},
        "arrays": list(_arrays_json(found, measured)),
        "lost": [
            {"path": path, "element_type": node.element_type, "shape": list(node.shape)}
            for path, node in found.lost.items()
        ],
    }


def _arrays_json(
    found: Inspection, measured: list[Figures | None] | None
) -> Iterator[dict[str, Any]]:
    for number, entry in enumerate(found.arrays):
        about = {
            "path": entry.path,
            "dtype": str(entry.dtype),
            "shape": list(entry.shape),
            "order": entry.order,
            "device": entry.device,
            "offset": entry.offset,
            "nbytes": entry.nbytes,
            "blake3": entry.digest and entry.digest.hex(),
        }
        stats = measured[number] if measured is not None else None
        if stats is not None:
            about["stats"] = {
                "min": _number(stats.min), "max": _number(stats.max), "mean": _number(stats.mean),
                "nan_share": stats.nan_share, "zero_share": stats.zero_share,
            }  # fmt: skip
        yield about


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def type_name(value: Any) -> str:
    """Return the type of a value in a file, as its reader calls it."""
    if isinstance(value, ArraySpec):
        return "array"
    return type(value).__name__


def counted_arrays(count: int) -> str:
    """Return "1 array" or "5 arrays"."""
    return "1 array" if count == 1 else f"{count} arrays"
