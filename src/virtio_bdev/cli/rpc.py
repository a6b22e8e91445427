"""`virtio-bdev rpc`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from virtio_bdev.cli.options import rpc_socket_option
from virtio_bdev.cli.trace import verbose_option
from virtio_bdev.rpc.client import call
from virtio_bdev.rpc.errors import RpcError


@click.command()
@rpc_socket_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
)
@click.argument("method")
@click.argument("params", nargs=-1, metavar="[KEY=TEXT | KEY:=JSON]...")
@verbose_option
def command(rpc_socket: str, timeout: float, method: str, params: tuple[str, ...]) -> None:
    """Call a method of a running daemon, and print its result as JSON.

    A parameter is KEY=TEXT for a string, or KEY:=JSON for anything else. For example:

    \b
      virtio-bdev rpc bdev_get_bdevs
      virtio-bdev rpc bdev_virtio_attach_controller name=Fast0 trtype=user \\
          traddr=/run/vhost.0 dev_type=blk vq_count:=4
    """
    try:
        result = call(rpc_socket, method, dict(map(_parameter, params)) or None, timeout)
    except RpcError as error:
        raise click.ClickException(f"{method}: {error.message} (code {error.code})") from error
    json.dump(json.loads(result), sys.stdout, indent=2)
    print()


def _parameter(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key.rstrip(":"):
        raise click.UsageError(f"{word!r}: want KEY=TEXT or KEY:=JSON")
    if not key.endswith(":"):
        return key, text
    try:
        return key[:-1], json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{word!r}: no JSON after := ({error})") from error
