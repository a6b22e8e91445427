"""`virtio-bdev run`."""

from __future__ import annotations

import re
import sys
from typing import Any

import click

from virtio_bdev import config
from virtio_bdev.cli.trace import verbose_option


class _HostPort(click.ParamType[Any]):
    """HOST:PORT, or PORT for this machine alone; gives both."""

    name = "[host:]port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        match = re.fullmatch(r"(?:\[?([^\[\]]+)\]?:)?([0-9]{1,5})", value)
        if match is None or int(match[2]) >= 1 << 16:
            self.fail(f"{value!r}: want PORT or HOST:PORT, a port up to {(1 << 16) - 1}", param, ctx)
        return match[1] or "127.0.0.1", int(match[2])


@click.command()
@click.option("--config", "path", metavar="FILE", help="File that names the devices.")
@click.option("--rpc-socket", metavar="PATH", help="Serve JSON-RPC there, for SPDK's clients and `rpc`.")
@click.option("--metrics", type=_HostPort(), metavar="[HOST:]PORT", help="Serve Prometheus metrics there.")
@verbose_option
def command(path: str | None, rpc_socket: str | None, metrics: tuple[str, int] | None) -> None:
    """Attach the devices of a configuration file, and hold them until SIGTERM or SIGINT.

    Prints their disks, then "ready"; on an error nothing stays attached. A device that is lost
    is reported, and the others are held; without any, the exit status is 1, unless there is an
    RPC socket by which others can be attached. A file looks like this, or like one that SPDK saves:

    \b
      [Virtio]
      Dev User /tmp/vhost.0
      Dev User /run/blk.0 blk name=Fast0 queues=4
    """
    if path is None and rpc_socket is None:
        raise click.UsageError("nothing to do: want --config FILE, --rpc-socket PATH, or both")
    wanted = None if path is None else config.load(path)
    if wanted is not None and wanted.ignored:
        names = ", ".join(wanted.ignored)
        print(f"virtio-bdev: {path}: not for us, and skipped: {names}", file=sys.stderr)
    if wanted is not None and not wanted.lines and rpc_socket is None:
        raise click.ClickException(f"{path}: no device, want a bdev_virtio_attach_controller")
    from virtio_bdev.cli.daemon import Daemon  # which has the libraries that only a daemon needs

    Daemon(wanted, rpc_socket, metrics).hold()
