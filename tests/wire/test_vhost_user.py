"""vhost-user messages: their bytes, the decoder, and SPDK's recorded conversations."""

import itertools
import os
import re
import socket
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from virtio.errors import ProtocolError, RequestError
from virtio.wire.vhost_user import (
    MAX_PAYLOAD,
    NEED_REPLY,
    REPLY,
    VERSION,
    BackendRequest,
    ConfigSpace,
    Decoder,
    DeviceState,
    InflightDescription,
    Iotlb,
    LogDescription,
    MemoryRegion,
    MemoryTable,
    Message,
    ProtocolFeature,
    Request,
    SingleMemoryRegion,
    VringAddress,
    VringFd,
    VringState,
    decode_u64,
    encode_u64,
    expected_ack,
    expected_reply,
)

U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
LITTLE = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes are a little-endian machine's")


# Records: every field in its place.


@LITTLE
@pytest.mark.parametrize(
    ("record", "encoded"),
    [
        (VringState(1, 256), "01000000 00010000"),  # index | num
        (
            VringAddress(1, 0, 0x10, 0x30, 0x20, 0x40),
            "01000000 00000000"  # index | flags
            "1000000000000000 3000000000000000"  # descriptor table | used ring
            "2000000000000000 4000000000000000",  # available ring | log
        ),
        (VringFd(255), "ff00000000000000"),  # bits 0 to 7: index
        (VringFd(3, nofd=True), "0301000000000000"),  # bit 8: no descriptor (VHU-15)
        (
            MemoryTable((MemoryRegion(0x1000, 0x2000, 0x3000, 0x4000),)),
            "01000000 00000000"  # number of regions | padding
            "0010000000000000 0020000000000000"  # guest address | size
            "0030000000000000 0040000000000000",  # user address | offset in the file
        ),
        (
            SingleMemoryRegion(MemoryRegion(0x1000, 0x2000, 0x3000, 0x4000)),
            "0000000000000000"  # padding
            "0010000000000000 0020000000000000"  # guest address | size
            "0030000000000000 0040000000000000",  # user address | offset in the file
        ),
        (ConfigSpace(4, 2, 1, b"\xaa\xbb"), "04000000 02000000 01000000 aabb"),  # the payload last
        (
            InflightDescription(0x1000, 0x2000, 4, 128),
            "0010000000000000 0020000000000000"  # mmap size | mmap offset
            "0400 8000 00000000",  # number of queues | queue size | padding
        ),
        (
            Iotlb(0x1000, 0x2000, 0x3000, 3, 2),
            "0010000000000000 0020000000000000 0030000000000000"  # iova | size | user address
            "03 02 000000000000",  # permissions | type | padding
        ),
        (LogDescription(0x1000, 0x2000), "0010000000000000 0020000000000000"),  # size | offset
        (DeviceState(1, 0), "01000000 00000000"),  # direction | phase
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_payload_has_each_field_in_its_place(record, encoded: str):
    assert record.encode() == bytes.fromhex(encoded)
    assert type(record).decode(record.encode()) == record


@LITTLE
def test_a_message_begins_with_twelve_bytes_of_header():
    """VHU-1."""
    message = Message(Request.SET_VRING_NUM, VERSION | NEED_REPLY, VringState(1, 256).encode())
    assert message.encode() == bytes.fromhex(
        "08000000"  # request
        "09000000"  # flags: version 1, need_reply
        "08000000"  # size of the payload
        "01000000 00010000"
    )


def test_a_message_is_of_version_1_and_no_reply_unless_told_otherwise():
    """VHU-1."""
    assert Message(Request.GET_FEATURES).flags == 1
    assert Message(Request.GET_FEATURES).reply(encode_u64(7)) == Message(1, 5, encode_u64(7))


def test_numbers_are_those_of_the_document():
    assert [*Request] == [*range(1, 44)]
    assert [*BackendRequest] == [*range(1, 9)]
    assert [*ProtocolFeature] == [1 << bit for bit in range(20)]
    assert (Request.GET_QUEUE_NUM, Request.GET_CONFIG, Request.CHECK_DEVICE_STATE) == (17, 24, 43)
    assert ProtocolFeature.CONFIGURE_MEM_SLOTS == 1 << 15
    assert ProtocolFeature.DEVICE_STATE == 1 << 19


def test_a_request_for_configuration_carries_as_many_bytes_as_it_asks_for():
    """VHU-16."""
    assert ConfigSpace(0, 60).encode()[12:] == bytes(60)


def test_more_configuration_than_its_size_is_the_callers_error():
    with pytest.raises(RequestError, match="5 configuration bytes in a size of 4"):
        ConfigSpace(0, 4, 0, b"12345").encode()


@pytest.mark.parametrize("payload", [b"", b"1" * 59, b"1" * 61])
def test_configuration_whose_size_is_not_what_came_is_refused(payload: bytes):
    """VHU-16."""
    with pytest.raises(ProtocolError, match=f"{len(payload)} configuration bytes came, its size says 60"):
        ConfigSpace.decode(struct.pack("=III", 0, 60, 0) + payload)


def test_nine_regions_are_neither_sent_nor_accepted():
    """VHU-12."""
    regions = tuple(MemoryRegion(i, 1, i, 0) for i in range(9))
    assert MemoryTable.decode(MemoryTable(regions[:8]).encode()).regions == regions[:8]
    with pytest.raises(RequestError, match="9 memory regions, a table has 8"):
        MemoryTable(regions).encode()
    with pytest.raises(ProtocolError, match="table of 9 regions, 8 are allowed"):
        MemoryTable.decode(struct.pack("=II", 9, 0) + bytes(9 * 32))


def test_a_table_that_is_not_as_long_as_its_count_says_is_refused():
    with pytest.raises(ProtocolError, match="2 regions in 40 bytes, want 72"):
        MemoryTable.decode(struct.pack("=II", 2, 0) + bytes(32))


@pytest.mark.parametrize("index", [-1, 256])
def test_a_ring_that_has_no_place_in_eight_bits_is_not_sent(index: int):
    """VHU-15."""
    with pytest.raises(RequestError, match=f"ring {index}"):
        VringFd(index).encode()


def test_an_inflight_description_of_twenty_bytes_is_refused():
    with pytest.raises(ProtocolError, match="InflightDescription of 20 bytes, want 24"):
        InflightDescription.decode(bytes(20))


RECORDS = [
    st.builds(VringState, U32, U32),
    st.builds(VringAddress, U32, U32, U64, U64, U64, U64),
    st.builds(VringFd, U8, st.booleans()),
    st.builds(SingleMemoryRegion, st.builds(MemoryRegion, U64, U64, U64, U64)),
    st.lists(st.builds(MemoryRegion, U64, U64, U64, U64), max_size=8).map(
        lambda regions: MemoryTable(tuple(regions))
    ),
    st.builds(lambda o, f, data: ConfigSpace(o, len(data), f, data), U32, U32, st.binary(max_size=256)),
    st.builds(InflightDescription, U64, U64, U16, U16),
    st.builds(Iotlb, U64, U64, U64, U8, U8),
    st.builds(LogDescription, U64, U64),
    st.builds(DeviceState, U32, U32),
]
TYPES = [
    VringState,
    VringAddress,
    VringFd,
    MemoryRegion,
    MemoryTable,
    SingleMemoryRegion,
    ConfigSpace,
    InflightDescription,
    Iotlb,
    LogDescription,
    DeviceState,
]


@given(st.one_of(RECORDS))
def test_every_payload_survives_the_round_trip(record):
    assert type(record).decode(record.encode()) == record


@given(st.sampled_from(TYPES), st.binary(max_size=300))
def test_no_payload_does_worse_than_being_refused(kind, payload: bytes):
    try:
        kind.decode(payload)
    except ProtocolError:
        pass


@given(U64)
def test_a_number_is_eight_bytes(value: int):
    assert decode_u64(encode_u64(value)) == value
    with pytest.raises(ProtocolError, match="7 bytes, want 8"):
        decode_u64(encode_u64(value)[:7])


# Which requests are answered.


def test_requests_with_a_reply_of_their_own_are_these_and_no_others():
    """VHU-4."""
    every = sum(ProtocolFeature)
    assert {request.name for request in Request if expected_reply(request, every)} == {
        "GET_FEATURES",
        "SET_LOG_BASE",
        "GET_VRING_BASE",
        "GET_PROTOCOL_FEATURES",
        "GET_QUEUE_NUM",
        "IOTLB_MSG",
        "GET_CONFIG",
        "CREATE_CRYPTO_SESSION",
        "POSTCOPY_ADVISE",
        "POSTCOPY_END",
        "GET_INFLIGHT_FD",
        "GET_MAX_MEM_SLOTS",
        "GET_STATUS",
        "GET_SHARED_OBJECT",
        "SET_DEVICE_STATE_FD",
        "CHECK_DEVICE_STATE",
    }
    assert not expected_reply(99, every)


def test_an_extension_gives_two_requests_their_reply():
    """VHU-4."""
    assert not expected_reply(Request.SET_LOG_BASE, 0)
    assert expected_reply(Request.SET_LOG_BASE, ProtocolFeature.LOG_SHMFD)
    assert not expected_reply(Request.GET_INFLIGHT_FD, 0)
    assert expected_reply(Request.GET_INFLIGHT_FD, ProtocolFeature.INFLIGHT_SHMFD)


def test_an_acknowledgement_needs_the_flag_and_the_extension_and_no_reply_of_its_own():
    """VHU-19."""
    asks, asks_not = (Message(Request.SET_MEM_TABLE, VERSION | flag) for flag in (NEED_REPLY, 0))
    assert expected_ack(asks, ProtocolFeature.REPLY_ACK)
    assert not expected_ack(asks_not, ProtocolFeature.REPLY_ACK)
    assert not expected_ack(asks, ProtocolFeature.MQ)
    get = Message(Request.GET_FEATURES, VERSION | NEED_REPLY)
    assert not expected_ack(get, ProtocolFeature.REPLY_ACK)


@pytest.mark.parametrize("request_", BackendRequest)
def test_on_the_channel_back_every_request_can_ask_for_an_acknowledgement(request_):
    """VHU-18; number 1 is GET_FEATURES the other way, which has a reply of its own."""
    asks, asks_not = (Message(request_, VERSION | flag) for flag in (NEED_REPLY, 0))
    assert expected_ack(asks, ProtocolFeature.REPLY_ACK, BackendRequest)
    assert not expected_ack(asks_not, ProtocolFeature.REPLY_ACK, BackendRequest)
    assert not expected_ack(asks, 0, BackendRequest)


# The decoder.

STREAM = [
    Message(Request.SET_OWNER),
    Message(Request.SET_VRING_KICK, VERSION, VringFd(0).encode(), (12,)),
    Message(Request.GET_FEATURES, VERSION | REPLY, encode_u64(1 << 32)),
    Message(Request.SET_MEM_TABLE, VERSION | NEED_REPLY, MemoryTable(()).encode(), (4, 5, 6)),
]


def test_one_byte_at_a_time_gives_the_same_messages_with_their_descriptors():
    decoder = Decoder()
    decoded = []
    for message in STREAM:
        encoded = message.encode()
        decoded += decoder.feed(encoded[:1], message.fds)  # with the first byte
        for byte in encoded[1:]:
            decoded += decoder.feed(bytes([byte]))
    assert decoded == STREAM
    assert decoder.close() == []


def test_reads_of_what_is_wanted_never_cross_from_one_message_into_the_next():
    decoder = Decoder()
    stream = b"".join(message.encode() for message in STREAM)
    decoded = []
    while stream:
        chunk, stream = stream[: decoder.wanted], stream[decoder.wanted :]
        complete = decoder.feed(chunk)
        assert len(complete) <= 1
        decoded += complete
    assert [m.payload for m in decoded] == [m.payload for m in STREAM]
    assert decoder.wanted == 12


def test_descriptors_belong_to_the_message_whose_bytes_they_came_with():
    first, second, third = (Message(Request.SET_VRING_KICK, 1, bytes(8)).encode() for _ in range(3))
    decoder = Decoder()
    assert decoder.feed(first[:5], [1]) == []
    assert [m.fds for m in decoder.feed(first[5:])] == [(1,)]
    # The kernel joins what was sent without descriptors to what follows, and ends with data that has some.
    assert [m.fds for m in decoder.feed(first + second, [2])] == [(), (2,)]
    assert [m.fds for m in decoder.feed(first + second[:3], [3])] == [()]
    assert [m.fds for m in decoder.feed(second[3:] + third, [4])] == [(3,), (4,)]


def test_the_kernel_delivers_descriptors_as_the_decoder_believes():
    """VHU-2: both ends are real sockets; large reads, so that messages come joined."""
    sent = [
        (Message(Request.SET_VRING_NUM, 1, bytes(8)), 0),
        (Message(Request.SET_VRING_KICK, 1, bytes(8)), 1),
        (Message(Request.SET_VRING_CALL, 1, bytes(8)), 2),
        (Message(Request.SET_VRING_BASE, 1, bytes(8)), 0),
        (Message(Request.SET_VRING_ADDR, 1, bytes(40)), 0),
        (Message(Request.SET_MEM_TABLE, 1, bytes(8)), 8),
        (Message(Request.GET_FEATURES), 0),
    ]
    ours, theirs = socket.socketpair()
    decoder, decoded = Decoder(), []
    with ours, theirs, open(os.devnull, "rb") as null:
        for message, count in sent:
            socket.send_fds(ours, [message.encode()], [null.fileno()] * count)
        ours.shutdown(socket.SHUT_WR)
        while True:
            data, fds, _, _ = socket.recv_fds(theirs, 65536, 16)
            if not data:
                break
            decoded += decoder.feed(data, fds)
        for fd in itertools.chain.from_iterable(m.fds for m in decoded):
            os.close(fd)
    assert [(m.request, len(m.fds)) for m in decoded] == [(m.request, count) for m, count in sent]


@pytest.mark.parametrize("version", [0, 2, 3])
def test_another_version_is_refused_and_the_descriptors_can_be_closed(version: int):
    """VHU-1."""
    decoder = Decoder()
    good = Message(Request.SET_VRING_KICK, VERSION, bytes(8)).encode()
    with pytest.raises(ProtocolError, match=f"message 12 of version {version}, want 1"):
        decoder.feed(good + struct.pack("=III", 12, version, 8), [7, 8])
    assert decoder.close() == [7, 8]  # also those of the good message, which was not handed out


def test_a_payload_above_the_bound_is_refused_before_any_of_it_is_kept():
    assert len(Decoder(max_payload=268).feed(Message(24, VERSION, bytes(268)).encode())) == 1
    with pytest.raises(ProtocolError, match="message 24 with 269 bytes, 268 are allowed"):
        Decoder(max_payload=268).feed(struct.pack("=III", 24, VERSION, 269))
    with pytest.raises(ProtocolError, match=f"{2**32 - 1} bytes, {MAX_PAYLOAD} are allowed"):
        Decoder().feed(struct.pack("=III", 24, VERSION, 2**32 - 1))


@pytest.mark.parametrize("at", [0, 5, 12])
def test_more_than_eight_descriptors_with_one_message_are_refused(at: int):
    """VHU-17; it makes no difference that they come in two parts."""
    encoded = Message(Request.SET_MEM_TABLE, VERSION, bytes(8)).encode()
    decoder = Decoder()
    decoder.feed(encoded[:at], range(4 if at else 0))
    with pytest.raises(ProtocolError, match="9 descriptors with a message, 8 are allowed"):
        decoder.feed(encoded[at:], range(100, 105 if at else 109))
    assert len(decoder.close()) == 9


def test_nothing_is_decoded_after_an_error_but_descriptors_are_still_accounted_for():
    """VHU-3."""
    decoder = Decoder()
    with pytest.raises(ProtocolError):
        decoder.feed(bytes(12), [1])
    with pytest.raises(ProtocolError, match="12 bytes after"):
        decoder.feed(Message(Request.GET_FEATURES).encode(), [2])
    assert decoder.close() == [1, 2]
    assert decoder.close() == []


@given(st.binary(max_size=200), st.lists(st.integers(1, 40)))
def test_no_bytes_do_worse_than_being_refused_and_no_descriptor_is_lost(data: bytes, cuts: list[int]):
    decoder, fed, handed_out = Decoder(), itertools.count(), []
    try:
        for cut in cuts:
            chunk, data = data[:cut], data[cut:]
            handed_out += [fd for m in decoder.feed(chunk, [next(fed)]) for fd in m.fds]
    except ProtocolError:
        pass
    assert sorted(handed_out + decoder.close()) == [*range(next(fed))]


MESSAGES = st.lists(
    st.builds(
        Message,
        U32,
        st.sampled_from([1, 5, 9]),
        st.binary(max_size=40),
        st.lists(st.integers(3, 99), max_size=8).map(tuple),
    ),
    max_size=5,
)


@given(MESSAGES, st.data())
def test_any_messages_in_any_pieces_come_out_whole(messages: list[Message], data: st.DataObject):
    decoder, decoded = Decoder(), []
    for message in messages:
        encoded = message.encode()
        cuts = sorted(data.draw(st.sets(st.integers(1, len(encoded) - 1), max_size=3)))
        for start, end in itertools.pairwise([0, *cuts, len(encoded)]):
            decoded += decoder.feed(encoded[start:end], () if start else message.fds)
    assert decoded == messages


# Traces.


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (Message(Request.SET_OWNER), "SET_OWNER"),
        (
            Message(Request.GET_FEATURES, 5, encode_u64(0x15C007646)),
            "GET_FEATURES reply 0x15c007646",
        ),
        (
            Message(Request.GET_CONFIG, 1, ConfigSpace(0, 60).encode()),
            "GET_CONFIG offset=0 size=60 flags=0",
        ),
        (Message(Request.GET_CONFIG, 5), "GET_CONFIG reply"),  # refused
        (
            Message(Request.SET_VRING_KICK, 1, VringFd(0).encode(), (12,)),
            "SET_VRING_KICK index=0 fds=[12]",
        ),
        (
            Message(Request.SET_VRING_ERR, 1, VringFd(1, True).encode()),
            "SET_VRING_ERR index=1 nofd",
        ),
        (
            Message(Request.SET_VRING_NUM, 9, VringState(1, 256).encode()),
            "SET_VRING_NUM index=1 num=256 need_reply",
        ),
        (Message(Request.SET_VRING_NUM, 5, encode_u64(0)), "SET_VRING_NUM reply 0x0"),
        (
            Message(
                Request.SET_MEM_TABLE,
                1,
                MemoryTable((MemoryRegion(0x100000, 4096, 0x7F0000000000, 0),)).encode(),
                (4,),
            ),
            "SET_MEM_TABLE [guest_address=0x100000 size=4096 user_address=0x7f0000000000 mmap_offset=0]"
            " fds=[4]",
        ),
        (Message(Request.SET_MEM_TABLE, 1, MemoryTable(()).encode()), "SET_MEM_TABLE no regions"),
        (
            Message(Request.ADD_MEM_REG, 1, SingleMemoryRegion(MemoryRegion(1, 2, 3, 4)).encode()),
            "ADD_MEM_REG guest_address=1 size=2 user_address=3 mmap_offset=4",
        ),
        (Message(Request.SET_VRING_NUM, 1, b"\x01\x02"), "SET_VRING_NUM payload=0102 (2 bytes)"),
        (Message(99, 1, bytes(8)), "request 99 0x0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message_is_described_on_one_line(message: Message, line: str):
    assert message.describe() == line


def test_the_channel_back_has_names_of_its_own():
    assert Message(BackendRequest.CONFIG_CHANGE_MSG, 9).describe(BackendRequest) == (
        "CONFIG_CHANGE_MSG need_reply"
    )
    call = Message(BackendRequest.VRING_CALL, 1, VringState(2, 0).encode())
    assert call.describe(BackendRequest) == "VRING_CALL index=2 num=0"
    answer = call.reply(encode_u64(1))
    assert answer.describe(BackendRequest) == "VRING_CALL reply 0x1"


@given(U32, U32, st.binary(max_size=300), st.sampled_from([Request, BackendRequest]))
def test_any_message_can_be_described(number: int, flags: int, payload: bytes, requests):
    assert "\n" not in Message(number % 50, flags, payload).describe(requests)


# What SPDK's initiator and target said to each other, recorded.

RECORDED = Path(__file__).parent.parent / "data/spdk"
FIELDS = re.compile(r"(\w+)=(0x[0-9a-f]+|\d+)")


def payload_of(request: Request, rest: str) -> bytes:
    """Our encoding of the payload that a recorded line shows."""
    rest, _, region = rest.partition(" region=")  # 80 of its bytes
    field = {name: int(value, 0) for name, value in FIELDS.findall(rest)}
    if "nregions" in field:
        assert field["nregions"] == 1
        return MemoryTable((MemoryRegion(field["gpa"], field["size"], field["uva"], field["off"]),)).encode()
    if "desc" in field:
        addresses = (field[name] for name in ("desc", "used", "avail", "log"))
        return VringAddress(field["index"], field["flags"], *addresses).encode()
    if "num" in field:
        return VringState(field["index"], field["num"]).encode()
    if "off" in field:
        space = bytes.fromhex(region)
        return ConfigSpace(field["off"], field["size"], field["flags"], space).encode()
    if "u64" in field:
        return VringFd(field["u64"]).encode()
    return encode_u64(int(rest, 16)) if rest.strip() else b""


@pytest.mark.parametrize("name", ["blk", "scsi"])
def test_the_recorded_conversation_of_spdk_is_ours_byte_for_byte_in_size_and_flags(name: str):
    """VHU-1, VHU-4: a reply for each request that expects one, and no other."""
    pattern = re.compile(r"([<>]) (\w+) flags=(0x\d) size=(\d+) (.*?);? ?(?:fds=([\d,]+))?")
    front, back = Decoder(), Decoder()
    awaited: list[int] = []
    lines = (RECORDED / f"vhost-user-wire-{name}.txt").read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        match = pattern.fullmatch(line)
        assert match, line
        way, word, flags, size, rest, fds = match.groups()
        payload = payload_of(Request[word], rest)
        assert len(payload) == int(size), line
        message = Message(
            Request[word], int(flags, 16), payload, tuple(map(int, fds.split(","))) if fds else ()
        )
        decoder = back if way == ">" else front
        assert decoder.feed(message.encode(), message.fds) == [message]
        assert message.name == word
        if way == ">":
            assert not awaited
            awaited = [message.request] if expected_reply(message.request, 0x201) else []
        else:
            assert message.flags & REPLY
            assert awaited.pop() == message.request
    assert not awaited
