"""How a class is written as a struct of Julia, and the field names of structs without a class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Param = str | Callable[[Any], Any]
Kind = tuple[type, ...] | Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class StructKind:
    """How a class is written: Julia `name`, `fields` in file order, type parameters.

    `params` are names of fields whose types parametrise the Julia type, or functions that give a
    parameter from the object. `is_layer`: arrays directly in it are written column-major, as
    Flux's own constructors hold them. `since` is the first Flux that writes this layout.
    `from_type`: attributes that the file holds as parameters of the type, by position.
    `written`: fields whose value is worked out from the object where it has none; `turned`: fields
    that are written as what this makes of their value. `becomes` gives the object of another class
    that is written in the place of one whose own struct is no more; `until` is the first Flux
    without such a struct.
    """

    cls: type
    name: str
    fields: tuple[str, ...]
    params: tuple[Param, ...] = ()
    is_layer: bool = False
    kinds: tuple[tuple[str, Kind], ...] = ()  # what a file may hold in a field
    since: str = "0"
    from_type: tuple[tuple[str, int], ...] = ()
    written: tuple[tuple[str, Callable[[Any], Any]], ...] = ()
    turned: tuple[tuple[str, Callable[[Any], Any]], ...] = ()
    becomes: Callable[[Any], Any] | None = None
    until: str = ""

    def accepts(self, field: str, value: Any) -> bool:
        """Whether a file may hold `value` in this field."""
        for name, kind in self.kinds:
            if name == field and not (
                isinstance(value, kind) if isinstance(kind, tuple) else kind(value)
            ):
                return False
        return True


def field_names(cls: type) -> tuple[str, ...] | None:
    """Return the names of the fields of a dataclass or a namedtuple class, else None."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple(cls._fields)
    return None


def is_plain(cls: Any) -> bool:
    """Whether objects of a class are what the plain attributes of a dataclass say, and no more."""
    if not hasattr(cls, "__dataclass_fields__") or cls.__dictoffset__ == 0:
        return False
    if issubclass(cls, _VALUES) or cls.__getattribute__ is not object.__getattribute__:
        return False
    found = (getattr(cls, name, None) for name in cls.__dataclass_fields__)
    return not any(hasattr(type(own), "__set__") for own in found)  # slots and properties


_VALUES = (dict, list, tuple, set, frozenset, np.ndarray, str, bytes, int, float)


def is_of_optimiser(julia_type: Any) -> bool:
    """Whether a Julia struct is an optimiser, or the state of one."""
    name = getattr(julia_type, "name", None)
    return isinstance(name, str) and name.startswith(("Flux.Optimise.", "Optimisers."))


def field_names_of(julia_type: Any, nfields: int) -> tuple[str, ...] | None:
    """Return the field names of a struct that has no class here, where they are known."""
    name = getattr(julia_type, "name", None)
    return _field_names().get((name, nfields)) if isinstance(name, str) else None


_OPTIMISERS = """
Descent eta; Momentum eta rho velocity; Nesterov eta rho velocity; RMSProp eta rho acc;
RMSProp eta rho epsilon acc; ADAM eta beta state; RADAM eta beta state; AdaMax eta beta state;
OADAM eta beta state; ADAGrad eta acc; ADADelta rho state; AMSGrad eta beta state;
NADAM eta beta state; AdaBelief eta beta state; Adam eta beta epsilon state;
RAdam eta beta epsilon state; AdaMax eta beta epsilon state; OAdam eta beta epsilon state;
AdaGrad eta epsilon acc; AdaDelta rho epsilon state; AMSGrad eta beta epsilon state;
NAdam eta beta epsilon state; AdaBelief eta beta epsilon state; Optimiser os;
InvDecay gamma state; ExpDecay eta decay step clip current;
ExpDecay eta decay step clip start current; WeightDecay wd; ClipValue thresh; ClipNorm thresh
"""  # of Flux.Optimise, v0.7 to v0.14
_RULES = """
Leaf rule state frozen; Leaf rule state; Descent eta; Momentum eta rho; Nesterov eta rho;
RMSProp eta rho epsilon; RMSProp eta rho epsilon centred; Rprop eta ell gamma; Lion eta beta;
ADAM eta beta epsilon; Adam eta beta epsilon; RADAM eta beta epsilon; RAdam eta beta epsilon;
AdaMax eta beta epsilon; OADAM eta beta epsilon; OAdam eta beta epsilon; ADAGrad eta epsilon;
AdaGrad eta epsilon; ADADelta rho epsilon; AdaDelta rho epsilon; AMSGrad eta beta epsilon;
NADAM eta beta epsilon; NAdam eta beta epsilon; AdaBelief eta beta epsilon; WeightDecay lambda;
SignDecay lambda; ClipGrad delta; ClipNorm omega p throw; OptimiserChain opts; AccumGrad n
"""  # of Optimisers.jl, v0.2 to v0.4


def _named_fields(package: str, rules: str) -> dict[tuple[str, int], tuple[str, ...]]:
    rows = [row.split() for row in rules.split(";")]
    return {(f"{package}.{name}", len(fields)): tuple(fields) for name, *fields in rows}


@functools.cache
def _field_names() -> dict[tuple[str, int], tuple[str, ...]]:
    return {
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
        **_named_fields("Flux.Optimise", _OPTIMISERS),
        **_named_fields("Optimisers", _RULES),
    }
