"""SCSI block commands and what they return (SAM-5, SPC-4, SBC-3); knows of no transport.

Builders return a command descriptor block; decoders take what a device sent, of any length and
content, and raise ProtocolError where it cannot be meant. One module, as each command stands
beside its answer; sense data has its own.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from virtio.errors import ProtocolError, RequestError
from virtio.wire.sense import Sense as Sense, SenseKey as SenseKey


class OpCode(enum.IntEnum):
    """The first byte of a command."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    VERIFY_10 = 0x2F
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    PERSISTENT_RESERVE_IN = 0x5E
    PERSISTENT_RESERVE_OUT = 0x5F
    READ_16 = 0x88
    COMPARE_AND_WRITE = 0x89
    WRITE_16 = 0x8A
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    READ_12 = 0xA8
    WRITE_12 = 0xAA


READ_CAPACITY_16 = 0x10  # service action of SERVICE_ACTION_IN_16


class Status(enum.IntEnum):
    """How a command ended (SAM-5, 5.3.1)."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    ACA_ACTIVE = 0x30
    TASK_ABORTED = 0x40


class Page(enum.IntEnum):
    """Vital product data pages, for `inquiry` (SPC-4, 7.8; SBC-3, 6.6)."""

    SUPPORTED_PAGES = 0x00
    SERIAL_NUMBER = 0x80
    DEVICE_IDENTIFICATION = 0x83
    BLOCK_LIMITS = 0xB0
    CHARACTERISTICS = 0xB1
    LOGICAL_BLOCK_PROVISIONING = 0xB2


CACHING_PAGE = 0x08  # mode pages (SBC-3, 6.5)
ALL_PAGES = 0x3F


def test_unit_ready() -> bytes:
    """TEST UNIT READY: no data."""
    return bytes(6)


def request_sense(allocation: int = 252) -> bytes:
    """REQUEST SENSE in fixed format."""
    return _cdb(">BBBBBB", OpCode.REQUEST_SENSE, 0, 0, 0, allocation, 0)


def inquiry(page: int | None = None, allocation: int = 255) -> bytes:
    """INQUIRY: the standard data, or a vital product data page."""
    return _cdb(">BBBHB", OpCode.INQUIRY, page is not None, page or 0, allocation, 0)


def report_luns(allocation: int) -> bytes:
    """REPORT LUNS without the well-known ones; `allocation`: 8 bytes and 8 for each."""
    return _cdb(">BBB3xIBB", OpCode.REPORT_LUNS, 0, 0, allocation, 0, 0)


def start_stop_unit(start: bool) -> bytes:
    """START STOP UNIT, which waits until it is done."""
    return _cdb(">BBBBBB", OpCode.START_STOP_UNIT, 0, 0, 0, start, 0)


def mode_sense_6(page: int, allocation: int = 255) -> bytes:
    """MODE SENSE(6): current values of a mode page, or of ALL_PAGES."""
    return _cdb(">BBBBBB", OpCode.MODE_SENSE_6, 0, page, 0, allocation, 0)


def mode_sense_10(page: int, allocation: int = 255) -> bytes:
    """MODE SENSE(10): current values of a mode page, or of ALL_PAGES."""
    return _cdb(">BBBB3xHB", OpCode.MODE_SENSE_10, 0, page, 0, allocation, 0)


def read_capacity_10() -> bytes:
    """READ CAPACITY(10): eight bytes, see Capacity.decode_10."""
    return _cdb(">B9x", OpCode.READ_CAPACITY_10)


def read_capacity_16(allocation: int = 32) -> bytes:
    """READ CAPACITY(16): see Capacity.decode_16."""
    return _cdb(">BBQIBB", OpCode.SERVICE_ACTION_IN_16, READ_CAPACITY_16, 0, allocation, 0, 0)


def read_10(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """READ(10): below block 2**32, at most 65535 blocks; 0 reads none."""
    return _cdb(_CDB_10, OpCode.READ_10, _FUA * fua, lba, 0, blocks, 0)


def read_16(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """READ(16)."""
    return _cdb(_CDB_16, OpCode.READ_16, _FUA * fua, lba, blocks, 0, 0)


def write_10(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """WRITE(10): below block 2**32, at most 65535 blocks; 0 writes none."""
    return _cdb(_CDB_10, OpCode.WRITE_10, _FUA * fua, lba, 0, blocks, 0)


def write_16(lba: int, blocks: int, *, fua: bool = False) -> bytes:
    """WRITE(16)."""
    return _cdb(_CDB_16, OpCode.WRITE_16, _FUA * fua, lba, blocks, 0, 0)


def synchronize_cache_10(lba: int = 0, blocks: int = 0) -> bytes:
    """SYNCHRONIZE CACHE(10); 0 blocks means all from `lba` on."""
    return _cdb(_CDB_10, OpCode.SYNCHRONIZE_CACHE_10, 0, lba, 0, blocks, 0)


def synchronize_cache_16(lba: int = 0, blocks: int = 0) -> bytes:
    """SYNCHRONIZE CACHE(16); 0 blocks means all from `lba` on."""
    return _cdb(_CDB_16, OpCode.SYNCHRONIZE_CACHE_16, 0, lba, blocks, 0, 0)


def unmap(parameter_length: int) -> bytes:
    """UNMAP, with what `unmap_parameters` made as its data."""
    return _cdb(_CDB_10, OpCode.UNMAP, 0, 0, 0, parameter_length, 0)


def write_same_16(lba: int, blocks: int, *, unmap: bool = False) -> bytes:
    """WRITE SAME(16), with one block as its data; `unmap` allows deallocation."""
    return _cdb(_CDB_16, OpCode.WRITE_SAME_16, _UNMAP * unmap, lba, blocks, 0, 0)


def write_same_10(lba: int, blocks: int, *, unmap: bool = False) -> bytes:
    """WRITE SAME(10): below block 2**32, at most 65535 blocks."""
    return _cdb(_CDB_10, OpCode.WRITE_SAME_10, _UNMAP * unmap, lba, 0, blocks, 0)


def compare_and_write(lba: int, blocks: int) -> bytes:
    """COMPARE AND WRITE of at most 255 blocks; its data: what to expect there, then what to write."""
    return _cdb(">BBQ3xBBB", OpCode.COMPARE_AND_WRITE, 0, lba, blocks, 0, 0)


def unmap_parameters(ranges: Iterable[tuple[int, int]]) -> bytes:
    """The data of an UNMAP, from (first block, blocks) of each range (SBC-3, 5.28)."""
    body = b"".join(_UNMAP_RANGE.pack(lba, blocks) for lba, blocks in ranges)
    return _UNMAP_HEADER.pack(_UNMAP_HEADER.size - 2 + len(body), len(body)) + body


def decode_unmap_parameters(data: bytes) -> list[tuple[int, int]]:
    """The ranges in the data of an UNMAP."""
    if len(data) < _UNMAP_HEADER.size:
        raise ProtocolError(f"unmap list of {len(data)} bytes, want {_UNMAP_HEADER.size} or more")
    _, length = _UNMAP_HEADER.unpack_from(data)
    body = data[_UNMAP_HEADER.size :][:length]
    if len(body) != length:
        raise ProtocolError(f"unmap list of {len(body)} bytes, its length says {length}")
    return list(_UNMAP_RANGE.iter_unpack(body[: length - length % _UNMAP_RANGE.size]))


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Standard INQUIRY data (SPC-4, 6.6); texts without their padding.

    A `qualifier` other than 0 means that there is no such unit, or nothing behind it. `version`
    6 is SPC-4.
    """

    peripheral_type: int = 0
    qualifier: int = 0
    removable: bool = False
    version: int = 6
    vendor: str = ""
    product: str = ""
    revision: str = ""

    def encode(self) -> bytes:
        """36 bytes, texts cut or padded."""
        head = bytes(
            (
                self.qualifier << 5 | self.peripheral_type,
                0x80 * self.removable,
                self.version,
                0x12,  # hierarchical LUN addresses, response data format 2
                _INQUIRY_SIZE - 5,
                0,
                0,
                0x02,  # commands may be queued
            )
        )
        return head + _pad(self.vendor, 8) + _pad(self.product, 16) + _pad(self.revision, 4)

    @classmethod
    def decode(cls, data: bytes) -> Inquiry:
        if len(data) < _INQUIRY_SIZE:
            raise ProtocolError(f"inquiry data of {len(data)} bytes, want {_INQUIRY_SIZE} or more")
        return cls(
            data[0] & 0x1F,
            data[0] >> 5,
            bool(data[1] & 0x80),
            data[2],
            _text(data[8:16]),
            _text(data[16:32]),
            _text(data[32:36]),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """How large a disk is (SBC-3, 5.15 and 5.16).

    `lbpme`: blocks may be unmapped; `lbprz`: such blocks read zeros; a physical block is
    2**`physical_exponent` blocks, the first that is whole begins at `lowest_aligned`;
    `protection` is the type of protection information, 0 for none.
    """

    blocks: int
    block_size: int
    lbpme: bool = False
    lbprz: bool = False
    physical_exponent: int = 0
    lowest_aligned: int = 0
    protection: int = 0

    @classmethod
    def decode_10(cls, data: bytes) -> Capacity | None:
        """The answer to READ CAPACITY(10); None means too large for it, ask READ CAPACITY(16)."""
        if len(data) < 8:
            raise ProtocolError(f"capacity of {len(data)} bytes, want 8 or more")
        last, block_size = struct.unpack_from(">II", data)
        return None if last == _LAST_10 else cls(_blocks(last, block_size), block_size)

    @classmethod
    def decode_16(cls, data: bytes) -> Capacity:
        """The answer to READ CAPACITY(16); of a short one the end counts as zeros."""
        if len(data) < 12:
            raise ProtocolError(f"capacity of {len(data)} bytes, want 12 or more")
        last, block_size, protection, exponents, rest = _CAPACITY_16.unpack(
            data[: _CAPACITY_16.size].ljust(_CAPACITY_16.size, b"\0")
        )
        return cls(
            _blocks(last, block_size),
            block_size,
            bool(rest & 0x8000),
            bool(rest & 0x4000),
            exponents & 0xF,
            rest & 0x3FFF,
            (protection >> 1 & 7) + 1 if protection & 1 else 0,
        )

    def encode_10(self) -> bytes:
        """Eight bytes, which say "ask READ CAPACITY(16)" when the disk is too large for them."""
        return struct.pack(">II", min(self.blocks - 1, _LAST_10), self.block_size)

    def encode_16(self) -> bytes:
        """32 bytes."""
        protection = self.protection - 1 << 1 | 1 if self.protection else 0
        rest = 0x8000 * self.lbpme | 0x4000 * self.lbprz | self.lowest_aligned
        fields = (self.blocks - 1, self.block_size, protection, self.physical_exponent, rest)
        return _CAPACITY_16.pack(*fields).ljust(32, b"\0")


def encode_lun(lun: int) -> bytes:
    """A logical unit number as REPORT LUNS lists it: peripheral form, flat above 255."""
    if not 0 <= lun <= _LUN_MAX:
        raise RequestError(f"LUN {lun}, there are 0 to {_LUN_MAX}")
    return bytes((0x40 | lun >> 8 if lun > 0xFF else 0, lun & 0xFF, 0, 0, 0, 0, 0, 0))


def decode_lun(address: bytes) -> int:
    """The number in a single-level LUN, peripheral or flat (SAM-5, 4.7); others are refused."""
    if len(address) < 2 or address[0] >= 0x80 or 0 < address[0] < 0x40 or any(address[2:]):
        raise ProtocolError(f"LUN {address.hex()}, want 00 nn or 40 | high, low, then zeros")
    return (address[0] & 0x3F) << 8 | address[1]


def encode_report_luns(luns: Iterable[bytes]) -> bytes:
    """The answer to REPORT LUNS, from eight bytes for each."""
    body = b"".join(luns)
    return struct.pack(">I4x", len(body)) + body


def decode_report_luns(data: bytes) -> list[bytes]:
    """The eight bytes of each LUN, for `decode_lun`.

    There are more than came when the first four bytes say a larger number than `len(data) - 8`.
    """
    if len(data) < 8:
        raise ProtocolError(f"LUN list of {len(data)} bytes, want 8 or more")
    body = data[8 : 8 + int.from_bytes(data[:4], "big")]
    return [body[at : at + 8] for at in range(0, len(body) - 7, 8)]


@dataclass(frozen=True, slots=True)
class ModeParameters:
    """The answer to MODE SENSE (SPC-4, 7.5): two bits of its header, and the pages by number.

    A page is what follows its two bytes of header. Subpages are left out.
    """

    write_protected: bool = False
    dpofua: bool = False
    pages: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def write_cache(self) -> bool | None:
        """Whether writes are cached (SBC-3, 6.5); None when there was no caching page."""
        page = self.pages.get(CACHING_PAGE)
        return bool(page[0] & 0x04) if page else None

    @classmethod
    def decode_6(cls, data: bytes) -> ModeParameters:
        """The answer to MODE SENSE(6)."""
        if len(data) < 4:
            raise ProtocolError(f"mode parameters of {len(data)} bytes, want 4 or more")
        return cls._decode(data[2], data[4 + data[3] : 1 + data[0]])

    @classmethod
    def decode_10(cls, data: bytes) -> ModeParameters:
        """The answer to MODE SENSE(10)."""
        if len(data) < 8:
            raise ProtocolError(f"mode parameters of {len(data)} bytes, want 8 or more")
        length, descriptors = int.from_bytes(data[:2], "big"), int.from_bytes(data[6:8], "big")
        return cls._decode(data[3], data[8 + descriptors : 2 + length])

    @classmethod
    def _decode(cls, bits: int, rest: bytes) -> ModeParameters:
        pages = {}
        while len(rest) >= 4:
            subpage = rest[0] & 0x40
            start = 4 if subpage else 2
            end = start + int.from_bytes(rest[start // 2 : start], "big")
            if not subpage:
                pages[rest[0] & 0x3F] = rest[start:end]
            rest = rest[end:]
        return cls(bool(bits & 0x80), bool(bits & 0x10), pages)

    def encode_6(self) -> bytes:
        """The answer to MODE SENSE(6), without block descriptors."""
        body = self._body()
        return struct.pack(">BBBB", 3 + len(body), 0, self._bits(), 0) + body

    def encode_10(self) -> bytes:
        """The answer to MODE SENSE(10), without block descriptors."""
        body = self._body()
        return struct.pack(">HBBHH", 6 + len(body), 0, self._bits(), 0, 0) + body

    def _bits(self) -> int:
        return 0x80 * self.write_protected | 0x10 * self.dpofua

    def _body(self) -> bytes:
        return b"".join(bytes((page, len(data))) + data for page, data in self.pages.items())


def encode_page(page: int, body: bytes) -> bytes:
    """A vital product data page of a disk: four bytes of header and `body`."""
    return _PAGE.pack(0, page, len(body)) + body


def encode_supported_pages(pages: Iterable[int]) -> bytes:
    """Page 00."""
    return encode_page(Page.SUPPORTED_PAGES, bytes(sorted(pages)))


def decode_supported_pages(data: bytes) -> list[int]:
    """Page 00: the numbers of the pages that can be asked for."""
    return list(_body(data, Page.SUPPORTED_PAGES))


def encode_serial(serial: str) -> bytes:
    """Page 80."""
    return encode_page(Page.SERIAL_NUMBER, serial.encode("ascii", "replace"))


def decode_serial(data: bytes) -> str:
    """Page 80: the serial number, without padding."""
    return _text(_body(data, Page.SERIAL_NUMBER))


class DesignatorType(enum.IntEnum):
    """What kind of name a designator is (SPC-4, 7.8)."""

    VENDOR_SPECIFIC = 0x0
    T10_VENDOR_ID = 0x1
    EUI_64 = 0x2
    NAA = 0x3
    RELATIVE_TARGET_PORT = 0x4
    TARGET_PORT_GROUP = 0x5
    LOGICAL_UNIT_GROUP = 0x6
    MD5 = 0x7
    SCSI_NAME = 0x8
    PROTOCOL_PORT = 0x9
    UUID = 0xA


@dataclass(frozen=True, slots=True)
class Designator:
    """One name out of page 83; `association`: 0 the logical unit, 1 the port, 2 the device.

    `type` is a DesignatorType, or a number that has none; `code_set`: 1 binary, 2 ASCII, 3 UTF-8.
    """

    type: int
    association: int
    code_set: int
    value: bytes

    def describe(self) -> str:
        """For a person: "naa.5000c500a1b2c3d4", "uuid.…", or the text itself."""
        if self.code_set in (2, 3):
            return _text(self.value)
        digits = self.value.hex()
        if self.type == DesignatorType.UUID and len(self.value) == 18:
            ends = ((4, 12), (12, 16), (16, 20), (20, 24), (24, 36))  # after a header of two bytes
            return "uuid." + "-".join(digits[start:end] for start, end in ends)
        prefixes: dict[int, str] = {DesignatorType.NAA: "naa.", DesignatorType.EUI_64: "eui."}
        return prefixes.get(self.type, "") + digits

    @property
    def unique(self) -> bool:
        """Whether no other unit in the world has this name, if the device keeps to the standard."""
        return self.type in (DesignatorType.NAA, DesignatorType.EUI_64, DesignatorType.UUID)


def best_designator(designators: Iterable[Designator]) -> Designator | None:
    """The name of the logical unit itself that tells it best from others."""
    own = [designator for designator in designators if designator.association == 0]
    order: list[int] = [
        DesignatorType.UUID,
        DesignatorType.NAA,
        DesignatorType.EUI_64,
        DesignatorType.SCSI_NAME,
        DesignatorType.T10_VENDOR_ID,
        DesignatorType.VENDOR_SPECIFIC,
    ]
    known = [designator for designator in own if designator.type in order and designator.value]
    return min(known, key=lambda designator: order.index(designator.type), default=None)


def decode_rotation(data: bytes) -> int:
    """Page B1: revolutions a minute, 1 for a medium that does not rotate, 0 when it is not said."""
    rate = int.from_bytes(_body(data, Page.CHARACTERISTICS)[:2], "big")
    return rate if rate == 1 or 0x401 <= rate < 0xFFFF else 0


def encode_rotation(rate: int) -> bytes:
    """Page B1."""
    return encode_page(Page.CHARACTERISTICS, struct.pack(">H58x", rate))


def encode_designators(designators: Iterable[Designator]) -> bytes:
    """Page 83."""
    body = b"".join(
        bytes((d.code_set, d.association << 4 | d.type, 0, len(d.value))) + d.value for d in designators
    )
    return encode_page(Page.DEVICE_IDENTIFICATION, body)


def decode_designators(data: bytes) -> list[Designator]:
    """Page 83; a designator that is cut off ends the list."""
    rest = _body(data, Page.DEVICE_IDENTIFICATION)
    designators = []
    while len(rest) >= 4 and len(rest) >= (end := 4 + rest[3]):
        fields = (rest[1] & 0xF, rest[1] >> 4 & 3, rest[0] & 0xF, rest[4:end])
        designators.append(Designator(*fields))
        rest = rest[end:]
    return designators


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """Page B0 (SBC-3, 6.6), in blocks; 0 means that the device does not say.

    `wsnz`: a WRITE SAME of 0 blocks is refused. `unmap_alignment` is where the first granule
    begins.
    """

    wsnz: bool = False
    max_compare_and_write: int = 0
    transfer_granularity: int = 0
    max_transfer: int = 0
    optimal_transfer: int = 0
    max_prefetch: int = 0
    max_unmap: int = 0
    max_unmap_descriptors: int = 0
    unmap_granularity: int = 0
    unmap_alignment: int = 0
    max_write_same: int = 0

    def encode(self) -> bytes:
        fields = [getattr(self, name) for name in self.__slots__]
        fields[-2] |= _UGAVALID
        return encode_page(Page.BLOCK_LIMITS, _LIMITS.pack(*fields).ljust(60, b"\0"))

    @classmethod
    def decode(cls, data: bytes) -> BlockLimits:
        """Older devices send less of it: what did not come is 0."""
        body = _body(data, Page.BLOCK_LIMITS)[: _LIMITS.size].ljust(_LIMITS.size, b"\0")
        fields = list(_LIMITS.unpack(body))
        fields[0] = bool(fields[0] & 1)
        fields[-2] = fields[-2] & ~_UGAVALID if fields[-2] & _UGAVALID else 0
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class LogicalBlockProvisioning:
    """Page B2 (SBC-3, 6.6): by what the device unmaps, UNMAP, WRITE SAME(16) and (10).

    `lbprz`: unmapped blocks read zeros; `type`: 0 not said or fully provisioned, 1 resource
    provisioned, 2 thin.
    """

    lbpu: bool = False
    lbpws: bool = False
    lbpws10: bool = False
    lbprz: bool = False
    type: int = 0

    def encode(self) -> bytes:
        bits = 0x80 * self.lbpu | 0x40 * self.lbpws | 0x20 * self.lbpws10 | 0x04 * self.lbprz
        return encode_page(Page.LOGICAL_BLOCK_PROVISIONING, bytes((0, bits, self.type, 0)))

    @classmethod
    def decode(cls, data: bytes) -> LogicalBlockProvisioning:
        """What did not come is 0."""
        _, bits, type_ = _body(data, Page.LOGICAL_BLOCK_PROVISIONING)[:3].ljust(3, b"\0")
        lbpu, lbpws, lbpws10, lbprz = (bool(bits & mask) for mask in (0x80, 0x40, 0x20, 0x04))
        return cls(lbpu, lbpws, lbpws10, lbprz, type_ & 7)


_CDB_10 = ">BBIBHB"  # opcode, flags, block, group, number of blocks, control
_CDB_16 = ">BBQIBB"  # opcode, flags, block, number of blocks, group, control
_FUA = 0x08
_UNMAP = 0x08
_UNMAP_HEADER = struct.Struct(">HH4x")  # length of what follows, of the descriptors in it
_UNMAP_RANGE = struct.Struct(">QI4x")
_INQUIRY_SIZE = 36
_LAST_10 = 0xFFFFFFFF
_LUN_MAX = 16383
_OFF_T_MAX = 2**63 - 1  # bytes; so every offset on the disk fits a signed 64-bit number
_CAPACITY_16 = struct.Struct(">QIBBH")
_PAGE = struct.Struct(">BBH")
_LIMITS = struct.Struct(">BBHIIIIIIIQ")
_UGAVALID = 1 << 31


def _cdb(layout: str, opcode: OpCode, *fields: int) -> bytes:
    try:
        return struct.pack(layout, opcode, *fields)
    except struct.error as error:
        numbers = ", ".join(map(str, fields))
        raise RequestError(f"{opcode.name} has no room for one of {numbers}: {error}") from error


def _blocks(last: int, block_size: int) -> int:
    size = (last + 1) * block_size
    if not 0 < size <= _OFF_T_MAX:
        raise ProtocolError(f"capacity of {size} bytes, want 1 to {_OFF_T_MAX}")
    return last + 1


def _body(data: bytes, page: Page) -> bytes:
    if len(data) < _PAGE.size:
        raise ProtocolError(f"VPD page of {len(data)} bytes, want {_PAGE.size} or more")
    _, came, length = _PAGE.unpack_from(data)
    if came != page:
        raise ProtocolError(f"VPD page {came:#04x} came, want {page:#04x}")
    return data[_PAGE.size : _PAGE.size + length]


def _pad(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size].ljust(size)


def _text(data: bytes) -> str:
    return bytes(data).decode("ascii", "replace").strip(" \0")
