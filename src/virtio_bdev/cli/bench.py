"""`virtio-bdev bench`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, get_args

import click

from virtio.ring.load import Histogram
from virtio_bdev import Bdev, Controller, bench
from virtio_bdev.bdev import human
from virtio_bdev.channel import Wait
from virtio_bdev.cli.options import SIZE, choose, controller_options, progress
from virtio_bdev.verify import verify


@click.command()
@controller_options
@click.option("--bdev", "disk_name", help="Name of the disk, where there are several.")
@click.option(
    "--rw",
    type=click.Choice(get_args(bench.Pattern)),
    default="randread",
    show_default=True,
    help="What to do: read, write, or both, in sequence or at random places.",
)
@click.option(
    "--rwmixread",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    help="Percent of reads, of rw and randrw.",
)
@click.option("--bs", type=SIZE, default="4k", show_default=True, help="Bytes of a request.")
@click.option("--iodepth", type=click.IntRange(1), default=32, show_default=True, help="Requests in flight.")
@click.option(
    "--numjobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="So many at once, each in a thread of its own, on a queue of its own.",
)
@click.option("--offset", type=SIZE, default="0", help="Byte of the disk to begin at.")
@click.option("--size", type=SIZE, help="Bytes to stay within; to the disk's end unless given.")
@click.option(
    "--runtime",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds to go on for.",
)
@click.option(
    "--ramp", type=click.FloatRange(0), default=0.0, help="Seconds before that, which are not counted."
)
@click.option(
    "--wait",
    type=click.Choice(get_args(Wait)),
    default="adaptive",
    show_default=True,
    help="For an answer: spin, spin a moment and then sleep, or sleep.",
)
@click.option(
    "--verify",
    "verifies",
    is_flag=True,
    help="Write every block once and read it back, instead: whether what was written is there.",
)
@click.option("--yes", is_flag=True, help="Overwrite the disk without asking.")
@click.option("--json", "as_json", is_flag=True, help="As fio prints it.")
def command(
    controller: Controller,
    timeout: float,
    disk_name: str | None,
    rw: bench.Pattern,
    bs: int,
    numjobs: int,
    wait: Wait,
    verifies: bool,
    yes: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Measure a disk behind ADDRESS: requests a second, and how long each takes.

    All but read and randread overwrite the disk with random bytes. Ctrl-C ends it, and shows what was
    measured until then.
    """
    bdev = choose(controller, disk_name)
    if bench.is_write(rw) or verifies:
        bdev.check(0, bs, write=True)
        if not yes:
            _ask(bdev)
    if verifies:
        if as_json:
            raise click.UsageError("--verify measures nothing that --json could print")
        _verify(bdev, wait, timeout, bs, how["offset"], how["size"])
        return
    with _live(how["ramp"]) as tell:
        results = bench.run_jobs(
            bdev, numjobs, wait=wait, timeout=timeout, progress=tell, rw=rw, bs=bs, **how
        )
    if as_json:
        json.dump(_fio(results), sys.stdout, indent=2)
        print()
    else:
        _print(bdev, results)
    if results[0].interrupted:
        raise click.Abort


def _verify(bdev: Bdev, wait: Wait, timeout: float, bs: int, offset: int, size: int | None) -> None:
    total = 2 * (bdev.size - offset if size is None else size)
    with bdev.open(wait=wait, timeout=timeout) as channel, progress("verifying", total) as advance:
        found = verify(channel, bs=bs, offset=offset, size=size, progress=advance)
    rates = (found.nbytes / 2**20 / max(1e-9, took) for took in (found.write_seconds, found.read_seconds))
    write, read = rates
    print(
        f"{bdev.name}: {found.blocks:,} blocks of {human(bs)} written in {write:,.1f} MiB/s, read back in "
        f"{read:,.1f} MiB/s and verified"
    )


def _print(bdev: Bdev, results: list[bench.Result]) -> None:
    """One line for all jobs together, and for reads and writes apart where there are both."""
    first = results[0]
    in_flight = f"{first.iodepth} in flight" + (f" on each of {len(results)} queues" if results[1:] else "")
    directions = {
        "read": [result.reads for result in results],
        "write": [result.writes for result in results],
    }
    seen = {name: merged for name, some in directions.items() if (merged := _merge(some)).count}
    seconds = max(result.seconds for result in results)
    for name, latency in (seen or {first.rw: first.latency}).items():
        what = f"{first.rw}, {name}s" if seen.keys() > {name} else first.rw
        iops = latency.count / seconds if seconds else 0.0
        times = {"mean": latency.mean, **{f"p{p:g}": latency.percentile(p) for p in (50, 99, 99.9)}}
        words = ", ".join(f"{key} {ns / 1000:.1f}" for key, ns in times.items())
        print(
            f"{bdev.name}: {what} of {human(first.bs)}, {in_flight}: {iops:,.0f} IOPS, "
            f"{iops * first.bs / 2**20:,.1f} MiB/s, latency in us: {words}"
        )


def _merge(histograms: list[Histogram]) -> Histogram:
    merged = Histogram()
    for each in histograms:
        merged.add(each)
    return merged


@contextlib.contextmanager
def _live(ramp: float) -> Iterator[Callable[[float, int], None]]:
    """A line that is written anew each second, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda seconds, requests: None
        return

    def tell(seconds: float, requests: int) -> None:
        what = "ramp" if seconds <= ramp else f"{seconds - ramp:.0f} s"
        print(f"\r{what}: {requests:,} IOPS\x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _ask(bdev: Bdev) -> None:
    """Go on only if whoever is at the terminal says so."""
    words = f"{bdev.name} at {bdev.controller.address}, {human(bdev.size)}, will be overwritten"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{words}: --yes says that this is wanted")
    if not click.confirm(f"{words}. Go on?", err=True):
        raise click.ClickException("nothing was written")


def _fio(results: list[bench.Result]) -> dict[str, object]:
    now = time.time()
    return {
        "virtio-bdev version": version("virtio-bdev"),
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.ctime(now),
        "jobs": [result.fio() for result in results],
    }
