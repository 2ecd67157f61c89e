"""Values in a row -> documents: of those that are alike the first plainly, the others like it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from gpustore import arrays
from gpustore.document import Encoded, Payload, depth
from gpustore.rows import FEWEST
from gpustore.small import Filled, Row, SmallArray, Template, small_array
from gpustore.survey import ArrayInTemplate, Form


def lower_all(
    lowerer: Any, node: Any, keys: list[Any], values: list[Any], path_of: Callable[[Any], str]
) -> None:
    """Lower each value into node[key]; small arrays and objects that are alike at once."""
    done = 0
    for start, stop, are_objects in _runs(values, lowerer.forms):
        for key, value in zip(keys[done:start], values[done:start], strict=True):
            lowerer.put(node, key, value, path_of(key))
        own = keys[start:stop], values[start:stop]
        lower_run = _lower_run if are_objects else arrays.lower_run
        for index in lower_run(lowerer, node, *own):
            lowerer.put(node, own[0][index], own[1][index], path_of(own[0][index]))
        done = stop
    for key, value in zip(keys[done:], values[done:], strict=True):
        lowerer.put(node, key, value, path_of(key))


def _runs(values: list[Any], forms: Mapping[int, Any]) -> Iterator[tuple[int, int, bool]]:
    """Yield where NumPy arrays begin and end that follow one another, FEWEST or more.

    And objects that have forms; the last says whether it is those.
    """
    if len(values) < FEWEST:
        return
    start = 0
    kinds = [True if id(value) in forms else type(value) for value in values] if forms else None
    for kind, members in itertools.groupby(kinds or map(type, values)):
        stop = start + len([*members])
        if (kind is np.ndarray or kind is True) and stop - start >= FEWEST:
            yield start, stop, kind is True
        start = stop


def _lower_run(lowerer: Any, node: Any, keys: list[Any], values: list[Any]) -> Iterator[int]:
    """Lower objects that have forms, those of one form at once; yield the indices of the rest.

    The first of a form is of these until it has a template; all are, in order, where an object, or
    an array of one, is met twice.
    """
    groups: defaultdict[Form, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        groups[lowerer.forms[id(value)]].append(index)
    alike = {form: _Alike(form, [values[i] for i in own]) for form, own in groups.items()}
    ids = [number for own in alike.values() for number in own.ids]
    if len({*ids}) < len(ids) or not lowerer.places.keys().isdisjoint(ids):
        yield from range(len(values))
        return
    if type(node) is dict:
        node.update(dict.fromkeys(keys))  # in this order
    for form, group in groups.items():
        first = 1 if form.template is None else 0
        yield from group[:first]
        if not alike[form].fill(lowerer, node, [keys[index] for index in group], first):
            yield from group[first:]


def fill(lowerer: Any, form: Form, container: Any, key: Any, value: Any) -> bool:
    """Lower an object into container[key] in the likeness of the template of its form.

    False if it cannot be: where there is no template yet, and where an array of it was met before.
    """
    if form.template is None:
        return False
    alike = _Alike(form, [value])
    is_new = lowerer.places.keys().isdisjoint(alike.ids) and len({*alike.ids}) == len(alike.ids)
    return is_new and alike.fill(lowerer, container, [key])


class _Alike:
    """Objects of one form; `ids` are theirs and those of their arrays."""

    def __init__(self, form: Form, values: list[Any]) -> None:
        self.form, self.values = form, values
        attributes = values if type(values[0]) is dict else [*map(vars, values)]
        self.columns = [[own[name] for own in attributes] for name in form.arrays]
        self.ids = [*map(id, itertools.chain(values, *self.columns))]

    def fill(self, lowerer: Any, node: Any, keys: list[Any], first: int = 0) -> bool:
        """Lower these, which were not met, from the `first` one on; False if they cannot be."""
        form, count = self.form, len(self.values)
        if form.template is None:
            return False
        ids = [self.ids[start + first : start + count] for start in range(0, len(self.ids), count)]
        columns = [column[first:] for column in self.columns]
        small = []
        for column, own, array in zip(columns, ids[1:], form.in_template, strict=True):
            is_as_there = set.issuperset if array.is_column_major else set.isdisjoint
            if not is_as_there(lowerer.column_major, own):
                return False
            contents = column
            if array.is_turned:
                contents = [lowerer.make_payload(value, array.order) for value in column]
            elif array.order == "F":
                contents = [value.T for value in column]
            pairs = zip(itertools.repeat(array.alike), contents, strict=False)
            small.append(map(small_array, pairs))
        parts = [*map(list, zip(*small, strict=True))]
        for key, own in zip(keys[first:], parts, strict=True):
            node[key] = Filled(form.template, own)
        places, values = lowerer.places, self.values[first:]
        found = zip(itertools.repeat(node), keys[first:], values, strict=False)
        places.update(zip(ids[0], found, strict=True))
        for index, column in enumerate(columns):
            found = zip(parts, itertools.repeat(index), column, strict=False)
            places.update(zip(ids[index + 1], found, strict=True))
        return True


def keep(lowerer: Any, form: Form, node: Any, value: Any) -> None:
    """Make the template of a form of the document of `value`, where it holds just its arrays."""
    form.tries -= 1
    if type(node) is not dict or not form.arrays:
        return
    is_struct = node.get("tag") == "struct"
    if is_struct and type(node["type"]) is not Encoded:
        return
    holder = node["data"] if is_struct else node
    attributes = value if type(value) is dict else vars(value)
    names = []
    for name in form.arrays:
        where, index, array = lowerer.place_of(attributes[name])
        if where is not holder or array is not attributes[name]:
            return
        if type(holder[index]) is Row:
            holder[index].dissolve()
        names.append(index)
    held = holder.values() if type(holder) is dict else holder
    own = {id(holder[name]): name for name in names if type(holder[name]) is SmallArray}
    if len(own) < len(names) or not all(id(part) in own or _is_constant(part) for part in held):
        return
    form.in_template = []
    for name, array in zip(names, map(attributes.__getitem__, form.arrays), strict=True):
        order = "F" if holder[name].alike.parts[2] is None else "C"
        is_turned = not (array.T if order == "F" else array).flags.c_contiguous
        is_column_major = id(array) in lowerer.column_major
        found = ArrayInTemplate(holder[name].alike, order, is_turned, is_column_major)
        form.in_template.append(found)
    kept = node | {"data": [*holder]} if is_struct else dict(node)
    form.template = Template(kept, names, depth(kept))


def _is_constant(node: Any) -> bool:
    """Whether a node holds no payload and nothing that was met, or may be met, elsewhere."""
    if type(node) is list:
        return all(map(_is_constant, node))
    if type(node) is dict:
        may_be_met = node.get("tag") in ("backref", "datatype")  # most types are encoded
        return not may_be_met and all(map(_is_constant, node.values()))
    return type(node) not in (SmallArray, Row, Filled, Payload) and not hasattr(node, "__array__")
