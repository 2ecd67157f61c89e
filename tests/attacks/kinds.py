"""Element types that BSON.jl never writes: MongoDB's, deprecated ones, none at all."""

from __future__ import annotations

import struct

import gpustore as gs
from attacks.octets import PAD, binary, document, element, text
from attacks.registry import attack

TEXT = struct.pack("<i", 2) + b"1\0"
FOREIGN = {
    "undefined": (0x06, b""),
    "an_object_id": (0x07, bytes(12)),
    "a_mongodb_date": (0x09, bytes(8)),
    "a_regular_expression": (0x0B, b"(a+)+\0\0"),
    "a_database_pointer": (0x0C, TEXT + bytes(12)),
    "javascript": (0x0D, TEXT),
    "a_deprecated_symbol": (0x0E, TEXT),
    "javascript_with_scope": (0x0F, struct.pack("<i", 15) + TEXT + document()),
    "a_timestamp": (0x11, bytes(8)),
    "a_decimal": (0x13, bytes(16)),
    "a_smallest_key": (0xFF, b""),
    "a_largest_key": (0x7F, b""),
    "an_element_of_no_type": (0x42, b""),
}


def _register(kind: str, code: int, value: bytes) -> None:
    odd = element(code, "a", value)

    @attack(gs.FormatError, name=f"{kind}_in_a_small_file")
    def small():
        """To have the codec make an object of MongoDB's."""
        return document(odd)

    @attack(gs.FormatError, name=f"{kind}_in_a_large_file")
    def large():
        """The same where the document is scanned."""
        return document(odd, PAD)

    @attack(gs.FormatError, name=f"{kind}_as_the_name_of_a_symbol")
    def within():
        """To pass for the text or number that belongs there."""
        inside = document(text("tag", "symbol"), element(code, "name", value))
        return document(element(3, "s", inside))


for _kind, (_code, _value) in FOREIGN.items():
    _register(_kind, _code, _value)


def _register_binary(subtype: int) -> None:
    old_length = struct.pack("<i", 12) if subtype == 2 else b"1234"
    octets = old_length + bytes(12)

    @attack(gs.FormatError, name=f"a_binary_of_subtype_{subtype}")
    def small():
        """A binary that is a UUID, a function, encrypted or a user's own."""
        return document(binary("a", octets, subtype=subtype))

    @attack(gs.FormatError, name=f"a_binary_of_subtype_{subtype}_in_a_large_file")
    def large():
        """The same where the document is scanned."""
        return document(binary("a", octets, subtype=subtype), PAD)


for _subtype in (1, 2, 3, 4, 5, 6, 7, 9, 128, 255):
    _register_binary(_subtype)
