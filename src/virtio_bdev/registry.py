"""Attaching controllers, and the names of what they hold."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, cast, get_args

from virtio.device.base import MAX_TRANSFER, Device, bring_up, weakly
from virtio.device.blk import BlkDevice
from virtio.device.dialogue import execute
from virtio.device.disk import Disk
from virtio.device.probe import Reply as ScsiReply
from virtio.device.scsi import ScsiDevice
from virtio.errors import ClosedError, NoQueueError, RequestError, VirtioError
from virtio.ring.buffer import Buffer
from virtio.ring.lease import Lease, deadline_in
from virtio.transport import pci_host, sysfs
from virtio.transport.base import Transport
from virtio.transport.vhost_user import VhostUser
from virtio.wire.virtio import Feature
from virtio.wire.virtio_scsi import CDB_SIZE, encode_lun
from virtio_bdev.bdev import Bdev
from virtio_bdev.events import Added, Event, Events, Lost, Removed, Resized

log = logging.getLogger("virtio.bdev")

DevType: TypeAlias = Literal["scsi", "blk"]
Rings: TypeAlias = Literal["any", "split"]

_DEVICES: dict[str, type[Device]] = {"blk": BlkDevice, "scsi": ScsiDevice}
DEFAULT_NAMES = {"blk": "VirtioBlk", "scsi": "VirtioScsi"}


class _Names:
    """The controller names in use in this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collector may close a controller at any moment
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

    `name` and `address` are those of `attach`, `dev_type` is "scsi" or "blk".

    Owns the device; `close` takes it down, and a controller dropped without it warns. Threads may
    share it; channels are each thread's own.
    """

    def __init__(self, device: Device, name: str, deadline: int | None) -> None:
        self.name = name
        self.device = device
        self.address = device.transport.address
        self.dev_type: DevType = "scsi" if isinstance(device, ScsiDevice) else "blk"
        self._lock = threading.Lock()
        self._leases: dict[int, tuple[Lease, int]] = {}  # by thread: lease and its channels
        self._free = list(reversed(device.leases))
        self._returned: deque[Lease] = deque()  # a collector may return one at any moment
        self._zeros: dict[int, Buffer] = {}
        self._closed = True  # until it holds something
        self._streams: weakref.WeakSet[Events] = weakref.WeakSet()
        self._bdevs: dict[str, Bdev] = {}
        device.report = weakly(self._update)
        self._update(device.discover(deadline))
        device.life.on_end = weakly(self._lost)
        device.follow()
        self._closed = False

    def _update(self, disks: list[Disk]) -> None:
        """These are the disks now."""
        events: list[Event] = []
        with self._lock:
            before, bdevs = self._bdevs, {}
            for disk in disks:
                name = self.name + disk.place
                bdev = before.get(name)
                if bdev is not None and bdev.disk.identity == disk.identity:
                    size, bdev.disk = bdev.disk.size, disk
                    if size != disk.size:
                        events.append(Resized(bdev, size))
                else:
                    bdev = Bdev(self, disk, name)
                    events.append(Added(bdev))
                bdevs[name] = bdev
            removed = [bdev for name, bdev in before.items() if bdevs.get(name) is not bdev]
            for bdev in removed:
                bdev.remove()
            self._bdevs = bdevs
            for event in [*map(Removed, removed), *events]:
                self._tell(event)

    def _lost(self, error: VirtioError) -> None:
        with self._lock:
            if not isinstance(error, ClosedError):
                self._tell(Lost(error))
            for stream in list(self._streams):
                stream.end()

    def _tell(self, event: Event) -> None:
        log.debug("%s: %s", self.name, event)
        for stream in list(self._streams):
            stream.put(event)

    def events(self) -> Events:
        """What happens to the disks from now on: waits for each event, and ends with the controller."""
        stream = Events()
        with self._lock:
            self._streams.add(stream)
            if self.device.life.error is not None:
                stream.end()
        return stream

    def rescan(self) -> None:
        """Look for disks that came or went without an event; blocks, and tells `events`.

        RequestTimeout where the device takes longer than the time-out of `attach`. Does nothing
        for virtio-blk.
        """
        self.device.life.check()
        if isinstance(self.device, ScsiDevice):
            self.device.rescan()

    def scsi(
        self,
        target: int,
        lun: int,
        cdb: bytes,
        data: bytes = b"",
        *,
        nbytes: int = 0,
        timeout: float | None = 30.0,
    ) -> ScsiReply:
        """Send a SCSI command as it is to a unit, attached or not, and return the answer as it is.

        `cdb` has up to 32 bytes. `data` goes to the device, or at most `nbytes` come from it: up to
        1 MiB either way. On this thread's queue; whatever the command does to a disk that is in use
        is the caller's affair. RequestError for a controller that is not virtio-scsi, RequestTimeout
        after `timeout` seconds, when the command may still take effect, TransportError if the device was
        reset meanwhile, as nobody knows then whether it did.
        """
        device = self.device
        if not isinstance(device, ScsiDevice):
            raise RequestError(f"{self.name} is not a virtio-scsi controller: it takes no SCSI commands")
        if not 0 < len(cdb) <= CDB_SIZE:
            raise RequestError(f"a command of {len(cdb)} bytes, want 1 to {CDB_SIZE}")
        if (data and nbytes) or not 0 <= max(nbytes, len(data)) <= MAX_TRANSFER or nbytes < 0:
            raise RequestError(
                f"{len(data)} bytes to the device and {nbytes} from it: want one of them, up to "
                f"{MAX_TRANSFER}"
            )
        address = encode_lun(target, lun)
        lease = self.take_lease()
        try:
            with lease:
                return execute(lease, device.pool, address, cdb, bytes(data), nbytes, deadline_in(timeout))
        finally:
            self.return_lease(lease)

    def buffer(self, nbytes: int) -> Buffer:
        """DMA memory that any channel of this controller moves data to and from without a copy.

        TransportError(ENOMEM) when the pool has no such piece left.
        """
        self.device.life.check()
        return self.device.pool.take(nbytes)

    def zeros(self, nbytes: int) -> int:
        """Where in the pool so many zeros are, for as long as the controller lives; for `Channel` to call."""
        with self._lock:
            if nbytes not in self._zeros:
                self._zeros[nbytes] = self.device.pool.take(nbytes)
                self._zeros[nbytes].view()[:] = bytes(nbytes)
            return int(self._zeros[nbytes].offset)

    def describe(self) -> dict[str, object]:
        """The keys and values that SPDK has for a virtio controller."""
        device = self.device
        queues = {"vq_count": device.FIXED_QUEUES + len(device.leases), "vq_size": device.queue_size}
        kind, _, place = self.address.partition(":")
        if kind == "user":
            return {**queues, "type": "user", "socket": place}
        interface = "legacy" if device.transport.legacy else "modern"
        return {**queues, "type": f"pci-{interface}", "pci_address": place}

    def take_lease(self) -> Lease:
        """This thread's queue lease, for one more channel; for `Channel` to call."""
        self.device.life.check()
        thread = threading.get_ident()
        with self._lock:
            self._merge()
            lease, channels = self._leases.get(thread, (None, 0))
            if lease is None:
                if not self._free:
                    raise self._no_queue()
                lease = self._free.pop()
            self._leases[thread] = lease, channels + 1
            return lease

    def _no_queue(self) -> NoQueueError:
        queues, most = len(self.device.leases), self.device.available
        words = f"{self.name} has {queues} queue{'s' * (queues > 1)}, each with channels of another thread"
        if most > queues:
            more = f"attach with up to {most} (queues={most}, --queues {most})"
            return NoQueueError(f"{words}: close some, or {more}")
        return NoQueueError(f"{words}: close some, as its device has no more queues")

    def return_lease(self, lease: Lease) -> None:
        """One channel less on a lease; for `Channel` to call, also amid a garbage collection."""
        self._returned.append(lease)

    def _merge(self) -> None:
        """Take note of what was returned; for who holds the lock."""
        while self._returned:
            lease = self._returned.popleft()
            for thread, (held, channels) in self._leases.items():
                if held is lease:
                    if channels > 1:
                        self._leases[thread] = lease, channels - 1
                    else:
                        del self._leases[thread]
                        self._free.append(lease)
                    break

    def close(self, timeout: float | None = None) -> None:
        """Detach: calls under way raise ClosedError, the device is stopped; idempotent.

        One that does not stop within its time-out, or so many seconds if these are less, is left as it is.
        """
        if not self._closed:
            self._closed = True
            if timeout is not None:
                self.device.transport.timeout = min(timeout, self.device.transport.timeout)
            try:
                self.device.close()
            finally:
                self._zeros.clear()
                _names.give_back(self.name)

    def __getitem__(self, name: str) -> Bdev:
        try:
            return self._bdevs[name]
        except KeyError:
            names = ", ".join(self) or "none"
            raise KeyError(f"{self.name} has no disk {name!r}; it has: {names}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._bdevs))

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


def kind_of(address: str, dev_type: DevType | None = None) -> DevType:
    """What is, or is to be, at an address; RequestError if it is none or something else is there,
    TransportError if nothing is."""
    kind, _, place = address.partition(":")
    if kind == "user" and place and "\0" not in place:
        return dev_type or "scsi"
    if kind != "pci" or not sysfs.ADDRESS.fullmatch(place):
        raise RequestError(
            f"address {address!r}, want user:PATH, the path of a vhost-user socket, or pci:0000:00:04.0, a "
            "PCI address"
        )
    function = sysfs.find(place)
    if dev_type not in (None, function.kind):
        raise RequestError(f"dev_type {dev_type!r}, but {address} is virtio-{function.kind}")
    return cast(DevType, function.kind)


def _connect(address: str, timeout: float, rings: Rings) -> Transport:
    kind, _, place = address.partition(":")
    transport: Transport
    if kind == "user":
        transport = VhostUser(place, timeout)
    else:
        transport = pci_host.connect(sysfs.find(place), timeout)
    if rings == "split":
        transport.allowed &= ~int(Feature.RING_PACKED)
    return transport


def attach(
    address: str,
    *,
    dev_type: DevType | None = None,
    name: str | None = None,
    queues: int | None = None,
    at_least: int | None = None,
    queue_size: int | None = None,
    depth: int | None = None,
    timeout: float = 5.0,
    reconnect: float = 0.0,
    rings: Rings = "any",
) -> Controller:
    """Attach a controller and find its disks.

    `address` is "user:PATH", a vhost-user socket, which is one of a SCSI controller unless `dev_type`
    says otherwise; or "pci:0000:00:04.0", a PCI device of this machine, bound to vfio-pci or
    uio_pci_generic, which knows its type. `name` is VirtioBlk0, VirtioScsi0 and so on
    unless given. `queues`: as many as the process has cores, up to what the device has, unless
    given; then exactly so many, or `at_least`, or NoQueueError. `queue_size`, a power of two, is
    256 unless given, 128 where that is refused; or no larger than it takes for `depth` requests of up to
    64 KiB at once, which are faster the fewer cache lines their ring has: at a depth of up to 3 on
    virtio-blk one goes to the device with a request, and one comes back. `timeout` in seconds bounds every
    wait.

    Packed rings are used where they are offered, unless `rings` is "split": for a back end that does
    not do them right.

    A back end that ends is lost, unless `reconnect` says for how many seconds to try to
    connect again: to the same disks. What was under way is sent again then, and its callers only wait
    longer, up to their own time-outs; commands of your own fail, as nobody knows what became of them.

    Raises TransportError, ProtocolError, RequestTimeout or RequestError, and leaves nothing behind
    then. Blocks; any thread may call.
    """
    if dev_type is not None and dev_type not in _DEVICES:
        raise RequestError(f"dev_type {dev_type!r}, want one of {', '.join(_DEVICES)}")
    if queue_size is not None and (queue_size & (queue_size - 1) or not 1 < queue_size <= 32768):
        raise RequestError(f"queue_size {queue_size}, want a power of two from 2 to 32768")
    if depth is not None and depth < 1:
        raise RequestError(f"depth {depth}, want 1 or more")
    if queues is not None and queues < 1:
        raise RequestError(f"queues {queues}, want 1 or more")
    if not timeout > 0:
        raise RequestError(f"timeout {timeout}, want a number of seconds above 0")
    if not reconnect >= 0:
        raise RequestError(f"reconnect {reconnect}, want a number of seconds, 0 for not at all")
    if reconnect and not address.startswith("user:"):
        raise RequestError(f"reconnect {reconnect:g}: only a socket can be connected to again, not {address}")
    if rings not in get_args(Rings):
        raise RequestError(f"rings {rings!r}, want one of {', '.join(get_args(Rings))}")
    kind = kind_of(address, dev_type)
    taken = _names.take(name, DEFAULT_NAMES[kind])
    try:
        device = bring_up(
            lambda: _connect(address, timeout, rings),
            _DEVICES[kind],
            queues=queues,
            at_least=at_least,
            queue_size=queue_size,
            depth=depth,
        )
        try:
            controller = Controller(device, taken, deadline_in(timeout))
            device.reconnect = reconnect
            return controller
        except BaseException:
            device.close()
            raise
    except BaseException:
        _names.give_back(taken)
        raise
