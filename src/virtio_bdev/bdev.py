"""A named block device."""

from __future__ import annotations

import errno
import operator
import uuid
import weakref
from array import array
from typing import TYPE_CHECKING, Any, SupportsIndex

from virtio.errors import ReadOnlyError, RequestError, TransportError
from virtio.ring.submit import Budget, Geometry
from virtio_bdev.channel import Channel, Wait
from virtio_bdev.qos import RateLimits, Throttle
from virtio_bdev.stats import Account, IoStats

if TYPE_CHECKING:
    from virtio.device.disk import Disk, Limits
    from virtio.ring.lease import Lease
    from virtio.ring.stats import Stats
    from virtio_bdev.registry import Controller

_UUIDS = uuid.UUID("5b9d0d4e-6d0c-5b0a-9b60-0d6b1a8f2f11")  # of this library, for version 5


class Bdev:
    """One disk of a controller: what it is, and channels to it.

    `controller` has it under its `name`. `size` and `block_size` are in bytes; every offset and length is a
    multiple of `block_size`. The size may change, see `Controller.events`. `uuid` is made from the disk's
    own name where that is unique (NAA, EUI-64 or UUID), else from the controller's address and the disk's
    place there.
    """

    def __init__(self, controller: Controller, disk: Disk, name: str) -> None:
        self.name = name
        self.controller = controller
        self.geometry = Geometry()
        self.disk = disk
        self._budgets: weakref.WeakKeyDictionary[Lease, Budget] = weakref.WeakKeyDictionary()
        self._account = Account()
        self.throttle: Throttle | None = None  # where there are limits
        self._throttle = Throttle()
        self._limits = RateLimits()
        own = disk.identity if disk.unique else f"{controller.address} {disk.place}"
        self.uuid = str(uuid.uuid5(_UUIDS, own))
        self._removed = False

    @property
    def disk(self) -> Disk:
        """The disk as its device has described it last; for `Channel` to use."""
        return self._disk

    @disk.setter
    def disk(self, disk: Disk) -> None:
        self._disk, geometry = disk, self.geometry
        geometry.size, geometry.block_size = disk.size, disk.block_size
        geometry.max_transfer, geometry.read_only = disk.limits.max_transfer, disk.read_only
        geometry.read, geometry.write = disk.read, disk.write
        geometry.online = True

    def budget(self, lease: Lease) -> Budget:
        """What its channels on one queue share; for `Channel` to call."""
        return self._budgets.setdefault(lease, Budget(self.limits.depth))

    def counters(self, lease: Lease) -> Stats:
        """What counts the requests of its channels on one queue; for `Channel` to call."""
        return self._account.of(lease)

    @property
    def stats(self) -> IoStats:
        """What its requests came to, since it was attached or `reset_stats` was called.

        All that went through channels, loads of `bench` too.
        """
        return self._account.stats()

    @property
    def queue_stats(self) -> list[IoStats]:
        """The same for each queue that had a channel, in the order of their first channels."""
        return self._account.queues()

    @property
    def histogram(self) -> array[int] | None:
        """How many requests took how long, in the buckets of SPDK's histogram of ticks; None unless kept."""
        return self._account.histogram()

    def keep_stats(self, *, counts: bool = True, histogram: bool = False) -> None:
        """Whether requests are counted, as they are from the beginning, and a new histogram is kept."""
        self._account.keep(counts, histogram)

    @property
    def rate_limits(self) -> RateLimits:
        """What it may do a second, as `set_rate_limits` has said."""
        return self._limits

    def set_rate_limits(self, limits: RateLimits) -> None:
        """Limit the rate of its reads and writes, of all channels together, from the next call on.

        Calls that wait for a limit already go on by the new one within 0.1 s.
        Blocking calls and batches wait; `submit_*` returns False as it does where there is no room, and
        the completion descriptor tells when to try again. Other requests are not limited. RequestError
        for a negative limit.
        """
        limits.check()
        self._limits = limits
        self._throttle.change(limits)
        self.throttle = self._throttle if any(limits) else None
        self.geometry.limited = self.throttle is not None

    def reset_stats(self, *, counts: bool = True, extremes: bool = True, failures: bool = True) -> None:
        """Begin to count anew: requests, bytes and their time; the longest and shortest; failures.

        Requests that end at this moment may count as before or after.
        """
        self._account.reset(counts, extremes, failures)

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def block_size(self) -> int:
        return self.disk.block_size

    @property
    def blocks(self) -> int:
        return self.disk.size // self.disk.block_size

    @property
    def read_only(self) -> bool:
        return self.disk.read_only

    @property
    def limits(self) -> Limits:
        """What one request to the device may ask for; longer calls are split."""
        return self.disk.limits

    @property
    def state(self) -> str:
        """ "online"; "away" while its back end is connected to again; "lost" once the disk or its device has
        gone for good, or was closed."""
        device = self.controller.device
        if self._removed or device.life.error is not None:
            return "lost"
        return "online" if device.away is None else "away"

    def remove(self) -> None:
        """The disk is not there any more; for `Controller` to call."""
        self._removed = True
        self.geometry.online = False

    def check_online(self) -> None:
        """Raise TransportError(ENODEV) if the disk was removed, or what has ended its device."""
        self.controller.device.life.check()
        if self._removed:
            raise TransportError(errno.ENODEV, f"{self.name} was removed from {self.controller.address}")

    def open(self, *, wait: Wait = "adaptive", timeout: float | None = 30.0) -> Channel:
        """A channel on this thread's queue, or on a free one that becomes this thread's.

        `wait`: "adaptive" spins for a moment, then sleeps; "poll" spins; "event" sleeps. `timeout`
        bounds each call, in seconds; None for no bound. NoQueueError when all queues are taken by
        other threads.
        """
        return Channel(self, wait=wait, timeout=timeout)

    def reset(self) -> None:
        """Have the device drop what it is doing for this disk, and do it again: nothing is lost.

        Calls under way wait, and every request completes to its caller once. A logical unit is reset by
        task management; virtio-blk, and a device that does not know that, as a whole, which lets its
        other disks wait too. Blocks; any thread may call. TransportError if the device does not come back.
        """
        self.check_online()
        self.controller.device.reset(self.disk.place)

    def check(self, offset: int, nbytes: int, *, write: bool = False) -> None:
        """Raise RequestError unless this range could be read, or ReadOnlyError for a write."""
        if write and self.read_only:
            raise ReadOnlyError(f"{self.name} is read-only")
        try:
            odd = (offset | nbytes) & (self.block_size - 1)  # a float has no such operation either
        except TypeError:
            self.check(_whole("offset", offset), _whole("length", nbytes), write=write)
            return
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise RequestError(
                f"{nbytes} bytes at {offset} do not lie within the {self.size} bytes of {self.name}"
            )
        if odd:
            raise RequestError(
                f"{nbytes} bytes at {offset} are not on the {self.block_size}-byte grid of {self.name}"
            )

    def describe(self) -> dict[str, Any]:
        """The keys and values of SPDK's `bdev_get_bdevs`."""
        disk = self.disk
        able = {
            "read": True,
            "write": not disk.read_only,
            "unmap": disk.unmap is not None and not disk.read_only,
            "flush": True,
            "write_zeroes": not disk.read_only,
            "reset": True,
            "compare_and_write": bool(disk.limits.max_compare_and_write) and not disk.read_only,
        }
        return {
            "name": self.name,
            "aliases": [self.uuid],
            "product_name": disk.product,
            "block_size": disk.block_size,
            "num_blocks": self.blocks,
            "preferred_write_alignment": 0,
            "preferred_write_granularity": 0,
            "optimal_write_size": 0,
            "preferred_unmap_alignment": disk.limits.unmap_alignment // disk.block_size,
            "preferred_unmap_granularity": 0,
            "uuid": self.uuid,
            "assigned_rate_limits": self._limits._asdict(),
            "claimed": False,
            "zoned": False,
            "supported_io_types": {io_type: able.get(io_type, False) for io_type in _IO_TYPES},
            "driver_specific": {"virtio": self.controller.describe()},
        }

    def __repr__(self) -> str:
        queues = len(self.controller.device.leases)
        return (
            f"<Bdev {self.name} {human(self.size)}, {self.block_size} B blocks, {self.state}, "
            f"{queues} queue{'s' if queues != 1 else ''}>"
        )


_IO_TYPES = (
    "read",
    "write",
    "unmap",
    "flush",
    "reset",
    "nvme_admin",
    "nvme_io",
    "nvme_io_md",
    "write_zeroes",
    "zcopy",
    "get_zone_info",
    "zone_management",
    "zone_append",
    "compare",
    "compare_and_write",
    "abort",
    "seek_hole",
    "seek_data",
    "copy",
    "nvme_iov_md",
    "nvme_nssr",
    "write_uncorrectable",
)


def _whole(name: str, number: SupportsIndex) -> int:
    try:
        return operator.index(number)
    except TypeError:
        raise RequestError(f"{name} {number!r}, want a whole number") from None


def human(nbytes: int) -> str:
    """A size for people: "64 MiB", "1.5 GiB"."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = min(max(nbytes.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{nbytes / 1024**power:.4g} {units[power]}"
