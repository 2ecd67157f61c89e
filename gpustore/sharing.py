"""What is in several places of a value: written once, and as a backref wherever it is met again."""

from __future__ import annotations

from typing import Any

from gpustore.encoder import int64
from gpustore.small import Row


class Sharing:
    """Which objects were met, and where their documents are; those met again are in `backrefs`."""

    def __init__(self) -> None:
        self.backrefs: list[Any] = []
        # id -> container, key, the object
        self.places: dict[int, tuple[Any, Any, Any] | Row] = {}

    def place(self, container: Any, key: Any, value: Any, node: Any) -> Any:
        """Put the document of an object that is met for the first time into container[key]."""
        container[key] = node
        self.places[id(value)] = (container, key, value)
        return node

    def place_of(self, value: Any) -> tuple[Any, Any, Any]:
        """Return container, key and object of one that was met; None thrice of one that was not."""
        found = self.places.get(id(value), (None, None, None))
        return found.places[id(value)] if isinstance(found, Row) else found

    def is_met(self, container: Any, key: Any, value: Any) -> bool:
        """Whether the object was met before; then its document moves to `backrefs`."""
        if id(value) not in self.places:
            return False
        first, where, _ = self.place_of(value)
        if type(first[where]) is Row:
            first[where].dissolve()
        node = first[where]
        if not (type(node) is dict and node.get("tag") == "backref"):
            self.backrefs.append(node)
            node = {"tag": "backref", "ref": int64()(len(self.backrefs))}
            first[where] = node
        container[key] = dict(node)
        return True
