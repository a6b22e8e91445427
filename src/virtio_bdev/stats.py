"""What the requests to a disk came to: the counters of all queues together, in nanoseconds."""

from __future__ import annotations

import threading
import weakref
from array import array
from typing import TYPE_CHECKING, NamedTuple

from virtio.ring.stats import BUCKETS, READ, UNMAP, WRITE, Counts, Stats, tick_rate

if TYPE_CHECKING:
    from virtio.ring.lease import Lease


class IoCounts(NamedTuple):
    """Requests of one kind that went well; times in nanoseconds, from being sent to being found done."""

    requests: int
    nbytes: int
    total_ns: int
    longest_ns: int
    shortest_ns: int


class IoStats(NamedTuple):
    """What was asked of a disk. Long calls are several requests; retries do not count, failures do."""

    read: IoCounts
    write: IoCounts
    unmap: IoCounts
    failed: int


class Account:
    """The counters of one disk, one `Stats` for each queue: each has one writer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[Lease, Stats] = weakref.WeakKeyDictionary()
        self._counts, self._histogram = True, False

    def of(self, lease: Lease) -> Stats:
        """What counts on that queue."""
        with self._lock:
            stats = self._known.get(lease)
            if stats is None:
                stats = self._known[lease] = Stats()
                stats.on = self._counts
                stats.enable_histogram(self._histogram)
            return stats

    def keep(self, counts: bool, histogram: bool) -> None:
        with self._lock:
            self._counts, self._histogram = counts, histogram
            for stats in self._known.values():
                stats.on = counts
                stats.enable_histogram(histogram)

    def reset(self, counts: bool, extremes: bool, failures: bool) -> None:
        for stats in self._all():
            stats.reset(counts=counts, extremes=extremes, failures=failures)

    def stats(self) -> IoStats:
        return _sum(self._all())

    def queues(self) -> list[IoStats]:
        return [_sum([stats]) for stats in self._all()]

    def histogram(self) -> array[int] | None:
        if not self._histogram:
            return None
        found = [stats.histogram for stats in self._all()]
        kept = [buckets for buckets in found if buckets is not None]
        return array("Q", map(sum, zip(array("Q", bytes(8 * BUCKETS)), *kept, strict=True)))

    def _all(self) -> list[Stats]:
        with self._lock:
            return list(self._known.values())


def _sum(parts: list[Stats]) -> IoStats:
    failed = sum(stats.failed for stats in parts)
    return IoStats(_kind(parts, READ), _kind(parts, WRITE), _kind(parts, UNMAP), failed)


def _kind(parts: list[Stats], kind: int) -> IoCounts:
    counts = Counts()
    for stats in parts:
        counts = counts.plus(stats.counts(kind))
    total, longest, shortest = (tick * 1_000_000_000 // tick_rate() for tick in counts[2:])
    return IoCounts(counts.requests, counts.nbytes, total, longest, shortest)
