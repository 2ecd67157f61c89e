"""Julia's arithmetic on numbers and on the elements of arrays, where NumPy's differs.

Whole numbers take the type of the floats they meet (an Int64 array times a Float32 is Float32),
Bool counts as Int, Int64 wraps, `/` of whole numbers is a Float64, `÷` and `%` go towards zero.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from gpustore.errors import OpaqueCodeError

_NARROW = np.dtype(np.int64)


class Irrational(float):
    """π: it takes the type of the float it meets, and is a Float64 with whole numbers."""


def number(value: Any) -> Any:
    """Return a literal as Julia computes with it: Float64 is not weaker than Float32."""
    return np.float64(value) if type(value) is float else value


def wrapped(value: Any) -> Any:
    """Return an integer as an Int64 wraps it."""
    if type(value) is int and not -(2**63) <= value < 2**63:
        return (value + 2**63) % 2**64 - 2**63
    return value


def is_array(x: Any) -> bool:
    return bool(getattr(x, "ndim", 0))


def is_number(x: Any) -> bool:
    """Whether `x` is a number or an array of numbers."""
    return getattr(getattr(x, "dtype", None), "kind", "") in (
        "b",
        "i",
        "u",
        "f",
        "c",
    ) or isinstance(x, (bool, int, float, complex))


def _kind(x: Any) -> str:
    """Return NumPy's letter of a number's kind; "w" for what takes the type of what it meets."""
    if isinstance(x, Irrational):
        return "w"
    dtype = getattr(x, "dtype", None)
    if dtype is not None:
        return str(dtype.kind)
    return "b" if isinstance(x, bool) else "i" if isinstance(x, int) else "f"


def as_dtype(x: Any, dtype: Any) -> Any:
    """Return a number or an array in another dtype."""
    if not hasattr(x, "dtype"):
        return np.dtype(dtype).type(x)
    return x if x.dtype == dtype else x.astype(dtype)


def promoted(*xs: Any) -> tuple[Any, ...]:
    """Return the numbers in types with which NumPy computes what Julia would."""
    for x in xs:
        if not is_number(x):
            raise OpaqueCodeError(f"expected numbers, found a {type(x).__name__}")
    xs = tuple(map(number, xs))
    kinds = [_kind(x) for x in xs]
    floats = [x.dtype for x, kind in zip(xs, kinds, strict=True) if kind in "fc"]
    if floats:
        widest = functools.reduce(np.promote_types, floats)
        return tuple(
            as_dtype(x, widest) if kind not in "fc" else x
            for x, kind in zip(xs, kinds, strict=True)
        )
    xs = tuple(np.float64(x) if isinstance(x, Irrational) else x for x in xs)
    if "w" in kinds:
        return promoted(*xs)
    return _whole(xs, kinds)


def _whole(xs: tuple[Any, ...], kinds: list[str]) -> tuple[Any, ...]:
    """Return whole numbers in the widest of their types; numbers of Python stay what they are."""
    dtypes = [x.dtype if hasattr(x, "dtype") else _NARROW for x in xs if not isinstance(x, bool)]
    if not any(hasattr(x, "dtype") for x in xs) or not dtypes:
        return xs
    widest = max(
        dtypes, key=lambda dtype: (dtype.itemsize * (dtype.kind != "b"), dtype.kind == "u")
    )
    if all(dtype.kind == "b" for dtype in dtypes):
        return xs
    return tuple(as_dtype(x, widest) for x in xs)


def counted(x: Any) -> Any:
    """Return Bool as Int64, all else as it is."""
    return as_dtype(x, np.int64) if _kind(x) == "b" else x


def floating(x: Any) -> Any:
    """Return whole numbers as Float64, floats as they are."""
    if not is_number(x):
        raise OpaqueCodeError(f"expected numbers, found a {type(x).__name__}")
    return as_dtype(x, np.float64) if _kind(x) in "biuw" else number(x)


def settled(value: Any) -> Any:
    """Return NumPy's Int64 and Bool numbers as Python's; an Int64 wraps."""
    if isinstance(value, (np.int64, np.bool_)):
        return value.item()
    return wrapped(value)


# --- functions of numbers and elements ----------------------------------------------------------


def add(*xs: Any) -> Any:
    return functools.reduce(lambda x, y: operator.add(*promoted(counted(x), counted(y))), xs)


def subtract(x: Any, *y: Any) -> Any:
    if not y:
        (x,) = promoted(counted(x))
        return -x
    return operator.sub(*promoted(counted(x), counted(y[0])))


def multiply(*xs: Any) -> Any:
    return functools.reduce(lambda x, y: operator.mul(*promoted(x, y)), xs)


def divide(x: Any, y: Any) -> Any:
    """Return x / y: of whole numbers a Float64."""
    x, y = promoted(x, y)
    return np.true_divide(floating(x), floating(y))


def quotient(x: Any, y: Any) -> Any:
    """Return x ÷ y, towards zero, in the type of the arguments."""
    x, y = promoted(counted(x), counted(y))
    if _kind(x) == "f":
        return np.trunc(np.true_divide(x, y))
    down = _checked_floor(x, y)
    return down + ((down * y != x) & ((x < 0) != (y < 0)))


def floor_quotient(x: Any, y: Any) -> Any:
    x, y = promoted(counted(x), counted(y))
    return np.floor(np.true_divide(x, y)) if _kind(x) == "f" else _checked_floor(x, y)


def ceil_quotient(x: Any, y: Any) -> Any:
    return subtract(floor_quotient(subtract(x), y))


def _checked_floor(x: Any, y: Any) -> Any:
    if not bool((y != 0).all() if is_array(y) else y):
        raise OpaqueCodeError("a whole number is divided by zero")
    return x // y


def remainder(x: Any, y: Any) -> Any:
    """Return x % y with the sign of x."""
    x, y = promoted(counted(x), counted(y))
    return np.fmod(x, y) if _kind(x) == "f" else x - quotient(x, y) * y


def modulo(x: Any, y: Any) -> Any:
    """Return mod(x, y) with the sign of y."""
    x, y = promoted(counted(x), counted(y))
    return np.mod(x, y) if _kind(x) == "f" else x - _checked_floor(x, y) * y


def power(x: Any, n: Any) -> Any:
    """Return x^n of numbers; whole numbers wrap, and refuse negative exponents as Julia does."""
    if _kind(n) in "biu" and _kind(x) in "biu":
        if bool((n < 0).any() if is_array(n) else n < 0):
            raise OpaqueCodeError("a whole number to a negative power; use a float: 2.0^-1")
        if type(x) is int and type(n) is int:
            return wrapped(pow(x, n, 2**64))
        return np.power(*promoted(counted(x), counted(n)))
    if _kind(x) in "fc" and type(n) is int and -16 <= n <= 16:
        x = number(x)
        return x * x if n == 2 else x * x * x if n == 3 else np.power(x, as_dtype(n, x.dtype))
    return np.power(*promoted(x, n))


def literal_power(x: Any, n: int) -> Any:
    """Return x^n for an exponent that stands in the code: x^-1 is inv(x), also of an Int."""
    return power(x if n >= 0 else floating(x), n)


def largest(*xs: Any) -> Any:
    return functools.reduce(lambda x, y: np.maximum(*promoted(x, y)), xs)


def smallest(*xs: Any) -> Any:
    return functools.reduce(lambda x, y: np.minimum(*promoted(x, y)), xs)


def clamp(x: Any, low: Any, high: Any) -> Any:
    return smallest(largest(x, low), high)


def choose(condition: Any, x: Any, y: Any) -> Any:
    """Return ifelse(condition, x, y)."""
    if not is_array(condition) and not is_array(x) and not is_array(y):
        return x if condition else y
    return np.where(condition, *promoted(x, y))


def muladd(x: Any, y: Any, z: Any) -> Any:
    return add(multiply(x, y), z)


def comparison(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, y: ufunc(*promoted(x, y))


def of_floats(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of floats; whole numbers become Float64 first."""
    return lambda x: ufunc(floating(x))


def of_numbers(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of one number, in its own type."""
    return lambda x: ufunc(*promoted(x))


def of_bits(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: functools.reduce(lambda x, y: ufunc(*promoted(x, y)), xs)


def angle(y: Any, *x: Any) -> Any:
    """Return atan(y) or atan(y, x)."""
    return np.arctan2(*promoted(floating(y), floating(x[0]))) if x else np.arctan(floating(y))


def hypotenuse(x: Any, y: Any) -> Any:
    return np.hypot(*promoted(floating(x), floating(y)))


def logarithm(x: Any, *y: Any) -> Any:
    """Return log(x) or log(base, x)."""
    return np.log(floating(y[0])) / np.log(floating(x)) if y else np.log(floating(x))


def rounding(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    """Return round, floor and the like: f(x), f(Int, x) and f(x; digits = 2)."""

    def apply(*args: Any, digits: Any = 0) -> Any:
        (x,) = promoted(args[-1])
        scale = 10.0 ** int(digits)
        if _kind(x) in "biu":
            found = x
        elif digits:
            found = as_dtype(ufunc(x * scale) / scale, x.dtype)
        else:
            found = ufunc(x)
        return converted(args[0], found) if len(args) == 2 else found

    return apply


def converted(target: Any, x: Any) -> Any:
    """Return Julia's T(x) for a type of the table; what does not fit exactly is refused."""
    if not is_number(x):
        raise OpaqueCodeError(f"{target.name}: expected a number, found a {type(x).__name__}")
    dtype = np.dtype(target.dtype)
    found = as_dtype(x, dtype)
    if dtype.kind in "biu" and _kind(x) in "fiu" and not bool(np.all(found == x)):
        raise OpaqueCodeError(f"{target.name}: a number that does not fit")
    return settled(found)
