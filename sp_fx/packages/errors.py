"""The error of packages."""

from __future__ import annotations


class PackageError(RuntimeError):
    """A package could not be written, or is not one that may be served here; the message says what was found and expected."""
