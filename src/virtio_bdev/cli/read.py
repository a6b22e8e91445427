"""`virtio-bdev read`."""

from __future__ import annotations

import os

import click

from virtio_bdev.cli.files import opened
from virtio_bdev.cli.options import CHUNK, SIZE, channel_to, choose, device_options, progress
from virtio_bdev.config import BdevSpec


@click.command()
@click.option("--bdev", "disk", metavar="NAME", help="Name of the disk, where there are several.")
@click.option("--offset", type=SIZE, default=0, help="Byte to begin at: 4096, 4k, 1M, 2GiB.")
@click.option("--length", type=SIZE, help="Bytes to read; to the end of the disk unless given.")
@click.option("-o", "--output", metavar="FILE", help="File to write; - for stdout, the default.")
@device_options
def command(spec: BdevSpec, disk: str | None, offset: int, length: int | None, output: str | None) -> None:
    """Copy a disk behind ADDRESS, or a part of it, to a file."""
    if output is None and os.isatty(1):
        raise click.UsageError("standard output is a terminal: name a file with -o, or pipe it into xxd")
    with spec.attach() as controller:
        bdev = choose(controller, disk)
        if offset > bdev.size:
            raise click.ClickException(f"--offset {offset} is past the end of {bdev.name}, {bdev.size} bytes")
        left = bdev.size - offset if length is None else length
        bdev.check(offset, left)
        with (
            opened(output or "-", write=True) as file,
            channel_to(bdev, spec.timeout) as channel,
            controller.buffer(CHUNK) as buffer,
            progress(f"reading {bdev.name}", left) as advance,
        ):
            while left:
                chunk = buffer.view()[: min(left, CHUNK)]
                channel.readinto(offset, chunk)
                file.write(chunk)
                offset, left = offset + len(chunk), left - len(chunk)
                advance(len(chunk))
