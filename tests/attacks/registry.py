"""The list of attacks, filled by the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

READ = ("loaded", "verified", "opened")


@dataclass(frozen=True)
class Attack:
    """Makes the bytes of a file; one of `errors` is what each use in `uses` raises.

    Without errors the file is read all the same: quickly, and in memory that its size bounds.
    """

    make: Callable[[], bytes]
    errors: tuple[type[Exception], ...]
    uses: tuple[str, ...]


ATTACKS: dict[str, Attack] = {}


def attack(*errors: type[Exception], uses: tuple[str, ...] = READ, name: str = "") -> Any:
    """Register a generator of a file."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        known_as = name or make.__name__
        assert known_as not in ATTACKS
        ATTACKS[known_as] = Attack(make, errors, uses)
        return make

    return register
