"""What a hostile file tries: one generator per attack; docs/security.md has the promises.

Files are made as no writer would make them, by theme: `lengths`, `names`, `kinds`, `arrays`,
`detached`, `references`, `values`, `amplification`, `code`.
"""

from attacks import (
    amplification,
    arrays,
    code,
    detached,
    kinds,
    lengths,
    names,
    references,
    values,
)
from attacks.registry import ATTACKS

__all__ = [
    "ATTACKS", "amplification", "arrays", "code", "detached", "kinds", "lengths", "names",
    "references", "values",
]  # fmt: skip
