"""The virtio SCSI host device of the target: framing as bytes (virtio 5.6.6)."""

import struct

import pytest

from tests.target.perform import Queue, perform
from virtio.errors import ProtocolError, RequestError
from virtio.target.scsi import LogicalUnit, Target
from virtio.target.store import Faults, FaultyStore, MemoryStore
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


def request(cdb: bytes, lun: bytes = b"\1\0\0\0", cdb_size: int = 32, tag: int = 7) -> bytes:
    return lun.ljust(8, b"\0") + struct.pack("<Q", tag) + b"\0\0\0" + cdb.ljust(cdb_size, b"\0")


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
        b"\xc1\2\0\0",  # a well-known unit that we have not
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


def management(subtype: int, lun: bytes = b"\1\3\0\0", tag: int = 0) -> bytes:
    # type 0: TMF     subtype                     LUN                  tag
    return b"\0\0\0\0" + struct.pack("<I", subtype) + lun.ljust(8, b"\0") + struct.pack("<Q", tag)


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


def test_the_well_known_unit_lists_all_units_of_all_targets(device):
    ask = request(b"\xa0\0\0\0\0\0\0\0\1\0\0\0", b"\xc1\1")
    length, (answer, data) = perform(device.request, [ask], [108, 64])
    assert response(answer) == (0, 32, 0, 0, OK)
    assert length == 108 + 32
    assert data[:32].hex(" ", 8) == (
        "0000001800000000 0100400000000000 0103400000000000 0103412c00000000"  # 24 bytes; three addresses
    )


# The event queue. An event: what (4 bytes), LUN (8), reason (4).

HOTPLUG, CHANGE = 2, 4
NEW = b"\1\3\x40\5"


@pytest.fixture
def events(device):
    """The device, which has an event queue, and that."""
    queue = Queue()
    device.acked = HOTPLUG | CHANGE
    device.use({1: queue.ring})
    return queue


def test_disks_that_come_go_and_change_are_events(device, events):
    for slot in range(4):
        events.put(slot, b"", 16)
    device.add(3, 5, MemoryStore(MIB))
    device.add(7, 0x12C, MemoryStore(MIB))
    device.resize(3, 5, 2 * MIB)
    device.remove(3, 5)
    assert [data.hex(" ", 4) for data in events.take(0).values()] == [
        "01000000 01034005 00000000 01000000",  # TRANSPORT_RESET of 3:5, RESCAN
        "01000000 0107412c 00000000 01000000",
        "03000000 01034005 00000000 2a090000",  # PARAM_CHANGE, additional sense code 2A, qualifier 09
        "01000000 01034005 00000000 02000000",  # REMOVED
    ]


def test_without_the_features_there_are_no_events(device, events):
    events.put(0, b"", 16)
    for acked, act in (
        (CHANGE, lambda: device.add(3, 5, MemoryStore(MIB))),
        (HOTPLUG, lambda: device.resize(3, 5, 2 * MIB)),
        (CHANGE, lambda: device.remove(3, 5)),
    ):
        device.acked = acked
        act()
        device.tend()
        assert events.take(0) == {}


@pytest.mark.parametrize("event_idx", [False, True])
def test_events_without_a_buffer_are_missed_and_the_driver_is_told_so(device, event_idx):
    queue = Queue(event_idx=event_idx)
    device.acked = HOTPLUG
    device.use({1: queue.ring})
    queue.put(0, b"", 16)
    for lun in (1, 2, 3):
        device.add(3, lun, MemoryStore(MIB))
    assert queue.take(0)[0].hex(" ", 4) == "01000000 01034001 00000000 01000000"
    device.tend()
    assert queue.take(0) == {}
    at = queue.driver.index
    queue.put(1, b"", 16)
    if event_idx:  # the driver knows that it has to kick
        assert struct.unpack_from("<H", queue.memory, queue.driver.used + 4 + 8 * queue.SIZE) == (at,)
    else:
        assert queue.memory[queue.driver.used] == 0
    device.tend()
    assert queue.take(0)[1].hex(" ", 4) == "00000080 00000000 00000000 00000000"  # NO_EVENT, missed
    queue.put(0, b"", 16)
    device.tend()
    assert queue.take(0) == {}  # told once


def test_the_next_event_says_that_others_were_missed(device, events):
    device.add(3, 5, MemoryStore(MIB))
    events.put(0, b"", 20)  # larger than need be
    device.remove(3, 5)
    assert events.take(0)[0].hex(" ", 4) == "01000080 01034005 00000000 02000000"
    events.put(0, b"", 16)
    device.add(3, 5, MemoryStore(MIB))
    assert events.take(0)[0].hex(" ", 4) == "01000000 01034005 00000000 01000000"


def test_events_before_there_is_a_queue_are_missed_too_unless_it_was_reset(device):
    device.acked = HOTPLUG
    for reset in (False, True):
        queue = Queue()
        device.add(3, 5, MemoryStore(MIB))
        device.remove(3, 5)
        if reset:
            device.reset()
        device.use({1: queue.ring})
        queue.put(0, b"", 16)
        device.tend()
        assert bool(queue.take(0)) is not reset
        device.use({})


def test_an_event_buffer_that_is_too_small_ends_the_session(device, events):
    events.put(0, b"", 15)
    with pytest.raises(ProtocolError, match="event buffer of 15 bytes, want 16"):
        device.add(3, 5, MemoryStore(MIB))


# Units that come and go.


def status(device, cdb: bytes, lun: bytes, *room: int) -> tuple[int, int, str]:
    """Response, status and additional sense code of a command."""
    answer = perform(device.request, [request(cdb, lun)], [108, *room])[1][0]
    return answer[11], answer[10], answer[24:26].hex() if answer[10] else ""


def test_a_unit_that_is_added_answers_and_its_neighbours_are_told(device):
    device.add(3, 5, MemoryStore(MIB))
    assert status(device, bytes(6), NEW) == (OK, 2, "2900")
    assert status(device, bytes(6), NEW) == (OK, 0, "")
    for lun in (b"\1\3\0\0", b"\1\3\x41\x2c"):
        assert status(device, bytes(6), lun) == (OK, 2, "3f0e")
        assert status(device, bytes(6), lun) == (OK, 0, "")
    assert status(device, bytes(6), b"\1\0\0\0") == (OK, 0, "")  # another target
    with pytest.raises(RequestError, match="there is a disk 3:5 already"):
        device.add(3, 5, MemoryStore(MIB))


def test_a_unit_that_is_removed_is_absent_and_so_is_a_target_without_units(device):
    device.remove(3, 300)
    assert status(device, bytes(6), b"\1\3\x41\x2c") == (OK, 2, "2500")
    assert status(device, bytes(6), b"\1\3\0\0") == (OK, 2, "3f0e")
    device.remove(3, 0)
    assert status(device, bytes(6), b"\1\3\0\0") == (BAD_TARGET, 0, "")
    with pytest.raises(RequestError, match="there is no disk 3:0"):
        device.remove(3, 0)
    device.remove(0, 0)  # the last of all
    assert device.units() == []
    device.add(0, 0, MemoryStore(MIB))
    assert status(device, bytes(6), b"\1\0\0\0") == (OK, 2, "2900")


def test_the_configuration_may_leave_room_for_units_to_come():
    targets = {0: Target({0: LogicalUnit(MemoryStore(MIB))})}
    device = ScsiDevice(targets, 1, largest=(255, 16383))
    assert struct.unpack_from("<HI", device.config, 30) == (255, 16383)


def test_what_is_pending_is_forgotten_for_the_next_driver(device):
    device.add(3, 5, MemoryStore(MIB))
    device.attention(3, 0, 0x2A, 1)
    device.unit(3, 0).faults.busy = 4
    device.forget()
    device.refault()
    assert device.handlers[2] == device.request
    for lun in (NEW, b"\1\3\0\0"):
        assert [status(device, bytes(6), lun)[2] for _ in range(2)] == ["2900", ""]


# Faults, and commands that are held.


def fault(device, target: int = 3, lun: int = 0, **changes: object) -> None:
    for name, value in changes.items():
        setattr(device.unit(target, lun).faults, name, value)
    device.refault()


def test_without_faults_no_command_is_looked_at_twice(device):
    assert device.handlers[2:] == [device.request] * 2
    fault(device, hang=True)
    assert device.handlers[2] != device.request
    fault(device, hang=False)
    assert device.handlers[2:] == [device.request] * 2


def test_busy_is_the_answer_to_so_many_commands(device):
    fault(device, busy=2)
    for cdb, room, residual in ((bytes(6), 0, 0), (INQUIRY, 36, 36), (INQUIRY, 36, 0)):
        answer = perform(device.handlers[2], [request(cdb, b"\1\3\0\0")], [108, room] if room else [108])[1][
            0
        ]
        assert response(answer) == (0, residual, 0, 8 if residual or not room else 0, OK)
    assert device.unit(3, 0).faults.busy == 0


def test_each_so_many_th_command_of_data_is_a_medium_error(device):
    fault(device, every=2)
    said = []
    for cdb in (READ_1, bytes(6), READ_1, b"\x35".ljust(10, b"\0"), READ_1, READ_1):
        answer = perform(device.handlers[2], [request(cdb, b"\1\3\0\0")], [108, 512])[1][0]
        said.append(answer[12 + 2 : 12 + 3].hex() + answer[24:26].hex() if answer[10] else "")
    assert said == ["", "", "031100", "", "", "031100"]


def test_faults_of_the_store_come_and_go(device):
    fault(device, fail={"read": 0})
    assert status(device, READ_1, b"\1\3\0\0", 512) == (OK, 2, "1100")
    fault(device, fail={})
    assert status(device, READ_1, b"\1\3\0\0", 512) == (OK, 0, "")


def hung(device) -> Queue:
    """A queue in which commands wait: tags 1 and 2 for 3:0, 3 for 3:300; that for 0:0 is done."""
    fault(device, 3, 0, hang=True)
    fault(device, 3, 300, hang=True)
    queue = Queue()
    queue.put(0, request(bytes(6), tag=9), 108)
    queue.put(1, request(bytes(6), b"\1\3\0\0", tag=1), 108)
    queue.put(2, request(bytes(6), b"\1\3\0\0", tag=2), 108)
    queue.put(3, request(bytes(6), b"\1\3\x41\x2c", tag=3), 108)
    queue.serve(device.handlers[2])
    assert queue.take(51) == {0: bytes(108)}
    return queue


def test_a_hung_disk_answers_when_it_no_longer_hangs(device):
    queue = hung(device)
    device.tend()
    assert queue.take(51) == {}
    fault(device, hang=False)
    device.resume(3, 0)
    assert list(queue.take(51).items()) == [(1, bytes(108)), (2, bytes(108))]
    device.resume(3, 0)
    assert queue.take(51) == {}
    fault(device, 3, 300, hang=False)
    device.resume(3, 300)
    assert queue.take(51) == {3: bytes(108)}


ABORTED, RESET, SUCCEEDED = 2, 4, 10
LUN_0, LUN_300 = b"\1\3\0\0", b"\1\3\x41\x2c"


@pytest.mark.parametrize(
    ("task", "answer", "ended"),
    [
        (management(0, LUN_0, 2), COMPLETE, {2: ABORTED}),  # ABORT TASK
        (management(0, LUN_0, 3), COMPLETE, {}),  # that tag is of another unit
        (management(0, b"\1\0\0\0", 9), COMPLETE, {}),  # that one was done
        (management(1, LUN_0), COMPLETE, {1: ABORTED, 2: ABORTED}),  # ABORT TASK SET
        (management(3, LUN_300), COMPLETE, {3: ABORTED}),  # CLEAR TASK SET
        (management(5, LUN_0), COMPLETE, {1: RESET, 2: RESET}),  # LOGICAL UNIT RESET
        (management(4, LUN_0), COMPLETE, {1: RESET, 2: RESET, 3: RESET}),  # I_T NEXUS RESET
        (management(4, b"\1\0\0\0"), COMPLETE, {}),
        (management(6, LUN_0, 1), SUCCEEDED, {}),  # QUERY TASK
        (management(6, LUN_0, 3), COMPLETE, {}),
        (management(7, LUN_300), SUCCEEDED, {}),  # QUERY TASK SET
        (management(7, b"\1\0\0\0"), COMPLETE, {}),
    ],
)
def test_task_management_of_commands_that_are_held(device, task, answer, ended):
    queue = hung(device)
    seen = {}

    def control(ring):  # what was aborted has completed before the function has
        written = device.control(ring)
        seen.update(queue.take(51))
        return written

    assert perform(control, [task], [1]) == (1, [bytes([answer])])
    assert {slot: data[11] for slot, data in seen.items()} == ended
    assert all(len(data) == 108 for data in seen.values())
    fault(device, 3, 0, hang=False)
    fault(device, 3, 300, hang=False)
    device.resume(3, 0)
    device.resume(3, 300)
    assert set(queue.take(51)) == {1, 2, 3} - set(ended)  # each is answered once


def test_what_is_held_of_a_ring_that_stops_is_forgotten(device):
    queue = hung(device)
    device.drop(queue.ring)
    fault(device, hang=False)
    device.resume(3, 0)
    assert perform(device.control, [management(5)], [1])[1] == [bytes([COMPLETE])]
    assert queue.take(51) == {}


def test_commands_held_of_a_disk_that_goes_are_answered_as_for_one_that_is_absent(device):
    queue = hung(device)
    device.remove(3, 0)
    assert {slot: data[24:26].hex() for slot, data in queue.take(51).items()} == {1: "2500", 2: "2500"}
    device.remove(3, 300)
    assert {slot: data[11] for slot, data in queue.take(51).items()} == {3: BAD_TARGET}


def test_what_is_held_follows_its_memory(device):
    queue = hung(device)
    moved = memoryview(bytearray(queue.memory))
    queue.memory[0x4000:] = bytes(len(queue.memory) - 0x4000)  # nothing is there any more
    queue.memory = queue.driver.memory = moved
    queue.attach()
    fault(device, hang=False)
    device.resume(3, 0)
    assert queue.take(51) == {1: bytes(108), 2: bytes(108)}


def test_a_chain_is_not_held_twice(device):
    queue = hung(device)
    queue.driver.offer(2)  # the driver has it not back
    with pytest.raises(ProtocolError, match="chain 2 is available again"):
        queue.serve(device.handlers[2])


def test_a_chain_that_has_changed_while_it_was_held_is_checked_again(device):
    queue = hung(device)
    queue.driver.describe(2, 0x1000, 51, 1, 3)  # of tag 1, to where nothing is mapped
    fault(device, hang=False)
    with pytest.raises(ProtocolError, match="held: nothing is mapped at 0x1000"):
        device.resume(3, 0)


def test_a_slow_disk_takes_its_time_for_data_and_for_nothing_else(device, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    fault(device, delay=0.5)
    queue = Queue()
    for slot, cdb in enumerate((bytes(6), b"\x35".ljust(10, b"\0"), WRITE_1)):
        queue.put(slot, request(cdb, LUN_0) + bytes(512) * (cdb == WRITE_1), 108)
    queue.serve(device.handlers[2])
    assert device.tend() == 0.5
    now[0] += 0.2
    queue.put(3, request(b"\x35".ljust(10, b"\0"), LUN_0), 108)
    queue.serve(device.handlers[2])
    assert device.tend() == pytest.approx(0.3)
    assert list(queue.take(51)) == [0]
    now[0] += 0.3
    assert device.tend() == pytest.approx(0.2)
    assert list(queue.take(51)) == [1, 2]
    now[0] += 0.2
    assert device.tend() == -1
    assert list(queue.take(51)) == [3]


def test_a_fault_in_the_description_of_a_disk_is_there_from_the_start():
    store = FaultyStore(MemoryStore(MIB), Faults(delay=1.0))
    device = ScsiDevice({0: Target({0: LogicalUnit(store)})}, 1)
    assert device.handlers[2] != device.request


@pytest.mark.parametrize(("readable", "writable"), [([bytes(50)], [108]), ([bytes(51)], [107])])
def test_framing_is_checked_where_faults_are_too(device, readable, writable):
    fault(device, busy=1)
    with pytest.raises(ProtocolError, match="want at least 51 and 108"):
        perform(device.handlers[2], readable, writable)


def test_addresses_without_a_disk_are_answered_where_faults_are_too(device):
    fault(device, hang=True)
    for lun, answer in ((b"\1\1\0\0", BAD_TARGET), (b"\0", BAD_TARGET), (b"\1\3\0\7", OK)):
        assert perform(device.handlers[2], [request(bytes(6), lun)], [108])[1][0][11] == answer
