"""A virtio device brought up: features agreed, memory shared, queues running."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from virtio.errors import ClosedError, NoQueueError, ProtocolError, RequestTimeout, TransportError
from virtio.ring import split
from virtio.ring.buffer import address_of
from virtio.ring.lease import Lease
from virtio.ring.region import Pool, Region
from virtio.ring.requests import Layout, RequestQueue, queue_bytes
from virtio.transport.base import RingAreas, Transport, negotiate
from virtio.wire.virtio import Feature

from .disk import Disk

DEVICE_BITS = 0xFFFFFF  # feature bits whose meaning the device type decides (6)
QUEUE_SIZE = 256
SMALL_QUEUE_SIZE = 128  # where the usual size is refused
POOL_BYTES = 64 << 20  # what is not touched costs nothing; SPDK's target fails with small regions
MAX_TRANSFER = 1 << 20  # bytes a request: more gains nothing and makes buffers scarce
_MAX_RINGS = 256  # that vhost-user has numbers for
_DIRECT_TRANSFER = 64 << 10  # the same where each segment costs a descriptor of the ring


class QueueSetupError(TransportError):
    """The device refused a queue, or went away while queues were set up."""


class Device(ABC):
    """Owns its transport, its memory and its queues; use as a context manager.

    A subclass reads its configuration in `_configure`, which sets the attributes declared here.
    """

    FEATURES: type[enum.IntFlag]
    WANTED: int
    LAYOUT: Layout
    FIXED_QUEUES = 0  # queues before the request queues

    num_queues: int  # request queues that the device has
    segments: int  # data segments of one request
    segment_bytes: int  # bytes of one segment

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int | None = None,
        at_least: int | None = None,
        queue_size: int = QUEUE_SIZE,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        """Bring the device up. On any error everything is closed, the transport included.

        `queues` request queues, or as many as the process has cores; NoQueueError if the device
        has fewer than that and than `at_least`.
        """
        self.transport = transport
        self.life = transport.life
        self.queue_size = queue_size
        self.leases: list[Lease] = []
        self._region: Region | None = None
        self._queues: list[RequestQueue] = []
        try:
            self.features = negotiate(transport, self.FEATURES, self.WANTED, 0)
            self.queue_size = self._fitting(self.FIXED_QUEUES)
            self._configure()
            count = self._count(queues, at_least)
            self._region = transport.region(pool_bytes)
            self.pool = Pool(self._region)
            self._mapping = transport.map(self._region)
            try:
                self._set_up_queues(count)
                transport.start()
            except (TransportError, ProtocolError) as error:
                code = getattr(error, "errno", None) or errno.EIO
                words = getattr(error, "strerror", None) or str(error)
                raise QueueSetupError(code, f"{words}, with a queue size of {self.queue_size}") from error
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _configure(self) -> None:
        """Read the configuration space; sets `num_queues`, `segments` and `segment_bytes`."""

    @abstractmethod
    def discover(self, deadline: int | None) -> list[Disk]:
        """The disks of this device, by requests on its first queue; blocks until `deadline`."""

    @property
    def indirect(self) -> bool:
        """Whether requests use a table of descriptors, one head each."""
        return bool(self.features & Feature.INDIRECT_DESC)

    def _count(self, queues: int | None, at_least: int | None) -> int:
        available = self.num_queues
        if self.transport.max_queues is not None:
            available = min(available, self.transport.max_queues - self.FIXED_QUEUES)
        available = min(available, _MAX_RINGS - self.FIXED_QUEUES)
        wanted = min(available, len(os.sched_getaffinity(0))) if queues is None else queues
        least = wanted if at_least is None else min(at_least, wanted)
        if available < max(1, least):
            raise NoQueueError(
                f"{self.transport.address} has {max(0, available)} request queues, {least} are wanted"
            )
        return min(wanted, available)

    def _limit_segments(self, segments: int, segment_bytes: int) -> None:
        """Set what one request may hold, within the device's limits and the queue's."""
        enough = MAX_TRANSFER if self.indirect else _DIRECT_TRANSFER
        self.segment_bytes = min(segment_bytes, MAX_TRANSFER)
        useful = -(-enough // self.segment_bytes)
        self.segments = max(1, min(segments, useful, self.queue_size - 2))

    def _set_up_queues(self, count: int) -> None:
        event_idx = bool(self.features & Feature.EVENT_IDX)
        for index in range(self.FIXED_QUEUES):
            size = self._fitting(index)
            memory = self.pool.take(split.areas(size)[2])
            split.SplitRing(memory.view(), size, event_idx=event_idx)
            self.transport.setup_queue(index, self._areas(size, memory.offset), 0)
        for index in range(self.FIXED_QUEUES, self.FIXED_QUEUES + count):
            assert self._region is not None
            size = self._fitting(index)
            memory = self.pool.take(queue_bytes(size, self.LAYOUT, self.segments, self.indirect))
            queue = RequestQueue(
                memory,
                self._region.view,
                self._mapping,
                size,
                self.LAYOUT,
                segments=self.segments,
                segment_bytes=self.segment_bytes,
                indirect=self.indirect,
                event_idx=event_idx,
            )
            self._queues.append(queue)
            port = self.transport.setup_queue(index, self._areas(size, memory.offset), 0)
            queue.connect(port.doorbell)
            self.leases.append(Lease(queue, self.life, port.completion_fd))

    def _fitting(self, index: int) -> int:
        """The size of a queue: what was asked for, unless the device takes less."""
        largest = self.transport.largest_queue(index)
        if largest == 0:
            raise TransportError(errno.ENODEV, f"{self.transport.address} has no queue {index}")
        return self.queue_size if largest is None else min(self.queue_size, largest)

    def _areas(self, size: int, offset: int) -> RingAreas:
        assert self._region is not None
        available, used, _ = split.areas(size)
        return RingAreas(self._region, size, offset, offset + available, offset + used)

    def locate(self, view: memoryview) -> int:
        """Where in the region a view's bytes lie, or -1 if they lie elsewhere."""
        assert self._region is not None
        if view.readonly:
            return -1
        place = address_of(view) - self._region.address
        return place if 0 <= place <= self._region.size - view.nbytes else -1

    def close(self) -> None:
        """Take the device down: callers are told, rings stopped, memory let go; idempotent."""
        self.life.end(ClosedError(f"the controller of {self.transport.address} was closed"))
        with contextlib.ExitStack() as steps:  # whatever fails, the others are taken; the last one first
            if self._region is not None:
                steps.callback(self._region.close)
            for lease in self.leases:
                steps.callback(lease.forget)
            for queue in self._queues:
                steps.callback(queue.detach)
            steps.callback(self.transport.close)
            for lease in self.leases:
                steps.callback(lease.retire)

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


D = TypeVar("D", bound=Device)


def bring_up(
    connect: Callable[[], Transport],
    device: type[D],
    *,
    queues: int | None = None,
    at_least: int | None = None,
    queue_size: int | None = None,
) -> D:
    """A device of that kind behind a new connection; one more try with small queues if refused.

    Back ends differ in the largest queue they take, and vhost-user does not let them say so.
    """
    if queue_size is not None:
        return device(connect(), queues=queues, at_least=at_least, queue_size=queue_size)
    try:
        return device(connect(), queues=queues, at_least=at_least)
    except QueueSetupError as refused:
        with contextlib.suppress(TransportError, ProtocolError, RequestTimeout):
            return device(connect(), queues=queues, at_least=at_least, queue_size=SMALL_QUEUE_SIZE)
        raise refused
