"""What this process has open: to compare before and after."""

import gc
import os


def open_fds() -> dict[int, str]:
    """Every open file descriptor and what it is, the one that lists them left out."""
    gc.collect()
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # it was the listing's own
    return found
