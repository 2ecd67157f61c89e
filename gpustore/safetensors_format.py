"""The safetensors format: arrays mapped from a file, and streamed into one, in every dtype of it.

The layout is that of the README of huggingface/safetensors: the size of the header in 8 bytes, the
header in JSON, then the arrays row-major and little-endian, without gaps. (The package of that name
gives bfloat16 and float8 to PyTorch only, and holds all bytes at once to write a file.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from gpustore import storage, transfer
from gpustore.errors import FormatError, TruncatedFileError, UnsupportedValueError
from gpustore.storage import MappedFile
from gpustore.typeof import numpy_dtype

METADATA = "__metadata__"
_MAX_HEADER_NBYTES = 100_000_000
_DTYPES = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"), "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the arrays of a file by name, views of the mapped file, and its metadata.

    Everything that the header says is checked before it is used. Raises FormatError,
    TruncatedFileError, UnsupportedValueError for a dtype that NumPy and ml_dtypes lack.
    """
    file = MappedFile.open(path)
    header, start = _header(file)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{file.path}: {METADATA}: expected strings by name")
    arrays: dict[str, Any] = {}
    end = 0
    for name, about in sorted(header.items(), key=lambda item: _offsets(file.path, *item)):
        dtype, shape, (first, last) = _described(file.path, name, about)
        if first != end or last - first != math.prod(shape) * dtype.itemsize:
            raise FormatError(
                f"{file.path}: {name}: expected {math.prod(shape) * dtype.itemsize} bytes from "
                f"{end} on for {dtype} {shape}, found {last - first} from {first} on"
            )
        end = last
        if start + end > file.nbytes:
            raise TruncatedFileError(
                f"{file.path}: {name}: expected {start + end} bytes or more, found {file.nbytes}; "
                "the file is cut off: copy or download it again"
            )
        arrays[name] = transfer.host_view(file.buffer, start + first, dtype, shape, "C")
    if start + end != file.nbytes:
        raise FormatError(f"{file.path}: expected {start + end} bytes, found {file.nbytes}")
    return arrays, metadata


def _header(file: MappedFile) -> tuple[dict[str, Any], int]:
    nbytes = int.from_bytes(file.buffer[:8], "little")
    if file.nbytes < 8 or nbytes > file.nbytes - 8:
        raise TruncatedFileError(
            f"{file.path}: expected a header of {nbytes} bytes, found {max(file.nbytes - 8, 0)}; "
            "the file is cut off, or no safetensors file"
        )
    if nbytes > _MAX_HEADER_NBYTES:
        raise FormatError(
            f"{file.path}: expected a header of {_MAX_HEADER_NBYTES} bytes at most, found {nbytes}"
        )
    try:
        header = json.loads(bytes(file.buffer[8 : 8 + nbytes]), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.path}: the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FormatError(f"{file.path}: the header is no JSON object")
    return header, 8 + nbytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _offsets(path: str, name: str, about: Any) -> tuple[int, int]:
    found: Any = about.get("data_offsets") if isinstance(about, dict) else None
    if not _are_counts(found) or len(found) != 2 or found[0] > found[1]:
        raise FormatError(f"{path}: {name}: expected data_offsets [begin, end], found {found!r}")
    return found[0], found[1]


def _described(path: str, name: str, about: Any) -> tuple[Any, tuple[int, ...], tuple[int, int]]:
    shape, code = about.get("shape"), about.get("dtype")
    if not _are_counts(shape) or len(shape) > 32:
        raise FormatError(f"{path}: {name}: expected a shape of 32 sizes at most, found {shape!r}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise UnsupportedValueError(
            f"{path}: {name}: expected one of the dtypes {', '.join(_DTYPES)}, found {code!r}"
        )
    return _DTYPES[code], tuple(shape), _offsets(path, name, about)


def _are_counts(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 2**63 for n in found)


def write(
    path: str | os.PathLike[str],
    arrays: dict[str, Any],
    metadata: dict[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Stream arrays of any device into a new file, the widest dtypes first: all are aligned.

    The file appears whole or not at all. Raises UnsupportedValueError for a dtype that the format
    lacks, before anything is written.
    """
    if METADATA in arrays:
        raise UnsupportedValueError(f"{METADATA}: a safetensors file has no array of this name")
    dtypes = {name: numpy_dtype(array).newbyteorder("<") for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        if dtype not in _CODES:
            raise UnsupportedValueError(
                f"{name}: a safetensors file has no {dtype}; convert the array first"
            )
    header: dict[str, Any] = {METADATA: metadata} if metadata else {}
    position, names = 0, sorted(arrays, key=lambda name: -dtypes[name].itemsize)
    for name in names:
        shape = [int(n) for n in arrays[name].shape]
        end = position + math.prod(shape) * dtypes[name].itemsize
        code = _CODES[dtypes[name]]
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    nbytes = 8 + len(text) + position
    scratch = transfer.Scratch()
    with storage.replacing(path, nbytes=nbytes) as file:
        file.reserve()
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            payload = transfer.payload_of(arrays[name], numpy_dtype(arrays[name]), "C", scratch)
            for chunk in (payload,) if isinstance(payload, np.ndarray) else payload.chunks():
                file.write(chunk)
                if progress is not None:
                    progress(file.written, nbytes)
