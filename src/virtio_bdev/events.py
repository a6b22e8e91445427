"""What happens to a controller's disks, for a program that wants to know."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from virtio.errors import VirtioError
    from virtio_bdev.bdev import Bdev

_PENDING = 4096  # events that nobody has taken


class Added(NamedTuple):
    """A disk that was not there before; the controller has it under its name now."""

    bdev: Bdev


class Removed(NamedTuple):
    """A disk has gone, or another one is in its place: calls on it fail from now on."""

    bdev: Bdev


class Resized(NamedTuple):
    """A disk had `before` bytes, and has `bdev.size` now."""

    bdev: Bdev
    before: int


class Lost(NamedTuple):
    """The device of all these disks has gone: the last event."""

    error: VirtioError


Event: TypeAlias = Added | Removed | Resized | Lost


class Events(Iterator[Event]):
    """The events since this was made, in order; waits for each, and ends with the controller.

    `missed` counts those that were thrown away because nobody took the ones before them. `wake`, if
    set, is called in any thread when there is something to take, or nothing more to come.
    """

    def __init__(self) -> None:
        self.missed = 0
        self.wake: Callable[[], None] = lambda: None
        self._pending: deque[Event] = deque()
        self._ended = False
        self._changed = threading.Condition()

    def wait(self, timeout: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout` seconds, or ever."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._pending and not self._ended:
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            return self._pending.popleft() if self._pending else None

    @property
    def ended(self) -> bool:
        """Whether there will be no more, once those that are here have been taken."""
        return self._ended

    def __next__(self) -> Event:
        event = self.wait()
        if event is None:
            raise StopIteration
        return event

    def put(self, event: Event) -> None:
        """One more; for the controller to call."""
        with self._changed:
            if len(self._pending) < _PENDING:
                self._pending.append(event)
            else:
                self.missed += 1
            self._changed.notify_all()
        self.wake()

    def end(self) -> None:
        """There will be none any more; idempotent; for the controller to call."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self.wake()
