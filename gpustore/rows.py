"""Documents alike, as many arrays or layers make them: where they are, in a file and in nodes.

Elements of which the documents differ only in the bytes of payloads, or their places, and digests
lie at a constant pitch where their names have one length. Nodes of documents alike share their
`type` and `size` objects.

Row-major arrays are such documents within a struct of one field; "the array document of a node" is
the node itself or that field.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from gpustore.layout import INT32, ROW_NBYTES

_HEAD_NBYTES = 17  # of documents, by which they are told apart at first
FEWEST_NBYTES = 50  # of a document of an array, a struct or a type
FEWEST = 12  # elements from this number on are faster as a row


def array_in(node: Any) -> Any:
    """Return the array document of a node; None where there is none."""
    if type(node) is not dict or "size" in node:
        return node
    fields: Any = node.get("data")
    is_wrapped = type(fields) is list and len(fields) == 1 and node.get("tag") == "struct"
    return fields[0] if is_wrapped else None


def is_array(node: Any) -> bool:
    return type(node) is dict and node.get("tag") == "array"


def arrays_in(nodes: list[Any]) -> list[Any]:
    """Return the array documents of nodes: of all themselves, or of all within structs."""
    return nodes if "size" in nodes[0] else [node["data"][0] for node in nodes]


def groups(lists: Iterable[list[Any]]) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """Yield nodes that share types and size, wherever they are, and the array documents in them.

    And of these documents the first of each list: the others in a list are like it. There are
    FEWEST or more in each group, either all with padding or all without.
    """
    found: defaultdict[tuple[int, ...], tuple[list[Any], list[Any]]]
    found = defaultdict(lambda: ([], []))
    own: list[Any] = []
    firsts: list[Any] = []
    size = kind = outer = length = None
    for nodes in lists:
        node = nodes[0]
        if type(node) is not dict:
            continue
        inner = node if "size" in node else array_in(node)
        if not is_array(inner) or "size" not in inner:
            continue
        is_of_last = inner["size"] is size and inner.get("type") is kind and len(inner) == length
        around = None if inner is node else node.get("type")
        if not is_of_last or around is not outer:
            size, kind, outer, length = inner["size"], inner.get("type"), around, len(inner)
            own, firsts = found[id(size), id(kind), id(outer), length]
        own.append(nodes)
        firsts.append(inner)
    for own, firsts in found.values():
        if sum(map(len, own)) >= FEWEST:
            row = [*itertools.chain.from_iterable(own)]
            yield row, arrays_in(row), firsts


def pitch_at(buffer: Any, start: int, name_end: int, limit: int) -> int | None:
    """Return the nbytes of the element at `start` where a row may begin there, else None.

    That is a document as the next one begins, and as large as the last of the fewest in a row.
    """
    nbytes = INT32.unpack_from(buffer, name_end + 1)[0] if name_end + 5 <= limit else 0
    pitch: int = name_end + 1 + nbytes - start
    if nbytes < FEWEST_NBYTES or FEWEST * pitch > min(limit - start, ROW_NBYTES):
        return None
    first, last = name_end + 1, name_end + 1 + (FEWEST - 1) * pitch
    if INT32.unpack_from(buffer, last)[0] != nbytes:
        return None
    stop = first + 4 + _HEAD_NBYTES
    return pitch if buffer[first:stop] == buffer[first + pitch : stop + pitch] else None
