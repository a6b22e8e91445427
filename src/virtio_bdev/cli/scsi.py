"""`virtio-bdev scsi`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import click

from virtio.wire.scsi import Status
from virtio.wire.sense import Sense
from virtio.wire.virtio_scsi import ResponseCode
from virtio_bdev import Controller
from virtio_bdev.cli.files import opened
from virtio_bdev.cli.options import SIZE, controller_options

_MOST = 1 << 20  # bytes of data with one command


class _Unit(click.ParamType[Any]):
    """Target and LUN: 0:0."""

    name = "t:l"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,5}):([0-9]{1,5})", str(value))
        if match is None:
            self.fail(f"{value!r}: want target and LUN, such as 0:0", param, ctx)
        return int(match[1]), int(match[2])


@click.command()
@click.option("--lun", "unit", type=_Unit(), required=True, metavar="T:L", help="Target and LUN.")
@click.option("--in", "nbytes", type=SIZE, default=0, help="Room for data from the unit: 36, 4k.")
@click.option("-i", "--input", "source", metavar="FILE", help="Data to the unit; - for stdin.")
@click.option("-o", "--output", "sink", metavar="FILE", help="Where its data goes, raw; - for stdout.")
@controller_options
@click.argument("cdb", nargs=-1, required=True, metavar="CDB-HEX...")
def command(
    controller: Controller,
    unit: tuple[int, int],
    nbytes: int,
    source: str | None,
    sink: str | None,
    cdb: tuple[str, ...],
    timeout: float,
) -> None:
    """Send a SCSI command as it is, and show the answer.

    CDB-HEX is the command in hexadecimal, in any pieces. This asks what a unit is:

    \b
      virtio-bdev scsi user:disk.sock --lun 0:0 --in 36 12 00 00 00 24 00

    The exit status is 0 for GOOD and 1 for anything else.
    """
    digits = "".join(cdb)
    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})+", digits):
        raise click.UsageError(f"{' '.join(cdb)!r}: want bytes in hexadecimal")
    reply = controller.scsi(*unit, bytes.fromhex(digits), _contents(source), nbytes=nbytes, timeout=timeout)
    if reply.response != ResponseCode.OK:
        raise click.ClickException(f"virtio-scsi response {_name(ResponseCode, reply.response)}")
    click.echo(f"status {_name(Status, reply.status)}", err=sink == "-")
    if reply.sense:
        click.echo(f"sense  {reply.sense.hex(' ')}: {Sense.decode(reply.sense)}", err=sink == "-")
    if sink is not None:
        with opened(sink, write=True) as file:
            file.write(memoryview(reply.data))
    else:
        for line in _dump(reply.data):
            click.echo(line)
    if not reply.good:
        raise click.exceptions.Exit(1)


def _contents(source: str | None) -> bytes:
    if source is None:
        return b""
    with opened(source, write=False) as file:
        room = memoryview(bytearray(_MOST + 1))
        return bytes(room[: file.fill(room)])


def _dump(data: bytes) -> Iterator[str]:
    """Sixteen bytes a line: offset, in hexadecimal, as text."""
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in part)
        yield f"{at:06x}  {part.hex(' '):47}  |{text}|"


def _name(numbers: Any, value: int) -> str:
    try:
        return str(numbers(value).name).replace("_", " ")
    except ValueError:
        return f"{value:#04x}"
