"""How much of the host's disk a file takes up, for tests of what gives space back."""

import os
from pathlib import Path

OWN = 64 << 10  # a file system's own blocks come and go with the pieces a file is in: less than this


def allocated(path: Path) -> int:
    """Bytes, once written: those that a file system has only promised so far may be more or fewer."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_blocks * 512


def gave_back(nbytes: int, before: int, path: Path) -> bool:
    """Whether the file takes up `nbytes` fewer than `before`, the file system's own blocks apart."""
    return abs(before - allocated(path) - nbytes) <= OWN
