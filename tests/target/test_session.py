"""The back end's side of a vhost-user connection: messages in, replies out, descriptors closed."""

import contextlib
import gc
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from tests.target import front_end as fe
from tests.target.front_end import GUEST, USER, FrontEnd, eventfd, state, u64
from virtio.errors import ProtocolError, RequestError
from virtio.ring.device import SLOTS, DeviceRing
from virtio.target.blk import BlkDevice
from virtio.target.changes import Change, Changes
from virtio.target.link import Receiver, pair
from virtio.target.scsi import LogicalUnit, Target
from virtio.target.session import Session
from virtio.target.store import MemoryStore
from virtio.target.virtio_scsi import ScsiDevice
from virtio.wire.vhost_user import Message

IN = struct.pack("<IIQ", 0, 0, 0)  # a header that asks for the first sector
OK = b"\0"
EVERYTHING = fe.MQ | fe.REPLY_ACK | fe.CONFIG | fe.RESET | fe.MEM_SLOTS | fe.STATUS


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def session():
    """A session of a 1 MiB disk with four queues, called directly; at its end no descriptor is left."""
    before = descriptors()
    ours, theirs = socket.socketpair()
    store = MemoryStore(1 << 20)
    session = Session(ours, BlkDevice(store, queues=4))
    yield session
    session.close()
    store.close()
    theirs.close()
    assert descriptors() == before


def say(session: Session, request: int, payload: bytes = b"", *fds: int, flags: int = 1) -> bytes | None:
    """The payload of the reply, None if there is none; descriptors are copied, as a socket does."""
    reply = session.handle(Message(request, flags, payload, tuple(map(os.dup, fds))))
    return reply.payload if reply else None


@pytest.fixture
def file():
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 1 << 16)
    yield fd
    os.close(fd)


def region(guest: int = GUEST, size: int = 1 << 16, user: int = USER, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def test_what_is_offered(session):
    # VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC; WRITE_ZEROES, DISCARD, MQ, TOPOLOGY, FLUSH,
    # BLK_SIZE, SEG_MAX, SIZE_MAX
    assert say(session, fe.GET_FEATURES) == u64(0x1_7000_7646)
    # STATUS, CONFIGURE_MEM_SLOTS, RESET_DEVICE, CONFIG, BACKEND_REQ, REPLY_ACK, MQ
    assert say(session, fe.GET_PROTOCOL_FEATURES) == u64(0x1A229)
    say(session, fe.SET_PROTOCOL_FEATURES, u64(EVERYTHING))
    assert say(session, fe.GET_QUEUE_NUM) == u64(4)
    assert say(session, fe.GET_MAX_MEM_SLOTS) == u64(SLOTS)


def test_an_acknowledgement_comes_when_negotiated_and_asked_for(session):
    need_reply = 1 | 8
    assert say(session, fe.SET_OWNER, flags=need_reply) is None
    say(session, fe.SET_PROTOCOL_FEATURES, u64(fe.REPLY_ACK))
    assert say(session, fe.SET_OWNER, flags=1) is None
    assert say(session, fe.SET_OWNER, flags=need_reply) == u64(0)
    assert say(session, fe.RESET_OWNER, flags=need_reply) == u64(0)  # tolerated
    assert say(session, fe.GET_FEATURES, flags=need_reply) == u64(0x1_7000_7646)  # its own reply, once


def test_the_configuration_is_read_in_any_part(session):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(fe.CONFIG | fe.REPLY_ACK))
    # offset, size, flags; then as many bytes
    ask = lambda offset, size: say(session, fe.GET_CONFIG, struct.pack("=III", offset, size, 0) + bytes(size))  # noqa: E731
    assert ask(0, 8) == struct.pack("=III", 0, 8, 0) + b"\0\x08\0\0\0\0\0\0"  # 2048 sectors
    assert ask(34, 2) == struct.pack("=III", 34, 2, 0) + b"\4\0"  # num_queues
    assert ask(200, 56)[12:] == bytes(56)  # past the fields: zeros, as new front ends know more of them
    assert ask(200, 57) == b""  # past the space: an error
    assert ask(0, 0) == b""
    write = struct.pack("=III", 0, 8, 0) + bytes(8)
    assert say(session, fe.SET_CONFIG, write, flags=1 | 8) == u64(1)  # refused
    assert say(session, fe.SET_CONFIG, write) is None


def test_the_status_is_kept_until_a_reset(session):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(fe.STATUS | fe.RESET))
    say(session, fe.SET_STATUS, u64(15))
    assert say(session, fe.GET_STATUS) == u64(15)
    say(session, fe.RESET_DEVICE)
    assert say(session, fe.GET_STATUS) == u64(0)


BAD = {
    "an unknown request": (99, b""),
    "a log, which was not offered": (6, bytes(16)),
    "a feature that was not offered": (fe.SET_FEATURES, u64(1 << 34)),
    "a protocol feature that was not offered": (fe.SET_PROTOCOL_FEATURES, u64(1 << 12)),
    "a payload too short": (fe.SET_FEATURES, bytes(7)),
    "a payload too long": (fe.SET_VRING_NUM, bytes(9)),
    "a ring that there is not": (fe.SET_VRING_NUM, state(4, 64)),
    "a ring of no size": (fe.SET_VRING_NUM, state(0, 0)),
    "a ring of an odd size": (fe.SET_VRING_NUM, state(0, 63)),
    "a ring too large": (fe.SET_VRING_NUM, state(0, 65536)),
    "a base of 17 bits": (fe.SET_VRING_BASE, state(0, 65536)),
    "neither on nor off": (fe.SET_VRING_ENABLE, state(0, 2)),
    "a base of no ring": (fe.GET_VRING_BASE, state(9, 0)),
    "a kick without a descriptor": (fe.SET_VRING_KICK, u64(0)),
    "a kick of no ring": (fe.SET_VRING_KICK, u64(4 | fe.NOFD)),
    "a polled ring that is nowhere": (fe.SET_VRING_KICK, u64(fe.NOFD)),
    "a call without a descriptor": (fe.SET_VRING_CALL, u64(0)),
    "nine regions": (fe.SET_MEM_TABLE, struct.pack("=II", 9, 0) + region() * 9),
    "a region without a descriptor": (fe.SET_MEM_TABLE, struct.pack("=II", 1, 0) + region()),
    "a table cut off": (fe.SET_MEM_TABLE, struct.pack("=II", 2, 0) + region()),
}


@pytest.mark.parametrize(("request_", "payload"), BAD.values(), ids=BAD)
def test_a_message_that_may_not_be_is_refused(session, request_, payload):
    with pytest.raises(ProtocolError):
        say(session, request_, payload)


@settings(max_examples=300)
@given(
    messages=st.lists(
        st.tuples(
            st.integers(0, 45),
            st.binary(max_size=64)
            | st.builds(state, st.integers(0, 5), st.integers(0, 70000))
            | st.just(u64(0)),
            st.integers(0, 2),
        ),
        max_size=10,
    )
)
def test_any_message_at_all_is_answered_or_refused_and_its_descriptors_closed(messages):
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    store = MemoryStore(1 << 20)
    session = Session(ours, BlkDevice(store, queues=4))
    session.handle(Message(fe.SET_PROTOCOL_FEATURES, 1, u64(EVERYTHING)))
    with contextlib.suppress(ProtocolError):
        for request, payload, fds in messages:
            session.handle(Message(request, 9, payload, tuple(os.memfd_create("any") for _ in range(fds))))
    session.close()
    theirs.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before  # less if garbage of another test is found


GATED = [fe.GET_QUEUE_NUM, fe.GET_CONFIG, fe.SET_CONFIG, fe.RESET_DEVICE, fe.GET_MAX_MEM_SLOTS,
         fe.SET_BACKEND_REQ_FD, fe.ADD_MEM_REG, fe.REM_MEM_REG, fe.SET_STATUS, fe.GET_STATUS]  # fmt: skip


@pytest.mark.parametrize("request_", GATED)
def test_an_extension_that_was_not_negotiated_is_refused(session, request_):
    with pytest.raises(ProtocolError, match="without"):
        say(session, request_, bytes(12))


@pytest.mark.parametrize(
    "bad",
    [
        region(size=(1 << 16) + 1),  # longer than the file
        region(offset=4096),
        region(size=0),
        region(size=2**63),
        region(guest=2**64 - (1 << 16)),
        region(user=2**64 - 4096),
        region(guest=GUEST + 1),
        region(offset=2**64 - 4096),
    ],
)
@pytest.mark.parametrize("how", ["table", "slot"])
def test_a_region_that_cannot_be_is_refused(session, file, bad, how):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(EVERYTHING))
    with pytest.raises(ProtocolError):
        if how == "table":
            say(session, fe.SET_MEM_TABLE, struct.pack("=II", 1, 0) + bad, file)
        else:
            say(session, fe.ADD_MEM_REG, bytes(8) + bad, file)


def test_a_region_in_what_is_no_memory_is_refused(session):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(EVERYTHING))
    with eventfd() as fd, pytest.raises(ProtocolError):
        say(session, fe.ADD_MEM_REG, bytes(8) + region(), fd)


def test_slots_are_added_removed_and_counted(session, file):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(EVERYTHING))
    slots = [bytes(8) + region(GUEST + (n << 16), user=USER + (n << 16)) for n in range(SLOTS + 1)]
    for slot in slots[:SLOTS]:
        say(session, fe.ADD_MEM_REG, slot, file)
    with pytest.raises(ProtocolError, match=f"more than the {SLOTS} slots"):
        say(session, fe.ADD_MEM_REG, slots[SLOTS], file)
    for slot in slots[:SLOTS]:
        say(session, fe.REM_MEM_REG, slot)
    with pytest.raises(ProtocolError, match="no such memory region"):
        say(session, fe.REM_MEM_REG, slots[0])
    say(session, fe.ADD_MEM_REG, slots[0], file)
    say(session, fe.REM_MEM_REG, bytes(8) + region(offset=4096), file)  # a descriptor it need not have


def test_descriptors_that_nobody_asked_for_are_closed(session, file):
    for request, payload in ((fe.SET_OWNER, b""), (fe.GET_FEATURES, b""), (fe.SET_VRING_ERR, u64(0))):
        before = descriptors()
        say(session, request, payload, *[file] * 8)
        assert descriptors() == before
    with pytest.raises(ProtocolError):
        say(session, fe.SET_VRING_CALL, u64(0), file, file)
    with pytest.raises(ProtocolError):
        say(session, fe.SET_VRING_CALL, u64(fe.NOFD), file)
    with pytest.raises(ProtocolError):
        say(session, 99, b"", file)


def test_a_new_descriptor_takes_the_place_of_the_old_one(session, file):
    with eventfd() as one:
        for request in (fe.SET_VRING_CALL, fe.SET_VRING_KICK):
            say(session, request, u64(0), one)
            before = descriptors()
            say(session, request, u64(0), one)
            assert descriptors() == before
        say(session, fe.SET_VRING_CALL, u64(fe.NOFD))
        assert descriptors() == before - 1
    with pytest.raises(ProtocolError, match="kick descriptor of ring 0"):
        say(session, fe.SET_VRING_KICK, u64(0), file)  # cannot be polled


class Running:
    """A session in a thread, and the front end that it serves."""

    def __init__(
        self,
        handlers: list[Callable[[DeviceRing], int] | None] | None = None,
        device: ScsiDevice | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.store = MemoryStore(1 << 20)
        blk = BlkDevice(self.store, queues=2)
        blk.handlers = handlers or blk.handlers
        self.sender, link = pair()
        self.changes = Changes(device or blk)
        self.receiver = Receiver(link, self.changes)
        self.session = Session(ours, device or blk, changes=self.receiver)
        self.front = FrontEnd(theirs)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.session.run()
        except ProtocolError as error:
            self.error = error
        finally:
            self.session.close()
            self.receiver.close()

    def change(self, method: str, **parameters: object) -> None:
        """Change the device, as its target does."""
        self.sender.send(self.changes.prepare(method, parameters))
        assert self.sender.answer(10)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.front.__exit__()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.sender.close()
        self.store.close()


@pytest.mark.parametrize("features", [0, fe.EVENT_IDX, fe.INDIRECT_DESC, fe.EVENT_IDX | fe.INDIRECT_DESC])
def test_requests_are_served_until_the_front_end_leaves(features):
    before = descriptors()
    with Running() as running:
        front = running.front
        front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | features)
        for index in (0, 1):
            front.ring(index)
            assert front.request(index, [IN], [512, 1]) == (513, [bytes(512), OK])
    assert running.error is None
    del running, front
    assert descriptors() == before


def test_without_protocol_features_rings_start_enabled():
    with Running() as running:
        running.front.hello(fe.VERSION_1)
        running.front.ring(0)
        assert running.front.request(0, [IN], [512, 1])[0] == 513


def test_with_them_a_ring_is_served_once_it_is_enabled():
    with Running() as running:
        front = running.front
        front.hello()
        ring = front.ring(0)
        front.send(fe.SET_VRING_ENABLE, state(0, 0))
        front.number(fe.GET_FEATURES)  # by its reply all before it is done
        ring.describe(0, GUEST + 0x80000, 16)
        with pytest.raises(TimeoutError):
            ring.chain([(GUEST + 0x80000, 16, 0), (GUEST + 0x90000, 513, fe.WRITE)])
            ring.offer(0)
            os.eventfd_write(front.kicks[0], 1)
            front.wait(0, timeout=0.1)
        front.send(fe.SET_VRING_ENABLE, state(0, 1))
        assert front.wait(0) == [(0, 513)]


def test_a_stopped_ring_says_where_it_was_and_goes_on_from_there():
    with Running() as running:
        front = running.front
        front.hello()
        front.ring(0, base=65530)
        front.ring(1)
        for _ in range(10):
            front.request(0, [IN], [512, 1])
        assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 4)  # 65530 + 10
        os.eventfd_write(front.kicks[0], 1)  # a late kick starts nothing
        assert front.request(1, [IN], [512, 1])[0] == 513  # the other ring runs on
        assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 4)
        front.ring(0, base=4)
        front.request(0, [IN], [512, 1])
        assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 5)


def test_a_running_ring_is_not_resized():
    with Running() as running:
        running.front.hello()
        running.front.ring(0)
        running.front.request(0, [IN], [512, 1])
        running.front.send(fe.SET_VRING_NUM, state(0, 128))
        assert running.front.ended()
    assert "runs" in str(running.error)


def test_a_ring_may_be_polled_in_place_of_kicked():
    with Running() as running:
        front = running.front
        front.hello()
        ring = front.ring(0)
        front.ask(fe.GET_VRING_BASE, state(0, 0))
        front.send(fe.SET_VRING_KICK, u64(fe.NOFD))
        front.send(fe.SET_VRING_CALL, u64(fe.NOFD))
        ring.chain([(GUEST + 0x80000, 16, 0), (GUEST + 0x90000, 513, fe.WRITE)])
        for _ in range(3):
            ring.offer(0)
            assert front.wait(0) == [(0, 513)]


def test_memory_may_be_added_and_removed_under_running_rings(file):
    with Running() as running:
        front = running.front
        front.hello(extensions=fe.MEM_SLOTS | fe.REPLY_ACK)
        ring = front.ring(0)
        front.request(0, [IN], [512, 1])
        front.send(fe.ADD_MEM_REG, bytes(8) + region(0x1000, user=0x1000), [file])
        ring.chain([(GUEST + 0x80000, 16, 0), (0x1000, 513, fe.WRITE)])
        front.number(fe.GET_FEATURES)
        ring.offer(0)
        os.eventfd_write(front.kicks[0], 1)
        assert front.wait(0) == [(0, 513)]
        front.send(fe.REM_MEM_REG, bytes(8) + region(0x1000, user=0x1000))
        assert front.number(fe.GET_FEATURES)
        front.request(0, [IN], [512, 1])
        front.send(fe.REM_MEM_REG, bytes(8) + front.region())  # the ring's own
        assert front.ended()
    assert "not in a memory region" in str(running.error)


@pytest.mark.parametrize("end", [fe.RESET_DEVICE, fe.SET_STATUS])
def test_a_reset_stops_all_rings_and_begins_again(end):
    with Running() as running:
        front = running.front
        front.hello(extensions=fe.RESET | fe.STATUS)
        front.send(fe.SET_STATUS, u64(15))
        for _ in range(2):
            front.ring(0)
            front.request(0, [IN], [512, 1])
            front.send(end, u64(0) if end == fe.SET_STATUS else b"")
            assert front.number(fe.GET_STATUS) == 0
            assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 0)
            front.send(fe.SET_STATUS, u64(15))


def test_messages_may_come_a_byte_at_a_time():
    with Running() as running:
        front = running.front
        for byte in struct.pack("=III", fe.GET_FEATURES, 1, 0) * 2:
            front.sock.send(bytes([byte]))
        for _ in range(2):
            assert front.receive() == (fe.GET_FEATURES, 5, u64(0x1_7000_7646))


def test_buffers_of_a_queue_without_a_handler_are_kept():
    """As those of virtio-scsi's event queue are until there is an event."""
    with Running(handlers=[None, BlkDevice(MemoryStore(1 << 20), 1).handle]) as running:
        front = running.front
        front.hello()
        ring = front.ring(0)
        front.ring(1)
        ring.chain([(GUEST, 16, fe.WRITE)])
        ring.offer(0)
        os.eventfd_write(front.kicks[0], 1)
        assert front.request(1, [IN], [512, 1])[0] == 513
        assert ring.take() == []
        assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 0)


def test_what_is_settled_is_all_queues_but_the_first():
    """All that was made available before a task management function is done before its answer."""
    order: list[str] = []

    def control(ring: DeviceRing) -> int:
        running.session._settle()
        order.append("control")
        return 0

    def request(ring: DeviceRing) -> int:
        order.append("request")
        return 0

    with Running(handlers=[control, request]) as running:
        front = running.front
        front.hello()
        for index in (0, 1):
            ring = front.ring(index)
            ring.chain([(GUEST, 1, 0)])
        front.send(fe.SET_VRING_ENABLE, state(0, 0))
        front.send(fe.SET_VRING_ENABLE, state(1, 0))
        front.number(fe.GET_FEATURES)
        front.rings[0].offer(0)
        front.rings[1].offer(*[0] * 5)
        front.send(fe.SET_VRING_ENABLE, state(1, 1))
        front.send(fe.SET_VRING_ENABLE, state(0, 1))
        front.wait(0)
    assert order == ["request"] * 5 + ["control"]


def test_a_driver_that_sleeps_is_called_and_a_device_that_sleeps_is_kicked():
    """Both ends by eventfd, thousands of times: a notification lost on either side would hang it."""
    with Running() as running:
        front = running.front
        front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | fe.EVENT_IDX)
        ring = front.ring(0, size=4, base=65000)
        front.memory[0x80000:0x80010] = IN
        ring.chain([(GUEST + 0x80000, 16, 0), (GUEST + 0x90000, 513, fe.WRITE)])
        poll = select.poll()
        poll.register(front.calls[0], select.POLLIN)
        kicks = 0
        for _ in range(3000):
            if ring.offer(0):
                kicks += 1
                os.eventfd_write(front.kicks[0], 1)
            while not ring.take():
                ring.want_call()
                if ring.used_index() == ring.seen:
                    assert poll.poll(5000), "a call was lost, or a kick"
                    os.eventfd_read(front.calls[0])
        assert kicks  # at first at least


def test_who_gives_another_call_descriptor_is_called_by_it():
    """A completion may have been told by the old one, at which its front end looks no more."""
    with Running() as running:
        front = running.front
        front.hello()
        front.ring(0)
        front.request(0, [IN], [512, 1])
        with eventfd() as other:
            front.send(fe.SET_VRING_CALL, u64(0), [other])
            poll = select.poll()
            poll.register(other, select.POLLIN)
            assert poll.poll(5000)


# Changes while a session goes on; the channel back.

CONFIG_CHANGE = struct.pack("=III", 2, 1, 0)  # request 2, version 1 and no NEED_REPLY, no payload


@pytest.fixture
def channel():
    """The channel back, and the end of it that is given away."""
    mine, theirs = socket.socketpair()
    mine.settimeout(0.2)
    yield mine, theirs
    mine.close()
    theirs.close()


def test_a_disk_of_another_size_is_announced_on_the_channel_back(channel):
    mine, theirs = channel
    with Running() as running:
        front = running.front
        front.hello(extensions=fe.CONFIG | fe.BACKEND_REQ | fe.REPLY_ACK)
        front.send(fe.SET_BACKEND_REQ_FD, b"", [theirs.fileno()], flags=9)
        assert front.receive()[2] == u64(0)
        running.change("resize_disk", size=2 << 20)
        assert mine.recv(100) == CONFIG_CHANGE
        asked = struct.pack("=III", 0, 8, 0)  # offset, size, flags
        assert front.ask(fe.GET_CONFIG, asked + bytes(8)) == asked + u64(4096)
        running.change("set_fault", every=0)  # nothing of the configuration
        with pytest.raises(TimeoutError):
            mine.recv(100)


@pytest.mark.parametrize("extensions", [fe.BACKEND_REQ, fe.CONFIG])
def test_nothing_is_announced_that_was_not_negotiated(channel, extensions):
    mine, theirs = channel
    with Running() as running:
        running.front.hello(extensions=extensions)
        if extensions & fe.BACKEND_REQ:
            running.front.send(fe.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        running.front.number(fe.GET_FEATURES)
        running.change("resize_disk", size=2 << 20)
        with pytest.raises(TimeoutError):
            mine.recv(100)


def test_a_channel_back_that_nobody_reads_holds_nothing_up(channel):
    mine, theirs = channel
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(b"x")
    theirs.setblocking(True)
    with Running() as running:
        running.front.hello(extensions=fe.CONFIG | fe.BACKEND_REQ)
        running.front.send(fe.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        running.front.ring(0)
        running.front.number(fe.GET_FEATURES)
        running.change("resize_disk", size=2 << 20)
        assert running.front.request(0, [IN], [512, 1])[0] == 513
        while b"x" in mine.recv(1 << 16):
            if not select.select([mine], [], [], 0)[0]:
                break
        running.change("resize_disk", size=1 << 20)
        assert mine.recv(100) == CONFIG_CHANGE


def test_a_channel_back_that_is_closed_does_no_harm(channel):
    mine, theirs = channel
    with Running() as running:
        running.front.hello(extensions=fe.CONFIG | fe.BACKEND_REQ)
        running.front.send(fe.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        running.front.number(fe.GET_FEATURES)
        mine.close()
        for size in (2, 3, 4):
            running.change("resize_disk", size=size << 20)
        running.front.number(fe.GET_FEATURES)


def test_a_new_channel_back_takes_the_place_of_the_old_one(channel):
    mine, theirs = channel
    other, given = socket.socketpair()
    with other, Running() as running:
        running.front.hello(extensions=fe.CONFIG | fe.BACKEND_REQ)
        with given, theirs:
            running.front.send(fe.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
            running.front.send(fe.SET_BACKEND_REQ_FD, b"", [given.fileno()])
        running.front.number(fe.GET_FEATURES)
        assert mine.recv(1) == b""
        running.change("resize_disk", size=2 << 20)
        assert other.recv(100) == CONFIG_CHANGE


def test_what_is_no_channel_back_is_refused_and_closed(session, file):
    say(session, fe.SET_PROTOCOL_FEATURES, u64(fe.BACKEND_REQ))
    for fds in ([], [file], [file, file]):
        before = descriptors()
        with pytest.raises(ProtocolError, match="the channel back"):
            say(session, fe.SET_BACKEND_REQ_FD, b"", *fds)
        assert descriptors() == before


def hang(front: FrontEnd) -> None:
    """Send a request to ring 0, for a disk that hangs."""
    front.memory[0x80000:0x80010] = IN
    front.rings[0].chain([(GUEST + 0x80000, 16, 0), (GUEST + 0x90000, 513, fe.WRITE)])
    front.rings[0].offer(0)
    os.eventfd_write(front.kicks[0], 1)
    with pytest.raises(TimeoutError):
        front.wait(0, timeout=0.1)


def test_a_disk_that_hangs_answers_once_it_does_no_longer():
    with Running() as running:
        front = running.front
        front.hello()
        front.ring(0)
        running.change("set_fault", hang=True)
        hang(front)
        running.change("set_fault", hang=False)
        assert front.wait(0) == [(0, 513)]
        assert os.eventfd_read(front.calls[0]) == 1
        front.request(0, [IN], [512, 1])


@pytest.mark.parametrize("end", [fe.GET_VRING_BASE, fe.RESET_DEVICE])
def test_a_ring_may_stop_while_the_disk_hangs(end):
    with Running() as running:
        front = running.front
        front.hello(extensions=fe.RESET)
        front.ring(0)
        running.change("set_fault", hang=True)
        hang(front)
        if end == fe.RESET_DEVICE:
            front.send(end)
            front.number(fe.GET_FEATURES)
        else:
            assert front.ask(end, state(0, 0)) == state(0, 1)
        running.change("set_fault", hang=False)
        assert front.rings[0].take() == []  # the memory is the driver's again
        front.ring(0)
        assert front.request(0, [IN], [512, 1])[0] == 513


def test_a_slow_disk_sleeps_until_its_time():
    with Running() as running:
        front = running.front
        front.hello()
        front.ring(0)
        running.change("set_fault", delay=0.1)
        before = time.monotonic()
        front.request(0, [IN], [512, 1])
        assert 0.1 <= time.monotonic() - before < 5
        running.change("set_fault", delay=0)
        front.request(0, [IN], [512, 1])


def test_a_change_that_cannot_be_is_refused_and_the_session_goes_on():
    with Running() as running:
        running.front.hello()
        running.front.ring(0)
        running.sender.send(Change("resize_disk", {"size": 1000}))
        with pytest.raises(RequestError, match="want a multiple of 512"):
            running.sender.answer(10)
        assert running.front.request(0, [IN], [512, 1])[0] == 513


@pytest.fixture
def hotplug():
    """A session of a SCSI device with one request queue, whose driver takes hot plug, and its event ring."""
    device = ScsiDevice({0: Target({0: LogicalUnit(MemoryStore(1 << 20))})}, 1)
    with Running(device=device) as running:
        running.front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | fe.EVENT_IDX | 2)  # HOTPLUG
        running.front.ring(1)
        running.front.ring(2)
        running.front.number(fe.GET_FEATURES)
        yield running


def leave(front: FrontEnd, *, kick: bool = False) -> bool:
    """Leave the device a buffer for an event; whether it wanted a kick."""
    front.memory[0x80000:0x80010] = b"\xee" * 16
    front.rings[1].chain([(GUEST + 0x80000, 16, fe.WRITE)])
    wanted = front.rings[1].offer(0)
    if kick:
        os.eventfd_write(front.kicks[1], 1)
    return wanted


def test_a_disk_that_is_added_is_an_event_and_can_be_read(hotplug):
    front = hotplug.front
    leave(front)
    hotplug.change("add_disk", target=0, lun=7, disk="ram:1M")
    assert front.wait(1) == [(0, 16)]
    assert front.memory[0x80000:0x80010].hex(" ", 4) == "01000000 01004007 00000000 01000000"
    assert os.eventfd_read(front.calls[1]) == 1
    header = b"\1\0\x40\7".ljust(19, b"\0") + bytes(32)  # TEST UNIT READY
    assert front.request(2, [header], [108])[1][0][24] == 0x29
    assert front.request(2, [header], [108])[1][0][10] == 0


def test_events_that_were_missed_are_told_when_the_driver_kicks(hotplug):
    front = hotplug.front
    hotplug.change("add_disk", target=0, lun=7, disk="ram:1M")
    assert leave(front, kick=True)
    assert front.wait(1) == [(0, 16)]
    assert front.memory[0x80000:0x80004].hex() == "00000080"
    assert hotplug.error is None


def test_an_event_queue_that_is_polled_is_looked_at(hotplug):
    front = hotplug.front
    front.ask(fe.GET_VRING_BASE, state(1, 0))
    front.send(fe.SET_VRING_KICK, u64(1 | fe.NOFD))
    hotplug.change("add_disk", target=0, lun=7, disk="ram:1M")
    leave(front)
    assert front.wait(1) == [(0, 16)]


def test_an_event_buffer_that_is_too_small_ends_the_session(hotplug):
    front = hotplug.front
    front.rings[1].chain([(GUEST + 0x80000, 15, fe.WRITE)])
    front.rings[1].offer(0)
    hotplug.change("add_disk", target=0, lun=7, disk="ram:1M")
    assert front.ended()
    hotplug.thread.join(10)
    assert "event buffer of 15 bytes" in str(hotplug.error)
