"""A virtio device brought up: features agreed, memory shared, queues running."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from virtio.errors import (
    ClosedError,
    NoQueueError,
    ProtocolError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.ring.buffer import Buffer, address_of
from virtio.ring.format import LEGACY, PACKED, SPLIT, RingFormat
from virtio.ring.layout import ONE_PAGE, Layout, most_segments, queue_bytes
from virtio.ring.lease import Lease, deadline_in
from virtio.ring.region import Pool, Region
from virtio.ring.requests import RequestQueue
from virtio.transport.base import Link, QueuePort, RingAreas, Transport, negotiate
from virtio.wire.virtio import Feature

from .chores import Chores
from .disk import Disk

log = logging.getLogger("virtio.device")

QUEUE_SIZE = 256
SMALL_QUEUE_SIZE = 128  # where the usual size is refused
POOL_BYTES = 64 << 20  # what is not touched costs nothing; SPDK's target fails with small regions
SMALL_BYTES = 64 << 10  # a request that fits in a queue which a `depth` has made small
MAX_TRANSFER = 1 << 20  # bytes a request: more gains nothing and makes buffers scarce
_RECONNECT_S = 0.05  # between two attempts to connect
_CLOSE_S = 10.0  # how long closing waits for somebody who is starting the device again
_LOOK_S = 0.001  # between two looks at rings that are to become idle
_MAX_RINGS = 256  # that vhost-user has numbers for
_DIRECT_TRANSFER = 64 << 10  # the same where each segment costs a descriptor of the ring


class QueueSetupError(TransportError):
    """The device refused a queue, or went away while queues were set up."""


class Device(ABC):
    """Owns its transport, its memory and its queues; use as a context manager.

    A subclass reads its configuration in `_configure`, which sets the attributes declared here.
    `report`, if set, is called with all disks that there are, in the thread of the chores, whenever
    they have changed since `discover`. `leases` are the queues of callers; `spare` is one that only
    the driver itself uses, where there is one more than was wanted. `reconnect` is for how many seconds
    a connection that has ended is tried again, before the device is lost.
    """

    FEATURES: type[enum.IntFlag]
    WANTED: int
    LAYOUT: Layout
    FIXED_QUEUES = 0  # queues before the request queues

    num_queues: int  # request queues that the device has
    segments: int  # data segments of one request
    segments_offered: int  # as many as the device takes
    segment_bytes: int  # bytes of one segment

    def __init__(
        self,
        transport: Transport,
        *,
        queues: int | None = None,
        at_least: int | None = None,
        queue_size: int = QUEUE_SIZE,
        depth: int | None = None,
        pool_bytes: int = POOL_BYTES,
    ) -> None:
        """Bring the device up. On any error everything is closed, the transport included.

        `queues` request queues, or as many as the process has cores; NoQueueError if the device
        has fewer than that and than `at_least`. With a `depth`, a queue is no larger than it takes for so
        many requests of SMALL_BYTES.
        """
        self.transport = transport
        self.life = transport.life
        self.queue_size = queue_size
        self.leases: list[Lease] = []
        self.spare: Lease | None = None
        self.report: Callable[[list[Disk]], None] = lambda disks: None
        self.chores = Chores(transport.address)
        self._reconnections = Chores(transport.address)  # not behind those that wait for the device
        self._leases: list[Lease] = []  # of all request queues, whoever has them
        self._region: Region | None = None
        self._queues: list[RequestQueue] = []
        self._rings: list[tuple[int, int, Buffer]] = []  # of each: index, size, memory
        self._page = ONE_PAGE  # bytes that the device has in one piece; of memory that is mapped
        self.reconnect = 0.0
        self._link = transport if isinstance(transport, Link) else None
        self._restarting = threading.RLock()  # a collector may close us amid it
        try:
            self.features = negotiate(transport, self.FEATURES, self.WANTED, 0)
            self.queue_size = self._fitting(self.FIXED_QUEUES)
            self._configure()
            count = self._count(queues, at_least)
            self._region = transport.region(pool_bytes)
            self._mapping = transport.map(self._region)
            self._page = 1 << self._mapping.shift
            self.pool = Pool(self._region, self._page)
            if depth is not None and self.indirect and not transport.legacy:
                self.queue_size = min(self.queue_size, self._enough(depth))
            self._limit_segments(self.segments_offered, self.segment_bytes)
            try:
                for index in range(self.FIXED_QUEUES):
                    self._set_up_fixed(index)
                for _ in range(count):
                    self.leases.append(self._set_up_requests(self.FIXED_QUEUES + len(self.leases)))
                if self._wants_spare(count):
                    self.spare = self._set_up_requests(self.FIXED_QUEUES + count)
                transport.start()
            except (TransportError, ProtocolError) as error:
                code = getattr(error, "errno", None) or errno.EIO
                words = getattr(error, "strerror", None) or str(error)
                raise QueueSetupError(code, f"{words}, with a queue size of {self.queue_size}") from error
            if self._link is not None:
                self._link.on_gone = weakly(self._gone)
                if self.away is not None:
                    raise self.away
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _configure(self) -> None:
        """Read the configuration space; sets `num_queues`, `segments` and `segment_bytes`."""

    @abstractmethod
    def discover(self, deadline: int | None) -> list[Disk]:
        """The disks of this device, by requests to it; blocks until `deadline`."""

    def follow(self) -> None:
        """After `discover`: from now on `report` tells of changes."""
        self.chores.begin()
        self._reconnections.begin()

    @property
    def indirect(self) -> bool:
        """Whether requests use a table of descriptors, one head each."""
        return bool(self.features & Feature.INDIRECT_DESC)

    @property
    def available(self) -> int:
        """How many request queues there are to be had."""
        available = self.num_queues
        if self.transport.max_queues is not None:
            available = min(available, self.transport.max_queues - self.FIXED_QUEUES)
        return max(0, min(available, _MAX_RINGS - self.FIXED_QUEUES))

    def depth_on(self, queues: int) -> int:
        """How many requests of one disk there may be in each of so many queues of the callers'."""
        return self.queue_size

    def _count(self, queues: int | None, at_least: int | None) -> int:
        available = self.available
        if not available:
            raise NoQueueError(f"{self.transport.address} has no request queue")
        wanted = min(available, len(os.sched_getaffinity(0))) if queues is None else queues
        least = wanted if at_least is None else min(at_least, wanted)
        if available < least:
            raise NoQueueError(
                f"{self.transport.address} has {available} request queue{'s' * (available > 1)}; {least} are "
                f"wanted: ask for {available} (queues={available}, --queues {available}), or for at least "
                f"{available} (at_least={available}, --at-least {available})"
            )
        return min(wanted, available)

    def _wants_spare(self, count: int) -> bool:
        """Whether there is a queue that would serve the driver itself, beside the `count` of callers."""
        return False

    def _limit_segments(self, segments: int, segment_bytes: int) -> None:
        """Set what one request may hold, within the device's limits and the queue's."""
        self.segments_offered = segments
        enough = MAX_TRANSFER if self.indirect else _DIRECT_TRANSFER
        self.segment_bytes = min(segment_bytes, MAX_TRANSFER)
        useful = -(-enough // self.segment_bytes)
        if self._page != ONE_PAGE:
            useful += -(-enough // self._page)  # one more wherever the data goes on in another page
            if self.indirect:
                segments = min(segments, most_segments(self.LAYOUT, self._page))
        self.segments = max(1, min(segments, useful, self.queue_size - 2))

    def _enough(self, depth: int) -> int:
        """The least size of a queue for so many requests of SMALL_BYTES, each with a table (2.7.5.3.1)."""
        pieces = -(-SMALL_BYTES // min(self.segment_bytes, self._page)) + (self._page != ONE_PAGE)
        return 1 << (max(depth, 2 + pieces) - 1).bit_length()

    @property
    def most_bytes(self) -> int:
        """How many bytes of data fit in a request wherever they are in the memory."""
        piece = min(self.segment_bytes, self._page)
        if self._page == ONE_PAGE:
            return self.segments * piece
        if self.segments == 1:
            return min(piece, 4096)  # if they are aligned, too
        if piece == self._page:
            return max(1, self.segments - 1) * piece  # they may begin and end amid a page
        fitting = (n for n in range(self.segments, 1, -1) if n + -(-n * piece // self._page) <= self.segments)
        return next(fitting, 1) * piece

    def _set_up_fixed(self, index: int) -> None:
        """Set up one of the queues before the request queues."""
        raise NotImplementedError

    def _set_up_requests(self, index: int) -> Lease:
        """Set up a request queue."""
        return self._request_queue(index, self.LAYOUT, self.segments, self.segment_bytes)

    def _request_queue(self, index: int, layout: Layout, segments: int, segment_bytes: int) -> Lease:
        assert self._region is not None
        size = self._fitting(index)
        memory = self.pool.take(
            queue_bytes(size, layout, segments, self.indirect, form=self._form, page=self._page)
        )
        queue = RequestQueue(
            memory,
            self._region.view,
            self._mapping,
            size,
            layout,
            segments=segments,
            segment_bytes=segment_bytes,
            indirect=self.indirect,
            event_idx=self._event_idx,
            number=index,
            form=self._form,
        )
        self._queues.append(queue)
        port = self._connect(index, size, memory)
        queue.connect(port.doorbell)
        lease = Lease(queue, self.life, port.completion_fd)
        self._leases.append(lease)
        return lease

    def _connect(self, index: int, size: int, memory: Buffer) -> QueuePort:
        """Show the device a ring, which is at the beginning of `memory`."""
        assert self._region is not None
        if all(index != known for known, _, _ in self._rings):
            self._rings.append((index, size, memory))
        driver, device, _ = self._form.areas(size)
        at = memory.offset
        areas = RingAreas(self._region, size, at, at + driver, at + device, self._form)
        return self.transport.setup_queue(index, areas, 0)

    @property
    def _form(self) -> RingFormat:
        if self.transport.legacy:
            return LEGACY
        return PACKED if self.features & Feature.RING_PACKED else SPLIT

    @property
    def _event_idx(self) -> bool:
        return bool(self.features & Feature.EVENT_IDX)

    def _fitting(self, index: int) -> int:
        """The size of a queue: what was asked for, unless the device takes less, or that size alone."""
        largest = self.transport.largest_queue(index)
        if largest == 0:
            raise TransportError(errno.ENODEV, f"{self.transport.address} has no queue {index}")
        if largest is None:
            return self.queue_size
        return largest if self.transport.legacy else min(self.queue_size, largest)

    # Starting again.

    def restart(self) -> None:
        """Reset the device, and send it again what it had: each request completes to its caller once.

        Calls under way wait meanwhile; what was orphaned is done with. Where no reset is to be had, the
        connection is made anew. Blocks; any thread may call. If it fails, the device is lost, and the
        error says so to everybody.
        """
        with self._starting("was reset, and does not come back"):
            with self._paused():
                try:
                    if not self.transport.resets:
                        self._drain()
                    self.transport.renew()
                    self._begin_again()
                    return
                except VirtioError as error:
                    if self._link is None:
                        raise
                    log.warning("%s: connecting again, as no reset helps: %s", self.life.name, error)
                self._part(self._link)
            self._meet_again(self._link)

    @contextlib.contextmanager
    def _starting(self, plight: str) -> Iterator[None]:
        """One at a time; what goes wrong ends the device."""
        with self.steady():
            try:
                yield
            except VirtioError as error:
                words = f"{self.transport.address} {plight}: {error}"
                self.life.end(TransportError(getattr(error, "errno", None) or errno.EIO, words))
                self.life.check()

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Keep the device from being started again meanwhile; for who speaks with its transport."""
        try:
            with self._restarting:
                self.life.check()
                yield
        finally:
            if self.away is not None:  # it left meanwhile, and nobody has seen to it
                self._gone(self.away)

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Have all queues to oneself, whatever calls are under way."""
        deadline = deadline_in(2 * self.transport.timeout)
        with contextlib.ExitStack() as paused:
            for lease in self._leases:
                lease.pause(deadline)
                paused.callback(lease.resume)
            yield

    def _drain(self) -> None:
        """Wait for what a device has that cannot be made to forget it: it may use our memory later."""
        end = time.monotonic() + self.transport.timeout
        while busy := sum(not queue.ring.idle() for queue in self._queues):
            self.life.check()
            if self.away is not None:
                raise self.away
            if time.monotonic() >= end:
                raise RequestTimeout(
                    f"it has not returned the requests of {busy} queues in {self.transport.timeout:g} s, and "
                    "has no reset that would make it forget them"
                )
            time.sleep(_LOOK_S)

    def _begin_again(self, *, mapped: bool = True) -> None:
        """Bring the device up as new, with what the slots say was under way; for who has paused it."""
        assert self._region is not None
        if negotiate(self.transport, self.FEATURES, self.WANTED, 0) != self.features:
            raise ProtocolError(f"{self.transport.address} offers other features than before")
        if not mapped and self.transport.map(self._region) != self._mapping:
            raise ProtocolError(f"{self.transport.address} has the memory elsewhere than before")
        self._rewind()
        for index, size, memory in self._rings:
            self._connect(index, size, memory)
        self.transport.start()
        for queue in self._queues:
            queue.kick()

    def _rewind(self) -> None:
        """Put all rings back to their beginning, and what was under way into them."""
        for queue in self._queues:
            queue.rewind()

    # Connecting again.

    @property
    def away(self) -> VirtioError | None:
        """Why the other side is not there, or None if it is; `reconnect` says how long it may be away."""
        return None if self._link is None else self._link.gone

    def _gone(self, error: VirtioError) -> None:
        """The other side has left; called in the control thread."""
        if self._restarting.acquire(blocking=False):  # else whoever has it sees to it
            self._restarting.release()
            if self.reconnect > 0 and self.life.error is None:
                self._reconnections.add("reconnect", self._reconnect)
            else:
                self.life.end(error)

    def _reconnect(self) -> None:
        if self._link is None or self.away is None:
            return
        log.warning("%s; trying to connect again for %g s", self.away, self.reconnect)
        with self._starting("has gone, and does not come back"):
            with self._paused():
                self._part(self._link)
            self._meet_again(self._link)

    def _part(self, link: Link) -> None:
        """Take our memory from a device that may still have it; what it was asked waits in our rings."""
        assert self._region is not None
        link.hang_up()
        self._region.renew()
        self._rewind()

    def _meet_again(self, link: Link) -> None:
        """Connect, and begin again; at least one attempt, and more of them for `reconnect` seconds."""
        end = time.monotonic() + self.reconnect
        while True:
            try:
                link.reconnect()
                with self._paused():
                    self._begin_again(mapped=False)
                break
            except VirtioError:
                link.hang_up()
                self.life.check()
                if time.monotonic() >= end:
                    raise
            self.life.wait(_RECONNECT_S)
        log.info("%s is connected again", self.life.name)
        self.revalidate()

    @abstractmethod
    def revalidate(self) -> None:
        """Look soon whether the disks are what they were."""

    def reset(self, place: str) -> None:
        """Have the device forget what it is doing for one disk; all of it if need be."""
        self.restart()

    def locate(self, view: memoryview) -> int:
        """Where in the region a view's bytes lie, or -1 if they lie elsewhere."""
        assert self._region is not None
        if view.readonly or not view.nbytes:
            return -1
        place = address_of(view) - self._region.address
        return place if 0 <= place <= self._region.size - view.nbytes else -1

    def close(self) -> None:
        """Take the device down: callers are told, rings stopped, memory let go; idempotent."""
        self.life.end(ClosedError(f"the controller of {self.transport.address} was closed"))
        self.transport.on_config_change = lambda: None
        self._reconnections.close()
        self.chores.close()
        mine = self.chores.mine and self._restarting.acquire(timeout=_CLOSE_S)
        with contextlib.ExitStack() as steps:  # whatever fails, the others are taken; the last one first
            if self._region is not None:
                steps.callback(self._region.close)
            for lease in self._leases:
                steps.callback(lease.forget)
            for queue in self._queues:
                steps.callback(queue.detach)
            self._rings.clear()
            steps.callback(self.transport.close)
            for lease in self._leases:
                steps.callback(lease.retire)
        if mine:
            self._restarting.release()

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


P = ParamSpec("P")
D = TypeVar("D", bound=Device)


def weakly(method: Callable[P, object]) -> Callable[P, None]:
    """A bound method for others to call, which does not keep its object alive, and then does nothing."""
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        living = reference()
        if living is not None:
            living(*args, **kwargs)

    return call


def bring_up(
    connect: Callable[[], Transport],
    device: type[D],
    *,
    queues: int | None = None,
    at_least: int | None = None,
    queue_size: int | None = None,
    depth: int | None = None,
) -> D:
    """A device of that kind behind a new connection; one more try with a usual size of queues if refused.

    Back ends differ in the sizes that they take, and vhost-user does not let them say so.
    """
    if queue_size is not None:
        return device(connect(), queues=queues, at_least=at_least, queue_size=queue_size)
    try:
        return device(connect(), queues=queues, at_least=at_least, depth=depth)
    except QueueSetupError as refused:
        with contextlib.suppress(TransportError, ProtocolError, RequestTimeout):
            return device(connect(), queues=queues, at_least=at_least, queue_size=SMALL_QUEUE_SIZE)
        raise refused
