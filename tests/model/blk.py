"""A virtio-blk device on a bytearray (virtio 5.2), which checks what the driver asks of it."""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.model.ring import Chain

SECTOR: Final = 512
_HEADER: Final = struct.Struct("<IIQ")  # type, reserved, sector (5.2.6)
_SEGMENT: Final = struct.Struct("<QII")  # sector, number of sectors, flags
_UNMAP: Final = 1


class BlkFeature(enum.IntFlag):
    """Feature bits of the block device (5.2.3)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    LIFETIME = 1 << 15
    SECURE_ERASE = 1 << 16
    ZONED = 1 << 17


B = BlkFeature


class Type(enum.IntEnum):
    """Request types (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


OK, IOERR, UNSUPP = 0, 1, 2


class BlkRequest(NamedTuple):
    """One request as it arrived."""

    type: int
    sector: int
    nbytes: int
    segments: tuple[tuple[int, int, int], ...] = ()


@dataclass
class Blk:
    """A disk of `sectors` sectors of 512 bytes. Its fields may be changed while it runs."""

    sectors: int = 2048
    features: int = B.SEG_MAX | B.BLK_SIZE | B.FLUSH | B.TOPOLOGY | B.MQ | B.DISCARD | B.WRITE_ZEROES
    blk_size: int = 512
    size_max: int = 0
    seg_max: int = 126
    num_queues: int = 4
    discard: tuple[int, int, int] = (2048, 1, 1)
    """Most sectors, most segments, alignment in sectors."""
    write_zeroes: tuple[int, int, int] = (2048, 1, 1)
    """Most sectors, most segments, whether they may unmap."""
    tail: bytes = b""
    """Configuration bytes beyond those that virtio 1.4 knows."""
    span: int = 60
    """How much of the configuration there is, before the tail."""
    garbage: int | None = None
    """A byte to fill the fields with whose features are not offered."""
    identity: bytes = b"recording model"
    status: Callable[[BlkRequest], int | None] | None = None
    """Overrides the status byte; None leaves the byte unwritten."""

    type_name: Final = "blk"
    first_queue: Final = 0

    violate: Callable[[str, str], None] = field(default=lambda clause, text: None, repr=False)
    accepted: int = 0
    """Device features that the driver accepted; the session fills this in."""

    def __post_init__(self) -> None:
        self.disk = bytearray(self.sectors * SECTOR)
        self.requests: deque[BlkRequest] = deque(maxlen=8192)

    def resize(self, sectors: int) -> None:
        """Have so many sectors from now on; in the back end's thread, which then says so."""
        self.disk[sectors * SECTOR :] = bytes(max(0, sectors - self.sectors) * SECTOR)
        self.sectors = sectors

    @property
    def config(self) -> bytes:
        """struct virtio_blk_config (5.2.4)."""
        on = self.features
        whole = bytearray(96 if self.garbage is None else bytes([self.garbage]) * 96)
        struct.pack_into("<Q", whole, 0, self.sectors)
        if on & B.SIZE_MAX:
            struct.pack_into("<I", whole, 8, self.size_max)
        if on & B.SEG_MAX:
            struct.pack_into("<I", whole, 12, self.seg_max)
        if on & B.GEOMETRY:
            struct.pack_into("<HBB", whole, 16, 16, 16, 63)
        if on & B.BLK_SIZE:
            struct.pack_into("<I", whole, 20, self.blk_size)
        if on & B.TOPOLOGY:
            struct.pack_into("<BBHI", whole, 24, 0, 0, 1, 0)
        if on & B.CONFIG_WCE:
            whole[32] = 1
        if on & B.MQ:
            struct.pack_into("<H", whole, 34, self.num_queues)
        if on & B.DISCARD:
            struct.pack_into("<III", whole, 36, *self.discard)
        if on & B.WRITE_ZEROES:
            struct.pack_into("<IIB", whole, 48, *self.write_zeroes)
        if on & B.SECURE_ERASE:
            struct.pack_into("<III", whole, 60, 2048, 1, 1)
        if on & B.ZONED:
            struct.pack_into("<IIIIIB", whole, 72, 0, 0, 0, 0, 0, 0)
        return bytes(whole[: self.span]) + self.tail

    def handle(self, chain: Chain) -> int:
        """Do one request; how many bytes were written into the chain."""
        where = f"head {chain.head} of ring {chain.ring.index}"
        sent = chain.read()
        if len(sent) < _HEADER.size or chain.writable_size < 1:
            self.violate("BLK-9", f"{where}: {len(sent)} bytes to read, {chain.writable_size} to write")
            return 0
        if chain.readable[0][2] != _HEADER.size:
            self.violate("BLK-17", f"{where}: the header shares its descriptor")
        if chain.writable[-1][2] != 1:
            self.violate("BLK-17", f"{where}: the status shares its descriptor")
        kind, reserved, sector = _HEADER.unpack_from(sent)
        data = sent[_HEADER.size :]
        room = chain.writable_size - 1
        if reserved:
            self.violate("BLK-9", f"{where}: reserved header field is {reserved:#x}")
        self._check_segments(where, chain)
        status, written = self._do(where, kind, sector, data, room, chain)
        request = chain.request
        assert isinstance(request, BlkRequest)
        self.requests.append(request)
        if self.status is not None:
            override = self.status(request)
            if override is None:
                return written
            status = override
        chain.write(bytes([status]), room)
        return written + 1

    def _check_segments(self, where: str, chain: Chain) -> None:
        spans = chain.readable[1:] + chain.writable[:-1]
        if self.accepted & B.SEG_MAX and len(spans) > self.seg_max > 0:
            self.violate("BLK-17", f"{where}: {len(spans)} data segments, seg_max is {self.seg_max}")
        if self.accepted & B.SIZE_MAX:
            for _, _, length in spans:
                if length > self.size_max > 0:
                    self.violate("BLK-17", f"{where}: {length} bytes, size_max is {self.size_max}")

    def _do(
        self, where: str, kind: int, sector: int, data: bytes, room: int, chain: Chain
    ) -> tuple[int, int]:
        if kind in (Type.IN, Type.OUT):
            nbytes = room if kind == Type.IN else len(data)
            chain.request = BlkRequest(kind, sector, nbytes)
            if nbytes % SECTOR or (kind == Type.IN and data) or (kind == Type.OUT and room):
                self.violate("BLK-9", f"{where}: {len(data)} bytes out, {room} in, of type {kind}")
                return IOERR, 0
            if sector * SECTOR + nbytes > len(self.disk):
                self.violate("BLK-6", f"{where}: {nbytes} bytes at sector {sector} of {self.sectors}")
                return IOERR, 0
            if kind == Type.IN:
                start = sector * SECTOR
                with memoryview(self.disk) as disk:
                    return OK, chain.write(disk[start : start + nbytes])
            if self._refuse_write(where, kind):
                return IOERR, 0
            self.disk[sector * SECTOR : sector * SECTOR + nbytes] = data
            return OK, 0
        if kind == Type.FLUSH:
            chain.request = BlkRequest(kind, sector, len(data) + room)
            if not self.accepted & B.FLUSH:
                self.violate("BLK-1", f"{where}: a flush, which was not negotiated")
                return UNSUPP, 0
            if sector or data or room:
                self.violate("BLK-8", f"{where}: a flush of sector {sector}, {len(data) + room} bytes")
            return OK, 0
        if kind == Type.GET_ID:
            chain.request = BlkRequest(kind, sector, room)
            if room != 20 or data:
                self.violate("BLK-11", f"{where}: GET_ID with {len(data)} bytes out, {room} in")
                return IOERR, 0
            return OK, chain.write(self.identity.ljust(20, b"\0"))
        if kind in (Type.DISCARD, Type.WRITE_ZEROES):
            return self._do_segments(where, kind, sector, data, room, chain)
        chain.request = BlkRequest(kind, sector, len(data) + room)
        self.violate("BLK-1", f"{where}: request type {kind}, which was not negotiated")
        return UNSUPP, 0

    def _refuse_write(self, where: str, kind: int) -> bool:
        if self.features & B.RO:
            self.violate("BLK-7", f"{where}: request type {kind} to a read-only disk")
            return True
        return False

    def _do_segments(
        self, where: str, kind: int, sector: int, data: bytes, room: int, chain: Chain
    ) -> tuple[int, int]:
        segments = tuple(_SEGMENT.iter_unpack(data[: len(data) // 16 * 16]))
        chain.request = BlkRequest(kind, sector, len(data), segments)
        need = B.DISCARD if kind == Type.DISCARD else B.WRITE_ZEROES
        if not self.accepted & need:
            self.violate("BLK-1", f"{where}: request type {kind}, which was not negotiated")
            return UNSUPP, 0
        if len(data) % 16 or not data or room:
            self.violate("BLK-10", f"{where}: {len(data)} bytes of segments, {room} to write")
            return IOERR, 0
        if self._refuse_write(where, kind):
            return IOERR, 0
        most, most_segments, last = self.discard if kind == Type.DISCARD else self.write_zeroes
        if len(segments) > most_segments:
            self.violate("BLK-12", f"{where}: {len(segments)} segments, at most {most_segments}")
        for start, count, flags in segments:
            if start + count > self.sectors:
                self.violate("BLK-6", f"{where}: {count} sectors at {start} of {self.sectors}")
                return IOERR, 0
            if count > most or not count:
                self.violate("BLK-17", f"{where}: a segment of {count} sectors, at most {most}")
            if kind == Type.DISCARD:
                if flags:
                    self.violate("BLK-14", f"{where}: flags {flags:#x} in a discard")
                if start % last or count % last:
                    self.violate("BLK-17", f"{where}: discard of {count} at {start}, aligned to {last}")
                fill = b"\xdd"  # discarded blocks may read anything
            else:
                if flags & ~_UNMAP:
                    self.violate("BLK-14", f"{where}: flags {flags:#x} in write zeroes")
                fill = b"\0"
            self.disk[start * SECTOR : (start + count) * SECTOR] = fill * (count * SECTOR)
        return OK, 0
