"""`virtio-bdev list`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

import click

from virtio_bdev import Bdev, Controller
from virtio_bdev.bdev import human
from virtio_bdev.cli.options import controller_options


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As SPDK's bdev_get_bdevs prints it.")
@controller_options
def command(controller: Controller, as_json: bool, **_: Any) -> None:
    """List the disks behind ADDRESS."""
    if as_json:
        json.dump([bdev.describe() for bdev in controller.values()], sys.stdout, indent=2)
        print()
    else:
        print_table(controller.values())


def print_table(bdevs: Iterable[Bdev]) -> None:
    """One line a disk, below a headline."""
    print_rows([["NAME", "SIZE", "BLOCK", "BLOCKS", "MODE", "SERIAL", "PRODUCT"], *map(_row, bdevs)])


def print_rows(rows: list[list[str]]) -> None:
    """Rows of cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _row(bdev: Bdev) -> list[str]:
    return [
        bdev.name,
        human(bdev.size),
        str(bdev.block_size),
        str(bdev.blocks),
        "ro" if bdev.read_only else "rw",
        bdev.disk.serial or "-",
        bdev.disk.product,
    ]
