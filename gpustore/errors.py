"""The exceptions of gpustore; each is also the built-in class a caller would catch anyway."""

from __future__ import annotations


class GpustoreError(Exception):
    """Root of all errors raised by gpustore: `except GpustoreError` catches them all."""


class FormatError(GpustoreError, ValueError):
    """The file is not of this kind, or is malformed.

    The message says what it is instead where that can be told (a zip archive, a pickle, text).
    """


class TruncatedFileError(FormatError, EOFError):
    """The file ends before what it declares does: a copy or a download that was cut."""


class FutureVersionError(FormatError):
    """The file was written by a newer format version than this package reads; update it."""


class UnsupportedValueError(GpustoreError, TypeError):
    """A value cannot be saved or converted, or an argument is of a kind that is not supported.

    The message names the value by its path (`model.layers[0].weight`); nothing has been written.
    """


class MismatchError(GpustoreError, ValueError):
    """Model and weights, or a layer and its input, differ in structure, shape or dtype.

    All differences of one call are in one message, and nothing has been changed.
    """


class IntegrityError(GpustoreError, OSError):
    """A digest differs from the bytes it was made of: the file or a copy is damaged."""


class CUDAUnavailableError(GpustoreError, RuntimeError):
    """CUDA is needed and cannot be used here.

    `cause` is one word of `CUDAStatus.cause`, or "no-such-ordinal". The message names the file, the
    tags of its arrays and the ways out: `device="cpu"` now, `cpu(model)` before saving.
    """

    cause: str | None

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class DeviceMemoryError(GpustoreError, MemoryError):
    """Memory of a device, or pinned host memory, does not suffice.

    The message says how much was asked for and how much is free. What had been placed is released.
    """


class DeviceError(GpustoreError, RuntimeError):
    """A device failed at work: lost, taken by another process, or stopped by an earlier error."""


class DeviceDataLostError(GpustoreError, RuntimeError):
    """The file holds GPU pointers in place of values: Julia saved the model while it was on a GPU.

    The message names each such array with type and shape; `load(..., lost="placeholder")` gives
    the rest of the file.
    """


class OpaqueCodeError(GpustoreError, RuntimeError):
    """Julia code that cannot be run here.

    The message names the Julia function and how to supply one of Python:
    `load(..., functions={"Main.f": f})`.
    """


class MissingExtraError(GpustoreError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class EntryNotFoundError(GpustoreError, KeyError):
    """The file has no entry, or no array, of this name."""

    def __str__(self) -> str:  # KeyError would quote the sentence
        return str(self.args[0])
