"""Files that always have either their old or their new content: states of trainings, texts that were generated."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "write_atomic"]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing, in a directory that exists, and replace ``path`` by it at the end of the ``with`` block.

    The bytes go to a temporary file in the same directory, which is flushed to the disk and renamed. After an error, a
    kill or a power failure ``path`` has its old content.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write the whole content of a file as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)
