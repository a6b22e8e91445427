"""A load to measure a disk with: where its requests go, when it ends, how long each request took.

Nothing here grows with the number of requests: an offset is a function of the request's number, and
latencies are counted in a histogram.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cython

from virtio.errors import RequestError
from virtio.ring.skew import Skew
from virtio.ring.stats import READ, WRITE, tick_rate

if not cython.compiled:
    from virtio.ring._bits import bit_length, mix, scale, whole
    from virtio.ring._mem import fill, load_u64, store_u64, window
    from virtio.ring._os import ticks
    from virtio.ring.stats import Stats

UNLIMITED = 1 << 62  # requests, or nanoseconds

_LAST = 0xFFFFFFFFFFFFFFFF
_SUB_BITS = 7  # 128 buckets for each power of two
_EXACT = 8  # values of so many bits have a bucket each
_BUCKETS = (64 - _EXACT << _SUB_BITS) + (1 << _EXACT)

_SEVERAL = 4  # requests that make it worth while to look at the clock again

_HELD = 64  # times that are known, and not recorded yet
_FRACTION = 1 << 8  # of a tick, in which ticks are multiplied

_HEED_NS = 50_000_000  # the longest pause, after which `stop` is seen

_READ, _WRITE = READ, WRITE

_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's step


class Bucket(NamedTuple):
    """How many `values` there were from `low` to `high`, both included."""

    low: int
    high: int
    values: int


class Histogram:
    """Counts of 64-bit values, in 128 buckets for each power of two.

    `percentile` is within 0.4 % of the value that it stands for; `mean`, `minimum` and `maximum` are
    exact, `stddev` as exact as floating point. The sum of all values stays below 2^64: of nanoseconds, 584
    years. One thread at a time.
    """

    def __init__(self) -> None:
        self.count = self.total = self.maximum = 0
        self._least = _LAST
        self._squares = 0.0
        self._owner = bytearray(8 * _BUCKETS)
        self._counts = window(self._owner)

    def record(self, value: int) -> None:
        """Count a value."""
        index = value
        bits = bit_length(value)
        if bits > _EXACT:
            index = (bits - _EXACT << _SUB_BITS) + (value >> bits - _EXACT)
        store_u64(self._counts, 8 * index, load_u64(self._counts, 8 * index) + 1)
        self.count += 1
        self.total += value
        self._squares += float(value) * float(value)
        if value < self._least:
            self._least = value
        if value > self.maximum:
            self.maximum = value

    def clear(self) -> None:
        """Forget all values."""
        self.count = self.total = self.maximum = 0
        self._least = _LAST
        self._squares = 0.0
        fill(self._counts, 0, 0, 8 * _BUCKETS)

    def add(self, other: Histogram) -> None:
        """Count all that another one has counted, too."""
        for index in range(_BUCKETS):
            count = load_u64(other._counts, 8 * index)
            if count:
                store_u64(self._counts, 8 * index, load_u64(self._counts, 8 * index) + count)
        self.count += other.count
        self.total += other.total
        self.maximum = max(self.maximum, other.maximum)
        self._least = min(self._least, other._least)
        self._squares += other._squares

    @property
    def minimum(self) -> int:
        """The least value, 0 if there was none."""
        return int(self._least) if self.count else 0

    @property
    def mean(self) -> float:
        """The sum of all values by their number."""
        return float(self.total) / float(self.count) if self.count else 0.0

    @property
    def stddev(self) -> float:
        """The standard deviation of all values."""
        if not self.count:
            return 0.0
        return math.sqrt(max(0.0, self._squares / float(self.count) - self.mean**2))

    def percentile(self, percent: float) -> int:
        """The least value that at least `percent` of all values do not exceed; 0 if there was none."""
        rank = max(1, -(-round(percent * 10**6) * self.count // 10**8))
        for bucket in self.buckets():
            rank -= bucket.values
            if rank <= 0:
                middle = (bucket.low + bucket.high) // 2
                return min(max(middle, self.minimum), self.maximum)
        return 0

    def buckets(self) -> list[Bucket]:
        """Those that are not empty, from the least value up."""
        found = []
        for index in range(_BUCKETS):
            count = load_u64(self._counts, 8 * index)
            if count:
                shift = max(0, (index >> _SUB_BITS) - 1)
                low = index - (shift << _SUB_BITS)
                low <<= shift  # not above: there the number is a C int
                width = 1
                width <<= shift
                found.append(Bucket(low, low + (width - 1), count))
        return found

    def __repr__(self) -> str:
        return f"<Histogram of {self.count} values from {self.minimum} to {self.maximum}>"


class Load:
    """Requests of `nbytes` each, all over `size` bytes of a disk from `base` on: in sequence, or at random.

    So many percent of them are `reads`, in no order; the others are writes, whose latencies are counted in
    `written`. What ends in the first `ramp_ns` is not counted at all. Random offsets are all as likely,
    unless `skew` says which are more so. No more than `rate` requests a second begin, at even intervals;
    those that are late begin as soon as they can. Requests begin when there is room for `batch` of them,
    not before. It ends after `runtime_ns` more or so many `requests`, whichever comes first, or with the
    first error. A sequence begins again at `base` when it has come to its end; what is left there, less
    than `nbytes`, is not touched. The same `seed` gives the same offsets. `latency` is in nanoseconds, from
    when a request is about to be put on the ring until its completion is seen; requests that are put there,
    or seen, together share one reading of the clock. If it is `timed`, `busy` has all rounds of the loop in
    which anything was submitted or seen. `ended` counts all requests, also those of the ramp. Moments, and
    `busy`, are in ticks: see `virtio.ring.stats`. For one run, by one thread.
    """

    def __init__(
        self,
        nbytes: int,
        size: int,
        *,
        random: bool,
        base: int = 0,
        reads: int = 100,
        ramp_ns: int = 0,
        runtime_ns: int = UNLIMITED,
        requests: int = UNLIMITED,
        seed: int = 0,
        skew: Skew | None = None,
        rate: float = 0.0,
        batch: int = 1,
        timed: bool = False,
    ) -> None:
        if not 0 < nbytes <= size:
            raise RequestError(f"requests of {nbytes} bytes on {size} bytes")
        if runtime_ns <= 0 or requests <= 0:
            raise RequestError(f"a load of {requests} requests in {runtime_ns} ns")
        if base < 0 or not 0 <= reads <= 100 or ramp_ns < 0:
            raise RequestError(f"a load from byte {base} on, with {reads} % of reads, after {ramp_ns} ns")
        if not 0 <= rate < math.inf or batch < 1:
            raise RequestError(f"a load of {rate} requests a second, {batch} together: want more than 0")
        self.nbytes = nbytes
        self.requests = requests
        self.reads = reads
        self.latency, self.written = Histogram(), Histogram()
        self.errors = self.ended = 0
        self.begun = self.now = self.deadline = 0
        self._entered = self._fresh = self._stopped = False
        # Ticks, as the system's clock waits for all loads before it reads them: 10 of a request's 300 ns.
        self._rate = tick_rate()
        self._ns_of_tick = (1_000_000_000 << 64) // (_FRACTION * self._rate)
        self._stats: Stats = None  # type: ignore[assignment]  # None where nobody else counts
        self._held = 0
        self._took_owner = bytearray(8 * _HELD)  # ticks, in bits 1 to 63; in bit 0, whether of a write
        self._took = window(self._took_owner)
        self._blocks = size // nbytes
        self._random = random
        self._runtime = self._ticks(runtime_ns)
        self._seed = seed & _LAST
        self._base, self._ramp = base, self._ticks(ramp_ns)
        self._skew: Skew = skew  # type: ignore[assignment]  # None where there is none
        self.paced = rate > 0
        self.batch, self.timed, self.busy = batch, timed, 0
        self._interval = float(self._rate) / rate if rate else 0.0
        self._from = self._ripe = self._due = 0

    def offset(self, number: int) -> int:
        """The byte on the disk where request `number` begins."""
        block = number
        if self._random:
            block = mix((self._seed + (number + 1) * _GAMMA) & _LAST)
            block = scale(block, self._blocks) if self._skew is None else self._skew.block(block)
        elif number >= self._blocks:
            block = number % self._blocks
        return self._base + block * self.nbytes

    def is_write(self, number: int) -> bool:
        """Whether request `number` is one."""
        if self.reads == 100:
            return False
        mixed = mix((~self._seed + (number + 1) * _GAMMA) & _LAST)
        return scale(mixed, 100) >= self.reads

    def _ticks(self, ns: int) -> int:
        """As many nanoseconds, rounded up; at most UNLIMITED."""
        return min(-(-ns * int(self._rate) // 1_000_000_000), UNLIMITED)

    def _ns(self, passed: int) -> int:
        """As many ticks, of 2^56 at most."""
        return scale(passed * _FRACTION, self._ns_of_tick)

    def account(self, stats: Stats) -> None:
        """Count all requests there too, also those of the ramp."""
        self._stats = stats

    @property
    def seconds(self) -> float:
        """How long it has gone on, without the ramp."""
        return float(self.now - self.begun) / float(self._rate)

    @property
    def warming(self) -> bool:
        """Whether nothing counts yet, as the time for that has not come."""
        return bool(self._ramp)

    def stop(self) -> None:
        """Start nothing more; from any thread."""
        self._stopped = True

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return bool(self._stopped)

    def finish(self) -> None:
        """It has ended by now, whatever is still with the device."""
        self.settle()
        self.now = ticks()

    def enter(self) -> None:
        """A run begins, or goes on after a break in which time has passed."""
        self._fresh = False
        if not self._entered:
            self._entered = True
            self.begun = self.now = ticks()
            self.deadline = self.begun + self._ramp + self._runtime
            self._from = self._due = self.now

    def ripe(self) -> int:
        """How many requests may have begun by now, of a load that is `paced`."""
        self.now = ticks()
        self._fresh = True
        if self._due <= self.now:
            self._ripe = whole(float(self.now - self._from) / self._interval) + 1
            self._due = self._from + whole(float(self._ripe) * self._interval) + 1
        return self._ripe

    def pause(self, started: int) -> int:
        """Nanoseconds from `now` to wait for the device at most: one more may begin then, the load ends, or
        may have been stopped."""
        if not self.paced or started < self._ripe:
            return _HEED_NS
        until = self._due if self._due < self.deadline else self.deadline
        if until <= self.now:
            return 0
        left = self._ns(until - self.now)
        return left if left < _HEED_NS else _HEED_NS

    def begin(self, count: int) -> bool:
        """So many requests are about to be submitted, at `now`; false if it is too late for that.

        The time when completions were seen is good enough, unless there were several.
        """
        if count > _SEVERAL or (count and not self._fresh):
            self.now = ticks()
        self._fresh = False
        if self._ramp and self.now >= self.begun + self._ramp:
            self.settle()
            self._ramp = 0
            self.begun = self.now
            self.deadline = self.begun + self._runtime
            self.latency.clear()
            self.written.clear()
        if count == 0 and not self.paced:
            return True
        return self.now < self.deadline and not self._stopped

    def complete(self, began: int, write: bool) -> None:
        """Count a request that was submitted at `began`, and has just been seen to be done: in `settle`."""
        if not self._fresh:
            self.now = ticks()
            self._fresh = True
        if self._held == _HELD:
            self.settle()
        took = self.now - began if self.now > began else 0  # processors may disagree by some ticks
        store_u64(self._took, 8 * self._held, took << 1 | write)
        self._held += 1

    def settle(self) -> None:
        """Record what was completed: while the device is at work. What is seen from now on is seen later."""
        for index in range(self._held):
            took = load_u64(self._took, 8 * index)
            written = took & 1
            took >>= 1
            if self._stats is not None:
                self._stats.add(_WRITE if written else _READ, self.nbytes, took)
            if written:
                self.written.record(self._ns(took))
            else:
                self.latency.record(self._ns(took))
        self.ended += self._held
        self._held = 0
        self._fresh = False
