"""What `virtio-bdev run` does between its start and its end: one event loop."""

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
from virtio_bdev.cli.trace import words
from virtio_bdev.metrics import Endpoint
from virtio_bdev.rpc.errors import RpcError
from virtio_bdev.rpc.methods import Methods
from virtio_bdev.rpc.server import RpcServer
from virtio_bdev.rpc.system import System

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Daemon:
    """Holds a system until it is told to stop, or has nothing more to hold."""

    def __init__(
        self, wanted: config.Config | None, rpc_socket: str | None, metrics: tuple[str, int] | None
    ) -> None:
        """`metrics` is the host and the port to serve them at."""
        self._wanted, self._rpc_socket, self._metrics = wanted, rpc_socket, metrics
        self._server: RpcServer | None = None
        self._endpoint: Endpoint | None = None
        self._empty = False

    def hold(self) -> None:
        """All of it; click.Abort if a signal came before everything was attached."""
        asyncio.run(self._run())

    async def _run(self) -> None:
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
            if self._endpoint is not None:
                self._endpoint.close()
            await self._system.close()
        if self._empty:
            raise click.ClickException("every device is lost")

    async def _begin(self) -> None:
        if self._rpc_socket is not None:
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
            try:
                self._system.limit(self._wanted.limits)
            except RpcError as error:
                raise click.ClickException(f"{self._wanted.path}: rate limits: {error.message}") from error
            print_table(self._system.bdevs())
        if self._metrics is not None:
            self._endpoint = Endpoint(*self._metrics, lambda: list(self._system.bdevs()))
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
