"""`virtio-bdev read`."""

from __future__ import annotations

import os
import stat
import sys
from typing import BinaryIO

import click

from virtio_bdev.cli.options import CHUNK, SIZE, choose, device_options, file_errors, progress
from virtio_bdev.config import BdevSpec


@click.command()
@device_options
@click.option("--bdev", "name", help="The disk, where there are several.")
@click.option("--offset", type=SIZE, default=0, help="Byte to begin at; 4k, 1M, 2GiB will do.")
@click.option("--length", type=SIZE, help="Bytes to read; to the end unless given.")
@click.option("-o", "--output", type=click.Path(), default="-", help="File to write; stdout unless given.")
def command(spec: BdevSpec, name: str | None, offset: int, length: int | None, output: str) -> None:
    """Copy a disk behind ADDRESS, or a part of it, to a file."""
    with spec.attach() as controller:
        bdev = choose(controller, name)
        left = max(0, bdev.size - offset) if length is None else length
        bdev.check(offset, left)
        with (
            file_errors(output),
            _open(output) as file,
        ):
            ...


def _open(path: str) -> BinaryIO:
    return sys.stdout.buffer if path == "-" else open(path, "wb", buffering=0)
