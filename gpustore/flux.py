"""One table: (Julia type name, number of fields) -> Python class and field names; and its inverse.

Files hold a struct's fields by position, without names or version; the number of fields tells the
Flux era. Users' own classes join the table through `model_type`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gpustore import activations, layers, tree
from gpustore.errors import UnsupportedValueError

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True, slots=True)
class StructKind:
    """How a class is written: Julia `name`, `fields` in file order, type parameters.

    `params` are names of fields whose types parametrise the Julia type, in order. `is_layer`:
    arrays directly in it are written column-major, as Flux's own constructors hold them.
    """

    cls: type
    name: str
    fields: tuple[str, ...]
    params: tuple[str, ...] = ()
    is_layer: bool = False
    kinds: tuple[tuple[str, tuple[type, ...]], ...] = ()  # fields that must be of these types

    def accepts(self, field: str, value: Any) -> bool:
        """Whether a file may hold `value` in this field."""
        return all(isinstance(value, types) for name, types in self.kinds if name == field)


_TRACKED = ("tracker", "data", "grad")
TABLE = (
    StructKind(
        layers.Chain,
        "Flux.Chain",
        ("layers",),
        ("layers",),
        True,
        (("layers", (tuple, list, dict)),),
    ),
    StructKind(
        layers.Dense, "Flux.Dense", ("weight", "bias", "σ"), ("σ", "weight", "bias"), is_layer=True
    ),
    StructKind(tree.TrackedArray, "Tracker.TrackedArray", _TRACKED, is_layer=True),
    StructKind(tree.TrackedArray, "Flux.Tracker.TrackedArray", _TRACKED, is_layer=True),
    StructKind(tree.Params, "Zygote.Params", ("order", "params")),
    StructKind(tree.Params, "Tracker.Params", ("order", "params")),
    StructKind(tree.Params, "Flux.Tracker.Params", ("order", "params")),
)  # the first row of a class is the one it is written by

_KINDS: dict[tuple[str, int], StructKind] = {(kind.name, len(kind.fields)): kind for kind in TABLE}
_KINDS_OF: dict[type, StructKind] = {kind.cls: kind for kind in reversed(TABLE)}

_BASE_FUNCTIONS = ("identity", "tanh", "exp", "log", "sqrt", "sin", "cos", "abs", "abs2", "sign")


def _function_table() -> dict[str, Callable[..., Any]]:
    nnlib = [name for name in activations.__all__ if name not in _BASE_FUNCTIONS]
    table = {f"NNlib.#{name}": getattr(activations, name) for name in nnlib}
    return table | {f"Base.#{name}": getattr(activations, name) for name in _BASE_FUNCTIONS}


FUNCTIONS = _function_table()  # by the names of their Julia types
_FUNCTION_NAMES = {
    function: name for name, function in FUNCTIONS.items() if name.endswith("#" + function.__name__)
}


def kind_named(name: str, nfields: int) -> StructKind | None:
    """Return the table's row for a Julia struct of this dotted name and number of fields."""
    return _KINDS.get((name, nfields))


def kind_of(value: Any) -> StructKind | None:
    """Return the row by which this object is written, or None."""
    return _KINDS_OF.get(type(value))


def function_named(name: str) -> Callable[..., Any] | None:
    """Return the Python function for the type name of a Julia one, such as `NNlib.#relu`."""
    return FUNCTIONS.get(name)


def function_name(value: Any) -> str | None:
    """Return the type name of the Julia function that a Python function stands for, or None."""
    try:
        return _FUNCTION_NAMES.get(value)
    except TypeError:  # not hashable: no function
        return None


def model_type(name: str | type | None = None) -> Any:
    """Register a dataclass or namedtuple under a Julia type name, so that it loads as itself.

    `name` is dotted, such as "Main.Net" or "MyPackage.Net"; a bare name belongs to Main, and the
    default is the class's own. Instances are saved as structs of their fields, in order. Raises
    UnsupportedValueError for a class of another kind or a name already taken by another class.

    >>> @model_type("Main.Doubler")
    ... @dataclasses.dataclass
    ... class Doubler:
    ...     factor: float = 2.0
    """
    if isinstance(name, type):
        return _register(name, name.__name__)
    return lambda cls: _register(cls, name or cls.__name__)


def _register(cls: _Class, name: str) -> _Class:
    fields = field_names(cls)
    if fields is None:
        raise UnsupportedValueError(
            f"model_type: expected a dataclass or a namedtuple, found {cls!r}; decorate it with "
            "@dataclasses.dataclass first"
        )
    name = name if "." in name else f"Main.{name}"
    taken = [kind for kind in _KINDS.values() if kind.name == name]
    if taken and taken[0].cls.__qualname__ != cls.__qualname__:
        raise UnsupportedValueError(
            f"model_type: {name} already stands for {taken[0].cls.__qualname__}; choose another"
        )
    kind = StructKind(cls, name, fields)
    _KINDS[name, len(fields)] = _KINDS_OF[cls] = kind
    return cls


def field_names(cls: type) -> tuple[str, ...] | None:
    """Return the names of the fields of a dataclass or a namedtuple class, else None."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple(cls._fields)
    return None


def field_names_of(julia_type: Any, nfields: int) -> tuple[str, ...] | None:
    """Return the field names of a struct that has no class here, where they are known."""
    name = getattr(julia_type, "name", None)
    return FIELD_NAMES.get((name, nfields)) if isinstance(name, str) else None


_OPTIMISERS = {  # Flux.Optimise, and the rules of Optimisers.jl, by number of fields
    "Descent": ("eta",),
    "Momentum": ("eta", "rho", "velocity"),
    "Nesterov": ("eta", "rho", "velocity"),
    "RMSProp": ("eta", "rho", "acc"),
    "ADAM": ("eta", "beta", "state"),
    "Adam": ("eta", "beta", "state"),
    "WeightDecay": ("wd",),
    "ExpDecay": ("eta", "decay", "step", "clip", "current"),
    "Optimiser": ("os",),
}
FIELD_NAMES: dict[tuple[str, int], tuple[str, ...]] = {
    ("Base.UnitRange", 2): ("start", "stop"),
    ("Base.OneTo", 1): ("stop",),
    ("Base.Slice", 1): ("indices",),
    ("Base.StepRange", 3): ("start", "step", "stop"),
    ("Base.StepRangeLen", 4): ("ref", "step", "len", "offset"),
    ("Base.LinRange", 4): ("start", "stop", "len", "lendiv"),
    ("Base.RefValue", 1): ("x",),
    ("Base.Pair", 2): ("first", "second"),
    ("Base.Rational", 2): ("num", "den"),
    ("Base.TwicePrecision", 2): ("hi", "lo"),
    ("Base.VersionNumber", 5): ("major", "minor", "patch", "prerelease", "build"),
    ("Base.UUID", 1): ("value",),
    ("Base.Dict", 2): ("keys", "values"),
    ("Base.IdDict", 2): ("keys", "values"),
    ("DataFrames.Index", 2): ("lookup", "names"),
    **{(f"Flux.Optimise.{n}", len(f)): f for n, f in _OPTIMISERS.items()},
}
