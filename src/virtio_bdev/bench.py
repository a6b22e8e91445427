"""Measuring a disk: loads on it, and what came of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from virtio.errors import RequestError
from virtio.ring.load import UNLIMITED, Histogram, Load

if TYPE_CHECKING:
    from virtio_bdev.bdev import Bdev
    from virtio_bdev.channel import Channel, Wait

Pattern: TypeAlias = Literal["read", "write", "randread", "randwrite", "rw", "randrw"]

_PATTERNS = get_args(Pattern)
# fio's; the keys of its `percentile`.
_PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
_TELL_S = 1.0  # between two calls of `progress`
_JOIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has measured, in `seconds`: the latencies of its reads and of its writes, in ns."""

    rw: Pattern
    bs: int
    iodepth: int
    seconds: float
    reads: Histogram
    writes: Histogram
    interrupted: bool = False

    @property
    def requests(self) -> int:
        """How many ended."""
        return self.reads.count + self.writes.count

    @property
    def latency(self) -> Histogram:
        """Of all of them."""
        if not self.reads.count or not self.writes.count:
            return self.reads if self.reads.count else self.writes
        both = Histogram()
        both.add(self.reads)
        both.add(self.writes)
        return both

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.iops * self.bs

    def fio(self) -> dict[str, Any]:
        """The job of this run as fio's json has it; a direction that was not used is all zeros."""
        return {
            "jobname": self.rw,
            "error": 0,
            "job options": {"rw": self.rw, "bs": str(self.bs), "iodepth": str(self.iodepth)},
            "read": _direction(self.bs, self.seconds, self.reads),
            "write": _direction(self.bs, self.seconds, self.writes),
        }


def run(
    channel: Channel,
    *,
    rw: Pattern = "randread",
    bs: int = 4096,
    iodepth: int = 32,
    runtime: float = 10.0,
    requests: int | None = None,
    seed: int | None = None,
    offset: int = 0,
    size: int | None = None,
    ramp: float = 0.0,
    rwmixread: int = 50,
) -> Result:
    """Keep `iodepth` requests of `bs` bytes in flight, for `runtime` seconds or so many `requests`.

    On `size` bytes of the disk from `offset` on, to its end unless given. Sequential ones go over them again
    and again; random ones go where `seed`, itself random unless given, has them; of "rw" and "randrw",
    `rwmixread` percent are reads. The first `ramp` seconds are not counted. Writing overwrites the disk with
    random bytes. One compiled loop does it without the GIL; how it waits is the channel's `wait`. Ctrl-C
    ends it within a tenth of a second.

    Raises RequestError for what the disk or the queue has no room for, DeviceError for the first
    request that fails, RequestTimeout when no request is answered for the channel's `timeout`, and
    what every call of a channel may raise.
    """
    load = _load(channel.bdev, rw, bs, runtime, requests, seed, offset, size, ramp, rwmixread)
    channel.apply(load, iodepth)
    return _result(load, rw, iodepth)


def run_jobs(
    bdev: Bdev,
    numjobs: int = 1,
    *,
    wait: Wait = "adaptive",
    timeout: float | None = 30.0,
    progress: Callable[[float, int], None] = lambda seconds, requests: None,
    **how: Any,
) -> list[Result]:
    """`run` that so many times at once, each job on a channel, and so a queue, of its own thread.

    `progress` is told each second how long it has gone on, and how many requests a second have ended since
    it was told last. Ctrl-C ends the jobs, and what they have measured is returned. Raises what `run` raises,
    of the first job that fails, and NoQueueError.
    """
    options: dict[str, Any] = {
        **{"rw": "randread", "bs": 4096, "iodepth": 32, "runtime": 10.0, "requests": None, "seed": None},
        **{"offset": 0, "size": None, "ramp": 0.0, "rwmixread": 50},
        **how,
    }
    iodepth = options.pop("iodepth")
    seed = random.getrandbits(64) if options["seed"] is None else options["seed"]
    loads = [_load(bdev, **options | {"seed": seed + number}) for number in range(numjobs)]
    errors: list[BaseException] = []
    ready = threading.Barrier(numjobs)

    def job(load: Load) -> None:
        try:
            with bdev.open(wait=wait, timeout=timeout) as channel:
                ready.wait(_JOIN_S)
                channel.apply(load, iodepth)
        except BaseException as error:
            ready.abort()
            errors.append(error)
            for each in loads:
                each.stop()

    threads = [threading.Thread(target=job, args=(load,), name="bench") for load in loads]
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
    return [_result(load, options["rw"], iodepth, interrupted) for load in loads]


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


def _load(
    bdev: Bdev,
    rw: Pattern,
    bs: int,
    runtime: float,
    requests: int | None,
    seed: int | None,
    offset: int,
    size: int | None,
    ramp: float,
    rwmixread: int,
) -> Load:
    if rw not in _PATTERNS:
        raise RequestError(f"rw={rw!r}, want one of {', '.join(_PATTERNS)}")
    if not 0 < runtime < inf or not 0 <= ramp < inf or (requests is not None and requests < 1):
        raise RequestError(f"{ramp} and {runtime} seconds and {requests} requests: want more than 0")
    if not 0 <= rwmixread <= 100:
        raise RequestError(f"rwmixread={rwmixread}, want a percentage")
    bdev.check(offset, bs, write=is_write(rw))
    size = bdev.size - offset if size is None else size
    if not bs <= size <= bdev.size - offset:
        raise RequestError(
            f"{size} bytes from {offset} on: want {bs} to {bdev.size - offset}, of {bdev.name}'s {bdev.size}"
        )
    return Load(
        bs,
        size,
        random=rw.startswith("rand"),
        base=offset,
        reads=rwmixread if rw.endswith("rw") else 0 if is_write(rw) else 100,
        ramp_ns=min(int(ramp * 1e9), UNLIMITED),
        runtime_ns=min(int(runtime * 1e9) or 1, UNLIMITED),
        requests=UNLIMITED if requests is None else requests,
        seed=random.getrandbits(64) if seed is None else seed,
    )


def _result(load: Load, rw: Pattern, iodepth: int, interrupted: bool = False) -> Result:
    seconds = (load.now - load.begun) / 1e9
    return Result(rw, load.nbytes, iodepth, seconds, load.latency, load.written, interrupted)


def is_write(rw: Pattern) -> bool:
    """Whether that overwrites the disk."""
    return not rw.endswith("read")


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
