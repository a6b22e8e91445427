"""The virtio SCSI host device's bytes."""

import pytest
from hypothesis import given, strategies as st

from virtio.errors import ProtocolError, RequestError
from virtio.wire import scsi
from virtio.wire.virtio_scsi import (
    EVENTS_MISSED,
    REPORT_LUNS_WLUN,
    ControlType,
    Event,
    EventType,
    RequestHeader,
    ResetReason,
    Response,
    ResponseCode,
    ScsiConfig,
    ScsiFeature,
    TaskFunction,
    TaskManagement,
    decode_lun,
    encode_lun,
)

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
LUN = bytes.fromhex("0107400500000000")


def test_numbers_are_those_of_the_specification():
    assert [*ScsiFeature] == [1, 2, 4, 8]
    assert [(code.name, code.value) for code in ResponseCode] == [
        ("OK", 0),
        ("OVERRUN", 1),
        ("ABORTED", 2),
        ("BAD_TARGET", 3),
        ("RESET", 4),
        ("BUSY", 5),
        ("TRANSPORT_FAILURE", 6),
        ("TARGET_FAILURE", 7),
        ("NEXUS_FAILURE", 8),
        ("FAILURE", 9),
        ("FUNCTION_SUCCEEDED", 10),
        ("FUNCTION_REJECTED", 11),
        ("INCORRECT_LUN", 12),
    ]
    assert ResponseCode.FUNCTION_COMPLETE == 0
    assert [*ControlType] == [0, 1, 2]
    assert [*TaskFunction] == [*range(8)]
    assert TaskFunction.LOGICAL_UNIT_RESET == 5
    assert [*EventType] == [0, 1, 2, 3]
    assert [*ResetReason] == [0, 1, 2]


SPACE = bytes.fromhex(
    "04000000"  # num_queues
    "7e000000"  # seg_max: 126
    "ffff0000"  # max_sectors: 65535
    "80000000"  # cmd_per_lun: 128
    "10000000"  # event_info_size: 16
    "60000000"  # sense_size: 96
    "20000000"  # cdb_size: 32
    "0100"  # max_channel
    "ff00"  # max_target: 255
    "ff3f0000"  # max_lun: 16383
)
CONFIG = ScsiConfig(4, 126, 0xFFFF, 128, 16, 96, 32, 1, 255, 16383)


def test_every_configuration_field_is_in_its_place():
    assert ScsiConfig.decode(SPACE) == CONFIG
    assert CONFIG.encode() == SPACE


def test_a_longer_configuration_is_accepted_and_a_shorter_one_is_not():
    """CFG-3."""
    assert ScsiConfig.decode(SPACE + b"\xff" * 8) == CONFIG
    with pytest.raises(ProtocolError, match="ScsiConfig of 35 bytes, want 36"):
        ScsiConfig.decode(SPACE[:35])


def test_a_configuration_that_cannot_be_read_is_taken_to_be_as_after_a_reset():
    """SCS-10."""
    config = ScsiConfig(num_queues=2)
    assert (config.sense_size, config.cdb_size, config.event_info_size) == (96, 32, 16)
    assert (config.max_channel, config.max_target, config.max_lun) == (0, 255, 16383)


@pytest.mark.parametrize(
    ("target", "lun", "address"),
    [
        (0, 0, "01 00 40 00 00000000"),  # 1 | target | 0x40, high | low | zeros
        (7, 5, "01 07 40 05 00000000"),
        (255, 16383, "01 ff 7f ff 00000000"),
        (1, 256, "01 01 41 00 00000000"),
    ],
)
def test_a_lun_is_sent_in_flat_form(target: int, lun: int, address: str):
    """SCS-9."""
    assert encode_lun(target, lun) == bytes.fromhex(address)
    assert decode_lun(bytes.fromhex(address)) == (target, lun)


def test_a_lun_in_peripheral_form_is_understood():
    """SCS-9; QEMU's hot-plug event for target 7."""
    assert decode_lun(bytes.fromhex("01 07 00 00 00000000")) == (7, 0)
    assert decode_lun(bytes.fromhex("01 07 00 ff 00000000")) == (7, 255)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "01 07 40 05 000000",  # seven bytes
        "01 07 40 05 00000000 00",  # nine
        "02 07 40 05 00000000",  # does not begin with 1
        "01 07 01 05 00000000",  # a bus in the peripheral form
        "01 07 80 05 00000000",  # logical unit form
        "01 07 c1 01 00000000",  # well known logical unit
        "01 07 40 05 00000001",  # a second level
        REPORT_LUNS_WLUN.hex(),
    ],
)
def test_any_other_address_is_refused(address: str):
    """SCS-9."""
    with pytest.raises(ProtocolError):
        decode_lun(bytes.fromhex(address))


@pytest.mark.parametrize(("target", "lun"), [(256, 0), (-1, 0), (0, 16384), (0, -1)])
def test_a_target_or_lun_that_has_no_address_is_the_callers_error(target: int, lun: int):
    with pytest.raises(RequestError, match=f"target {target} LUN {lun}, there are 0 to 255 and 0 to 16383"):
        encode_lun(target, lun)


def test_the_report_luns_logical_unit_has_its_address():
    """SCS-9."""
    assert bytes.fromhex("c1 01 000000000000") == REPORT_LUNS_WLUN


@given(st.integers(0, 255), st.integers(0, 16383))
def test_every_address_survives_the_round_trip(target: int, lun: int):
    assert decode_lun(encode_lun(target, lun)) == (target, lun)


@given(st.binary(max_size=10))
def test_no_address_does_worse_than_being_refused(address: bytes):
    try:
        target, lun = decode_lun(address)
    except ProtocolError:
        return
    assert 0 <= target <= 255
    assert 0 <= lun <= 16383


def test_a_request_is_51_bytes_with_the_sizes_after_a_reset():
    """SCS-3, SCS-10, SCS-11."""
    encoded = bytes.fromhex(
        "0107400500000000"  # lun
        "2a00000000000000"  # id: 42
        "00 00 00"  # task_attr, prio, crn
        "12000000ff00"  # cdb: INQUIRY
    )
    header = RequestHeader(LUN, 42, cdb=scsi.inquiry())
    assert header.encode() == encoded.ljust(51, b"\0")
    assert RequestHeader.decode(encoded) == header


def test_the_command_takes_the_size_that_was_set():
    """SCS-10."""
    header = RequestHeader(LUN, 1, cdb=scsi.read_16(0, 1))
    assert len(header.encode(16)) == 35
    assert len(header.encode(64)) == 83
    assert RequestHeader.decode(header.encode(64)).cdb == header.cdb.ljust(64, b"\0")
    with pytest.raises(RequestError, match="command of 16, want 8 and 12"):
        header.encode(12)


def test_a_lun_that_is_not_eight_bytes_is_the_callers_error():
    for record in (
        RequestHeader(b"1234567", 1),
        TaskManagement(0, b"1234567"),
        Event(0, b"1234567", 0),
    ):
        with pytest.raises(RequestError, match="LUN of 7 bytes"):
            record.encode()


def test_a_response_is_twelve_bytes_and_sense():
    """SCS-11."""
    encoded = bytes.fromhex(
        "12000000"  # sense_len: 18
        "00020000"  # residual: 512
        "0300"  # status_qualifier
        "02"  # status: CHECK CONDITION
        "00"  # response: OK
    )
    sense = scsi.Sense(scsi.SenseKey.ILLEGAL_REQUEST, 0x24).encode_fixed()
    response = Response(18, 512, 3, scsi.Status.CHECK_CONDITION, ResponseCode.OK, sense)
    assert response.encode() == encoded + sense + bytes(96 - 18)
    assert len(response.encode()) == 108
    assert Response.decode(response.encode()) == response


@pytest.mark.parametrize("sense_len", [97, 2**32 - 1])
def test_a_sense_length_beyond_what_there_is_is_cut(sense_len: int):
    data = sense_len.to_bytes(4, "little") + bytes(8) + b"s" * 200
    assert Response.decode(data[: 12 + 50]).sense_len == 50  # what came
    response = Response.decode(data)
    assert (response.sense_len, response.sense) == (96, b"s" * 96)  # what may come
    assert len(Response.decode(data, 252).sense) == min(sense_len, 200)


def test_sense_that_does_not_fit_is_cut_before_it_is_sent():
    encoded = Response(sense=b"s" * 100).encode()
    assert len(encoded) == 108
    assert encoded[:4] == (96).to_bytes(4, "little")


def test_a_cut_off_response_or_request_is_refused_with_both_numbers():
    with pytest.raises(ProtocolError, match="11 bytes, want 12"):
        Response.decode(bytes(11))
    with pytest.raises(ProtocolError, match="18 bytes, want 19"):
        RequestHeader.decode(bytes(18))


def test_task_management_is_24_bytes():
    encoded = bytes.fromhex(
        "00000000"  # type: TMF
        "05000000"  # subtype: LOGICAL UNIT RESET
        "0107400500000000"  # lun
        "2a00000000000000"  # id: 42
    )
    assert TaskManagement(TaskFunction.LOGICAL_UNIT_RESET, LUN, 42).encode() == encoded
    assert TaskManagement.decode(encoded) == TaskManagement(5, LUN, 42)


def test_other_control_requests_are_no_task_management():
    with pytest.raises(ProtocolError, match="control request of type 1, want 0"):
        TaskManagement.decode(b"\1" + bytes(23))
    with pytest.raises(ProtocolError, match="20 bytes, want 24"):
        TaskManagement.decode(bytes(20))


def test_an_event_is_16_bytes():
    """SCS-6, SCS-8."""
    encoded = bytes.fromhex(
        "01000000"  # event: TRANSPORT_RESET
        "0107000000000000"  # lun
        "02000000"  # reason: REMOVED
    )
    event = Event(EventType.TRANSPORT_RESET, bytes.fromhex("0107000000000000"), ResetReason.REMOVED)
    assert event.encode() == encoded
    assert Event.decode(encoded + bytes(4)) == event  # the buffer may be larger
    assert not event.missed
    with pytest.raises(ProtocolError, match="15 bytes, want 16"):
        Event.decode(encoded[:15])


def test_bit_31_says_that_events_were_missed():
    """SCS-7."""
    event = Event(EventType.NO_EVENT | EVENTS_MISSED, bytes(8), 0)
    assert Event.decode(event.encode()).missed
    assert event.type == EventType.NO_EVENT


def test_a_parameter_change_carries_the_additional_sense_code():
    event = Event(EventType.PARAM_CHANGE, LUN, 0x092A)  # asc in bits 0 to 7, ascq in 8 to 15
    assert event.additional_sense == (0x2A, 0x09)  # CAPACITY DATA HAS CHANGED


@given(
    st.builds(RequestHeader, st.binary(min_size=8, max_size=8), U64, U8, U8, U8, st.binary(max_size=32)),
)
def test_requests_survive_the_round_trip(header: RequestHeader):
    decoded = RequestHeader.decode(header.encode())
    assert decoded.cdb == header.cdb.ljust(32, b"\0")
    assert decoded.encode() == header.encode()


@given(
    st.one_of(
        st.builds(ScsiConfig, *[U32] * 7, U16, U16, U32),
        st.builds(
            lambda residual, qualifier, status, code, sense: Response(
                len(sense), residual, qualifier, status, code, sense
            ),
            *(U32, U16, U8, U8, st.binary(max_size=96)),
        ),
        st.builds(TaskManagement, U32, st.binary(min_size=8, max_size=8), U64),
        st.builds(Event, U32, st.binary(min_size=8, max_size=8), U32),
    )
)
def test_every_record_survives_the_round_trip(record):
    assert type(record).decode(record.encode()) == record


@given(
    st.sampled_from([ScsiConfig, RequestHeader, Response, TaskManagement, Event]),
    st.binary(max_size=150),
)
def test_no_bytes_do_worse_than_being_refused(kind, data: bytes):
    try:
        kind.decode(data)
    except ProtocolError:
        pass
