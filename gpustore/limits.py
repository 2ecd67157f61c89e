"""How much Julia code from a file may do: steps, depth of calls, elements of arrays.

One budget holds for a call from outside and all that it leads to, also through layers and back
into code, so that hostile code ends soon with OpaqueCodeError instead of filling time or memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from gpustore.errors import OpaqueCodeError

MAX_STEPS = 300_000  # expressions evaluated
MAX_CALLS = 40  # of code within code
MAX_ELEMENTS = 2**27  # made or read by all steps together, and
ELEMENTS_PER_INPUT = 500  # for each element of the arguments that many more


@dataclass(slots=True)
class Budget:
    """What is left of the limits."""

    elements: int = MAX_ELEMENTS
    steps: int = MAX_STEPS
    calls: int = MAX_CALLS


_CURRENT: ContextVar[Budget | None] = ContextVar("_CURRENT", default=None)


@contextlib.contextmanager
def limited(input_elements: int) -> Iterator[Budget]:
    """Run the block one call deeper in the budget of the code around it, or in a new one."""
    budget = _CURRENT.get()
    token = None
    if budget is None:
        budget = Budget(MAX_ELEMENTS + ELEMENTS_PER_INPUT * input_elements)
        token = _CURRENT.set(budget)
    budget.calls -= 1
    try:
        if budget.calls < 0:
            raise OpaqueCodeError(f"Julia code calls itself more than {MAX_CALLS} levels deep")
        yield budget
    finally:
        budget.calls += 1
        if token is not None:
            _CURRENT.reset(token)


def take_elements(count: int) -> None:
    """Count the elements of an array before it is made."""
    budget = _CURRENT.get()
    if budget is not None:
        budget.elements -= count
        if budget.elements < 0:
            raise OpaqueCodeError(
                f"Julia code works on more than {MAX_ELEMENTS} elements beyond its arguments; "
                "put a Python function in its place"
            )


def take_steps(count: int = 1) -> None:
    """Count steps of the code before they are done."""
    budget = _CURRENT.get()
    if budget is not None:
        budget.steps -= count
        if budget.steps < 0:
            raise OpaqueCodeError(
                f"Julia code takes more than {MAX_STEPS} steps; put a Python function in its place"
            )


def is_inside() -> bool:
    """Whether Julia code is running around this."""
    return _CURRENT.get() is not None
