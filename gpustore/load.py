"""Loading: a file is mapped, its document scanned and lifted, arrays placed on their devices."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
from gpustore.layout import STAMP
from gpustore.lift import RESERVED, TAGS, Lifter
from gpustore.placement import Check, DeviceChoice, Placement, chooser, host_array
from gpustore.save import paused_collector, save_document
from gpustore.specs import lift_groups
from gpustore.storage import MappedFile
from gpustore.verify import Digests, Progress, Report, Verification, counted, verify_file

_T = TypeVar("_T")


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
      rest.
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
        content = _document(file, found)
        report = counted(progress, file.nbytes)
        check = _checker(file, report) if verify else None
        arrays = Placement(file, functions, choose, is_verified=verify)
        lifter = arrays.lifter(content, found.alike)
        is_all = not names or content.keys() <= {*names, *RESERVED}
        try:
            root = _entries(lifter, content, names, file.path, found.arrays if is_all else ())
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


def _document(file: MappedFile, found: document.Found | None = None) -> dict[str, Any]:
    slot_nbytes = document.SLOT_NBYTES
    try:
        content = document.scan(file.buffer, name=file.path, slot_nbytes=slot_nbytes, found=found)
    except FormatError as error:
        raise _explained(file, error) from None
    _refuse_newer(file, content.get(STAMP))
    return content


def _explained(file: MappedFile, error: FormatError) -> FormatError:
    """Return what says of which other kind a file is, that could not be read; else the error."""
    kind = foreign.foreign_kind(bytes(file.buffer[:512]), file.nbytes)
    return error if kind is None else FormatError(f"{file.path}: {kind}")


def _refuse_newer(file: MappedFile, stamp: Any) -> None:
    version = stamp.get("version") if isinstance(stamp, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FutureVersionError(
            f"{file.path}: expected format version {FORMAT_VERSION} or older, found {version}; "
            "install a newer gpustore: pip install --upgrade gpustore"
        )


def _is_object(content: dict[str, Any]) -> bool:
    """Whether the outermost document is itself a tagged value, not a dict of entries."""
    tag = content.get("tag")
    return isinstance(tag, str) and tag in TAGS


def _entries(
    lifter: Lifter,
    content: dict[str, Any],
    names: tuple[str, ...],
    path: str,
    arrays: Sequence[Any] = (),
) -> Any:
    """Return the wanted entries as a dict, or the object that the file is.

    `arrays` are the nodes of all that there are, in lists of those alike, where they are known.
    """
    try:
        if arrays:
            lift_groups(lifter, arrays)
            lifter.make_row = None  # there are no others
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
    """An array in a file, without its values: where it is, and what.

    `path` is what `StoredFile.read` takes. `order` is "C" or "F", `device` its tag ("cpu" without
    one), `offset` and `nbytes` where its bytes lie in the file, `digest` their BLAKE3, or None in
    a file of Julia's.
    """

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
    """A file opened lazily: a read-only Mapping from entry names to values, read on demand.

    `arrays` is a tuple of an ArrayEntry for each array; `tags` counts the arrays of each device
    tag; both are found when they are first asked for. `path` and `nbytes` are those of the file.
    Entries come on the CPU, whatever their tag. Opening looks at the outermost document only; what
    is in an entry is checked when it is read. A context manager: it closes the file. See
    `open_file` for an example.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = MappedFile.open(path)
        self.path, self.nbytes = self._file.path, self._file.nbytes
        self._found = document.Found()
        try:
            self._parts = document.parts(self._file.buffer, name=self.path)
        except FormatError as error:
            raise _explained(self._file, error) from None
        known = self._content if self._parts is None else self._parts.document(STAMP)
        self._stamp = known.get(STAMP)
        _refuse_newer(self._file, self._stamp)

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        return _document(self._file, self._found)

    def _part(self, name: str) -> dict[str, Any]:
        """Return what one entry needs of the document; the whole of it where that is not known."""
        parts = self._parts
        if parts is None or name not in parts or name in RESERVED or "tag" in parts:
            return self._content
        return parts.document(name, "_backrefs")

    @functools.cached_property
    def _slots(self) -> dict[str, Any]:
        """The document with a Slot for each binary, however small."""
        return document.scan(self._file.buffer, name=self.path, slot_nbytes=0)

    @functools.cached_property
    def arrays(self) -> tuple[ArrayEntry, ...]:
        """Every array of the file; raises FormatError where a part of it is malformed."""
        return tuple(_list_arrays(self._file, self._slots))

    @functools.cached_property
    def tags(self) -> dict[str, int]:
        """The number of arrays of each device tag."""
        return dict(Counter(entry.device for entry in self.arrays if entry.device != "cpu"))

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
        if self.writer is None:
            return "without gpustore's stamp (written by Julia's BSON.jl, most likely)"
        return f"written by {self.writer}, format {self.format_version}"

    @property
    def writer(self) -> str | None:
        """Which gpustore wrote the file, as its stamp says, or None without one."""
        return self._stamped("writer", str)

    @property
    def format_version(self) -> int | None:
        """The version of the format, as the stamp says, or None without one."""
        return self._stamped("version", int)

    def _stamped(self, key: str, kind: type[_T]) -> _T | None:
        stamp = self._stamp
        found = stamp.get(key) if isinstance(stamp, dict) else None
        return found if isinstance(found, kind) else None

    def value(self, *, make_array: Callable[[ArraySpec, str], Any] | None = None) -> Any:
        """Return the whole value; `make_array(spec, path)` may put something in each place."""
        arrays = Placement(self._file)
        lifter = Lifter(self._content, make_array or arrays.make, arrays.read, self.path)
        return _entries(lifter, self._content, (), self.path)

    def __getitem__(self, name: str) -> Any:
        with paused_collector():
            content = self._part(name)
            alike = self._found.alike or (self._parts.alike if self._parts is not None else {})
            lifter = Placement(self._file).lifter(content, alike)
            return _entries(lifter, content, (name,), self.path)[name]

    def __iter__(self) -> Iterator[str]:
        names = self._parts if self._parts is not None and "tag" not in self._parts else None
        if names is not None or not _is_object(self._content):
            return iter([key for key in names or self._content if key not in RESERVED])
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

        `array_path` is the `path` of one of `arrays`. On the CPU it is a private copy-on-write
        view: only the pages that are used are read. Raises EntryNotFoundError, and
        CUDAUnavailableError where `device` is not available.
        """
        entry = next((entry for entry in self.arrays if entry.path == array_path), None)
        if entry is None:
            known = ", ".join(entry.path for entry in self.arrays[:20])
            raise EntryNotFoundError(
                f"{self.path}: expected an array {array_path!r}, found {known}"
            )
        array = self.view(entry) if region is None else self.view(entry)[region]
        target = devices.parse_device(device)
        if target == "cpu":
            return array
        devices.require_cuda(target)
        return devices.to_device(array, target)

    def view(self, entry: ArrayEntry) -> Any:
        """Return the array of an entry of `arrays`, on the CPU: a private copy-on-write view."""
        slot = Slot(entry.offset, entry.nbytes)
        spec = ArraySpec(entry.dtype, entry.shape, entry.order, "cpu", slot, entry.digest)
        return host_array(self._file, spec, entry.path)

    def save_for_cpu(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        """Write the file anew without device tags; all else it holds is kept as it is."""
        save_document(path, self._slots, self._file.buffer, progress)

    def verify(self, progress: Progress | None = None) -> Verification:
        """Check every digest in the file and return what was found: true where nothing is damaged.

        It raises nothing for a damaged file; `damaged` of what it returns names the parts.
        """
        return verify_file(self._file, progress, _namer(self._file))


def open_file(path: str | os.PathLike[str]) -> StoredFile:
    """Open a file for lazy reading: its entries and arrays are read where they are asked for.

    Raises FormatError or TruncatedFileError for what is no such file.

    >>> import gpustore as gs, numpy as np, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "weights.bson")
    ...     gs.save(file, layer={"w": np.ones((2, 3), "f4")})
    ...     with gs.open_file(file) as stored:
    ...         [(entry.path, entry.shape) for entry in stored.arrays]
    [("layer['w']", (2, 3))]
    """
    return StoredFile(path)
