"""Arrays in another order than they lie in, on their way into a file."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpustore as gs
from gpustore import transfer

SHAPES = st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple)
DTYPES = st.sampled_from(["u1", "<f2", "<f4", "<i8", "<c16", ">f4"])


def turned(shape: tuple[int, ...], dtype: str, order: str) -> Any:
    count = int(np.prod(shape))
    return (np.arange(count) % 251).astype(dtype).reshape(shape, order=order)  # type: ignore[call-overload]


@given(SHAPES, DTYPES, st.sampled_from(["C", "F"]), st.integers(6, 12), st.integers(11, 13))
def test_transposed_in_tiles_as_numpy_does_it(
    shape: tuple[int, ...], dtype: str, order: str, block: int, tile: int
) -> None:
    array = turned(shape, dtype, order)
    little = array.dtype.newbyteorder("<")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "_BLOCK_NBYTES", 2**block * array.itemsize)
        patch.setattr(transfer, "_TILE_NBYTES", 2**tile)
        patch.setattr(transfer, "_TILE_COLUMNS", 8)
        patch.setattr(transfer, "SMALL_NBYTES", 0)
        for wanted, of_it in (("C", array), ("F", array.T)):
            payload = transfer.payload_of(array, array.dtype, wanted, transfer.Scratch())
            assert not isinstance(payload, np.ndarray)
            chunks = iter(payload.chunks())
            octets, last = [], next(chunks)
            for chunk in chunks:  # each stays as it is until the next but one is asked for
                octets.append(bytes(last))
                last = chunk
            assert b"".join([*octets, bytes(last)]) == of_it.astype(little).tobytes()
            assert payload.is_made != (of_it.flags.c_contiguous and array.dtype == little)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("shape", [(3000, 3000), (9, 1_000_000), (1_000_000, 9), (3, 3, 700, 700)])
def test_large_row_major_weights(tmp_path: Any, shape: tuple[int, ...], durable: bool) -> None:
    weight = np.random.default_rng(0).random(shape, "f4")
    seen: list[int] = []
    model = gs.Dense(weight) if len(shape) == 2 else gs.Conv(weight)
    gs.save(
        tmp_path / "m", model=model, durable=durable, progress=lambda done, _: seen.append(done)
    )
    found = gs.load(tmp_path / "m", "model", verify=True).weight
    np.testing.assert_array_equal(found, weight)
    assert found.flags.f_contiguous
    assert len(seen) > 1 and all(one < other for one, other in pairwise(seen))
