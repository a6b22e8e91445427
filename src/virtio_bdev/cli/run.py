"""`virtio-bdev run`."""

from __future__ import annotations

import contextlib
import select
import signal
import sys

import click

from virtio.errors import VirtioError
from virtio_bdev import Controller, config
from virtio_bdev.cli.list import print_table
from virtio_bdev.cli.trace import verbose_option, words

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.option(
    "--config",
    "path",
    metavar="FILE",
    required=True,
    help="File that names the devices.",
)
@verbose_option
def command(path: str) -> None:
    """Attach the devices of a configuration file, and hold them until SIGTERM or SIGINT.

    Prints their disks, then "ready"; on an error nothing stays attached. A device that is lost
    is reported, and the others are held; without any, the exit status is 1. A file looks like this:

    \b
      [Virtio]
      Dev User /tmp/vhost.0
      Dev User /run/blk.0 blk name=Fast0 queues=4
    """
    wanted = config.load(path)
    if wanted.ignored:
        names = ", ".join(f"[{name}]" for name in wanted.ignored)
        print(f"virtio-bdev: {path}: sections that are not for us: {names}", file=sys.stderr)
    before = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        with contextlib.ExitStack() as stack:
            try:
                held = [_attach(stack, path, line) for line in wanted.lines]
                print_table(bdev for controller in held for bdev in controller.values())
                with contextlib.suppress(KeyboardInterrupt):
                    print("ready", flush=True)
                    _hold(held)
            finally:
                for number in _SIGNALS:  # one is enough: what follows is not to be cut short
                    signal.signal(number, signal.SIG_IGN)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _attach(stack: contextlib.ExitStack, path: str, line: config.Line) -> Controller:
    try:
        return stack.enter_context(line.spec.attach())
    except VirtioError as error:
        raise click.ClickException(f"{path}:{line.number}: {words(error)}") from error


def _hold(controllers: list[Controller]) -> None:
    """Wait until all devices are lost, and say of each that it is."""
    poll = select.poll()
    held = {controller.device.life.fd: controller for controller in controllers}
    for fd in held:
        poll.register(fd, select.POLLIN)
    while held:
        for fd, _ in poll.poll():
            poll.unregister(fd)
            lost = held.pop(fd)
            error = lost.device.life.error
            print(f"virtio-bdev: {lost.name} is lost: {error and words(error)}", file=sys.stderr)
            lost.close()
    raise click.ClickException("every device is lost")
