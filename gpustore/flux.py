"""(Julia type name, number of fields) -> Python class and field names, and the inverse.

The rows are those of `eras.py`; users' own classes join them through `model_type`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gpustore import activations, convolution, functions, tree
from gpustore.eras import TABLE, StructKind
from gpustore.errors import UnsupportedValueError
from gpustore.layers import plain
from gpustore.notebook import html_tree

_Class = TypeVar("_Class", bound=type)


_OLDEST_FLUX = "0.9"  # that can be asked for


def version_of(text: str) -> tuple[int, ...]:
    """Return the numbers of a version of Flux, to compare it by."""
    return tuple(map(int, text.split(".")))


def _show(cls: Any) -> None:
    """Have notebooks show a dataclass as a tree, where it does not say itself how."""
    if hasattr(cls, "__dataclass_fields__") and not hasattr(cls, "_repr_html_"):
        cls._repr_html_ = html_tree


_KINDS: dict[tuple[str, int], list[StructKind]] = {}
_ROWS: dict[type, list[StructKind]] = {}
for _kind in sorted(TABLE, key=lambda kind: version_of(kind.since)):
    if _kind.becomes is None:
        _KINDS.setdefault((_kind.name, len(_kind.fields)), []).append(_kind)
    _ROWS.setdefault(_kind.cls, []).append(_kind)
for _cls in (tree.TrackedArray, tree.Params):
    _ROWS[_cls].reverse()
    _show(_cls)
NAMES = {kind.name for kind in TABLE}  # of structs that have a class here
_OF_FLUX = frozenset(NAMES)

_BASE_FUNCTIONS = ("identity", "tanh", "exp", "log", "sqrt", "sin", "cos", "abs", "abs2", "sign")
_JOINING = {
    "Base.#+": functions.add, "Base.#-": functions.subtract, "Base.#*": functions.multiply,
    "Base.#vcat": functions.vcat, "Base.#hcat": functions.hcat, "Base.#max": functions.maximum_of,
    "Base.#min": functions.minimum_of, "Base.#maximum": functions.maximum,
    "Base.#minimum": functions.minimum, "Base.#sum": functions.total,
    "Statistics.#mean": functions.mean, "Flux.#flatten": functions.flatten,
    "Flux.#normalise": functions.normalise,
}  # fmt: skip


def _moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own for a name that the same function has in another package."""

    def moved(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    moved.__name__, moved.__doc__ = function.__name__, function.__doc__
    return moved


def _function_table() -> dict[str, Callable[..., Any]]:
    nnlib = [name for name in activations.__all__ if name not in _BASE_FUNCTIONS]
    table = {f"NNlib.#{name}": getattr(activations, name) for name in nnlib}
    table |= {f"Base.#{name}": getattr(activations, name) for name in _BASE_FUNCTIONS}
    return table | _JOINING | {"MLUtils.#flatten": _moved(functions.flatten)}


FUNCTIONS = _function_table()  # by the names of their Julia types
_FUNCTION_NAMES: dict[Any, str] = {
    np.add: "Base.#+", operator.add: "Base.#+", np.subtract: "Base.#-", operator.sub: "Base.#-",
    np.matmul: "Base.#*", operator.matmul: "Base.#*",
}  # fmt: skip
for _name, _function in FUNCTIONS.items():
    if _name.endswith("#" + _function.__name__) or _function not in _FUNCTION_NAMES:
        _FUNCTION_NAMES[_function] = _name


def kind_named(name: str, nfields: int, nparams: int | None = None) -> StructKind | None:
    """Return the table's row for a Julia struct of this dotted name and number of fields.

    Of several, the newest with that number of type parameters.
    """
    rows = _KINDS.get((name, nfields))
    if rows is None:
        return None
    return next((row for row in reversed(rows) if len(row.params) == nparams), rows[-1])


def is_of_flux(name: str) -> bool:
    """Whether a Julia struct of this name is in the table, not one that a user registered."""
    return name in _OF_FLUX


def layouts(name: str) -> list[int]:
    """Return the numbers of fields that a struct of the table has had."""
    return sorted({n for known, n in _KINDS if known == name})


def rows_of(cls: type) -> tuple[StructKind, ...]:
    """Return the rows of a class, in the order in which its layouts came."""
    return tuple(_ROWS.get(cls, ()))


def kind_of(value: Any) -> StructKind | None:
    """Return the row by which this object is written, or None.

    That of the file it came from, or the newest of its class.
    """
    rows = _ROWS.get(type(value))
    if rows is None:
        return None
    return getattr(value, "julia_kind", None) or rows[-1]


def in_layout(root: Any, version: str) -> Any:
    """Return a copy of `root` whose layers are written in the layout of a Flux version.

    Raises UnsupportedValueError where a layer says what that version has no field for.
    """
    asked = version_of(version) if all(p.isdecimal() for p in version.split(".")) else ()
    if asked < version_of(_OLDEST_FLUX):
        raise UnsupportedValueError(
            f"flux: expected a version from {_OLDEST_FLUX} on such as '0.14', found {version!r}"
        )
    copied = tree.rebuild(root, lambda node: node)
    for path, node in tree.walk_entries(copied):
        rows = _ROWS.get(type(node))
        if rows is None or not rows[0].is_layer or isinstance(node, tree.TrackedArray):
            continue
        fitting = [row for row in rows if version_of(row.since) <= asked]
        if not fitting:
            raise UnsupportedValueError(
                f"{path}: Flux {version} has no {rows[0].name}; it came with {rows[0].since}"
            )
        until = fitting[-1].until
        if until and version_of(until) <= asked:
            raise UnsupportedValueError(
                f"{path}: Flux {version} has no {rows[0].name}, which went with {until}"
            )
        _refuse_loss(path, node, fitting[-1], version)
        node.__dict__.pop("julia_type", None)
        node.julia_kind = fitting[-1]
    return copied


def _refuse_loss(path: str, layer: Any, kind: StructKind, version: str) -> None:
    held = {*kind.fields, *(name for name, _ in kind.from_type), *_UNHELD}
    for field in dataclasses.fields(layer):
        if field.name in held or field.default is dataclasses.MISSING:
            continue
        value, default = getattr(layer, field.name), getattr(type(layer), field.name)
        if value is not default and set(value if isinstance(value, tuple) else [value]) != {
            default
        }:
            raise _no_field(path, field.name, version, value)
    for name in ("affine", "track_stats"):
        if name not in kind.fields and getattr(layer, name, True) is False:
            raise _no_field(path, name, version, False)


def _no_field(path: str, name: str, version: str, value: Any) -> UnsupportedValueError:
    return UnsupportedValueError(
        f"{path}.{name}: Flux {version} has no field for {value!r}; ask for a newer one"
    )


_UNHELD = ("rng", "active", "affine", "track_stats", "chs", "ε", "size")  # said otherwise too


def restored(made: Any, name: Any) -> Any:
    """Return the object that `made` was written for, by the name of its class in the file."""
    is_grouped = isinstance(made, convolution.Conv) and hasattr(plain(made.weight), "reshape")
    if name != "DepthwiseConv" or not is_grouped or plain(made.weight).shape[-1] % made.groups:
        return made
    return convolution.DepthwiseConv.of_grouped(made)


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
    Notebooks show a dataclass as a tree, unless it has a `_repr_html_` of its own.

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
    taken = [kind for rows in _KINDS.values() for kind in rows if kind.name == name]
    if taken and taken[0].cls.__qualname__ != cls.__qualname__:
        raise UnsupportedValueError(
            f"model_type: {name} already stands for {taken[0].cls.__qualname__}; choose another"
        )
    kind = StructKind(cls, name, fields)
    _KINDS[name, len(fields)] = [kind]
    _ROWS[cls] = [kind]
    NAMES.add(name)
    _show(cls)
    return cls


def field_names(cls: type) -> tuple[str, ...] | None:
    """Return the names of the fields of a dataclass or a namedtuple class, else None."""
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return tuple(cls._fields)
    return None


def is_of_optimiser(julia_type: Any) -> bool:
    """Whether a Julia struct is an optimiser, or the state of one."""
    name = getattr(julia_type, "name", None)
    return isinstance(name, str) and name.startswith(("Flux.Optimise.", "Optimisers."))


def field_names_of(julia_type: Any, nfields: int) -> tuple[str, ...] | None:
    """Return the field names of a struct that has no class here, where they are known."""
    name = getattr(julia_type, "name", None)
    return FIELD_NAMES.get((name, nfields)) if isinstance(name, str) else None


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
    **_named_fields("Flux.Optimise", _OPTIMISERS),
    **_named_fields("Optimisers", _RULES),
}
