"""`virtio-bdev list`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from virtio_bdev import Controller
from virtio_bdev.bdev import human
from virtio_bdev.cli.options import controller_options


@click.command()
@controller_options
@click.option("--json", "as_json", is_flag=True, help="As SPDK's bdev_get_bdevs prints it.")
def command(controller: Controller, as_json: bool, **_: Any) -> None:
    """List the disks behind ADDRESS."""
    if as_json:
        json.dump([bdev.describe() for bdev in controller.values()], sys.stdout, indent=2)
        print()
        return
    rows = [("NAME", "SIZE", "BLOCK", "BLOCKS", "MODE", "SERIAL", "PRODUCT")]
    for bdev in controller.values():
        mode = "ro" if bdev.read_only else "rw"
        size = human(bdev.size)
        rows.append(
            (
                bdev.name,
                size,
                str(bdev.block_size),
                str(bdev.blocks),
                mode,
                bdev.disk.serial or "-",
                bdev.disk.product,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
