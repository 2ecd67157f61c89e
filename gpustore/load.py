"""Loading: a file is mapped, its document scanned and lifted, arrays placed on their devices."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpustore import devices, document, foreign, interop, notebook, tree
from gpustore.document import FORMAT_VERSION, Slot
from gpustore.errors import (
    DeviceDataLostError,
    EntryNotFoundError,
    FormatError,
    FutureVersionError,
    IntegrityError,
    UnsupportedValueError,
)
from gpustore.julia import ArraySpec, LostArray
from gpustore.lift import RESERVED, TAGS, Lifter
from gpustore.placement import Check, DeviceChoice, Placement, chooser, host_array
from gpustore.save import paused_collector, save_document
from gpustore.storage import MappedFile
from gpustore.verify import Digests, Progress, Report, Verification, counted, verify_file


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

    `device`: None puts each array where its tag says (the CPU without one); "cpu", "cuda" or
    "cuda:1" puts all there; a mapping or a callable gives the device for each tag. On the CPU,
    arrays of 64 KiB and more are writable copy-on-write views of the mapped file (`mmap=False`: of
    a private copy). `verify` checks every digest: in device memory of what is placed there, in the
    file of the rest. `lost`: "error", or "placeholder" for a LostArray where Julia saved a GPU
    pointer. `functions` are Python functions for those of Julia that the file calls by name:
    {"Main.normalise": f}. `framework`: "torch" or "jax" gives their arrays of the same memory, see
    `interop.in_framework`. `progress(done, total)` counts bytes.

    Raises FormatError or TruncatedFileError for what is no such file, EntryNotFoundError,
    CUDAUnavailableError (before anything large is read), DeviceDataLostError, IntegrityError.

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
        file, content = _open(path, mmap=mmap, slot_nbytes=document.SLOT_NBYTES)
        report = counted(progress, file.nbytes)
        check = _checker(file, report) if verify else None
        arrays = Placement(file, functions, choose, is_verified=verify)
        lifter = arrays.lifter(content)
        try:
            root = _entries(lifter, content, names, file.path)
        except FormatError:
            if check is not None:
                check(())
            raise
    if lost == "error" and lifter.has_lost:
        _refuse_lost(root, names, file.path)
    root = arrays.placed(root, report, check)
    if framework is not None:
        root = interop.in_framework(root, framework)
    if progress is not None:
        progress(file.nbytes, file.nbytes)
    if len(names) == 1:
        return root[names[0]]
    return tuple(root[name] for name in names) if names else root


def _open(path: Any, *, mmap: bool, slot_nbytes: int) -> tuple[MappedFile, dict[str, Any]]:
    file = MappedFile.open(path, mmap=mmap)
    kind = foreign.foreign_kind(bytes(file.buffer[:512]), file.nbytes)
    if kind is not None:
        raise FormatError(f"{file.path}: {kind}")
    content = document.scan(file.buffer, name=file.path, slot_nbytes=slot_nbytes)
    stamp = content.get("_gpustore")
    version = stamp.get("version") if isinstance(stamp, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FutureVersionError(
            f"{file.path}: expected format version {FORMAT_VERSION} or older, found {version}; "
            "install a newer gpustore: pip install --upgrade gpustore"
        )
    return file, content


def _is_object(content: dict[str, Any]) -> bool:
    """Whether the outermost document is itself a tagged value, not a dict of entries."""
    tag = content.get("tag")
    return isinstance(tag, str) and tag in TAGS


def _entries(lifter: Lifter, content: dict[str, Any], names: tuple[str, ...], path: str) -> Any:
    """Return the wanted entries as a dict, or the object that the file is."""
    try:
        if not _is_object(content):
            missing = [name for name in names if name not in content or name in RESERVED]
            if not missing:
                return lifter.entries(content, names or None)
            found = [key for key in content if key not in RESERVED]
        else:
            value = lifter.value(content, "")
            is_dict = isinstance(value, dict)
            missing = [name for name in names if not is_dict or name not in value]
            if not missing:
                return value
            found = list(value) if is_dict else []
    except RecursionError:
        raise FormatError(f"{path}: the values are nested too deep to be loaded") from None
    held = "entries " + ", ".join(map(str, found)) if found else "one object without entries"
    raise EntryNotFoundError(f"{path}: expected an entry {missing[0]!r}, found {held}")


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
    digests, path_at = Digests(file), _namer(file)

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


def _namer(file: MappedFile) -> Callable[[int], str]:
    """Return what names the array whose payload begins at an offset; the file is read once."""
    paths: dict[int, str] = {}
    is_read = False

    def path_at(offset: int) -> str:
        nonlocal is_read
        if not is_read:
            is_read = True
            content = document.scan(file.buffer, name=file.path, slot_nbytes=0)
            with contextlib.suppress(FormatError):
                paths.update((entry.offset, entry.path) for entry in _list_arrays(file, content))
        return paths.get(offset, f"the array at byte {offset}")

    return path_at


# --- lazy reading -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """An array in a file: where it is, without its values. `offset` and `nbytes` are in bytes."""

    path: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str
    device: str
    offset: int
    nbytes: int
    digest: bytes | None


def _list_arrays(file: MappedFile, content: dict[str, Any]) -> list[ArrayEntry]:
    entries: list[ArrayEntry] = []

    def note(spec: ArraySpec, path: str) -> ArrayEntry:
        assert isinstance(spec.payload, Slot)
        offset, nbytes = spec.payload.offset, spec.payload.nbytes
        entries.append(
            ArrayEntry(
                path, spec.dtype, spec.shape, spec.order, spec.device, offset, nbytes, spec.digest
            )
        )
        return entries[-1]

    _entries(Lifter(content, note, Placement(file).read, file.path), content, (), file.path)
    return entries


class StoredFile(Mapping[str, Any]):
    """A file opened lazily: a read-only Mapping from entry names to values, lifted on demand.

    `arrays` lists every array with its path, dtype, shape, order, device, offset and digest;
    `tags` counts the arrays of each device tag. Entries come on the CPU, whatever their tag.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file, self._content = _open(path, mmap=True, slot_nbytes=0)
        self.path = self._file.path
        self.nbytes = self._file.nbytes
        self.arrays: tuple[ArrayEntry, ...] = tuple(_list_arrays(self._file, self._content))
        self.tags = dict(Counter(e.device for e in self.arrays if e.device != "cpu"))

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; arrays that were read stay valid."""
        self._file.close()

    @property
    def origin(self) -> str:
        """Who wrote the file, in words."""
        stamp = self._content.get("_gpustore")
        if not isinstance(stamp, dict):
            return "no gpustore file (BSON.jl's, most likely)"
        return f"written by {stamp.get('writer')}, format {stamp.get('version')}"

    def value(self, *, make_array: Callable[[ArraySpec, str], Any] | None = None) -> Any:
        """Return the whole value; `make_array(spec, path)` may put something in each place."""
        arrays = Placement(self._file)
        lifter = Lifter(self._content, make_array or arrays.make, arrays.read, self.path)
        return _entries(lifter, self._content, (), self.path)

    def __getitem__(self, name: str) -> Any:
        lifter = Placement(self._file).lifter(self._content)
        return _entries(lifter, self._content, (name,), self.path)[name]

    def __iter__(self) -> Iterator[str]:
        if not _is_object(self._content):
            return iter([key for key in self._content if key not in RESERVED])
        value = self.value()
        return iter(value if isinstance(value, dict) else ())

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: all that the file holds, without reading arrays."""
        if self._file.is_closed:
            return notebook.html_tree({}, f"{self.path}: closed")
        size = notebook.size_text(self.nbytes)
        value = self.value(make_array=lambda spec, path: spec)
        return notebook.html_tree(value, f"{self.path}: {size}, {self.origin}")

    def read(self, array_path: str, *, region: Any = None, device: str = "cpu") -> Any:
        """Return one array, or the `region` of it (slices as in NumPy), on `device`.

        On the CPU it is a private copy-on-write view: only the pages that are used are read.
        """
        entry = next((entry for entry in self.arrays if entry.path == array_path), None)
        if entry is None:
            known = ", ".join(entry.path for entry in self.arrays[:20])
            raise EntryNotFoundError(
                f"{self.path}: expected an array {array_path!r}, found {known}"
            )
        slot = Slot(entry.offset, entry.nbytes)
        spec = ArraySpec(entry.dtype, entry.shape, entry.order, "cpu", slot, entry.digest)
        array = host_array(self._file, spec, array_path)
        array = array if region is None else array[region]
        target = devices.parse_device(device)
        if target == "cpu":
            return array
        devices.require_cuda(target)
        return devices.to_device(array, target)

    def save_for_cpu(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        """Write the file anew without device tags; all else it holds is kept as it is."""
        save_document(path, self._content, self._file.buffer, progress)

    def verify(self, progress: Progress | None = None) -> Verification:
        """Check every digest in the file and return what was found."""
        return verify_file(self._file, progress, _namer(self._file))


def open_file(path: str | os.PathLike[str]) -> StoredFile:
    """Open a file for lazy reading; see StoredFile.

    >>> import gpustore as gs, numpy as np, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "weights.bson")
    ...     gs.save(file, layer={"w": np.ones((2, 3), "f4")})
    ...     with gs.open_file(file) as stored:
    ...         [(entry.path, entry.shape) for entry in stored.arrays]
    [("layer['w']", (2, 3))]
    """
    return StoredFile(path)
