"""Saving: values are lowered into a document, laid out, and streamed into a new file."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from gpustore import devices, document, ring, storage, transfer, tree
from gpustore.dictionaries import is_document
from gpustore.digest import blake3_digest, hasher
from gpustore.document import PAYLOAD_DIGEST, STRUCTURE_DIGEST, Payload, Plan, Slot
from gpustore.errors import UnsupportedValueError
from gpustore.flux import in_layout, is_of_optimiser, kind_of
from gpustore.julia import JuliaType, Struct
from gpustore.lower import Lowerer
from gpustore.newfile import NewFile
from gpustore.typeof import numpy_dtype
from gpustore.values import Entries
from gpustore.version import __version__

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

WRITER = f"gpustore {__version__}"
_GATHER_NBYTES = 1024 * 1024  # smaller pieces are gathered into writes of this size
BESIDE_NBYTES = 1024 * 1024  # chunks from this size on are hashed beside the writing
Progress = Callable[[int, int], None]


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


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Hold back the cyclic garbage collector, which else goes over all that is made time and again.

    What is made here stays alive until the end, so there is nothing to collect.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plan_of(root: Any, *, tag_devices: bool, layout: str = "auto") -> Plan:
    """Lower `root` and lay the file out; nothing is written."""

    scratch = transfer.Scratch()

    def make_payload(array: Any, order: str) -> Payload | NDArray[Any]:
        return transfer.payload_of(array, numpy_dtype(array), order, scratch)

    column_major, spelling = _surveyed(root)
    lowerer = Lowerer(make_payload, column_major, tag_devices, spelling)
    try:
        return document.plan(_lower_root(lowerer, root), writer=WRITER, layout=layout)
    except RecursionError:
        raise UnsupportedValueError(
            "the value is nested too deep to be saved; flatten it"
        ) from None


def _surveyed(root: Any) -> tuple[set[int], frozenset[str]]:
    """Return the ids of arrays that Julia holds column-major, and a spelling.

    The arrays are fields of layers, or anywhere within optimisers: these expect the moments of a
    weight in the type of the weight. The spelling is which of Core and Base the file these values
    came from calls Main's.
    """
    ids: set[int] = set()
    spelling = root.spelling if isinstance(root, Entries) else None
    for node in tree.containers(root):
        kind = kind_of(node)
        if kind is not None and kind.is_layer:
            ids.update(id(getattr(node, name, None)) for name in kind.fields)
        elif type(node) is Struct and is_of_optimiser(node.type):
            ids.update(id(array) for _, array in tree.arrays(tree.walk(node)))
        if spelling is None:
            spelling = _spelling_of(node)
    return ids, spelling or frozenset()


def _spelling_of(node: Any) -> frozenset[str] | None:
    """Return the spelling that the type of one value shows, or None where it shows none."""
    own = getattr(node, "julia_type", None) or getattr(node, "type", None)
    if not isinstance(own, JuliaType):
        return None
    paths = [own.path, *(param.path for param in own.params if isinstance(param, JuliaType))]
    main = {path[1] for path in paths if len(path) > 2 and path[0] == "Main"}
    if not main & {"Core", "Base"}:
        return None
    return frozenset({"Core", "Base"} if "Core" in main else {"Base"})


def _lower_root(lowerer: Lowerer, root: Any) -> dict[str, Any]:
    if type(root) in _ENTRIES and is_document(root):
        node: Any = {}
        lowerer.put_named(node, root, "an entry's name", str)
    else:
        holder: dict[str, Any] = {}
        lowerer.put(holder, "value", root, "value")
        node = holder["value"]
        if type(node) is not dict or node.get("tag", "backref") == "backref":
            some = JuliaType.named("Base.Some", JuliaType.named("Core.Any"))
            node = lowerer.struct(some, [node]) | {"python": "value"}
    if lowerer.backrefs:
        node["_backrefs"] = lowerer.backrefs
    return dict(node)


def write_plan(
    path: str | os.PathLike[str], plan: Plan, durable: bool, progress: Progress | None
) -> None:
    """Stream a plan into a new file at `path`, filling in the digests on the way."""
    with (
        storage.replacing(path, nbytes=plan.nbytes, durable=durable) as file,
        _hashing_thread(plan, file) as beside,
    ):
        out = _Output(file, plan.nbytes, progress)
        _write_device_arrays(file, out, plan)
        write = _write_detached if plan.places else _write_inline
        write(file, out, plan, beside)


def _write_device_arrays(file: NewFile, out: _Output, plan: Plan) -> None:
    """Write large arrays of devices before all else, at their places."""
    if all(payload.device_array is None for payload in plan.payloads):
        return
    offsets = [place.offset for place in plan.places]
    if not offsets:
        position = 0
        for structure, payload in zip(plan.structures, plan.payloads, strict=False):
            offsets.append(position + len(structure))
            position = offsets[-1] + payload.nbytes
    ring.write_device_arrays(file, plan.payloads, offsets, out.report)


@contextlib.contextmanager
def _hashing_thread(plan: Plan, file: NewFile) -> Iterator[ThreadPoolExecutor | None]:
    """Give one thread that hashes what another makes and writes; None where it does not pay."""
    if not any(_is_hashed_beside(payload, file) for payload in plan.payloads):
        yield None
        return
    from concurrent.futures import ThreadPoolExecutor  # 10 ms, for large arrays only

    with ThreadPoolExecutor(1, "gpustore-hashing") as beside:
        yield beside


def _is_hashed_beside(payload: Payload, file: NewFile) -> bool:
    """Whether that pays: a direct file hashes what it copies, which is less than making it."""
    is_large = payload.make_row is None and payload.nbytes >= BESIDE_NBYTES
    return is_large and (payload.is_made or file.direct is None)


def _stream(payload: Payload, out: _Output, beside: ThreadPoolExecutor | None, into: Any) -> None:
    """Write the chunks of a payload and hash them, on the thread beside if that pays.

    There each is hashed while it is written and the next one is made.
    """
    if into is None or beside is None or not _is_hashed_beside(payload, out.file):
        for chunk in payload.chunks():
            out.write(chunk, into)
        return
    hashing: Future[Any] | None = None
    try:
        for chunk in payload.chunks():
            if hashing is not None:
                hashing.result()
            hashing = beside.submit(into.update, chunk)
            out.write(chunk)
    finally:
        if hashing is not None:
            hashing.result()


def _stream_hashed(payload: Payload, out: _Output, beside: ThreadPoolExecutor | None) -> bytes:
    """Write the chunks of a payload, as far as it has not been done; return its digest."""
    if payload.content is not None:
        octets = payload.content.tobytes()
        out.write(octets)
        return blake3_digest(octets)
    if payload.is_written:
        out.skip(payload.nbytes)
    elif payload.digest is not None:
        _stream(payload, out, beside, None)
    if payload.digest is not None:
        return payload.digest
    own = hasher()
    _stream(payload, out, beside, own)
    return own.digest()


def _write_inline(
    file: NewFile, out: _Output, plan: Plan, beside: ThreadPoolExecutor | None
) -> None:
    """Write structures and payloads in turn; the digest of a payload follows it."""
    whole = hasher()
    for index, payload in enumerate(plan.payloads):
        whole.update(plan.structures[index])
        out.write(plan.structures[index])
        if payload.make_row is not None:  # the digests are in it
            for octets, structure in payload.make_row():
                whole.update(structure)
                out.write(octets)
        elif payload.is_bare:
            _stream(payload, out, beside, whole)
        else:
            plan.structures[index + 1][PAYLOAD_DIGEST] = _stream_hashed(payload, out, beside)
    last = plan.structures[-1]
    whole.update(last[: STRUCTURE_DIGEST.start])
    whole.update(last[STRUCTURE_DIGEST.stop :])
    last[STRUCTURE_DIGEST] = whole.digest()
    out.write(last)
    out.flush()


def _write_detached(
    file: NewFile, out: _Output, plan: Plan, beside: ThreadPoolExecutor | None
) -> None:
    """Stream the payloads to their places, then the document, which holds their digests."""
    (structure,) = plan.structures
    position, gaps = len(structure), []
    file.seek(position)
    for payload, place in zip(plan.payloads, plan.places, strict=True):
        gaps.append(bytes(place.offset - position))
        out.write(gaps[-1])
        if payload.make_row is not None:  # the digests are in the document
            for octets, gap in payload.make_row():
                gaps.append(gap)
                out.write(octets)
        elif place.digest is not None:
            structure[place.digest] = _stream_hashed(payload, out, beside)
        position = place.offset + payload.nbytes
    out.flush()
    whole = hasher()
    whole.update(structure[: STRUCTURE_DIGEST.start])
    whole.update(structure[STRUCTURE_DIGEST.stop :])
    for gap in gaps:
        whole.update(gap)
    structure[STRUCTURE_DIGEST] = whole.digest()
    file.seek(0)
    out.write(structure)
    out.flush()


class _Output:
    """Gathers small pieces into writes of `_GATHER_NBYTES`, and reports what is written."""

    def __init__(self, file: NewFile, nbytes: int, progress: Progress | None) -> None:
        self.file, self.nbytes, self.progress = file, nbytes, progress
        self.done, self.gathered = 0, bytearray()

    def write(self, piece: Any, hasher: Any = None) -> None:
        view = memoryview(piece)
        if len(self.gathered) + view.nbytes < _GATHER_NBYTES:
            self.gathered += view
            if hasher is not None:
                hasher.update(view)
            return
        self.flush()
        self.file.write(view, hasher)
        self.report(view.nbytes)

    def flush(self) -> None:
        gathered, self.gathered = self.gathered, bytearray()
        if gathered:
            self.file.write(gathered)
            self.report(len(gathered))

    def skip(self, nbytes: int) -> None:
        """Go on after bytes that are in the file already, and reported."""
        self.flush()
        self.file.skip(nbytes)

    def report(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.nbytes)


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

    entries = {key: copied(child) for key, child in content.items() if key != "_gpustore"}
    write_plan(path, document.plan(entries, writer=WRITER), True, progress)


_REMADE = ("device", "_", "data", "blake3")  # of an array document: dropped or written anew


def _slot_payload(buffer: Any, slot: Slot) -> Payload:
    def chunks() -> Iterator[Any]:
        for start in range(slot.offset, slot.offset + slot.nbytes, transfer.CHUNK_NBYTES):
            stop = min(start + transfer.CHUNK_NBYTES, slot.offset + slot.nbytes)
            yield memoryview(buffer)[start:stop]

    return Payload(slot.nbytes, chunks)
