"""`virtio-bdev bench`."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from typing import get_args

import click

from virtio_bdev import Bdev, Controller, bench
from virtio_bdev.bdev import human
from virtio_bdev.channel import Wait
from virtio_bdev.cli.options import SIZE, choose, controller_options


@click.command()
@controller_options
@click.option("--bdev", "disk_name", help="Name of the disk, where there are several.")
@click.option(
    "--rw",
    type=click.Choice(get_args(bench.Pattern)),
    default="randread",
    show_default=True,
    help="What to do: read or write, in sequence or at random places.",
)
@click.option("--bs", type=SIZE, default="4k", show_default=True, help="Bytes of a request.")
@click.option("--iodepth", type=click.IntRange(1), default=32, show_default=True, help="Requests in flight.")
@click.option(
    "--runtime",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds to go on for.",
)
@click.option(
    "--wait",
    type=click.Choice(get_args(Wait)),
    default="adaptive",
    show_default=True,
    help="For an answer: spin, spin a moment and then sleep, or sleep.",
)
@click.option("--yes", is_flag=True, help="Overwrite the disk without asking.")
@click.option("--json", "as_json", is_flag=True, help="As fio prints it.")
def command(
    controller: Controller,
    timeout: float,
    disk_name: str | None,
    rw: bench.Pattern,
    bs: int,
    iodepth: int,
    runtime: float,
    wait: Wait,
    yes: bool,
    as_json: bool,
) -> None:
    """Measure a disk behind ADDRESS: requests a second, and how long each takes.

    write and randwrite overwrite the disk with random bytes.
    """
    bdev = choose(controller, disk_name)
    with bdev.open(wait=wait, timeout=timeout) as channel:
        if bench.is_write(rw):
            bdev.check(0, bs, write=True)
            if not yes:
                _ask(bdev)
        result = bench.run(channel, rw=rw, bs=bs, iodepth=iodepth, runtime=runtime)
    if as_json:
        json.dump(_fio(result), sys.stdout, indent=2)
        print()
        return
    us = {f"p{percent:g}": result.latency.percentile(percent) for percent in (50, 99, 99.9)}
    latency = ", ".join(f"{key} {ns / 1000:.1f}" for key, ns in {"mean": result.latency.mean, **us}.items())
    print(
        f"{bdev.name}: {rw} of {human(bs)}, {iodepth} in flight: {result.iops:,.0f} IOPS, "
        f"{result.bytes_per_second / 2**20:,.1f} MiB/s, latency in us: {latency}"
    )


def _ask(bdev: Bdev) -> None:
    """Go on only if whoever is at the terminal says so."""
    words = f"{bdev.name} at {bdev.controller.address}, {human(bdev.size)}, will be overwritten"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{words}: --yes says that this is wanted")
    if not click.confirm(f"{words}. Go on?", err=True):
        raise click.ClickException("nothing was written")


def _fio(result: bench.Result) -> dict[str, object]:
    now = time.time()
    return {
        "virtio-bdev version": version("virtio-bdev"),
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.ctime(now),
        "jobs": [result.fio()],
    }
