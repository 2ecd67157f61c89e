"""The version of this package, written into every file as its writer."""

__version__ = "0.1.0"
