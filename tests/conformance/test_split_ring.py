"""The split virtqueue (virtio 2.6, 2.7)."""

import contextlib
import itertools
import os
import random
import threading
import time
from array import array

import pytest

from tests.conformance.driver import (
    DEPTHS,
    KINDS,
    TIMEOUT,
    backend,
    batch,
    channel,
    connect,
    device,
    exercise,
    fill,
)
from tests.conftest import INTERPRETED
from tests.model import Backend, Chain, Ring
from tests.model.wire import F
from virtio.errors import DeviceError, ProtocolError, RequestTimeout, VirtioError
from virtio.ring.split import SplitRing, areas
from virtio_bdev import Channel

BASE = F.VERSION_1 | F.PROTOCOL_FEATURES
WITH_EVENT_IDX = BASE | F.EVENT_IDX
BOTH = BASE | F.INDIRECT_DESC | F.EVENT_IDX
RINGS = [
    pytest.param(BASE, id="plain"),
    pytest.param(BASE | F.EVENT_IDX, id="event_idx"),
    pytest.param(BASE | F.INDIRECT_DESC, id="indirect"),
    pytest.param(BOTH, id="both"),
]
FEW = 1 << 16


def request_ring(model: Backend) -> Ring:
    """The first ring that carries reads and writes."""
    return model.rings[model.device.first_queue]


def near_the_wrap(model: Backend, opened, left: int) -> None:
    """Bring the request ring to so many requests before its index wraps."""
    batch(model, opened, FEW - left - request_ring(model).last)
    assert request_ring(model).last == FEW - left


# What is on the ring


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 16, 128, 256])
def test_the_three_areas_are_aligned_and_apart(kind, size):
    """SPL-1."""
    with backend(kind) as model:
        with connect(model, queue_size=size, queues=2):
            pass
        assert model.values("SET_VRING_NUM")[-1][1] == size
        for index, _, descriptor, used, available, _ in model.values("SET_VRING_ADDR"):
            assert descriptor % 16 == 0, f"SPL-1: descriptor table of ring {index}: {descriptor:#x}"
            assert available % 2 == 0, f"SPL-1: available ring {index}: {available:#x}"
            assert used % 4 == 0, f"SPL-1: used ring {index}: {used:#x}"
            spans = sorted(
                [
                    (descriptor, 16 * size),
                    (available, 6 + 2 * size),
                    (used, 6 + 8 * size),
                ]
            )
            for (start, length), (following, _) in itertools.pairwise(spans):
                assert start + length <= following, f"SPL-1: areas of ring {index} overlap"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_every_chain_is_well_formed(kind, features):
    """SPL-2, SPL-4, SPL-6, SPL-7, SPL-8, SPL-11, SPL-12: the model checks each chain."""
    with backend(kind, features=features) as model, channel(model) as opened:
        exercise(model, opened)
        chains = list(request_ring(model).chains)
        assert chains
        indirect = {chain.indirect for chain in chains}
        want = bool(features & F.INDIRECT_DESC)
        assert want or indirect == {False}, "SPL-6: INDIRECT was not negotiated"
        assert not want or indirect == {True}, "SPL-3: INDIRECT is not used"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_one_buffer_is_described_by_few_descriptors(kind, features):
    """SPL-3: header, data and status, and the table's own where there is one."""
    with backend(kind, features=features) as model, channel(model) as opened:
        request_ring(model).longest = 0
        opened.read(0, 4096)
        opened.write(4096, bytes(4096))
        assert request_ring(model).longest <= 4, f"SPL-3: {request_ring(model).longest} descriptors"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("size", [4, 8, 32])
def test_no_chain_is_longer_than_the_queue(kind, features, size):
    """SPL-7: a device that allows 126 segments, on a queue that has no room for them."""
    disk = device(kind)
    if kind == "blk":
        disk.features |= 1 << 1
        disk.size_max = 4096
    with Backend(disk, features=features) as model, channel(model, queue_size=size) as opened:
        exercise(model, opened)
        chains = list(request_ring(model).chains)
        longest = max(len(chain.descriptors) - chain.indirect for chain in chains)
        assert longest <= size, f"SPL-7: {longest} descriptors in a queue of {size}"


@pytest.mark.parametrize(
    ("kind", "features"),
    [("blk", BASE), ("blk", BOTH), ("scsi", BOTH)],
    ids=["blk-plain", "blk-both", "scsi-both"],
)
def test_the_available_index_wraps_and_never_goes_back(kind, features):
    """SPL-10: more than 65,536 requests on a ring of 64; every sector compared."""
    with backend(kind, features=features, polling=True) as model:
        fill(model)
        with channel(model, timeout=60, queue_size=64, queues=1) as opened:
            batch(model, opened, FEW - 500)
            taken = request_ring(model).taken
            for seed in range(40):
                batch(model, opened, 50, seed)
            assert request_ring(model).taken - taken == 2000
            assert request_ring(model).taken > FEW, "SPL-10: no wrap"
            assert request_ring(model).last == request_ring(model).taken % FEW


@pytest.mark.parametrize("kind", KINDS)
def test_avail_flags_are_0_or_1_without_event_idx_and_0_with_it(kind):
    """SPL-11, SPL-12: looked at by the model at every chain, awake and asleep."""
    for features in (BASE, WITH_EVENT_IDX):
        with backend(kind, features=features) as model, channel(model) as opened:
            for _ in range(50):
                opened.read(0, 512)
            batch(model, opened, 500)


@pytest.mark.parametrize("size", [2, 64])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_new_ring_is_all_zeros_whatever_the_memory_held(size, event_idx):
    """SPL-15, SPL-11, SPL-12."""
    available, used, end = areas(size)
    memory = bytearray(b"\xff" * end)
    ring = SplitRing(memoryview(memory), size, event_idx=event_idx)
    assert memory[used : used + 2] == b"\0\0", "SPL-15: used.flags is not 0"
    assert memory[used + 2 : used + 4] == b"\0\0", "SPL-15: used.idx is not 0"
    assert memory[available + 2 : available + 4] == b"\0\0", "SPL-10: avail.idx is not 0"
    flags = int.from_bytes(memory[available : available + 2], "little")
    assert flags == 0 if event_idx else flags <= 1, "SPL-11, SPL-12: avail.flags"
    assert ring.reap() == -1


@pytest.mark.parametrize("kind", KINDS)
def test_used_flags_are_0_when_a_ring_starts(kind):
    """SPL-15: the model looks at every start."""
    with backend(kind) as model:
        with connect(model, queues=2) as controller:
            assert len(controller) == 1
            assert model.wait_for(lambda: model.names().count("start") == len(model.rings))


# Notifications


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_calls_without_a_used_buffer_are_survived(kind, features):
    """SPL-13: twenty before the buffer is used, and five beside each call that is due."""
    with backend(kind, features=features) as model, channel(model) as opened:
        content = fill(model)
        caught: list[Chain] = []
        model.options.hold = lambda chain: caught.append(chain) is None and len(caught) == 1
        result: list[bytes] = []
        reader = threading.Thread(target=lambda: result.append(opened.read(512, 512)))
        reader.start()
        assert model.wait_for(lambda: bool(request_ring(model).held)), "SPL-13: no request"
        for _ in range(20):
            model.spur()
        assert not result, "SPL-13: a read came back before its buffer was used"
        model.release()
        reader.join(5)
        assert result == [content[512:1024]], "SPL-13: the read after spurious calls"
        model.options.spurious_calls = 5
        exercise(model, opened)
        model.options.spurious_calls, model.options.always_call = 0, True
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("wait", ["poll", "event"])
def test_a_sleeper_is_always_woken(kind, features, wait):
    """SPL-16, SPL-17, SPL-18, SPL-19: thousands of requests, alone and in batches. The device looks
    at its ring after a kick and at no other time; it calls only when asked to, and in one of the
    two ways to wait the driver sleeps until it is called."""
    with backend(kind, features=features) as model:
        fill(model)
        with channel(model, queue_size=16, wait=wait) as opened:
            for turn in range(250):
                opened.read(512 * turn, 512)
                batch(model, opened, 1 + turn % 40, turn)
            for turn in range(4):
                batch(model, opened, 1500, turn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_field_of_the_other_scheme_is_ignored(kind, features, depth):
    """SPL-16, SPL-17: used.flags says no with EVENT_IDX, avail_event says no without."""
    with backend(kind, features=features, noise=True) as model, channel(model, depth=depth) as opened:
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [BASE, BASE | F.INDIRECT_DESC])
def test_a_device_that_wants_no_kicks_gets_none(kind, features):
    """SPL-16: without EVENT_IDX, flags 1."""
    with backend(kind, features=features, polling=True, no_notify=True) as model:
        with channel(model, queues=1) as opened:
            opened.read(0, 512)
            ring = request_ring(model)
            model.do(ring.drain_kick)
            before = ring.kicks
            for _ in range(50):
                opened.read(0, 512)
            batch(model, opened, 1000)
            model.do(ring.drain_kick)
            assert ring.kicks == before, f"SPL-16: {ring.kicks - before} kicks, flags were 1"


@pytest.mark.parametrize("kind", KINDS)
def test_the_driver_kicks_exactly_when_avail_event_is_passed(kind):
    """SPL-17: one request at a time; the event is the very next index, or another."""
    chance = random.Random(7)
    due = 0

    def choose(ring: Ring) -> int:
        nonlocal due
        away = chance.choice([0, 0, 1, -1, 2, -2, 100, 32767, 32768, -32768, -100])
        due += away == 0
        return ring.last + away

    with backend(kind, features=WITH_EVENT_IDX, polling=True) as model:
        with channel(model, timeout=60, queues=1, queue_size=64) as opened:
            ring = request_ring(model)
            for left in (0, 60):
                if left:
                    model.options.avail_event = lambda ring: ring.last + 30000
                    near_the_wrap(model, opened, left)
                model.options.avail_event = choose
                opened.read(0, 512)  # from here on each event was chosen before its request
                model.do(ring.drain_kick)
                before, due_before = ring.kicks, due - (ring.last == ring_event(ring))
                for _ in range(120):
                    opened.read(0, 512)
                model.do(ring.drain_kick)
                want = due - due_before - (ring.last == ring_event(ring))
                got = ring.kicks - before
                assert got == want, f"SPL-17: {got} kicks, {want} were due, index {ring.last}"


def ring_event(ring: Ring) -> int:
    """What avail_event is now: not yet passed."""
    assert ring._used is not None
    region, at, _ = ring._used
    return int(region.u16[at // 2 + 2 + 4 * ring.size])


@pytest.mark.parametrize("start", [0, 1, 32760, 65528, 65535])
def test_whether_to_kick_agrees_with_counters_that_never_wrap(start):
    """SPL-17: every event from far behind to far ahead, groups of 1 to 8, around each edge."""
    size = 8
    _, used, end = areas(size)
    memory = bytearray(end)
    ring = SplitRing(memoryview(memory), size, event_idx=True)
    u16 = memoryview(memory).cast("H")
    u32 = memoryview(memory).cast("I")
    event_at, used_at = (used + 4 + 8 * size) // 2, used // 2 + 1
    count = 0  # of buffers ever offered

    def turn(group: int, away: int) -> None:
        nonlocal count
        event = count + away
        u16[event_at] = event & 0xFFFF
        for head in range(group):
            ring.offer(head)
        want = count <= event < count + group  # the event's index is among those just shown
        assert ring.publish() is want, f"SPL-17: {count} to {count + group}, event {event}: {want}"
        for head in range(group):
            u32[used // 4 + 1 + 2 * ((count + head) % size)] = head
        count += group
        u16[used_at] = count & 0xFFFF
        assert [ring.reap() for _ in range(group)] == list(range(group))

    while count < start:
        turn(min(8, start - count), 20)
    for group in range(1, 9):
        for away in (*range(-12, 13), 1000, -1000, 32767, -32768):
            turn(group, away)


# The used ring


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 2, 511, 1 << 20, (1 << 32) - 1])
def test_the_used_length_proves_nothing_and_breaks_nothing(kind, length):
    """SPL-14: real devices get it wrong both ways; the status decides."""
    with backend(kind) as model, channel(model) as opened:
        model.options.complete = lambda ring, chain, true: [(chain.head, length)]
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_a_request_that_comes_back_without_a_status_did_not_succeed(kind, features):
    """SPL-14: what the device did not write must not be read as an old success."""
    with backend(kind, features=features) as model, channel(model) as opened:
        for _ in range(20):
            opened.read(0, 512)
        model.device.status = lambda request: None
        with pytest.raises(DeviceError):
            opened.read(0, 512)
        with pytest.raises(DeviceError):
            opened.write(0, bytes(512))
        model.device.status = None
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_buffers_may_be_used_in_any_order(kind, features, order):
    """SPL-10, CLN-1."""
    chance = random.Random(5)

    def mix(chains: list[Chain]) -> list[Chain]:
        return chains[::-1] if order == "reversed" else chance.sample(chains, len(chains))

    with backend(kind, features=features, order=mix) as model, channel(model) as opened:
        exercise(model, opened)
        batch(model, opened, 3000)


WRONG = {
    "an id beyond the queue": lambda ring, chain, length: [(chain.head + 5000, length)],
    "an id of 32 bits": lambda ring, chain, length: [(0xFFFFFFFF, length)],
    "an id that looks right in its low 16 bits": lambda r, c, length: [(c.head + (1 << 16), length)],
    "an id that was not given": lambda ring, chain, length: [((chain.head + 1) % ring.size, length)],
    "the same id twice": lambda ring, chain, length: [(chain.head, length), (chain.head, length)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WRONG)
def test_a_used_id_that_the_device_does_not_have_breaks_it(kind, what):
    """SPL-14: the device is not trusted; no other request is completed by mistake."""
    with backend(kind) as model, channel(model) as opened:
        content = fill(model)
        assert opened.read(0, 512) == content[:512]
        model.options.complete = WRONG[what]
        with pytest.raises(ProtocolError):
            for _ in range(3):  # the second id of two is seen when there is something to wait for
                opened.read(0, 512)
        with pytest.raises(VirtioError):
            opened.read(0, 512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jump", [1, 2, 300, 32768, 65534])
def test_a_used_index_that_runs_ahead_breaks_the_device(kind, jump):
    """SPL-14: at once, though the first entry is a good one."""
    with backend(kind) as model, channel(model) as opened:
        opened.read(0, 512)
        model.options.skip_used = jump
        with pytest.raises(ProtocolError):
            opened.read(0, 512)
        with pytest.raises(VirtioError):
            opened.read(0, 512)


@pytest.mark.parametrize("ahead", [1, 2, 4, 100, 40000])
def test_a_used_index_that_runs_ahead_is_refused_before_its_first_entry(ahead):
    """SPL-14."""
    _, used, end = areas(4)
    memory = bytearray(end)
    ring = SplitRing(memoryview(memory), 4, event_idx=False)
    ring.offer(2)
    ring.publish()
    u32 = memoryview(memory).cast("I")
    u32[used // 4 + 1] = 2  # a good entry: head 2
    memoryview(memory).cast("H")[used // 2 + 1] = 1 + ahead
    assert ring.reap() == -2, f"SPL-14: an index {ahead} too far was followed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("seed", range(2))
def test_a_device_that_scribbles_on_all_that_is_shared_harms_nobody(kind, features, seed):
    """SPL-14: rings, tables, headers, responses and data: an error or wrong data, and an end."""
    with backend(kind, features=features) as model:
        with connect(model, queues=1) as controller:
            bdev = next(iter(controller.values()))
            with bdev.open(timeout=TIMEOUT) as opened:
                opened.read(0, 4096)
                opened.timeout = 0.02

                def scribble() -> None:
                    chance = random.Random(seed)
                    ring = request_ring(model)
                    for area in (ring._desc, ring._avail, ring._used):
                        assert area is not None
                        region, at, length = area
                        region.memory[at : at + length] = chance.randbytes(length)
                    region, at, length = ring.chains[-1].writable[0]
                    region.memory[at : at + length] = chance.randbytes(length)
                    ring.broken = True  # it looks no more: what it would find is its own

                model.do(scribble)
                for _ in range(3):
                    with contextlib.suppress(VirtioError):
                        opened.read(0, 4096)
                    with contextlib.suppress(VirtioError):
                        batch_of_reads(opened, 50)


def batch_of_reads(opened: Channel, count: int) -> None:
    """Reads whose data nobody looks at."""
    opened.read_batch(array("Q", [512] * count), 512, bytearray(512 * count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_two_threads_on_two_queues_keep_apart(kind, features):
    """SPL-10, CLN-2: each with its own ring, at the same time, every byte compared."""
    with backend(kind, features=features) as model:
        fill(model)
        with connect(model, queues=2) as controller:
            bdev = next(iter(controller.values()))
            failures: list[BaseException] = []

            def work(number: int) -> None:
                try:
                    chance = random.Random(number)
                    with bdev.open(timeout=TIMEOUT) as opened:
                        for turn in range(20):
                            at = (number << 19) + 4096 * turn
                            data = chance.randbytes(4096)
                            opened.write(at, data)
                            assert opened.read(at, 4096) == data
                            batch_of_reads(opened, 100)
                        both.wait(5)
                except BaseException as error:
                    failures.append(error)

            both = threading.Barrier(2)
            threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert not failures, failures
            first = model.device.first_queue
            assert all(model.rings[first + number].taken > 1000 for number in range(2)), "SPL-10"


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_kick_counter_counts_as_kicked(kind):
    """SPL-16: the device shares the eventfd and may fill it; nobody hangs."""
    with backend(kind, features=BASE, polling=True) as model, channel(model, queues=1) as opened:
        opened.read(0, 512)
        ring = request_ring(model)

        def stuff() -> None:
            ring.drain_kick()
            os.eventfd_write(ring.kick, (1 << 64) - 2)

        model.do(stuff)
        exercise(model, opened)


@pytest.mark.skipif(INTERPRETED, reason="only the compiled loop kicks without looking first")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kick_that_is_made_to_block_ends_the_device_and_holds_up_nobody(kind):
    """SPL-16: full, and with O_NONBLOCK taken away, which the two sides share."""
    with backend(kind, features=BASE, polling=True) as model, channel(model, queues=1) as opened:
        opened.read(0, 512)
        ring = request_ring(model)

        def stuff() -> None:
            ring.drain_kick()
            os.set_blocking(ring.kick, True)
            os.eventfd_write(ring.kick, (1 << 64) - 2)
            model.options.no_notify = False

        model.do(stuff)
        begun = time.monotonic()
        with pytest.raises(ProtocolError, match="has made it block"):
            opened.read(0, 512)
            opened.read(0, 512)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_does_not_answer_is_not_waited_for_for_ever(kind):
    """SPL-13, CLN-2: the time-out of the channel; late answers are taken then."""
    with backend(kind) as model, channel(model, timeout=0.1) as opened:
        model.options.hold = lambda chain: True
        with pytest.raises(RequestTimeout):
            opened.read(0, 512)
        with pytest.raises(RequestTimeout):
            opened.read_batch(array("Q", [0, 512, 1024]), 512, bytearray(1536))
        model.options.hold = None
        opened.timeout = TIMEOUT
        model.release()
        exercise(model, opened)
