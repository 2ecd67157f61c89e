"""What a hostile file tries ends in a typed error, soon and in little memory: see `attacks/`."""

from __future__ import annotations

import ast
import contextlib
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from attacks import ATTACKS

import gpustore as gs
from gpustore import listing

MEMORY_FACTOR, MEMORY_NBYTES = 40, 2**20  # of the file's size, and on top


def call(path):
    function = gs.load(path, "f")
    return function(np.ones(2))


USES = {
    "loaded": lambda path: gs.load(path, device="cpu"),
    "verified": lambda path: gs.load(path, device="cpu", verify=True),
    "opened": lambda path: gs.open_file(path).value(),
    "asked for a": lambda path: gs.load(path, "a"),
    "called": call,
    "shown": lambda path: listing.rendered(gs.load(path, "f")),
}
FUNCTIONS = Path(__file__).parent / "fixtures" / "julia" / "functions_v1.bson"
CASES = [(name, use) for name, attack in ATTACKS.items() for use in attack.uses]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Have all modules imported: their memory is none that an attack takes."""
    gs.load(FUNCTIONS, verify=True)
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "use"), CASES)
def test_an_attack_ends_in_a_typed_error_or_in_what_it_says(tmp_path, name, use):
    attack, path = ATTACKS[name], tmp_path / "hostile.bson"
    path.write_bytes(attack.make())
    errors = attack.errors
    if use == "verified" and errors:
        errors = (*errors, gs.IntegrityError)
    tracemalloc.start()
    begin = time.process_time()
    try:
        if errors:
            with pytest.raises(errors) as found:
                USES[use](path)
            assert len(str(found.value)) < 50_000
        else:
            USES[use](path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - begin < 20
    if use != "called":  # what code may use is limited by itself
        assert peak < MEMORY_FACTOR * path.stat().st_size + MEMORY_NBYTES


@pytest.mark.timeout(120)
def test_an_attack_ends_the_same_way_in_a_private_copy_and_in_inspect(tmp_path):
    path, ways = tmp_path / "hostile.bson", [("loaded", private), ("opened", inspected)]
    for attack in ATTACKS.values():
        path.write_bytes(attack.make())
        for use, act in ways:
            errors = attack.errors if use in attack.uses else (gs.GpustoreError,)
            if attack.errors and use in attack.uses:
                with pytest.raises(errors):
                    act(path)
                continue
            with contextlib.suppress(errors):
                act(path)


def private(path):
    gs.load(path, device="cpu", mmap=False)


def inspected(path):
    with gs.open_file(path) as stored:
        stored._repr_html_()
        stored.value()
        stored.verify()


def test_each_attack_says_in_a_line_what_it_tries():
    for name, attack in ATTACKS.items():
        assert (attack.make.__doc__ or "").strip(), name


def test_every_file_of_attacks_is_among_them():
    folder = Path(__file__).parent / "attacks"
    (imported,) = [
        node
        for node in ast.parse((folder / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module == "attacks"
    ]
    themes = {file.stem for file in folder.glob("*.py")} - {"__init__", "registry", "octets"}
    assert {alias.name for alias in imported.names} == themes
    assert len(ATTACKS) >= 200


@pytest.mark.timeout(20)
def test_lists_that_double_stay_shared(tmp_path):
    path = tmp_path / "doubling.bson"
    path.write_bytes(ATTACKS["lists_that_double"].make())
    value = gs.load(path, "a")
    assert value[0] is value[1]
    gs.save(path, a=value)
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("name", ["types_that_double", "closures_that_double"])
@pytest.mark.timeout(20)
def test_what_doubles_is_saved_again_as_small(tmp_path, name):
    path = tmp_path / "doubling.bson"
    path.write_bytes(ATTACKS[name].make())
    gs.save(path, gs.load(path))
    assert path.stat().st_size < 60_000


def test_what_follows_the_document_is_not_looked_at(tmp_path):
    path = tmp_path / "trailing.bson"
    path.write_bytes(ATTACKS["bytes_behind_the_document"].make())
    assert gs.load(path) == {"a": "x"}


def test_bytes_behind_a_file_of_ours_are_found(tmp_path):
    path = tmp_path / "trailing.bson"
    gs.save(path, a=np.ones(3))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(gs.IntegrityError, match="structure"):
        gs.load(path, verify=True)


def test_all_uses_see_one_list_whatever_the_keys_of_an_array(tmp_path):
    path = tmp_path / "keys.bson"
    path.write_bytes(ATTACKS["an_array_whose_keys_are_out_of_order"].make())
    for use in ("loaded", "opened", "verified"):
        assert USES[use](path) == {"a": ["first", "second", "third"]}


def test_a_name_in_a_file_imports_and_calls_nothing(tmp_path, monkeypatch):
    """BSON.jl calls the constructor that a file names; here it is a name and stays one."""
    called = []
    for function in ("os.system", "os.popen", "builtins.eval", "builtins.exec"):
        monkeypatch.setattr(function, lambda *arguments: called.append(arguments))
    path = tmp_path / "constructor.bson"
    for name in ("a_name_of_python", "a_name_of_the_system", "a_name_of_julias_shell"):
        path.write_bytes(ATTACKS[name].make())
        assert isinstance(gs.load(path, "a"), gs.julia.Struct)
    assert not called


def test_values_behind_an_array_are_not_reached(tmp_path):
    path = tmp_path / "views.bson"
    gs.save(path, a=np.zeros(2**15, "f4"), secret=np.ones(2**15, "f4"))
    array = gs.load(path, "a")
    assert array.base is not None and array.nbytes == 2**17
    with pytest.raises(IndexError):
        array[2**15]
