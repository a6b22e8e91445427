"""What one thread's requests to one disk came to: counted without the GIL, read by anybody.

A `Stats` has one writer, so its counters share no cache line with another thread's and need no
atomics; who reads them may see one request half counted. Times are in ticks: of the time-stamp
counter on x86-64, nanoseconds elsewhere.
"""

from __future__ import annotations

import functools
import time
from array import array
from typing import NamedTuple

import cython

if not cython.compiled:
    from virtio.ring._bits import bit_length
    from virtio.ring._mem import (
        fill,
        load_acquire_u32,
        load_u64,
        null,
        store_release_u32,
        store_u64,
        window,
    )
    from virtio.ring._os import now_ns, ticks

# What a request does, as far as it is counted.
OTHER, READ, WRITE, UNMAP = 0, 1, 2, 3
KINDS = 4

# SPDK's histogram: the first range has a bucket a tick, each further one twice as wide ones.
GRANULARITY = 7
RANGES = 64 - GRANULARITY
BUCKETS = (RANGES + 1) << GRANULARITY

_GRANULARITY = GRANULARITY
_FIELDS = 5
_OPS, _BYTES, _TOTAL, _MAX, _MIN = 0, 8, 16, 24, 32
_BYTES_OF_KIND = 8 * _FIELDS
_LINE = 64
_NEVER = (1 << 64) - 1  # the shortest time of none
_KEPT = 0  # whether there is a histogram: in the room before the counters


class Counts(NamedTuple):
    """Requests of one kind that went well; times in ticks, the least 0 without any."""

    requests: int = 0
    nbytes: int = 0
    total: int = 0
    longest: int = 0
    shortest: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(
            self.requests + other.requests,
            self.nbytes + other.nbytes,
            self.total + other.total,
            max(self.longest, other.longest),
            min(self.shortest or other.shortest, other.shortest or self.shortest),
        )


class Stats:
    """Counters of each kind of request, those that failed, and a histogram if there is to be one."""

    def __init__(self) -> None:
        self.on = True
        self.failed = 0
        words = _BYTES_OF_KIND * KINDS // 8 + 2 * _LINE // 8  # with room before and after, for others' lines
        self._array = array("Q", bytes(8 * words))
        self._counts = window(self._array)
        self._buckets_array = array("Q")
        self._buckets = null()
        self.reset()

    def count(self, kind: int, nbytes: int, began: int, now: int) -> None:
        """One request that went well, from tick to tick; one that began at 0 was not to be counted."""
        if began:
            self.add(kind, nbytes, now - began if now > began else 0)

    def add(self, kind: int, nbytes: int, took: int) -> None:
        """One request that went well, and took so many ticks."""
        at = _LINE + _BYTES_OF_KIND * kind
        store_u64(self._counts, at + _OPS, load_u64(self._counts, at + _OPS) + 1)
        store_u64(self._counts, at + _BYTES, load_u64(self._counts, at + _BYTES) + nbytes)
        store_u64(self._counts, at + _TOTAL, load_u64(self._counts, at + _TOTAL) + took)
        if took > load_u64(self._counts, at + _MAX):
            store_u64(self._counts, at + _MAX, took)
        if took < load_u64(self._counts, at + _MIN):
            store_u64(self._counts, at + _MIN, took)
        if load_acquire_u32(self._counts, _KEPT):
            bucket = 8 * _bucket(took)
            store_u64(self._buckets, bucket, load_u64(self._buckets, bucket) + 1)

    def counts(self, kind: int) -> Counts:
        """What was counted of a kind."""
        at = _LINE + _BYTES_OF_KIND * kind
        counts = Counts(*(load_u64(self._counts, at + 8 * field) for field in range(_FIELDS)))
        return counts._replace(shortest=0) if counts.shortest == _NEVER else counts

    def reset(self, *, counts: bool = True, extremes: bool = True, failures: bool = True) -> None:
        """Begin to count anew, or only the longest and shortest times, or only failures.

        A request that is counted at this moment may be in or out.
        """
        if failures:
            self.failed = 0
        for at in range(_LINE, _LINE + _BYTES_OF_KIND * KINDS, _BYTES_OF_KIND):
            if counts:
                for field in (_OPS, _BYTES, _TOTAL):
                    store_u64(self._counts, at + field, 0)
            if extremes:
                store_u64(self._counts, at + _MAX, 0)
                store_u64(self._counts, at + _MIN, _NEVER)

    def enable_histogram(self, enable: bool) -> None:
        """Keep a histogram from now on, an empty one, or none."""
        if not self._buckets_array and enable:
            self._buckets_array = array("Q", bytes(8 * BUCKETS))
            self._buckets = window(self._buckets_array)
        elif enable:  # in place: who counts looks at no lock, and may be amid it
            fill(self._buckets, 0, 0, 8 * BUCKETS)
        store_release_u32(self._counts, _KEPT, enable)

    @property
    def histogram(self) -> array[int] | None:
        """How many requests took how long, by SPDK's buckets; None if that is not kept."""
        return array("Q", self._buckets_array) if load_acquire_u32(self._counts, _KEPT) else None


def _bucket(value: int) -> int:
    """The number of a value's bucket."""
    bits = bit_length(value)
    if bits <= _GRANULARITY:
        return value
    shift = bits - _GRANULARITY - 1
    return ((shift + 1) << _GRANULARITY) + ((value >> shift) & ((1 << _GRANULARITY) - 1))


def clock() -> tuple[int, int]:
    """The same moment in ticks and in nanoseconds of the monotonic clock."""
    moments = []
    for _ in range(8):  # the one in which we were not interrupted
        before, tick, after = now_ns(), ticks(), now_ns()
        moments.append((after - before, tick, before))
    _, tick, nanosecond = min(moments)
    return tick, nanosecond


_begun = clock()
_MEASURED_NS = 10_000_000


@functools.cache
def tick_rate() -> int:
    """Ticks a second: measured once, over the time since this module was imported, 10 ms at least."""
    while True:
        tick, nanosecond = clock()
        passed = nanosecond - _begun[1]
        if passed >= _MEASURED_NS:
            return (tick - _begun[0]) * 1_000_000_000 // passed
        time.sleep(0.001)
