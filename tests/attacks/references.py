"""Backrefs: to nothing, to themselves, in circles, and where none is followed."""

from __future__ import annotations

from typing import Any

import bson

import gpustore as gs
from attacks.octets import (
    PAD,
    array_of,
    backref,
    dict_of,
    document,
    element,
    ref,
    struct_of,
    text,
    tuple_of,
)
from attacks.registry import attack


def file_of(value: Any, *backrefs: Any) -> bytes:
    return bson.encode({"a": value, "_backrefs": list(backrefs)})


@attack(gs.FormatError)
def a_backref_to_itself():
    """To be followed for ever."""
    return file_of(ref(1), ref(1))


@attack(gs.FormatError)
def backrefs_in_a_circle():
    """The same over three of them."""
    return file_of(ref(1), ref(2), ref(3), ref(1))


@attack(gs.FormatError)
def a_backref_to_number_zero():
    """0 is the last one for who subtracts 1."""
    return file_of(ref(0), "x")


@attack(gs.FormatError)
def a_backref_to_a_negative_number():
    """The same."""
    return file_of(ref(-1), "x")


@attack(gs.FormatError)
def a_backref_of_huge_number():
    """To index out of the list."""
    return file_of(ref(2**63 - 1))


@attack(gs.FormatError)
def a_backref_of_half_a_number():
    """A float as an index."""
    return file_of({"tag": "backref", "ref": 1.5}, "x", "y")


@attack(gs.FormatError)
def a_backref_that_is_true():
    """True is a 1 in Python."""
    return file_of({"tag": "backref", "ref": True}, "x")


@attack(gs.FormatError)
def a_backref_without_number():
    """To have it taken for a dict here and for a reference there."""
    return file_of(tuple_of({"tag": "backref"}, {"tag": "symbol", "name": {"tag": "backref"}}))


@attack(gs.FormatError)
def backrefs_that_are_no_list():
    """A document for a list."""
    return bson.encode({"a": ref(1), "_backrefs": {"0": "x"}})


@attack(gs.FormatError)
def a_tuple_that_contains_itself():
    """A tuple is immutable: it cannot be made before its parts."""
    return file_of(ref(1), tuple_of(ref(1)))


@attack(gs.FormatError)
def a_tuple_that_is_its_own_list():
    """The same by the list of its parts."""
    return file_of({"tag": "tuple", "data": ref(1)}, [{"tag": "tuple", "data": ref(1)}])


@attack(gs.FormatError)
def a_type_that_is_its_own_parameter():
    """A type that cannot be named."""
    kind = {"tag": "datatype", "name": ["Core", "Array"], "params": [ref(1)]}
    return file_of(array_of([], kind=ref(1)), kind)


@attack(gs.FormatError)
def a_set_that_contains_itself():
    """A member must be hashed before the set is made."""
    inner = dict_of([ref(1)], [None])
    return file_of(ref(1), tuple_of(struct_of("Base.Set", inner), ref(1)))


@attack(gs.FormatError)
def references_twenty_thousand_deep():
    """Lists within lists, each by a backref, to overflow a stack."""
    refs = (element(4, str(n), document(backref("0", n + 2))) for n in range(20_000))
    last = element(4, "20000", document())
    return document(backref("a", 1), element(4, "_backrefs", document(*refs, last)))


@attack()
def a_list_that_contains_itself():
    """A cycle of Julia's, which is one here."""
    return file_of(ref(1), [ref(1), ref(1)])


@attack()
def an_entry_named_backrefs_within():
    """The table of the file is at the top only."""
    return document(
        PAD, element(3, "a", document(element(4, "_backrefs", document()))), text("b", "")
    )
