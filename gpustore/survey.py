"""What a save knows of a model beforehand: memory order, a spelling, and which objects are alike.

Objects are alike if they differ in nothing but the values of arrays, so far as these are of NumPy:
what is written of one then is written of all, with others of those.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import numpy as np

from gpustore import flux, kinds, tree
from gpustore.julia import JuliaType, Struct
from gpustore.kinds import StructKind
from gpustore.layout import DOUBLE
from gpustore.rows import FEWEST
from gpustore.small import Alike, Template
from gpustore.values import Entries, Origin

_LEAVES = frozenset((np.ndarray, str, bytes, int, float, bool, type(None)))
_ATOMS = frozenset((str, bool, type(None)))
_FUNCTIONS = frozenset((FunctionType, BuiltinFunctionType, np.ufunc))
_layout_of = attrgetter("dtype", "shape", "strides")
_base_of = attrgetter("base")


class ArrayInTemplate(NamedTuple):
    """What the documents of an array have in common in objects of one form, and its memory order.

    `is_turned` says that it is brought into that order, `is_column_major` that it would be whatever
    order it has.
    """

    alike: Alike
    order: str
    is_turned: bool
    is_column_major: bool


class Form:
    """What objects that are alike have in common.

    `arrays` are the names of their attributes, or keys, that are arrays. `template` is what is
    written of them, once one was, with what it says of each of these. `tries` are left to make it.
    """

    __slots__ = ("arrays", "in_template", "template", "tries")

    def __init__(self, arrays: list[str]) -> None:
        self.arrays, self.tries = arrays, 8
        self.template: Template | None = None
        self.in_template: list[ArrayInTemplate] = []


class Survey(NamedTuple):
    """`column_major` are the ids of arrays that Julia holds column-major: the fields of layers.

    And all within optimisers, which expect the moments of a weight in the type of the weight.
    `spelling` is which of Core and Base the file these values came from calls Main's, `forms` are
    those of objects, by id. What ids were noted of is `kept` alive: a property may make it.
    """

    column_major: set[int]
    spelling: frozenset[str]
    forms: dict[int, Form]
    kept: list[list[Any]]


def survey(root: Any) -> Survey:
    """Look at every container within `root` once, at those of a class together."""
    seen: set[int] = set()
    column_major: set[int] = set()
    forms: dict[int, Form] = {}
    kept: list[list[Any]] = []
    spelling = root.spelling if isinstance(root, Entries) else None
    level = [root]
    while level:
        fresh = {id(node): node for node in level if type(node) not in _LEAVES}
        nodes = [node for key, node in fresh.items() if key not in seen]
        seen.update(fresh)
        kept.append(nodes)
        by_class: defaultdict[type, list[Any]] = defaultdict(list)
        for node in nodes:
            by_class[type(node)].append(node)
        level = []
        for cls, members in by_class.items():
            column_major.update(_column_major(cls, members))
            if len(members) >= FEWEST:
                found = _forms(cls, members)
                forms |= found
                # nothing is below those, and one of each form says what spelling there is
                told = {found.get(id(node), id(node)): node for node in members}
                members = [*told.values()] if found else members
            if spelling is None:
                spelling = next(filter(None, map(_spelling_of, members)), None)
            level += _below(cls, members)
    return Survey(column_major, spelling or frozenset(), forms, kept)


def _below(cls: Any, nodes: list[Any]) -> Iterable[Any]:
    """Return what is directly in containers of a class; of leaves, nothing."""
    if issubclass(cls, dict):
        return itertools.chain.from_iterable(node.values() for node in nodes)
    if issubclass(cls, (list, tuple)):
        return itertools.chain.from_iterable(nodes)
    if not hasattr(cls, "__dataclass_fields__"):
        return ()
    names = [name for name, _ in tree.field_names(cls)]
    return [getattr(node, name, None) for name in names for node in nodes]


def _column_major(cls: type, nodes: list[Any]) -> Iterable[int]:
    if cls is Struct:
        own = [node for node in nodes if kinds.is_of_optimiser(node.type)]
        return [id(array) for node in own for _, array in tree.arrays(tree.walk(node))]
    if not flux.rows_of(cls):
        return ()
    rows = [*map(flux.kind_of, nodes)]
    ids: set[int] = set()
    for kind in {id(kind): kind for kind in rows}.values():
        if kind is not None and kind.is_layer:
            own = [node for node, other in zip(nodes, rows, strict=True) if other is kind]
            for name in kind.fields:
                ids.update(map(id, [getattr(node, name, None) for node in own]))
    return ids


def _spelling_of(node: Any) -> frozenset[str] | None:
    """Return the spelling that the type of one value shows, or None where it shows none."""
    own = getattr(node, "julia_type", None) or getattr(node, "type", None)
    if not isinstance(own, JuliaType):
        return None
    paths = [own.path, *(param.path for param in own.params if isinstance(param, JuliaType))]
    main = {path[1] for path in paths if len(path) > 2 and path[0] == "Main"}
    if not main & {"Core", "Base"}:
        return None
    return frozenset({"Core", "Base"} if "Core" in main else {"Base"})


# --- objects alike ---


def _forms(cls: type, nodes: list[Any]) -> dict[int, Form]:
    """Return the forms of dicts or of objects of a class, of those that others are alike."""
    if cls is not dict and not kinds.is_plain(cls):
        return {}
    if cls is dict and not {*map(type, itertools.chain.from_iterable(nodes))} <= {str}:
        return {}
    groups: defaultdict[Any, list[Any]] = defaultdict(list)
    for node in nodes:
        groups[tuple(node if cls is dict else vars(node))].append(node)
    found: dict[int, Form] = {}
    for names, members in groups.items():
        if not names or len(members) < FEWEST or not _has_fields(members[0], names):
            continue
        attributes = members if cls is dict else [*map(vars, members)]
        keys = [_keys([values[name] for values in attributes]) for name in names]
        if None in keys:
            continue
        forms: dict[Any, Form] = {}
        for member, key in zip(members, zip(*keys, strict=True), strict=True):
            form = forms.get(key)
            if form is None:
                are_arrays = zip(names, key, strict=True)
                arrays = [name for name, own in are_arrays if type(own) is tuple and len(own) == 3]
                form = forms[key] = Form(arrays)
            found[id(member)] = form
    return found


def _has_fields(node: Any, names: tuple[str, ...]) -> bool:
    """Whether all that is written of an object are attributes of these names, as they are."""
    if type(node) is dict:
        return True
    kind = flux.kind_of(node)
    fields = kinds.field_names(type(node)) if kind is None else kind.fields
    is_worked_out = kind is not None and (kind.written or kind.turned or kind.becomes)
    return not is_worked_out and fields is not None and {*fields} <= {*names}


def _keys(column: list[Any]) -> list[Any] | None:
    """Return for each value what is the same for those alike; None where one is of another kind."""
    if {*map(type, column)} == {np.ndarray}:
        has_origin = Origin in {*map(type, map(_base_of, column))}
        return None if has_origin else [*map(_layout_of, column)]
    if len({*map(id, column)}) == 1:
        column, repeated = column[:1], len(column)
    else:
        repeated = 1
    keys = [*map(_key, column)]
    return None if None in keys else keys * repeated


def _key(value: Any) -> Any:
    kind = type(value)
    if kind is np.ndarray:
        return None if type(value.base) is Origin else _layout_of(value)
    if kind in _ATOMS:
        return kind, value
    if kind is float:
        return kind, DOUBLE.pack(value)
    if kind is int:  # many that are wider can have one hash
        return (kind, value) if -(2**63) <= value < 2**63 else None
    is_known = kind in _FUNCTIONS and flux.function_name(value) is not None
    return id(value) if is_known or kind is JuliaType or kind is StructKind else None
