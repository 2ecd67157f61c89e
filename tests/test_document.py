"""Bytes <-> neutral document, without Julia."""

from __future__ import annotations

import struct

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpustore import document, testing
from gpustore.digest import blake3_digest
from gpustore.document import Payload, Slot, plan, scan
from gpustore.encoder import Encoder
from gpustore.errors import FormatError, TruncatedFileError, UnsupportedValueError


def file_bytes(content: dict) -> bytearray:
    """Put a plan together in memory, digests left at zero."""
    laid_out = plan(content, writer="test")
    whole = bytearray()
    for index, structure in enumerate(laid_out.structures):
        whole += structure
        if index < len(laid_out.payloads):
            for chunk in laid_out.payloads[index].chunks():
                whole += chunk
    assert len(whole) == laid_out.nbytes
    return whole


def without_stamp(content: dict) -> dict:
    return {key: value for key, value in content.items() if key != "_gpustore"}


@given(testing.documents(), st.sampled_from([0, 1, 40, document.SLOT_NBYTES]))
def test_scan_of_a_plan_gives_the_document_back(content, slot_nbytes):
    buffer = bytes(file_bytes(content))

    def filled(node):
        if isinstance(node, Slot):
            return buffer[node.offset : node.offset + node.nbytes]
        if isinstance(node, dict):
            return {key: filled(child) for key, child in node.items()}
        return [filled(child) for child in node] if isinstance(node, list) else node

    found = filled(scan(buffer, slot_nbytes=slot_nbytes))
    assert repr(without_stamp(found)) == repr(content)


@given(testing.documents())
def test_the_encoder_is_equal_to_pymongos(content):
    encoder = Encoder()
    encoder.document(content)
    assert bytes(encoder.segment) == bson.encode(content)


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 65, 2**16, 2**20 - 1, 2**20, 2**20 + 1])
@pytest.mark.parametrize("lead", range(0, 70, 7))
def test_payloads_are_aligned_to_64_bytes_and_to_pages_from_one_mebibyte_on(nbytes, lead):
    zeros = bytes(nbytes)
    content = {"lead": "x" * lead, "a": {"data": Payload(nbytes, lambda: [zeros])}}
    found = scan(bytes(file_bytes(content)), slot_nbytes=0)
    slot = found["a"]["data"]
    assert slot.nbytes == nbytes
    assert slot.offset % (64 if nbytes < 2**20 else 4096) == 0
    assert "blake3" in found["a"] and list(found)[-1] == "_gpustore"


def test_small_documents_are_the_same_whether_walked_or_decoded_by_the_codec():
    content = {"a": [1, 2.5, None, True, "x", b"raw", {"b": [[]]}], "é": document.int64()(7)}
    encoded = bson.encode(content)
    assert repr(scan(encoded, slot_nbytes=10**6)) == repr(content)


@given(testing.documents(), st.data())
def test_truncated_length_raises_truncated_file_error(content, data):
    buffer = bytes(file_bytes(content))
    length = data.draw(st.integers(0, len(buffer) - 1))
    with pytest.raises(TruncatedFileError):
        scan(buffer[:length])


def test_what_follows_the_document_is_ignored():
    assert scan(bson.encode({"a": 1}) + b"rest") == {"a": 1}


def test_a_length_of_minus_one_ends_at_the_terminator():
    buffer = bytearray(bson.encode({"a": {"b": b"1234"}, "c": [1]}))
    struct.pack_into("<i", buffer, 0, -1)
    struct.pack_into("<i", buffer, buffer.index(b"\x03a\0") + 3, -1)
    assert scan(bytes(buffer)) == {"a": {"b": b"1234"}, "c": [1]}


def _patched(offset: int, value: int) -> bytes:
    buffer = bytearray(bson.encode({"a": b"12345678", "s": "text", "d": {"x": 1}}))
    struct.pack_into("<i", buffer, offset, value)
    return bytes(buffer)


@pytest.mark.parametrize("slot_nbytes", [0, document.SLOT_NBYTES])
@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (b"", TruncatedFileError),
        (b"\x05\0\0", TruncatedFileError),
        (struct.pack("<i", 4), FormatError),
        (struct.pack("<i", -2) + b"\0", FormatError),
        (_patched(7, 2**30), FormatError),  # a binary longer than its document
        (_patched(7, -1), FormatError),
        (_patched(23, 0), FormatError),  # a string without a terminator
        (bson.encode({"a": 1})[:-1] + b"\x01", FormatError),  # no end of document
        (b"\x0c\0\0\0\x99a\0\0\0\0\0\0", FormatError),  # no such element type
        (b"\x0c\0\0\0\x10\xff\0\1\0\0\0\0", FormatError),  # a name that is not UTF-8
    ],
)
def test_malformed_bytes_raise_typed_errors(buffer, error, slot_nbytes):
    with pytest.raises(error):
        scan(buffer, slot_nbytes=slot_nbytes)


def test_documents_nested_too_deep_are_refused():
    buffer = b"\0"
    for _ in range(document.MAX_DEPTH + 2):
        body = b"\x03a\0" + struct.pack("<i", len(buffer) + 4) + buffer
        buffer = body + b"\0"
    whole = struct.pack("<i", len(buffer) + 4) + buffer
    with pytest.raises(FormatError, match="nested deeper than"):
        scan(whole, slot_nbytes=0)


def test_mongodb_element_types_are_named():
    buffer = bson.encode({"_id": bson.ObjectId()})
    with pytest.raises(FormatError, match="ObjectId.*MongoDB"):
        scan(buffer, slot_nbytes=0)


def test_a_key_with_a_nul_character_is_refused():
    with pytest.raises(UnsupportedValueError, match="NUL"):
        plan({"a\0b": 1}, writer="test")


def test_blake3_has_the_official_value_for_the_empty_input():
    assert blake3_digest(b"").hex().startswith("af1349b9f5f9a1a6a0404dea36dcc949")


@pytest.mark.parametrize("names", [(b"10", b"11"), (b"0", b"0")])
def test_an_array_is_read_whatever_its_elements_are_called(names):
    """BSON.jl ignores their names: numbers from 10 on, and one name for all."""
    body = b"".join(b"\x10%b\0\x01\0\0\0" % name for name in names)
    inner = struct.pack("<i", len(body) + 5) + body + b"\0"
    outer = struct.pack("<i", len(inner) + 8) + b"\x04a\0" + inner + b"\0"
    assert scan(outer) == scan(outer, slot_nbytes=0) == {"a": [1, 1]}
    assert scan(outer, slot_nbytes=len(outer)) == {"a": [1, 1]}


@given(testing.documents())
def test_the_parts_of_a_document_are_those_of_the_whole(content):
    whole = file_bytes(content)
    parts = document.parts(whole)
    assert parts is not None and list(parts) == [*content, "_gpustore"]
    assert repr(parts.document(*parts)) == repr(scan(whole))
    for key in content:
        assert repr(parts.document(key, "absent")) == repr({key: scan(whole)[key]})


def test_a_document_of_many_or_long_parts_is_scanned():
    assert document.parts(bson.encode({str(n): n for n in range(300)})) is None
    assert document.parts(file_bytes({"a": Payload(5, lambda: [b"12345"])})) is not None
    detached = plan(
        {"a": {"tag": "array", "data": Payload(9, lambda: [bytes(9)])}},
        writer="t",
        layout="detached",
    )
    assert document.parts(detached.structures[0]) is None
    twice = bson.encode({"a": 1, "b": 2}).replace(b"b\0", b"a\0")
    assert document.parts(twice) is None
