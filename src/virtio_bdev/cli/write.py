"""`virtio-bdev write`."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

import click

from virtio_bdev import Controller
from virtio_bdev.cli.options import CHUNK, SIZE, choose, controller_options, progress


@click.command()
@controller_options
@click.option("--bdev", "name", help="The disk, where there are several.")
@click.option("--offset", type=SIZE, default=0, help="Byte to begin at.")
@click.option("-i", "--input", "source", type=click.File("rb"), default="-", help="File to read.")
def command(controller: Controller, timeout: float, name: str | None, offset: int, source: BinaryIO) -> None:
    """Copy a file to a disk behind ADDRESS, and flush it."""
    bdev = choose(controller, name)
    total = _size(source)
    bdev.check(offset, total or 0, write=True)
    with (
        bdev.open(timeout=timeout) as channel,
        controller.buffer(CHUNK) as buffer,
        memoryview(buffer) as view,
        progress(f"writing {bdev.name}", total) as advance,
    ):
        while nbytes := _fill(source, view):
            with view[:nbytes] as chunk:
                channel.write(offset, chunk)
            offset += nbytes
            advance(nbytes)
        channel.flush()


def _size(source: BinaryIO) -> int | None:
    """How much there is to read, where that is known beforehand."""
    status = os.fstat(source.fileno())
    return status.st_size - source.tell() if stat.S_ISREG(status.st_mode) else None


def _fill(source: BinaryIO, view: memoryview) -> int:
    """Read until the view is full or the input ends; a pipe gives less at a time."""
    filled = 0
    while filled < len(view) and (got := os.readv(source.fileno(), [view[filled:]])):
        filled += got
    return filled
