"""The virtio block device (5.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from virtio.errors import ProtocolError, RequestError
from virtio.ring.device import DeviceRing
from virtio.target.store import Store
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
        self.handlers: Sequence[Callable[[DeviceRing], int] | None] = [self.handle] * queues
        self.settle: Callable[[], None] = lambda: None
        self._store = store
        self.config = BlkConfig(
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
        ).encode(self.features)

    def set_config(self, offset: int, data: bytes) -> bool:
        """Nothing here can be written."""
        return False

    def reset(self) -> None:
        """Nothing here outlives a request."""

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
