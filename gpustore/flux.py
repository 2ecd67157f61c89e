"""(Julia type name, number of fields) -> Python class and field names, and the inverse.

The rows are those of `eras.py`; users' own classes join them through `model_type`.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar

import numpy as np

from gpustore import tree
from gpustore.errors import UnsupportedValueError
from gpustore.kinds import StructKind, field_names
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
_OF_FLUX: dict[str, bool] = {}  # names in the table
_PACKAGES = ("Flux.", "Tracker.", "Zygote.")  # of these names
_REGISTERED: set[str] = set()  # by users
_FUNCTIONS: dict[str, Callable[..., Any]] = {}  # by the names of their Julia types
_FUNCTION_NAMES: dict[Any, str] = {
    np.add: "Base.#+", operator.add: "Base.#+", np.subtract: "Base.#-", operator.sub: "Base.#-",
    np.matmul: "Base.#*", operator.matmul: "Base.#*",
}  # fmt: skip
for _cls in (tree.TrackedArray, tree.Params):
    _show(_cls)


def _is_of_package(module: Any) -> bool:
    """Whether the table is to be looked at for what is of this module: none of others is there."""
    return not _OF_FLUX and str(module).startswith("gpustore.")


def _fill() -> None:
    """Import the layers and the table of them: 15 ms, for models and files that have some."""
    from gpustore.eras import TABLE

    kinds: dict[tuple[str, int], list[StructKind]] = {}
    rows: dict[type, list[StructKind]] = {}
    for kind in sorted(TABLE, key=lambda kind: version_of(kind.since)):
        if kind.becomes is None:
            kinds.setdefault((kind.name, len(kind.fields)), []).append(kind)
        rows.setdefault(kind.cls, []).append(kind)
    for cls in (tree.TrackedArray, tree.Params):
        rows[cls].reverse()
    functions = _function_table()
    for name, function in functions.items():
        if name.endswith("#" + function.__name__) or function not in _FUNCTION_NAMES:
            _FUNCTION_NAMES[function] = name
    _KINDS.update(kinds)
    _ROWS.update(rows)
    _FUNCTIONS.update(functions)
    _OF_FLUX.update(dict.fromkeys((kind.name for kind in TABLE), True))  # last: it says all is


def known_functions() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that stand for Julia's, by the names of the types of those."""
    if not _OF_FLUX:
        _fill()
    return _FUNCTIONS


def _function_table() -> dict[str, Callable[..., Any]]:
    from gpustore import activations
    from gpustore import functions as own

    base = ("identity", "tanh", "exp", "log", "sqrt", "sin", "cos", "abs", "abs2", "sign")
    nnlib = [name for name in activations.__all__ if name not in base]
    table = {f"NNlib.#{name}": getattr(activations, name) for name in nnlib}
    table |= {f"Base.#{name}": getattr(activations, name) for name in base}
    return table | {
        "Base.#+": own.add, "Base.#-": own.subtract, "Base.#*": own.multiply,
        "Base.#vcat": own.vcat, "Base.#hcat": own.hcat, "Base.#max": own.maximum_of,
        "Base.#min": own.minimum_of, "Base.#maximum": own.maximum, "Base.#minimum": own.minimum,
        "Base.#sum": own.total, "Statistics.#mean": own.mean, "Flux.#flatten": own.flatten,
        "Flux.#normalise": own.normalise, "MLUtils.#flatten": _moved(own.flatten),
    }  # fmt: skip


def _moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own for a name that the same function has in another package."""

    def moved(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    moved.__name__, moved.__doc__ = function.__name__, function.__doc__
    return moved


def has_class(name: str) -> bool:
    """Whether structs of this dotted name may have a class here: of Flux, or a user's."""
    return is_of_flux(name) or name in _REGISTERED


def kind_named(name: str, nfields: int, nparams: int | None = None) -> StructKind | None:
    """Return the table's row for a Julia struct of this dotted name and number of fields.

    Of several, the newest with that number of type parameters.
    """
    is_of_flux(name)  # so that the table is there
    rows = _KINDS.get((name, nfields))
    if rows is None:
        return None
    return next((row for row in reversed(rows) if len(row.params) == nparams), rows[-1])


def is_of_flux(name: str) -> bool:
    """Whether a Julia struct of this name is in the table, not one that a user registered."""
    if not _OF_FLUX and name.startswith(_PACKAGES):
        _fill()
    return name in _OF_FLUX


def layouts(name: str) -> list[int]:
    """Return the numbers of fields that a struct of the table has had."""
    return sorted({n for known, n in _KINDS if known == name})


def rows_of(cls: type) -> Sequence[StructKind]:
    """Return the rows of a class, in the order in which its layouts came."""
    if cls not in _ROWS and _is_of_package(cls.__module__):
        _fill()
    return _ROWS.get(cls, ())


def kind_of(value: Any) -> StructKind | None:
    """Return the row by which this object is written, or None.

    That of the file it came from, or the newest of its class.
    """
    rows = _ROWS.get(type(value)) or rows_of(type(value))
    if not rows:
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
        rows = rows_of(type(node))
        if not rows or not rows[0].is_layer or isinstance(node, tree.TrackedArray):
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
    from gpustore.convolution import Conv, DepthwiseConv
    from gpustore.layers import plain

    is_grouped = isinstance(made, Conv) and hasattr(plain(made.weight), "reshape")
    if name != "DepthwiseConv" or not is_grouped or plain(made.weight).shape[-1] % made.groups:
        return made
    return DepthwiseConv.of_grouped(made)


def function_named(name: str) -> Callable[..., Any] | None:
    """Return the Python function for the type name of a Julia one, such as `NNlib.#relu`."""
    return known_functions().get(name)


def function_name(value: Any) -> str | None:
    """Return the type name of the Julia function that a Python function stands for, or None."""
    if type(value) is FunctionType and _is_of_package(value.__module__):
        _fill()
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
    rows_of(cls)  # so that the table is there, if it is one of its classes
    fields = field_names(cls)
    if fields is None:
        raise UnsupportedValueError(
            f"model_type: expected a dataclass or a namedtuple, found {cls!r}; decorate it with "
            "@dataclasses.dataclass first"
        )
    name = name if "." in name else f"Main.{name}"
    is_of_flux(name)  # so that the table is there
    taken = [kind for rows in _KINDS.values() for kind in rows if kind.name == name]
    if taken and taken[0].cls.__qualname__ != cls.__qualname__:
        raise UnsupportedValueError(
            f"model_type: {name} already stands for {taken[0].cls.__qualname__}; choose another"
        )
    kind = StructKind(cls, name, fields)
    _KINDS[name, len(fields)] = [kind]
    _ROWS[cls] = [kind]
    _REGISTERED.add(name)
    _show(cls)
    return cls
