"""With which Flux a model was written, told from the layouts that its structs have in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpustore import flux, tree
from gpustore.julia import JuliaType
from gpustore.kinds import StructKind

Span = tuple[str, str | None]  # the first version, and the one before which it ends
_RENAMED: dict[str, Span] = {  # packages whose types say more than their fields
    "Flux.Tracker": ("0.5", "0.8"),
    "Tracker": ("0.8", None),
    "Zygote": ("0.10", None),
}


@dataclass(frozen=True, slots=True)
class Era:
    """The versions of Flux that write all these layouts: `spans` of (first, end, not included).

    Empty where no one version writes them all; `structs` counts what was looked at.
    """

    spans: tuple[Span, ...]
    structs: int

    def __str__(self) -> str:
        if not self.spans:
            return "structs of several eras of Flux side by side"
        return "Flux " + ", or ".join(
            f"{first} or newer" if end is None else f"{first} or newer, before {end}"
            for first, end in self.spans
        )


def era_of(value: Any) -> Era | None:
    """Return the versions of Flux that write what a file holds, or None where nothing is Flux's.

    Layers that were made here are in the layout that they would be written in.

    >>> from gpustore import Chain, Conv
    >>> str(era_of(Chain(Conv((3, 3), (1, 2)))))
    'Flux 0.12.6 or newer'
    """
    kinds = {id(kind): kind for kind in _kinds(value)}
    if not kinds:
        return None
    spans: list[Span] = [("0", None)]
    for kind in kinds.values():
        spans = [common for a in spans for b in _spans(kind) if (common := _common(a, b))]
    return Era(tuple(spans), sum(1 for _ in _kinds(value)))


def _kinds(value: Any) -> Iterator[StructKind]:
    for node in tree.containers(value):
        kind = flux.kind_of(node)
        known = getattr(node, "julia_type", None)
        if kind is not None and isinstance(known, JuliaType):  # collections keep no row
            kind = flux.kind_named(known.name, len(kind.fields), len(kind.params)) or kind
        if kind is not None and flux.is_of_flux(kind.name):
            yield kind


def _spans(kind: StructKind) -> list[Span]:
    """Return when this layout was written: until the next one of its class, or several times."""
    package = kind.name.rpartition(".")[0]
    if package in _RENAMED:
        return [_RENAMED[package]]
    rows = flux.rows_of(kind.cls)
    ends = [row.since for row in rows[1:]]
    return [
        (row.since, end)
        for row, end in zip(rows, [*ends, None], strict=True)
        if _shape(row) == _shape(kind)
    ]


def _shape(kind: StructKind) -> tuple[str, int, int]:
    return kind.name, len(kind.fields), len(kind.params)


def _common(a: Span, b: Span) -> Span | None:
    first = max(a[0], b[0], key=flux.version_of)
    ends = [end for end in (a[1], b[1]) if end is not None]
    end = min(ends, key=flux.version_of) if ends else None
    is_empty = end is not None and flux.version_of(first) >= flux.version_of(end)
    return None if is_empty else (first, end)
