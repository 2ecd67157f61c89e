"""Array documents -> checked specs; rows of them -> arrays made at once."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from gpustore import rows
from gpustore.digest import DIGEST_NBYTES
from gpustore.document import Slot
from gpustore.dtypes import dtype_of, extension_dtype
from gpustore.errors import FormatError
from gpustore.julia import (
    ArraySpec,
    JuliaType,
    OpaqueDocument,
    Struct,
    is_of_both_orders,
)
from gpustore.values import JuliaArray

MAX_RANK = 32
_DEVICE_TAG = r"cuda:(0|[1-9][0-9]{0,2})"


def lift_alike(lifter: Any, nodes: Collection[Any]) -> None:
    """Lift arrays of which many are alike into the memo, without making a spec for each."""
    if lifter.make_row is not None and len(nodes) >= rows.FEWEST:
        lift_groups(lifter, [[node] for node in nodes])


def lift_groups(lifter: Any, groups: Sequence[list[Any]]) -> None:
    """Lift arrays into the memo as `lift_alike` does; those in one list are known to be alike."""
    if lifter.make_row is None or sum(map(len, groups)) < rows.FEWEST:
        return
    for nodes, inner, firsts in rows.groups(groups):
        if _differ_in_bytes_only(firsts):
            _lift_row(lifter, nodes, inner)


def _lift_row(lifter: Any, nodes: list[Any], inner: list[Any]) -> None:
    """Lift nodes that differ in bytes only, if they are for it; `inner` are the arrays in them."""
    if "python" in inner[0]:  # bytes
        return
    spec = None
    with contextlib.suppress(FormatError):  # it is raised again where its path is known
        array_spec(lifter, inner[0], "")
        own = quick_spec(lifter, inner[0])
        if own is not None and inner[0] is not nodes[0]:
            own = row_major_spec(lifter.type_in(nodes[0], ""), own)
        spec = own
    if spec is None:
        return
    arrays = lifter.make_row(spec, [node["data"] for node in inner])
    if arrays is not None:
        lifter.memo.update(zip(map(id, nodes), arrays, strict=True))


def _differ_in_bytes_only(nodes: list[dict[str, Any]]) -> bool:
    """Whether array documents that share type and size have the same keys, and as much in them."""
    keys = nodes[0].keys()
    if not all(map(keys.__eq__, map(dict.keys, nodes))):
        return False
    columns = ([node[key] for node in nodes] for key in ("data", "blake3") if key in keys)
    return all(map(_are_of_one_size, columns))


def _are_of_one_size(binaries: list[Any]) -> bool:
    kinds = {*map(type, binaries)}
    if kinds == {bytes}:
        return len({*map(len, binaries)}) == 1
    return kinds == {Slot} and len({slot.nbytes for slot in binaries}) == 1


def row_major_spec(julia_type: Any, parent: ArraySpec) -> ArraySpec | None:
    """Return the spec of the PermutedDimsArray that reverses the dimensions of its parent.

    None for one that does not, or whose memory is column-major too.
    """
    rank = julia_type.reversed_rank if isinstance(julia_type, JuliaType) else 0
    if rank == 0 or len(parent.shape) != rank or is_of_both_orders(parent.shape):
        return None
    shape, kept = parent.shape[::-1], (parent.device, parent.payload, parent.digest)
    return ArraySpec(parent.dtype, shape, "C", *kept)


def lift_row_major(lifter: Any, node: Any, julia_type: Any, content: Any, path: str) -> Any:
    """Lift a PermutedDimsArray that reverses its parent's dimensions: a row-major array."""
    parent = lifter.resolve(content[0], path) if len(content) == 1 else None
    if not isinstance(parent, dict) or parent.get("tag") != "array":
        return NotImplemented
    spec = array_spec(lifter, parent, path)
    if not isinstance(spec, ArraySpec):
        return NotImplemented
    whole = row_major_spec(julia_type, spec)
    if whole is None:
        return NotImplemented
    keep(lifter, node, whole)
    if id(parent) not in lifter.parents:  # all that turn one parent are its memory, as in Julia
        lifter.parents[id(parent)] = lifter.make_array(whole, path)
    return lifter.parents[id(parent)]


def keep(lifter: Any, node: Any, spec: ArraySpec) -> None:
    """Remember what a document is for others like it, if it was read like one of another file."""
    like = lifter.alike.get(id(node))
    if like is not None and not like.is_object:
        like.lifted = functools.partial(ArraySpec, spec.dtype, spec.shape, spec.order, spec.device)


def like_another(like: Any, node: Any) -> ArraySpec:
    """Return the spec of a document that is like one which was lifted."""
    inner = node if "size" in node else node["data"][0]  # as of those that `keep` keeps
    spec: ArraySpec = like.lifted(inner["data"], inner.get("blake3"))
    return spec


def array_spec(lifter: Any, node: dict[str, Any], path: str) -> ArraySpec | JuliaArray:
    """Check an array document against its own payload."""
    quick = quick_spec(lifter, node)
    if quick is not None:
        return quick
    shape = shape_of(lifter, node, path)
    element_type = lifter.type_in(node, path)
    if not isinstance(element_type, (JuliaType, OpaqueDocument, Struct)):
        what = type(element_type).__name__
        raise lifter.malformed(path, f"the element type of an array is a {what}")
    payload = lifter.field(node, "data", (bytes, Slot, list), path)
    dtype = dtype_at(lifter, node, element_type, path)
    kind = element_type if isinstance(element_type, JuliaType) else None
    if dtype is not None and "dtype" not in node and kind is not None and not kind.params:
        lifter.dtypes[kind.path] = dtype
    if dtype is None or isinstance(payload, list):
        count, found = math.prod(shape), nbytes_of(payload)
        if count != found if isinstance(payload, list) else found % count if count else found:
            raise lifter.malformed(path, f"{found} elements or bytes do not fill {shape}")
        if isinstance(payload, list):
            array = lifter.memo[id(node)] = JuliaArray(element_type, shape, [])
            array.data = lifter.elements(payload, path)
            return array
        return JuliaArray(element_type, shape, lifter.bytes_of(payload))
    expected, found = math.prod(shape) * dtype.itemsize, nbytes_of(payload)
    if expected != found:
        raise lifter.malformed(
            path, f"expected {expected} bytes for {dtype} {shape}, found {found}"
        )
    device, digest = node.get("device", "cpu"), node.get("blake3")
    is_tag = isinstance(device, str) and (device == "cpu" or re.fullmatch(_DEVICE_TAG, device))
    if not is_tag:
        raise lifter.malformed(path, f"expected a device tag `cuda:<n>`, found {device!r}")
    if digest is not None:
        if type(digest) not in (bytes, Slot) or nbytes_of(digest) != DIGEST_NBYTES:
            raise lifter.malformed(path, f"the digest is not of {DIGEST_NBYTES} bytes")
        digest = lifter.bytes_of(digest)
    return ArraySpec(dtype, shape, "F", device, payload, digest)


def quick_spec(lifter: Any, node: dict[str, Any]) -> ArraySpec | None:
    """Return the spec of an array document of the usual form; None where it needs a look.

    What is known of a type and a size that many documents share is kept.
    """
    kind: Any = node.get("type")
    sizes: Any = node.get("size")
    payload: Any = node.get("data")
    digest = node.get("blake3")
    if "dtype" in node or "device" in node:
        return None
    if digest is not None and (type(digest) is not bytes or len(digest) != DIGEST_NBYTES):
        return None
    head = lifter.heads.get((id(kind), id(sizes)))
    if head is None:
        head = _usual_head(lifter, kind, sizes)
        if head is None:
            return None
        lifter.heads[id(kind), id(sizes)] = head
    is_payload = type(payload) is bytes or type(payload) is Slot
    if not is_payload or head[2] != (len(payload) if type(payload) is bytes else payload[1]):
        return None
    return ArraySpec(head[0], head[1], "F", "cpu", payload, digest)


def _usual_head(lifter: Any, kind: Any, sizes: Any) -> tuple[Any, ...] | None:
    """Return dtype, shape and nbytes, and `kind` and `sizes`, whose ids are theirs by that."""
    is_usual = type(kind) is dict and kind.get("params") == [] and type(sizes) is list
    if not is_usual or kind.get("tag") != "datatype" or len(sizes) > MAX_RANK:
        return None
    names = kind.get("name")
    if type(names) is not list:
        return None
    try:
        dtype, count = lifter.dtypes.get(tuple(names)), 1
    except TypeError:
        return None
    for size in sizes:
        if type(size) is not lifter.int64 or size <= 0:
            return None
        count *= size
    if dtype is None:
        return None
    return dtype, tuple(map(int, sizes)), count * dtype.itemsize, kind, sizes


def shape_of(lifter: Any, node: dict[str, Any], path: str) -> tuple[int, ...]:
    sizes = lifter.field(node, "size", list, path)
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**62:
            raise lifter.malformed(path, f"the size of an array is {sizes!r}")
    if len(sizes) > MAX_RANK:
        raise lifter.malformed(path, f"expected at most {MAX_RANK} dimensions, not {len(sizes)}")
    shape = tuple(int(size) for size in sizes)
    if math.prod(size for size in shape if size) >= 2**62:
        raise lifter.malformed(path, f"an array of shape {shape} is too large to address")
    return shape


def dtype_at(
    lifter: Any, node: dict[str, Any], element_type: Any, path: str
) -> np.dtype[Any] | None:
    dtype, name = dtype_of(element_type), node.get("dtype")
    if name is None:
        return dtype
    extension = extension_dtype(name) if isinstance(name, str) else None
    if extension is None or dtype is None or extension.itemsize != dtype.itemsize:
        raise lifter.malformed(path, f"{name!r} is no dtype carried by {element_type!r}")
    return extension


def nbytes_of(payload: Any) -> int:
    return payload.nbytes if isinstance(payload, Slot) else len(payload)
