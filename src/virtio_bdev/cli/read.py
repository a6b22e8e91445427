"""`virtio-bdev read`."""

from __future__ import annotations

from typing import BinaryIO

import click

from virtio_bdev import Controller
from virtio_bdev.cli.options import CHUNK, SIZE, choose, controller_options, progress


@click.command()
@controller_options
@click.option("--bdev", "name", help="The disk, where there are several.")
@click.option("--offset", type=SIZE, default=0, help="Byte to begin at.")
@click.option("--length", type=SIZE, help="Bytes to read; to the end unless given.")
@click.option("-o", "--output", type=click.File("wb"), default="-", help="File to write; - is stdout.")
def command(
    controller: Controller,
    timeout: float,
    name: str | None,
    offset: int,
    length: int | None,
    output: BinaryIO,
) -> None:
    """Copy a disk behind ADDRESS, or a part of it, to a file."""
    bdev = choose(controller, name)
    left = max(0, bdev.size - offset) if length is None else length
    bdev.check(offset, left)
    with (
        bdev.open(timeout=timeout) as channel,
        controller.buffer(CHUNK) as buffer,
        memoryview(buffer) as view,
        progress(f"reading {bdev.name}", left) as advance,
    ):
        while left:
            nbytes = min(left, CHUNK)
            with view[:nbytes] as chunk:
                channel.readinto(offset, chunk)
                output.write(chunk)
            offset, left = offset + nbytes, left - nbytes
            advance(nbytes)
    output.flush()
