"""Saving: values are lowered into a document, laid out, and streamed into a new file."""

from __future__ import annotations

import copy
import gc
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpustore import devices, document, transfer, tree
from gpustore.dictionaries import is_document
from gpustore.document import Payload, Plan, Slot
from gpustore.errors import UnsupportedValueError
from gpustore.flux import in_layout
from gpustore.julia import JuliaType
from gpustore.layout import STAMP
from gpustore.lower import Lowerer
from gpustore.output import Progress, write_plan
from gpustore.small import Filled, SmallArray
from gpustore.survey import survey
from gpustore.typeof import numpy_dtype, remembering
from gpustore.values import Entries
from gpustore.version import __version__

if TYPE_CHECKING:
    from numpy.typing import NDArray

WRITER = f"gpustore {__version__}"


def save(
    path: str | os.PathLike[str],
    value: Any = ...,
    /,
    *,
    on_gpu: str = "transfer",
    durable: bool = True,
    layout: str = "auto",
    flux: str | None = None,
    progress: Progress | None = None,
    **named: Any,
) -> None:
    """Save `value` and the `named` entries as one `.bson` file that gpustore and Julia read.

    A dict with string keys gives the entries of the file; any other value is the file. Arrays may
    lie on any device. The file appears whole or not at all; where there was one, it is replaced.

    - `on_gpu`: "transfer" writes GPU arrays as CPU arrays, "tag" writes their device beside the
      values, "error" refuses them by name.
    - `durable`: the file has reached the disk when the call returns.
    - `layout`: "inline" keeps arrays within the document, where Julia reads them; "detached" puts
      them after it, for any size; "auto" is inline below 2 GiB.
    - `flux`: the version of Flux, such as "0.14", whose layout of layers is written; without it
      layers from a file keep theirs, others have the newest.
    - `progress(done, total)` is called with bytes, as they are written.

    Raises UnsupportedValueError, naming the path of a value that cannot be saved, before anything
    is written; DeviceMemoryError and DeviceError where a GPU fails; OSError where the file system
    refuses. The old file then stays as it is.

    >>> import gpustore as gs, numpy as np, tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = os.path.join(folder, "weights.bson")
    ...     gs.save(file, weights=np.arange(3))
    ...     gs.load(file, "weights")
    array([0, 1, 2])
    """
    if on_gpu not in ("transfer", "tag", "error"):
        raise UnsupportedValueError(
            f"on_gpu: expected 'transfer', 'tag' or 'error', found {on_gpu!r}"
        )
    if layout not in ("auto", "inline", "detached"):
        raise UnsupportedValueError(
            f"layout: expected 'auto', 'inline' or 'detached', found {layout!r}"
        )
    root = _root(value, named)
    if flux is not None:
        root = in_layout(root, flux)
    if on_gpu == "error":
        _refuse_gpu_arrays(root)
    with paused_collector():
        plan = plan_of(root, tag_devices=on_gpu == "tag", layout=layout)
    write_plan(path, plan, durable, progress)


_ENTRIES = (dict, Entries, OrderedDict)


def _root(value: Any, named: dict[str, Any]) -> Any:
    """Return what the file holds: a dict of entries, or one other value."""
    if value is ... and not named:
        raise UnsupportedValueError(
            "save: expected a value or named entries, found neither; say save(path, model=model)"
        )
    if named and (value is None or value is ...):
        return named
    is_entries = type(value) in _ENTRIES and {*map(type, value)} <= {str}
    if not named:
        return copy.copy(value) if is_entries else value
    if not is_entries:
        raise UnsupportedValueError(
            f"save: expected a dict with string keys beside named entries, found "
            f"{type(value).__qualname__}; give it a name too"
        )
    twice = sorted(value.keys() & named.keys())
    if twice:
        raise UnsupportedValueError(f"save: the entry {twice[0]!r} is given twice")
    return {**value, **named}


def _refuse_gpu_arrays(root: Any) -> None:
    found = [
        f"{path} ({device})"
        for path, array in tree.arrays(tree.walk_entries(root))
        if (device := devices.array_device(array)) != "cpu"
    ]
    if found:
        raise UnsupportedValueError(
            f"on_gpu='error': {len(found)} arrays are on a GPU: {', '.join(found[:20])}; save "
            "cpu(model), or leave on_gpu at 'transfer'"
        )


class paused_collector:
    """Hold back the cyclic garbage collector, which else goes over all that is made time and again.

    What is made within stays alive until the end, so there is nothing to collect.
    """

    def __enter__(self) -> None:
        self.was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *exc_info: object) -> None:
        if self.was_enabled:
            gc.enable()


def plan_of(root: Any, *, tag_devices: bool, layout: str = "auto") -> Plan:
    """Lower `root` and lay the file out; nothing is written."""

    scratch = transfer.Scratch()

    def make_payload(array: Any, order: str) -> Payload | NDArray[Any]:
        return transfer.payload_of(array, numpy_dtype(array), order, scratch)

    known = survey(root)
    lowerer = Lowerer(make_payload, known.column_major, tag_devices, known.spelling, known.forms)
    try:
        with remembering(known.forms):
            lowered = _lower_root(lowerer, root)
        return document.plan(lowered, writer=WRITER, layout=layout)
    except RecursionError:
        raise UnsupportedValueError(
            "the value is nested too deep to be saved; flatten it"
        ) from None


def _lower_root(lowerer: Lowerer, root: Any) -> dict[str, Any]:
    if type(root) in _ENTRIES and is_document(root):
        node: Any = {}
        lowerer.put_named(node, root, "an entry's name", str)
    else:
        holder: dict[str, Any] = {}
        lowerer.put(holder, "value", root, "value")
        node = holder["value"]
        if type(node) is SmallArray or type(node) is Filled:
            node = node.document()
        if type(node) is not dict or node.get("tag", "backref") == "backref":
            some = JuliaType.named("Base.Some", JuliaType.named("Core.Any"))
            node = lowerer.struct(some, [node]) | {"python": "value"}
    if lowerer.backrefs:
        node["_backrefs"] = lowerer.backrefs
    return dict(node)


def save_document(
    path: str | os.PathLike[str],
    content: dict[str, Any],
    buffer: Any,
    progress: Progress | None = None,
) -> None:
    """Write a scanned document (`slot_nbytes=0`) anew without device tags, streaming its arrays.

    Nothing is lifted, so all that the document holds is kept as it is.
    """

    def copied(node: Any) -> Any:
        if isinstance(node, list):
            return [copied(child) for child in node]
        if isinstance(node, Slot):
            return bytes(buffer[node.offset : node.offset + node.nbytes])
        if not isinstance(node, dict):
            return node
        if node.get("tag") == "array" and isinstance(node.get("data"), Slot):
            kept = {key: copied(node[key]) for key in node if key not in _REMADE}
            return kept | {"data": _slot_payload(buffer, node["data"])}
        return {key: copied(child) for key, child in node.items()}

    entries = {key: copied(child) for key, child in content.items() if key != STAMP}
    write_plan(path, document.plan(entries, writer=WRITER), True, progress)


_REMADE = ("device", "_", "data", "blake3")  # of an array document: dropped or written anew


def _slot_payload(buffer: Any, slot: Slot) -> Payload:
    def chunks() -> Iterator[Any]:
        for start in range(slot.offset, slot.offset + slot.nbytes, transfer.CHUNK_NBYTES):
            stop = min(start + transfer.CHUNK_NBYTES, slot.offset + slot.nbytes)
            yield memoryview(buffer)[start:stop]

    return Payload(slot.nbytes, chunks, is_host=True)
