"""SCSI targets: command descriptor blocks in, status, sense and data out; no virtio anywhere."""

import itertools

import pytest

from virtio.errors import RequestError
from virtio.target.scsi import CAPACITY_CHANGED, LUNS_CHANGED, LogicalUnit, Overrun, ReportLuns, Target
from virtio.target.store import Faults, FaultyStore, MemoryStore, Store
from virtio.wire.scsi import Sense, SenseKey

GOOD, CHECK_CONDITION = 0x00, 0x02
MIB = 1 << 20

# Sense key, additional sense code, qualifier.
INVALID_OPCODE = (5, 0x20, 0x00)
LBA_OUT_OF_RANGE = (5, 0x21, 0x00)
INVALID_FIELD = (5, 0x24, 0x00)
NOT_SUPPORTED = (5, 0x25, 0x00)
INVALID_PARAMETER = (5, 0x26, 0x00)
LIST_LENGTH = (5, 0x1A, 0x00)
SAVING = (5, 0x39, 0x00)
WRITE_PROTECTED = (7, 0x27, 0x00)
POWER_ON = (6, 0x29, 0x00)
READ_ERROR = (3, 0x11, 0x00)
WRITE_ERROR = (3, 0x0C, 0x00)


def disk(store: Store | None = None) -> Target:
    """A target with one unit, whose unit attention is over; 2,048 blocks of 512 bytes."""
    target = Target({0: LogicalUnit(store or MemoryStore(MIB, serial="S/N"))})
    target.handle(0, bytes(6))
    return target


def ask(target: Target, cdb: bytes, room: int = 0, data: bytes = b"", *, lun: int = 0) -> bytes:
    """The data of a command that must end GOOD."""
    into = memoryview(bytearray(b"\xee" * room))
    status, sense, taken, given = target.handle(lun, cdb, [memoryview(data)], [into])
    assert (status, sense) == (GOOD, b"")
    assert set(into[given:]) <= {0xEE}
    return bytes(into[:given])


def refused(
    target: Target, cdb: bytes, data: bytes = b"", room: int = 4096, *, lun: int = 0
) -> tuple[int, ...]:
    """Key, code and qualifier of a command that must not end GOOD."""
    into = [memoryview(bytearray(room))]
    status, sense, _, given = target.handle(lun, cdb, [memoryview(data)], into)
    assert (status, given, len(sense), sense[0], sense[7]) == (CHECK_CONDITION, 0, 18, sense[0] | 0x70, 10)
    return sense[2], sense[12], sense[13]


def cdb_10(opcode: int, lba: int = 0, blocks: int = 0, flags: int = 0) -> bytes:
    return bytes([opcode, flags]) + lba.to_bytes(4, "big") + b"\0" + blocks.to_bytes(2, "big") + b"\0"


def cdb_16(opcode: int, lba: int = 0, blocks: int = 0, flags: int = 0) -> bytes:
    return bytes([opcode, flags]) + lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + b"\0\0"


def test_the_first_command_to_each_unit_is_told_of_the_reset():
    target = Target({0: LogicalUnit(MemoryStore(MIB)), 1: LogicalUnit(MemoryStore(MIB))})
    ask(target, b"\x12\0\0\0\x24\0", 36)  # INQUIRY
    ask(target, b"\xa0\0\0\0\0\0\0\0\0\x20\0\0", 32)  # REPORT LUNS
    assert refused(target, bytes(6)) == POWER_ON  # TEST UNIT READY
    ask(target, bytes(6))
    # REQUEST SENSE brings the same, as data; then there is nothing more to say
    assert ask(target, b"\x03\0\0\0\x12\0", 18, lun=1).hex() == "700006000000000a0000000029000000" + "0000"
    assert ask(target, b"\x03\0\0\0\x12\0", 18, lun=1).hex() == "700000000000000a0000000000000000" + "0000"
    ask(target, bytes(6), lun=1)
    target.units[0].reset()
    assert refused(target, bytes(6)) == POWER_ON


def test_inquiry():
    data = ask(disk(), b"\x12\0\0\0\xff\0", 255)
    assert data == (
        b"\x00"  # qualifier 0: connected; type 0: direct access
        b"\x00"  # not removable
        b"\x06"  # SPC-4
        b"\x12"  # hierarchical LUNs, response format 2
        b"\x1f"  # 31 bytes follow
        b"\0\0\x02"  # commands may be queued
        b"VIRTIO  "
        b"bdev target     "
        b"1   "
    )
    assert ask(disk(), b"\x12\0\0\0\x05\0", 5) == data[:5]  # as much as was allocated
    assert ask(disk(), b"\x12\0\0\0\0\0") == b""


@pytest.mark.parametrize(
    ("page", "data"),
    [
        (0x00, "00 00 0006 00 80 83 b0 b1 b2"),
        (0x80, "00 80 0003 532f4e"),
        # ASCII, about the unit, T10 vendor identification: the vendor, then the serial number
        (0x83, "00 83 001b 02 01 00 0b 56495254494f2020 532f4e"
               # binary, about the unit, NAA: 3, locally assigned, then 60 bits from the serial number
               "01 03 00 08 3fdff158898627e7"),
        # WSNZ, at most 255 blocks in a COMPARE AND WRITE, no granularity, at most 65535 blocks in a
        # transfer, no optimum, no PREFETCH, 2**22 blocks and 256 descriptors in an UNMAP, granule 8 and
        # its alignment 0 (valid), 2**22 blocks in a WRITE SAME
        (0xB0, "00 b0 003c 01 ff 0000 0000ffff 00000000 00000000 00400000 00000100 00000008 80000000"
               "0000000000400000" + "00" * 20),
        (0xB1, "00 b1 003c 0001" + "00" * 58),  # does not rotate
        # no threshold; UNMAP, both WRITE SAMEs and zeros after it; thin
        (0xB2, "00 b2 0004 00 e4 02 00"),
    ],
)  # fmt: skip
def test_vital_product_data(page, data):
    assert ask(disk(), bytes([0x12, 1, page, 1, 0, 0]), 256) == bytes.fromhex(data)


@pytest.mark.parametrize("cdb", [b"\x12\0\x80\0\xff\0", b"\x12\1\x99\0\xff\0"])
def test_pages_that_there_are_not(cdb):
    assert refused(disk(), cdb) == INVALID_FIELD


def test_a_unit_that_there_is_not():
    target = disk()
    assert ask(target, b"\x12\0\0\0\x24\0", 36, lun=7)[0] == 0x7F  # qualifier 3, type 1F
    assert refused(target, bytes(6), lun=7) == NOT_SUPPORTED
    assert refused(target, b"\x12\1\0\0\xff\0", lun=7) == NOT_SUPPORTED
    assert ask(target, b"\x03\0\0\0\x12\0", 18, lun=7)[12:14] == b"\x25\0"


def test_report_luns():
    units = {lun: LogicalUnit(MemoryStore(MIB)) for lun in (300, 0, 5)}
    data = (
        b"\0\0\0\x18\0\0\0\0"  # 24 bytes of list
        b"\0\0\0\0\0\0\0\0"  # 0
        b"\0\x05\0\0\0\0\0\0"  # 5, peripheral
        b"\x41\x2c\0\0\0\0\0\0"  # 300, flat
    )
    assert ask(Target(units), b"\xa0\0\0\0\0\0\0\0\x10\0\0\0", 4096) == data
    assert ask(Target(units), b"\xa0\0\0\0\0\0\0\0\0\x10\0\0", 4096) == data[:16]
    assert ask(Target(units), b"\xa0\0\0\0\0\0\0\0\x10\0\0\0", 4096, lun=9) == data
    assert ask(Target(units), b"\xa0\0\1\0\0\0\0\0\x10\0\0\0", 4096) == bytes(8)  # no well-known ones
    assert refused(Target(units), b"\xa0\0\3\0\0\0\0\0\x10\0\0\0") == INVALID_FIELD


def test_capacity():
    target = disk(MemoryStore(MIB, block_size=4096))
    assert ask(target, b"\x25" + bytes(9), 8) == b"\0\0\0\xff\0\0\x10\0"  # last block, block size
    assert ask(target, b"\x9e\x10" + bytes(10) + b"\0\x20\0\0", 32) == (
        b"\0\0\0\0\0\0\0\xff" b"\0\0\x10\0"
        b"\0\0"  # no protection; as large as a physical block
        b"\xc0\0"  # thin, unmapped blocks read zeros; aligned at 0
    ) + bytes(16)  # fmt: skip
    assert ask(target, b"\x9e\x10" + bytes(10) + b"\0\x0c\0\0", 32) == b"\0\0\0\0\0\0\0\xff\0\0\x10\0"
    assert refused(target, b"\x9e\x12" + bytes(14)) == INVALID_FIELD  # GET LBA STATUS


CACHING = b"\x08\x12\x04" + bytes(17)  # page, length, write cache enabled
CONTROL = b"\x0a\x0a" + bytes(10)


@pytest.mark.parametrize("read_only", [False, True])
def test_mode_sense(read_only):
    target = disk(MemoryStore(MIB, read_only=read_only))
    bits = b"\x90" if read_only else b"\x10"  # write protected; FUA and DPO are taken
    six = b"\x23\0" + bits + b"\0" + CACHING + CONTROL  # length, medium type, bits, no block descriptors
    ten = b"\0\x26\0" + bits + bytes(4) + CACHING + CONTROL
    assert ask(target, b"\x1a\0\x3f\0\xff\0", 255) == six
    assert ask(target, b"\x5a\0\x3f\0\0\0\0\1\0\0", 256) == ten
    assert ask(target, b"\x1a\0\x08\0\xff\0", 255) == b"\x17\0" + bits + b"\0" + CACHING
    # what can be changed: nothing
    assert ask(target, b"\x1a\0\x48\0\xff\0", 255) == b"\x17\0" + bits + b"\0" + b"\x08\x12" + bytes(18)
    assert refused(target, b"\x1a\0\xc8\0\xff\0") == SAVING
    assert refused(target, b"\x1a\0\x01\0\xff\0") == INVALID_FIELD  # no such page
    assert refused(target, b"\x1a\0\x08\1\xff\0") == INVALID_FIELD  # no such subpage


READS = {
    "READ(6)": b"\x08\0\0\x02\x03\0",
    "READ(10)": cdb_10(0x28, 2, 3),
    "READ(10) FUA": cdb_10(0x28, 2, 3, 8),
    "READ(12)": b"\xa8\0\0\0\0\x02\0\0\0\x03\0\0",
    "READ(16)": cdb_16(0x88, 2, 3),
}
WRITES = {
    "WRITE(6)": b"\x0a\0\0\x02\x03\0",
    "WRITE(10)": cdb_10(0x2A, 2, 3),
    "WRITE(10) FUA": cdb_10(0x2A, 2, 3, 8),
    "WRITE(12)": b"\xaa\0\0\0\0\x02\0\0\0\x03\0\0",
    "WRITE(16)": cdb_16(0x8A, 2, 3),
}


@pytest.mark.parametrize(
    ("write", "read"), list(zip(WRITES.values(), READS.values(), strict=True)), ids=list(WRITES)
)
def test_what_is_written_is_read(write, read):
    target = disk()
    data = bytes(range(256)) * 6
    assert ask(target, write, data=data) == b""
    assert ask(target, read, 1536) == data
    assert ask(target, cdb_10(0x28, 1, 5), 2560) == bytes(512) + data + bytes(512)


def test_data_may_be_in_pieces_and_buffers_longer_than_it():
    target = disk()
    out = [memoryview(b"a" * 100), memoryview(b"b" * 500)]
    assert target.handle(0, cdb_10(0x2A, 0, 1), out)[2:] == (512, 0)
    into = [memoryview(bytearray(300)) for _ in range(3)]
    assert target.handle(0, cdb_10(0x28, 0, 1), (), into)[2:] == (0, 512)
    assert b"".join(into) == b"a" * 100 + b"b" * 412 + bytes(388)


def test_a_length_of_zero_is_256_blocks_in_the_shortest_command_only():
    target = disk()
    assert len(ask(target, b"\x08\0\0\0\0\0", 256 * 512)) == 256 * 512
    assert ask(target, cdb_10(0x28, 2048, 0), 512) == b""  # none, at the end


@pytest.mark.parametrize("cdb", [*READS.values(), *WRITES.values()], ids=[*READS, *WRITES])
def test_too_little_data_or_room_is_an_overrun(cdb):
    with pytest.raises(Overrun):
        disk().handle(0, cdb, [memoryview(bytes(1535))], [memoryview(bytearray(1535))])


@pytest.mark.parametrize(
    "cdb",
    [
        b"\x08\x1f\xff\xff\x01\0",
        cdb_10(0x28, 2048, 1),
        cdb_10(0x2A, 2047, 2),
        cdb_16(0x88, 2**64 - 1, 1),
        cdb_16(0x8A, 2**64 - 1, 2**32 - 1),
        cdb_10(0x2F, 2048, 1),  # VERIFY
        cdb_10(0x35, 2049, 0),  # SYNCHRONIZE CACHE
        cdb_16(0x93, 2048, 1),  # WRITE SAME
    ],
    ids=bytes.hex,
)
def test_blocks_past_the_end(cdb):
    assert refused(disk(), cdb, bytes(1024)) == LBA_OUT_OF_RANGE


@pytest.mark.parametrize("opcode", [0x28, 0x2A, 0x2F])
def test_protection_information_is_not_supported(opcode):
    assert refused(disk(), cdb_10(opcode, 0, 1, 0x20), bytes(512)) == INVALID_FIELD


def test_a_transfer_longer_than_page_b0_allows():
    target = disk(MemoryStore(64 * MIB))
    assert refused(target, cdb_16(0x88, 0, 65536)) == INVALID_FIELD
    assert refused(target, cdb_16(0x8A, 0, 65536)) == INVALID_FIELD


@pytest.mark.parametrize(
    "cdb", [cdb_10(0x35), cdb_16(0x91), cdb_10(0x35, 5, 6), b"\x1b\0\0\0\1\0", cdb_10(0x2F, 0, 9)]
)
def test_commands_without_data(cdb):
    assert ask(disk(), cdb) == b""


def test_commands_that_there_are_not():
    known = {0x00, 0x03, 0x08, 0x0A, 0x12, 0x1A, 0x1B, 0x25, 0x28, 0x2A, 0x2F, 0x35, 0x41, 0x42, 0x5A, 0x88,
             0x89, 0x8A, 0x8F, 0x91, 0x93, 0x9E, 0xA0, 0xA8, 0xAA}  # fmt: skip
    target = disk()
    for opcode in set(range(256)) - known:
        assert refused(target, bytes([opcode]) + bytes(15)) == INVALID_OPCODE


def unmap(*ranges: tuple[int, int]) -> tuple[bytes, bytes]:
    """The command, and its parameter list."""
    body = b"".join(lba.to_bytes(8, "big") + blocks.to_bytes(4, "big") + bytes(4) for lba, blocks in ranges)
    data = (6 + len(body)).to_bytes(2, "big") + len(body).to_bytes(2, "big") + bytes(4) + body
    return b"\x42\0\0\0\0\0\0" + len(data).to_bytes(2, "big") + b"\0", data


def first_bytes(target: Target, blocks: int = 8) -> list[int]:
    """The first byte of each of the first blocks."""
    return list(ask(target, cdb_10(0x28, 0, blocks), blocks * 512)[::512])


def test_unmapped_blocks_read_zeros():
    target = disk()
    ask(target, cdb_10(0x2A, 0, 8), data=b"x" * 4096)
    cdb, data = unmap((0, 1), (3, 2), (7, 0))
    ask(target, cdb, data=data)
    assert first_bytes(target) == [0, 120, 120, 0, 0, 120, 120, 120]
    ask(target, unmap()[0], data=unmap()[1])
    ask(target, b"\x42" + bytes(9))  # no parameter list is no error


@pytest.mark.parametrize(
    ("cdb", "data", "expected"),
    [
        (*unmap((0, 1), (2048, 1)), LBA_OUT_OF_RANGE),
        (*unmap((2**64 - 1, 2**32 - 1)), LBA_OUT_OF_RANGE),
        (*unmap(*[(0, 1)] * 257), INVALID_PARAMETER),
        (b"\x42\1" + unmap((0, 1))[0][2:], unmap((0, 1))[1], INVALID_FIELD),  # ANCHOR
        (b"\x42\0\0\0\0\0\0\0\7\0", bytes(7), LIST_LENGTH),
        (b"\x42\0\0\0\0\0\0\0\x10\0", unmap((0, 1))[1][:16], LIST_LENGTH),
    ],
)
def test_an_unmap_is_checked_before_anything_is_unmapped(cdb, data, expected):
    target = disk()
    ask(target, cdb_10(0x2A, 0, 8), data=b"x" * 4096)
    assert refused(target, cdb, data) == expected
    assert first_bytes(target) == [120] * 8


@pytest.mark.parametrize("cdb", [cdb_10(0x41, 2, 3), cdb_16(0x93, 2, 3)], ids=["10", "16"])
def test_write_same(cdb):
    target = disk()
    ask(target, cdb, data=b"y" * 512)
    assert first_bytes(target) == [0, 0, 121, 121, 121, 0, 0, 0]
    ask(target, cdb, data=bytes(512))
    assert first_bytes(target) == [0] * 8


def test_write_same_of_more_than_is_written_at_once():
    target = disk(MemoryStore(4 * MIB))
    ask(target, cdb_16(0x93, 1, 5000), data=b"ab" * 256)
    assert ask(target, cdb_16(0x88, 0, 5002), 5002 * 512) == bytes(512) + b"ab" * 256 * 5000 + bytes(512)


def test_write_same_may_come_without_a_block_and_unmap():
    target = disk()
    ask(target, cdb_10(0x2A, 0, 8), data=b"x" * 4096)
    ask(target, cdb_16(0x93, 0, 2, 0x01))  # NDOB
    ask(target, cdb_16(0x93, 4, 2, 0x08), data=bytes(512))  # UNMAP
    assert first_bytes(target) == [0, 0, 120, 120, 0, 0, 120, 120]
    assert refused(target, cdb_16(0x93, 0, 0), bytes(512)) == INVALID_FIELD  # WSNZ: not "to the end"
    assert refused(target, cdb_16(0x93, 0, 1, 0x10), bytes(512)) == INVALID_FIELD  # ANCHOR


def test_a_read_only_disk_is_not_written():
    target = disk(MemoryStore(MIB, read_only=True))
    changes = [(cdb, bytes(1536)) for cdb in WRITES.values()]
    changes += [unmap((0, 1)), (cdb_16(0x93, 0, 1), bytes(512)), (cdb_16(0x93, 0, 1), b"x" * 512)]
    for cdb, data in changes:
        assert refused(target, cdb, data) == WRITE_PROTECTED
    ask(target, cdb_10(0x35))
    ask(target, cdb_10(0x28, 0, 1), 512)


def test_failures_of_the_store_are_medium_errors_that_say_where():
    faults = Faults({"read": 5 * 512, "write": 6 * 512, "zero": 0, "flush": 0})
    store = FaultyStore(MemoryStore(MIB), faults)
    target = disk(store)
    assert refused(target, cdb_10(0x28, 4, 2)) == READ_ERROR
    assert refused(target, cdb_10(0x2A, 6, 1), bytes(512)) == WRITE_ERROR
    assert refused(target, cdb_10(0x2A, 0, 1, 8), bytes(512)) == WRITE_ERROR  # FUA
    assert refused(target, cdb_10(0x35)) == WRITE_ERROR
    assert refused(target, *unmap((0, 1))) == WRITE_ERROR
    status, sense, *_ = target.handle(0, cdb_10(0x28, 5, 1), (), [memoryview(bytearray(512))])
    assert sense[0] == 0xF0 and sense[3:7] == b"\0\0\0\x05"  # information is valid: block 5


def test_any_bytes_at_all_get_an_answer():
    target = disk()
    room = memoryview(bytearray(1 << 16))
    for opcode, one, two in itertools.product(range(256), (0, 1, 0xFF), (0, 0x80, 0xFF)):
        for cdb in (bytes([opcode, one, two]), bytes([opcode, one, two]).ljust(32, b"\xff")):
            try:
                status, *_ = target.handle(0, cdb, [room], [room])
            except Overrun:
                continue
            assert status in (GOOD, CHECK_CONDITION)


def compare_and_write(lba: int, blocks: int, flags: int = 0) -> bytes:
    #      operation, flags     logical block address     reserved        blocks, group, control
    return bytes([0x89, flags]) + lba.to_bytes(8, "big") + bytes(3) + bytes([blocks, 0, 0])


def test_what_compares_is_written_and_nothing_else():
    target = disk()
    ask(target, cdb_10(0x2A, 4, 2), data=b"a" * 1024)
    ask(target, compare_and_write(4, 2), data=b"a" * 1024 + b"b" * 1024)
    assert ask(target, cdb_10(0x28, 3, 4), 2048) == bytes(512) + b"b" * 1024 + bytes(512)
    data = b"b" * 700 + b"x" + b"b" * 323 + b"c" * 1024
    status, sense, *_ = target.handle(0, compare_and_write(4, 2), [memoryview(data)])
    assert status == CHECK_CONDITION
    # fixed format with valid information; MISCOMPARE; offset 700 of the first that differs; 10 bytes more;
    # MISCOMPARE DURING VERIFY OPERATION
    assert sense.hex() == "f0000e" + "000002bc" + "0a" + "00000000" + "1d00" + "00000000"
    assert ask(target, cdb_10(0x28, 4, 2), 1024) == b"b" * 1024


def test_compare_and_write_of_nothing_of_too_much_and_past_the_end():
    target = disk()
    ask(target, compare_and_write(0, 0))
    ask(target, compare_and_write(0, 255), data=bytes(255 * 1024))
    assert refused(target, compare_and_write(2047, 2), bytes(2048)) == LBA_OUT_OF_RANGE
    assert refused(target, compare_and_write(0, 1, 0x20), bytes(1024)) == INVALID_FIELD  # protection
    with pytest.raises(Overrun):
        target.handle(0, compare_and_write(0, 1), [memoryview(bytes(1023))])
    assert refused(disk(MemoryStore(MIB, read_only=True)), compare_and_write(0, 1), bytes(1024)) == (
        WRITE_PROTECTED
    )


def test_compare_and_write_meets_bad_blocks_and_is_made_durable_where_it_asks():
    faults = Faults({"read": 5 * 512, "write": 6 * 512, "flush": 0})
    target = disk(FaultyStore(MemoryStore(MIB), faults))
    assert refused(target, compare_and_write(5, 1), bytes(1024)) == READ_ERROR
    assert refused(target, compare_and_write(6, 1), bytes(1024)) == WRITE_ERROR
    ask(target, compare_and_write(7, 1), data=bytes(1024))
    assert refused(target, compare_and_write(7, 1, 8), bytes(1024)) == WRITE_ERROR  # FUA, so the flush


def test_a_unit_tells_all_that_happened_one_at_a_time():
    target = disk()
    unit = target.units[0]
    unit.attend(CAPACITY_CHANGED)
    unit.attend(LUNS_CHANGED)
    unit.attend(CAPACITY_CHANGED)  # once is enough
    unit.attend_next(Sense(SenseKey.UNIT_ATTENTION, 0x3F, 0x01))
    assert [refused(target, bytes(6)) for _ in range(3)] == [(6, 0x3F, 1), (6, 0x2A, 9), (6, 0x3F, 0x0E)]
    ask(target, bytes(6))
    unit.attend(CAPACITY_CHANGED)
    unit.attend_next(Sense(SenseKey.UNIT_ATTENTION, 0x3F, 0x01))
    unit.reset()  # whoever is told of that looks at everything
    unit.attend(LUNS_CHANGED)
    assert [refused(target, bytes(6)) for _ in range(2)] == [POWER_ON, (6, 0x3F, 1)]
    ask(target, bytes(6))
    unit.attend(CAPACITY_CHANGED)
    assert ask(target, b"\x03\0\0\0\x12\0", 18)[12:14] == b"\x2a\x09"  # REQUEST SENSE
    ask(target, bytes(6))


def test_unit_attentions_do_not_pile_up_for_ever():
    unit = disk().units[0]
    for code in range(16):
        unit.attend_next(Sense(SenseKey.UNIT_ATTENTION, 0x3F, code))
    with pytest.raises(RequestError, match="16 unit attentions wait already"):
        unit.attend_next(Sense(SenseKey.UNIT_ATTENTION, 0x3F, 99))


def test_who_asks_for_the_units_need_not_be_told_that_they_changed():
    target = disk()
    target.units[0].attend(LUNS_CHANGED)
    ask(target, b"\xa0\0\0\0\0\0\0\0\0\x20\0\0", 32)  # REPORT LUNS
    ask(target, bytes(6))


def test_a_unit_of_another_size():
    target = disk()
    target.units[0].resize(4 * MIB)
    assert refused(target, bytes(6)) == (6, 0x2A, 9)
    assert ask(target, cdb_10(0x25), 8) == (8191).to_bytes(4, "big") + (512).to_bytes(4, "big")
    ask(target, cdb_10(0x2A, 8191, 1), data=b"x" * 512)
    target.units[0].resize(MIB)
    assert refused(target, bytes(6)) == (6, 0x2A, 9)
    assert refused(target, cdb_10(0x28, 2048, 1)) == LBA_OUT_OF_RANGE
    ask(target, cdb_10(0x28, 2047, 1), 512)


def well_known(cdb: bytes, room: int = 256) -> tuple[int, bytes, bytes]:
    """Status, sense data and data of a command to the unit that knows all others: two of them."""
    unit = ReportLuns(b"\xc1\1".ljust(8, b"\0"), lambda: [b"firstlun", b"otherlun"])
    into = memoryview(bytearray(room))
    status, sense, _, given = unit.handle(0, cdb, (), [into])
    return status, sense, bytes(into[:given])


def test_the_well_known_unit_lists_the_others():
    report = lambda what: well_known(bytes([0xA0, 0, what, 0, 0, 0, 0, 0, 1, 0, 0, 0]))  # noqa: E731
    own = b"\xc1\1\0\0\0\0\0\0"
    assert report(0) == (GOOD, b"", b"\0\0\0\x10\0\0\0\0firstlunotherlun")
    assert report(1) == (GOOD, b"", b"\0\0\0\x08\0\0\0\0" + own)
    assert report(2) == (GOOD, b"", b"\0\0\0\x18\0\0\0\0" + own + b"firstlunotherlun")
    assert report(3)[1][12:14] == b"\x24\0"
    assert well_known(b"\xa0\0\0\0\0\0\0\0\0\x10\0\0", 16)[2] == b"\0\0\0\x10\0\0\0\0firstlun"


def test_what_else_the_well_known_unit_can_do():
    assert well_known(bytes(6)) == (GOOD, b"", b"")  # TEST UNIT READY
    status, _, data = well_known(b"\x12\0\0\0\x24\0")
    assert (status, data[0], len(data)) == (GOOD, 0x1E, 36)  # well-known logical unit
    assert well_known(b"\x03\0\0\0\x12\0")[2].hex() == "70000000" + "0000000a" + "00" * 10
    for cdb in (b"\x12\1\0\0\x24\0", b"\x12\0\x80\0\x24\0", b"\x03\1\0\0\x12\0"):
        assert well_known(cdb)[1][12:14] == b"\x24\0"
    assert well_known(cdb_10(0x28))[1][12:14] == b"\x20\0"
