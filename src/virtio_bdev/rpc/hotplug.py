"""PCI devices that come: attached as soon as they are bound to a driver that leaves them to us."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

from virtio.errors import VirtioError
from virtio.transport import sysfs
from virtio_bdev.config import BdevSpec
from virtio_bdev.rpc.system import System

log = logging.getLogger("virtio.rpc")

_UEVENTS, _FROM_KERNEL = 15, 1  # NETLINK_KOBJECT_UEVENT and its multicast group
_NBYTES = 16384
_LOOK_S = 5.0  # where the kernel tells: it may not tell in a container


class Hotplug:
    """Attaches virtio-blk functions as they come; belongs to the event loop of its system.

    The kernel tells of them (uevents); where it does not, they are looked for every `period` seconds. Each
    is tried once: what fails, or is detached, is left alone until it is bound anew. Those that go are
    noticed by their controllers.
    """

    def __init__(self, system: System, period: float) -> None:
        self._system = system
        self._loop = asyncio.get_running_loop()
        self._tried: set[str] = set()
        self._attaching: set[asyncio.Task[None]] = set()
        self._uevents = _open_uevents()
        self._period = period
        if self._uevents is not None:
            self._period = max(period, _LOOK_S)
            self._loop.add_reader(self._uevents, self._told, self._uevents)
        self._timer = self._loop.call_soon(self._tick)

    def _told(self, uevents: socket.socket) -> None:
        new = False
        with contextlib.suppress(OSError):  # none is left, or there were too many: either way, look
            while True:
                new |= b"SUBSYSTEM=pci\0" in uevents.recv(_NBYTES)
        if new:
            self._look()

    def _tick(self) -> None:
        self._look()
        self._timer = self._loop.call_later(self._period, self._tick)

    def _look(self) -> None:
        found = {
            f"pci:{each.address}": each for each in sysfs.functions() if each.driver in sysfs.USER_DRIVERS
        }
        self._tried &= found.keys()
        held = {held.spec.address for _, held in self._system.controllers()}
        for address, function in found.items():
            if function.kind == "blk" and address not in self._tried:
                self._tried.add(address)
                if address not in held:
                    task = self._loop.create_task(self._attach(address))
                    self._attaching.add(task)
                    task.add_done_callback(self._attaching.discard)

    async def _attach(self, address: str) -> None:
        try:
            names = await self._system.attach(BdevSpec(address=address))
            log.info("%s has come: %s", address, ", ".join(names))
        except VirtioError as error:
            log.warning("%s has come, and cannot be attached: %s", address, error)

    async def close(self) -> None:
        """Look no more; waits for what is being attached."""
        self._timer.cancel()
        if self._uevents is not None:
            self._loop.remove_reader(self._uevents)
            self._uevents.close()
            self._uevents = None
        await asyncio.gather(*self._attaching, return_exceptions=True)


def _open_uevents() -> socket.socket | None:
    with contextlib.suppress(OSError):
        uevents = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _UEVENTS)
        try:
            uevents.setblocking(False)
            uevents.bind((0, _FROM_KERNEL))
        except OSError:
            uevents.close()
            raise
        return uevents
    return None
