"""Files of Julia's with something else in some places: only this package's errors come out.

10,000 of them with GPUSTORE_HYPOTHESIS_PROFILE=mutations (`make test-mutations`).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import FILES, read_and_write, run_code, with_other_octets, with_other_parts


@st.composite
def mutated(draw):
    """Draw the bytes of a file with some octets, or some parts of its document, replaced."""
    octets = draw(st.sampled_from(FILES)).read_bytes()

    def pick(count):
        return draw(st.integers(0, count - 1))

    if pick(4) == 0 or octets.startswith(b"\xff"):  # lengths of -1
        return with_other_octets(octets, pick)
    return with_other_parts(octets, pick)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.timeout(1800)
@given(mutated())
def test_a_file_with_other_parts_loads_or_is_refused(tmp_path_factory, octets):
    path = tmp_path_factory.getbasetemp() / "mutated.bson"
    path.write_bytes(octets)
    loaded = read_and_write(path, path.with_name("again.bson"))
    run_code(loaded)
