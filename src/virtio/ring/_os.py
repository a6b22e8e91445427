"""The clock, the spin hint and eventfds; `_os.pxd` is the compiled twin, which needs no GIL."""

from __future__ import annotations

import os
import time


def now_ns() -> int:
    """Monotonic time in nanoseconds, the clock of `time.monotonic_ns`."""
    return time.monotonic_ns()


def relax() -> None:
    """Tell the processor, here the other threads, that this one spins."""
    time.sleep(0)


def signal_eventfd(fd: int) -> int:
    """Add one to a non-blocking eventfd; 0, or the errno. A full counter counts as signalled."""
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or 0
    return 0
