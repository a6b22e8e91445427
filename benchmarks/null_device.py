"""A virtio-blk device that answers at once, in the driver's own thread: what is left is the driver.

It is a transport like any other, so all above it is as it always is. Its device's half is a few NumPy
operations at each kick, and it knows how long they took.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from virtio.device.blk import BlkDevice
from virtio.ring.doorbell import Doorbell
from virtio.ring.lease import Life
from virtio.ring.region import Mapping, Region
from virtio.transport.base import QueuePort, RingAreas
from virtio.wire.blk import BlkFeature
from virtio.wire.virtio import ConfigField, Feature, Status
from virtio_bdev import Channel, Controller

LAYOUTS = {
    "split, indirect": Feature.INDIRECT_DESC,
    "split, direct": Feature(0),
    "packed, indirect": Feature.RING_PACKED | Feature.INDIRECT_DESC,
    "packed, direct": Feature.RING_PACKED,
}
BLOCKS = 1 << 21  # a disk of 1 GiB

_AVAIL, _USED = 1 << 7, 1 << 15


class NullTransport:
    """Owns one region; `device_ns` is how long the device's half has taken since it was set to 0."""

    address = "null:0"
    required = int(Feature.VERSION_1)
    allowed = (1 << 64) - 1
    max_queues: int | None = None
    resets = True
    has_config = True
    legacy = False
    timeout = 5.0

    def __init__(self, features: Feature) -> None:
        self.life = Life(self.address)
        self.on_config_change = lambda: None
        self.device_ns = 0
        self._features = int(features | Feature.VERSION_1 | BlkFeature.SEG_MAX)
        self._status = Status(0)
        self._fds: list[int] = []

    def reset(self) -> None: ...

    def status(self) -> Status:
        return self._status

    def set_status(self, status: Status) -> None:
        self._status = status

    def offered(self) -> int:
        return self._features

    def accept(self, features: int) -> None: ...

    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        return struct.pack("<QII", BLOCKS, 0, 1).ljust(nbytes, b"\0")

    def largest_queue(self, index: int) -> int | None:
        return None

    def region(self, nbytes: int) -> Region:
        return Region(nbytes)

    def map(self, region: Region) -> Mapping:
        return Mapping.contiguous(0)

    def setup_queue(self, index: int, areas: RingAreas, base: int) -> QueuePort:
        kind = _PackedQueue if areas.form.packed else _SplitQueue
        queue = kind(self, areas, bool(self._features & Feature.INDIRECT_DESC))
        self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return QueuePort(Doorbell(call=queue.kicked), self._fds[-1])

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def renew(self) -> None: ...

    def close(self) -> None:
        self.life.close()
        while self._fds:
            os.close(self._fds.pop())


class _Queue:
    """The device's half: uses whatever is available, with status 0, at each kick.

    A request has three descriptors (header, data, status), in the ring or in a table.
    """

    def __init__(self, transport: NullTransport, areas: RingAreas, indirect: bool) -> None:
        self.size = areas.size
        self.chain = 1 if indirect else 3
        self._transport = transport
        self._memory = np.frombuffer(areas.region.view, np.uint8)
        self._descriptors = self._memory[areas.descriptor : areas.descriptor + 16 * areas.size]
        self._statuses = np.zeros(areas.size, np.int64)  # where those of the heads are, as far as seen

    def kicked(self) -> None:
        begun = time.perf_counter_ns()
        self._serve()
        self._transport.device_ns += time.perf_counter_ns() - begun

    def _serve(self) -> None:
        raise NotImplementedError

    def _succeed(self, heads: np.ndarray, firsts: np.ndarray) -> None:
        """Write the statuses of these heads, whose first descriptors are there."""
        places = self._statuses[heads]
        if not places.all():
            for head, first in zip(heads, firsts, strict=True):
                self._statuses[head] = self._find_status(int(first))
            places = self._statuses[heads]
        self._memory[places] = 0

    def _find_status(self, first: int) -> int:
        if self.chain == 1:
            table, nbytes = struct.unpack_from("<QI", self._descriptors, 16 * first)
            return int(struct.unpack_from("<Q", self._memory, table + nbytes - 16)[0])
        return int(struct.unpack_from("<Q", self._descriptors, 16 * ((first + 2) % self.size))[0])


class _SplitQueue(_Queue):
    def __init__(self, transport: NullTransport, areas: RingAreas, indirect: bool) -> None:
        super().__init__(transport, areas, indirect)
        end = 4 + 2 * areas.size
        self._ring = self._memory[areas.available : areas.available + end].view(np.uint16)
        used = self._memory[areas.used : areas.used + 4 + 8 * areas.size]
        self._used_idx, self._elements = used[2:4].view(np.uint16), used[4:].view(np.uint32)
        self._seen = 0

    def _serve(self) -> None:
        now = int(self._ring[1])
        places = np.arange(self._seen, self._seen + (now - self._seen & 0xFFFF)) % self.size
        heads = self._ring[2 + places]
        self._succeed(heads, heads)
        self._elements[2 * places] = heads
        self._seen = now
        self._used_idx[0] = now


class _PackedQueue(_Queue):
    def __init__(self, transport: NullTransport, areas: RingAreas, indirect: bool) -> None:
        super().__init__(transport, areas, indirect)
        self._ids = self._descriptors.view(np.uint16)[6::8]
        self._flags = self._descriptors.view(np.uint16)[7::8]
        self._at, self._wrap = 0, True

    def _serve(self) -> None:
        while True:  # to the end of the ring, and perhaps from its beginning
            ready = (self._flags[self._at :] & (_AVAIL | _USED)) == (_AVAIL if self._wrap else _USED)
            count = len(ready) if ready.all() else int(ready.argmin())
            firsts = np.arange(self._at, self._at + count, self.chain)
            heads = self._ids[firsts]
            self._succeed(heads, firsts)
            self._flags[firsts] = _AVAIL | _USED if self._wrap else 0
            self._at += len(firsts) * self.chain
            if self._at < self.size:
                return
            self._at -= self.size
            self._wrap = not self._wrap


@contextmanager
def null_channel(layout: str, queue_size: int = 512) -> Iterator[tuple[Channel, NullTransport]]:
    """A channel to such a device, by the name of a layout."""
    transport = NullTransport(LAYOUTS[layout])
    device = BlkDevice(transport, queues=1, queue_size=queue_size)
    with Controller(device, "Null", None) as controller, controller["Null"].open(wait="poll") as channel:
        yield channel, transport
