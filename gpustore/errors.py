"""The exceptions of gpustore; each is also the built-in class a caller would catch anyway."""

from __future__ import annotations


class GpustoreError(Exception):
    """Root of all errors raised by gpustore."""


class FormatError(GpustoreError, ValueError):
    """The file is not of this kind, or is malformed."""


class TruncatedFileError(FormatError, EOFError):
    """The file ends before what it declares does."""


class FutureVersionError(FormatError):
    """The file was written by a newer format version than this package reads."""


class UnsupportedValueError(GpustoreError, TypeError):
    """A value cannot be saved, or an argument is of a kind that is not supported."""


class MismatchError(GpustoreError, ValueError):
    """Model and weights differ in structure, shape or dtype."""


class IntegrityError(GpustoreError, OSError):
    """A digest differs from the bytes it was made of."""


class CUDAUnavailableError(GpustoreError, RuntimeError):
    """CUDA is needed and cannot be used here; `cause` is one word of `CUDAStatus.cause`."""

    cause: str | None

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class DeviceMemoryError(GpustoreError, MemoryError):
    """Memory of a device, or pinned host memory, does not suffice."""


class DeviceError(GpustoreError, RuntimeError):
    """A device failed at work: lost, taken by another process, or stopped by an earlier error."""


class DeviceDataLostError(GpustoreError, RuntimeError):
    """The file holds GPU pointers in place of values."""


class OpaqueCodeError(GpustoreError, RuntimeError):
    """Julia code that cannot be run here."""


class MissingExtraError(GpustoreError, ImportError):
    """An optional dependency is missing; the message names the extra to install."""


class EntryNotFoundError(GpustoreError, KeyError):
    """The file has no entry, or no array, of this name."""

    def __str__(self) -> str:  # KeyError would quote the sentence
        return str(self.args[0])
