"""`datatype` documents -> Julia types; those that any file may hold are lifted once."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpustore import tagged
from gpustore.julia import ArraySpec, JuliaType, OpaqueDocument, Symbol
from gpustore.specs import array_spec

MAX_TYPE_WEIGHT = 10_000  # the largest of 193 model files has 203
_NOTHING = (None, None)


def datatype(lifter: Any, node: dict[str, Any], path: str) -> JuliaType | OpaqueDocument:
    """Return the type of a `datatype` document, or that as it is where it has no twin here."""
    params = node.get("params")
    if params == [] or "params" not in node:
        return _plain_type(lifter, node.get("name"), path)
    known: JuliaType | None = lifter.datatypes.get(id(node), _NOTHING)[1]
    known = known or tagged.lifted.get(id(node))
    if known is not None:
        return known
    plain = _plain_type(lifter, node.get("name"), path)
    lifted = _type_params(lifter, lifter.part(params, path), path)
    made = None if lifted is None else JuliaType(plain.path, lifted)
    if made is None or made.weight > MAX_TYPE_WEIGHT:  # it is kept as it came
        return OpaqueDocument(node, lifter.source)
    lifter.datatypes[id(node)] = node, made
    if id(node) in tagged.lifted and _is_of_any_file(made):
        tagged.lifted[id(node)] = made
    return made


def _plain_type(lifter: Any, names: Any, path: str) -> JuliaType:
    """Return the type of this name without parameters; each is made once."""
    try:
        spelling = "\0".join(names) if type(names) is list else None
    except TypeError:
        spelling = None
    if spelling is None:
        raise lifter.malformed(path, "`name` of a datatype document is not a list of strings")
    known: JuliaType | None = lifter.types.get(spelling)
    if known is None:
        known = lifter.types[spelling] = JuliaType(tuple(names))
        if len(names) > 2 and names[0] == "Main" and names[1] in ("Core", "Base"):
            lifter.spelling.add(names[1])
    return known


def _type_params(lifter: Any, params: Any, path: str) -> tuple[Any, ...] | None:
    """Lift type parameters, which BSON.jl packs as an array where they share a bits type.

    None stands for an array of elements that have no dtype here.
    """
    if isinstance(params, list):
        return tuple(
            [
                datatype(lifter, param, path)
                if type(param) is dict and param.get("tag") == "datatype"
                else lifter.value(param, path)
                for param in params
            ]
        )
    if isinstance(params, dict) and params.get("tag") == "array":
        spec = array_spec(lifter, params, path)
        if isinstance(spec, ArraySpec):
            array = np.frombuffer(lifter.bytes_of(spec.payload), spec.dtype)
            return tuple(array.tolist() if spec.dtype.char in "?l" else array)
        return None
    if isinstance(params, dict) and params.get("tag") == "backref" and "ref" in params:
        return _type_params(lifter, lifter.resolve(params, path), path)
    raise lifter.malformed(path, "the parameters of a datatype document are not a list")


def _is_of_any_file(param: Any) -> bool:
    """Whether a type, or its parameter, is made of names and numbers only."""
    if isinstance(param, JuliaType):
        return all(map(_is_of_any_file, param.params))
    if type(param) is tuple:
        return all(map(_is_of_any_file, param))
    return type(param) in (int, bool, Symbol)
