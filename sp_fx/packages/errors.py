"""The error of packages, and one that files that cannot be written have too little of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class PackageError(RuntimeError):
    """A package could not be written, or is not one that may be served here; the message says what was found and expected."""


@contextmanager
def names_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError in here that names no file, such as that of a full disk, becomes one that names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
