"""Packed rings of the target: our own driver on them, and drivers that write what they may not."""

import os
import re
import struct
import threading

import pytest
from hypothesis import given, settings, strategies as st

import virtio_bdev
from virtio.ring.device import DeviceRing, GuestMemory
from virtio.target import serve
from virtio.wire.virtio import Feature
from virtio_bdev.verify import verify

GUEST, DATA, TABLE = 0x40000000, 0x4000, 0x8000
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
FIRST = 0x8000_8000


@pytest.mark.parametrize("without", [(), ("INDIRECT_DESC",), ("EVENT_IDX",), ("INDIRECT_DESC", "EVENT_IDX")])
@pytest.mark.parametrize("kind", ["blk", "scsi"])
def test_what_is_written_is_read_back(kind, without):
    with serve(kind, "ram:8M", packed=True, without=without) as target:
        with virtio_bdev.attach(target.address, dev_type=kind, queues=2) as controller:
            (bdev,) = controller.values()
            assert controller.device.features & Feature.RING_PACKED
            for wait, size in (("poll", 4096), ("event", 65536)):
                with bdev.open(wait=wait) as channel:
                    assert verify(channel, bs=size).blocks == (8 << 20) // size
        with virtio_bdev.attach(target.address, dev_type=kind, rings="split") as controller:
            assert not controller.device.features & Feature.RING_PACKED


@pytest.mark.parametrize("kind", ["blk", "scsi"])
def test_requests_that_are_held_come_back_beside_others_and_after_a_reset(kind):
    with serve(kind, "ram:8M", packed=True, control=True) as target:
        with virtio_bdev.attach(target.address, dev_type=kind, queues=1) as controller:
            (bdev,) = controller.values()
            with bdev.open() as channel:
                channel.write(0, b"\x5a" * 65536)
                disk = {} if kind == "blk" else {"target": 0, "lun": 0}
                target.control("set_fault", delay=0.02, **disk)
                offsets = memoryview(struct.pack("<64Q", *range(0, 65536, 1024))).cast("Q")
                into = bytearray(65536)
                done = threading.Event()

                def read():
                    channel.read_batch(offsets, 1024, into).raise_for_status()
                    done.set()

                reader = threading.Thread(target=read)
                reader.start()
                reader.join(20)
                assert done.is_set() and into == b"\x5a" * 65536


def ring(memory, size=8, base=FIRST, *, indirect=True, event_idx=False):
    made = DeviceRing(size, base, event_idx=event_idx, indirect=indirect, packed=True)
    areas = memory[: 16 * size], memory[0x1000:0x1004], memory[0x1010:0x1014]
    made.attach(GuestMemory([(GUEST, memory)]), *areas)
    return made


def put(memory, position, address, length, buffer, flags):
    struct.pack_into("<QIHH", memory, 16 * position, GUEST + address, length, buffer, flags)


@pytest.fixture
def memory():
    return memoryview(bytearray(0x10000))


def test_lists_and_tables_are_popped_in_order_and_given_back(memory):
    """PKD: positions, wrap counters and buffer IDs, byte by byte."""
    made = ring(memory, 3)
    assert made.pop() == -1
    memory[DATA : DATA + 3] = b"abc"
    put(memory, 0, DATA, 3, 7, NEXT | AVAIL)
    put(memory, 1, DATA + 16, 5, 2, WRITE | AVAIL)
    assert made.pop() == 2  # the id is that of the last one
    assert (made.readable, made.writable, made.gather(0, 9)) == (3, 5, b"abc")
    assert made.scatter(0, b"xyz") == 3
    made.push(2, 3)
    assert struct.unpack_from("<IHH", memory, 8) == (3, 2, AVAIL | USED | WRITE)
    struct.pack_into("<QIHH", memory, TABLE, GUEST + DATA, 1, 0, 0)
    struct.pack_into("<QIHH", memory, TABLE + 16, GUEST + DATA + 32, 2, 0, WRITE)
    put(memory, 2, TABLE, 32, 1, INDIRECT | AVAIL)
    assert made.pop() == 1 and (made.readable, made.writable) == (1, 2)
    made.push(1, 0)
    assert struct.unpack_from("<IHH", memory, 40) == (0, 1, AVAIL | USED)
    put(memory, 0, DATA, 1, 0, USED)  # the next lap: available is the other way round
    assert made.pop() == 0
    made.push(0, 0)
    assert struct.unpack_from("<IHH", memory, 8) == (0, 0, 0)
    assert made.index == 1 | 0 << 15 | 1 << 16


@pytest.mark.parametrize(
    "descriptors, words",
    [
        ([(DATA, 1, 0, NEXT | AVAIL)], "a list whose descriptor at 1 is not available"),
        ([(DATA, 1, number, NEXT | AVAIL) for number in range(8)], "a loop|not available"),
        ([(DATA, 1, 8, AVAIL)], "buffer id 8 is not below the 8"),
        ([(DATA, 1, 65535, AVAIL)], "buffer id 65535"),
        ([(DATA, 0, 0, AVAIL)], "a buffer of no bytes"),
        ([(0x20000, 1, 0, AVAIL)], "nothing is mapped at"),
        ([(DATA, 1, 0, NEXT | WRITE | AVAIL), (DATA, 1, 0, AVAIL)], "behind a writable one"),
        ([(TABLE, 17, 0, INDIRECT | AVAIL)], "an indirect table of 17 bytes"),
        ([(TABLE, 16, 0, INDIRECT | NEXT | AVAIL), (DATA, 1, 0, AVAIL)], "nested, chained or not"),
        ([(DATA, 1, 0, NEXT | AVAIL), (TABLE, 16, 0, INDIRECT | AVAIL)], "nested, chained or not"),
    ],
)
def test_a_list_that_cannot_be_is_refused(memory, descriptors, words):
    made = ring(memory)
    for position, descriptor in enumerate(descriptors):
        put(memory, position, *descriptor)
    assert made.pop() == -2
    assert re.search(words, made.fault()), made.fault()


@pytest.mark.parametrize("base", [3, 3 << 16, 0x7FFF])
def test_a_base_outside_of_the_ring_is_refused(base):
    with pytest.raises(ValueError, match="of a packed ring of 3"):
        DeviceRing(3, base, event_idx=False, indirect=False, packed=True)


@settings(max_examples=150, deadline=None)
@given(noise=st.binary(min_size=128, max_size=128), table=st.binary(min_size=64, max_size=64))
def test_whatever_a_driver_writes_nothing_outside_is_touched(noise, table):
    memory = memoryview(bytearray(0x10000))
    made = ring(memory, event_idx=True)
    memory[:128], memory[TABLE : TABLE + 64] = noise, table
    for _ in range(10):
        head = made.pop()
        if head < 0:
            break
        made.gather(0, 64)
        made.push(head, made.scatter(0, b"x" * 8))
        assert made.notify() == 0
    made.arm()
    made.disarm()


@pytest.mark.parametrize("event, lap, told", [(0, 1, True), (1, 1, False), (3, 0, False), (0, 0, False)])
def test_a_driver_is_told_when_its_event_is_passed(memory, event, lap, told):
    made = ring(memory, 4, event_idx=True)
    made.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
    struct.pack_into("<HH", memory, 0x1000, event | lap << 15, 2)
    put(memory, 0, DATA, 1, 0, AVAIL)
    made.push(made.pop(), 0)
    assert made.notify() == 0
    try:
        assert os.eventfd_read(made.call_fd) == 1 and told
    except BlockingIOError:
        assert not told
    finally:
        os.close(made.call_fd)
