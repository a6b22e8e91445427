"""What a daemon holds: controllers and how they were attached, and what has happened to their disks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

from virtio.errors import VirtioError
from virtio_bdev import aio
from virtio_bdev.bdev import Bdev
from virtio_bdev.config import BdevSpec
from virtio_bdev.events import Added, Event, Events, Lost, Removed
from virtio_bdev.qos import RateLimits
from virtio_bdev.registry import DEFAULT_NAMES, kind_of
from virtio_bdev.rpc.errors import RpcError, no_device

log = logging.getLogger("virtio.rpc")

_NOTIFICATIONS = 1024  # that are kept for who asks


class Notification(NamedTuple):
    """As SPDK tells of a bdev: `ctx` is its name."""

    type: str
    ctx: str
    id: int


class Closing(Protocol):
    """What is to be closed before the controllers are."""

    async def close(self) -> None: ...


class Held(NamedTuple):
    """A controller, and what attaches it again."""

    controller: aio.Controller
    spec: BdevSpec
    events: Events
    number: int  # in the order of `attach`


class System:
    """All controllers of a daemon; belongs to one event loop.

    `on_lost` is called with a controller whose device has gone, after it was let go of.
    """

    def __init__(self) -> None:
        self.held: dict[str, Held] = {}
        self.notifications: deque[Notification] = deque(maxlen=_NOTIFICATIONS)
        self.on_lost: Callable[[str, VirtioError], None] = lambda name, error: None
        self.hotplug: Closing | None = None
        self._changed = asyncio.Event()  # set, and replaced, whenever a disk comes or goes
        self._next = self._count = 0
        self._names: set[str] = set()  # of those on their way
        self._loop = asyncio.get_running_loop()
        self._closing: set[asyncio.Task[None]] = set()

    async def attach(self, spec: BdevSpec) -> list[str]:
        """Attach a controller; the names of its disks. Raises what `virtio_bdev.attach` raises."""
        number, self._count = self._count, self._count + 1
        name = spec.name or self._free_name(spec)
        self._names.add(name)
        try:
            controller = await aio.attach(**spec.arguments() | {"name": name})
        finally:
            self._names.discard(name)
        events = controller.blocking.events()
        self.held[name] = Held(controller, spec, events, number)
        for bdev in controller.blocking.values():
            self._notify("bdev_register", bdev.name)
        events.wake = functools.partial(self._wake, name)
        self._take(name)
        return list(controller.blocking)

    def _free_name(self, spec: BdevSpec) -> str:
        """The next default name: decided here, so that it does not depend on who attaches faster."""
        prefix = DEFAULT_NAMES[kind_of(spec.address, spec.dev_type)]
        names = (f"{prefix}{number}" for number in itertools.count())
        return next(name for name in names if name not in self.held and name not in self._names)

    def _wake(self, name: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._take, name)

    async def detach(self, name: str) -> None:
        """Detach the controller of that name; RpcError if there is none."""
        held = self.held.pop(name, None)
        if held is None:
            raise no_device(name)
        held.events.wake = lambda: None
        for bdev in held.controller.blocking:
            self._notify("bdev_unregister", bdev)
        await held.controller.close()

    async def close(self) -> None:
        """Detach all of them, at the same time."""
        if self.hotplug is not None:
            await self.hotplug.close()
        names = list(self.held)
        await asyncio.gather(*map(self.detach, names), return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def specs(self) -> dict[str, BdevSpec]:
        """What attaches these controllers again as they are."""
        return {
            name: dataclasses.replace(
                held.spec,
                name=name,
                dev_type=held.controller.blocking.dev_type,
                queues=len(held.controller.blocking.device.leases),
                queue_size=held.controller.blocking.device.queue_size,
            )
            for name, held in self.controllers()
        }

    def limits(self) -> dict[str, RateLimits]:
        """The disks whose rates are limited, by name."""
        return {bdev.name: bdev.rate_limits for bdev in self.bdevs() if any(bdev.rate_limits)}

    def limit(self, limits: Mapping[str, RateLimits]) -> None:
        """Set the limits of a configuration; RpcError for a disk that is not there."""
        for bdev, wanted in [(self.bdev(name), wanted) for name, wanted in limits.items()]:
            bdev.set_rate_limits(wanted)

    def controllers(self) -> list[tuple[str, Held]]:
        """All controllers, in the order in which they were asked for."""
        return sorted(self.held.items(), key=lambda item: item[1].number)

    def bdevs(self) -> Iterator[Bdev]:
        """All disks there are."""
        for _, held in self.controllers():
            yield from held.controller.blocking.values()

    def bdev(self, name: str) -> Bdev:
        """The disk of that name or uuid; RpcError if there is none."""
        for bdev in self.bdevs():
            if name in (bdev.name, bdev.uuid):
                return bdev
        raise no_device(name)

    async def wait_for(self, name: str, seconds: float) -> Bdev:
        """The disk of that name, once it is there; RpcError if it does not come in time."""
        end = self._loop.time() + seconds
        while True:
            try:
                return self.bdev(name)
            except RpcError:
                changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), end - self._loop.time())
            except TimeoutError:
                raise RpcError(-errno.ETIMEDOUT, f"Connection timed out: no bdev {name!r}") from None

    def _notify(self, kind: str, name: str) -> None:
        self.notifications.append(Notification(kind, name, self._next))
        self._next += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _take(self, name: str) -> None:
        """Hear what has happened to a controller."""
        held = self.held.get(name)
        while held is not None and (event := held.events.wait(0)) is not None:
            self._heard(name, held, event)
            held = self.held.get(name)

    def _heard(self, name: str, held: Held, event: Event) -> None:
        if isinstance(event, Lost):
            log.info("%s is lost: %s", name, event.error)
            self.on_lost(name, event.error)
            task = self._loop.create_task(self.detach(name))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        elif isinstance(event, Added):
            self._notify("bdev_register", event.bdev.name)
        elif isinstance(event, Removed):
            self._notify("bdev_unregister", event.bdev.name)
        else:
            self._notify("bdev_resize", event.bdev.name)
