"""Files of other kinds to and from .bson: .safetensors, .npz of NumPy, .pt of PyTorch."""

from __future__ import annotations

import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gpustore import devices, interop, safetensors_format, storage, tree
from gpustore.errors import FormatError, UnsupportedValueError
from gpustore.load import load
from gpustore.safetensors_format import METADATA
from gpustore.save import save
from gpustore.values import Entries

Progress = Callable[[int, int], None]
_KINDS = {
    ".bson": "bson", ".safetensors": "safetensors", ".npz": "npz", ".pt": "pt", ".pth": "pt",
}  # fmt: skip


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    arrays_only: bool = False,
    unshare: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write what `source` holds as `target`, each of the kind its suffix says; return the arrays.

    What the target's kind cannot hold (layers, numbers and strings in .safetensors and .npz; layers
    and Julia's values in .pt) is left out with `arrays_only`, which names arrays by their paths; an
    array in several places is written several times with `unshare`. Else UnsupportedValueError
    names them. A .pt file is read by PyTorch's `weights_only` loader, so no code of it runs; a
    .bson file is verified. Arrays are streamed, but for those of a .npz that is read. The target
    appears whole or not at all. `progress(done, total)` is called with bytes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/weights.npz", w=np.ones(3))
    ...     convert(f"{folder}/weights.npz", f"{folder}/weights.bson")
    1
    """
    kinds = _kind(source), _kind(target)
    if kinds[0] == kinds[1]:
        raise UnsupportedValueError(f"{source} and {target} are of one kind; copy the file")
    value = _READERS[kinds[0]](source)
    if kinds[1] == "bson":
        save(target, value, progress=progress)
        return len(_named_arrays(value))
    metadata: dict[str, str] = {}
    if kinds[1] == "safetensors" and isinstance(value, dict) and _is_metadata(value.get(METADATA)):
        metadata = value[METADATA]
        value = {name: part for name, part in value.items() if name != METADATA}
    if arrays_only:
        value = _named_arrays(tree.data(value))
    _refuse_loss(source, kinds[1], value, unshare=unshare)
    if kinds[1] == "pt":
        _write_pt(target, value)
        return len(_named_arrays(value))
    arrays = _named_arrays(value)
    if kinds[1] == "npz":
        _write_npz(target, arrays)
    else:
        safetensors_format.write(target, arrays, metadata, progress)
    return len(arrays)


def _kind(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _KINDS:
        raise UnsupportedValueError(
            f"{os.fspath(path)}: expected a name that ends in {', '.join(_KINDS)}, found "
            f"{suffix or 'no suffix'!r}"
        )
    return _KINDS[suffix]


def _named_arrays(value: Any) -> dict[str, Any]:
    """Return the arrays by their paths; an array in several places by each."""
    found: dict[str, Any] = {}
    for path, leaf in _leaves(value):
        if devices.is_array(leaf):
            if path in found:
                raise UnsupportedValueError(f"two arrays have the path {path!r}; rename one")
            found[path] = leaf
    return found


def _leaves(value: Any) -> list[tuple[str, Any]]:
    """Return all that has no parts, by path, in each of its places; cycles end where they began."""
    found: list[tuple[str, Any]] = []
    is_flat = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    roots = list(value.items()) if is_flat else [("value", value)]
    stack: list[tuple[str, Any, frozenset[int]]] = [(p, v, frozenset()) for p, v in roots[::-1]]
    while stack:
        path, node, above = stack.pop()
        below = [] if devices.is_array(node) or id(node) in above else tree.children(node)
        if not below:
            found.append((path, node))
        inside = above | {id(node)}
        stack.extend((path + suffix, child, inside) for suffix, child in reversed(below))
    return found


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(text, str) for key, text in value.items()
    )


# --- what would be lost -----------------------------------------------------------------------


def _refuse_loss(source: Any, kind: str, value: Any, *, unshare: bool) -> None:
    found = _lost_in_pt(value) if kind == "pt" else _lost_in_arrays(value)
    outermost = [
        (path, name)
        for path, name in found
        if not any(path.startswith((f"{outer}.", f"{outer}[")) for outer, _ in found)
    ]
    lost = [f"{path} ({name})" for path, name in outermost]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise UnsupportedValueError(
            f"{os.fspath(source)}: a .{kind} file cannot hold {', '.join(lost[:5])}{more}; pass "
            "--arrays-only (arrays_only=True) to leave that out and name the arrays by their paths"
        )
    if kind == "pt" or unshare:
        return
    places: dict[Any, str] = {}
    for path, array in _named_arrays(value).items():
        first = places.setdefault(devices.memory_of(array), path)
        if first != path:
            raise UnsupportedValueError(
                f"{os.fspath(source)}: {first} and {path} are one array, which a .{kind} file "
                "cannot say; pass --unshare (unshare=True) to write it twice"
            )


def _lost_in_arrays(value: Any) -> list[tuple[str, str]]:
    """Return what is no array, and containers that their paths do not tell: path and type."""
    return _lost(value, _is_told_by_paths, devices.is_array)


def _lost_in_pt(value: Any) -> list[tuple[str, str]]:
    """Return what PyTorch's `weights_only` loader would not take: path and type."""
    return _lost(
        value,
        lambda node: type(node) in _PLAIN_CONTAINERS,
        lambda node: tree.is_numeric(node) if devices.is_array(node) else type(node) in _PLAIN,
    )


def _lost(
    value: Any, is_kept: Callable[[Any], bool], is_kept_leaf: Callable[[Any], bool]
) -> list[tuple[str, str]]:
    return [
        (path, type(node).__name__)
        for path, node in tree.walk_entries(value)
        if not (is_kept if tree.children(node) else is_kept_leaf)(node)
    ]


def _is_told_by_paths(node: Any) -> bool:
    return isinstance(node, (dict, list)) or type(node) is tuple


_PLAIN_CONTAINERS = (dict, OrderedDict, list, tuple, Entries)
_PLAIN = (str, int, float, complex, bool, bytes, type(None), dict, list, tuple)


# --- the kinds --------------------------------------------------------------------------------


def _read_bson(path: Any) -> Any:
    return load(path, device="cpu", verify=True)


def _read_safetensors(path: Any) -> dict[str, Any]:
    arrays, metadata = safetensors_format.read(path)
    return arrays | ({METADATA: metadata} if metadata else {})


def _read_npz(path: Any) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as members:
            return dict(members)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{os.fspath(path)}: no .npz file of plain arrays: {error}") from None


def _read_pt(path: Any) -> Any:
    torch = interop.imported("torch", "torch")
    try:
        return torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (RuntimeError, EOFError, ValueError, _unpickling_error()) as error:
        reason = (str(error).splitlines() or [""])[0]
        if isinstance(error, _unpickling_error()):
            raise UnsupportedValueError(
                f"{os.fspath(path)}: it holds more than tensors and plain values, which would run "
                f"code: {reason}; where you trust it, load it with PyTorch and save its state_dict"
            ) from None
        raise FormatError(f"{os.fspath(path)}: PyTorch cannot read it: {reason}") from None


def _unpickling_error() -> type[Exception]:
    """Return the class of what PyTorch raises for code, from where it is: nothing is unpickled."""
    found: type[Exception] = sys.modules["_pickle"].UnpicklingError
    return found


def _write_npz(path: Any, arrays: dict[str, Any]) -> None:
    hosts = {name: devices.to_host(array) for name, array in arrays.items()}
    for name, host in hosts.items():
        if host.dtype.kind not in "biufcSUmM":
            raise UnsupportedValueError(
                f"{name}: a .npz file has no {host.dtype}; convert the array first"
            )
    with storage.replacing_by_name(path) as name, zipfile.ZipFile(name, "w") as members:
        for key, host in hosts.items():
            with members.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, host, allow_pickle=False)


def _write_pt(path: Any, value: Any) -> None:
    torch = interop.imported("torch", "torch")
    tensors = interop.in_framework(dict(value) if type(value) is Entries else value, "torch")
    with storage.replacing_by_name(path) as name:
        torch.save(tensors, name)


_READERS: dict[str, Callable[[Any], Any]] = {
    "bson": _read_bson, "safetensors": _read_safetensors, "npz": _read_npz, "pt": _read_pt,
}  # fmt: skip
