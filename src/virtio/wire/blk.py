"""The virtio block device: features, configuration space, requests (virtio 1.4, 5.2)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from virtio.errors import ProtocolError
from virtio.wire._record import Record
from virtio.wire.virtio import ConfigField, config_fields

SECTOR_SIZE = 512  # the unit of every sector number, whatever the block size (5.2.4)
ID_SIZE = 20  # what GET_ID writes (5.2.6)
UNMAP = 1  # flag of a Range: may deallocate; WRITE_ZEROES only (5.2.6.1)


class BlkFeature(enum.IntFlag):
    """Feature bits of the block device (5.2.3), as masks."""

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


class RequestType(enum.IntEnum):
    """What a request asks for (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


class BlkStatus(enum.IntEnum):
    """The last byte of a request, written by the device (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


@dataclass(frozen=True, slots=True)
class RequestHeader(Record):
    """The first 16 bytes of a request (5.2.6); `ioprio` is reserved there, send 0."""

    type: int
    ioprio: int = 0
    sector: int = 0
    FORMAT = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class Range(Record):
    """One segment of a DISCARD, WRITE_ZEROES or SECURE_ERASE, in sectors of 512 bytes (5.2.6)."""

    sector: int
    blocks: int
    flags: int = 0
    FORMAT = struct.Struct("<QII")


def decode_ranges(payload: bytes) -> list[Range]:
    """The segments of a DISCARD, WRITE_ZEROES or SECURE_ERASE (5.2.6.1)."""
    if len(payload) % Range.FORMAT.size:
        raise ProtocolError(f"ranges of {len(payload)} bytes, want a multiple of {Range.FORMAT.size}")
    return [Range(*fields) for fields in Range.FORMAT.iter_unpack(payload)]


def decode_id(data: bytes) -> str:
    """What GET_ID returned: ASCII ended by NUL or by its 20 bytes; others become U+FFFD (5.2.6).

    SPDK's target pads it with spaces, which are left out.
    """
    return bytes(data[:ID_SIZE]).partition(b"\0")[0].decode("ascii", "replace").rstrip(" ")


def encode_id(text: str) -> bytes:
    """The 20 bytes that answer a GET_ID: cut or padded, other than ASCII becomes "?"."""
    return text.encode("ascii", "replace")[:ID_SIZE].ljust(ID_SIZE, b"\0")


# What each feature defines in the configuration space (5.2.4): offset, format, fields.
_LAYOUT = tuple(
    (feature, offset, struct.Struct("<" + layout), tuple(names.split()))
    for feature, offset, layout, names in (
        (0, 0, "Q", "capacity"),
        (BlkFeature.SIZE_MAX, 8, "I", "size_max"),
        (BlkFeature.SEG_MAX, 12, "I", "seg_max"),
        (BlkFeature.GEOMETRY, 16, "HBB", "cylinders heads sectors"),
        (BlkFeature.BLK_SIZE, 20, "I", "blk_size"),
        (
            BlkFeature.TOPOLOGY,
            24,
            "BBHI",
            "physical_block_exp alignment_offset min_io_size opt_io_size",
        ),
        (BlkFeature.CONFIG_WCE, 32, "?x", "writeback"),
        (BlkFeature.MQ, 34, "H", "num_queues"),
        (
            BlkFeature.DISCARD,
            36,
            "III",
            "max_discard_sectors max_discard_seg discard_sector_alignment",
        ),
        (
            BlkFeature.WRITE_ZEROES,
            48,
            "II?3x",
            "max_write_zeroes_sectors max_write_zeroes_seg write_zeroes_may_unmap",
        ),
        (
            BlkFeature.SECURE_ERASE,
            60,
            "III",
            "max_secure_erase_sectors max_secure_erase_seg secure_erase_sector_alignment",
        ),
        (BlkFeature.ZONED, 72, "24x", ""),  # never accepted by us
    )
)


def config_span(features: int) -> int:
    """How many bytes of configuration space these features define, padding after fields included.

    Read exactly so many: qemu-storage-daemon has 60 and refuses a longer GET_CONFIG.
    """
    return max(offset + layout.size for offset, layout, _ in _defined(features))


def config_accesses(features: int) -> list[ConfigField]:
    """The fields that these features define, and no others."""
    return [
        field for offset, layout, _ in _defined(features) for field in config_fields(layout.format, offset)
    ]


def _defined(features: int) -> list[tuple[int, struct.Struct, tuple[str, ...]]]:
    return [
        (offset, layout, names) for feature, offset, layout, names in _LAYOUT if features & feature == feature
    ]


@dataclass(frozen=True, slots=True)
class BlkConfig:
    """The configuration space (5.2.4); a field is None when its feature was not accepted.

    `capacity` and the limits of discard, write zeroes and secure erase count 512-byte sectors;
    `min_io_size` and `opt_io_size` count blocks.
    """

    capacity: int
    size_max: int | None = None
    seg_max: int | None = None
    cylinders: int | None = None
    heads: int | None = None
    sectors: int | None = None
    blk_size: int | None = None
    physical_block_exp: int | None = None
    alignment_offset: int | None = None
    min_io_size: int | None = None
    opt_io_size: int | None = None
    writeback: bool | None = None
    num_queues: int | None = None
    max_discard_sectors: int | None = None
    max_discard_seg: int | None = None
    discard_sector_alignment: int | None = None
    max_write_zeroes_sectors: int | None = None
    max_write_zeroes_seg: int | None = None
    write_zeroes_may_unmap: bool | None = None
    max_secure_erase_sectors: int | None = None
    max_secure_erase_seg: int | None = None
    secure_erase_sector_alignment: int | None = None

    @classmethod
    def decode(cls, payload: bytes, features: int) -> BlkConfig:
        """What the accepted `features` define; a longer payload is right, a shorter one is not."""
        if len(payload) < config_span(features):
            raise ProtocolError(f"block configuration of {len(payload)} bytes, want {config_span(features)}")
        return cls(
            **dict(
                field
                for offset, layout, names in _defined(features)
                for field in zip(names, layout.unpack_from(payload, offset), strict=True)
            )
        )

    def encode(self, features: int) -> bytes:
        """The device's side: what `features` define, zero where a field is None."""
        payload = bytearray(config_span(features))
        for offset, layout, names in _defined(features):
            layout.pack_into(payload, offset, *(getattr(self, name) or 0 for name in names))
        return bytes(payload)
