"""Julia's anonymous functions: read, rendered, run as Julia runs them, and kept within limits."""

from __future__ import annotations

import collections
import contextlib
import copy
import gzip
import math
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import allowlist, calls, interpret, limits, listing, tree
from gpustore.code import SSA, Code, Constant, Expr, Global, Goto, Method, Slot
from gpustore.julia import OpaqueDocument, OpaqueFunction

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "julia"
WILD = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "wild"
CASES = gs.load(FIXTURES / "code_julia15.bson")  # each with arguments and what Julia 1.5 gave
with tempfile.TemporaryDirectory() as _folder:
    _file = Path(_folder) / "semantics.bson"
    _file.write_bytes(gzip.decompress((FIXTURES / "code_julia15_semantics.bson.gz").read_bytes()))
    _more = gs.load(_file, mmap=False)
CASES = {part: CASES[part] | _more[part] for part in CASES}
NETWORKS = FIXTURES / "code_julia15_networks.bson.gz"  # of Flux 0.12.1 and NNlib 0.7.14


def same(found, expected):
    if isinstance(expected, dict):
        return list(found) == list(expected) and same(list(found.values()), list(expected.values()))
    if isinstance(expected, (tuple, list)):
        return (
            isinstance(found, (tuple, list))
            and len(found) == len(expected)
            and all(map(same, found, expected))
        )
    if expected is None or isinstance(expected, str):
        return found == expected
    found, expected = np.asarray(found), np.asarray(expected)
    is_alike = found.shape == expected.shape and found.dtype == expected.dtype
    return is_alike and np.allclose(found, expected, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", sorted(CASES["functions"]))
def test_a_function_gives_what_julia_gave(name):
    args, expected = CASES["cases"][name]
    before = copy.deepcopy(args)
    assert same(CASES["functions"][name](*args), expected)
    assert same(args, before)


ON_THE_HOST = (
    "mask",
    "literal",
    "zeros_like",
    "tuple_and_array",
    "elements",
)  # their code makes host arrays of its own
WITH_ARRAYS = [
    name
    for name, (args, _) in sorted(CASES["cases"].items())
    if any(isinstance(arg, np.ndarray) for arg in args) and name not in ON_THE_HOST
]


@pytest.mark.parametrize("name", WITH_ARRAYS)
def test_the_same_code_runs_on_the_device(cuda, name):
    args, expected = CASES["cases"][name]
    assert same(gs.cpu(gs.gpu(CASES["functions"][name])(*gs.gpu(args))), expected)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "networks.bson"
    file.write_bytes(gzip.decompress(NETWORKS.read_bytes()))
    return gs.load(file, mmap=False)


def test_functions_of_networks_give_what_julia_gave(networks):
    assert len(networks["cases"]) == 36
    for name, (args, expected) in networks["cases"].items():
        found = networks["functions"][name](*args)
        assert type(found) is type(expected), name
        assert np.asarray(found).dtype == np.asarray(expected).dtype, name
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)


def test_functions_of_networks_run_on_the_device(cuda, networks):
    for name in ("conv", "conv_flipped", "global_pool", "batched_operator", "onecold", "views"):
        args, expected = networks["cases"][name]
        found = gs.cpu(gs.gpu(networks["functions"][name])(*gs.gpu(args)))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("file", "name", "text"),
    [
        ("conv_anon_flux07_v1", "model", "x -> reshape(x, :, size(x, 4))"),
        ("functions_v1", "anon", "x -> x^2 + 1"),
        ("functions_v1", "closure", "x -> a .* (W * x)"),
        ("functions_v1", "f8", "x... -> f(g(x...))"),
        ("composed_flux09_v2", "model", "(mx, x) -> cat(mx, x; dims=1)"),
    ],
)
def test_code_is_rendered_for_people(file, name, text):
    value = gs.load(FOLDER / f"{file}.bson", name)
    functions = [n for _, n in tree.walk(value) if isinstance(n, OpaqueFunction)]
    assert text in [listing.render(function) for function in functions]


def test_branches_are_rendered_as_lines():
    multi = gs.load(FOLDER / "functions_v1.bson", "multi")
    assert listing.render(multi).split("\n") == [
        "(x, y) ->",
        "  z = x * y",
        "  goto 6 unless z > 1",
        "  return z - 1",
        "  6: return z + 1",
    ]


@pytest.mark.skipif(not WILD.exists(), reason="the folder of other people's files is not here")
def test_every_function_of_other_peoples_files_is_rendered_and_runs_or_is_refused():
    counts = collections.Counter()
    for file in sorted(WILD.glob("*.bson")):
        try:
            root = gs.load(file, lost="placeholder")
        except gs.FormatError:
            continue
        for _, node in tree.walk(root):
            if isinstance(node, OpaqueFunction) and isinstance(node.type, OpaqueDocument):
                assert " ->" in listing.render(node)
                counts["runs" if any(map(node_runs, plausible(node))) else "refused"] += 1
    print(f"\nfunctions of other people: {dict(counts)}")
    assert counts["runs"] >= 41 and counts["refused"] <= 2


def node_runs(call):
    """Whether a function runs with these arguments; nothing but our errors comes out."""
    node, args = call
    try:
        node(*args)
    except gs.GpustoreError:
        return False
    return True


def plausible(node):
    """Yield calls of a function with arguments of shapes that its text speaks of."""
    text = listing.render(node)
    count = len(text.partition(" ->")[0].split(","))
    sizes = [int(n) for n in re.findall(r"\b[1-9]\d{0,2}\b", text)]
    size = math.prod([*sizes, *(n for n in node.captured if type(n) is int)])
    batch = np.ones((4, 4, 3, 2), "f4")
    shapes = [(5, 4, 3, 2), (4, 3), (3,), (size,), (2 * size,), (1, 1)]
    for shape in shapes:
        if math.prod(shape) < 10**7:
            yield node, [np.ones(shape, "f4")] * count
    yield node, [(batch, np.ones((3, 2), "f4"))] * count
    yield node, [batch, np.ones((3, 2), "f4")][:count]
    if node.captured and isinstance(node.captured[-1], gs.Chain):
        n_in = node.captured[-1][0].weight.shape[1]
        yield node, [np.ones((n_in, 2), "f4"), np.ones((1, 2), "f4")]


# --- names ---


def test_a_name_that_is_not_on_the_list_is_named_with_the_way_out():
    made = function(Expr("call", (Global("Main", "secret"), Slot(2))), Expr("return", (SSA(1),)))
    with pytest.raises(gs.OpaqueCodeError, match=r"uses Main\.secret.*functions=\{'Main\.secret'"):
        made(1)


def test_a_supplied_function_takes_its_place():
    body = Expr("call", (Global("Main", "secret"), Slot(2))), Expr("return", (SSA(1),))
    made = function(*body, functions={"Main.secret": lambda x: x * 10})
    assert made(4) == 40
    whole = function(*body, functions={"#1#2": lambda x: -x})
    assert whole(4) == -4


def test_a_value_is_supplied_as_a_function_is():
    made = function(
        call("*", Global("Main", "weight"), Slot(2)), Expr("return", (SSA(1),)),
        functions={"Main.weight": 2.0 * np.eye(3)},
    )  # fmt: skip
    assert same(made(np.ones(3)), np.full(3, 2.0))


def test_load_takes_functions_for_those_of_the_file():
    file = FOLDER / "functions_v1.bson"
    with pytest.raises(gs.OpaqueCodeError, match="Main.myact"):
        gs.load(file, "f5")(2.0)
    for name in ("Main.myact", "Main.#myact"):
        assert gs.load(file, "f5", functions={name: lambda x: x + 1})(2.0) == 3.0


@pytest.mark.parametrize(
    "name",
    [
        "Base.run", "Base.eval", "Core.eval", "Base.read", "Base.open", "Base.include", "Base.rm",
        "Base.ccall", "Core.Intrinsics.llvmcall", "Base.unsafe_load", "Base.setindex!",
        "Base.push!", "Base.materialize!", "Main.__import__", "builtins.exec", "Base.__class__",
        "Base.getattr", "Libc.system", "Base.download", "Main.normalise",
    ],
)  # fmt: skip
def test_no_other_name_is_ever_resolved(name):
    module, _, bare = name.rpartition(".")
    call = Expr("call", (Global(module, bare), Slot(2)))
    with pytest.raises(gs.OpaqueCodeError, match="not known here"):
        function(call, Expr("return", (SSA(1),)))("x")


@pytest.mark.parametrize("head", ["foreigncall", "ccall", "new", "cfunction", "method", "global"])
def test_no_other_form_is_ever_run(head):
    with pytest.raises(gs.OpaqueCodeError, match=head):
        function(Expr(head, (Slot(2),)))(1)


@pytest.mark.parametrize(
    "name", ["__class__", "__dict__", "__init__", "julia_type", "_forward", "run"]
)
def test_only_fields_of_a_layer_are_read(name):
    call = Expr("call", (Global("Base", "getproperty"), Slot(2), Constant(name)))
    made = function(call, Expr("return", (SSA(1),)))
    with pytest.raises(gs.OpaqueCodeError, match="does not have"):
        made(gs.Dense(2, 2))
    with pytest.raises(gs.OpaqueCodeError, match="does not have"):
        made(gs.load(FOLDER / "functions_v1.bson", "anon"))
    with pytest.raises(gs.OpaqueCodeError, match="does not have"):
        made(np.ones(2))


# --- limits ---


def function(*statements, functions=None, nargs=2, captured=None):
    """Return a function of these statements; its first argument is Slot(2)."""
    names = ("#self#", "x", "y", "z")
    method = Method(names, nargs, False, tuple(statements), False)
    captured = captured or {}
    runner = interpret.Runner(lambda node, path: node, functions or {})
    runner.code = Code("#1#2", tuple(captured), (method,), "1.5.3")
    made = OpaqueFunction.__new__(OpaqueFunction)
    made.type, made.captured, made.name, made.run = None, list(captured.values()), "#1#2", runner
    return made


def call(name, *args, module="Base"):
    return Expr("call", (Global(module, name), *args))


def test_a_loop_without_end_is_stopped():
    with pytest.raises(gs.OpaqueCodeError, match="more than 300000 steps"):
        function(Goto(1))(1)


def test_a_function_that_calls_itself_for_ever_is_stopped():
    made = function(Expr("call", (Slot(2), Slot(2))), Expr("return", (SSA(1),)))
    with pytest.raises(gs.OpaqueCodeError, match="levels deep|nested"):
        made(made)


BOMBS = {
    "zeros": [call("zeros", Constant(2**20), Constant(2**20))],
    "fill": [call("fill", Constant(1.0), Constant((2**40,)))],
    "ones of a negative size": [call("ones", Constant(-5))],
    "range": [call(":", Constant(0.0), Constant(1e-9), Constant(1e9))],
    "collect": [call(":", Constant(1), Constant(2**50)), call("collect", SSA(1))],
    "repeat": [call("repeat", Slot(2), Constant(2**40))],
    "broadcast": [
        call("reshape", Slot(2), Constant(1), Constant(2)),
        call("zeros", Constant(2**26)),
        call("zeros", Constant(1), Constant(2**26)),
        call("broadcasted", Global("Base", "+"), SSA(2), SSA(3)),
        call("materialize", SSA(4)),
    ],
    "outer product": [
        call("zeros", Constant(2**20), Constant(1)),
        call("zeros", Constant(1), Constant(2**20)),
        call("*", SSA(1), SSA(2)),
    ],
    "doubling": [
        Expr("=", (Slot(3), call("zeros", Constant(2**20)))),
        Expr("=", (Slot(3), call("vcat", Slot(3), Slot(3)))),
        Goto(2),
    ],
    "matrix power": [call("^", Slot(2), Constant(10**9))],
    "a name for a size": [call("zeros", Constant("x"))],
    "an index out of range": [call("getindex", Slot(2), Constant(10**12))],
    "a jump out": [Goto(99)],
    "a splat of a range": [
        call(":", Constant(1), Constant(10**15)),
        call("_apply", Global("Core", "tuple"), SSA(1), module="Core"),
    ],
    "tuples that double": [
        Expr("=", (Slot(3), Constant((1,) * 4000))),
        Expr("=", (Slot(3), call("tuple", Slot(3), Slot(3)))),
        Expr("=", (Slot(4), call("_apply", Global("Core", "tuple"), Slot(3), module="Core"))),
        Goto(2),
    ],
    "a string many times": [call("*", Constant("ab"), Constant(2**40))],
    "a tuple many times": [call("*", Constant((1, 2)), Constant(2**40))],
    "tuples that are added": [call("+", Constant((1, 2)), Constant((3, 4)))],
    "a string repeated": [call("repeat", Constant("ab"), Constant(2**40))],
    "a format": [call("%", Constant("%999999999d"), Constant(1))],
    "a sum of a long range": [call(":", Constant(1), Constant(2**60)), call("sum", SSA(1))],
    "a tuple of a long range": [call(":", Constant(1), Constant(2**60)), call("Tuple", SSA(1))],
    "a search in a long loop": [
        call(":", Constant(1), Constant(2**60)),
        call("foldl", Global("Base", "+"), SSA(1)),
    ],
    "ntuple": [call("ntuple", Global("Base", "identity"), Constant(2**60))],
    "sums again and again": [
        Expr("=", (Slot(3), call("zeros", Constant(2**25)))),
        call("sum", Slot(3)),
        Goto(2),
    ],
    "products again and again": [
        Expr("=", (Slot(3), call("zeros", Constant(3000), Constant(3000)))),
        Expr("=", (Slot(4), call("*", Slot(3), Slot(3)))),
        Goto(2),
    ],
    "elements one by one": [
        call("zeros", Constant(2**24)),
        call("broadcast", Global("Base", "size"), SSA(1)),
    ],
    "padding": [
        call("reshape", Slot(2), Constant(1), Constant(2), Constant(1), Constant(1)),
        call("conv", SSA(1), SSA(1)),
        call("kwfunc", Global("NNlib", "maxpool"), module="Core"),
        call("apply_type", Global("Core", "NamedTuple"), Constant(("pad",)), module="Core"),
        Expr("call", (SSA(4), Constant((2**40,)))),
        Expr("call", (SSA(3), SSA(5), Global("NNlib", "maxpool"), SSA(1), Constant((1, 1)))),
    ],
    "an enlarged image": [
        call("reshape", Slot(2), Constant(1), Constant(2), Constant(1), Constant(1)),
        call("upsample_nearest", SSA(1), Constant((2**20, 2**20))),
    ],
    "an adaptive pool": [
        call("reshape", Slot(2), Constant(1), Constant(2), Constant(1), Constant(1)),
        call("AdaptiveMaxPool", Constant((2**20, 2**20))),
        Expr("call", (SSA(2), SSA(1))),
    ],
    "classes": [
        call(":", Constant(1), Constant(2**40)),
        call("onehotbatch", Slot(2), SSA(1)),
    ],
    "a value that is not there": [call("+", SSA(7), Constant(1))],
    "no function": [Expr("call", (Constant(3), Slot(2)))],
    "a class": [Expr("call", (Constant(dict), Slot(2)))],
    "a division by zero": [call("÷", Constant(1), Constant(0))],
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_an_error_soon(name):
    start = time.monotonic()
    with pytest.raises(gs.OpaqueCodeError):
        function(*BOMBS[name], Expr("return", (SSA(len(BOMBS[name])),)))(np.ones(2))
    assert time.monotonic() - start < 30  # seconds; some would take for ever


def nested_tuples(depth):
    """Return statements that make tuples of two of the tuple before, as SSA(2) and SSA(3)."""
    statements = [Expr("=", (Slot(3), Constant(1))), Expr("=", (Slot(4), Constant(1)))]
    for _ in range(depth):
        statements += [Expr("=", (slot, call("tuple", slot, slot))) for slot in (Slot(3), Slot(4))]
    return statements


@pytest.mark.parametrize("name", ["==", "isequal", "broadcasted", "vcat", "sum"])
def test_tuples_of_tuples_of_tuples_are_no_bomb(name):
    statements = [*nested_tuples(60), call(name, Slot(3), Slot(4))]
    last = len(statements)
    statements += [call("materialize", SSA(last)), Expr("return", (SSA(last + 1),))]
    start = time.monotonic()
    with pytest.raises(gs.OpaqueCodeError):
        function(*statements)(1)
    assert time.monotonic() - start < 30  # seconds; 2^60 comparisons would take for ever


def test_a_loop_over_a_large_array_takes_no_copy_at_each_step():
    array = np.zeros((2000, 1000), "f4")
    loop = [
        Expr("=", (Slot(3), call("iterate", Slot(2)))),
        call("===", Slot(3), Constant(None)),
        call("not_int", SSA(2)),
        Expr("gotoifnot", (SSA(3), Constant(8))),
        call("getfield", Slot(3), Constant(2), module="Core"),
        Expr("=", (Slot(3), call("iterate", Slot(2), SSA(5)))),
        Goto(2),
        Expr("return", (Constant(0),)),
    ]
    start = time.monotonic()
    with pytest.raises(gs.OpaqueCodeError, match="steps"):
        function(*loop)(array)
    assert time.monotonic() - start < 30


def test_code_that_calls_itself_through_layers_has_one_budget():
    chain = gs.Chain()
    twice = [call("getfield", Slot(1), Constant("c"), module="Core")]
    twice += [Expr("call", (SSA(1), Slot(2))), Expr("call", (SSA(1), SSA(2)))]
    made = function(*twice, Expr("return", (SSA(3),)), captured={"c": chain})
    chain.layers = (made,)
    start = time.monotonic()
    with pytest.raises(gs.OpaqueCodeError, match="levels deep"):
        made(1)
    assert time.monotonic() - start < 10
    assert not limits.is_inside()


def test_expressions_that_share_their_parts_are_no_bomb():
    made = gs.load(FOLDER / "functions_v1.bson", "multi")
    source = made.type.source
    kept = OpaqueDocument(copy.deepcopy(made.type.document), source)
    body = body_of(kept)
    inner = source.resolve(source.resolve(body[0], "")["data"][1], "")[1]  # z = x * y: the call
    head, args = source.resolve(inner, "")["data"][:2]
    for _ in range(40):
        inner = {**source.resolve(inner, ""), "data": [head, [args[0], inner, inner]]}
    body[1] = inner
    hostile = OpaqueFunction(kept, [])
    hostile.run = interpret.Runner(made.run.lift, {})
    start = time.monotonic()
    with pytest.raises(gs.OpaqueCodeError, match="too deep, or too many"):
        listing.render(hostile)
    with pytest.raises(gs.OpaqueCodeError, match="too deep, or too many"):
        hostile(1, 2)
    assert time.monotonic() - start < 10


def body_of(kept):
    """Return the statements of the first method of a function's document."""
    typename = kept.source.resolve(kept.document["typename"], "")
    table = kept.source.resolve(typename["data"][-1], "")
    method = kept.source.resolve(kept.source.resolve(table[1], "")[0], "")
    info = kept.source.resolve(method["data"][-1], "")
    return kept.source.resolve(info["data"][0], "")


# --- arithmetic ---


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("exp", (np.ones((2, 2)),)), ("abs", (np.ones(2),)), ("<", (np.ones(2), np.ones(2))),
        ("/", (1.0, np.ones(2))), ("+", (np.ones(2), 1.0)), ("+", (np.ones(2), np.ones((2, 1)))),
        ("*", (np.ones((2, 3)), np.ones((2, 3)))), ("^", (np.ones((2, 3)), 2)),
        ("sqrt", ("x",)), ("max", (None, 1)), ("^", (2, -1)), ("Int", (2.5,)), ("UInt8", (300,)),
    ],
)  # fmt: skip
def test_what_julia_refuses_is_refused(name, args):
    made = function(call(name, *(Slot(i) for i in range(2, 2 + len(args)))),
                    Expr("return", (SSA(1),)), nargs=1 + len(args))  # fmt: skip
    with pytest.raises(gs.OpaqueCodeError):
        made(*args)


def test_an_index_of_unsigned_zero_is_out_of_range():
    made = function(call("getindex", Slot(2), Slot(3)), Expr("return", (SSA(1),)), nargs=3)
    with pytest.raises(gs.OpaqueCodeError, match="out of 1 to 300"):
        made(np.ones(300), np.array([0], np.uint8))


def test_numbers_give_no_warnings_where_julia_gives_none():
    made = function(call("broadcasted", Global("Base", "/"), Slot(2), Constant(0)),
                    call("materialize", SSA(1)), Expr("return", (SSA(2),)))  # fmt: skip
    assert made(np.array([1.0, -1.0])).tolist() == [np.inf, -np.inf]


def test_an_error_of_a_supplied_function_comes_out_as_it_is():
    def fails(x):
        raise KeyError("mine")

    body = Expr("call", (Global("Main", "secret"), Slot(2))), Expr("return", (SSA(1),))
    with pytest.raises(KeyError, match="mine"):
        function(*body, functions={"Main.secret": fails})(1)
    outer = function(Expr("call", (Slot(2), Constant(1))), Expr("return", (SSA(1),)))
    with pytest.raises(KeyError, match="mine"):
        outer(function(*body, functions={"Main.secret": fails}))


def test_an_inner_function_whose_code_is_not_there_is_named():
    made = function(Expr("new", (Global("Main", "#3#4"),)), Expr("return", (SSA(1),)))
    with pytest.raises(gs.OpaqueCodeError, match=r"makes a Main\.#3#4.*functions=\{'#1#2'"):
        made(1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mse", (0.25 + 0.0625) / 2), ("mae", (0.5 + 0.25) / 2),
        ("crossentropy", math.log(2)), ("logitcrossentropy", math.log(1 + math.exp(-0.25))),
        ("binarycrossentropy", (math.log(2) - math.log(0.75)) / 2),
        ("logitbinarycrossentropy", math.log((1 + math.exp(-0.5)) * (1 + math.exp(0.25))) / 2),
    ],
)  # fmt: skip
def test_losses_are_those_of_flux(name, expected):
    body = Expr("call", (Global("Flux.Losses", name), Slot(2), Slot(3)))
    made = function(body, Expr("return", (SSA(1),)), nargs=3)
    found = made(np.array([[0.5], [0.25]], "f4"), np.array([[True], [False]]))
    assert found.dtype == np.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_integers_wrap_as_int64_does():
    square = [call("*", Slot(2), Slot(2)), Expr("return", (SSA(1),))]
    assert function(*square)(2**40) == (2**80 + 2**63) % 2**64 - 2**63
    power = [call("^", Slot(2), Constant(63)), Expr("return", (SSA(1),))]
    assert function(*power)(2) == -(2**63)


PARTS = st.recursive(
    st.one_of(
        st.sampled_from([SSA(1), SSA(2), Slot(1), Slot(2), Slot(9), Goto(1), Constant(None)]),
        st.sampled_from([*allowlist.TABLE, *calls.SPECIAL, *allowlist.CONSTANTS])
        .map(lambda name: Global("Base", name)),
        st.one_of(st.integers(-3, 5), st.floats(), st.text(max_size=2)).map(Constant),
    ),
    lambda inner: st.builds(
        lambda head, args: Expr(head, tuple(args)),
        st.sampled_from(["call", "=", "return", "gotoifnot", "new"]),
        st.lists(inner, max_size=4),
    ),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(PARTS, max_size=6))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_the_code_says_only_our_errors_come_out(statements):
    with contextlib.suppress(gs.GpustoreError):
        function(*statements)(np.ones((2, 3), "f4"))


@given(st.data())
def test_whatever_is_done_to_a_document_of_code_only_our_errors_come_out(data):
    made = gs.load(FOLDER / "functions_v1.bson", "multi")
    document = copy.deepcopy(made.type.document)
    source = made.type.source
    nodes = [n for n in code_nodes(document, source) if isinstance(n, (dict, list)) and n]
    node = data.draw(st.sampled_from(nodes))
    key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(st.sampled_from([None, 0, -1, 2**40, "x", [], {}, {"tag": "struct"}]))
    with contextlib.suppress(gs.GpustoreError):
        twisted = OpaqueFunction(OpaqueDocument(document, source), [])
        twisted.run = interpret.Runner(made.run.lift, {})
        listing.render(twisted)
        twisted(1, 2)


def code_nodes(node, source, seen=None):
    seen = set() if seen is None else seen
    if id(node) in seen or len(seen) > 400:
        return
    seen.add(id(node))
    yield node
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        yield from code_nodes(child, source, seen)
