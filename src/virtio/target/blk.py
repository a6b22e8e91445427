"""The virtio block device (5.2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from virtio.errors import ProtocolError, RequestError
from virtio.ring.device import DeviceRing
from virtio.target.held import Held
from virtio.target.store import Store, join, part
from virtio.wire.blk import (
    SECTOR_SIZE,
    UNMAP,
    BlkConfig,
    BlkFeature,
    BlkStatus,
    RequestHeader,
    RequestType,
    decode_ranges,
    encode_id,
)

_SIZE_MAX = 1 << 20  # bytes of one buffer
_SEG_MAX = 126  # with header and status, a queue of 128
_RANGE_MAX = 1 << 22  # sectors in one range of discard and write zeroes
_RANGES_MAX = 32

_HEADER = RequestHeader.FORMAT
_IN, _OUT = int(RequestType.IN), int(RequestType.OUT)
_DATA = (RequestType.IN, RequestType.OUT, RequestType.DISCARD, RequestType.WRITE_ZEROES)
_SLOW = (*_DATA, RequestType.FLUSH)  # where a disk is
_STATUS = tuple(bytes([status]) for status in BlkStatus)


class _Unsupported(Exception):
    """The request is none of ours."""


class BlkDevice:
    """A disk over one store; every queue is alike."""

    def __init__(self, store: Store, queues: int) -> None:
        features = (
            BlkFeature.SIZE_MAX
            | BlkFeature.SEG_MAX
            | BlkFeature.BLK_SIZE
            | BlkFeature.FLUSH
            | BlkFeature.TOPOLOGY
            | BlkFeature.MQ
        )
        if store.read_only:
            features |= BlkFeature.RO
        else:
            features |= BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES
        self.features = int(features)
        self.acked = 0
        self.settle: Callable[[], None] = lambda: None
        bare, self.faults = part(store)
        self._store = join(bare, self.faults)
        self._queues = queues
        self._held: Held[int] = Held()
        self._record = BlkConfig(
            capacity=store.size // SECTOR_SIZE,
            size_max=_SIZE_MAX,
            seg_max=_SEG_MAX,
            blk_size=store.block_size,
            min_io_size=1,
            num_queues=queues,
            max_discard_sectors=_RANGE_MAX,
            max_discard_seg=_RANGES_MAX,
            discard_sector_alignment=store.block_size // SECTOR_SIZE,
            max_write_zeroes_sectors=_RANGE_MAX,
            max_write_zeroes_seg=_RANGES_MAX,
            write_zeroes_may_unmap=True,
        )
        self.config = self._record.encode(self.features)
        self.refault()

    @property
    def store(self) -> Store:
        """Where the data are."""
        return self._store

    def refault(self) -> None:
        """`faults` has changed: only where there are some, every request is looked at first."""
        self._store = join(part(self._store)[0], self.faults)
        handler = self._admit if self.faults.wait else self.handle
        self.handlers: Sequence[Callable[[DeviceRing], int] | None] = [handler] * self._queues

    def resize(self, size: int) -> None:
        """Be `size` bytes long; the session tells the driver, as the configuration changes."""
        self._store.resize(size)
        self._record = replace(self._record, capacity=size // SECTOR_SIZE)
        self.config = self._record.encode(self.features)

    def resume(self) -> None:
        """Do the requests that were held while the disk hung."""
        self._held.release(lambda task: True, self._perform)

    def forget(self) -> None:
        """Nothing is pending here."""

    def use(self, rings: Mapping[int, DeviceRing]) -> None:
        """Nothing here is told to a driver."""

    def drop(self, ring: DeviceRing) -> None:
        """The ring has stopped."""
        self._held.drop(ring)

    def tend(self) -> float:
        """Do what has waited for its time."""
        return self._held.tend(self._perform)

    def set_config(self, offset: int, data: bytes) -> bool:
        """Nothing here can be written."""
        return False

    def reset(self) -> None:
        """Nothing here outlives a request."""

    def _admit(self, ring: DeviceRing) -> int:
        """A request while the disk has faults: done, or held."""
        if self.faults.hang:
            self._held.keep(ring, ring.head)
        if self.faults.delay and self._kind(ring) in _SLOW:
            self._held.keep(ring, ring.head, time.monotonic() + self.faults.delay)
        return self._perform(ring)

    def _perform(self, ring: DeviceRing) -> int:
        """A request that is let through, to fail or not."""
        if self._kind(ring) in _DATA:
            self.faults.begin()
        try:
            return self.handle(ring)
        finally:
            self.faults.failing = False

    def _kind(self, ring: DeviceRing) -> int:
        return int.from_bytes(ring.gather(0, 4), "little")

    def handle(self, ring: DeviceRing) -> int:
        """Do the request that was popped; how many bytes of it are set."""
        room = ring.writable - 1  # the status is the last byte, whatever the layout (2.6.4)
        if ring.readable < _HEADER.size or room < 0:
            raise ProtocolError(
                f"block request of {ring.readable} readable bytes and {ring.writable} writable, "
                f"want at least {_HEADER.size} and 1"
            )
        kind, _, sector = _HEADER.unpack(ring.gather(0, _HEADER.size))
        filled = 0
        status = BlkStatus.OK
        try:
            if kind == _IN:
                self._store.read(self._span(sector, room), ring.writable_views(0, room))
                filled = room
            elif kind == _OUT:
                size = ring.readable - _HEADER.size
                offset = self._span(sector, size)
                self._writable()
                self._store.write(offset, ring.readable_views(_HEADER.size, size))
            else:
                filled = self._other(kind, ring, room)
        except _Unsupported:
            status = BlkStatus.UNSUPP
        except (OSError, RequestError, ProtocolError):
            status = BlkStatus.IOERR
        if filled < room:
            ring.scatter(filled, bytes(room - filled))  # the length given back covers these too
        ring.scatter(room, _STATUS[status])
        return room + 1

    def _other(self, kind: int, ring: DeviceRing, room: int) -> int:
        if kind == RequestType.FLUSH:
            self._store.flush()
        elif kind == RequestType.GET_ID:
            return ring.scatter(0, encode_id(self._store.serial)[:room])
        elif kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            self._zero(kind, ring)
        else:
            raise _Unsupported
        return 0

    def _zero(self, kind: int, ring: DeviceRing) -> None:
        """A discarded range reads as zeros too; all ranges are checked before one is touched."""
        self._writable()
        allowed = UNMAP if kind == RequestType.WRITE_ZEROES else 0
        size = ring.readable - _HEADER.size
        if not 0 < size <= _RANGES_MAX * 16:
            raise RequestError(f"{size} bytes of ranges")
        ranges = decode_ranges(ring.gather(_HEADER.size, size))
        for item in ranges:
            if item.flags & ~allowed:
                raise _Unsupported
            if item.blocks > _RANGE_MAX:
                raise RequestError(f"a range of {item.blocks} sectors")
            self._span(item.sector, item.blocks * SECTOR_SIZE)
        for item in ranges:
            self._store.zero(
                item.sector * SECTOR_SIZE,
                item.blocks * SECTOR_SIZE,
                unmap=kind == RequestType.DISCARD or bool(item.flags & UNMAP),
            )

    def _writable(self) -> None:
        if self._store.read_only:
            raise RequestError("the disk is read-only")

    def _span(self, sector: int, nbytes: int) -> int:
        """Where on the disk this is, in bytes; it must be whole sectors of it."""
        offset = sector * SECTOR_SIZE
        if nbytes % SECTOR_SIZE or offset + nbytes > self._store.size:
            raise RequestError(f"{nbytes} bytes at {offset} of {self._store.size}")
        return offset
