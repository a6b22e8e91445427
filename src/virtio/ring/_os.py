"""The clock, the spin hint and eventfds; `_os.pxd` is the compiled twin, which needs no GIL."""

from __future__ import annotations

import time

from virtio.ring import eventfd


def now_ns() -> int:
    """Monotonic time in nanoseconds, the clock of `time.monotonic_ns`."""
    return time.monotonic_ns()


def relax() -> None:
    """Tell the processor, here the other threads, that this one spins."""
    time.sleep(0)


def signal_eventfd(fd: int) -> int:
    """Add one to an eventfd; 0, or the errno. A full one counts as signalled, and is left alone: whoever
    shares it may have made it block."""
    try:
        eventfd.signal(fd)
    except OSError as error:
        return error.errno or 0
    return 0
