"""Files with something else in some places, as `pick(n)`, a number below n, chooses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bson
import numpy as np
from bson.int64 import Int64

import gpustore as gs
from gpustore import listing, tree
from gpustore.julia import JuliaType, LostArray, OpaqueFunction, Struct

HERE = Path(__file__).parent
FILES = sorted(
    file
    for folder in ("fixtures/julia", "golden")
    for file in (HERE / folder).glob("*.bson")
    if file.stat().st_size < 60_000
)
INSTEAD = [
    None, 0, -1, 1, 1.5, True, "", "tag", "array", b"", bytes(8), [], {}, Int64(2**62),
    Int64(-(2**62)), {"tag": "backref", "ref": 1}, {"tag": "backref", "ref": Int64(10**6)},
    {"tag": "symbol", "name": "a"}, {"tag": "tuple", "data": []}, {"tag": "struct"},
]  # fmt: skip
Pick = Callable[[int], int]


@functools.lru_cache(256)
def decoded(octets: bytes) -> dict[str, Any]:
    return bson.decode(octets)


def containers(document: Any) -> list[Any]:
    found, stack = [], [document]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)) and node:
            found.append(node)
            stack.extend(node.values() if isinstance(node, dict) else node)
    return found


def with_other_octets(octets: bytes, pick: Pick) -> bytes:
    changed = bytearray(octets)
    for _ in range(1 + pick(4)):
        changed[pick(len(changed))] = pick(256)
    return bytes(changed)


def with_other_parts(octets: bytes, pick: Pick) -> bytes:
    """Return a file of which up to three parts are left out, or are others, or refer to others.

    Raises InvalidBSON for what the codec cannot decode: no document, or lengths of -1.
    """
    nbytes = int.from_bytes(octets[:4], "little")
    document = copy.deepcopy(decoded(octets[:nbytes]))
    for _ in range(1 + pick(3)):
        nodes = containers(document)
        if not nodes:
            break
        node = nodes[pick(len(nodes))]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key, what = keys[pick(len(keys))], pick(6)
        if what == 0 and isinstance(node, dict):
            del node[key]
        elif what == 1:
            node[key] = copy.deepcopy(nodes[pick(len(nodes))])
        elif what == 2:
            node[key] = {"tag": "backref", "ref": Int64(1 + pick(40))}
        else:
            node[key] = copy.deepcopy(INSTEAD[pick(len(INSTEAD))])
    changed, behind = bson.encode(document), octets[nbytes:]
    return changed.ljust(nbytes, b"\0") + behind if behind else changed


# --- what is done with such a file: only GpustoreError may come out ---


def read_and_write(path: Path, again: Path) -> Any:
    """Load a file in all ways, and save what was loaded; return it, or None where it is refused."""
    try:
        loaded = gs.load(path, lost="placeholder", device="cpu")
    except gs.GpustoreError:
        return None
    for _, node in tree.walk_entries(loaded):
        if isinstance(node, (Struct, JuliaType, LostArray, OpaqueFunction)):
            repr(node)  # not of lists, which Python spells as often as they are referred to
    try:
        with gs.open_file(path) as stored:
            assert not isinstance(loaded, dict) or list(stored) == list(loaded)
            stored.verify()
    except gs.GpustoreError:  # it looks closer
        return loaded
    try:
        gs.save(again, loaded, durable=False)
    except gs.GpustoreError:  # what is kept as it came is looked into only here
        return loaded
    gs.load(again, lost="placeholder", device="cpu", verify=True)
    return loaded


def run_code(loaded: Any) -> None:
    """Show and call each function that was loaded."""
    for _, node in tree.walk_entries(loaded):
        if isinstance(node, OpaqueFunction):
            listing.rendered(node)
            for arguments in ((np.ones((2, 3), "f4"),), (2, 3.5), ((1, 2), "a", True)):
                try:
                    node(*arguments)
                except gs.GpustoreError:
                    continue
