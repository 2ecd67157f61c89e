"""Names and texts: given twice, endless, not text at all."""

from __future__ import annotations

import struct

import gpustore as gs
from attacks.octets import PAD, array, binary, document, element, integer, text
from attacks.registry import attack


@attack(gs.FormatError)
def a_name_without_end():
    """To have the whole file searched for a NUL, again and again."""
    return document(element(1, "n" * 100_000, bytes(8)), PAD)


@attack(gs.FormatError)
def a_name_that_runs_over_its_document():
    """To take the parent's bytes for a name."""
    return document(element(3, "d", document(PAD, b"\x0aname")), integer("b", 1))


@attack(gs.FormatError)
def an_entry_given_twice():
    """To show one value to a reviewer and another to the program."""
    return document(text("a", "harmless"), text("a", "other"))


@attack(gs.FormatError)
def an_entry_given_twice_in_a_large_file():
    """The same where the document is scanned."""
    return document(text("a", "harmless"), PAD, text("a", "other"))


@attack(gs.FormatError)
def a_key_given_twice_deep_inside():
    """The same in a document that the codec decodes whole."""
    inner = document(text("b", ""), text("b", ""))
    listed = document(element(4, "l", document(element(3, "0", inner))))
    return document(element(3, "a", listed))


@attack(gs.FormatError)
def the_data_of_an_array_given_twice():
    """To have one payload digested and another loaded."""
    data = binary("data", bytes(4))
    return document(array("a", [1], data, binary("blake3", bytes(32)), binary("data", b"evil")))


@attack(gs.FormatError)
def the_stamp_given_twice():
    """To have one digest checked and another shown."""
    stamp = element(3, "_gpustore", document(integer("version", 1), text("layout", "inline")))
    return document(text("a", ""), PAD, stamp, stamp)


@attack(gs.FormatError)
def a_hundred_thousand_entries_of_one_name():
    """To have the search for twins take the square of their number."""
    return document(element(10, "a", b"") * 100_000)


@attack()
def an_array_whose_keys_are_out_of_order():
    """BSON.jl ignores the keys of arrays: so does every use here, and all see the same list."""
    listed = document(text("1", "first"), text("0", "second"), text("1", "third"))
    return document(element(4, "a", listed))


@attack(gs.FormatError)
def text_that_is_not_utf8():
    """To have it decoded differently by two readers."""
    return document(element(2, "a", struct.pack("<i", 3) + b"\xff\xfe\0"))


@attack(gs.FormatError)
def text_of_an_overlong_encoding():
    """A NUL in two bytes, past what searches for NULs."""
    return document(element(2, "a", struct.pack("<i", 3) + b"\xc0\x80\0"))


@attack(gs.FormatError)
def text_of_half_a_character():
    """A surrogate: text that cannot be written again."""
    return document(element(2, "a", struct.pack("<i", 4) + b"\xed\xa0\x80\0"), PAD)


@attack(gs.FormatError)
def a_name_that_is_not_utf8():
    """The same for a name."""
    return document(b"\x0a\xff\xfe\0", PAD)


@attack(gs.FormatError)
def a_name_in_a_small_document_that_is_not_utf8():
    """The same where the codec decodes it."""
    return document(element(3, "a", document(b"\x0a\xff\xfe\0")))


@attack(gs.FutureVersionError)
def a_version_to_come():
    """To have a file of another format read as one of this."""
    return document(element(3, "_gpustore", document(integer("version", 2**62))))
