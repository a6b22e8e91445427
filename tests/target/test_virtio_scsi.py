"""The virtio SCSI host device of the target: framing as bytes (virtio 5.6.6)."""

import struct

import pytest

from tests.target.perform import perform
from virtio.errors import ProtocolError
from virtio.target.scsi import LogicalUnit, Target
from virtio.target.store import MemoryStore
from virtio.target.virtio_scsi import ScsiDevice

MIB = 1 << 20
OK, OVERRUN, BAD_TARGET = 0, 1, 3
COMPLETE, REJECTED, INCORRECT_LUN = 0, 11, 12
INQUIRY = b"\x12\0\0\0\x24\0"
READ_1 = b"\x28\0\0\0\0\0\0\0\1\0"
WRITE_1 = b"\x2a\0\0\0\0\0\0\0\1\0"


@pytest.fixture
def device():
    """Targets 0 (LUN 0) and 3 (LUNs 0 and 300), their unit attentions over."""
    shape = {0: [0], 3: [0, 300]}
    device = ScsiDevice(
        {t: Target({lun: LogicalUnit(MemoryStore(MIB)) for lun in luns}) for t, luns in shape.items()},
        queues=2,
    )
    for lun in (b"\1\0\0\0", b"\1\3\0\0", b"\1\3\x41\x2c"):
        perform(device.request, [request(bytes(6), lun)], [108])
    return device


def request(cdb: bytes, lun: bytes = b"\1\0\0\0", cdb_size: int = 32) -> bytes:
    return lun.ljust(8, b"\0") + b"\x07\0\0\0\0\0\0\0" + b"\0\0\0" + cdb.ljust(cdb_size, b"\0")  # tag 7


def response(data: bytes) -> tuple[int, ...]:
    """sense_len, resid, status_qualifier, status, response."""
    return struct.unpack_from("<IIHBB", data)


def test_a_queue_for_control_one_for_events_and_two_for_requests(device):
    assert device.handlers == [device.control, None, device.request, device.request]
    # num_queues, seg_max, max_sectors, cmd_per_lun, event_info_size, sense_size, cdb_size,
    # max_channel, max_target, max_lun
    assert struct.unpack("<IIIIIIIHHI", device.config) == (2, 126, 65535, 128, 16, 96, 32, 0, 3, 300)


def test_a_read_is_answered_before_its_data(device):
    perform(device.request, [request(WRITE_1), b"w" * 512], [108])
    length, (answer, data) = perform(device.request, [request(READ_1)], [108, 512])
    assert (length, answer, data) == (108 + 512, bytes(108), b"w" * 512)


def test_what_was_not_transferred_is_the_residual(device):
    length, (answer, data) = perform(device.request, [request(INQUIRY)], [108, 100])
    assert response(answer) == (0, 64, 0, 0, OK)
    assert length == 108 + 36 and data[36:] == b"\xee" * 64
    length, (answer,) = perform(device.request, [request(WRITE_1), bytes(1024)], [108])
    assert (length, response(answer)) == (108, (0, 512, 0, 0, OK))


def test_sense_data_come_with_the_status(device):
    length, (answer, data) = perform(device.request, [request(b"\xff")], [108, 512])
    assert response(answer) == (18, 512, 0, 2, OK)  # CHECK CONDITION
    assert answer[12:30].hex() == "700005000000000a00000000200000000000"
    assert (length, data) == (108, b"\xee" * 512)


@pytest.mark.parametrize(
    "lun",
    [
        b"\1\1\0\0",  # no such target
        b"\1\xff\x40\0",
        b"\0\0\0\0",  # not the only format there is
        b"\xc1\1\0\0",  # REPORT LUNS, well known
        b"\1\0\x80\0",  # neither flat nor peripheral
        b"\1\0\0\0\1",  # a second level
    ],
)
def test_an_address_without_a_target(device, lun):
    length, (answer,) = perform(device.request, [request(INQUIRY, lun)], [108])
    assert (length, response(answer)) == (108, (0, 0, 0, 0, BAD_TARGET))


@pytest.mark.parametrize("lun", [b"\1\3\0\0", b"\1\3\x40\0", b"\1\3\x41\x2c"])
def test_units_are_addressed_in_flat_or_peripheral_form(device, lun):
    assert response(perform(device.request, [request(bytes(6), lun)], [108])[1][0]) == (0, 0, 0, 0, OK)


def test_a_unit_that_there_is_not_is_the_scsi_targets_to_refuse(device):
    _, (answer,) = perform(device.request, [request(bytes(6), b"\1\3\0\7")], [108])
    assert response(answer) == (18, 0, 0, 2, OK)
    assert answer[24:26] == b"\x25\0"


def test_too_little_room_is_an_overrun(device):
    assert response(perform(device.request, [request(READ_1)], [108, 511])[1][0]) == (0, 0, 0, 0, OVERRUN)
    assert response(perform(device.request, [request(WRITE_1)], [108])[1][0]) == (0, 0, 0, 0, OVERRUN)


@pytest.mark.parametrize(("readable", "writable"), [([bytes(50)], [108]), ([bytes(51)], [107])])
def test_a_request_without_room_for_its_framing_ends_the_session(device, readable, writable):
    with pytest.raises(ProtocolError, match="want at least 51 and 108"):
        perform(device.request, readable, writable)


def test_the_layout_follows_the_sizes_until_a_reset(device):
    assert device.set_config(20, struct.pack("<II", 20, 16))  # sense_size, cdb_size
    assert struct.unpack_from("<II", device.config, 20) == (20, 16)
    length, (answer,) = perform(device.request, [request(b"\xff", cdb_size=16)], [12 + 20])
    assert (length, response(answer)) == (32, (18, 0, 0, 2, OK))
    device.reset()
    assert struct.unpack_from("<II", device.config, 20) == (96, 32)
    _, (answer,) = perform(device.request, [request(bytes(6))], [108])
    assert answer[24:26] == b"\x29\0"  # a reset there was


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\1\0\0\0"),
        (24, b"\x0f\0\0\0"),
        (20, b"\0\0\0\0"),
        (36, b"\0"),
        (26, bytes(4)),
        (24, b"\0\1\0\0"),
    ],
)
def test_nothing_else_of_the_configuration_can_be_written(device, offset, data):
    before = device.config
    # what is written as it already was is no write: so turn a bit over first
    data = bytes([data[0] ^ 0x10 if offset in (0, 26) else data[0]]) + data[1:]
    assert not device.set_config(offset, data)
    assert device.config == before


def management(subtype: int, lun: bytes = b"\1\3\0\0") -> bytes:
    # type 0: TMF     subtype                     LUN                  tag
    return b"\0\0\0\0" + struct.pack("<I", subtype) + lun.ljust(8, b"\0") + bytes(8)


@pytest.mark.parametrize("subtype", [0, 1, 3, 4, 5, 6, 7])
def test_task_management_is_complete_once_the_queues_are_settled(device, subtype):
    settled = []
    device.settle = lambda: settled.append(True)
    assert perform(device.control, [management(subtype)], [1]) == (1, [bytes([COMPLETE])])
    assert settled
    attention = perform(device.request, [request(bytes(6), b"\1\3\0\0")], [108])[1][0][24:26] == b"\x29\0"
    assert attention is (subtype in (4, 5))  # I_T NEXUS RESET, LOGICAL UNIT RESET


@pytest.mark.parametrize(
    ("subtype", "lun", "answer"),
    [
        (2, b"\1\3\0\0", REJECTED),  # CLEAR ACA
        (8, b"\1\3\0\0", REJECTED),  # unknown
        (5, b"\1\1\0\0", BAD_TARGET),
        (5, b"\1\3\0\7", INCORRECT_LUN),
        (4, b"\1\3\0\7", COMPLETE),  # a nexus has no LUN
    ],
)
def test_task_management_that_is_refused(device, subtype, lun, answer):
    assert perform(device.control, [management(subtype, lun)], [1])[1] == [bytes([answer])]


@pytest.mark.parametrize("kind", [1, 2])
def test_asynchronous_notification_has_no_events(device, kind):
    question = struct.pack("<I8sI", kind, b"\1\3\0\0\0\0\0\0", 0x7E)  # type, LUN, events
    assert perform(device.control, [question], [4, 1]) == (5, [bytes(4), b"\0"])


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([management(5)], []),
        ([management(5)[:23]], [1]),
        ([b"\3\0\0\0" + bytes(20)], [1]),
        ([b"\1\0\0\0"], [5]),
    ],
)
def test_a_control_request_that_may_not_be_ends_the_session(device, readable, writable):
    with pytest.raises(ProtocolError, match="control request"):
        perform(device.control, readable, writable)
