"""Measuring a disk: loads on it, and what came of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from math import inf, isnan, nan
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from virtio.errors import RequestError
from virtio.ring.load import UNLIMITED, Histogram, Load
from virtio.ring.skew import Law, Skew
from virtio.ring.stats import tick_rate

if TYPE_CHECKING:
    from virtio_bdev.bdev import Bdev
    from virtio_bdev.channel import Channel, Wait

Pattern: TypeAlias = Literal["read", "write", "randread", "randwrite", "rw", "randrw"]

_PATTERNS = get_args(Pattern)
# fio's; the keys of its `percentile`.
_PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
# Of options that are told where they are not the default.
_FIO_NAMES = {
    **{name: name for name in ("offset", "size", "rwmixread", "random_distribution", "rate_iops")},
    **{"ramp": "ramp_time", "iodepth_batch": "iodepth_batch", "requests": "number_ios", "seed": "randseed"},
}
_TELL_S = 1.0  # between two calls of `progress`
_JOIN_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do to a disk: keep `iodepth` requests of `bs` bytes in flight, and for how long.

    It goes on for `runtime` seconds, or so many `requests`, on `size` bytes of the disk from `offset` on,
    to its end unless given. Sequential requests go over them again and again; random ones go where `seed`,
    itself random unless given, has them, all places being as likely, unless `random_distribution` is
    "zipf:THETA" or "pareto:SHARE" (see `virtio.ring.skew.Skew`). Of "rw" and "randrw", `rwmixread` percent
    are reads. The first `ramp` seconds are not counted. At most `rate_iops` requests begin a second, at
    even intervals; they begin when there is room for `iodepth_batch` of them. `busy`: also measure the
    driver's own time.
    """

    rw: Pattern = "randread"
    bs: int = 4096
    iodepth: int = 32
    runtime: float = 10.0
    requests: int | None = None
    offset: int = 0
    size: int | None = None
    ramp: float = 0.0
    rwmixread: int = 50
    random_distribution: str = "random"
    rate_iops: float | None = None
    iodepth_batch: int = 1
    seed: int | None = None
    busy: bool = False

    @property
    def writes(self) -> bool:
        """Whether that overwrites the disk."""
        return not self.rw.endswith("read")

    def fio(self) -> dict[str, str]:
        """What differs from the defaults, and what always matters, by fio's names."""
        told = {
            "rw": self.rw,
            "bs": str(self.bs),
            "iodepth": str(self.iodepth),
            "runtime": f"{self.runtime:g}",
        }
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _FIO_NAMES and value != each.default:
                told[_FIO_NAMES[each.name]] = f"{value:g}" if isinstance(value, float) else str(value)
        return told

    def load(self, bdev: Bdev) -> Load:
        """The load that it puts on a disk; raises RequestError for what is out of bounds."""
        if self.rw not in _PATTERNS:
            raise RequestError(f"rw={self.rw!r}, want one of {', '.join(_PATTERNS)}")
        times = f"{self.ramp} and {self.runtime} seconds and {self.requests} requests"
        none = self.requests is not None and self.requests < 1
        if none or not 0 < self.runtime < inf or not 0 <= self.ramp < inf:
            raise RequestError(f"{times}: want more than 0")
        if not 0 <= self.rwmixread <= 100:
            raise RequestError(f"rwmixread={self.rwmixread}, want a percentage")
        if self.rate_iops is not None and not 0 < self.rate_iops < inf:
            raise RequestError(f"rate_iops={self.rate_iops}, want more than 0")
        if not 1 <= self.iodepth_batch <= max(1, self.iodepth):
            raise RequestError(f"iodepth_batch={self.iodepth_batch}, want 1 to {self.iodepth}, the iodepth")
        if self.bs < 1:
            raise RequestError(f"requests of {self.bs} bytes")
        bdev.check(self.offset, self.bs, write=self.writes)
        left = bdev.size - self.offset
        size = left if self.size is None else self.size
        if not self.bs <= size <= left:
            whole = f"{bdev.name}'s {bdev.size}"
            raise RequestError(f"{size} bytes from {self.offset} on: want {self.bs} to {left}, of {whole}")
        return Load(
            self.bs,
            size,
            random=self.rw.startswith("rand"),
            base=self.offset,
            reads=self.rwmixread if self.rw.endswith("rw") else 0 if self.writes else 100,
            ramp_ns=min(int(self.ramp * 1e9), UNLIMITED),
            runtime_ns=min(int(self.runtime * 1e9) or 1, UNLIMITED),
            requests=UNLIMITED if self.requests is None else self.requests,
            seed=random.getrandbits(64) if self.seed is None else self.seed,
            skew=_skew(self.random_distribution, size // self.bs),
            rate=self.rate_iops or 0.0,
            batch=self.iodepth_batch,
            timed=self.busy,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What a job has measured, in `seconds`: the latencies of its reads and of its writes, in ns.

    `busy` has the seconds that the driver itself took, where the job asks for that: all rounds of its loop in
    which it submitted a request or saw one completed, and none in which it waited.
    """

    job: Job
    seconds: float
    reads: Histogram
    writes: Histogram
    interrupted: bool = False
    busy: float | None = None

    @property
    def requests(self) -> int:
        """How many ended."""
        return self.reads.count + self.writes.count

    @property
    def latency(self) -> Histogram:
        """Of all of them."""
        if not self.reads.count or not self.writes.count:
            return self.reads if self.reads.count else self.writes
        return merged([self.reads, self.writes])

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.iops * self.job.bs

    def fio(self) -> dict[str, Any]:
        """The job of this run as fio's json has it; a direction that was not used is all zeros."""
        told: dict[str, Any] = {
            "jobname": self.job.rw,
            "error": 0,
            "job options": self.job.fio(),
            "read": _direction(self.job.bs, self.seconds, self.reads),
            "write": _direction(self.job.bs, self.seconds, self.writes),
        }
        if self.busy is not None:  # which fio does not have
            told["busy_ns_per_io"] = 1e9 * self.busy / max(1, self.requests)
        return told


def run(channel: Channel, job: Job) -> Result:
    """Do a job, in one compiled loop without the GIL; how it waits is the channel's `wait`.

    Writing overwrites the disk with random bytes. Ctrl-C ends it within a tenth of a second.

    Raises RequestError for what the disk or the queue has no room for, DeviceError for the first
    request that fails, RequestTimeout when no request is answered for the channel's `timeout`, and
    what every call of a channel may raise.
    """
    load = job.load(channel.bdev)
    channel.apply(load, job.iodepth)
    return _result(load, job)


def run_jobs(
    bdev: Bdev,
    job: Job,
    numjobs: int = 1,
    *,
    wait: Wait = "adaptive",
    timeout: float | None = 30.0,
    progress: Callable[[float, int], None] = lambda seconds, requests: None,
) -> list[Result]:
    """Do a job so many times at once, each on a channel, and so a queue, of its own thread.

    `progress` is told each second how long it has gone on, and how many requests a second have ended since
    it was told last. Ctrl-C ends the jobs, and what they have measured is returned. Raises what `run` raises,
    of the first job that fails, and NoQueueError.
    """
    seed = random.getrandbits(64) if job.seed is None else job.seed
    jobs = [replace(job, seed=seed + number) for number in range(numjobs)]
    loads = [each.load(bdev) for each in jobs]
    errors: list[BaseException] = []
    ready = threading.Barrier(numjobs)

    def work(load: Load) -> None:
        try:
            with bdev.open(wait=wait, timeout=timeout) as channel:
                ready.wait(_JOIN_S)
                channel.apply(load, job.iodepth)
        except BaseException as error:
            ready.abort()
            errors.append(error)
            for each in loads:
                each.stop()

    threads = [threading.Thread(target=work, args=(load,), name="bench") for load in loads]
    interrupted = False
    with ExitStack() as stack:
        stack.callback(_end, loads, threads)
        try:
            for thread in threads:
                thread.start()
            _follow(loads, threads, progress)
        except KeyboardInterrupt:
            interrupted = True
            ready.abort()  # for those who wait for one that never came to start
            _end(loads, threads)
    first = next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), None)
    if first is not None:
        raise first
    return [_result(load, job, interrupted) for load in loads]


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All that they have counted, in one."""
    whole = Histogram()
    for each in histograms:
        whole.add(each)
    return whole


def _follow(
    loads: list[Load], threads: list[threading.Thread], progress: Callable[[float, int], None]
) -> None:
    told = 0
    begun = before = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        end = before + _TELL_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        now = time.monotonic()
        done = sum(load.latency.count + load.written.count for load in loads)
        if now >= end:  # else it was the last moment
            progress(now - begun, int(max(0, done - told) / (now - before)))
        told, before = done, now


def _end(loads: list[Load], threads: list[threading.Thread]) -> None:
    for load in loads:
        load.stop()
    for thread in threads:
        if thread.ident is not None:
            thread.join(_JOIN_S)


def _skew(words: str, blocks: int) -> Skew | None:
    """What a `random_distribution` of that many blocks comes to; None if all are as likely."""
    if words == "random":
        return None
    law, _, number = words.partition(":")
    try:
        by = float(number)
    except ValueError:
        by = nan
    if law not in get_args(Law) or isnan(by):
        raise RequestError(f"random_distribution={words!r}, want random, zipf:THETA or pareto:SHARE")
    return Skew(cast(Law, law), by, blocks)


def _result(load: Load, job: Job, interrupted: bool = False) -> Result:
    if load.warming:  # and was interrupted: nothing counts yet
        return Result(job, 0.0, Histogram(), Histogram(), interrupted)
    busy = load.busy / tick_rate() if load.timed else None
    return Result(job, load.seconds, load.latency, load.written, interrupted, busy)


def _direction(bs: int, seconds: float, latency: Histogram) -> dict[str, Any]:
    requests = latency.count
    moved = requests * bs
    rate = moved / seconds if seconds else 0.0
    # Putting a request on the ring is part of its completion latency here; fio tells the two apart.
    total = {
        "min": latency.minimum,
        "max": latency.maximum,
        "mean": latency.mean,
        "stddev": latency.stddev,
        "N": latency.count,
    }
    percentiles = {f"{percent:.6f}": latency.percentile(percent) for percent in _PERCENTILES}
    return {
        "io_bytes": moved,
        "io_kbytes": moved >> 10,
        "bw_bytes": int(rate),
        "bw": int(rate) >> 10,
        "iops": requests / seconds if seconds else 0.0,
        "runtime": round(seconds * 1000) if requests else 0,
        "total_ios": requests,
        "clat_ns": {**total, "percentile": percentiles} if requests else total,
        "lat_ns": total,
    }
