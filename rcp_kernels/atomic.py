"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_atomic"]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a machine that went down, finds the old content or the new one, never a part.

    The bytes go to a temporary file beside it, are flushed to the disk, and take its name.

    Args:
        path: in a directory that exists.
        data: the whole content.

    Raises:
        OSError: as writing does, a full disk say; what was there before is untouched.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
