"""The packed virtqueue (virtio 2.8)."""

import random
import threading

import pytest

from tests.conformance.driver import KINDS, TIMEOUT, backend, batch, channel, connect, exercise, fill
from tests.model import Backend, Chain
from tests.model.packed import PackedRing as Ring
from tests.model.wire import F
from virtio.errors import DeviceError, ProtocolError, RequestTimeout, VirtioError
from virtio.ring.packed import PackedRing, areas

BASE = F.VERSION_1 | F.PROTOCOL_FEATURES | F.RING_PACKED
BOTH = BASE | F.INDIRECT_DESC | F.EVENT_IDX
RINGS = [
    pytest.param(BASE, id="plain"),
    pytest.param(BASE | F.EVENT_IDX, id="event_idx"),
    pytest.param(BASE | F.INDIRECT_DESC, id="indirect"),
    pytest.param(BOTH, id="both"),
]
AVAIL, USED, WRAP = 1 << 7, 1 << 15, 1 << 15
ENABLE, DISABLE, AT = 0, 1, 2


def request_ring(model: Backend) -> Ring:
    """The first ring that carries reads and writes."""
    ring = model.rings[model.device.first_queue]
    assert isinstance(ring, Ring)
    return ring


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [4, 16, 256])
def test_the_three_areas_are_aligned_and_apart(kind, size):
    """PKD-1."""
    with backend(kind, features=BOTH) as model:
        with connect(model, queue_size=size, queues=2):
            pass
        for index, _, descriptor, used, available, _ in model.values("SET_VRING_ADDR"):
            assert descriptor % 16 == 0, f"PKD-1: descriptor ring {index}: {descriptor:#x}"
            assert available % 4 == 0, f"PKD-1: driver area of ring {index}: {available:#x}"
            assert used % 4 == 0, f"PKD-1: device area of ring {index}: {used:#x}"
            assert descriptor + 16 * size <= available < available + 4 <= used, f"PKD-1: ring {index}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rings", ["any", "split"])
def test_packed_rings_can_be_refused(kind, rings):
    """FEA-1: by the user."""
    with backend(kind, features=BOTH) as model, connect(model, rings=rings) as controller:
        (accepted,) = model.values("SET_FEATURES")
        assert bool(accepted & F.RING_PACKED) == (rings == "any")
        (bdev,) = controller.values()
        with bdev.open() as opened:
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("size", [4, 8, 256])
def test_every_list_is_well_formed(kind, features, size):
    """PKD-2, PKD-4, PKD-5, PKD-6, PKD-8, PKD-9, PKD-10, PKD-12: the model checks each list."""
    with backend(kind, features=features) as model, channel(model, queue_size=size) as opened:
        exercise(model, opened)
        batch(model, opened, 1000)
        chains = list(request_ring(model).chains)
        indirect = {chain.indirect for chain in chains}
        assert indirect == {bool(features & F.INDIRECT_DESC)}, "PKD-8"
        longest = max(len(chain.descriptors) - chain.indirect for chain in chains)
        assert longest <= size, f"PKD-4: {longest} descriptors in a ring of {size}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_a_device_that_polls_meets_only_whole_lists(kind, features):
    """PKD-7, PKD-11: it looks at the ring all the time, in another thread."""
    with backend(kind, features=features, polling=True, no_notify=True) as model:
        fill(model)
        with channel(model, queues=1, queue_size=16, timeout=60) as opened:
            for turn in range(20):
                batch(model, opened, 200, turn)
                opened.read(512 * turn, 512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("wait", ["poll", "event"])
def test_a_sleeper_is_always_woken(kind, features, wait):
    """PKD-12: the device looks at its ring after a kick and at no other time; it calls only when asked to."""
    with backend(kind, features=features) as model:
        fill(model)
        with channel(model, queue_size=16, wait=wait) as opened:
            for turn in range(150):
                opened.read(512 * turn, 512)
                batch(model, opened, 1 + turn % 40, turn)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_wants_no_kicks_gets_none(kind):
    """PKD-12: flags DISABLE."""
    with backend(kind, features=BASE, polling=True, no_notify=True) as model:
        with channel(model, queues=1) as opened:
            opened.read(0, 512)
            ring = request_ring(model)
            model.do(ring.drain_kick)
            before = ring.kicks
            batch(model, opened, 1000)
            model.do(ring.drain_kick)
            assert ring.kicks == before, f"PKD-12: {ring.kicks - before} kicks, which were not wanted"


@pytest.mark.parametrize("size", [2, 5, 8, 32768])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_whether_to_kick_agrees_with_counters_that_never_wrap(size, start):
    """PKD-12: each event from a ring behind to a ring ahead, groups of 1 to 4, around each wrap."""
    _, device, end = areas(size)
    memory = bytearray(end)
    ring = PackedRing(memoryview(memory), size, event_idx=True)
    u16 = memoryview(memory).cast("H")
    count = 0  # of descriptors ever offered

    def turn(group: int, away: int) -> None:
        nonlocal count
        event = count + away
        if event < 0:
            return
        lap = 1 - event // size % 2
        u16[device // 2], u16[device // 2 + 1] = event % size | lap << 15, AT
        for head in range(group):
            ring.offer(head)
        want = count <= event < count + group
        assert ring.publish() is want, f"PKD-12: {count} to {count + group}, event {event}: {want}"
        for head in range(group):
            use(u16, (count + head) % size, head, 1 - (count + head) // size % 2)
        count += group
        assert [ring.reap() for _ in range(group)] == list(range(group))

    while count < start:
        turn(1, 1)
    for _ in range(3):
        for group in range(1, min(4, size) + 1):
            for away in range(-min(size, 9) + group, min(size, 9) + 1):
                turn(group, away)


def use(u16: memoryview, position: int, buffer: int, wrap: int, flags: int = 0) -> None:
    """As a device does."""
    u16[8 * position + 6] = buffer
    u16[8 * position + 7] = (AVAIL | USED if wrap else 0) | flags


@pytest.mark.parametrize("flags", [DISABLE, ENABLE, 3])
@pytest.mark.parametrize("event_idx", [False, True])
def test_the_flags_alone_decide_unless_they_name_a_descriptor(flags, event_idx):
    """PKD-12."""
    _, device, end = areas(4)
    memory = bytearray(end)
    ring = PackedRing(memoryview(memory), 4, event_idx=event_idx)
    u16 = memoryview(memory).cast("H")
    u16[device // 2], u16[device // 2 + 1] = 2 | WRAP, flags
    ring.offer(0)
    assert ring.publish() is (flags != DISABLE)


@pytest.mark.parametrize("event_idx", [False, True])
def test_what_it_asks_for_when_it_sleeps_and_when_it_does_not(event_idx):
    """PKD-12: the wrap counter goes with the position."""
    driver, _, end = areas(2)
    memory = bytearray(end)
    ring = PackedRing(memoryview(memory), 2, event_idx=event_idx)
    u16 = memoryview(memory).cast("H")
    for count in range(7):
        wrap = 1 - count // 2 % 2
        assert u16[driver // 2 + 1] == DISABLE
        ring.offer(1)
        ring.publish()
        assert ring.arm() is True
        if event_idx:
            assert (u16[driver // 2], u16[driver // 2 + 1]) == (count % 2 | wrap << 15, AT)
        else:
            assert u16[driver // 2 + 1] == ENABLE
        use(u16, count % 2, 1, wrap)
        assert ring.arm() is False, "PKD-12: it would sleep, with a used buffer there"
        ring.disarm()
        assert not ring.outstanding() - 1 and ring.idle()
        assert ring.reap() == 1 and ring.reap() == -1


@pytest.mark.parametrize("buffer", [1, 3, 4, 5000, 0xFFFF])
@pytest.mark.parametrize("offered", [0, 1])
def test_a_used_descriptor_of_a_buffer_that_is_not_out_is_refused(buffer, offered):
    """SPL-14: at once."""
    memory = bytearray(areas(4)[2])
    ring = PackedRing(memoryview(memory), 4, event_idx=False)
    for head in range(offered):
        ring.offer(head)
    ring.publish()
    use(memoryview(memory).cast("H"), 0, buffer, 1)
    assert ring.reap() == -2 and "used" in ring.fault()


@pytest.mark.parametrize("chain", [1, 3])
def test_nothing_is_shown_before_it_is_published_and_the_first_one_last(chain):
    """PKD-7: a device that stops at the first descriptor that is not available sees nothing at all."""
    memory = bytearray(areas(16)[2])
    ring = PackedRing(memoryview(memory), 16, event_idx=False)
    u16 = memoryview(memory).cast("H")
    for head in range(0, 9, 3):
        for step in range(chain):
            ring.describe(head + step, 4096 * head, 512, 1 if step + 1 < chain else 0, head + step + 1)
        ring.offer(head)
    assert not u16[7] & AVAIL
    ring.publish()
    for position in range(3 * chain):
        assert u16[8 * position + 7] & (AVAIL | USED) == AVAIL
    assert [u16[8 * chain * number + 6] for number in range(3)] == [0, 3, 6]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_buffers_may_be_used_in_any_order(kind, features, order):
    """PKD-2, CLN-1."""
    chance = random.Random(5)

    def mix(chains: list[Chain]) -> list[Chain]:
        return chains[::-1] if order == "reversed" else chance.sample(chains, len(chains))

    with backend(kind, features=features, order=mix) as model, channel(model) as opened:
        exercise(model, opened)
        batch(model, opened, 2000)


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
        model.device.status = None
        exercise(model, opened)


WRONG = {
    "an id beyond the queue": lambda ring, chain, length: [(chain.head + 5000, length)],
    "an id that was not given": lambda ring, chain, length: [((chain.head + 1) % ring.size, length)],
    "the same id twice": lambda ring, chain, length: [(chain.head, length), (chain.head, length)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WRONG)
def test_a_used_id_that_the_device_does_not_have_breaks_it(kind, what):
    """SPL-14: the device is not trusted; no other request is completed by mistake.

    An entry too many may be written over by the driver before it looks; then the ends are apart for ever.
    """
    with backend(kind, features=BOTH) as model, channel(model) as opened:
        content = fill(model)
        assert opened.read(0, 512) == content[:512]
        model.options.complete = WRONG[what]
        opened.timeout = 0.5
        with pytest.raises((ProtocolError, RequestTimeout)):
            for _ in range(3):
                opened.read(0, 512)
        with pytest.raises(VirtioError):
            opened.read(0, 512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("jump", [1, 5])
def test_descriptors_that_are_marked_used_without_being_so_break_the_device(kind, jump):
    """SPL-14: or the ends are apart for ever, as above."""
    with backend(kind, features=BOTH) as model, channel(model) as opened:
        opened.read(0, 512)
        model.options.skip_used = jump
        opened.timeout = 0.5
        with pytest.raises((ProtocolError, RequestTimeout)):
            for _ in range(3):
                opened.read(0, 512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("seed", range(2))
def test_a_device_that_scribbles_on_all_that_is_shared_harms_nobody(kind, features, seed):
    """SPL-14: ring, areas, tables, headers, responses and data: an error or wrong data, and an end."""
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
                    ring.broken = True

                model.do(scribble)
                for _ in range(3):
                    try:
                        opened.read(0, 4096)
                    except VirtioError:
                        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_a_reset_amid_requests_loses_none(kind, features):
    """PKD-2, RST-1: the ring begins anew, with both wrap counters 1."""
    with backend(kind, features=features) as model, connect(model, queues=1) as controller:
        content = fill(model)
        bdev = next(iter(controller.values()))
        with bdev.open(timeout=10) as opened:
            for _ in range(3):
                batch(model, opened, 300)
                model.options.hold = lambda chain: True
                result: list[bytes] = []
                reader = threading.Thread(target=lambda into=result: into.append(opened.read(512, 4096)))
                reader.start()
                assert model.wait_for(lambda: bool(request_ring(model).held))
                model.options.hold = None
                controller.device.restart()
                reader.join(10)
                assert result == [content[512 : 512 + 4096]]
