"""Coverage-guided fuzzing with atheris: what a file may hold, or what code in it may say.

python tests/fuzz/fuzz.py load|code [options of libFuzzer] CORPUS: a folder, filled here with the
fixtures. Only GpustoreError may come out, within the limits of memory and time that `make fuzz`
gives. Files are changed part by part as often as octet by octet, so that they get past lengths.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent))
with atheris.instrument_imports(include=["gpustore"]):
    import mutations
    from attacks import ATTACKS

    from gpustore import interpret, kernels, limits, listing  # noqa: F401  imported late else

MAX_NBYTES = 60_000
FOLDER = Path(tempfile.mkdtemp(prefix="gpustore-fuzz-"))
PATH, AGAIN = FOLDER / "in.bson", FOLDER / "out.bson"


def load(octets: bytes) -> None:
    """Read a file in all ways and write it again."""
    PATH.write_bytes(octets)
    mutations.read_and_write(PATH, AGAIN)


def code(octets: bytes) -> None:
    """Call the functions of a file, with limits that are reached soon."""
    limits.MAX_STEPS, limits.MAX_ELEMENTS = 20_000, 2**20
    PATH.write_bytes(octets)
    try:
        loaded = mutations.gs.load(PATH, lost="placeholder", device="cpu")
    except mutations.gs.GpustoreError:
        return
    mutations.run_code(loaded)


def changed(octets: bytes, max_size: int, seed: int) -> bytes:
    """Return a file with other parts where it is a document, else with other octets."""
    pick = random.Random(seed).randrange
    if pick(3) == 0:
        return bytes(atheris.Mutate(octets, max_size))
    try:
        made = mutations.with_other_parts(octets, pick)
    except Exception:  # no document, or one that no longer can be encoded
        return bytes(atheris.Mutate(octets, max_size))
    return made if len(made) <= max_size else octets[:max_size]


def fill(corpus: Path, target: str) -> None:
    """Put the fixtures into the corpus: all of them, or those with functions."""
    corpus.mkdir(parents=True, exist_ok=True)
    files = {file.stem: file.read_bytes() for file in mutations.FILES}
    files |= {name: attack.make() for name, attack in ATTACKS.items()}
    for name, octets in files.items():
        has_code = b"jl_anonymous" in octets
        if len(octets) <= MAX_NBYTES and (has_code or target == "load"):
            (corpus / name).write_bytes(octets)


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[-1])
    fill(corpus, target)
    warnings.simplefilter("ignore")
    options = [f"-max_len={MAX_NBYTES}", *sys.argv[2:]]
    run = {"load": load, "code": code}[target]
    atheris.Setup([sys.argv[0], *options], run, custom_mutator=changed)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
