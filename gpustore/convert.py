"""Files of other kinds to and from .bson: .safetensors, .npz of NumPy, .pt of PyTorch."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpustore import devices, interop, npz_format, parameters, safetensors_format, storage, tree
from gpustore.errors import FormatError, UnsupportedValueError
from gpustore.load import load
from gpustore.safetensors_format import METADATA
from gpustore.save import save
from gpustore.values import Entries

_MAX_PLACES = 1_000_000
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
    .bson file is verified, and so are the checksums of a .npz. Arrays are streamed, but for those
    of a compressed .npz. The target appears whole or not at all. `progress(done, total)` counts the
    bytes of the source, then those of the target.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/weights.npz", w=np.ones(3))
    ...     convert(f"{folder}/weights.npz", f"{folder}/weights.bson")
    1
    """
    kinds = _kind(source), _kind(target)
    if kinds[0] == kinds[1]:
        raise UnsupportedValueError(f"{source} and {target} are of one kind; copy the file")
    value = _READERS[kinds[0]](source, progress)
    if kinds[1] == "bson":
        save(target, value, progress=progress)
        return len(_named_arrays(value))
    metadata: dict[str, str] = {}
    if kinds[1] == "safetensors" and isinstance(value, dict) and _is_metadata(value.get(METADATA)):
        metadata = value[METADATA]
        value = {name: part for name, part in value.items() if name != METADATA}
    if arrays_only:
        value = _named_arrays(parameters.data(value))
    _refuse_loss(source, kinds[1], value, unshare=unshare)
    if kinds[1] == "pt":
        _write_pt(target, value)
        return len(_named_arrays(value))
    arrays = _named_arrays(value)
    if kinds[1] == "npz":
        npz_format.write(target, arrays, progress)
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
        if len(found) + len(stack) > _MAX_PLACES:
            raise UnsupportedValueError(
                f"expected at most {_MAX_PLACES} values in all places that hold them, found more; "
                "what is shared is in too many places to be written in each"
            )
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


def _read_bson(path: Any, progress: Progress | None) -> Any:
    return load(path, device="cpu", verify=True, progress=progress)


def _read_safetensors(path: Any, progress: Progress | None) -> dict[str, Any]:
    arrays, metadata = safetensors_format.read(path)
    return arrays | ({METADATA: metadata} if metadata else {})


def _read_pt(path: Any, progress: Progress | None) -> Any:
    torch = interop.imported("torch", "torch")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets in a file that is none
        name = os.fspath(path)
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise UnsupportedValueError(
                f"{name}: it holds more than tensors and plain values: reading it would run code "
                f"({asked[1]}); where you trust it, load it with PyTorch and save its state_dict"
            ) from None
        is_told = isinstance(error, RuntimeError)  # what others say is of the unpickler's insides
        reason = str(error).partition(". ")[0] if is_told else "it is no checkpoint, or damaged"
        raise FormatError(f"{name}: PyTorch cannot read it: {reason}") from None


def _write_pt(path: Any, value: Any) -> None:
    torch = interop.imported("torch", "torch")
    tensors = interop.in_framework(dict(value) if type(value) is Entries else value, "torch")
    with storage.replacing_by_name(path) as name:
        torch.save(tensors, name)


_READERS: dict[str, Callable[[Any, Progress | None], Any]] = {
    "bson": _read_bson, "safetensors": _read_safetensors, "npz": npz_format.read, "pt": _read_pt,
}  # fmt: skip
