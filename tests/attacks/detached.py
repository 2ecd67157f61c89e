"""Arrays said to lie after the document: overlapping, misplaced, out of the file, with holes."""

from __future__ import annotations

import struct

import gpustore as gs
from attacks.octets import PAD, array, binary, document, element, integer, text
from attacks.registry import attack

DIGEST = binary("blake3", bytes(32))


def place(offset: int, nbytes: int) -> bytes:
    return element(3, "data", document(integer("offset", offset), integer("nbytes", nbytes)))


def file_of(*places: tuple[int, int], tail: int = 4096, pad: bytes = b"") -> bytes:
    """Return a file of float32 arrays at these places; a document below 4096 bytes without pad."""
    arrays = [array(f"a{i}", [n // 4], place(at, n), DIGEST) for i, (at, n) in enumerate(places)]
    stamp = element(3, "_gpustore", document(integer("version", 1), text("layout", "detached")))
    whole = document(pad, *arrays, stamp)
    return whole.ljust(4096, b"\0") + bytes(tail)


@attack(gs.FormatError)
def a_detached_array_inside_the_document():
    """To read the structure as values."""
    return file_of((0, 64))


@attack(gs.FormatError)
def a_detached_array_that_begins_inside_the_document():
    """The same for a part of it."""
    return file_of((64, 4096))


@attack(gs.TruncatedFileError)
def a_detached_array_behind_the_file():
    """To read what is not there."""
    return file_of((4096, 8192))


@attack(gs.FormatError)
def a_detached_array_far_behind_the_file():
    """To have the sum of offset and length overflow."""
    return file_of((2**63 - 64, 64))


@attack(gs.FormatError)
def a_detached_array_at_two_to_the_63():
    """The number after the largest: negative in 64 bits."""
    return file_of((-(2**63), 64))


@attack(gs.FormatError)
def a_detached_array_at_a_negative_offset():
    """To count from the end."""
    return file_of((-64, 64))


@attack(gs.FormatError)
def a_detached_array_of_negative_length():
    """To have its end before its start."""
    return file_of((8192, -4096))


@attack(gs.FormatError)
def a_detached_array_out_of_line():
    """To have vector loads fault."""
    return file_of((4097, 64))


@attack(gs.FormatError)
def detached_arrays_that_overlap():
    """To have a few bytes stand for many arrays."""
    return file_of((4096, 4096), (4096 + 64, 64))


@attack(gs.FormatError)
def detached_arrays_that_are_one():
    """The same, all at one place, as a row."""
    return file_of(*[(4096, 64)] * 9)


@attack(gs.FormatError)
def a_row_of_detached_arrays_that_goes_backwards():
    """The same where a row is checked by columns."""
    return file_of(*[(8192 - 64 * i, 64) for i in range(9)], pad=PAD)


@attack(gs.FormatError)
def a_row_of_detached_arrays_inside_the_document():
    """To read the structure as values."""
    return file_of(*[(64 * i, 64) for i in range(9)], pad=PAD)


@attack(gs.FormatError)
def a_row_of_detached_arrays_in_an_inline_file():
    """The place of arrays in a file that says it has none there."""
    arrays = [array(f"a{i}", [16], place(69_632 + 64 * i, 64), DIGEST) for i in range(9)]
    return document(PAD, *arrays) + bytes(4096)


@attack(gs.FormatError)
def a_hole_before_the_first_detached_array():
    """To carry along what no reader sees."""
    return file_of((8192, 64), tail=4096 + 64)


@attack(gs.FormatError)
def a_hole_between_detached_arrays():
    """The same between two."""
    return file_of((4096, 64), (16384, 64), tail=16384 - 4096 + 64)


@attack(gs.FormatError)
def bytes_behind_the_last_detached_array():
    """The same at the end."""
    return file_of((4096, 64), tail=4096)


@attack(gs.FormatError)
def a_detached_place_that_is_a_float():
    """A number that is no offset."""
    data = document(element(1, "offset", struct.pack("<d", 4096.0)), integer("nbytes", 64))
    stamp = element(3, "_gpustore", document(integer("version", 1), text("layout", "detached")))
    return document(array("a", [16], element(3, "data", data)), stamp).ljust(8192, b"\0")


@attack(gs.FormatError)
def a_detached_place_without_length():
    """To have it taken from elsewhere."""
    data = document(integer("offset", 4096))
    stamp = element(3, "_gpustore", document(integer("version", 1), text("layout", "detached")))
    return document(array("a", [16], element(3, "data", data)), stamp).ljust(8192, b"\0")
