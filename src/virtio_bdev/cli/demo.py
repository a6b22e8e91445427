"""`virtio-bdev demo`."""

from __future__ import annotations

import random
import time
from array import array
from typing import get_args

import click

from virtio.target import serve
from virtio_bdev import Bdev, Controller, DevType, attach
from virtio_bdev.bdev import human

_MOVED = 64 << 20  # bytes written and read of each kind of disk
_READS = 20_000


@click.command()
def command() -> None:
    """See it work: two targets are started, their disks listed, written, verified, and timed."""
    for dev_type in get_args(DevType):
        disks = ["ram:64M", "ram:96M,bs=4096"] if dev_type == "scsi" else ["ram:64M"]
        with serve(dev_type, *disks) as target:
            print(f"virtio-{dev_type} target, process {target.pid}, on {target.path}")
            with attach(target.address, dev_type=dev_type) as controller:
                for bdev in controller.values():
                    print(f"  {bdev!r}")
                _exercise(controller, next(iter(controller.values())))


def _exercise(controller: Controller, bdev: Bdev) -> None:
    """Write a pattern, read it back and compare, then time random reads."""
    pattern = random.Random(bdev.name).randbytes(1 << 20)
    size = min(_MOVED, bdev.size)
    with bdev.open() as channel:
        begun = time.perf_counter()
        for offset in range(0, size, len(pattern)):
            channel.write(offset, pattern)
        channel.flush()
        wrote = time.perf_counter() - begun
        begun = time.perf_counter()
        for offset in range(0, size, len(pattern)):
            if channel.read(offset, len(pattern)) != pattern:
                raise click.ClickException(f"{bdev.name}: bytes at {offset} are not those written")
        read = time.perf_counter() - begun
        print(
            f"  {bdev.name}: {human(size)} written in {size / wrote / 2**20:.0f} MiB/s, read back "
            f"in {size / read / 2**20:.0f} MiB/s and verified"
        )
        offsets = array("Q", (random.randrange(size // 4096) * 4096 for _ in range(_READS)))
        with controller.buffer(_READS // 10 * 4096) as buffer:
            begun = time.perf_counter()
            for i in range(0, _READS, _READS // 10):
                batch = offsets[i : i + _READS // 10]
                channel.read_batch(batch, 4096, buffer).raise_for_status()
            took = time.perf_counter() - begun
        print(f"  {bdev.name}: {_READS / took:,.0f} random 4 KiB reads a second")
