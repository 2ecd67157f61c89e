"""Few bytes that stand for much work or memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import bson
import numpy as np
from bson import Int64 as I

import gpustore as gs
from attacks.octets import (
    array,
    array_of,
    backref,
    binary,
    dict_of,
    document,
    element,
    ref,
    struct_of,
    symbol,
    text,
    tuple_of,
    type_of,
)
from attacks.registry import attack
from gpustore.digest import blake3_digest

UINT64 = type_of("Core.UInt64")


def doubled(make: Callable[[Any], Any], first: Any, count: int = 60) -> list[Any]:
    """Return backrefs of which each holds the one before twice: 2**count values."""
    return [first, *(make(ref(number)) for number in range(1, count))]


# --- sharing ---


@attack()
def lists_that_double():
    """Lists of two references to the list before: 2**60 values, told apart by nobody."""
    lists = [element(4, "0", document(text("0", "lol")))]
    for number in range(1, 60):
        lists.append(element(4, str(number), document(backref("0", number), backref("1", number))))
    return document(backref("a", 60), element(4, "_backrefs", document(*lists)))


@attack()
def types_that_double():
    """Types of two parameters, each the type before, as the element type of an array."""
    types = doubled(lambda before: type_of("A", before, before), type_of("A"))
    return bson.encode({"a": array_of([], b"", ref(60)), "_backrefs": types})


@attack(gs.FormatError)
def types_that_double_in_an_error():
    """The same in a document that is refused: the message must not spell the type."""
    types = doubled(lambda before: type_of("A", before, before), type_of("A"))
    value = array_of([I(1)], b"a", ref(60), dtype="float8_e5m2")
    return bson.encode({"a": value, "_backrefs": types})


@attack(gs.FormatError)
def tuples_that_double_in_an_error():
    """The same with a tuple where a type belongs."""
    tuples = doubled(lambda before: tuple_of(before, before), tuple_of("lol"))
    return bson.encode({"a": array_of([I(1)], b"a", ref(60)), "_backrefs": tuples})


@attack(gs.FormatError)
def tuples_that_double_for_a_type_of_struct():
    """The same for a struct."""
    tuples = doubled(lambda before: tuple_of(before, before), tuple_of("lol"))
    value = {"tag": "struct", "type": ref(60), "data": []}
    return bson.encode({"a": value, "_backrefs": tuples})


@attack()
def types_that_double_twice_as_keys():
    """Two towers of equal types as keys of one dict: they must not be compared part by part."""
    towers = doubled(lambda before: type_of("A", before, before), type_of("A"), 30)
    again = doubled(lambda before: type_of("A", *[ref(before["ref"] + 30)] * 2), type_of("A"), 30)
    value = dict_of([ref(30), ref(60)], [1, 2])
    return bson.encode({"a": value, "_backrefs": [*towers, *again]})


@attack(gs.FormatError)
def tuples_that_double_twice_as_keys():
    """The same with tuples."""
    towers = doubled(lambda before: tuple_of(before, before), tuple_of("x"), 30)
    again = doubled(lambda before: tuple_of(*[ref(before["ref"] + 30)] * 2), tuple_of("x"), 30)
    value = dict_of([ref(30), ref(60)], [1, 2])
    return bson.encode({"a": value, "_backrefs": [*towers, *again]})


@attack()
def closures_that_double():
    """Documents that are kept as they came, each of two of the one before."""
    kept = doubled(
        lambda before: {"tag": "unionall", "body": before, "var": before},
        {"tag": "svec", "data": []},
    )
    return bson.encode({"a": ref(60), "_backrefs": kept})


@attack()
def a_chain_of_backrefs():
    """5,000 backrefs, each to the next, and 5,000 references into them."""
    count = 5_000
    chain = [*(ref(number + 2) for number in range(count)), "end"]
    return bson.encode({"a": [ref(number + 1) for number in range(count)], "_backrefs": chain})


# --- one list as the parts of many ---


def _register(name: str, what: str, many: Any, shared: Any) -> None:
    @functools.wraps(_register)
    def make() -> bytes:
        return bson.encode({"a": [many] * 1_000, "_backrefs": [shared]})

    make.__doc__ = what
    attack(gs.FormatError, name=name)(make)


_NOTHINGS: list[Any] = [None] * 30_000
_NUMBERS = [I(n) for n in range(10_000)]
_WORDS = [str(n) for n in range(10_000)]
_register(
    "tuples_of_one_list", "1,000 tuples of 30,000", {"tag": "tuple", "data": ref(1)}, _NOTHINGS
)
_register(
    "structs_of_one_list", "The same of structs", {**struct_of("A"), "data": ref(1)}, _NOTHINGS
)
_register("types_of_one_list", "The same of types", {**type_of("A"), "params": ref(1)}, _NUMBERS)
_register(
    "primitives_of_one_binary",
    "1,000 structs of 60,000 bytes",
    {**struct_of("A"), "data": ref(1)},
    bytes(60_000),
)
_register(
    "arrays_of_one_binary", "1,000 arrays of them", array_of([I(15_000)], ref(1)), bytes(60_000)
)
_register("dicts_of_one_list", "1,000 dicts of 10,000", dict_of(ref(1), ref(1)), _WORDS)
_register(
    "typed_dicts_of_one_list",
    "The same of other dicts",
    dict_of(ref(1), ref(1), "Base.IdDict"),
    _WORDS,
)
_register(
    "typed_dicts_of_one_array",
    "The same where keys and values are arrays",
    struct_of("Base.Dict", ref(1), ref(1), params=(type_of("Core.Int64"),) * 2),
    array_of([I(10_000)], np.arange(10_000).tobytes(), type_of("Core.Int64")),
)
_register(
    "sets_of_one_list",
    "The same of sets",
    struct_of(
        "Base.Set",
        struct_of("Base.Dict", ref(1), None, params=(type_of("Core.Any"), type_of("Core.Nothing"))),
        params=(type_of("Core.Any"),),
    ),
    _WORDS,
)
_register(
    "bit_arrays_of_one_array",
    "1,000 arrays of 400,000 bits",
    struct_of("Base.BitArray", ref(1), I(400_000), tuple_of(I(400_000)), params=(I(1),)),
    array_of([I(6_250)], bytes(50_000), UINT64),
)


@attack()
def row_major_arrays_of_one_parent():
    """1,000 PermutedDimsArrays of one array: as in Julia, all of them are its memory."""
    turned = tuple_of(I(2), I(1))
    params = (type_of("Core.Float32"), I(2), turned, turned, type_of("Core.Any"))
    many = struct_of("Base.PermutedDimsArrays.PermutedDimsArray", ref(1), params=params)
    shared = array_of([I(100), I(150)], bytes(60_000))
    return bson.encode({"a": [many] * 1_000, "_backrefs": [shared]})


# --- work that grows faster than the file ---


@attack()
def paths_that_add_up():
    """Twenty keys of 60,000 bytes, one below the other, around 5,000 lists."""
    value: Any = [[] for _ in range(5_000)]
    for _ in range(20):
        value = {"k" * 60_000: value}
    return bson.encode({"a": value})


@attack()
def paths_of_arrays_that_add_up():
    """The same around 2,000 arrays, whose paths `open_file` lists."""
    value: Any = [array_of([I(1)]) for _ in range(2_000)]
    for _ in range(20):
        value = {"\1" * 60_000: value}
    return bson.encode({"a": value})


@attack(gs.DeviceDataLostError, uses=("loaded",))
def paths_of_lost_arrays_that_add_up():
    """The same around 2,000 arrays of a GPU, whose paths the error names."""
    value: Any = [struct_of("CuArrays.CuArray") for _ in range(2_000)]
    for _ in range(20):
        value = {"\1" * 60_000: value}
    return bson.encode({"a": value})


def alternating(run: int) -> bytes:
    """Return arrays as long as their neighbours whose shape changes after each `run` of them."""
    data = bytes(24)
    digest = binary("blake3", blake3_digest(data))
    shapes = ([2, 3], [3, 2])
    return document(
        *(array(f"{n:05}", shapes[n // run % 2], binary("data", data), digest) for n in range(1500))
    )


@attack(uses=("loaded", "opened"))
def arrays_that_are_almost_rows():
    """Each begins a row for who looks at its head, and none does."""
    return alternating(1)


@attack(uses=("loaded", "opened"))
def arrays_in_rows_of_four():
    """The same where each four are a row."""
    return alternating(4)


@attack()
def siblings_of_one_size_within_one_another():
    """Each may be what the other is read by, and so may those in it; they differ in a text."""
    count = itertools.count()

    def pair(depth: int) -> dict[str, Any]:
        node = struct_of("Main.Pair", blake3=bytes(32))
        if depth == 0:
            return node | {"text": f"{next(count):08}"}
        return node | {"left": pair(depth - 1), "right": pair(depth - 1)}

    return bson.encode({"a": pair(11)})


@attack()
def chains_of_documents_of_one_size():
    """Each of a chain may be what that of the other chain is read by; they differ in a text."""

    def chain(mark: str, depth: int = 90) -> dict[str, Any]:
        flags = {f"k{number:05}": True for number in range(2_000)}
        node: dict[str, Any] = {**flags, "mark": mark, "blake3": bytes(32)}
        for _ in range(depth):
            node = {"mark": mark, "inner": node}
        return node

    return bson.encode({f"c{number}": chain(str(number)) for number in range(4)})


@attack()
def rows_of_rows_that_are_none():
    """Lists of 24 documents of one size whose last bytes differ, within one another."""
    count = itertools.count()

    def rows(depth: int) -> Any:
        if depth == 0:
            return {"tag": "mine", "padding": "a" * 60, "last": f"{next(count):08}"}
        return {"tag": "mine", "rows": [rows(depth - 1) for _ in range(24)]}

    return bson.encode({"a": rows(3)})


@attack(gs.IntegrityError, uses=("verified",))
def a_thousand_arrays_of_wrong_digests():
    """To have the file searched anew for the name of each."""
    digest = binary("blake3", bytes(32))
    return document(
        *(array(f"{n}", [n], binary("data", bytes(4 * n)), digest) for n in range(1000))
    )


_P = 2**61 - 1  # Python's hash of a number is its remainder


@attack()
def complex_keys_of_one_hash():
    """8,000 keys of a dict that all have the hash 0: each is compared with all before it."""
    numbers = np.arange(8_000, dtype=np.float64)
    keys = (numbers * 1000003 - 1j * numbers).astype("<c16")
    kind = type_of("Base.Complex", type_of("Core.Float64"))
    members = array_of([I(8_000)], keys.tobytes(), kind)
    value = struct_of("Base.Dict", members, [None] * 8_000, params=(kind, type_of("Core.Any")))
    return bson.encode({"a": value})


@attack()
def wide_members_of_one_hash():
    """The same with members of a set that are multiples of Python's modulus."""
    wide = type_of("Core.UInt128")
    members = [
        {"tag": "struct", "type": wide, "data": (_P * n).to_bytes(16, "little")}
        for n in range(3_000)
    ]
    params = (type_of("Core.Any"), type_of("Core.Nothing"))
    inner = struct_of("Base.Dict", members, None, params=params)
    return bson.encode({"a": struct_of("Base.Set", inner, params=(type_of("Core.Any"),))})


# --- the smallest things that cost the most ---


@attack()
def empty_documents():
    """10,000 of 7 bytes each."""
    return document(element(4, "a", document(*[element(3, "", document())] * 10_000)))


@attack()
def empty_arrays():
    """The same of lists."""
    return document(element(4, "a", document(*[element(4, "", document())] * 10_000)))


@attack()
def tiny_backrefs():
    """10,000 references to one value."""
    many = [backref("", 1)] * 10_000
    return document(element(4, "a", document(*many)), element(4, "_backrefs", document(b"\x0a\0")))


@attack()
def tiny_symbols():
    """Values that are smaller in the file than in memory."""
    return bson.encode({"a": [symbol("") for _ in range(4_000)]})


@attack()
def tiny_structs():
    """Values that are smaller in the file than in memory."""
    return bson.encode({"a": [struct_of("A") for _ in range(3_000)]})


@attack()
def tiny_arrays():
    """Values that are smaller in the file than in memory."""
    return bson.encode({"a": [array_of([], bytes(4)) for _ in range(3_000)]})
