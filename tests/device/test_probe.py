"""Discovery conversations, played by hand: commands out, replies in."""

import struct

from virtio.device.probe import Command, Reply, probe_target, probe_unit
from virtio.wire import scsi
from virtio.wire.virtio_scsi import ResponseCode

INQUIRY, TEST_UNIT_READY, REPORT_LUNS, MODE_SENSE_6 = 0x12, 0x00, 0xA0, 0x1A
READ_CAPACITY_10, READ_CAPACITY_16 = 0x25, 0x9E

DISK = scsi.Inquiry(vendor="QEMU", product="HARDDISK").encode()
PAGES = {0x00: scsi.encode_supported_pages([0x00, 0x80]), 0x80: scsi.encode_serial("S1")}
ABSENT = Reply(ResponseCode.BAD_TARGET, 0, b"", b"")
# fixed, current | | unit attention | information 4 | length 10 | 4 | asc 29 ascq 00 | ...
ATTENTION = Reply(0, 2, b"\x70\0\x06\0\0\0\0\x0a\0\0\0\0\x29\0\0\0\0\0", b"")
# the same, illegal request, invalid command operation code
ILLEGAL = Reply(0, 2, b"\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x20\0\0\0\0\0", b"")
# the same, not ready, medium not present
NO_MEDIUM = Reply(0, 2, b"\x70\0\x02\0\0\0\0\x0a\0\0\0\0\x3a\0\0\0\0\0", b"")


def good(data=b""):
    return Reply(0, 0, b"", data)


def play(conversation, answers):
    """Answer each command by `answers(command)`; what the conversation ends with, and what it asked."""
    asked = []
    try:
        command = next(conversation)
        while True:
            assert isinstance(command, Command)
            asked.append(command)
            assert len(asked) < 1000, "it never ends"
            command = conversation.send(answers(command))
    except StopIteration as end:
        return end.value, asked


def disk(blocks=1000, block_size=512, **changed):
    """The answers of a disk, some of them changed by operation code."""
    replies = {
        INQUIRY: lambda c: good(PAGES[c.cdb[2]] if c.cdb[1] & 1 else DISK),
        TEST_UNIT_READY: lambda c: good(),
        REPORT_LUNS: lambda c: good(scsi.encode_report_luns([scsi.encode_lun(0)])),
        READ_CAPACITY_16: lambda c: good(struct.pack(">QI20x", blocks - 1, block_size)),
        READ_CAPACITY_10: lambda c: good(struct.pack(">II", min(blocks - 1, 0xFFFFFFFF), block_size)),
        MODE_SENSE_6: lambda c: good(scsi.ModeParameters().encode_6()),
    } | {int(code[1:], 16): reply for code, reply in changed.items()}
    return lambda command: replies[command.cdb[0]](command)


def test_an_absent_target_costs_one_command():
    units, asked = play(probe_target(16383), lambda command: ABSENT)
    assert units == [] and len(asked) == 1


def test_a_disk_is_found_with_capacity_and_serial():
    units, asked = play(probe_target(16383), disk(2048, 4096))
    (unit,) = units
    assert (unit.lun, unit.capacity.blocks, unit.capacity.block_size) == (0, 2048, 4096)
    assert unit.wide and unit.serial == "S1" and not unit.mode.write_protected and not unit.problem
    assert all(len(command.cdb) in (6, 10, 12, 16) for command in asked)


def test_every_listed_unit_is_asked_and_those_beyond_max_lun_are_not():
    listed = [scsi.encode_lun(lun) for lun in (0, 3, 300, 16383)]
    answers = disk(xA0=lambda c: good(scsi.encode_report_luns(listed)))
    units, asked = play(probe_target(300), answers)
    assert [unit.lun for unit in units] == [0, 3, 300]


def test_lun_addresses_that_virtio_has_no_place_for_are_passed_over():
    listed = [scsi.encode_lun(1), b"\xc1\x01\0\0\0\0\0\0", b"\x01\x02\0\0\0\0\0\0"]
    units, _ = play(probe_target(16383), disk(xA0=lambda c: good(scsi.encode_report_luns(listed))))
    assert [unit.lun for unit in units] == [1]


def test_a_target_without_report_luns_is_taken_to_have_lun_0():
    units, _ = play(probe_target(16383), disk(xA0=lambda c: ILLEGAL))
    assert [unit.lun for unit in units] == [0]


def test_unit_attentions_are_asked_through():
    seen = []

    def answers(command):
        seen.append(command)
        # every command fails once with what happened to the unit before
        return ATTENTION if seen.count(command) == 1 else disk()(command)

    units, _ = play(probe_target(16383), answers)
    assert [unit.problem for unit in units] == [""]


def test_a_unit_that_only_ever_reports_attention_is_given_up():
    unit, asked = play(probe_unit(0), disk(x00=lambda c: ATTENTION))
    assert "not ready: UNIT ATTENTION" in unit.problem and len(asked) < 20


def test_a_unit_without_a_medium_is_listed_with_the_reason():
    unit, _ = play(probe_unit(0), disk(x00=lambda c: NO_MEDIUM))
    assert unit.capacity is None and "not ready: NOT READY: medium not present" in unit.problem


def test_a_device_that_is_no_disk_is_listed_with_its_type():
    cdrom = scsi.Inquiry(peripheral_type=5).encode()
    unit, _ = play(probe_unit(2), disk(x12=lambda c: good(cdrom)))
    assert unit.lun == 2 and unit.problem == "device type 0x5, not a disk"


def test_a_qualifier_means_that_nothing_is_there():
    nothing = scsi.Inquiry(qualifier=3, peripheral_type=0x1F).encode()
    assert play(probe_unit(0), disk(x12=lambda c: good(nothing)))[0] is None


def test_a_short_inquiry_means_that_nothing_is_there():
    assert play(probe_unit(0), disk(x12=lambda c: good(DISK[:35])))[0] is None


def test_a_disk_with_the_10_byte_forms_only_is_used_by_them():
    unit, _ = play(probe_unit(0), disk(4000, x9e=lambda c: ILLEGAL))
    assert unit.capacity.blocks == 4000 and not unit.wide


def test_a_disk_too_large_for_the_10_byte_forms_that_has_no_other_is_refused():
    unit, _ = play(probe_unit(0), disk(1 << 33, x9e=lambda c: ILLEGAL))
    assert unit.capacity is None and "more than 2^32 blocks" in unit.problem


def test_protection_information_is_not_accepted():
    protected = struct.pack(">QIB19x", 999, 512, 0x01)  # PROT_EN, type 1
    unit, _ = play(probe_unit(0), disk(x9e=lambda c: good(protected)))
    assert unit.problem == "protection information of type 1"


def test_a_write_protected_disk_says_so():
    unit, _ = play(probe_unit(0), disk(x1a=lambda c: good(scsi.ModeParameters(True).encode_6())))
    assert unit.mode.write_protected


def test_garbage_in_optional_answers_is_no_reason_to_lose_the_disk():
    unit, _ = play(probe_unit(0), disk(x1a=lambda c: good(b"\xff")))
    assert unit.capacity.blocks == 1000 and not unit.problem


def test_garbage_for_a_capacity_is_a_problem_of_that_unit_alone():
    unit, _ = play(probe_unit(0), disk(x9e=lambda c: good(b"\xff" * 32)))
    assert unit.capacity is None and unit.problem
