"""Structs that say they are a value which they are not."""

from __future__ import annotations

from typing import Any

import bson
from bson import Int64 as I

import gpustore as gs
from attacks.octets import array_of, dict_of, ref, struct_of, symbol, tuple_of, type_of
from attacks.registry import attack


def _register(name: str, what: str, node: Any, *errors: type[Exception]) -> None:
    def make() -> bytes:
        return bson.encode({"a": node})

    make.__doc__ = what
    attack(*errors, name=name)(make)


REFUSED: dict[str, tuple[str, Any]] = {
    "a_struct_without_type": ("What it is, nobody says", {"tag": "struct", "data": []}),
    "a_struct_of_a_number": ("A number for a type", {"tag": "struct", "type": I(1), "data": []}),
    "a_struct_without_data": ("Fields that are not there", {**struct_of("Main.A"), "data": None}),
    "a_symbol_without_name": ("A name that is not there", {"tag": "symbol"}),
    "a_symbol_that_is_a_number": ("A number for a name", {"tag": "symbol", "name": I(1)}),
    "a_tuple_of_a_number": ("A number for its parts", {"tag": "tuple", "data": I(1)}),
    "a_type_whose_name_is_text": ("A string is a sequence too", {**type_of("A"), "name": "Core"}),
    "a_type_whose_name_is_numbers": ("No name", {**type_of("A"), "name": [I(1)]}),
    "a_type_whose_parameters_are_a_number": ("No list", {**type_of("A"), "params": I(1)}),
    "a_moment_that_is_none": (
        "A text that is no date",
        struct_of("Dates.DateTime", I(1), python="never"),
    ),
    "a_layer_of_too_many_fields": (
        "A field that no Flux has",
        struct_of("Flux.Dense", *[None] * 99),
    ),
    "a_chain_of_a_number": ("A layer whose parts are none", struct_of("Flux.Chain", I(1))),
}
for _name, (_what, _node) in REFUSED.items():
    _register(_name, _what, _node, gs.FormatError)

KEPT: dict[str, tuple[str, Any]] = {
    "a_name_of_python": ("To have it imported", struct_of("builtins.eval", "1 / 0")),
    "a_name_of_the_system": ("To have it called", struct_of("Main.os.system", "touch x")),
    "a_name_of_julias_shell": ("What BSON.jl would call", struct_of("Base.run", "touch x")),
    "fields_of_python": (
        "To have attributes of the object replaced",
        struct_of("Main.A", I(1), I(2), fields=["__class__", "__dict__"]),
    ),
    "entries_of_python": (
        "The same for a NamedTuple",
        struct_of("Core.NamedTuple", I(1), params=(tuple_of(symbol("__class__")), I(1))),
    ),
    "a_range_of_step_zero": (
        "To divide by zero",
        struct_of("Base.StepRange", I(0), I(0), I(9), params=(type_of("Core.Int64"),) * 2),
    ),
    "a_range_without_end": (
        "To have its elements made",
        struct_of("Base.UnitRange", I(0), I(2**62), params=(type_of("Core.Int64"),)),
    ),
    "a_day_before_all_days": (
        "A date that Python has not",
        struct_of("Dates.Date", struct_of("Dates.UTInstant", struct_of("Dates.Day", I(-(2**62))))),
    ),
    "a_moment_after_all_moments": (
        "The same in milliseconds",
        struct_of("Dates.DateTime", struct_of("Dates.UTInstant", struct_of("A", I(2**52)))),
    ),
    "a_character_that_is_none": (
        "Bytes that are not UTF-8",
        {"tag": "struct", "type": type_of("Core.Char"), "data": b"\xff\xff\xff\xff"},
    ),
    "a_dict_of_lists": ("Keys that cannot be hashed", dict_of([[I(1)]], [I(1)])),
    "a_dict_of_fewer_values": ("Keys without values", dict_of(["a", "b"], [I(1)])),
    "a_dict_of_one_key_twice": ("To have one hidden", dict_of(["a", "a"], [0, 1])),
    "a_set_without_dictionary": ("Members of nothing", struct_of("Base.Set", None)),
    "a_named_tuple_of_one_name_twice": (
        "To have one hidden",
        struct_of(
            "Core.NamedTuple", 1, 2, params=(tuple_of(symbol("a"), symbol("a")), type_of("A"))
        ),
    ),
    "a_frame_of_no_columns": ("Names without columns", struct_of("DataFrames.DataFrame", [], None)),
    "an_array_of_nothings_without_end": (
        "Elements of no bytes, as many as one likes",
        array_of([I(2**40)], b"", type_of("Core.Nothing")),
    ),
    "an_order_of_dimensions_that_is_an_array": (
        "To have it compared element by element",
        struct_of(
            "Base.PermutedDimsArrays.PermutedDimsArray",
            array_of([I(2), I(2)], bytes(16)),
            params=(type_of("Core.Float32"), I(2), b"ab", b"ab", type_of("Core.Any")),
        ),
    ),
    "an_order_of_dimensions_that_holds_an_array": (
        "The same, one level down",
        struct_of(
            "Base.PermutedDimsArrays.PermutedDimsArray",
            array_of([I(2), I(2)], bytes(16)),
            params=(type_of("Core.Float32"), I(2), tuple_of(b"ab", I(1)), I(1), I(1)),
        ),
    ),
    "a_dict_whose_type_holds_an_array": (
        "The same in a type that is compared with the usual one",
        struct_of("Base.Dict", [], [], params=(tuple_of(b"ab"), tuple_of(b"ab"))),
    ),
    "an_array_of_unknown_elements": (
        "Memory of a type that nobody knows",
        array_of([I(2)], b"abcd", type_of("Main.Unknown")),
    ),
}
for _name, (_what, _node) in KEPT.items():
    _register(_name, _what, _node)


@attack(gs.DeviceDataLostError, uses=("loaded",))
def a_pointer_whose_rank_is_an_array():
    """A number of dimensions that is no number but compares with one, element by element."""
    params = (type_of("Core.Float32"), b"ab")
    lost = struct_of("CUDA.CuArray", tuple_of(I(2), I(3)), tuple_of(I(1), I(2)), params=params)
    return bson.encode({"a": lost})


@attack(gs.FormatError)
def a_file_that_is_a_symbol_without_name():
    """The outermost document as the value."""
    return bson.encode({"tag": "symbol"})


@attack(gs.EntryNotFoundError, gs.FormatError, uses=("asked for a",))
def a_file_that_is_a_list_of_itself():
    """An outermost value that has no entries."""
    return bson.encode({"tag": "tuple", "data": [ref(1)], "_backrefs": ["x"]})
