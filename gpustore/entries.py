"""The document of a file, checked, and the entries that are wanted of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpustore import document, foreign
from gpustore.document import FORMAT_VERSION
from gpustore.errors import EntryNotFoundError, FormatError, FutureVersionError
from gpustore.layout import STAMP
from gpustore.lift import RESERVED, TAGS, Lifter
from gpustore.specs import lift_groups
from gpustore.storage import MappedFile


def document_of(file: MappedFile, found: document.Found | None = None) -> dict[str, Any]:
    """Return the document of a file that this version reads.

    Large binaries are Slots, and the code of long functions is Deferred.
    """
    slot_nbytes = document.SLOT_NBYTES
    try:
        content = document.scan(
            file.buffer, name=file.path, slot_nbytes=slot_nbytes, found=found, is_lazy=True
        )
    except FormatError as error:
        raise explained(file, error) from None
    refuse_newer(file, content.get(STAMP))
    return content


def explained(file: MappedFile, error: FormatError) -> FormatError:
    """Return what says of which other kind a file is, that could not be read; else the error."""
    kind = foreign.foreign_kind(bytes(file.buffer[:512]), file.nbytes)
    return error if kind is None else FormatError(f"{file.path}: {kind}")


def refuse_newer(file: MappedFile, stamp: Any) -> None:
    """Raise FutureVersionError for the stamp of a format that is newer than this one."""
    version = stamp.get("version") if isinstance(stamp, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FutureVersionError(
            f"{file.path}: expected format version {FORMAT_VERSION} or older, found {version}; "
            "install a newer gpustore: pip install --upgrade gpustore"
        )


def is_object(content: dict[str, Any]) -> bool:
    """Whether the outermost document is itself a tagged value, not a dict of entries."""
    tag = content.get("tag")
    return isinstance(tag, str) and tag in TAGS


def entries_of(
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
        return _wanted(lifter, content, names, path, arrays)
    except RecursionError:
        raise FormatError(f"{path}: the values are nested too deep to be loaded") from None
    finally:
        if lifter.lock is not None:
            lifter.forget()
            lifter.alike = {}


def _wanted(
    lifter: Lifter,
    content: dict[str, Any],
    names: tuple[str, ...],
    path: str,
    arrays: Sequence[Any],
) -> Any:
    if arrays:
        lift_groups(lifter, arrays)
        lifter.make_row = None  # there are no others
    if not is_object(content):
        if not names:
            return lifter.entries(content, None)
        missing = [name for name in names if name not in content or name in RESERVED]
        if not missing:
            return lifter.entries(content, names)
        found = [key for key in content if key not in RESERVED]
    else:
        value = lifter.value(content, "")
        is_dict = isinstance(value, dict)
        missing = [name for name in names if not is_dict or name not in value]
        if not missing:
            return value
        found = list(value) if is_dict else []
    held = "entries " + ", ".join(map(str, found)) if found else "one object without entries"
    raise EntryNotFoundError(f"{path}: expected an entry {missing[0]!r}, found {held}")
