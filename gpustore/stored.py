"""Files opened lazily: what lies where in them, and each entry and array when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gpustore import devices, document, notebook
from gpustore.document import Slot
from gpustore.entries import document_of, entries_of, explained, is_object, refuse_newer
from gpustore.errors import EntryNotFoundError, FormatError
from gpustore.julia import ArraySpec
from gpustore.layout import STAMP
from gpustore.lift import RESERVED, Lifter
from gpustore.placement import Placement, host_array
from gpustore.save import paused_collector, save_document
from gpustore.storage import MappedFile
from gpustore.verify import Progress, Verification, verify_file

_T = TypeVar("_T")


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


def list_arrays(file: MappedFile, content: dict[str, Any]) -> list[ArrayEntry]:
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

    entries_of(Lifter(content, note, Placement(file).read, file.path), content, (), file.path)
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
            raise explained(self._file, error) from None
        known = self._content if self._parts is None else self._parts.document(STAMP)
        self._stamp = known.get(STAMP)
        refuse_newer(self._file, self._stamp)

    @functools.cached_property
    def _content(self) -> dict[str, Any]:
        return document_of(self._file, self._found)

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
        return tuple(list_arrays(self._file, self._slots))

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
        return entries_of(lifter, self._content, (), self.path)

    def __getitem__(self, name: str) -> Any:
        with paused_collector():
            content = self._part(name)
            alike = self._found.alike or (self._parts.alike if self._parts is not None else {})
            lifter = Placement(self._file).lifter(content, alike)
            return entries_of(lifter, content, (name,), self.path)[name]

    def __iter__(self) -> Iterator[str]:
        names = self._parts if self._parts is not None and "tag" not in self._parts else None
        if names is not None or not is_object(self._content):
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
        return verify_file(self._file, progress, namer(self._file))


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


def namer(file: MappedFile) -> Callable[[int], str]:
    """Return what names the array whose payload begins at an offset; the file is read once."""
    paths: dict[int, str] = {}
    is_read = False

    def path_at(offset: int) -> str:
        nonlocal is_read
        if not is_read:
            is_read = True
            content = document.scan(file.buffer, name=file.path, slot_nbytes=0)
            with contextlib.suppress(FormatError):
                paths.update((entry.offset, entry.path) for entry in list_arrays(file, content))
        return paths.get(offset, f"the array at byte {offset}")

    return path_at
