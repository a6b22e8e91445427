"""Rate limits of a disk, by token buckets: none cost anything while there is no limit."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from virtio.errors import RequestError
from virtio.ring.stats import READ, WRITE

if TYPE_CHECKING:
    from virtio.ring.task import Task

_BURST_S = 0.05  # how much may be saved up
_LOOK_S = 0.1  # until who waits looks again: the limits may be others by then
_MIB = 1 << 20
_MOST = 10**12  # of any limit; IOPS that are rounded up to thousands are no more than that either


class RateLimits(NamedTuple):
    """What a disk's reads and writes together may be, or each alone, a second; 0: anything. SPDK's names."""

    rw_ios_per_sec: int = 0
    rw_mbytes_per_sec: int = 0  # MiB, as all of them
    r_mbytes_per_sec: int = 0
    w_mbytes_per_sec: int = 0

    def check(self) -> None:
        """RequestError for what is no limit."""
        for name, value in self._asdict().items():
            if not 0 <= value <= _MOST:
                raise RequestError(f"{name} {value}, want a number from 0 to {_MOST}")


@dataclass(slots=True)
class _Bucket:
    rate: float  # tokens a second
    level: float
    filled: float  # when

    def fill(self, now: float) -> None:
        self.level = min(self.rate * _BURST_S, self.level + (now - self.filled) * self.rate)
        self.filled = now


class Throttle:
    """The buckets of one disk, for all of its channels.

    Whatever is larger than what a bucket has may go while there is anything in it, and is paid back:
    so the rate is kept for requests of any size.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.change(RateLimits())

    def change(self, limits: RateLimits) -> None:
        """Other limits, for who waits too."""
        now = time.monotonic()
        ios, both, reads, writes = (
            _Bucket(rate * unit, rate * unit * _BURST_S, now) if rate else None
            for rate, unit in zip(limits, (1, _MIB, _MIB, _MIB), strict=True)
        )
        with self._lock:
            self._buckets = {READ: (ios, both, reads), WRITE: (ios, both, writes)}

    def take(self, kind: int, wanted: int, nbytes: int) -> tuple[int, float]:
        """How many of so many requests may go now, and in how many seconds to ask for more."""
        with self._lock:
            now = time.monotonic()
            costs = [
                (bucket, cost)
                for bucket, cost in zip(self._buckets.get(kind, ()), (1, nbytes, nbytes), strict=False)
                if bucket is not None
            ]
            granted, wait = wanted, 0.0
            for bucket, cost in costs:
                bucket.fill(now)
                granted = min(granted, max(0, int(-(-bucket.level // cost))))
            for bucket, cost in costs:
                bucket.level -= granted * cost
                wait = max(wait, (1e-6 * bucket.rate - bucket.level) / bucket.rate)
            return granted, min(wait, _LOOK_S)

    def admit(self, task: Task) -> float | None:
        """Let a task begin what it may; in how many seconds to ask for more, None if that is all."""
        wanted = task.total - task.allowed
        if wanted <= 0:
            return None
        granted, wait = self.take(task.template.kind, wanted, task.part_bytes)
        task.allowed += granted
        return wait if granted < wanted else None
