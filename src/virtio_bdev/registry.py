"""Attaching controllers, and the names of what they hold."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

from virtio.device.base import Device, bring_up
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import NoQueueError, RequestError
from virtio.ring.buffer import Buffer
from virtio.ring.lease import Lease, deadline_in
from virtio.transport.vhost_user import VhostUser
from virtio_bdev.bdev import Bdev

DevType: TypeAlias = Literal["scsi", "blk"]

_DEVICES: dict[str, type[Device]] = {"blk": BlkDevice, "scsi": ScsiDevice}
_DEFAULT_NAMES = {"blk": "VirtioBlk", "scsi": "VirtioScsi"}


class _Names:
    """The controller names in use in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: set[str] = set()

    def take(self, name: str | None, prefix: str) -> str:
        with self._lock:
            if name is None:
                number = 0
                while f"{prefix}{number}" in self._taken:
                    number += 1
                name = f"{prefix}{number}"
            elif not name or name in self._taken:
                raise RequestError(f"the name {name!r} is empty or taken by another controller")
            self._taken.add(name)
            return name

    def give_back(self, name: str) -> None:
        with self._lock:
            self._taken.discard(name)


_names = _Names()


class Controller(Mapping[str, Bdev]):
    """An attached device: its disks by name, in the order of target and LUN.

    Owns the device; `close` takes it down, and a controller dropped without it warns. Threads may
    share it; channels are each thread's own.
    """

    def __init__(self, device: Device, name: str, deadline: int | None) -> None:
        self.name = name
        self.device = device
        self.address = device.transport.address
        self._lock = threading.Lock()
        self._leases: dict[int, tuple[Lease, int]] = {}  # by thread: lease and its channels
        self._free = list(reversed(device.leases))
        self._closed = True  # until it holds something
        disks = device.discover(deadline)
        self._bdevs = {name + disk.place: Bdev(self, disk, name + disk.place) for disk in disks}
        self._closed = False

    def buffer(self, nbytes: int) -> Buffer:
        """DMA memory that any channel of this controller moves data to and from without a copy.

        TransportError(ENOMEM) when the pool has no such piece left.
        """
        return self.device.pool.take(nbytes)

    def take_lease(self) -> Lease:
        """This thread's queue lease, for one more channel; for `Channel` to call."""
        self.device.life.check()
        thread = threading.get_ident()
        with self._lock:
            lease, channels = self._leases.get(thread, (None, 0))
            if lease is None:
                if not self._free:
                    raise NoQueueError(
                        f"{self.name} has {len(self.device.leases)} queues, and as many threads "
                        "have channels open: close some, or attach with more queues"
                    )
                lease = self._free.pop()
            self._leases[thread] = lease, channels + 1
            return lease

    def return_lease(self, lease: Lease) -> None:
        """One channel less on a lease; for `Channel` to call."""
        with self._lock:
            for thread, (held, channels) in self._leases.items():
                if held is lease:
                    if channels > 1:
                        self._leases[thread] = lease, channels - 1
                    else:
                        del self._leases[thread]
                        self._free.append(lease)
                    break

    def close(self) -> None:
        """Detach: calls under way raise ClosedError, the device is stopped; idempotent."""
        if not self._closed:
            self._closed = True
            try:
                self.device.close()
            finally:
                _names.give_back(self.name)

    def __getitem__(self, name: str) -> Bdev:
        return self._bdevs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bdevs)

    def __len__(self) -> int:
        return len(self._bdevs)

    def __bool__(self) -> bool:
        return True  # also without disks: it is open, and wants to be closed

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "attached"
        return f"<Controller {self.name} at {self.address}, {len(self)} disks, {state}>"


def attach(
    address: str,
    *,
    dev_type: DevType = "scsi",
    name: str | None = None,
    queues: int | None = None,
    at_least: int | None = None,
    queue_size: int | None = None,
    timeout: float = 5.0,
) -> Controller:
    """Attach a controller and find its disks.

    `address` is "user:PATH", a vhost-user socket. `name` is VirtioBlk0, VirtioScsi0 and so on
    unless given. `queues`: as many as the process has cores, up to what the device has, unless
    given; then exactly so many, or `at_least`, or NoQueueError. `queue_size`, a power of two, is
    256 unless given, 128 where that is refused. `timeout` in seconds bounds every wait.

    Raises TransportError, ProtocolError, RequestTimeout or RequestError, and leaves nothing behind
    then. Blocks; any thread may call.
    """
    if dev_type not in _DEVICES:
        raise RequestError(f"dev_type {dev_type!r}, want one of {', '.join(_DEVICES)}")
    kind, _, path = address.partition(":")
    if kind != "user" or not path or "\0" in path:
        raise RequestError(f"address {address!r}, want user:PATH, the path of a vhost-user socket")
    if queue_size is not None and (queue_size & (queue_size - 1) or not 1 < queue_size <= 32768):
        raise RequestError(f"queue_size {queue_size}, want a power of two from 2 to 32768")
    if queues is not None and queues < 1:
        raise RequestError(f"queues {queues}, want 1 or more")
    if not timeout > 0:
        raise RequestError(f"timeout {timeout}, want a number of seconds above 0")
    taken = _names.take(name, _DEFAULT_NAMES[dev_type])
    try:
        device = bring_up(
            lambda: VhostUser(path, timeout),
            _DEVICES[dev_type],
            queues=queues,
            at_least=at_least,
            queue_size=queue_size,
        )
        try:
            return Controller(device, taken, deadline_in(timeout))
        except BaseException:
            device.close()
            raise
    except BaseException:
        _names.give_back(taken)
        raise
