"""For users' own tests: Hypothesis strategies, `assert_roundtrip`, and a strict fake CUDA device.

The strategies need Hypothesis (`pip install 'gpustore[test]'`); the rest needs nothing. The
fixture for pytest is in `gpustore.fixtures`. A test of a type of one's own:

>>> import dataclasses, gpustore as gs
>>> @gs.model_type("Main.Affine")
... @dataclasses.dataclass
... class Affine:
...     weight: np.ndarray
>>> affine = assert_roundtrip(Affine(np.eye(2)), through=("cpu", "cuda-tagged", "julia"))
>>> type(affine) is Affine
True
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import activations, devices, document, layers, tree
from gpustore.dtypes import extension_dtype
from gpustore.errors import MissingExtraError, UnsupportedValueError
from gpustore.fake_arrays import FakeCudaArray
from gpustore.fake_cuda import fake_cuda
from gpustore.julia import NamedTuple, Symbol
from gpustore.layout import STAMP
from gpustore.lift import TAGS
from gpustore.load import load
from gpustore.save import save
from gpustore.values import Char, Int128, UInt128, missing

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "FakeCudaArray", "arrays", "assert_roundtrip", "assert_same", "documents", "fake_cuda",
    "models", "values",
]  # fmt: skip

_NATIVE = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"]
_EXTENSIONS = ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz")
_ACTIVATIONS = ("identity", "relu", "tanh", "σ", "softplus", "gelu", "softmax")


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise MissingExtraError(
            "gpustore.testing's strategies need Hypothesis: pip install 'gpustore[test]'"
        ) from error
    return strategies


def arrays(
    *, dtypes: Sequence[Any] | None = None, max_side: int = 5, max_dims: int = 4
) -> SearchStrategy[Any]:
    """Return a strategy for host arrays of every dtype, rank, memory order and byte order.

    Among them are empty, 0-dimensional, strided, negative-strided and read-only ones. `dtypes`
    are those to draw from, numeric ones, where not all are wanted.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator]
    def build(draw: Any) -> Any:
        shape = draw(st.lists(st.integers(0, max_side), max_size=max_dims))
        dtype = draw(st.sampled_from([np.dtype(code) for code in dtypes or _NATIVE]))
        if draw(st.booleans()):
            dtype = dtype.newbyteorder(">")
        elif dtypes is None and draw(st.integers(0, 3)) == 0:
            dtype = extension_dtype(draw(st.sampled_from(_EXTENSIONS))) or dtype
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = draw(st.binary(min_size=nbytes, max_size=nbytes))
        if dtype.kind == "b":
            raw = bytes(octet & 1 for octet in raw)
        array = np.frombuffer(bytearray(raw), dtype).reshape(shape)
        return _laid_out(array, draw(st.sampled_from("CFSNR")))

    strategy: SearchStrategy[Any] = build()
    return strategy


def _laid_out(array: Any, layout: str) -> Any:
    """Return the array row-major, column-major, strided, negative-strided or read-only."""
    if layout == "F":
        return np.asfortranarray(array) if array.ndim else array
    if layout == "S" and array.ndim:
        wide = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)
        wide[..., ::2] = array
        return wide[..., ::2]
    if layout == "N" and array.ndim:
        return np.ascontiguousarray(array[::-1])[::-1]
    if layout == "R":
        array.flags.writeable = False
    return array


def _scalars(st: Any) -> Any:
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    numpy_scalars = st.sampled_from(_NATIVE).flatmap(
        lambda code: st.binary(min_size=16, max_size=16).map(
            lambda raw: np.frombuffer(_valid(raw, code), code, 1)[0]
        )
    )
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**127), 2**128 - 1),
        st.floats(),
        st.complex_numbers(),
        text,
        st.binary(max_size=8),
        text.map(Symbol),
        st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc])),
        st.dates(),
        numpy_scalars,
        st.characters(exclude_categories=["Cs"]).map(Char),
        st.just(missing),
        st.integers(-(2**63), 2**63 - 1).map(Int128),
        st.integers(0, 2**127 - 1).map(UInt128),
        st.builds(
            lambda start, count, step: range(start, start + count * step, step),
            st.integers(-99, 99), st.integers(0, 9), st.sampled_from([1, 3, -1, -4]),
        ),
    )  # fmt: skip


def _valid(raw: bytes, code: str) -> bytes:
    return bytes(octet & 1 for octet in raw) if code == "?" else raw


def values(*, max_leaves: int = 12) -> SearchStrategy[Any]:
    """Return a strategy for nested values of every kind that can be saved, arrays among them."""
    st = _strategies()
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    keys = st.one_of(text, st.integers(-9, 9), text.map(Symbol), st.tuples(st.integers(0, 3), text))
    nested: SearchStrategy[Any] = st.recursive(
        st.one_of(_scalars(st), arrays(max_side=3)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(text, inner, max_size=4),
            st.dictionaries(text, inner, max_size=3).map(NamedTuple),
            st.dictionaries(keys, inner, max_size=4),
            st.sets(st.integers(-9, 9), max_size=4),
            st.frozensets(text, max_size=4),
            inner.map(lambda value: [value, value]),
        ),
        max_leaves=max_leaves,
    )
    return nested


def models(*, max_layers: int = 4) -> SearchStrategy[Any]:
    """Return a strategy for Chains of Dense layers, nested and sharing layers, with activations."""
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator]
    def build(draw: Any) -> Any:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        size, parts = draw(st.integers(1, 4)), []
        for _ in range(draw(st.integers(1, max_layers))):
            out = draw(st.integers(1, 4))
            activation = getattr(activations, draw(st.sampled_from(_ACTIVATIONS)))
            dense = layers.Dense(size, out, activation, bias=draw(st.booleans()), rng=rng)
            if draw(st.booleans()):
                dense.weight = _laid_out(np.array(dense.weight), draw(st.sampled_from("CFSN")))
            parts.append(dense)
            if size == out and draw(st.booleans()):
                parts.append(dense)
            size = out
        inner = layers.Chain(*parts)
        return layers.Chain(inner, activations.softmax) if draw(st.booleans()) else inner

    strategy: SearchStrategy[Any] = build()
    return strategy


def documents(*, max_leaves: int = 20) -> SearchStrategy[Any]:
    """Return a strategy for neutral documents, as `gpustore.document.scan` gives them."""
    from gpustore.document import int64

    st = _strategies()
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
    leaf = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**31), 2**31 - 1), st.floats(), text,
        st.integers(-(2**63), 2**63 - 1).map(int64()), st.binary(max_size=200),
    )  # fmt: skip
    keys = text.filter(lambda key: not key.startswith(("$", "_")))
    nested = st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=5), st.dictionaries(keys, inner, max_size=5)
        ),
        max_leaves=max_leaves,
    )
    whole: SearchStrategy[Any] = st.dictionaries(keys, nested, max_size=5)
    return whole


def assert_roundtrip(value: Any, *, through: Iterable[str] = ("cpu",), layout: str = "auto") -> Any:
    """Save `value` to a file and load it again, assert that nothing was lost; return the loaded.

    Types, dtypes, shapes, every bit of every array and what is shared must be the same; byte
    order and strides need not. The ways to go `through`, each with a file of its own:

    - "cpu": saved from where it is, loaded on the CPU, the digests checked.
    - "cuda-tagged": moved to a fake GPU, saved with `on_gpu="tag"`, loaded with `device="cpu"`.
      Arrays of dtypes that CuPy lacks stay on the CPU.
    - "julia": saved, all that only gpustore understands taken out of the file, loaded: what is
      the same then is what Julia sees too. Values that Julia has no type for (bytes, bfloat16,
      a frozenset) fail here.

    `value` may lie on any device, and is compared as `cpu(value)`; what the first way gave is
    returned.

    >>> assert_roundtrip([np.float32(1.5), {"w": np.eye(2)}], through=["cpu", "julia"])[0]
    np.float32(1.5)
    """
    ways = list(through)
    unknown = [way for way in ways if way not in _WAYS]
    if unknown or not ways:
        found = repr(unknown[0]) if unknown else "none"
        raise UnsupportedValueError(f"through: expected some of {', '.join(_WAYS)}, found {found}")
    expected, loaded = tree.cpu(value), []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "roundtrip.bson")
        for way in ways:
            loaded.append(_WAYS[way](value, path, layout))
            try:
                assert_same(loaded[-1], expected)
            except AssertionError as error:
                raise AssertionError(f"through {way}: {error}") from None
    return loaded[0]


def _through_cpu(value: Any, path: str, layout: str) -> Any:
    save(path, {"value": value}, durable=False, layout=layout)
    return load(path, "value", device="cpu", verify=True)


def _through_tagged(value: Any, path: str, layout: str) -> Any:
    host = tree.cpu(value)
    with fake_cuda(1):
        save(path, {"value": _on_fake(host)}, on_gpu="tag", durable=False, layout=layout)
    return load(path, "value", device="cpu", verify=True)


def _on_fake(host: Any) -> Any:
    def move(leaf: Any) -> Any:
        if not devices.is_array(leaf) or not tree.is_numeric(leaf):
            return leaf
        try:
            return devices.to_device(leaf, "cuda:0")
        except UnsupportedValueError:
            return leaf

    return tree.rebuild(host, move)


def _through_julia(value: Any, path: str, layout: str) -> Any:
    save(path, {"value": value}, durable=False, layout="inline")
    with open(path, "rb") as file:
        content = document.scan(file.read(), slot_nbytes=sys.maxsize)
    with open(path, "wb") as file:
        file.write(document.encode(_as_julia_reads(content)).bson)
    return load(path, "value")


def _as_julia_reads(node: Any) -> Any:
    """Return a document without the keys that BSON.jl passes over (docs/format.md)."""
    if isinstance(node, list):
        return [_as_julia_reads(child) for child in node]
    if not isinstance(node, dict):
        return node
    is_tagged = isinstance(node.get("tag"), str) and node["tag"] in TAGS
    unread = _OWN_KEYS if is_tagged else {STAMP}
    return {key: _as_julia_reads(child) for key, child in node.items() if key not in unread}


_OWN_KEYS = {"python", "fields", "dtype", "device", "_", "blake3"}
_WAYS: dict[str, Callable[[Any, str, str], Any]] = {
    "cpu": _through_cpu, "cuda-tagged": _through_tagged, "julia": _through_julia,
}  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    """Assert that two values are equal in type, content and sharing; arrays bit for bit."""
    pairs: dict[int, int] = {}
    stack = [("value", found, expected)]
    while stack:
        path, a, b = stack.pop()
        if devices.is_array(b):
            _assert_same_array(path, a, b)
        else:
            assert type(a) is type(b), f"{path}: expected {type(b)}, found {type(a)}"
        if devices.is_array(b) or tree.children(b):
            known = id(b) in pairs
            assert isinstance(b, tuple) or pairs.setdefault(id(b), id(a)) == id(a), (
                f"{path}: expected a shared object, found another one"
            )
            if known:
                continue
        below_a, below_b = tree.children(a), tree.children(b)
        if below_b or isinstance(b, (dict, list, tuple)):
            _assert_same_keys(path, a, b)
            stack.extend(
                (path + suffix, part_a, part_b)
                for (_, part_a), (suffix, part_b) in zip(below_a, below_b, strict=True)
            )
        elif not devices.is_array(b) and not dataclasses.is_dataclass(b):
            _assert_same_leaf(path, a, b)


def _assert_same_keys(path: str, a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert list(map(repr, a)) == list(map(repr, b)), f"{path}: other keys: {a.keys()}"
        assert list(map(type, a)) == list(map(type, b)), f"{path}: keys of other types"
    else:
        assert len(tree.children(a)) == len(tree.children(b)), f"{path}: another length"


def _assert_same_leaf(path: str, a: Any, b: Any) -> None:
    if isinstance(b, np.generic):
        assert a.dtype == b.dtype.newbyteorder("<"), f"{path}: expected {b.dtype}, found {a.dtype}"
        assert a.tobytes() == np.asarray(b, a.dtype).tobytes(), f"{path}: {a!r} is not {b!r}"
    elif isinstance(b, range):
        assert a == b, f"{path}: expected {b!r}, found {a!r}"
    elif isinstance(b, (set, frozenset)):
        assert sorted(map(repr, a)) == sorted(map(repr, b)), f"{path}: {a!r} is not {b!r}"
    else:
        assert repr(a) == repr(b), f"{path}: expected {b!r}, found {a!r}"


def _assert_same_array(path: str, a: Any, b: Any) -> None:
    assert devices.is_array(a), f"{path}: expected an array, found {type(a)}"
    where = devices.array_device(a), devices.array_device(b)
    assert where[0] == where[1], f"{path}: expected device {where[1]}, found {where[0]}"
    a, b = devices.to_host(a), devices.to_host(b)
    assert a.shape == b.shape, f"{path}: expected shape {b.shape}, found {a.shape}"
    little = b.dtype.newbyteorder("<")
    assert a.dtype == little, f"{path}: expected dtype {little}, found {a.dtype}"
    same = np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b.astype(little)).tobytes()
    assert same, f"{path}: the arrays differ"
