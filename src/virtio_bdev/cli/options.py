"""What several commands have in common: addresses, sizes, the choice of a disk, progress."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from virtio.transport.sysfs import ADDRESS, normal
from virtio_bdev import Bdev, Channel, Controller, DeviceError, ProtocolError, RequestTimeout
from virtio_bdev.cli.trace import verbose_option, words
from virtio_bdev.config import DEV_TYPES, OPTIONS, BdevSpec, Option

CHUNK = 8 << 20  # bytes that `read` and `write` move at a time: eight requests of 1 MiB

_UNITS = ["", "k", "m", "g", "t"]


class Size(click.ParamType[Any]):
    """A number of bytes: 4096, 4k, 64M, 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,20})([kmgt]?)(?:i?b)?", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is not a size, such as 4096, 4k, 64M or 2GiB", param, ctx)
        return int(match[1]) << 10 * _UNITS.index(match[2])


SIZE = Size()


class Address(click.ParamType[Any]):
    """Where a device is: user:PATH or pci:0000:00:04.0."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, _, place = str(value).partition(":")
        if kind == "user" and place:
            return str(value)
        if kind == "pci" and ADDRESS.fullmatch(place):
            return f"pci:{normal(place)}"
        perhaps = "" if ":" in str(value) else f"; perhaps user:{value}"
        if ADDRESS.fullmatch(str(value)):
            perhaps = f"; perhaps pci:{value}"
        self.fail(
            f"{value!r}: want user:PATH, a vhost-user socket, or pci:0000:00:04.0, a PCI device{perhaps}",
            param,
            ctx,
        )


class _Field(click.ParamType[Any]):
    """A field of a BdevSpec, as a configuration file has it too."""

    def __init__(self, name: str, option: Option) -> None:
        self.name = name
        self.option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.option.parse(str(value))
        except ValueError:
            self.fail(f"{value!r}: want {self.option.want}", param, ctx)


def device_options(command: Callable[..., None]) -> Callable[..., None]:
    """ADDRESS and how to attach it; the command gets a BdevSpec, `spec`."""

    @functools.wraps(command)
    def wrapper(**rest: Any) -> None:
        fields = {name: rest.pop(name) for name in ["address", *OPTIONS]}
        command(spec=BdevSpec(**fields), **rest)

    defaults = BdevSpec(address="")
    decorated: Callable[..., None] = verbose_option(wrapper)
    for name, option in reversed(OPTIONS.items()):
        decorated = click.option(
            f"--{name.replace('_', '-')}",
            type=click.Choice(DEV_TYPES) if name == "dev_type" else _Field(name, option),
            default=getattr(defaults, name),
            show_default=True,
            metavar=None if name == "dev_type" else option.metavar,
            help=option.words,
        )(decorated)
    return click.argument("address", type=Address())(decorated)


def controller_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same for a command that gets the attached `controller`, and the `timeout`."""

    @device_options
    @functools.wraps(command)
    def wrapper(spec: BdevSpec, **rest: Any) -> None:
        with spec.attach() as controller:
            command(controller=controller, timeout=spec.timeout, **rest)

    return wrapper


def rpc_socket_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--rpc-socket of a daemon that runs."""
    return click.option(
        "--rpc-socket",
        envvar="VIRTIO_BDEV_RPC_SOCKET",
        show_envvar=True,
        required=True,
        metavar="PATH",
        help="The daemon's socket.",
    )(command)


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
def channel_to(bdev: Bdev, timeout: float) -> Iterator[Channel]:
    """A channel, and errors that name its disk."""
    with bdev.open(timeout=timeout) as channel:
        try:
            yield channel
        except (DeviceError, ProtocolError, RequestTimeout) as error:
            raise click.ClickException(f"{bdev.name}: {words(error)}") from error


@contextlib.contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
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
        TextColumn(title),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
