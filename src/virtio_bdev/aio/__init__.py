"""The same block devices for asyncio: the calls that move data, awaited.

    async with await aio.attach("user:/run/vhost.0", dev_type="blk") as controller:
        async with controller["VirtioBlk0"].open() as channel:
            data = await channel.read(0, 4096)

A channel belongs to the event loop, and so to the thread, that opened it. Any number of calls may be
under way on it: those for which the queue has no room wait in order. A call that is cancelled, or whose
time is up, ends at once; its request keeps its memory until the device has returned it, may still take
effect, and what it writes gets no other write before that.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from virtio.ring.buffer import Buffer
from virtio_bdev import registry
from virtio_bdev.aio.channel import Channel
from virtio_bdev.aio.reactor import Reactor

if TYPE_CHECKING:
    from virtio.device.disk import Limits
    from virtio.ring.lease import Lease
    from virtio_bdev import bdev as blocking
    from virtio_bdev.events import Event

__all__ = ["Bdev", "Channel", "Controller", "attach"]

T = TypeVar("T")

MAX_WAITING = 1 << 16  # calls on one channel that wait for room in the queue
_LEAVE_S = 1.0  # how long other loops may take to end their channels


async def attach(address: str, **options: Any) -> Controller:
    """As `virtio_bdev.attach`, without blocking the loop; any number of them at the same time.

    A cancelled one is detached as soon as it is there.
    """
    future = _in_thread(functools.partial(registry.attach, address, **options))
    try:
        return Controller(await asyncio.shield(future))
    except asyncio.CancelledError:
        future.add_done_callback(_discard)
        raise


def _discard(future: asyncio.Future[registry.Controller]) -> None:
    if not future.cancelled() and future.exception() is None:
        threading.Thread(target=future.result().close, name="virtio-detach").start()


def _in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """Run it in a thread of its own: an executor has few, and these wait for different devices."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="virtio-aio", daemon=True).start()
    return future


class Controller(Mapping[str, "Bdev"]):
    """An attached device: its disks by name; an asynchronous context manager.

    `blocking` is the `virtio_bdev.Controller` that it drives, for what there is no awaited call for.
    """

    def __init__(self, inner: registry.Controller) -> None:
        self.blocking = inner
        self.name, self.address = inner.name, inner.address
        self._reactors: dict[tuple[int, Lease], Reactor] = {}

    def buffer(self, nbytes: int) -> Buffer:
        """DMA memory that any channel of this controller moves data to and from without a copy."""
        return self.blocking.buffer(nbytes)

    async def events(self) -> AsyncIterator[Event]:
        """What happens to the disks from now on; ends with the controller."""
        loop, flag = asyncio.get_running_loop(), asyncio.Event()
        stream = self.blocking.events()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(flag.set)

        stream.wake = wake
        while True:
            flag.clear()
            event = stream.wait(0)
            if event is not None:
                yield event
            elif stream.ended:
                return
            else:
                await flag.wait()

    async def rescan(self) -> None:
        """Look for disks that came or went without an event."""
        await _in_thread(self.blocking.rescan)

    async def close(self) -> None:
        """Detach: calls under way raise ClosedError, the device is stopped; idempotent.

        Other loops end their channels themselves; one that takes more than a second is not waited for.
        """
        loop, elsewhere = asyncio.get_running_loop(), []
        for reactor in list(self._reactors.values()):
            if reactor.loop is loop:
                reactor.close()
            elif not reactor.closed:
                elsewhere.append(reactor.close_in_its_loop())
        await asyncio.shield(_in_thread(functools.partial(self._close, elsewhere)))

    def _close(self, elsewhere: list[threading.Event]) -> None:
        """Close it once other loops have let go of its descriptors."""
        end = time.monotonic() + _LEAVE_S
        for left in elsewhere:
            left.wait(max(0.0, end - time.monotonic()))
        self.blocking.close()

    def reactor(self, lease: Lease) -> Reactor:
        """What drives this lease in the running loop; for `Channel` to call."""
        key = id(asyncio.get_running_loop()), lease
        reactor = self._reactors.get(key)
        if reactor is None or reactor.closed:
            reactor = self._reactors[key] = Reactor(lease)
        return reactor

    def __getitem__(self, name: str) -> Bdev:
        return Bdev(self, self.blocking[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocking)

    def __len__(self) -> int:
        return len(self.blocking)

    def __bool__(self) -> bool:
        return True

    async def __aenter__(self) -> Controller:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return repr(self.blocking).replace("<", "<aio ", 1)


class Bdev:
    """A named block device; what it is, is as in `virtio_bdev.Bdev`, which `blocking` is."""

    def __init__(self, controller: Controller, inner: blocking.Bdev) -> None:
        self.controller, self.blocking = controller, inner
        self.name, self.uuid = inner.name, inner.uuid

    @property
    def size(self) -> int:
        return self.blocking.size

    @property
    def block_size(self) -> int:
        return self.blocking.block_size

    @property
    def read_only(self) -> bool:
        return self.blocking.read_only

    @property
    def limits(self) -> Limits:
        return self.blocking.limits

    @property
    def state(self) -> str:
        return self.blocking.state

    def open(self, *, timeout: float | None = 30.0, max_waiting: int = MAX_WAITING) -> Channel:
        """A channel of the running loop; use it in `async with`.

        `timeout` bounds each call, in seconds; of more than `max_waiting` calls for which the queue has
        no room, one raises QueueFullError.
        """
        return Channel(self, timeout=timeout, max_waiting=max_waiting)

    async def reset(self) -> None:
        """As `virtio_bdev.Bdev.reset`."""
        await _in_thread(self.blocking.reset)

    def __repr__(self) -> str:
        return repr(self.blocking).replace("<", "<aio ", 1)
