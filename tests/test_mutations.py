"""Files of Julia's with something else in some places: only this package's errors come out."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import bson
import numpy as np
import pytest
from bson.int64 import Int64
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import listing, tree
from gpustore.julia import OpaqueFunction

FOLDER = Path(__file__).parent / "fixtures" / "julia"
FILES = sorted(file for file in FOLDER.glob("*.bson") if file.stat().st_size < 60_000)
INSTEAD = [
    None, 0, -1, 1, 1.5, True, "", "tag", "array", b"", bytes(8), [], {}, Int64(2**62),
    Int64(-(2**62)), {"tag": "backref", "ref": 1}, {"tag": "backref", "ref": Int64(10**6)},
    {"tag": "symbol", "name": "a"}, {"tag": "tuple", "data": []}, {"tag": "struct"},
]  # fmt: skip


@functools.cache
def decoded(file):
    return bson.decode(file.read_bytes())


def containers(document):
    found, stack = [], [document]
    while stack:
        node = stack.pop()
        if isinstance(node, (dict, list)) and node:
            found.append(node)
            stack.extend(node.values() if isinstance(node, dict) else node)
    return found


@st.composite
def mutated(draw):
    """Draw the bytes of a file with some octets, or some parts of its document, replaced."""
    file = draw(st.sampled_from(FILES))
    if draw(st.integers(0, 3)) == 0:
        octets = bytearray(file.read_bytes())
        for _ in range(draw(st.integers(1, 4))):
            octets[draw(st.integers(0, len(octets) - 1))] = draw(st.integers(0, 255))
        return bytes(octets)
    document = copy.deepcopy(decoded(file))
    for _ in range(draw(st.integers(1, 3))):
        nodes = containers(document)
        if not nodes:
            break
        node = nodes[draw(st.integers(0, len(nodes) - 1))]
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[draw(st.integers(0, len(keys) - 1))]
        what = draw(st.integers(0, 5))
        if what == 0 and isinstance(node, dict):
            del node[key]
        elif what == 1:
            node[key] = copy.deepcopy(nodes[draw(st.integers(0, len(nodes) - 1))])
        elif what == 2:
            node[key] = {"tag": "backref", "ref": Int64(draw(st.integers(1, 40)))}
        else:
            node[key] = copy.deepcopy(draw(st.sampled_from(INSTEAD)))
    return bson.encode(document)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(mutated())
def test_a_file_with_other_parts_loads_or_is_refused(tmp_path_factory, octets):
    folder = tmp_path_factory.mktemp("mutations")
    (folder / "in.bson").write_bytes(octets)
    try:
        loaded = gs.load(folder / "in.bson", lost="placeholder")
    except gs.GpustoreError:
        return
    repr(loaded)
    for _, node in tree.walk_entries(loaded):
        if isinstance(node, OpaqueFunction):
            listing.rendered(node)
            try:
                node(np.ones((2, 3), "f4"))
            except gs.GpustoreError:
                continue
    try:
        gs.save(folder / "out.bson", loaded, durable=False)
    except gs.GpustoreError:  # what is kept as it came is looked into only here
        return
    gs.load(folder / "out.bson", lost="placeholder", verify=True)
