"""What a hostile file tries: one generator per attack, and the typed error it ends in.

The files are made byte by byte, as no writer would make them. docs/security.md has the promises.
"""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

import gpustore as gs

ATTACKS = {}


def attack(*errors):
    """Register a generator of a file; one of the errors is what loading it raises."""

    def register(function):
        ATTACKS[function.__name__] = (function, errors)
        return function

    return register


# --- BSON, byte by byte -----------------------------------------------------------------------


def document(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return struct.pack("<i", len(body) + 5) + body + b"\0"


def element(kind: int, name: str, value: bytes) -> bytes:
    return bytes([kind]) + name.encode() + b"\0" + value


def text(name: str, value: str) -> bytes:
    encoded = value.encode() + b"\0"
    return element(2, name, struct.pack("<i", len(encoded)) + encoded)


def binary(name: str, value: bytes, *, nbytes: int | None = None, subtype: int = 0) -> bytes:
    length = len(value) if nbytes is None else nbytes
    return element(5, name, struct.pack("<iB", length, subtype) + value)


def integer(name: str, value: int) -> bytes:
    return element(18, name, struct.pack("<q", value))


def elements(*values: bytes) -> bytes:
    return document(*values)


def datatype(name: str, *path: str) -> bytes:
    names = elements(*(text(str(index), part) for index, part in enumerate(path)))
    parts = text("tag", "datatype"), element(4, "name", names), element(4, "params", elements())
    return element(3, name, document(*parts))


def array(name: str, sizes: list[int], data: bytes, *more: bytes) -> bytes:
    size = elements(*(integer(str(index), n) for index, n in enumerate(sizes)))
    kind = datatype("type", "Core", "Float32")
    parts = text("tag", "array"), kind, element(4, "size", size), data, *more
    return element(3, name, document(*parts))


def backref(name: str, number: int) -> bytes:
    return element(3, name, document(text("tag", "backref"), integer("ref", number)))


def nested(depth: int, kind: int = 3) -> bytes:
    heads = [struct.pack("<i", 5 + 8 * (depth - i)) + bytes([kind]) + b"0\0" for i in range(depth)]
    return b"".join(heads) + document() + bytes(depth)


PAD = binary("pad", bytes(70_000))  # beside it a document is scanned, not decoded whole


# --- lengths ----------------------------------------------------------------------------------


@attack(gs.TruncatedFileError, gs.FormatError)
def a_document_that_claims_two_gibibytes():
    """To have memory set aside for a length that the file does not have."""
    return struct.pack("<i", 2**31 - 1) + element(1, "a", bytes(8)) + b"\0"


@attack(gs.FormatError)
def a_document_of_negative_length():
    """To move a cursor backwards."""
    return document(element(3, "a", struct.pack("<i", -17) + b"\0"), PAD)


@attack(gs.FormatError)
def a_document_longer_than_its_parent():
    """To read the parent's neighbours as its own."""
    return document(element(3, "a", struct.pack("<i", 2**30) + b"\0"), PAD)


@attack(gs.FormatError)
def a_binary_of_negative_length():
    return document(binary("a", b"", nbytes=-1), PAD)


@attack(gs.FormatError)
def a_binary_longer_than_the_file():
    return document(PAD, binary("a", b"abc", nbytes=2**31 - 1))


@attack(gs.FormatError)
def a_string_of_length_zero():
    """To have the byte before it taken for its terminator."""
    return document(element(2, "a", struct.pack("<i", 0)), PAD)


@attack(gs.FormatError)
def a_string_without_terminator():
    return document(element(2, "a", struct.pack("<i", 3) + b"abc"), PAD)


@attack(gs.FormatError)
def a_name_without_end():
    """To have the whole file searched for a NUL, again and again."""
    return document(element(1, "n" * 100_000, bytes(8)), PAD)


@attack(gs.FormatError, gs.TruncatedFileError)
def a_document_without_terminator():
    return document(PAD, element(10, "a", b""))[:-1] + b"\1"


@attack(gs.FormatError)
def documents_nested_a_hundred_thousand_deep():
    """To overflow a stack."""
    return nested(100_000)


@attack(gs.FormatError)
def arrays_nested_beyond_the_limit():
    return document(element(4, "a", nested(20_000, kind=4)), PAD)


# --- names and text ---------------------------------------------------------------------------


@attack(gs.FormatError)
def an_entry_given_twice():
    """To show one value to a reviewer and another to the program."""
    return document(text("a", "harmless"), text("a", "other"))


@attack(gs.FormatError)
def an_entry_given_twice_in_a_large_file():
    return document(text("a", "harmless"), PAD, text("a", "other"))


@attack(gs.FormatError)
def a_key_given_twice_deep_inside():
    inner = document(
        element(4, "l", elements(element(3, "0", document(text("b", ""), text("b", "")))))
    )
    return document(element(3, "a", inner))


@attack(gs.FormatError)
def text_that_is_not_utf8():
    return document(element(2, "a", struct.pack("<i", 3) + b"\xff\xfe\0"))


@attack(gs.FormatError)
def a_name_that_is_not_utf8():
    return document(b"\x0a\xff\xfe\0", PAD)


# --- kinds ------------------------------------------------------------------------------------


@attack(gs.FormatError)
def javascript():
    """Code in a type that MongoDB runs."""
    return document(element(13, "a", struct.pack("<i", 2) + b"1\0"))


@attack(gs.FormatError)
def a_binary_of_another_subtype():
    return document(binary("a", bytes(16), subtype=4), PAD)


@attack(gs.FormatError)
def an_element_of_no_type():
    return document(element(0x42, "a", b""), PAD)


# --- arrays -----------------------------------------------------------------------------------


@attack(gs.FormatError)
def an_array_of_no_bytes_and_endless_shape():
    """0 times 2**62: nothing to store, much to walk."""
    return document(array("a", [0, 2**62], binary("data", b"")))


@attack(gs.FormatError)
def an_array_whose_size_overflows():
    """2**32 times 2**32 times 4 bytes is 0 in 64 bits."""
    return document(array("a", [2**32, 2**32], binary("data", b"")))


@attack(gs.FormatError)
def an_array_of_negative_size():
    return document(array("a", [-1, -4], binary("data", bytes(16))))


@attack(gs.FormatError)
def an_array_of_ten_thousand_dimensions():
    return document(array("a", [1] * 10_000, binary("data", bytes(4))))


@attack(gs.FormatError)
def an_array_larger_than_its_data():
    """To read what lies behind it."""
    return document(array("a", [1000], binary("data", bytes(4))))


@attack(gs.FormatError)
def a_digest_of_three_bytes():
    return document(array("a", [1], binary("data", bytes(4)), binary("blake3", b"abc")))


@attack(gs.FormatError)
def a_device_of_a_huge_ordinal():
    tag = text("device", "cuda:" + "9" * 5000)
    return document(array("a", [1], binary("data", bytes(4)), tag))


@attack(gs.FormatError)
def a_row_whose_third_array_claims_more_than_it_has():
    """A row is checked by columns: one that differs must not be taken for its neighbours."""
    data = binary("data", bytes(8))
    rows = [
        array(f"a{i}", [1000 if i == 3 else 2], data, binary("blake3", bytes(32))) for i in range(9)
    ]
    return document(PAD, *rows)


def detached(offset: int, nbytes: int) -> bytes:
    data = element(3, "data", document(integer("offset", offset), integer("nbytes", nbytes)))
    stamp = element(3, "_gpustore", document(integer("version", 1), text("layout", "detached")))
    whole = document(array("a", [nbytes // 4], data), stamp)
    return whole + bytes(4096)


@attack(gs.FormatError)
def a_detached_array_inside_the_document():
    """To read the structure as values."""
    return detached(0, 64)


@attack(gs.TruncatedFileError)
def a_detached_array_behind_the_file():
    return detached(2**62, 64)


@attack(gs.FormatError)
def a_detached_array_at_a_negative_offset():
    return detached(-64, 64)


@attack(gs.FormatError)
def a_detached_array_out_of_line():
    return detached(1025, 64)


# --- references -------------------------------------------------------------------------------


@attack(gs.FormatError)
def a_backref_to_itself():
    return document(backref("a", 1), element(4, "_backrefs", elements(backref("0", 1))))


@attack(gs.FormatError)
def backrefs_in_a_circle():
    refs = elements(backref("0", 2), backref("1", 3), backref("2", 1))
    return document(backref("a", 1), element(4, "_backrefs", refs))


@attack(gs.FormatError)
def a_backref_to_number_zero():
    """0 is the last one for who subtracts 1."""
    return document(backref("a", 0), element(4, "_backrefs", elements(text("0", "x"))))


@attack(gs.FormatError)
def a_backref_of_huge_number():
    return document(backref("a", 2**63 - 1), element(4, "_backrefs", elements()))


@attack(gs.FormatError)
def a_tuple_that_contains_itself():
    """A tuple is immutable: it cannot be made before its parts."""
    inner = element(4, "data", elements(backref("0", 1)))
    refs = elements(element(3, "0", document(text("tag", "tuple"), inner)))
    return document(backref("a", 1), element(4, "_backrefs", refs))


# --- tests ------------------------------------------------------------------------------------


USES = {
    "loaded": lambda path: gs.load(path, device="cpu"),
    "verified": lambda path: gs.load(path, device="cpu", verify=True),
    "opened": lambda path: gs.open_file(path).value(),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("use", ["loaded", "verified", "opened"])
def test_an_attack_ends_in_a_typed_error(tmp_path, name, use):
    make, errors = ATTACKS[name]
    path = tmp_path / "hostile.bson"
    path.write_bytes(make())
    found = (*errors, gs.IntegrityError) if use == "verified" else errors
    tracemalloc.start()
    try:
        with pytest.raises(found):
            USES[use](path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * path.stat().st_size + 2**20


def doubling(count: int) -> bytes:
    """Lists of two references to the list before: 2**count values, told apart by nobody."""
    lists = [element(4, "0", elements(text("0", "lol")))]
    for number in range(1, count):
        lists.append(element(4, str(number), elements(backref("0", number), backref("1", number))))
    return document(backref("a", count), element(4, "_backrefs", elements(*lists)))


@pytest.mark.timeout(20)
def test_lists_that_double_stay_shared(tmp_path):
    path = tmp_path / "doubling.bson"
    path.write_bytes(doubling(60))
    value = gs.load(path, "a")
    assert value[0] is value[1]
    gs.save(path, a=value)
    assert path.stat().st_size < 20_000


@pytest.mark.timeout(20)
def test_what_follows_the_document_is_not_looked_at(tmp_path):
    path = tmp_path / "trailing.bson"
    path.write_bytes(document(text("a", "x")) + b"\xff" * 1000)
    assert gs.load(path) == {"a": "x"}


def test_a_name_in_a_file_imports_and_calls_nothing(tmp_path, monkeypatch):
    """BSON.jl calls the constructor that a file names; here it is a name and stays one."""
    called = []
    monkeypatch.setattr("os.system", called.append)
    path = tmp_path / "constructor.bson"
    command = element(4, "data", elements(text("0", "touch x")))
    for names in (
        ("os", "system"),
        ("Main", "os", "system"),
        ("Base", "run"),
        ("builtins", "eval"),
    ):
        kind = datatype("type", *names)
        path.write_bytes(document(element(3, "a", document(text("tag", "struct"), kind, command))))
        assert isinstance(gs.load(path, "a"), gs.julia.Struct)
    assert not called


def test_values_behind_an_array_are_not_reached(tmp_path):
    path = tmp_path / "views.bson"
    gs.save(path, a=np.zeros(2**15, "f4"), secret=np.ones(2**15, "f4"))
    array = gs.load(path, "a")
    assert array.base is not None and array.nbytes == 2**17
    with pytest.raises(IndexError):
        array[2**15]
