"""SCSI commands, answers and sense data; pyscsi and sg3-utils say the same of them."""

import subprocess

import pytest
from hypothesis import given, strategies as st

from tests import needs
from virtio.errors import ProtocolError, RequestError
from virtio.wire import scsi, sense as sense_module
from virtio.wire.scsi import (
    ALL_PAGES,
    CACHING_PAGE,
    BlockLimits,
    Capacity,
    Designator,
    DesignatorType,
    Inquiry,
    LogicalBlockProvisioning,
    ModeParameters,
    OpCode,
    Page,
    Sense,
    SenseKey,
    Status,
)

U8, U16, U32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
LBA = 0x0102030405060708


# Commands.


@pytest.mark.parametrize(
    ("cdb", "expected"),
    [
        (scsi.test_unit_ready(), "00 0000000000"),
        (scsi.request_sense(), "03 00 0000 fc 00"),  # desc | reserved | allocation | control
        (scsi.inquiry(), "12 00 00 00ff 00"),  # evpd | page | allocation | control
        (scsi.inquiry(Page.SUPPORTED_PAGES), "12 01 00 00ff 00"),
        (scsi.inquiry(0x83, 4096), "12 01 83 1000 00"),
        (scsi.start_stop_unit(True), "1b 00 00 00 01 00"),  # immed | | modifier | start | control
        (scsi.start_stop_unit(False), "1b 00 00 00 00 00"),
        (scsi.mode_sense_6(ALL_PAGES), "1a 00 3f 00 ff 00"),  # dbd | page | subpage | allocation
        (scsi.mode_sense_10(8, 0x1234), "5a 00 08 00 000000 1234 00"),
        (scsi.report_luns(16), "a0 00 00 000000 00000010 00 00"),  # select | allocation
        (scsi.read_capacity_10(), "25 00 00000000 0000 00 00"),
        (scsi.read_capacity_16(), "9e 10 0000000000000000 00000020 00 00"),  # action | allocation
        (
            scsi.read_10(0x01020304, 0x0506),
            "28 00 01020304 00 0506 00",
        ),  # flags | lba | group | blocks
        (scsi.read_10(0, 1, fua=True), "28 08 00000000 00 0001 00"),
        (scsi.write_10(0x01020304, 0x0506, fua=True), "2a 08 01020304 00 0506 00"),
        (
            scsi.read_16(LBA, 0x0A0B0C0D),
            "88 00 0102030405060708 0a0b0c0d 00 00",
        ),  # | blocks | group
        (scsi.write_16(LBA, 0x0A0B0C0D, fua=True), "8a 08 0102030405060708 0a0b0c0d 00 00"),
        (scsi.synchronize_cache_10(), "35 00 00000000 00 0000 00"),
        (scsi.synchronize_cache_16(LBA, 9), "91 00 0102030405060708 00000009 00 00"),
        (scsi.unmap(24), "42 00 00000000 00 0018 00"),  # anchor | | group | parameter length
        (scsi.write_same_16(LBA, 8), "93 00 0102030405060708 00000008 00 00"),
        (scsi.write_same_16(LBA, 8, unmap=True), "93 08 0102030405060708 00000008 00 00"),
        (scsi.write_same_10(0x01020304, 8, unmap=True), "41 08 01020304 00 0008 00"),
        (scsi.compare_and_write(LBA, 2), "89 00 0102030405060708 000000 02 00 00"),  # | blocks | group
    ],
    ids=lambda value: value[:14] if isinstance(value, str) else "",
)
def test_a_command_has_each_field_in_its_place(cdb: bytes, expected: str):
    assert cdb == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: scsi.read_10(2**32, 1), "READ_10"),
        (lambda: scsi.write_10(0, 65536), "WRITE_10"),  # SPDK's initiator cuts this to 0 in silence
        (lambda: scsi.read_16(-1, 1), "READ_16"),
        (lambda: scsi.mode_sense_6(8, 256), "MODE_SENSE_6"),
    ],
)
def test_what_a_command_has_no_room_for_is_never_cut(build, name: str):
    with pytest.raises(RequestError, match=f"{name} has no room for one of"):
        build()


def pyscsi(module: str, command: str, opcode: str, *args: int | bytes | bytearray, **fields: int) -> bytes:
    """The command as pyscsi builds it."""
    opcodes = needs.module("pyscsi.pyscsi.scsi_enum_command").sbc
    builder = getattr(needs.module(f"pyscsi.pyscsi.{module}"), command)
    return bytes(builder(getattr(opcodes, opcode), *args, **fields).cdb)


@pytest.mark.parametrize("fua", [False, True])
@pytest.mark.parametrize(("lba", "blocks"), [(0, 0), (1, 1), (0x01020304, 0x0506), (2**32 - 1, 65535)])
def test_pyscsi_builds_the_same_reads_and_writes(lba: int, blocks: int, fua: bool):
    for module, command, opcode, build in (
        ("scsi_cdb_read10", "Read10", "READ_10", scsi.read_10),
        ("scsi_cdb_read16", "Read16", "READ_16", scsi.read_16),
    ):
        theirs = pyscsi(module, command, opcode, 1, lba, blocks, fua=fua)
        assert build(lba, blocks, fua=fua) == theirs
    for module, command, opcode, build in (
        ("scsi_cdb_write10", "Write10", "WRITE_10", scsi.write_10),
        ("scsi_cdb_write16", "Write16", "WRITE_16", scsi.write_16),
    ):
        theirs = pyscsi(module, command, opcode, 1, lba, blocks, bytearray(), fua=fua)
        assert build(lba, blocks, fua=fua) == theirs
    theirs = pyscsi("scsi_cdb_writesame16", "WriteSame16", "WRITE_SAME_16", 1, lba, blocks, b"", unmap=fua)
    assert scsi.write_same_16(lba, blocks, unmap=fua) == theirs
    theirs = pyscsi("scsi_cdb_writesame10", "WriteSame10", "WRITE_SAME_10", 1, lba, blocks, b"", unmap=fua)
    assert scsi.write_same_10(lba, blocks, unmap=fua) == theirs


def test_pyscsi_builds_the_same_enquiries():
    assert scsi.inquiry(None, 96) == pyscsi("scsi_cdb_inquiry", "Inquiry", "INQUIRY", alloclen=96)
    assert scsi.inquiry(0xB0, 64) == pyscsi("scsi_cdb_inquiry", "Inquiry", "INQUIRY", 1, 0xB0, 64)
    assert scsi.test_unit_ready() == pyscsi("scsi_cdb_testunitready", "TestUnitReady", "TEST_UNIT_READY")
    assert scsi.mode_sense_6(8) == pyscsi(
        "scsi_cdb_modesense6", "ModeSense6", "MODE_SENSE_6", 8, alloclen=255
    )
    assert scsi.mode_sense_10(8) == pyscsi(
        "scsi_cdb_modesense10", "ModeSense10", "MODE_SENSE_10", 8, alloclen=255
    )
    assert scsi.report_luns(512) == pyscsi("scsi_cdb_report_luns", "ReportLuns", "REPORT_LUNS", alloclen=512)
    assert scsi.read_capacity_10() == pyscsi("scsi_cdb_readcapacity10", "ReadCapacity10", "READ_CAPACITY_10")
    assert scsi.read_capacity_16() == pyscsi("scsi_cdb_readcapacity16", "ReadCapacity16", "SBC_OPCODE_9E")


def sg_decode_sense(*args: str) -> str:
    """What sg3-utils makes of bytes, in small letters."""
    program = needs.program("sg_decode_sense")
    return subprocess.run([program, *args], capture_output=True, text=True, check=True).stdout.lower()


@pytest.mark.parametrize(
    ("cdb", "name"),
    [
        (scsi.request_sense(), "request sense"),
        (scsi.start_stop_unit(True), "start stop unit"),
        (scsi.synchronize_cache_10(), "synchronize cache(10)"),
        (scsi.synchronize_cache_16(), "synchronize cache(16)"),
        (scsi.unmap(24), "unmap"),
        (scsi.write_same_10(0, 1), "write same(10)"),
        (scsi.compare_and_write(0, 1), "compare and write"),
        (scsi.read_capacity_16(), "read capacity(16)"),
        (scsi.report_luns(16), "report luns"),
    ],
)
def test_sg3_utils_has_the_same_name_for_a_command(cdb: bytes, name: str):
    assert name in sg_decode_sense("--cdb", *cdb.hex(" ").split())


def test_status_codes_are_those_of_the_standard():
    assert [(status.name, status.value) for status in Status] == [
        ("GOOD", 0x00),
        ("CHECK_CONDITION", 0x02),
        ("CONDITION_MET", 0x04),
        ("BUSY", 0x08),
        ("RESERVATION_CONFLICT", 0x18),
        ("TASK_SET_FULL", 0x28),
        ("ACA_ACTIVE", 0x30),
        ("TASK_ABORTED", 0x40),
    ]


def test_an_unmap_list_has_a_header_of_eight_bytes_and_sixteen_for_each_range():
    encoded = bytes.fromhex(
        "0026"  # unmap data length: 38, what follows
        "0020"  # block descriptor data length: 32
        "00000000"
        "0102030405060708 00000010 00000000"  # lba | blocks | reserved
        "0000000000000000 ffffffff 00000000"
    )
    ranges = [(LBA, 16), (0, 2**32 - 1)]
    assert scsi.unmap_parameters(ranges) == encoded
    assert scsi.decode_unmap_parameters(encoded) == ranges
    assert scsi.decode_unmap_parameters(encoded + bytes(16)) == ranges
    assert scsi.unmap_parameters([]) == bytes.fromhex("0006 0000 00000000")
    with pytest.raises(ProtocolError, match="31 bytes, its length says 32"):
        scsi.decode_unmap_parameters(encoded[:-1])
    with pytest.raises(ProtocolError, match="7 bytes, want 8"):
        scsi.decode_unmap_parameters(encoded[:7])


# Answers.


def test_standard_inquiry_data_has_each_field_in_its_place():
    encoded = (
        bytes.fromhex(
            "00"  # qualifier 0, direct access block device
            "80"  # removable
            "06"  # version: SPC-4
            "12"  # hierarchical support, response data format 2
            "1f"  # additional length: 31
            "000002"  # commands may be queued
        )
        + b"QEMU    "
        + b"QEMU HARDDISK   "
        + b"2.5+"
    )
    inquiry = Inquiry(0, 0, True, 6, "QEMU", "QEMU HARDDISK", "2.5+")
    assert inquiry.encode() == encoded
    assert Inquiry.decode(encoded + bytes(60)) == inquiry


def test_a_qualifier_says_that_nothing_is_there():
    inquiry = Inquiry.decode(b"\x7f" + bytes(35))
    assert (inquiry.qualifier, inquiry.peripheral_type, inquiry.vendor) == (3, 0x1F, "")


def test_inquiry_texts_are_cut_or_padded():
    encoded = Inquiry(vendor="much too long", product="é", revision="").encode()
    assert encoded[8:] == b"much too" + b"?".ljust(16) + b"    "


def test_read_capacity_10_gives_blocks_or_says_to_ask_again():
    capacity = Capacity.decode_10(bytes.fromhex("0001ffff 00000200"))  # last block | block size
    assert capacity == Capacity(131072, 512)
    assert capacity.encode_10() == bytes.fromhex("0001ffff 00000200")
    assert Capacity.decode_10(bytes.fromhex("ffffffff 00000200")) is None
    assert Capacity(2**32, 512).encode_10() == bytes.fromhex("ffffffff 00000200")
    assert Capacity(2**40, 512).encode_10() == bytes.fromhex("ffffffff 00000200")


def test_read_capacity_16_has_each_field_in_its_place():
    encoded = bytes.fromhex(
        "000000ffffffffff"  # last block
        "00001000"  # block size: 4096
        "03"  # protection: type 2, enabled
        "03"  # 2**3 blocks in a physical one
        "c007"  # lbpme, lbprz, lowest aligned block: 7
    ) + bytes(16)
    capacity = Capacity(
        2**40, 4096, lbpme=True, lbprz=True, physical_exponent=3, lowest_aligned=7, protection=2
    )
    assert Capacity.decode_16(encoded) == capacity
    assert capacity.encode_16() == encoded
    theirs = needs.module("pyscsi.pyscsi.scsi_cdb_readcapacity16").ReadCapacity16.unmarshall_datain(encoded)
    assert (theirs["returned_lba"], theirs["block_length"]) == (2**40 - 1, 4096)
    assert (theirs["lbpme"], theirs["lbprz"], theirs["lbppbe"]) == (1, 1, 3)
    assert (theirs["prot_en"], theirs["p_type"], theirs["lowest_aligned_lba"]) == (1, 1, 7)


def test_a_read_capacity_16_of_twelve_bytes_has_no_more_to_say():
    assert Capacity.decode_16(bytes.fromhex("000000000000000f 00000200")) == Capacity(16, 512)


@pytest.mark.parametrize(
    "answer",
    [
        "0000000000000000 00000000",  # blocks of no size
        "ffffffffffffffff 00000200",  # more bytes than an offset can count
        "00ffffffffffffff 00000080",  # 2**63 bytes
    ],
)
def test_a_capacity_that_no_disk_has_is_refused(answer: str):
    with pytest.raises(ProtocolError, match=f"want 1 to {2**63 - 1}"):
        Capacity.decode_16(bytes.fromhex(answer))


@pytest.mark.parametrize(
    ("decode", "size"),
    [
        (Inquiry.decode, 36),
        (Capacity.decode_10, 8),
        (Capacity.decode_16, 12),
        (scsi.decode_report_luns, 8),
        (ModeParameters.decode_6, 4),
        (ModeParameters.decode_10, 8),
        (BlockLimits.decode, 4),
    ],
)
def test_a_cut_off_answer_is_refused_with_both_numbers(decode, size: int):
    with pytest.raises(ProtocolError, match=f"{size - 1} bytes, want {size}"):
        decode(bytes(size - 1))


LUNS = bytes.fromhex(
    "00000010 00000000"  # length of the list: 16 | reserved
    "0005000000000000"  # LUN 5, peripheral
    "4100000000000000"  # LUN 256, flat
)


def test_a_list_of_luns_has_eight_bytes_for_each():
    luns = scsi.decode_report_luns(LUNS)
    assert [scsi.decode_lun(lun) for lun in luns] == [5, 256]
    assert scsi.encode_report_luns(map(scsi.encode_lun, (5, 256))) == LUNS
    assert scsi.decode_report_luns(scsi.encode_report_luns([])) == []
    assert scsi.decode_report_luns(LUNS + bytes(16)) == luns  # what follows the list is none of it


def test_a_list_that_promises_more_than_came_has_what_came():
    assert len(scsi.decode_report_luns(b"\xff\xff\xff\xff" + LUNS[4:])) == 2
    assert len(scsi.decode_report_luns(LUNS[:-1])) == 1


@pytest.mark.parametrize("lun", [-1, 16384])
def test_a_lun_that_has_no_address_is_the_callers_error(lun: int):
    with pytest.raises(RequestError, match=f"LUN {lun}, there are 0 to 16383"):
        scsi.encode_lun(lun)


@given(st.integers(0, 16383))
def test_every_lun_survives_the_round_trip(lun: int):
    assert scsi.decode_lun(scsi.encode_lun(lun)) == lun


def test_mode_parameters_tell_write_protection_and_the_cache():
    short = bytes.fromhex(
        "1f 00 90 08"  # length: 31 | medium | write protected, dpofua | block descriptors: 8 bytes
        "0000000000000200"  # a block descriptor
        "88 12 04" + "00" * 17  # page 8, may be saved | length: 18 | write cache on
    )
    parameters = ModeParameters.decode_6(short)
    assert (parameters.write_protected, parameters.dpofua, parameters.write_cache) == (
        True,
        True,
        True,
    )
    assert parameters.pages == {CACHING_PAGE: b"\x04" + bytes(17)}
    long = bytes.fromhex("001a 00 90 0000 0000 08 12 04" + "00" * 17)  # length: 26, no descriptors
    assert ModeParameters.decode_10(long) == parameters
    assert parameters.encode_10() == long
    assert parameters.encode_6() == bytes.fromhex("17 00 90 00 08 12 04" + "00" * 17)


def test_without_a_caching_page_the_cache_is_unknown():
    parameters = ModeParameters.decode_6(bytes.fromhex("03 00 00 00"))
    assert (parameters.write_protected, parameters.write_cache) == (False, None)


def test_subpages_are_stepped_over():
    # page 0x0A, subpage 1, length 2 in two bytes; then page 8 of two bytes
    data = bytes.fromhex("0d 00 00 00  4a 01 0002 ffff  08 02 0400")
    assert ModeParameters.decode_6(data).pages == {8: b"\4\0"}


@given(
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.integers(1, 62), st.binary(min_size=2, max_size=9)),
)
def test_mode_parameters_survive_the_round_trip(protected: bool, dpofua: bool, pages: dict[int, bytes]):
    pages = dict([*pages.items()][:20])
    parameters = ModeParameters(protected, dpofua, pages)
    assert ModeParameters.decode_6(parameters.encode_6()) == parameters
    assert ModeParameters.decode_10(parameters.encode_10()) == parameters


# Vital product data.


def test_supported_pages_and_serial_number():
    encoded = bytes.fromhex("00 00 0003 00 80 b0")  # type | page | length | pages
    assert scsi.encode_supported_pages([0xB0, 0, 0x80]) == encoded
    assert scsi.decode_supported_pages(encoded) == [0, 0x80, 0xB0]
    assert scsi.decode_serial(bytes.fromhex("00 80 0006") + b"  ab1 and more") == "ab1"
    assert scsi.encode_serial("ab1") == b"\0\x80\0\3ab1"


def test_another_page_than_the_one_asked_for_is_refused():
    with pytest.raises(ProtocolError, match="VPD page 0x83 came, want 0x80"):
        scsi.decode_serial(bytes.fromhex("00 83 0000"))


def test_the_best_name_of_a_unit_is_its_own_and_unique():
    def named(kind, association=0, value=b"\1\2", code_set=1):
        return scsi.Designator(kind, association, code_set, value)

    assert scsi.best_designator([]) is None
    port, nothing = named(3, association=1), named(3, value=b"")
    assert scsi.best_designator([port, nothing, named(4)]) is None
    vendor, t10, naa, uuid = named(0), named(1, code_set=2, value=b"VENDOR  1"), named(3), named(10)
    assert scsi.best_designator([vendor, t10, port]) == t10 and not t10.unique
    assert scsi.best_designator([vendor, naa, t10]) == naa and naa.unique
    assert scsi.best_designator([naa, uuid]) == uuid and uuid.unique


@pytest.mark.parametrize(("rate", "told"), [(0, 0), (1, 1), (2, 0), (0x400, 0), (7200, 7200), (0xFFFF, 0)])
def test_the_rotation_rate_is_what_the_standard_defines(rate, told):
    assert scsi.decode_rotation(scsi.encode_rotation(rate)) == told


def test_designators_name_the_logical_unit():
    encoded = bytes.fromhex(
        "00 83 003a"  # type | page | length: 58
        "01 03 00 08 5000c500a1b2c3d4"  # binary | of the unit, NAA | reserved | length
        "01 12 00 08 0025385b71b00a11"  # binary | of the port, EUI-64
        "01 0a 00 12 1000 0123456789abcdef0123456789abcdef"  # binary | of the unit, UUID
        "02 01 00 08 514d552020206131"  # ASCII | of the unit, T10 vendor identification
    )
    designators = [
        Designator(DesignatorType.NAA, 0, 1, bytes.fromhex("5000c500a1b2c3d4")),
        Designator(DesignatorType.EUI_64, 1, 1, bytes.fromhex("0025385b71b00a11")),
        Designator(DesignatorType.UUID, 0, 1, bytes.fromhex("10000123456789abcdef0123456789abcdef")),
        Designator(DesignatorType.T10_VENDOR_ID, 0, 2, b"QMU   a1"),
    ]
    assert scsi.decode_designators(encoded) == designators
    assert scsi.encode_designators(designators) == encoded
    assert [designator.describe() for designator in designators] == [
        "naa.5000c500a1b2c3d4",
        "eui.0025385b71b00a11",
        "uuid.01234567-89ab-cdef-0123-456789abcdef",
        "QMU   a1",
    ]
    assert scsi.decode_designators(encoded[:-1]) == designators[:-1]  # the last one is cut off


def test_a_designator_of_a_kind_that_nobody_knows_is_kept():
    (designator,) = scsi.decode_designators(bytes.fromhex("00 83 0006 01 0f 00 02 abcd"))
    assert designator == Designator(15, 0, 1, b"\xab\xcd")
    assert designator.describe() == "abcd"


LIMITS = bytes.fromhex(
    "00 b0 003c"  # type | page | length: 60
    "01"  # wsnz
    "02"  # max_compare_and_write
    "0003"  # transfer_granularity
    "00000004"  # max_transfer
    "00000005"  # optimal_transfer
    "00000006"  # max_prefetch
    "00000007"  # max_unmap
    "00000008"  # max_unmap_descriptors
    "00000009"  # unmap_granularity
    "8000000a"  # unmap_alignment, valid
    "000000000000000b"  # max_write_same
) + bytes(20)


def test_block_limits_have_each_field_in_its_place():
    limits = BlockLimits(True, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    assert BlockLimits.decode(LIMITS) == limits
    assert limits.encode() == LIMITS


def test_pyscsi_reads_the_same_block_limits():
    """But for max_write_same, of which it reads the upper half only."""
    theirs = needs.module("pyscsi.pyscsi.scsi_cdb_inquiry").Inquiry.unmarshall_datain(LIMITS, evpd=1)
    assert (theirs["wsnz"], theirs["max_caw_len"], theirs["opt_xfer_len_gran"]) == (1, 2, 3)
    assert (theirs["max_xfer_len"], theirs["opt_xfer_len"], theirs["max_pfetch_len"]) == (4, 5, 6)
    assert (theirs["max_unmap_lba_count"], theirs["max_unmap_bd_count"]) == (7, 8)
    assert (theirs["opt_unmap_gran"], theirs["ugavalid"]) == (9, 1)
    assert theirs["unmap_gran_alignment"] & 0x7FFFFFFF == 10  # it leaves ugavalid in


def test_an_alignment_that_is_not_valid_is_zero():
    assert BlockLimits.decode(LIMITS[:32] + b"\0" + LIMITS[33:]).unmap_alignment == 0


def test_what_older_devices_leave_out_of_the_block_limits_is_zero():
    limits = BlockLimits.decode(bytes.fromhex("00 b0 000c 00 00 0003 00000004 00000005") + b"\xff" * 40)
    assert limits == BlockLimits(transfer_granularity=3, max_transfer=4, optimal_transfer=5)


def test_provisioning_tells_by_what_a_disk_unmaps():
    encoded = bytes.fromhex(
        "00 b2 0004"  # type | page | length
        "00"  # threshold exponent
        "e4"  # lbpu, lbpws, lbpws10, lbprz
        "02"  # thin provisioned
        "00"
    )
    provisioning = LogicalBlockProvisioning(True, True, True, True, 2)
    assert LogicalBlockProvisioning.decode(encoded) == provisioning
    assert provisioning.encode() == encoded
    theirs = needs.module("pyscsi.pyscsi.scsi_cdb_inquiry").Inquiry.unmarshall_datain(encoded, evpd=1)
    assert [theirs[name] for name in ("lbpu", "lpbws", "lbpws10", "lbprz")] == [1, 1, 1, 1]
    only = LogicalBlockProvisioning.decode(bytes.fromhex("00 b2 0004 00 40 00 00"))
    assert only == LogicalBlockProvisioning(lbpws=True)
    assert LogicalBlockProvisioning.decode(bytes.fromhex("00 b2 0000")) == LogicalBlockProvisioning()


RECORDS = st.one_of(
    st.builds(
        Inquiry,
        st.integers(0, 31),
        st.integers(0, 7),
        st.booleans(),
        U8,
        st.from_regex(r"[!-~]{0,8}", fullmatch=True),
        st.from_regex(r"[!-~]{0,16}", fullmatch=True),
        st.from_regex(r"[!-~]{0,4}", fullmatch=True),
    ),
    st.builds(
        BlockLimits,
        st.booleans(),
        U8,
        U16,
        *[U32] * 6,
        st.integers(0, 2**31 - 1),
        st.integers(0, 2**64 - 1),
    ),
    st.builds(LogicalBlockProvisioning, *[st.booleans()] * 4, st.integers(0, 7)),
)


@given(RECORDS)
def test_every_answer_survives_the_round_trip(record):
    assert type(record).decode(record.encode()) == record


@given(
    st.builds(
        Capacity,
        st.integers(1, 2**50),
        st.sampled_from([512, 520, 4096]),
        st.booleans(),
        st.booleans(),
        st.integers(0, 15),
        st.integers(0, 0x3FFF),
        st.integers(0, 4),
    )
)
def test_every_capacity_survives_the_round_trip(capacity: Capacity):
    assert Capacity.decode_16(capacity.encode_16()) == capacity
    small = Capacity.decode_10(capacity.encode_10())
    assert small == (Capacity(capacity.blocks, capacity.block_size) if capacity.blocks < 2**32 else None)


@given(
    st.lists(
        st.builds(
            Designator,
            st.integers(0, 15),
            st.integers(0, 3),
            st.integers(0, 15),
            st.binary(max_size=40),
        ),
        max_size=8,
    )
)
def test_every_list_of_designators_survives_the_round_trip(designators: list[Designator]):
    assert scsi.decode_designators(scsi.encode_designators(designators)) == designators
    assert all("\n" not in repr(designator.describe()) for designator in designators)


DECODERS = [
    Inquiry.decode,
    Capacity.decode_10,
    Capacity.decode_16,
    ModeParameters.decode_6,
    ModeParameters.decode_10,
    BlockLimits.decode,
    LogicalBlockProvisioning.decode,
    scsi.decode_lun,
    scsi.decode_report_luns,
    scsi.decode_unmap_parameters,
    scsi.decode_supported_pages,
    scsi.decode_serial,
    scsi.decode_designators,
]
PAGES = st.builds(
    lambda page, length, body: bytes((0, page)) + length.to_bytes(2, "big") + body,
    st.sampled_from([*Page]),
    st.one_of(st.integers(0, 80), U16),
    st.binary(max_size=80),
)


@given(st.sampled_from(DECODERS), st.one_of(st.binary(max_size=80), PAGES))
def test_no_answer_does_worse_than_being_refused(decode, data: bytes):
    try:
        decode(data)
    except ProtocolError:
        pass


# Sense data.


def test_fixed_sense_has_each_field_in_its_place():
    encoded = bytes.fromhex(
        "f0"  # information is valid, current, fixed format
        "00"
        "03"  # key: MEDIUM ERROR
        "00001234"  # information
        "0a"  # additional length: 10
        "00000000"
        "11 04"  # additional sense code and qualifier
        "00000000"
    )
    sense = Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, 0x1234)
    assert Sense.decode(encoded) == sense
    assert sense.encode_fixed() == encoded
    deferred = Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, deferred=True)
    assert deferred.encode_fixed()[0] == 0x71
    assert Sense.decode(deferred.encode_fixed()) == deferred


def test_descriptor_sense_has_each_field_in_its_place():
    encoded = bytes.fromhex(
        "73"  # deferred, descriptor format
        "03 11 04"  # key, additional sense code and qualifier
        "000000"
        "14"  # additional length: 20
        "02 06 0000c0000000"  # a sense key specific descriptor
        "00 0a 80 00 0000000100001234"  # information, valid
    )
    assert Sense.decode(encoded) == Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, 0x100001234, True)
    invalid = encoded.replace(bytes.fromhex("000a80"), bytes.fromhex("000a00"))
    assert Sense.decode(invalid) == Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, None, True)
    assert Sense.decode(encoded[:20]) == Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, None, True)
    assert Sense.decode(encoded[:4]) == Sense(SenseKey.MEDIUM_ERROR, 0x11, 0x04, None, True)


def test_an_information_above_32_bits_does_not_fit_fixed_sense():
    assert Sense(SenseKey.MEDIUM_ERROR, 0x11, 0, 2**32).encode_fixed()[:7] == bytes.fromhex("70000300000000")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("70 00 05", Sense(SenseKey.ILLEGAL_REQUEST)),
        ("70 00 05 00000000 0a 00000000 21", Sense(SenseKey.ILLEGAL_REQUEST, 0x21)),
        (
            "70 00 05 00000000 00 00000000 2101",
            Sense(SenseKey.ILLEGAL_REQUEST),
        ),  # 0 more bytes, it says
        ("70 00 0c", Sense(SenseKey.RESERVED)),
    ],
)
def test_sense_that_ends_early_says_what_it_can(data: str, expected: Sense):
    assert Sense.decode(bytes.fromhex(data)) == expected


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("", "no usable sense data (none came)"),
        ("00 00 00 00", "no usable sense data (4 bytes, response code 0x00)"),
        ("7f 01", "no usable sense data (2 bytes, response code 0x7f)"),
        ("70 00", "fixed sense data cut off at 2 bytes"),
        ("72 05 21", "descriptor sense data cut off at 3 bytes"),
    ],
)
def test_what_is_not_sense_data_says_so(data: str, problem: str):
    sense = Sense.decode(bytes.fromhex(data))
    assert sense.problem == str(sense) == problem


@pytest.mark.parametrize(
    ("sense", "text"),
    [
        (
            Sense(SenseKey.ILLEGAL_REQUEST, 0x21),
            "ILLEGAL REQUEST: logical block address out of range (asc 21/00)",
        ),
        (
            Sense(SenseKey.ILLEGAL_REQUEST, 0x25),
            "ILLEGAL REQUEST: logical unit not supported (asc 25/00)",
        ),
        (
            Sense(SenseKey.MEDIUM_ERROR, 0x11, 0, 4660, True),
            "deferred, MEDIUM ERROR: unrecovered read error (asc 11/00), information 4660",
        ),
        (Sense(SenseKey.HARDWARE_ERROR, 0x80, 0x11), "HARDWARE ERROR (asc 80/11)"),
    ],
)
def test_sense_is_a_sentence(sense: Sense, text: str):
    assert str(sense) == sense.describe() == text


@pytest.mark.parametrize("code", sense_module._TEXTS, ids=lambda code: f"{code >> 8:02x}/{code & 0xFF:02x}")
def test_sg3_utils_has_the_same_text_for_an_additional_sense_code(code: int):
    """The text of 25/00 is LOGICAL UNIT NOT SUPPORTED: a target had it wrong."""
    encoded = Sense(SenseKey.ILLEGAL_REQUEST, code >> 8, code & 0xFF).encode_fixed()
    lines = sg_decode_sense(*encoded.hex(" ").split())
    assert f"additional sense: {sense_module._TEXTS[code].lower()}\n" in lines


@pytest.mark.parametrize("key", SenseKey)
def test_sg3_utils_has_the_same_name_for_a_sense_key(key: SenseKey):
    if key == SenseKey.RESERVED:
        return  # an older standard's EQUAL there
    decoded = sg_decode_sense(*Sense(key).encode_fixed().hex(" ").split())
    assert f"sense key: {key.name.replace('_', ' ').lower()}" in decoded


def test_sg3_utils_reads_the_same_information_and_deferral():
    fixed = Sense(SenseKey.MEDIUM_ERROR, 0x11, 0, 0x1234, True).encode_fixed()
    decoded = sg_decode_sense(*fixed.hex(" ").split())
    assert "fixed format, <<<deferred>>>" in decoded
    assert "0x1234" in decoded


@given(
    st.builds(
        Sense,
        st.sampled_from(SenseKey),
        U8,
        U8,
        st.one_of(st.none(), st.integers(0, 2**32 - 1)),
        st.booleans(),
    )
)
def test_every_sense_survives_the_round_trip(sense: Sense):
    assert Sense.decode(sense.encode_fixed()) == sense


@given(
    st.one_of(
        st.binary(),
        st.builds(bytes.__add__, st.sampled_from([b"\x70", b"\xf1", b"\x72"]), st.binary()),
    )
)
def test_any_bytes_make_a_sense_and_a_sentence(data: bytes):
    sense = Sense.decode(data)
    assert 0 <= sense.asc <= 255
    assert sense.describe()


def test_the_operation_codes_have_the_length_that_their_group_gives_them():
    lengths = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}  # by the top three bits (SPC-4, 4.2.5.1)
    for cdb in (
        scsi.read_10(0, 0),
        scsi.read_16(0, 0),
        scsi.unmap(0),
        scsi.report_luns(8),
        scsi.inquiry(),
    ):
        assert len(cdb) == lengths[OpCode(cdb[0]) >> 5]
