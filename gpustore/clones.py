"""Nodes of objects alike -> objects: the first is lifted, the others are made after it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

import numpy as np

from gpustore import flux, rows, specs
from gpustore.julia import JuliaType, Struct, Symbol
from gpustore.kinds import StructKind, is_plain
from gpustore.rows import FEWEST

_OF_FILE = ("julia_type", "julia_kind")  # attributes of objects of Flux
_SHARED = (type(None), bool, int, float, complex, str, Symbol, JuliaType, StructKind)


def lift_alike(lifter: Any, nodes: Collection[Any], path_of: Callable[[int], str]) -> None:
    """Lift objects of which many are alike into the memo, if they are of plain attributes.

    `path_of(index)` is the path of one of the nodes.
    """
    if not lifter.alike or len(nodes) < FEWEST:
        return
    groups: defaultdict[int, list[tuple[int, Any]]] = defaultdict(list)
    for index, node in enumerate(nodes):
        like = lifter.alike.get(id(node))
        if like is not None and like.is_object and id(node) not in lifter.memo:
            groups[id(like)].append((index, node))
    for group in groups.values():
        if len(group) >= FEWEST:
            indices, members = zip(*group, strict=True)
            first = lifter.value(members[0], path_of(indices[0]))
            made = _clones(lifter, first, members)
            lifter.memo.update(zip(map(id, members), made, strict=False))


def _clones(lifter: Any, first: Any, nodes: Sequence[Any]) -> list[Any]:
    """Return objects as `first` is, which was made of the first node: none where they cannot be."""
    own = nodes[0]
    fields = _fields(first)
    if fields is None or list(own) != ["tag", "type", "data"] or type(own["data"]) is not list:
        return []
    columns = {}
    differing = len(lifter.alike[id(own)].holes)  # parts of the nodes
    for name, (value, index) in fields.items():
        if type(value) is np.ndarray and index is not None:
            column = _arrays(lifter, [node["data"][index] for node in nodes])
            if column is None or column[0] is not value:
                return []
            columns[name] = column
            differing -= len({"data", "blake3"} & rows.array_in(own["data"][index]).keys())
        elif not (type(value) in _SHARED or _is_known(value)):
            return []
    if differing:  # in what is no array
        return []
    if type(first) is Struct:
        kind, names, data = first.type, first.fields, first.data
        parts = (columns.get(index) or itertools.repeat(part) for index, part in enumerate(data))
        rest = map(list, itertools.islice(zip(*parts, strict=False), 1, len(nodes)))
        return [first, *(Struct(kind, own_data, names) for own_data in rest)]
    cls, attributes, made = type(first), dict(vars(first)), [first]
    for number in range(1, len(nodes)):
        one = object.__new__(cls)
        held = one.__dict__
        held.update(attributes)
        for name, column in columns.items():
            held[name] = column[number]
        made.append(one)
    return made


def _fields(one: Any) -> dict[Any, tuple[Any, int | None]] | None:
    """Return the parts of an object and where its node has them; None if it may hold others."""
    if type(one) is Struct:
        return {i: (part, i) for i, part in enumerate(one.data)} if type(one.data) is list else None
    cls, kind = type(one), flux.kind_of(one)
    if kind is None or kind.cls is not cls or not is_plain(cls):
        return None
    attributes, places = vars(one), {name: index for index, name in enumerate(kind.fields)}
    usual = {*kind.fields, *_OF_FILE, *dict(kind.from_type)}
    if not places.keys() <= attributes.keys() <= usual:
        return None
    return {name: (value, places.get(name)) for name, value in attributes.items()}


def _arrays(lifter: Any, nodes: list[Any]) -> list[Any] | None:
    """Return the arrays of these nodes, if they have been, or can be, lifted at once."""
    known = lifter.memo.get
    if known(id(nodes[-1])) is None:
        specs.lift_alike(lifter, nodes[1:])  # the first one was lifted
    arrays = [known(id(node)) for node in nodes]
    return arrays if {*map(type, arrays)} == {np.ndarray} else None


def _is_known(value: Any) -> bool:
    """Whether a value is one of this package's functions, of which there is only one each."""
    return isinstance(value, FunctionType) and flux.function_name(value) is not None
