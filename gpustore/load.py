"""Loading: a file is mapped, its document scanned and lifted, arrays placed on their devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from typing import Any

from gpustore import document, interop, tree
from gpustore.entries import document_of, entries_of
from gpustore.errors import (
    DeviceDataLostError,
    FormatError,
    IntegrityError,
    UnsupportedValueError,
)
from gpustore.julia import LostArray
from gpustore.lift import RESERVED
from gpustore.placement import Check, DeviceChoice, Placement, chooser
from gpustore.save import paused_collector
from gpustore.storage import MappedFile
from gpustore.stored import namer
from gpustore.verify import Digests, Progress, Report, counted


def load(
    path: str | os.PathLike[str],
    /,
    *names: str,
    device: DeviceChoice = None,
    verify: bool = False,
    mmap: bool = True,
    lost: str = "error",
    functions: Mapping[str, Callable[..., Any]] | None = None,
    framework: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Load a `.bson` file of gpustore or Julia: all entries, the one named, or a tuple of several.

    Without names it gives a dict of the entries, or the value that is the file. On the CPU, arrays
    of 64 KiB and more are writable copy-on-write views of the mapped file.

    - `device`: None puts each array where its tag says (the CPU without one); "cpu", "cuda" or
      "cuda:1" puts all there; a mapping or a callable gives the device for each tag.
    - `verify` checks every digest: in device memory of what is placed there, in the file of the
      rest. It decodes the code of long functions too, which otherwise is done when they are used.
    - `mmap=False` reads a private copy of the file in place of mapping it.
    - `lost`: "error", or "placeholder" for a LostArray where Julia saved a GPU pointer.
    - `functions` are Python functions for those of Julia that the file calls by name:
      `{"Main.normalise": f}`.
    - `framework`: "torch" or "jax" gives their arrays of the same memory, as
      `interop.in_framework` does.
    - `progress(done, total)` is called with bytes, as they are verified or copied.

    Raises FormatError or TruncatedFileError for what is no such file, FutureVersionError,
    EntryNotFoundError, CUDAUnavailableError (before anything large is read), DeviceDataLostError,
    IntegrityError (with `verify`), DeviceMemoryError and DeviceError where a GPU fails.

    >>> import gpustore as gs, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "run.bson")
    ...     gs.save(file, epoch=3, loss=0.25)
    ...     gs.load(file, "loss", "epoch")
    (0.25, 3)
    """
    if lost not in ("error", "placeholder"):
        raise UnsupportedValueError(f"lost: expected 'error' or 'placeholder', found {lost!r}")
    choose = chooser(device)
    with paused_collector():
        file = MappedFile.open(path, mmap=mmap)
        found = document.Found()
        content = document_of(file, found)
        report = counted(progress, file.nbytes)
        check = _checker(file, report) if verify else None
        arrays = Placement(file, functions, choose, is_verified=verify)
        lifter = arrays.lifter(content, found.alike)
        is_all = not names or content.keys() <= {*names, *RESERVED}
        try:
            root = entries_of(lifter, content, names, file.path, found.arrays if is_all else ())
        except FormatError:
            if check is not None:
                check(())
            raise
        has_lost = lifter.has_lost
        del content, lifter, found  # so that the collector, let go, has little to go over
    if lost == "error" and has_lost:
        _refuse_lost(root, names, file.path)
    root = arrays.placed(root, report, check)
    if framework is not None:
        root = interop.in_framework(root, framework)
    if progress is not None:
        progress(file.nbytes, file.nbytes)
    if len(names) == 1:
        return root[names[0]]
    return tuple(root[name] for name in names) if names else root


def _refuse_lost(root: Any, names: tuple[str, ...], path: str) -> None:
    lost = [
        f"{where} ({node.element_type}, shape {node.shape})"
        for where, node in tree.walk_entries(root)
        if isinstance(node, LostArray)
    ]
    if lost:
        more = f" and {len(lost) - 20} more" if len(lost) > 20 else ""
        raise DeviceDataLostError(
            f"{path}: {len(lost)} arrays were saved from the GPU as pointers, their values are not "
            f"in the file: {', '.join(lost[:20])}{more}; save cpu(model) in Julia, or load the "
            "rest with lost='placeholder'"
        )


def _checker(file: MappedFile, report: Report) -> Check:
    """Return what raises IntegrityError for a damaged file; at once where its structure is."""
    digests, path_at = Digests(file), namer(file)

    def check(checked: Container[int]) -> None:
        damaged = digests.damaged(path_at, report, checked)
        if damaged:
            raise IntegrityError(
                f"{file.path}: the digest differs for {', '.join(damaged[:20])}; the file was "
                "damaged or changed after it was saved: restore it from a copy"
            )

    if not digests.is_structure_whole:
        check(())
    return check
