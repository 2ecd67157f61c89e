"""Array documents whose size, type, data, device or digest is not what they say."""

from __future__ import annotations

from typing import Any

import bson
from bson import Int64 as I

import gpustore as gs
from attacks.octets import (
    PAD,
    array,
    array_of,
    binary,
    document,
    integer,
    struct_of,
    text,
    tuple_of,
    type_of,
)
from attacks.registry import attack

FOUR = binary("data", bytes(4))


@attack(gs.FormatError)
def an_array_of_no_bytes_and_endless_shape():
    """0 times 2**62: nothing to store, much to walk."""
    return document(array("a", [0, 2**62], binary("data", b"")))


@attack(gs.FormatError)
def an_array_of_no_bytes_that_cannot_be_addressed():
    """0 times 2**61 elements of 4 bytes: each size is small enough, their product is not."""
    return document(array("a", [0, 2**61, 2**61], binary("data", b"")))


@attack(gs.FormatError)
def an_array_whose_size_overflows():
    """2**32 times 2**32 times 4 bytes is 0 in 64 bits."""
    return document(array("a", [2**32, 2**32], binary("data", b"")))


@attack(gs.FormatError)
def an_array_whose_bytes_overflow():
    """2**62 + 1 elements of 4 bytes are 4 bytes in 64 bits."""
    return document(array("a", [2**62 + 1], FOUR))


@attack(gs.FormatError)
def an_array_of_negative_size():
    """-1 times -4 elements: a product that fits."""
    return document(array("a", [-1, -4], binary("data", bytes(16))))


@attack(gs.FormatError)
def an_array_of_ten_thousand_dimensions():
    """To overflow a buffer for 32 of them."""
    return document(array("a", [1] * 10_000, FOUR))


@attack(gs.FormatError)
def an_array_of_33_dimensions():
    """One more than the limit."""
    return document(array("a", [1] * 33, FOUR))


@attack(gs.FormatError)
def an_array_larger_than_its_data():
    """To read what lies behind it."""
    return document(array("a", [1000], FOUR))


@attack(gs.FormatError)
def an_array_smaller_than_its_data():
    """To hide bytes behind it."""
    return document(array("a", [0], FOUR))


@attack(gs.FormatError)
def a_large_array_larger_than_its_data():
    """The same where the data are mapped, not copied."""
    return document(array("a", [70_000 // 4 + 1], binary("data", bytes(70_000))))


@attack(gs.FormatError)
def a_row_whose_third_array_claims_more_than_it_has():
    """A row is checked by columns: one that differs must not be taken for its neighbours."""
    data = binary("data", bytes(8))
    rows = [
        array(f"a{i}", [1000 if i == 3 else 2], data, binary("blake3", bytes(32))) for i in range(9)
    ]
    return document(PAD, *rows)


@attack(gs.FormatError)
def a_row_whose_first_array_claims_more_than_it_has():
    """The same of the one that all others are compared with."""
    data = binary("data", bytes(8))
    rows = [array(f"a{i}", [1000], data, binary("blake3", bytes(32))) for i in range(9)]
    return document(PAD, *rows)


@attack(gs.FormatError)
def a_device_of_a_huge_ordinal():
    """A number that takes long to read, or overflows."""
    return document(array("a", [1], FOUR, text("device", "cuda:" + "9" * 5000)))


@attack(gs.FormatError)
def a_digest_of_three_bytes():
    """To have only these compared."""
    return document(array("a", [1], FOUR, binary("blake3", b"abc")))


@attack(gs.FormatError)
def a_digest_of_no_bytes():
    """To have nothing compared."""
    return document(array("a", [1], FOUR, binary("blake3", b"")))


@attack(gs.IntegrityError, uses=("verified",))
def a_digest_over_other_bytes():
    """Values that were changed, with the digest of what was there before."""
    return document(array("a", [1], FOUR, binary("blake3", bytes(32))))


@attack(gs.IntegrityError, uses=("verified",))
def a_large_array_with_a_digest_over_other_bytes():
    """The same where the data are mapped."""
    data = binary("data", bytes(80_000))
    return document(array("a", [20_000], data, binary("blake3", bytes(32))))


@attack(gs.IntegrityError, uses=("verified",))
def a_stamp_without_its_digest():
    """To have a file of this package pass for one that has no digests."""
    stamp = document(integer("version", 1), text("writer", "x"), text("layout", "inline"))
    return document(text("a", "x"), PAD, b"\x03_gpustore\0" + stamp, array("b", [1], FOUR, DIGEST))


DIGEST = binary("blake3", bytes(32))


def _register(name: str, what: str, node: Any) -> None:
    def make() -> bytes:
        return bson.encode({"a": node})

    make.__doc__ = what
    attack(gs.FormatError, name=name)(make)


TABLE: dict[str, tuple[str, Any]] = {
    "a_boolean_size": ("True is a 1 in Python", array_of([True])),
    "a_size_that_is_a_float": ("A number that is no count", array_of([1.0])),
    "a_size_that_is_infinite": ("The same", array_of([float("inf")])),
    "a_size_that_is_text": ("The same", array_of(["1"])),
    "a_size_that_is_a_list": ("The same", array_of([[I(1)]])),
    "sizes_that_are_no_list": ("A string is a sequence too", array_of("1")),
    "an_array_without_data": ("What is not there cannot be checked", array_of([]) | {"data": None}),
    "an_array_whose_data_is_text": ("Four characters for four bytes", array_of([I(1)], "abcd")),
    "an_array_without_type": ("An element of nothing", {**array_of([I(1)]), "type": None}),
    "an_element_type_that_is_a_number": ("No type", array_of([I(1)], kind=I(4))),
    "an_element_type_that_is_a_tuple": ("No type", array_of([I(1)], kind=tuple_of(I(1)))),
    "a_dtype_that_runs_code": ("To have a name looked up", array_of([I(1)], dtype="__import__")),
    "a_dtype_of_objects": ("To have bytes taken for pointers", array_of([I(1)], dtype="object")),
    "a_dtype_of_python": ("The same by its code", array_of([I(1)], dtype="O")),
    "a_dtype_that_is_no_dtype": ("A name in the right module", array_of([I(1)], dtype="finfo")),
    "a_dtype_that_is_a_number": ("The same", array_of([I(1)], dtype=I(3))),
    "a_dtype_of_another_size": ("To read 8 bytes of 4", array_of([I(1)], dtype="datetime64[ns]")),
    "a_time_of_endless_units": (
        "To overflow in the parser of dtypes",
        array_of([I(1)], bytes(8), type_of("Core.Int64"), dtype=f"datetime64[{'9' * 99}s]"),
    ),
    "a_time_divided_by_zero": (
        "To divide by zero in it",
        array_of([I(1)], bytes(8), type_of("Core.Int64"), dtype="timedelta64[s/0]"),
    ),
    "a_time_of_no_unit": (
        "To have it guess",
        array_of([I(1)], bytes(8), type_of("Core.Int64"), dtype="datetime64[parsec]"),
    ),
    "a_device_of_no_kind": ("To have a plugin looked up", array_of([I(1)], device="tpu")),
    "a_device_that_is_a_path": ("The same", array_of([I(1)], device="cuda:0/../../etc")),
    "a_device_of_negative_ordinal": ("To index from the end", array_of([I(1)], device="cuda:-1")),
    "a_device_of_ordinal_1000": ("More than there can be", array_of([I(1)], device="cuda:1000")),
    "a_device_in_other_digits": ("Digits that int() takes", array_of([I(1)], device="cuda:١")),
    "a_device_that_is_a_number": ("Not a tag", array_of([I(1)], device=5)),
    "a_list_shorter_than_its_shape": (
        "Elements that are not there",
        array_of([I(2), I(2)], ["a", "b"], type_of("Core.Any")),
    ),
    "a_list_of_endless_shape": (
        "To have room made for 2**40 elements",
        array_of([I(2**40)], [], type_of("Core.Any")),
    ),
    "unknown_elements_that_do_not_share_their_bytes": (
        "3 elements of an unknown type in 4 bytes",
        array_of([I(3)], b"abcd", type_of("Main.Unknown")),
    ),
    "a_bit_array_longer_than_its_bits": (
        "To read behind them",
        struct_of(
            "Base.BitArray",
            array_of([I(1)], bytes(8), type_of("Core.UInt64")),
            I(1000),
            tuple_of(I(1000)),
            params=(I(1),),
        ),
    ),
    "a_bit_array_of_endless_shape": (
        "0 times 2**122 bits",
        struct_of(
            "Base.BitArray",
            array_of([I(0)], b"", type_of("Core.UInt64")),
            I(0),
            tuple_of(I(0), I(2**61), I(2**61)),
            params=(I(3),),
        ),
    ),
    "a_row_major_array_of_endless_shape": (
        "To have the check of the sizes passed by in the other order",
        struct_of(
            "Base.PermutedDimsArrays.PermutedDimsArray",
            array_of([I(2**31), I(2**31)], b""),
            params=(type_of("Core.Float32"), I(2), tuple_of(I(2), I(1)), tuple_of(I(2), I(1)), ""),
        ),
    ),
}
for _name, (_what, _node) in TABLE.items():
    _register(_name, _what, _node)
