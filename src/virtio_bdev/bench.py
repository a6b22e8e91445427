"""Measuring a disk: loads on it, and what came of them."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
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
_TELL_LEAST_S = 0.1  # of the last one: less says nothing
_JOIN_S = 30.0
LONGEST_S = 1e9
FASTEST = 1e9  # requests a second: one each nanosecond
_LAST_SEED = (1 << 64) - 1
_THETA, _SHARE = 1.1, 0.2  # of zipf and pareto, unless given: fio's


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to do to a disk: keep `iodepth` requests of `bs` bytes in flight, and for how long.

    It goes on for `runtime` seconds, or so many `requests`, on `size` bytes of the disk from `offset` on,
    to its end unless given. Sequential requests go over them again and again; random ones go where `seed`,
    itself random unless given, has them, all places being as likely, unless `random_distribution` is
    "zipf:THETA" or "pareto:SHARE", 1.1 and 0.2 unless given (see `virtio.ring.skew.Skew`). Of "rw" and
    "randrw", `rwmixread` percent are reads. The first `ramp` seconds are not counted. At most `rate_iops`
    requests begin a second, reads and writes together, at even intervals; they begin when there is room for
    `iodepth_batch` of them. `busy`: also measure the driver's own time.
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
        return self.rwmixread < 100 if self.mixed else not self.rw.endswith("read")

    @property
    def mixed(self) -> bool:
        """Whether that is for `rwmixread` to say."""
        return self.rw.endswith("rw")

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
        if not 0 < self.runtime <= LONGEST_S:
            raise RequestError(f"runtime={self.runtime}, want more than 0 and at most {LONGEST_S:g} seconds")
        if not 0 <= self.ramp <= LONGEST_S:
            raise RequestError(f"ramp={self.ramp}, want 0 to {LONGEST_S:g} seconds")
        if self.requests is not None and not 0 < self.requests < UNLIMITED:
            raise RequestError(f"requests={self.requests}, want 1 or more")
        if not 0 <= self.rwmixread <= 100:
            raise RequestError(f"rwmixread={self.rwmixread}, want a percentage")
        if self.rate_iops is not None and not 0 < self.rate_iops <= FASTEST:
            raise RequestError(f"rate_iops={self.rate_iops}, want more than 0 and at most {FASTEST:g}")
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
            reads=self.rwmixread if self.mixed else 0 if self.writes else 100,
            ramp_ns=int(self.ramp * 1e9),
            runtime_ns=int(self.runtime * 1e9) or 1,
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
            "groupid": 0,
            "error": 0,
            "elapsed": math.ceil(self.seconds),
            "job options": self.job.fio(),
            "read": _direction(self.job.bs, self.seconds, self.reads),
            "write": _direction(self.job.bs, self.seconds, self.writes),
        }
        # What fio does not have.
        if self.busy is not None:
            told["busy_ns_per_io"] = 1e9 * self.busy / max(1, self.requests)
        if self.interrupted:
            told["interrupted"] = True
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

    `progress` is told each second, and at the end, how long it has gone on, and how many requests a second
    have ended since it was told last, also of the ramp. Ctrl-C ends the jobs within a tenth of a second, also
    where the disk does not answer, and what they have measured is returned. Raises what `run` raises, of the
    first job that fails, and NoQueueError.
    """
    seed = random.getrandbits(64) if job.seed is None else job.seed
    jobs = [replace(job, seed=(seed + number) & _LAST_SEED) for number in range(numjobs)]
    loads = [each.load(bdev) for each in jobs]
    errors: list[BaseException] = []
    ready = threading.Barrier(numjobs)
    # Not the threads themselves: before Python 3.13 one whose `join` was interrupted counts as dead.
    ended = [threading.Event() for _ in loads]

    def work(load: Load, end: threading.Event) -> None:
        try:
            with bdev.open(wait=wait, timeout=timeout) as channel:
                ready.wait(_JOIN_S)
                channel.apply(load, job.iodepth)
        except BaseException as error:
            ready.abort()
            errors.append(error)
            for each in loads:
                each.stop()
        finally:
            end.set()

    threads = [
        threading.Thread(target=work, args=each, name="bench") for each in zip(loads, ended, strict=True)
    ]
    interrupted = False
    with ExitStack() as stack:
        stack.callback(_end, loads, threads, ended)
        try:
            for thread in threads:
                thread.start()
            _follow(loads, ended, progress)
        except KeyboardInterrupt:
            interrupted = True
            ready.abort()  # for those who wait for one that never came to start
            _end(loads, threads, ended)
    first = next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), None)
    if first is not None:
        raise first
    return [_result(load, each, interrupted) for load, each in zip(loads, jobs, strict=True)]


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All that they have counted, in one."""
    whole = Histogram()
    for each in histograms:
        whole.add(each)
    return whole


def _follow(loads: list[Load], ended: list[threading.Event], progress: Callable[[float, int], None]) -> None:
    told = 0
    begun = before = time.monotonic()
    while not all(end.is_set() for end in ended):
        for end in ended:
            end.wait(max(0.0, before + _TELL_S - time.monotonic()))
        now = time.monotonic()
        done = sum(load.ended for load in loads)
        if now - before >= _TELL_LEAST_S:
            progress(now - begun, int((done - told) / (now - before)))
        told, before = done, now


def _end(loads: list[Load], threads: list[threading.Thread], ended: list[threading.Event]) -> None:
    for load in loads:
        load.stop()
    for thread, end in zip(threads, ended, strict=True):
        if thread.ident is not None and end.wait(_JOIN_S):
            thread.join()


def _skew(words: str, blocks: int) -> Skew | None:
    """What a `random_distribution` of that many blocks comes to; None if all are as likely."""
    if words == "random":
        return None
    law, colon, number = words.partition(":")
    try:
        by = float(number) if colon else _SHARE if law == "pareto" else _THETA
    except ValueError:
        by = math.nan
    if law not in get_args(Law) or math.isnan(by):
        raise RequestError(f"random_distribution={words!r}, want random, zipf[:THETA] or pareto[:SHARE]")
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
    none = {"min": 0, "max": 0, "mean": 0.0, "stddev": 0.0, "N": 0}
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
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": none,
        "clat_ns": {**total, "percentile": percentiles} if requests else total,
        "lat_ns": total,
    }
