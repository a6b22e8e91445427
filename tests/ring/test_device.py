"""The device's half of the split ring: what a driver may write, and all that it may not."""

import os
import struct

import pytest
from hypothesis import given, settings, strategies as st

from tests.target.front_end import GUEST, INDIRECT, NEXT, WRITE, Driver, eventfd
from virtio.ring.device import SLOTS, DeviceRing, GuestMemory

DATA = 0x4000  # where the tests' buffers are, behind the ring
TABLE = 0x8000  # and their indirect tables


@pytest.fixture
def memory() -> memoryview:
    return memoryview(bytearray(0x10000))


def pair(
    memory: memoryview, size: int = 8, base: int = 0, *, event_idx: bool = False, indirect: bool = True
) -> tuple[Driver, DeviceRing]:
    """Both halves of one ring in the same memory, which is at GUEST for descriptors."""
    driver = Driver(memory, size, event_idx=event_idx)
    driver.index = driver.seen = base
    struct.pack_into("<H", memory, driver.avail + 2, base)
    struct.pack_into("<H", memory, driver.used + 2, base)
    ring = DeviceRing(size, base, event_idx=event_idx, indirect=indirect)
    ring.attach(GuestMemory([(GUEST, memory)]), *driver.areas())
    return driver, ring


def test_a_chain_is_popped_read_written_and_given_back(memory):
    driver, ring = pair(memory, 4)
    assert ring.pop() == -1
    memory[0:48] = (
        # address, little-endian           length          flags     next
        b"\x00\x40\x00\x40\0\0\0\0"
        b"\x03\0\0\0"
        b"\1\0"
        b"\2\0"  # 0: readable, goes on in 2
        b"\0\0\0\0\0\0\0\0"
        b"\0\0\0\0"
        b"\0\0"
        b"\0\0"  # 1: not used
        b"\x10\x40\x00\x40\0\0\0\0"
        b"\x05\0\0\0"
        b"\2\0"
        b"\0\0"  # 2: writable, the last
    )
    memory[DATA : DATA + 3] = b"abc"
    memory[64:70] = b"\0\0\1\0\0\0"  # flags | idx | ring[0]: head 0
    assert ring.pop() == 0
    assert (ring.readable, ring.writable) == (3, 5)
    assert ring.gather(0, 100) == b"abc"
    assert ring.scatter(1, b"xyz") == 3
    ring.push(0, 4)
    assert memory[DATA + 0x10 : DATA + 0x15] == b"\0xyz\0"
    assert memory[96:108] == b"\0\0\1\0\0\0\0\0\4\0\0\0"  # flags | idx | id, len
    assert ring.pop() == -1 and ring.index == 1


def test_parts_are_cut_at_any_byte_across_descriptors(memory):
    driver, ring = pair(memory)
    memory[DATA : DATA + 6] = b"abcdef"
    driver.chain(
        [
            (GUEST + DATA, 2, 0),  # ab
            (GUEST + DATA + 3, 3, 0),  # def
            (GUEST + DATA + 16, 1, WRITE),
            (GUEST + DATA + 18, 4, WRITE),
        ]
    )
    driver.offer(0)
    assert ring.pop() == 0
    assert [ring.gather(skip, 2) for skip in range(7)] == [b"ab", b"bd", b"de", b"ef", b"f", b"", b""]
    assert [bytes(view) for view in ring.readable_views(1, 3)] == [b"b", b"de"]
    assert ring.scatter(0, b"123456789") == 5  # as much as there is room for
    assert ring.scatter(5, b"0") == 0
    assert memory[DATA + 16 : DATA + 22] == b"1\x002345"
    ring.writable_views(1, 2)[0][:] = b"xy"  # in place
    assert memory[DATA + 18 : DATA + 22] == b"xy45"


def test_an_indirect_table_may_come_behind_direct_descriptors(memory):
    driver, ring = pair(memory)
    driver.chain([(GUEST + DATA, 4, 0), (GUEST + TABLE, 48, INDIRECT)])
    driver.chain(
        [(GUEST + DATA + 4, 4, 0), (GUEST + DATA + 8, 4, WRITE), (GUEST + DATA + 12, 4, WRITE)], at=TABLE
    )
    memory[DATA : DATA + 8] = b"headdata"
    driver.offer(0)
    assert ring.pop() == 0
    assert (ring.gather(0, 8), ring.writable) == (b"headdata", 8)


def test_an_indirect_table_may_be_longer_than_the_queue(memory):
    driver, ring = pair(memory, 2)
    driver.describe(0, GUEST + TABLE, 16 * 100, INDIRECT)
    driver.chain([(GUEST + DATA, 1, 0)] * 100, at=TABLE)
    driver.offer(0)
    assert ring.pop() == 0 and ring.readable == 100


def test_the_write_flag_of_an_indirect_descriptor_means_nothing(memory):
    driver, ring = pair(memory)
    driver.describe(0, GUEST + TABLE, 16, INDIRECT | WRITE)
    driver.chain([(GUEST + DATA, 1, 0)], at=TABLE)
    driver.offer(0)
    assert ring.pop() == 0 and (ring.readable, ring.writable) == (1, 0)


HOSTILE = {
    # name: descriptors as (index, address, length, flags, next), what is said of it
    "a loop of one": ([(0, GUEST + DATA, 1, NEXT, 0)], "more than 8 descriptors"),
    "a loop of two": ([(0, GUEST, 1, NEXT, 1), (1, GUEST, 1, NEXT, 0)], "more than 8 descriptors"),
    "a next outside the table": ([(0, GUEST, 1, NEXT, 8)], "index 8 is outside"),
    "nothing is mapped there": ([(0, 0x1000, 1, 0, 0)], "nothing is mapped at 0x1000"),
    "a buffer that ends past the region": ([(0, GUEST + 0xFFFF, 2, 0, 0)], "mapped at 0x40010000"),
    "a buffer that ends past 2**64": ([(0, 2**64 - 1, 0xFFFFFFFF, WRITE, 0)], "nothing is mapped"),
    "a buffer of no bytes": ([(0, GUEST, 0, 0, 0)], "no bytes"),
    "readable behind writable": ([(0, GUEST, 1, WRITE | NEXT, 1), (1, GUEST, 1, 0, 0)], "behind a writable"),
    "an empty indirect table": ([(0, GUEST + TABLE, 0, INDIRECT, 0)], "table of 0 bytes"),
    "an odd indirect table": ([(0, GUEST + TABLE, 17, INDIRECT, 0)], "table of 17 bytes"),
    "a huge indirect table": ([(0, GUEST + TABLE, 16 * 1025, INDIRECT, 0)], "table of 16400 bytes"),
    "an unmapped indirect table": ([(0, 0x1000, 16, INDIRECT, 0)], "mapped at 0x1000"),
    "an indirect table past the region": ([(0, GUEST + 0xFFF8, 16, INDIRECT, 0)], "mapped at 0x4000fff8"),
    "an indirect table at an odd address": ([(0, GUEST + TABLE + 1, 16, INDIRECT, 0)], "mapped at"),
    "INDIRECT and NEXT": ([(0, GUEST + TABLE, 16, INDIRECT | NEXT, 1)], "flags 0x5"),
}


@pytest.mark.parametrize(("descriptors", "fault"), HOSTILE.values(), ids=HOSTILE)
def test_a_chain_that_may_not_be_is_refused(memory, descriptors, fault):
    driver, ring = pair(memory)
    for descriptor in descriptors:
        driver.describe(*descriptor)
    driver.offer(0)
    assert ring.pop() == -2
    assert fault in ring.fault()


def test_an_indirect_table_in_another_is_refused(memory):
    driver, ring = pair(memory)
    driver.describe(0, GUEST + TABLE, 16, INDIRECT)
    driver.describe(0, GUEST + TABLE, 16, INDIRECT, at=TABLE)
    driver.offer(0)
    assert ring.pop() == -2
    assert "nested" in ring.fault()


def test_a_loop_in_an_indirect_table_is_refused(memory):
    driver, ring = pair(memory)
    driver.describe(0, GUEST + TABLE, 32, INDIRECT)
    driver.describe(0, GUEST, 1, NEXT, 1, at=TABLE)
    driver.describe(1, GUEST, 1, NEXT, 0, at=TABLE)
    driver.offer(0)
    assert ring.pop() == -2


def test_a_next_outside_its_indirect_table_is_refused(memory):
    driver, ring = pair(memory)
    driver.describe(0, GUEST + TABLE, 16, INDIRECT)
    driver.describe(0, GUEST, 1, NEXT, 1, at=TABLE)  # the queue has a descriptor 1, the table has not
    driver.offer(0)
    assert ring.pop() == -2
    assert "index 1" in ring.fault()


def test_an_indirect_descriptor_is_refused_where_it_was_not_negotiated(memory):
    driver, ring = pair(memory, indirect=False)
    driver.describe(0, GUEST + TABLE, 16, INDIRECT)
    driver.chain([(GUEST + DATA, 1, 0)], at=TABLE)
    driver.offer(0)
    assert ring.pop() == -2


def test_a_head_outside_the_queue_is_refused(memory):
    driver, ring = pair(memory)
    driver.offer(8)
    assert ring.pop() == -2
    assert "index 8" in ring.fault()


@pytest.mark.parametrize("moved", [9, 0x8000, 0xFFFF])
def test_an_available_index_that_jumps_is_refused(memory, moved):
    driver, ring = pair(memory, base=5)
    struct.pack_into("<H", memory, driver.avail + 2, 5 + moved & 0xFFFF)
    assert ring.pop() == -2
    assert f"moved by {moved}, more than the 8" in ring.fault()


def test_a_chain_of_more_bytes_than_a_length_can_tell_is_refused(memory):
    """Without memory of that size: the same bytes many times."""
    large = memoryview(bytearray(1 << 25))
    driver, ring = pair(memory)
    ring.attach(GuestMemory([(GUEST, memory), (1 << 40, large)]), *driver.areas())
    driver.describe(0, GUEST + TABLE, 16 * 128, INDIRECT)
    driver.chain([(1 << 40, 1 << 25, WRITE)] * 128, at=TABLE)  # 2**32
    driver.offer(0)
    assert ring.pop() == -2
    assert "4294967296 bytes" in ring.fault()


def test_a_buffer_may_cross_from_one_region_into_the_next(memory):
    driver, ring = pair(memory)
    low, high = memoryview(bytearray(b"low!")), memoryview(bytearray(b"high"))
    ring.attach(GuestMemory([(0x1004, high), (0x1000, low)]), *driver.areas())
    driver.chain([(0x1002, 4, 0), (0x1002, 4, WRITE)])
    driver.offer(0)
    assert ring.pop() == 0
    assert ring.gather(0, 4) == b"w!hi"
    ring.scatter(0, b"1234")
    assert (bytes(low), bytes(high)) == (b"lo12", b"34gh")


def test_a_chain_is_not_cut_into_pieces_without_end(memory):
    driver, ring = pair(memory)
    crumbs = [(0x1000 + number, memoryview(bytearray(1))) for number in range(SLOTS - 1)]
    ring.attach(GuestMemory([(GUEST, memory), *crumbs]), *driver.areas())
    driver.describe(0, GUEST + TABLE, 16 * 100, INDIRECT)
    driver.chain([(0x1000, SLOTS - 1, 0)] * 100, at=TABLE)  # 6,300 pieces
    driver.offer(0)
    assert ring.pop() == -2
    assert "more than 1024 pieces" in ring.fault()


def test_what_was_popped_does_not_change_with_its_descriptor(memory):
    driver, ring = pair(memory)
    driver.chain([(GUEST + DATA, 4, 0), (GUEST + DATA + 4, 4, WRITE)])
    memory[DATA : DATA + 4] = b"data"
    driver.offer(0)
    assert ring.pop() == 0
    memory[0:32] = b"\xff" * 32  # both descriptors, while the device works
    assert (ring.gather(0, 4), ring.scatter(0, b"done"), ring.readable, ring.writable) == (b"data", 4, 4, 4)


ADDRESSES = st.sampled_from([GUEST, GUEST + DATA, GUEST + TABLE, GUEST + 0xFFF0, GUEST - 1, 0, 2**64 - 1])
LENGTHS = st.sampled_from([0, 1, 16, 32, 48, 0x8000, 0x10000, 2**32 - 1])
DESCRIPTORS = st.lists(
    st.tuples(st.integers(0, 4), ADDRESSES, LENGTHS, st.integers(0, 7), st.integers(0, 5)), max_size=8
)


@settings(max_examples=500)
@given(table=DESCRIPTORS, inner=DESCRIPTORS, heads=st.lists(st.integers(0, 5), max_size=5))
def test_whatever_a_driver_writes_is_refused_or_lies_in_its_memory(table, inner, heads):
    memory = memoryview(bytearray(0x10000))
    driver, ring = pair(memory, 4)
    for descriptor in table:
        driver.describe(*descriptor)
    for descriptor in inner:
        driver.describe(*descriptor, at=TABLE)
    driver.offer(*heads)
    while (head := ring.pop()) >= 0:
        views = [*ring.readable_views(0, 2**32), *ring.writable_views(0, 2**32)]
        assert sum(map(len, views)) == ring.readable + ring.writable
        ring.scatter(0, b"x" * 100)
        ring.push(head, 0)
    assert head == -1 or ring.fault()


def test_a_map_refuses_what_cannot_be_an_address():
    byte = memoryview(bytearray(1))
    with pytest.raises(ValueError, match="past the end|pass the end"):
        GuestMemory([(2**64 - 1, byte)])
    with pytest.raises(ValueError, match=f"at most {SLOTS}"):
        GuestMemory([(number, byte) for number in range(SLOTS + 1)])


def test_areas_that_are_too_short_are_refused(memory):
    driver, ring = pair(memory)
    for number, least in enumerate((16 * 8, 6 + 2 * 8, 6 + 8 * 8)):
        areas = list(driver.areas())
        areas[number] = areas[number][: least - 1]
        with pytest.raises(ValueError, match=f"{least - 1} bytes, want {least}"):
            ring.attach(GuestMemory(), *areas)


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_a_size_that_no_queue_has_is_refused(size):
    with pytest.raises(ValueError, match="power of two"):
        DeviceRing(size, 0, event_idx=False, indirect=False)


def test_indices_go_on_past_65535(memory):
    driver, ring = pair(memory, 4, base=65534)
    driver.chain([(GUEST + DATA, 1, WRITE)])
    for index in (65534, 65535, 0, 1):
        assert ring.index == index
        driver.offer(0)
        assert ring.pop() == 0
        ring.push(0, 1)
        assert driver.take() == [(0, 1)]
        assert ring.pop() == -1


def test_a_new_map_leaves_the_indices_alone(memory):
    driver, ring = pair(memory, base=7)
    driver.chain([(GUEST + DATA, 1, WRITE)])
    driver.offer(0)
    ring.pop()
    ring.push(0, 1)
    ring.attach(GuestMemory([(0x1000, memory)]), *driver.areas())
    driver.chain([(0x1000 + DATA, 1, WRITE)])
    driver.offer(0)
    assert ring.pop() == 0
    ring.push(0, 1)
    assert driver.used_index() == 9


def called(fd: int) -> bool:
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


@pytest.mark.parametrize("flag", [0, 1])
def test_without_event_idx_the_drivers_flag_says_whether_to_call(memory, flag):
    driver, ring = pair(memory)
    with eventfd() as ring.call_fd:
        driver.chain([(GUEST + DATA, 1, WRITE)])
        struct.pack_into("<H", memory, driver.avail, flag)
        driver.offer(0)
        ring.push(ring.pop(), 1)
        assert not called(ring.call_fd)  # only when told to
        assert ring.notify() == 0
        assert called(ring.call_fd) is not bool(flag)
        ring.notify()
        assert not called(ring.call_fd)  # nothing was used since


def test_a_call_that_cannot_be_made_is_an_errno(memory):
    driver, ring = pair(memory)
    driver.chain([(GUEST + DATA, 1, WRITE)])
    driver.offer(0)
    ring.push(ring.pop(), 1)
    read_end, ring.call_fd = os.pipe()
    os.close(read_end)
    try:
        assert ring.notify() == 32  # EPIPE
    finally:
        os.close(ring.call_fd)


@settings(max_examples=300)
@given(
    start=st.integers(65520, 65536 + 16),
    steps=st.lists(st.tuples(st.integers(1, 4), st.integers(-3, 8)), min_size=1, max_size=12),
)
def test_with_event_idx_both_sides_are_told_exactly_when_they_asked(start, steps):
    """Against counters that never wrap: told if and only if the index passed the one asked for."""
    memory = memoryview(bytearray(0x10000))
    driver, ring = pair(memory, 16, start & 0xFFFF, event_idx=True)
    driver.chain([(GUEST + DATA, 1, WRITE)])
    total = start
    with eventfd() as ring.call_fd:
        for count, ahead in steps:
            assert ring.arm()  # sleeping: wants to be kicked for the next one
            assert driver.offer(*[0] * count)
            assert not ring.arm()
            ring.disarm()
            event = total + ahead
            struct.pack_into("<H", memory, driver.avail + 4 + 2 * 16, event & 0xFFFF)
            for _ in range(count):
                ring.push(ring.pop(), 1)
            ring.notify()
            total += count
            assert called(ring.call_fd) == (total - count <= event < total)
            assert not driver.offer() and ring.pop() == -1
            assert memory[driver.used : driver.used + 2] == b"\0\0"  # flags stay 0 (2.7.10)


def test_without_event_idx_the_flag_says_whether_to_kick(memory):
    driver, ring = pair(memory)
    driver.chain([(GUEST + DATA, 1, WRITE)])
    assert ring.arm()
    assert driver.offer(0)
    assert not ring.arm()  # something came meanwhile: do not sleep
    ring.disarm()
    assert not driver.offer(0)


def test_a_chain_is_taken_up_again_as_it_is_by_then(memory):
    driver, ring = pair(memory)
    driver.chain([(GUEST + DATA, 3, 0), (GUEST + DATA + 16, 5, WRITE)])
    driver.chain([(GUEST + DATA + 32, 7, 0)], 4)
    driver.offer(0, 4)
    assert (ring.pop(), ring.head) == (0, 0)
    assert (ring.pop(), ring.head, ring.readable, ring.writable) == (4, 4, 7, 0)
    memory[DATA : DATA + 3] = b"abc"
    assert (ring.again(0), ring.head, ring.readable, ring.writable) == (0, 0, 3, 5)
    assert ring.gather(0, 9) == b"abc"
    ring.push(ring.head, ring.scatter(0, b"xy"))
    assert (driver.take(), bytes(memory[DATA + 16 : DATA + 18])) == ([(0, 2)], b"xy")
    driver.describe(4, 0x1000, 7)
    assert ring.again(4) == -2 and ring.fault() == "nothing is mapped at 0x1000"
    assert ring.again(99) == -2 and ring.fault() == "descriptor index 99 is outside its table"
    assert ring.index == 2 and ring.pop() == -1
