"""`virtio-bdev run`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import click

from virtio.errors import VirtioError
from virtio_bdev import config
from virtio_bdev.cli.list import print_table
from virtio_bdev.cli.trace import verbose_option, words

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@click.command()
@click.option("--config", "path", metavar="FILE", help="File that names the devices.")
@click.option("--rpc-socket", metavar="PATH", help="Serve JSON-RPC there, for SPDK's clients and `rpc`.")
@verbose_option
def command(path: str | None, rpc_socket: str | None) -> None:
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
    asyncio.run(_Daemon(wanted, rpc_socket).run())


class _Daemon:
    """Holds a system until it is told to stop, or has nothing more to hold."""

    def __init__(self, wanted: config.Config | None, rpc_socket: str | None) -> None:
        self._wanted, self._rpc_socket = wanted, rpc_socket
        self._empty = False

    async def run(self) -> None:
        from virtio_bdev.rpc.system import System

        self._stop = asyncio.Event()
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in _SIGNALS:  # until all is attached, they end that; afterwards one is enough
            loop.add_signal_handler(number, task.cancel)
        self._system = System()
        self._system.on_lost = self._lost
        try:
            await self._begin()
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._stop.set)
            print("ready", flush=True)
            _notify("READY=1")
            await self._stop.wait()
        except asyncio.CancelledError:
            raise click.Abort from None
        finally:
            for number in _SIGNALS:
                loop.add_signal_handler(number, lambda: None)  # what follows is not to be cut short
            _notify("STOPPING=1")
            if self._server is not None:
                await self._server.close()
            await self._system.close()
        if self._empty:
            raise click.ClickException("every device is lost")

    async def _begin(self) -> None:
        self._server = None
        if self._rpc_socket is not None:
            from virtio_bdev.rpc.methods import Methods
            from virtio_bdev.rpc.server import RpcServer

            self._server = RpcServer(self._rpc_socket, Methods(self._system))
        if self._wanted is not None:
            lines = self._wanted.lines
            outcomes = await asyncio.gather(
                *(self._system.attach(line.spec) for line in lines), return_exceptions=True
            )
            for line, outcome in zip(lines, outcomes, strict=True):
                if isinstance(outcome, VirtioError):
                    raise click.ClickException(f"{line.where}: {words(outcome)}") from outcome
                if isinstance(outcome, BaseException):
                    raise outcome
            print_table(self._system.bdevs())
        if self._server is not None:
            await self._server.start()

    def _lost(self, name: str, error: VirtioError) -> None:
        print(f"virtio-bdev: {name} is lost: {words(error)}", file=sys.stderr)
        if self._server is None and list(self._system.held) == [name]:
            self._empty = True
            self._stop.set()


def _notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address and address[0] in "/@":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            try:
                sock.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
            except OSError as error:
                print(f"virtio-bdev: {address}: {error.strerror}", file=sys.stderr)
