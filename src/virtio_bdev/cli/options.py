"""What several commands have in common: addresses, sizes, the choice of a disk, progress."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from virtio_bdev import Bdev, Controller, attach

CHUNK = 8 << 20  # bytes that `read` and `write` move at a time: eight requests of 1 MiB

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


class Size(click.ParamType):
    """A number of bytes: 4096, 4k, 64M, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).lower()
        digits = text.rstrip("kmgtib")
        unit = text[len(digits) :].removesuffix("ib").removesuffix("b")
        if not digits.isdecimal() or unit not in _UNITS:
            self.fail(f"{value!r} is not a size, such as 4096, 4k, 64M or 2GiB", param, ctx)
        return int(digits) << _UNITS[unit]


SIZE = Size()


def controller_options(command: Callable[..., None]) -> Callable[..., None]:
    """ADDRESS and how to attach it; the command gets the attached Controller."""

    @click.argument("address")
    @click.option(
        "--dev-type",
        type=click.Choice(["scsi", "blk"]),
        default="scsi",
        show_default=True,
        help="What kind of device it is.",
    )
    @click.option("--queues", type=click.IntRange(1), help="Request queues; as many as cores.")
    @click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=5.0,
        show_default=True,
        help="Seconds to wait for any answer.",
    )
    @functools.wraps(command)
    def wrapper(address: str, dev_type: Any, queues: int | None, timeout: float, **rest: Any) -> None:
        with attach(address, dev_type=dev_type, queues=queues, timeout=timeout) as controller:
            command(controller=controller, timeout=timeout, **rest)

    return wrapper


def choose(controller: Controller, name: str | None) -> Bdev:
    """The disk of that name, or the only one."""
    names = ", ".join(controller) or "none"
    if name is not None:
        if name not in controller:
            raise click.ClickException(f"{controller.address} has no disk {name}; it has: {names}")
        return controller[name]
    if len(controller) != 1:
        raise click.ClickException(
            f"{controller.address} has {len(controller)} disks: name one with --bdev ({names})"
        )
    return next(iter(controller.values()))


@contextlib.contextmanager
def progress(words: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; call what it yields with each number of bytes."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(words),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(words, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
