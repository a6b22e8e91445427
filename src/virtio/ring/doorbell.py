"""How a driver tells the device that buffers are available (2.3, 4.1.5.2)."""

from __future__ import annotations

from collections.abc import Callable

import cython

if not cython.compiled:
    from virtio.ring._os import signal_eventfd


class Doorbell:
    """An eventfd, which its maker owns and closes, or a Python callable; rung without the GIL.

    The peer shares a kick eventfd and may fill its counter, so it must be non-blocking, and a full
    counter counts as rung.
    """

    def __init__(self, fd: int = -1, call: Callable[[], None] | None = None) -> None:
        self.fd = fd
        self.failure = 0
        self._call = call

    def ring(self) -> None:
        """Notify the device; an errno is left in `failure`, for whoever waits to find."""
        if self.fd >= 0:
            self.failure = signal_eventfd(self.fd)
        else:
            with cython.gil:
                self._ring_call()

    def _ring_call(self) -> None:
        if self._call is not None:
            self._call()
