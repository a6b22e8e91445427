"""Discovery conversations, played by hand: commands out, replies in."""

import struct

import pytest

from virtio.device.probe import NO_ANSWER, Command, Pause, Reply, list_units, probe_unit
from virtio.wire import scsi, virtio_scsi
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
            while isinstance(command, Pause):
                assert 0 < command.seconds <= 1
                command = next(conversation)
            assert isinstance(command, Command)
            asked.append(command)
            assert len(asked) < 1000, "it never ends"
            command = conversation.send(answers(command))
    except StopIteration as end:
        return end.value, asked


def disk(blocks=1000, block_size=512, **changed):
    """The answers of a disk, some of them changed by operation code."""
    replies = {
        0x5A: lambda c: ILLEGAL,
        INQUIRY: lambda c: good(PAGES[c.cdb[2]] if c.cdb[1] & 1 else DISK),
        TEST_UNIT_READY: lambda c: good(),
        REPORT_LUNS: lambda c: good(scsi.encode_report_luns([scsi.encode_lun(0)])),
        READ_CAPACITY_16: lambda c: good(struct.pack(">QI20x", blocks - 1, block_size)),
        READ_CAPACITY_10: lambda c: good(struct.pack(">II", min(blocks - 1, 0xFFFFFFFF), block_size)),
        MODE_SENSE_6: lambda c: good(scsi.ModeParameters().encode_6()),
    } | {int(code[1:], 16): reply for code, reply in changed.items()}
    return lambda command: replies[command.cdb[0]](command)


def test_an_absent_target_costs_one_command():
    luns, asked = play(list_units(0, 16383), lambda command: ABSENT)
    assert luns == [] and len(asked) == 1


def test_a_target_whose_lun_0_is_dead_is_left_at_that():
    luns, asked = play(list_units(0, 16383), lambda command: NO_ANSWER)
    assert luns is None and len(asked) == 1


def test_a_disk_is_found_with_capacity_serial_and_identity():
    pages = dict(PAGES)
    pages[0x83] = scsi.encode_designators(
        [scsi.Designator(8, 1, 3, b"iqn.port"), scsi.Designator(3, 0, 1, bytes.fromhex("5000c500a1b2c3d4"))]
    )
    pages[0xB1] = scsi.encode_rotation(7200)
    pages[0x00] = scsi.encode_supported_pages(pages)
    answers = disk(2048, 4096, x12=lambda c: good(pages[c.cdb[2]] if c.cdb[1] & 1 else DISK))
    unit, asked = play(probe_unit(0), answers)
    assert (unit.lun, unit.capacity.blocks, unit.capacity.block_size) == (0, 2048, 4096)
    assert unit.wide and unit.serial == "S1" and not unit.mode.write_protected and not unit.problem
    assert unit.identity == "naa.5000c500a1b2c3d4" and unit.unique and unit.rotation == 7200
    assert all(len(command.cdb) in (6, 10, 12, 16) for command in asked)


def test_without_page_83_a_disk_is_known_by_its_serial_number():
    unit, _ = play(probe_unit(0), disk())
    assert unit.identity == "S1" and not unit.unique


def test_every_listed_unit_is_told_and_those_beyond_max_lun_are_not():
    listed = [scsi.encode_lun(lun) for lun in (0, 3, 300, 16383)]
    answers = disk(xA0=lambda c: good(scsi.encode_report_luns(listed)))
    assert play(list_units(0, 300), answers)[0] == [0, 3, 300]


def test_a_list_that_is_longer_than_expected_is_asked_for_again_in_full():
    every = scsi.encode_report_luns(scsi.encode_lun(lun) for lun in range(2000))

    def report(command):
        return good(every[: int.from_bytes(command.cdb[6:10], "big")])

    luns, asked = play(list_units(0, 16383), disk(xA0=report))
    assert luns == list(range(2000)) and len(asked) == 3
    assert asked[-1].nbytes == len(every)


def test_a_list_that_claims_to_be_endless_is_asked_for_with_a_bound():
    claim = b"\xff\xff\xff\xf8" + bytes(4) + scsi.encode_lun(0) * 100
    luns, asked = play(list_units(0, 16383), disk(xA0=lambda c: good(claim)))
    assert luns == [0] and max(command.nbytes for command in asked) == 8 + 8 * 16384


def test_lun_addresses_that_virtio_has_no_place_for_are_passed_over():
    listed = [scsi.encode_lun(1), b"\xc1\x01\0\0\0\0\0\0", b"\x01\x02\0\0\0\0\0\0"]
    answers = disk(xA0=lambda c: good(scsi.encode_report_luns(listed)))
    assert play(list_units(0, 16383), answers)[0] == [1]


def test_where_lun_0_has_no_list_the_well_known_unit_may():
    """SCS-9: it is addressed as such, and lists units of every target."""
    addresses = [virtio_scsi.encode_lun(3, 0), virtio_scsi.encode_lun(3, 7), virtio_scsi.encode_lun(4, 9)]

    def answers(command):
        if command.cdb[0] != REPORT_LUNS:
            return disk()(command)
        return ILLEGAL if command.lun == 0 else good(scsi.encode_report_luns(addresses))

    assert play(list_units(3, 16383), answers)[0] == [0, 7]


def test_without_any_list_the_numbers_are_tried_until_one_is_missing():
    def answers(command):
        if command.cdb[0] == REPORT_LUNS:
            return ILLEGAL
        return ABSENT if command.lun == 3 else disk()(command)

    luns, asked = play(list_units(0, 16383), answers)
    assert luns == [0, 1, 2]
    assert [command.lun for command in asked if command.cdb[0] == INQUIRY] == [0, 1, 2, 3]


def test_the_search_ends_at_max_lun():
    luns, _ = play(list_units(0, 2), disk(xA0=lambda c: ILLEGAL))
    assert luns == [0, 1, 2]


BECOMING_READY = Reply(0, 2, b"\x70\0\x02\0\0\0\0\x0a\0\0\0\0\x04\x01\0\0\0\0", b"")
TO_BE_STARTED = Reply(0, 2, b"\x70\0\x02\0\0\0\0\x0a\0\0\0\0\x04\x02\0\0\0\0", b"")
BUSY = Reply(0, 8, b"", b"")


def test_a_unit_that_becomes_ready_is_waited_for():
    answers = iter([BECOMING_READY, BECOMING_READY, good()])
    unit, _ = play(probe_unit(0), disk(x00=lambda c: next(answers)))
    assert not unit.problem


def test_a_unit_that_wants_to_be_started_is_started_once():
    answers = iter([TO_BE_STARTED, good()])
    unit, asked = play(probe_unit(0), disk(x00=lambda c: next(answers), x1B=lambda c: good()))
    assert not unit.problem and sum(command.cdb[0] == 0x1B for command in asked) == 1
    unit, asked = play(probe_unit(0), disk(x00=lambda c: TO_BE_STARTED, x1B=lambda c: good()))
    assert "initializing command required" in unit.problem
    assert sum(command.cdb[0] == 0x1B for command in asked) == 1


def test_a_unit_that_is_never_ready_or_always_busy_is_given_up():
    unit, asked = play(probe_unit(0), disk(x00=lambda c: BECOMING_READY))
    assert "process of becoming ready" in unit.problem and len(asked) < 20
    unit, asked = play(probe_unit(0), disk(x00=lambda c: BUSY))
    assert "not ready" in unit.problem and len(asked) < 20


def test_a_busy_unit_is_asked_again():
    answers = iter([BUSY, Reply(5, 0, b"", b""), good()])
    unit, _ = play(probe_unit(0), disk(x00=lambda c: next(answers)))
    assert not unit.problem


def test_a_unit_that_dies_during_its_probe_is_listed_as_dead():
    unit, asked = play(probe_unit(4), lambda command: NO_ANSWER)
    assert unit.lun == 4 and unit.problem == "no answer to INQUIRY" and len(asked) == 1
    unit, _ = play(probe_unit(4), disk(x00=lambda c: NO_ANSWER))
    assert unit.problem == "not ready: no answer"


def test_mode_parameters_are_had_by_whichever_command_works():
    caching = scsi.ModeParameters(True, True, {0x08: b"\x04" + bytes(17)})
    unit, _ = play(
        probe_unit(0),
        disk(x1A=lambda c: good(caching.encode_6()) if c.cdb[2] == 0x08 else ILLEGAL),
    )
    assert unit.mode == caching
    unit, _ = play(probe_unit(0), disk(x1A=lambda c: ILLEGAL, x5A=lambda c: good(caching.encode_10())))
    assert unit.mode == caching


def test_unit_attentions_are_asked_through():
    seen = []

    def answers(command):
        seen.append(command)
        # every command fails once with what happened to the unit before
        return ATTENTION if seen.count(command) == 1 else disk()(command)

    assert play(probe_unit(0), answers)[0].problem == ""
    seen.clear()
    assert play(list_units(0, 16383), answers)[0] == [0]


def test_a_unit_that_only_ever_reports_attention_is_given_up():
    unit, asked = play(probe_unit(0), disk(x00=lambda c: ATTENTION))
    assert "not ready: UNIT ATTENTION" in unit.problem and len(asked) < 20


def test_a_unit_without_a_medium_is_listed_with_the_reason():
    unit, _ = play(probe_unit(0), disk(x00=lambda c: NO_MEDIUM))
    assert unit.capacity is None and "not ready: NOT READY: medium not present" in unit.problem


@pytest.mark.parametrize(
    "kind, words", [(8, "a medium changer, not a disk"), (0x1B, "a device of type 0x1b, not a disk")]
)
def test_a_device_that_is_no_disk_is_listed_with_its_type(kind, words):
    changer = scsi.Inquiry(peripheral_type=kind).encode()
    unit, _ = play(probe_unit(2), disk(x12=lambda c: good(changer)))
    assert unit.lun == 2 and unit.problem == words


def test_a_cd_rom_is_a_read_only_disk():
    cdrom = scsi.Inquiry(peripheral_type=5).encode()
    unit, _ = play(
        probe_unit(0),
        disk(100, 2048, x12=lambda c: ILLEGAL if c.cdb[1] & 1 else good(cdrom)),
    )
    assert not unit.problem and unit.read_only and unit.capacity.block_size == 2048


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
