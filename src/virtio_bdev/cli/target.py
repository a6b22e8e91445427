"""`virtio-bdev target`."""

from __future__ import annotations

import click

from virtio import target
from virtio.errors import RequestError
from virtio_bdev.config import DEV_TYPES


@click.command()
@click.argument("socket")
@click.option(
    "--dev-type",
    type=click.Choice(DEV_TYPES),
    default="scsi",
    show_default=True,
    help="Kind of device; blk has one disk.",
)
@click.option(
    "--disk",
    "disks",
    multiple=True,
    required=True,
    metavar="SPEC",
    help="ram:64M or file:PATH[,ro]; for scsi perhaps TARGET:LUN=SPEC. Several disks become SCSI "
    "targets 0, 1, ...",
)
@click.option("--queues", type=click.IntRange(1), default=4, show_default=True, help="Request queues.")
@click.option("--packed", is_flag=True, help="Offer packed rings; a driver may still choose split ones.")
@click.option(
    "--control",
    metavar="SOCKET",
    help="Take changes by JSON-RPC on this socket while it runs: disks that come, go and grow, faults.",
)
def command(
    socket: str, dev_type: str, disks: tuple[str, ...], queues: int, packed: bool, control: str | None
) -> None:
    """Serve disks on the vhost-user socket SOCKET, to one front end after another.

    Prints "ready: SOCKET" once front ends can connect; SIGINT or SIGTERM ends it.
    """
    try:
        target.run(socket, dev_type, list(disks), queues, packed=packed, control=control)
    except RequestError as error:  # what was asked for cannot be served
        raise click.UsageError(str(error)) from error
