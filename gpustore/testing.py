"""For users' own tests: Hypothesis strategies, `assert_roundtrip`, and a strict fake CUDA device.

The strategies need Hypothesis (`pip install 'gpustore[test]'`); the rest needs nothing.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from gpustore import activations, devices, layers, tree
from gpustore.errors import MissingExtraError
from gpustore.fake_cuda import FakeCudaArray, fake_cuda
from gpustore.julia import NamedTuple, Symbol, extension_dtype
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


def arrays(*, max_side: int = 5, max_dims: int = 4) -> SearchStrategy[Any]:
    """Return a strategy for host arrays of every dtype, rank, memory order and byte order.

    Among them are empty, 0-dimensional, strided, negative-strided and read-only ones.
    """
    st = _strategies()

    @st.composite  # type: ignore[untyped-decorator]
    def build(draw: Any) -> Any:
        shape = draw(st.lists(st.integers(0, max_side), max_size=max_dims))
        dtype = draw(st.sampled_from([np.dtype(code) for code in _NATIVE]))
        if draw(st.booleans()):
            dtype = dtype.newbyteorder(">")
        elif draw(st.integers(0, 3)) == 0:
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


def assert_roundtrip(
    value: Any, *, on_gpu: str = "transfer", device: Any = None, layout: str = "auto"
) -> Any:
    """Save `value` to a file and load it again, assert that nothing was lost; return the loaded.

    Types, dtypes, shapes, every bit of every array and what is shared must be the same; byte
    order and strides need not. The digests of the file are checked on the way.

    >>> assert_roundtrip([np.float32(1.5), {"w": np.eye(2)}])[0]
    np.float32(1.5)
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "roundtrip.bson")
        save(path, {"value": value}, on_gpu=on_gpu, durable=False, layout=layout)
        loaded = load(path, "value", device=device, verify=True)
    expected = value if on_gpu == "tag" and device is None else tree.cpu(value)
    assert_same(loaded, expected)
    return loaded


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
