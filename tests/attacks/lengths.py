"""Lengths that lie: of documents, binaries, strings and names, against parents and the file."""

from __future__ import annotations

import struct

import gpustore as gs
from attacks.octets import PAD, array, binary, datatype, document, element, integer, nested, text
from attacks.registry import attack


@attack(gs.FormatError)
def nothing_at_all():
    """An empty file."""
    return b""


@attack(gs.TruncatedFileError)
def three_bytes():
    """To have the first length read from behind the end."""
    return b"\x05\0\0"


@attack(gs.TruncatedFileError, gs.FormatError)
def a_document_that_claims_two_gibibytes():
    """To have memory set aside for a length that the file does not have."""
    return struct.pack("<i", 2**31 - 1) + element(1, "a", bytes(8)) + b"\0"


@attack(gs.FormatError)
def a_document_of_negative_length():
    """To move a cursor backwards."""
    return document(element(3, "a", struct.pack("<i", -17) + b"\0"), PAD)


@attack(gs.FormatError)
def a_document_of_the_smallest_number():
    """To overflow where the length is negated or lowered."""
    return document(element(3, "a", struct.pack("<i", -(2**31)) + b"\0"), PAD)


@attack(gs.FormatError)
def a_document_of_four_bytes():
    """A length that has no room for a terminator."""
    return document(element(3, "a", struct.pack("<i", 4)), PAD)


@attack(gs.FormatError)
def a_document_longer_than_its_parent():
    """To read the parent's neighbours as its own."""
    return document(element(3, "a", struct.pack("<i", 2**30) + b"\0"), PAD)


@attack(gs.FormatError)
def a_document_that_reaches_into_its_neighbour():
    """To have some bytes read twice, as two things."""
    inner = struct.pack("<i", 5 + 12) + b"\0"
    return document(element(3, "a", inner), integer("b", 1), PAD)


@attack(gs.FormatError)
def a_document_that_ends_early():
    """To hide bytes between its terminator and its end."""
    return document(element(3, "a", document(b"\0hidden")), PAD)


@attack(gs.FormatError)
def a_large_document_that_ends_early():
    """The same where it is scanned instead of decoded whole."""
    return document(element(3, "a", document(PAD, b"\0hidden")))


@attack(gs.FormatError)
def an_endless_document_without_terminator():
    """A length of -1 (it ends at its terminator), and none comes before its parent ends."""
    inner = struct.pack("<i", -1) + integer("b", 1)
    return document(PAD, element(3, "a", inner))[:-1] + b"\x12"


@attack(gs.FormatError)
def a_binary_of_negative_length():
    """To move a cursor backwards."""
    return document(binary("a", b"", nbytes=-1), PAD)


@attack(gs.FormatError)
def a_binary_longer_than_the_file():
    """To read behind the file."""
    return document(PAD, binary("a", b"abc", nbytes=2**31 - 1))


@attack(gs.FormatError)
def a_binary_longer_than_its_document():
    """To read what follows its document as values."""
    inner = document(PAD, binary("a", b"abc", nbytes=20))
    return document(element(3, "d", inner), binary("secret", bytes(100)))


@attack(gs.FormatError)
def a_string_of_length_zero():
    """To have the byte before it taken for its terminator."""
    return document(element(2, "a", struct.pack("<i", 0)), PAD)


@attack(gs.FormatError)
def a_string_of_negative_length():
    """To move a cursor backwards."""
    return document(element(2, "a", struct.pack("<i", -5) + b"\0"), PAD)


@attack(gs.FormatError)
def a_string_longer_than_the_file():
    """To read behind the file."""
    return document(PAD, element(2, "a", struct.pack("<i", 2**31 - 1) + b"abc\0"))


@attack(gs.FormatError)
def a_string_without_terminator():
    """To run on into what follows."""
    return document(element(2, "a", struct.pack("<i", 3) + b"abc"), PAD)


@attack(gs.FormatError)
def a_number_cut_off_by_its_document():
    """To take a number's last bytes from the parent."""
    return document(element(3, "d", document(PAD, element(18, "a", bytes(3)))), integer("b", 1))


@attack(gs.FormatError, gs.TruncatedFileError)
def a_document_without_terminator():
    """To run on behind the file."""
    return document(PAD, element(10, "a", b""))[:-1] + b"\1"


@attack(gs.FormatError)
def documents_nested_a_hundred_thousand_deep():
    """To overflow a stack."""
    return nested(100_000)


@attack(gs.FormatError)
def arrays_nested_beyond_the_limit():
    """The same with arrays."""
    return document(element(4, "a", nested(20_000, kind=4)), PAD)


@attack(gs.FormatError)
def small_documents_nested_seven_thousand_deep():
    """To overflow the stack of the codec that decodes small documents whole."""
    return document(element(3, "a", nested(7_000)))


@attack(gs.FormatError)
def documents_without_length_nested_beyond_the_limit():
    """The same where each says -1 and none can be decoded whole."""
    return struct.pack("<i", -1) + b"\x030\0\xff\xff\xff\xff" * 3_000 + bytes(3_001)


@attack()
def an_array_of_a_hundred_thousand_nothings():
    """The smallest elements there are: 3 bytes each, to have each cost many more."""
    return document(element(4, "a", document(b"\x0a0\0" * 100_000)))


@attack()
def bytes_behind_the_document():
    """BSON.jl ignores what follows the document: it is not looked at here either."""
    return document(text("a", "x")) + b"\xff" * 1000


# --- structs around arrays, which are read without the codec ---


def around_arrays(depth: int, *innermost: bytes) -> bytes:
    """Return a file of structs that hold an array and the next struct, `depth` of them."""
    inner = element(3, "1", document(*innermost))
    for _ in range(depth):
        fields = document(array("0", [1], binary("data", b"abcd")), inner)
        parts = text("tag", "struct"), datatype("type", "Main", "A"), element(4, "data", fields)
        inner = element(3, "1", document(*parts))
    return document(inner, PAD)


@attack(gs.FormatError)
def structs_around_arrays_with_a_key_twice_within():
    """To have each level read its fields twice, if it went another way after an error."""
    return around_arrays(40, text("tag", "symbol"), text("name", "a"), text("name", "b"))


@attack(gs.FormatError)
def structs_around_arrays_whose_fields_end_early():
    """The same, for an end that comes before the length says."""
    octets = around_arrays(40, text("tag", "symbol"), text("name", "b"))
    return octets.replace(b"name\0\x02\0\0\0b\0", b"name\0\x01\0\0\0\0\0")


@attack()
def structs_around_arrays():
    """The same without an error: 40 levels are read."""
    return around_arrays(40, text("tag", "symbol"), text("name", "a"))


@attack()
def types_of_which_no_two_are_alike():
    """To fill what is kept of types, so that little of it is of use."""
    arrays = (element(3, str(i), document(*_parts_of_an_array(f"T{i:05}"))) for i in range(3_000))
    return document(element(4, "a", document(*arrays)), PAD)


def _parts_of_an_array(name: str) -> tuple[bytes, ...]:
    size = element(4, "size", document(integer("0", 1)))
    return text("tag", "array"), datatype("type", "Main", name), size, binary("data", b"abcd")
