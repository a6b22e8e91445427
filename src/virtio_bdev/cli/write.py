"""`virtio-bdev write`."""

from __future__ import annotations

import click

from virtio_bdev import Bdev, RequestError
from virtio_bdev.cli.files import opened
from virtio_bdev.cli.options import CHUNK, SIZE, channel_to, choose, device_options, progress
from virtio_bdev.config import BdevSpec


@click.command()
@click.option("--bdev", "disk", metavar="NAME", help="Name of the disk, where there are several.")
@click.option("--offset", type=SIZE, default=0, help="Byte to begin at: 4096, 4k, 1M, 2GiB.")
@click.option(
    "-i", "--input", "source", metavar="FILE", default="-", help="File to read; - for stdin, the default."
)
@click.option("--pad", type=click.Choice(["zeros"]), help="What to fill the last block up with.")
@device_options
def command(spec: BdevSpec, disk: str | None, offset: int, source: str, pad: str | None) -> None:
    """Copy a file to a disk behind ADDRESS, and flush it."""
    with opened(source, write=False) as file, spec.attach() as controller:
        bdev = choose(controller, disk)
        total = file.left()
        _check(bdev, offset, total or 0, pad)
        with (
            channel_to(bdev, spec.timeout) as channel,
            controller.buffer(CHUNK) as buffer,
            progress(f"writing {bdev.name}", total) as advance,
        ):
            view, begin = buffer.view(), offset
            while nbytes := file.fill(view):
                try:
                    padded = _check(bdev, offset, nbytes, pad)
                except RequestError as error:
                    raise click.ClickException(f"{error}; {offset - begin} bytes were written") from error
                view[nbytes:padded] = bytes(padded - nbytes)
                channel.write(offset, view[:padded])
                offset += padded
                advance(nbytes)
            channel.flush()


def _check(bdev: Bdev, offset: int, nbytes: int, pad: str | None) -> int:
    """So many bytes, perhaps rounded up to whole blocks, if they can be written at `offset`."""
    if nbytes % bdev.block_size and offset % bdev.block_size == 0:
        if pad is None:
            raise RequestError(
                f"{nbytes} bytes are not a multiple of the {bdev.block_size}-byte blocks of {bdev.name}: "
                "--pad zeros fills the last one up"
            )
        nbytes += -nbytes % bdev.block_size
    bdev.check(offset, nbytes, write=True)
    return nbytes
