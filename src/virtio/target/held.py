"""Chains that a device holds: popped, and given back later, or never.

A driver could make the same chain available again while it is held, or change it: the first is
refused, so that no ring holds more chains than it has heads, and what is taken up is read anew.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Generic, NoReturn, TypeVar

from virtio.errors import ProtocolError
from virtio.ring.device import DeviceRing

Task = TypeVar("Task")


class Kept(Exception):
    """The chain that a handler was called for is not to be pushed: it is held."""


class Held(Generic[Task]):
    """By ring and head: whatever its device knows of each, and when it is due (None: when told)."""

    def __init__(self) -> None:
        self._rings: dict[DeviceRing, dict[int, tuple[Task, float | None]]] = {}

    def tasks(self) -> list[Task]:
        """What is known of each."""
        return [task for held in self._rings.values() for task, _ in held.values()]

    def keep(self, ring: DeviceRing, task: Task, due: float | None = None) -> NoReturn:
        """Hold the chain that was popped last, until `due` on the monotonic clock."""
        held = self._rings.setdefault(ring, {})
        if ring.head in held:
            raise ProtocolError(f"chain {ring.head} is available again, but was not given back")
        held[ring.head] = (task, due)
        ring.hold()
        raise Kept

    def drop(self, ring: DeviceRing) -> None:
        """The ring has stopped: nothing is given back any more."""
        self._rings.pop(ring, None)

    def release(self, which: Callable[[Task], bool], handle: Callable[[DeviceRing], int]) -> None:
        """Take up those that `which` picks, the longest held first, and give them back."""
        self._release(lambda task, due: which(task), handle)

    def tend(self, handle: Callable[[DeviceRing], int]) -> float:
        """Take up those that are due; in how many seconds the next one will be, -1 if there is none."""
        if not self._rings:
            return -1
        now = time.monotonic()
        self._release(lambda task, due: due is not None and due <= now, handle)
        later = [due for held in self._rings.values() for _, due in held.values() if due is not None]
        return max(0.0, min(later) - time.monotonic()) if later else -1

    def _release(
        self, which: Callable[[Task, float | None], bool], handle: Callable[[DeviceRing], int]
    ) -> None:
        for ring, held in self._rings.items():
            heads = [head for head, entry in held.items() if which(*entry)]
            for head in heads:
                del held[head]
                if ring.again(head) < 0:
                    raise ProtocolError(f"a chain that was held: {ring.fault()}")
                with contextlib.suppress(Kept):
                    ring.push(head, handle(ring))
            if heads:
                ring.notify()
