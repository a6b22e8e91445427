"""The driver's half of a split ring against a device that is told byte by byte what to do."""

import mmap
import random

import pytest
from hypothesis import given, settings, strategies as st

from tests.ring.peer import Peer
from virtio.ring import split
from virtio.ring.split import SplitRing

WRITE = 2  # descriptor flag (2.7.5)


def make(size: int = 4, *, event_idx: bool = False) -> tuple[SplitRing, Peer]:
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    memory[:4096] = b"\xee" * 4096  # whatever was there before
    return SplitRing(memory, size, event_idx=event_idx), Peer(memory, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 256, 32768])
def test_the_areas_are_aligned_and_do_not_overlap(size):
    """SPL-1."""
    available, used, end = split.areas(size)
    assert available % 2 == 0 and available >= 16 * size
    assert used % 4 == 0 and used >= available + 6 + 2 * size
    assert end >= used + 6 + 8 * size
    assert used // 64 > (available + 5 + 2 * size) // 64  # no cache line is written by both


@pytest.mark.parametrize("size", [0, 3, 100, 65536, -4])
def test_a_size_that_is_no_power_of_two_up_to_32768_is_refused(size):
    with pytest.raises(ValueError, match=f"queue size {size} is not a power of two"):
        split.areas(size)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("align", [split.ALIGN, split.LEGACY_ALIGN])
@pytest.mark.parametrize("size", [1 << bits for bits in range(16)])
def test_the_room_beside_a_ring_is_the_rest_of_its_only_cache_line(size, align, event_idx):
    """None where it has several: what the device writes would be in the line of what it polls, and more."""
    available, used, end = split.areas(size, align)
    # flags, idx | ring | event
    halves = [
        range(available, available + 4 + 2 * size + 2 * event_idx),
        range(used, used + 4 + 8 * size + 2),
    ]
    for half, room in zip(halves, split.room(size, event_idx, align), strict=True):
        line = half.start // 64
        assert len(room) == (64 * (line + 1) - half.stop if half[-1] // 64 == line else 0)
        for byte in room:
            assert byte // 64 == line and 16 * size <= byte < end
            assert all(byte not in other for other in halves)


def test_memory_too_small_for_the_ring_is_refused():
    with pytest.raises(ValueError, match="too few for a ring of 256"):
        SplitRing(memoryview(bytearray(4096)), 256, event_idx=False)


def test_the_ring_starts_from_zeroed_memory():
    """SPL-15: used.flags among it."""
    _, peer = make()
    assert peer.u16(peer.used) == 0 and peer.avail_idx == 0


def test_an_offered_head_is_unseen_until_published():
    ring, peer = make()
    ring.describe(2, 0x1122334455667788, 512, WRITE, 0)
    ring.offer(2)
    assert peer.avail_idx == 0
    assert ring.publish()
    assert peer.avail_idx == 1 and peer.head(0) == 2
    assert peer.descriptor(2) == (0x1122334455667788, 512, WRITE, 0)


def test_publishing_nothing_asks_for_no_kick():
    ring, _ = make()
    assert not ring.publish()


def test_a_device_that_says_no_notify_is_not_kicked():
    """SPL-16."""
    ring, peer = make()
    peer.set_used_flags(1)
    ring.offer(0)
    assert not ring.publish()
    peer.set_used_flags(0)
    ring.offer(1)
    assert ring.publish()


def test_without_event_idx_the_event_field_is_ignored():
    """SPL-16."""
    ring, peer = make()
    peer.set_avail_event(0x7FFF)
    ring.offer(0)
    assert ring.publish()


def test_with_event_idx_the_flag_is_ignored():
    """SPL-17."""
    ring, peer = make(event_idx=True)
    peer.set_used_flags(1)
    ring.offer(0)
    assert ring.publish()


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 20)), max_size=40),
    st.sampled_from([0, 65_500]),
)
def test_with_event_idx_a_kick_is_due_when_the_index_passes_the_event(batches, start):
    """SPL-17, against counters that never wrap."""
    ring, peer = make(8, event_idx=True)
    sent = 0
    while sent < start:  # bring the 16-bit index near its wrap, however far that is
        count = min(8, start - sent)
        for head in range(count):
            ring.offer(head)
        ring.publish()
        for head in range(count):
            peer.use(head)
            assert ring.reap() == head
        sent += count
    for count, ahead in batches:
        event = sent + ahead  # the device wants to hear of the buffer that makes it event + 1
        peer.set_avail_event(event & 0xFFFF)
        for head in range(count):
            ring.offer(head)
        assert ring.publish() == (sent <= event < sent + count)
        for head in range(count):
            peer.use(head)
            assert ring.reap() == head
        sent += count


def test_the_available_index_only_ever_grows_over_the_16_bit_wrap():
    """SPL-10."""
    ring, peer = make(4)
    for total in range(1, 70_000):
        ring.offer(total % 4)
        ring.publish()
        assert peer.avail_idx == total & 0xFFFF
        peer.use(total % 4, total)
        assert ring.reap() == total % 4
        assert ring.used_length == total
    assert ring.reap() == -1


def test_heads_come_back_in_the_devices_order():
    ring, peer = make(4)
    for head in range(4):
        ring.offer(head)
    ring.publish()
    order = [2, 0, 3, 1]
    for head in order:
        peer.use(head)
    assert [ring.reap() for _ in order] == order
    assert ring.reap() == -1 and ring.outstanding() == 0


@pytest.mark.parametrize("bad", [4, 5, 0x10000, 0xFFFFFFFF])
def test_a_used_id_out_of_range_is_refused(bad):
    ring, peer = make(4)
    ring.offer(0)
    ring.publish()
    peer.use(bad)
    assert ring.reap() == -2
    assert f"used id {bad} is not an outstanding head" in ring.fault()


def test_a_used_head_that_was_never_given_is_refused():
    ring, peer = make(4)
    ring.offer(0)
    ring.publish()
    peer.use(1)
    assert ring.reap() == -2


def test_a_head_used_twice_is_refused():
    ring, peer = make(4)
    ring.offer(0)
    ring.offer(1)
    ring.publish()
    peer.use(0)
    peer.use(0)
    assert ring.reap() == 0
    assert ring.reap() == -2
    assert ring.reap() == -2  # and it stays so


@pytest.mark.parametrize("jump", [3, 4, 0x8000, 0xFFFF])
def test_a_used_index_beyond_what_is_outstanding_is_refused(jump):
    ring, peer = make(4)
    ring.offer(0)
    ring.offer(1)
    ring.publish()
    peer.use(0)
    peer.move_used(jump - 1)
    assert ring.reap() == -2
    assert "used index moved by" in ring.fault() and "with 2 buffers outstanding" in ring.fault()


def test_a_device_that_scribbles_on_its_areas_and_ours_does_not_confuse_the_private_state():
    ring, peer = make(4)
    ring.offer(3)
    ring.publish()
    peer.memory[: peer.used] = b"\xff" * peer.used  # descriptors and the available ring
    peer.use(3)
    assert ring.reap() == 3
    ring.offer(1)
    ring.publish()
    assert peer.avail_idx == 2


@pytest.mark.parametrize("event_idx", [False, True])
def test_arming_says_whether_it_is_safe_to_sleep(event_idx):
    ring, peer = make(4, event_idx=event_idx)
    ring.offer(0)
    ring.publish()
    assert ring.arm()
    peer.use(0)
    assert not ring.arm()  # something came meanwhile: do not sleep
    assert ring.reap() == 0
    assert ring.arm()


def test_without_event_idx_interrupts_are_asked_for_by_the_flag():
    """SPL-11."""
    ring, peer = make(4)
    assert peer.avail_flags == 1
    ring.arm()
    assert peer.avail_flags == 0
    ring.disarm()
    assert peer.avail_flags == 1


def test_with_event_idx_the_flag_stays_zero_and_the_event_says_when():
    """SPL-12."""
    ring, peer = make(4, event_idx=True)
    for round_ in range(10):
        ring.offer(0)
        ring.publish()
        ring.arm()
        assert peer.used_event == round_  # tell of the next one
        peer.use(0)
        ring.disarm()
        assert peer.used_event == (round_ - 1) & 0xFFFF  # passed already: quiet for 65,535 more
        assert ring.reap() == 0
        assert peer.avail_flags == 0


def test_spurious_looks_find_nothing():
    """SPL-13."""
    ring, _ = make(4)
    assert [ring.reap() for _ in range(3)] == [-1, -1, -1]


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("align", [split.ALIGN, split.LEGACY_ALIGN])
@pytest.mark.parametrize("size", [1, 4, 8, 256])
def test_a_ring_begins_anew_and_touches_nothing_but_its_two_halves(size, align, event_idx):
    """Descriptors are before them, and in small rings the headers and responses of requests behind each."""
    available, used, end = split.areas(size, align)
    memory = memoryview(bytearray(end + 64))
    ring = SplitRing(memory, size, event_idx=event_idx, align=align)
    new = bytes(memory)
    for head in range(size):
        ring.offer(head)
    ring.publish()
    memory[:] = b"\xee" * len(memory)
    ring.rewind()
    want = bytearray(b"\xee" * len(memory))
    last = available + 4 + 2 * size + 2 * event_idx
    for half in (slice(available, last), slice(used, used + 6 + 8 * size)):
        want[half] = new[half]
    assert memory == want
    assert (ring.outstanding(), ring.reap()) == (0, -1)
    ring.offer(0)
    ring.publish()
    assert memory[available + 2 : available + 6] == b"\1\0" + b"\0\0"  # idx | the only head


def test_a_detached_ring_touches_nothing():
    ring, peer = make(4)
    ring.detach()
    before = bytes(peer.memory)
    ring.offer(0)
    ring.publish()
    ring.arm()
    ring.reap()
    assert bytes(peer.memory) == before


def test_random_traffic_loses_and_repeats_no_head():
    rng = random.Random(7)
    for event_idx in (False, True):
        ring, peer = make(16, event_idx=event_idx)
        free, given, seen = list(range(16)), [], 0
        for _ in range(20_000):
            action = rng.randrange(4)
            if action == 0 and free:
                head = free.pop(rng.randrange(len(free)))
                ring.offer(head)
                given.append(head)
            elif action == 1:
                ring.publish()
                seen = len(given)
            elif action == 2 and seen:
                seen -= 1
                head = given.pop(rng.randrange(seen + 1))
                peer.use(head)
                assert ring.reap() == head
                free.append(head)
            else:
                assert ring.outstanding() == seen
        assert sorted(free + given) == list(range(16))
