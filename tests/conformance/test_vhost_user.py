"""The vhost-user front end (QEMU's docs/interop/vhost-user.rst)."""

import gc
import os
import threading
import time
from array import array

import pytest

from tests.conformance.driver import (
    KINDS,
    backend,
    batch,
    channel,
    connect,
    device,
    ended,
    exercise,
    fill,
    refused,
)
from tests.model import Backend, Blk, Reply
from tests.model.options import PROTOCOL_FEATURES, RING_FEATURES
from tests.model.wire import NEED_REPLY, NO_FD, REPLY, BackendRequest, F, P
from virtio.errors import NoQueueError, ProtocolError, RequestTimeout, TransportError, VirtioError

REPLIED = ["GET_FEATURES", "GET_PROTOCOL_FEATURES", "GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS"]
REPLIED += ["GET_CONFIG", "GET_STATUS"]
ACKED = ["SET_BACKEND_REQ_FD", "SET_STATUS", "SET_FEATURES", "ADD_MEM_REG", "SET_VRING_NUM"]
ACKED += ["SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"]
FDS = {"SET_MEM_TABLE", "ADD_MEM_REG", "SET_VRING_KICK", "SET_VRING_CALL", "SET_BACKEND_REQ_FD"}


def open_fds() -> set[str]:
    """What this process has open, but for the descriptor that lists it."""
    names = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            names.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return names


# Messages


@pytest.mark.parametrize("kind", KINDS)
def test_every_header_is_well_formed(kind):
    """VHU-1: version 1, no reply bit, the size of each payload; the model looks at every one."""
    with backend(kind) as model, channel(model) as opened:
        exercise(model, opened)
        for record in model.log:
            if record.name.isupper():
                assert record.flags & 3 == 1, f"VHU-1: {record}"
                assert not record.flags & ~(1 | NEED_REPLY), f"VHU-1: {record}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [PROTOCOL_FEATURES, PROTOCOL_FEATURES & ~P.CONFIGURE_MEM_SLOTS])
def test_descriptors_come_with_the_messages_that_name_them(kind, protocol):
    """VHU-2."""
    with backend(kind, protocol_features=protocol) as model:
        with channel(model) as opened:
            opened.read(0, 512)
        for record in model.log:
            assert record.fds == (record.name in FDS), f"VHU-2: {record}"


WRONG = {
    "another request": lambda reply: Reply(reply.request + 1, reply.payload),
    "no reply bit": lambda reply: Reply(reply.request, reply.payload, 1),
    "another version": lambda reply: Reply(reply.request, reply.payload, 2 | REPLY),
    "a payload too short": lambda reply: Reply(reply.request, reply.payload[:-1]),
    "a payload too long": lambda reply: Reply(reply.request, reply.payload + b"\0"),
    "no payload": lambda reply: Reply(reply.request, b""),
    "a size of 4 GiB": lambda reply: Reply(reply.request, reply.payload, size=(1 << 32) - 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPLIED + ["SET_FEATURES", "SET_VRING_ADDR"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reply_ends_the_connection(kind, name, wrong):
    """VHU-3, VHU-16, VHU-19."""
    with backend(kind, replies={name: WRONG[wrong]}) as model:
        error = refused(model, "VHU-3")
        assert isinstance(error, ProtocolError | TransportError), f"VHU-3: {error!r}"
        if isinstance(error, ProtocolError):
            assert model.names()[-2:] in ([name, "disconnect"],) or "connect" in model.names()[1:], (
                f"VHU-3: after a wrong reply to {name} came {model.names()}"
            )


@pytest.mark.parametrize("name", REPLIED + ACKED)
def test_unexpected_descriptors_are_closed(name):
    """VHU-3: and none is left open, whatever becomes of the attempt."""
    spare = os.open("/dev/null", os.O_RDONLY)

    def add(reply: Reply) -> Reply:
        return Reply(reply.request, reply.payload, fds=[spare] * 3)

    try:
        with backend("blk", replies={name: add}) as model:
            before = sum("/dev/null" in entry for entry in open_fds())
            try:
                connect(model).close()
            except VirtioError:
                pass
            after = sum("/dev/null" in entry for entry in open_fds())
            assert after == before, f"VHU-3: {after - before} descriptors are still open"
    finally:
        os.close(spare)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPLIED + ACKED + ["SET_OWNER", "SET_PROTOCOL_FEATURES"])
def test_a_back_end_that_drops_the_connection_is_reported(kind, name):
    """VHU-3."""
    with backend(kind, drop_at=name) as model:
        started = time.monotonic()
        error = refused(model, "VHU-3", timeout=30)
        assert isinstance(error, TransportError), f"VHU-3: {error!r}"
        assert time.monotonic() - started < 10, "VHU-3: it was waited for"


@pytest.mark.parametrize("name", ["GET_FEATURES", "GET_CONFIG", "ADD_MEM_REG", "SET_VRING_KICK"])
def test_a_back_end_that_hangs_is_not_waited_for_for_ever(name):
    """VHU-4: the wait for a reply is bounded."""
    with backend("blk", hang_on=name) as model:
        error = refused(model, "VHU-4", timeout=0.2)
        assert isinstance(error, RequestTimeout | TransportError), f"VHU-4: {error!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_replies_may_come_a_byte_at_a_time(kind):
    """VHU-1, VHU-3."""
    with backend(kind, fragment=True) as model, channel(model) as opened:
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", [PROTOCOL_FEATURES, PROTOCOL_FEATURES & ~P.REPLY_ACK])
def test_each_reply_is_awaited_before_the_next_message(kind, protocol):
    """VHU-4, VHU-19: while a reply is held back, nothing more comes."""
    with backend(kind, protocol_features=protocol) as model:

        def wait(reply: Reply) -> Reply:
            session = model.session
            assert session is not None
            import select

            if select.select([session.connection], [], [], 0.005)[0]:
                model.violations.append("VHU-4: a message came before a reply")
            return reply

        model.options.replies = dict.fromkeys([*REPLIED, *ACKED], wait)
        with channel(model) as opened:
            exercise(model, opened)


# Negotiation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit", [P.MQ, P.REPLY_ACK, P.BACKEND_REQ, P.CONFIGURE_MEM_SLOTS, P.STATUS])
def test_each_extension_is_used_if_offered_and_done_without_if_not(kind, bit):
    """VHU-5, VHU-11, VHU-14, VHU-17, VHU-19, VHU-23: the model knows each message's feature."""
    for offered in (bit | P.CONFIG, PROTOCOL_FEATURES & ~bit):
        with backend(kind, protocol_features=offered) as model, channel(model, queues=1) as opened:
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bare_back_end_works(kind):
    """VHU-5, VHU-7, VHU-8: no bit 30, so nothing of the protocol features is touched."""
    with backend(kind, features=F.VERSION_1) as model:
        if kind == "blk":
            error = refused(model, "VHU-5")  # its capacity is in the configuration space
            assert isinstance(error, TransportError), f"VHU-5: {error!r}"
        else:
            with channel(model, queues=1) as opened:
                exercise(model, opened)
        names = set(model.names())
        assert not names & {"GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES"}, "VHU-7: without bit 30"
        assert "SET_VRING_ENABLE" not in names, "VHU-8: without bit 30"


@pytest.mark.parametrize("kind", KINDS)
def test_set_owner_comes_first_and_once(kind):
    """VHU-6."""
    with backend(kind) as model:
        with channel(model) as opened:
            exercise(model, opened)
        names = model.names()
        assert names[:2] == ["connect", "SET_OWNER"], f"VHU-6: it began with {names[:2]}"
        assert names.count("SET_OWNER") == 1, "VHU-6: a second SET_OWNER"
        assert "RESET_OWNER" not in names, "VHU-6: RESET_OWNER"


@pytest.mark.parametrize("kind", KINDS)
def test_protocol_features_are_settled_before_the_features(kind):
    """VHU-7: after GET_FEATURES showed bit 30."""
    with backend(kind) as model, channel(model):
        order = [
            model.names().index(name)
            for name in (
                "GET_FEATURES",
                "GET_PROTOCOL_FEATURES",
                "SET_PROTOCOL_FEATURES",
                "SET_FEATURES",
            )
        ]
        assert order == sorted(order), f"VHU-7: {model.names()}"


@pytest.mark.parametrize("kind", KINDS)
def test_bit_30_is_accepted_and_then_every_ring_is_enabled(kind):
    """VHU-8."""
    with backend(kind) as model, channel(model, queues=2):
        assert model.values("SET_FEATURES")[0] & F.PROTOCOL_FEATURES, "VHU-8: bit 30"
        enabled = model.values("SET_VRING_ENABLE")
        assert sorted(enabled) == [(index, 1) for index in sorted(model.rings)], f"VHU-8: {enabled}"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_migration_or_of_other_machines_is_taken(kind):
    """VHU-20, VHU-21, VHU-25, VHU-26: all protocol features are offered."""
    with backend(kind, protocol_features=(1 << 64) - 1) as model:
        with channel(model) as opened:
            exercise(model, opened)
        (taken,) = model.values("SET_PROTOCOL_FEATURES")
        for bit, clause in {
            P.LOG_SHMFD: "VHU-25",
            P.PAGEFAULT: "VHU-25",
            P.DEVICE_STATE: "VHU-26",
            P.INFLIGHT_SHMFD: "VHU-20",
            P.INBAND_NOTIFICATIONS: "VHU-21",
        }.items():
            assert not taken & bit, f"{clause}: {bit.name} was taken, and nothing is done with it"
        known = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.CONFIGURE_MEM_SLOTS | P.STATUS
        known |= P.RESET_DEVICE
        assert not taken & ~known, f"VHU-5: protocol features {taken & ~known:#x} taken"


# Rings


@pytest.mark.parametrize("kind", KINDS)
def test_rings_are_set_up_without_gaps_and_completely(kind):
    """VHU-9, VHU-11."""
    with backend(kind) as model, channel(model, queues=2):
        first = model.device.first_queue
        assert sorted(model.rings) == list(range(first + 2)), f"VHU-11: rings {sorted(model.rings)}"
        for name in ("SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR"):
            indices = [value[0] for value in model.values(name)]
            assert indices == sorted(model.rings), f"VHU-9: {name} of {indices}"


@pytest.mark.parametrize("kind", KINDS)
def test_rings_are_stopped_with_num_0_after_all_requests_are_back(kind):
    """VHU-9, VHU-10, VHU-24."""
    with backend(kind) as model:
        with channel(model, queues=2) as opened:
            batch(model, opened, 1000)
        stops = model.values("GET_VRING_BASE")
        assert [num for _, num in stops] == [0] * len(model.rings), f"VHU-10: {stops}"
        assert model.values("disconnect")[0][1] == [], "VHU-9: a ring was not stopped"


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_stays_until_the_last_ring_has_stopped(kind):
    """VHU-9, VHU-24: the stopped device writes once more, just before it says that it stopped."""
    with backend(kind) as model:

        def scribble(reply: Reply) -> Reply:
            session = model.session
            assert session is not None
            for region in session.memory.regions:
                region.memory[region.size - 1] = 0x5A
            for ring in session.rings.values():
                ring.ring_call()
            return reply

        model.options.replies["GET_VRING_BASE"] = scribble
        with channel(model, queues=2) as opened:
            exercise(model, opened)
        names = model.names()
        last = max(at for at, name in enumerate(names) if name == "GET_VRING_BASE")
        assert not {"REM_MEM_REG", "SET_MEM_TABLE"} & set(names[:last][names.index("start") :]), (
            "VHU-24: memory was taken away before the last ring stopped"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_ring_starts_at_base_0(kind):
    """VHU-10."""
    with backend(kind) as model, channel(model, queues=2):
        for index, num in model.values("SET_VRING_BASE"):
            assert num == 0, f"VHU-10: base {num} of ring {index}"


@pytest.mark.parametrize("kind", KINDS)
def test_more_queues_than_the_back_end_has_are_an_error(kind):
    """VHU-11."""
    with backend(kind, queue_num=3) as model:
        error = refused(model, "VHU-11", queues=4)
        assert isinstance(error, NoQueueError), f"VHU-11: {error!r}"
        assert "SET_VRING_NUM" not in model.names(), "VHU-11: a ring was set up all the same"


@pytest.mark.parametrize("kind", KINDS)
def test_without_mq_a_device_still_works(kind):
    """VHU-11."""
    with backend(kind, protocol_features=PROTOCOL_FEATURES & ~P.MQ) as model:
        with channel(model, queues=1) as opened:
            exercise(model, opened)
        assert "GET_QUEUE_NUM" not in model.names(), "VHU-11: GET_QUEUE_NUM without MQ"


@pytest.mark.parametrize("kind", KINDS)
def test_kick_and_call_carry_the_index_and_one_descriptor(kind):
    """VHU-15."""
    with backend(kind) as model, channel(model, queues=2):
        for name in ("SET_VRING_KICK", "SET_VRING_CALL"):
            words = model.values(name)
            assert words == sorted(model.rings), f"VHU-15: {name} with {words}"
            assert not any(word & NO_FD for word in words)


# Memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_table_has_as_many_descriptors_as_regions(kind):
    """VHU-12."""
    with backend(kind, protocol_features=PROTOCOL_FEATURES & ~P.CONFIGURE_MEM_SLOTS) as model:
        with channel(model) as opened:
            exercise(model, opened)
        names = model.names()
        assert "SET_MEM_TABLE" in names and "ADD_MEM_REG" not in names, f"VHU-12: {names}"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_slots_are_used_if_offered_and_counted(kind):
    """VHU-14."""
    with backend(kind, max_mem_slots=1) as model:
        with channel(model) as opened:
            exercise(model, opened)
        names = model.names()
        assert "ADD_MEM_REG" in names and "SET_MEM_TABLE" not in names, f"VHU-14: {names}"
        assert names.count("ADD_MEM_REG") <= 1, "VHU-14: more than one region in one slot"


def test_a_back_end_without_a_memory_slot_is_refused():
    """VHU-14."""
    with backend("blk", max_mem_slots=0) as model:
        refused(model, "VHU-14")
        assert "ADD_MEM_REG" not in model.names(), "VHU-14: a region more than there are slots"


@pytest.mark.parametrize("kind", KINDS)
def test_rings_are_named_by_user_addresses_and_buffers_by_guest_addresses(kind):
    """VHU-13: the two differ, and the model translates each in its own way."""
    with backend(kind) as model, channel(model) as opened:
        exercise(model, opened)
        for guest, size, user, _ in model.values("ADD_MEM_REG"):
            assert guest + size <= user or user + size <= guest, "VHU-13: no way to tell them apart"


# Configuration


def test_a_configuration_that_is_too_short_is_an_error():
    """VHU-16: the back end says so with an empty reply."""
    with Backend(Blk(span=40)) as model:
        error = refused(model, "VHU-16")
        assert isinstance(error, ProtocolError | TransportError), f"VHU-16: {error!r}"


def test_get_config_asks_for_something_and_sends_as_many_bytes():
    """VHU-16: the model checks length, flags and that it is not empty."""
    with backend("blk") as model, channel(model):
        ((offset, size, flags),) = model.values("GET_CONFIG")
        assert (offset, flags) == (0, 0), f"VHU-16: offset {offset}, flags {flags}"
        assert 0 < size <= 256, f"VHU-16: {size} bytes"


def test_without_config_a_disk_of_unknown_size_is_refused():
    """VHU-16, VHU-5."""
    with backend("blk", protocol_features=PROTOCOL_FEATURES & ~P.CONFIG) as model:
        refused(model, "VHU-16")
        assert "GET_CONFIG" not in model.names(), "VHU-16: GET_CONFIG without CONFIG"


def test_without_config_a_scsi_host_is_driven_all_the_same():
    """VHU-16, VHU-5."""
    with backend("scsi", protocol_features=PROTOCOL_FEATURES & ~P.CONFIG) as model:
        with channel(model, queues=1) as opened:
            exercise(model, opened)
        assert "GET_CONFIG" not in model.names(), "VHU-16: GET_CONFIG without CONFIG"


# The channel back


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_the_back_end_are_answered_if_it_wants_that(kind):
    """VHU-17, VHU-18: 0 for what was done, else not; nothing when no answer was asked for."""
    with backend(kind) as model, channel(model) as opened:
        assert model.request() == 0, "VHU-18: CONFIG_CHANGE"
        assert model.request(need_reply=False) is None
        assert model.request() == 0, "VHU-18: an answer that nobody wanted came first"
        assert model.request(BackendRequest.VRING_CALL, bytes(8)) != 0, "VHU-18: VRING_CALL granted"
        assert model.request(BackendRequest.IOTLB_MSG, bytes(32)) != 0, "VHU-18: IOTLB_MSG granted"
        assert model.request(77, b"what is this") != 0, "VHU-18: an unknown request granted"
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_without_reply_ack_requests_of_the_back_end_are_not_answered(kind):
    """VHU-18."""
    with backend(kind, protocol_features=PROTOCOL_FEATURES & ~P.REPLY_ACK) as model:
        with channel(model) as opened:
            session = model.session
            assert session is not None
            if session.channel is not None:
                session.channel.settimeout(0.1)
                model.request(need_reply=False)
                opened.read(0, 512)
                with pytest.raises(TimeoutError):
                    session.channel.recv(1)
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_the_back_end_are_served_while_a_reply_is_awaited(kind):
    """VHU-17: or both sides wait for each other."""
    with backend(kind) as model:

        def ask_first(reply: Reply) -> Reply:
            if model.request() != 0:
                model.violations.append("VHU-18: CONFIG_CHANGE was not accepted")
            return reply

        model.options.replies = {"GET_CONFIG": ask_first, "SET_VRING_ADDR": ask_first}
        with channel(model) as opened:
            exercise(model, opened)


def test_descriptors_that_come_with_a_request_of_the_back_end_are_closed():
    """VHU-17."""
    spare = os.open("/dev/null", os.O_RDONLY)
    try:
        with backend("blk") as model, channel(model):
            before = sum("/dev/null" in entry for entry in open_fds())
            for _ in range(5):
                assert model.request(fds=(spare,) * 8) is not None
            after = sum("/dev/null" in entry for entry in open_fds())
            assert after == before, f"VHU-17: {after - before} descriptors are still open"
    finally:
        os.close(spare)


def test_nonsense_on_the_channel_back_does_no_harm():
    """VHU-17."""
    with backend("blk") as model, channel(model) as opened:
        session = model.session
        assert session is not None and session.channel is not None
        session.channel.sendall(b"\xff" * 64)
        exercise(model, opened)
        session.channel.close()
        exercise(model, opened)


# Acknowledgements


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACKED)
def test_an_acknowledgement_other_than_0_is_a_failure(kind, name):
    """VHU-19."""
    with backend(kind, acks={name: 1}) as model:
        error = refused(model, "VHU-19")
        assert isinstance(error, TransportError), f"VHU-19: {error!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_messages_with_a_reply_of_their_own_get_no_second_one(kind):
    """VHU-19."""
    with backend(kind) as model:
        with channel(model) as opened:
            exercise(model, opened)
        for record in model.log:
            if record.name in REPLIED and record.flags & NEED_REPLY:
                pytest.fail(f"VHU-19: {record} wants an acknowledgement beside its reply")


@pytest.mark.parametrize("kind", KINDS)
def test_without_reply_ack_nothing_asks_for_an_acknowledgement(kind):
    """VHU-19: and a message with a reply follows the memory, so that it is there."""
    with backend(kind, protocol_features=PROTOCOL_FEATURES & ~P.REPLY_ACK) as model:
        with channel(model) as opened:
            exercise(model, opened)
        assert not any(record.flags & NEED_REPLY for record in model.log), "VHU-19"
        names = model.names()
        rest = names[names.index("ADD_MEM_REG") :]
        assert rest[1].startswith("GET_"), f"VHU-19: after ADD_MEM_REG came {rest[1]}"


# Ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_back_end_is_told_to_a_waiting_reader(kind):
    """VHU-3: within 100 ms of the end of the connection."""
    with backend(kind) as model:
        with connect(model) as controller:
            opened = next(iter(controller.values())).open(timeout=30)
            model.options.hold = lambda chain: True
            caught: list[tuple[BaseException, float]] = []

            def read() -> None:
                try:
                    opened.read(0, 512)
                except VirtioError as error:
                    caught.append((error, time.monotonic()))

            reader = threading.Thread(target=read)
            reader.start()
            ring = model.rings[model.device.first_queue]
            assert model.wait_for(lambda: bool(ring.held))
            gone = time.monotonic()
            model.disconnect()
            reader.join(5)
            assert caught, "VHU-3: the reader still waits"
            error, when = caught[0]
            assert isinstance(error, TransportError), f"VHU-3: {error!r}"
            assert when - gone < 0.5, f"VHU-3: it took {when - gone:.3f} s"
            with pytest.raises(TransportError):
                opened.read(0, 512)
            opened.close()


def come_and_go(model: Backend, how: str) -> None:
    """One attempt to attach, which ends in one of the ways that there are."""
    if how == "closed":
        with channel(model) as opened:
            exercise(model, opened)
    elif how == "refused":
        model.options.acks = {"SET_VRING_ADDR": 5}
        refused(model, "VHU-3")
    elif how == "dropped":
        model.options.drop_at = "SET_VRING_ADDR"
        refused(model, "VHU-3")
    elif how == "lost":
        with connect(model) as controller:
            model.disconnect()
            ended(model)
            assert len(controller) == 1
    else:
        model.options.hang_on = "SET_VRING_ADDR"
        refused(model, "VHU-3", timeout=0.2)
    assert model.wait_for(lambda: model.session is None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["closed", "refused", "dropped", "lost", "hung"])
def test_nothing_is_left_open_however_it_ends(kind, how):
    """VHU-3: descriptors and threads."""
    with backend(kind) as model:  # once for whatever is opened for good
        connect(model).close()
    with backend(kind) as model:
        gc.collect()
        before, threads = open_fds(), set(threading.enumerate())
        come_and_go(model, how)

        def settled() -> bool:  # a thread that ends may do so a moment later
            gc.collect()
            return not open_fds() - before and set(threading.enumerate()) <= threads

        if not model.wait_for(settled, 2):
            assert not open_fds() - before, f"VHU-3: still open: {open_fds() - before}"
            left = [thread.name for thread in threading.enumerate() if thread not in threads]
            assert not left, f"VHU-3: threads {left} still run"


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_size_that_is_refused_is_tried_once_more_smaller(kind):
    """VHU-3: the back end closes the connection at SET_VRING_NUM; the next one gets 128."""
    with backend(kind, max_queue_size=128) as model:
        with channel(model) as opened:
            exercise(model, opened)
        sizes = {num for _, num in model.values("SET_VRING_NUM")}
        assert sizes == {256, 128}, f"VHU-3: sizes {sizes}"


def sizes(model: Backend) -> set[int]:
    """Of all rings that were set up, or were to be."""
    return {num for _, num in model.values("SET_VRING_NUM")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [RING_FEATURES, RING_FEATURES & ~F.EVENT_IDX], ids=["events", "flags"])
@pytest.mark.parametrize("depth, size", [(1, 4), (3, 4), (4, 4), (5, 8), (128, 128), (129, 256), (1000, 256)])
def test_a_queue_is_as_small_as_a_depth_allows(kind, features, depth, size):
    """SPL-7: but large enough for a request of 64 KiB; and everything works, of any length."""
    with backend(kind, features=features) as model, channel(model, depth=depth, queues=1) as opened:
        assert sizes(model) == {size}
        exercise(model, opened)


def test_a_queue_for_a_depth_holds_64_kib_in_as_many_pieces_as_the_device_wants():
    """SPL-7, BLK-17: 128 of 512 bytes, beside header and status."""
    for size_max, size in ((512, 256), (1024, 128), (4096, 32), (32768, 4)):
        disk = Blk(size_max=size_max, seg_max=254)
        disk.features |= 1 << 1
        with Backend(disk) as model, channel(model, depth=1, queues=1) as opened:
            assert sizes(model) == {size}
            content = fill(model)
            before = model.rings[0].taken
            assert opened.read(4096, 64 << 10) == content[4096 : 68 << 10]
            assert model.rings[0].taken == before + 1, "64 KiB are no longer one request"
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_where_descriptors_are_direct_a_depth_changes_nothing(kind):
    """A request of several segments would take the whole of a small ring."""
    with backend(kind, features=RING_FEATURES & ~F.INDIRECT_DESC) as model:
        with channel(model, depth=1, queues=1) as opened:
            assert sizes(model) == {256}
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_size_that_was_asked_for_is_no_less_for_a_depth(kind):
    with backend(kind) as model, channel(model, depth=1, queue_size=64, queues=1) as opened:
        assert sizes(model) == {64}
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_for_a_depth_that_is_refused_as_too_small_has_a_usual_size_then(kind):
    """VHU-3: the back end closes the connection at SET_VRING_NUM; the next one gets 128."""
    with backend(kind, min_queue_size=64) as model:
        with channel(model, depth=1, queues=1) as opened:
            exercise(model, opened)
        asked = [num for _, num in model.values("SET_VRING_NUM")]
        assert asked[0] == 4 and set(asked[1:]) == {128}, f"VHU-3: sizes {asked}"


def test_one_front_end_after_another_and_two_back_ends_at_once():
    """VHU-6, VHU-27."""
    with backend("blk") as one, Backend(device("scsi")) as two:
        with channel(one) as first, channel(two) as second:
            fill(one, 1)
            fill(two, 2)
            into = bytearray(512 * 8)
            first.read_batch(array("Q", range(0, 4096, 512)), 512, into).raise_for_status()
            assert into == one.device.disk[:4096]
            assert second.read(0, 4096) == two.device.disk[:4096]
        with channel(one) as again:
            assert again.read(0, 512) == one.device.disk[:512]
        ended(one, 2)
    assert RING_FEATURES
