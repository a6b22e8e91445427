"""Measuring a disk: one load on it, and what came of that."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from virtio.errors import RequestError
from virtio.ring.load import UNLIMITED, Histogram, Load

if TYPE_CHECKING:
    from virtio_bdev.channel import Channel

Pattern: TypeAlias = Literal["read", "write", "randread", "randwrite"]

_PATTERNS = get_args(Pattern)
# fio's; the keys of its `percentile`.
_PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)


@dataclass(frozen=True, slots=True)
class Result:
    """What a run has measured: `requests` of `bs` bytes each in `seconds`; `latency` is in ns."""

    rw: Pattern
    bs: int
    iodepth: int
    seconds: float
    requests: int
    latency: Histogram

    @property
    def iops(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.iops * self.bs

    def fio(self) -> dict[str, Any]:
        """The job of this run as fio's json has it; the direction that was not used is all zeros."""
        unused = _direction(0, 0, 0.0, Histogram())
        used = _direction(self.requests, self.bs, self.seconds, self.latency)
        writes = is_write(self.rw)
        return {
            "jobname": self.rw,
            "error": 0,
            "job options": {"rw": self.rw, "bs": str(self.bs), "iodepth": str(self.iodepth)},
            "read": unused if writes else used,
            "write": used if writes else unused,
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
) -> Result:
    """Keep `iodepth` requests of `bs` bytes in flight, for `runtime` seconds or so many `requests`.

    Sequential ones go over the disk again and again; random ones go where `seed`, itself random unless
    given, has them. Writing overwrites the disk with random bytes. One compiled loop does it without
    the GIL; how it waits is the channel's `wait`. Ctrl-C ends it within a tenth of a second.

    Raises RequestError for what the disk or the queue has no room for, DeviceError for the first
    request that fails, RequestTimeout when no request is answered for the channel's `timeout`, and
    what every call of a channel may raise.
    """
    if rw not in _PATTERNS:
        raise RequestError(f"rw={rw!r}, want one of {', '.join(_PATTERNS)}")
    if not runtime > 0 or (requests is not None and requests < 1):
        raise RequestError(f"{runtime} seconds and {requests} requests: want more than 0")
    write = is_write(rw)
    channel.bdev.check(0, bs, write=write)
    load = Load(
        bs,
        channel.bdev.size,
        random=rw.startswith("rand"),
        runtime_ns=min(int(runtime * 1e9) or 1, UNLIMITED),
        requests=UNLIMITED if requests is None else requests,
        seed=random.getrandbits(64) if seed is None else seed,
    )
    channel.apply(load, iodepth, write=write)
    return Result(rw, bs, iodepth, (load.now - load.begun) / 1e9, load.latency.count, load.latency)


def is_write(rw: Pattern) -> bool:
    """Whether that overwrites the disk."""
    return rw.endswith("write")


def _direction(requests: int, bs: int, seconds: float, latency: Histogram) -> dict[str, Any]:
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
        "runtime": round(seconds * 1000),
        "total_ios": requests,
        "clat_ns": {**total, "percentile": percentiles} if requests else total,
        "lat_ns": total,
    }
