"""Telling files of other kinds apart by their first bytes."""

from __future__ import annotations

import re

_BINARY = (
    (
        rb"7JL",
        "this is a stream of Julia's Serialization, which only the same Julia version reads; load "
        "it there and save it with BSON.jl",
    ),
    (
        rb"PK(?:\x03\x04|\x05\x06)",
        "this is a zip archive (torch.save, numpy.savez and Keras write them); `gpustore convert` "
        "makes a .bson of a .pt or .npz",
    ),
    (
        rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.",
        "this is a file of torch.save from before PyTorch 1.6; load it with torch.load where you "
        "trust it and save it with gpustore",
    ),
    (
        rb"\x80[\x02-\x05][\x95}\])c(\x8aKXUq.NGJMBC\x88\x89\x8c-\x8f]",
        "this is a Python pickle, which runs code when it is loaded and is never opened here; load "
        "it where you trust it and save it with gpustore",
    ),
    (
        rb"\x89HDF\r\n\x1a\n|HDF5-based Julia Data Format|Julia data file \(HDF5\)",
        "this is an HDF5 or JLD2 file; open it with h5py or with JLD2.jl",
    ),
    (rb"\x93NUMPY", "this is a NumPy .npy file; load it with numpy.load"),
    (
        rb"(?s).{4}\0{4}\{[\"\s}]",
        "this is a safetensors file; `gpustore convert` makes a .bson of it",
    ),
    (rb"GGUF", "this is a GGUF file; open it with the program it was made for"),
    (rb"\x1f\x8b\x08", "this is a gzip file; unpack it with gunzip first"),
    (rb"BZh[1-9]1AY&SY", "this is a bzip2 file; unpack it with bunzip2 first"),
    (rb"\xfd7zXZ\0", "this is an xz file; unpack it with unxz first"),
    (rb"\x28\xb5\x2f\xfd", "this is a zstd file; unpack it with unzstd first"),
)
_TEXT = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "this is a Git LFS pointer, not the file itself; run `git lfs pull` to fetch it",
    ),
    (
        rb"(?i)\s*<(?:!doctype|html|head|body|\?xml)",
        "this is an HTML or XML page, not the file itself; download the file again",
    ),
    (
        rb"\s*(?:\{\s*[\"}]|\[\s*(?:[\[{\"\]\d-]|true|false|null))",
        "this is JSON text, not BSON; load it with Python's json module",
    ),
    (rb"", "this is text, not BSON; find the file that it describes"),
)


def foreign_kind(head: bytes, nbytes: int) -> str | None:
    """Say what a file of another kind is and what to do with it; None for what may be BSON.

    `head` are the first bytes (512 are enough) of a file of `nbytes` bytes.

    >>> foreign_kind(b"", 0)
    'the file is empty; copy or save it again'
    """
    if nbytes == 0:
        return "the file is empty; copy or save it again"
    if _begins_as_bson(head, nbytes):
        return None
    text = re.fullmatch(rb"(?:\xef\xbb\xbf)?([\t\n\f\r\x20-\x7e\x80-\xff]{5,})", head)
    rows, start = (_TEXT, text[1]) if text else (_BINARY, head)
    return next((sentence for pattern, sentence in rows if re.match(pattern, start)), None)


def _begins_as_bson(head: bytes, nbytes: int) -> bool:
    """Whether the length, and the type and key of the first element, are such as BSON has.

    A length below that of the file is BSON's too: more may follow. The length -1 begins no other
    kind that is known here.
    """
    length = int.from_bytes(head[:4], "little", signed=True)
    if length == nbytes:
        return True
    element = re.match(rb"(?s).{4}[\x01-\x13\x7f\xff]([^\0]+)\0", head)
    if element is None or not 5 <= length < nbytes:
        return False
    return element[1].decode("utf-8", "surrogateescape").isprintable()
