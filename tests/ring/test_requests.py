"""The request queue against a device that is told byte by byte what to do."""

import contextlib
import errno
import gc
import random
import signal
import struct
import sys
import threading
import time
from array import array

import pytest

from tests.conftest import INTERPRETED
from tests.ring.peer import Peer
from virtio.device import dialogue
from virtio.errors import RequestError
from virtio.ring import codes, split
from virtio.ring.codes import BOUNCED, CONSTANT, FROM_DEVICE, NBYTES, OFFSET, TAG, TO_DEVICE
from virtio.ring.doorbell import Doorbell
from virtio.ring.format import LEGACY, PACKED, SPLIT
from virtio.ring.layout import Layout, most_segments, queue_bytes
from virtio.ring.region import Mapping, Pool, Region
from virtio.ring.requests import Kept, RequestQueue
from virtio.ring.stats import READ as READ_KIND, Stats
from virtio.ring.task import Task
from virtio.ring.template import Patch, Template

IOVA = 1 << 32
SCSI_MASK = 0xFFFF_0000_FFFF_FFFF  # all of it but the status qualifier
BLK = Layout(16, 16, 1, 0, 0xFF, response_first=False)
SCSI = Layout(51, 0, 108, 4, SCSI_MASK, response_first=True)
WIDE = Layout(16, 0, 8, 0, SCSI_MASK, response_first=True)  # small enough to lie anywhere
SECTOR = Patch(OFFSET, 8, 8, shift=9)
NEXT, WRITE, INDIRECT = 1, 2, 4


class Bench:
    """A queue in a region, the device's half of its ring, and what a device would see there."""

    def __init__(self, size=8, layout=BLK, *, indirect=True, event_idx=False, table=None, **more):
        self.region = Region(1 << 20)
        self.pool = Pool(self.region)
        segments = more.get("segments", 1)
        mapping = table or Mapping.contiguous(IOVA)
        form = more.get("form", SPLIT)
        nbytes = queue_bytes(size, layout, segments, indirect, form=form, page=1 << mapping.shift)
        self.memory = memory = self.pool.take(nbytes)
        self.queue = RequestQueue(
            memory,
            self.region.view,
            mapping,
            size,
            layout,
            indirect=indirect,
            event_idx=event_idx,
            **more,
        )
        self.kicks = 0
        self.queue.connect(Doorbell(call=self.kick))
        self.peer = Peer(memory.view(), size)
        self.seen = 0
        self.layout = layout

    def kick(self):
        self.kicks += 1

    def at(self, iova, length):
        return self.region.view[iova - IOVA : iova - IOVA + length]

    def chain(self, head):
        """The descriptors of a request: address, length, flags."""
        address, length, flags, following = self.peer.descriptor(head)
        if flags & INDIRECT:
            table = self.at(address, length)
            entries = [struct.unpack_from("<QIHH", table, at) for at in range(0, length, 16)]
        else:
            entries = [(address, length, flags, following)]
            while flags & NEXT:
                address, length, flags, following = self.peer.descriptor(following)
                entries.append((address, length, flags, following))
        assert [bool(e[2] & NEXT) for e in entries] == [True] * (len(entries) - 1) + [False]
        return [(address, length, flags & ~NEXT) for address, length, flags, _ in entries]

    def arrivals(self):
        """Heads that were published since the last look."""
        heads = []
        while self.seen != self.peer.avail_idx:
            heads.append(self.peer.head(self.seen))
            self.seen = (self.seen + 1) & 0xFFFF
        return heads

    def answer(self, head, response, data=b""):
        """Complete a request as a device would."""
        chain = self.chain(head)
        writable = [(a, n) for a, n, flags in chain if flags & WRITE]
        status = writable[0] if self.layout.response_first else writable[-1]
        self.at(status[0], status[1])[: len(response)] = response
        for address, length in writable:
            if (address, length) != status:
                self.at(address, length)[: len(data)] = data[:length]
                data = data[length:]
        self.peer.use(head, 1)


READ = Template(bytes([0] * 16), direction=FROM_DEVICE, patches=[SECTOR])
WRITE_ = Template(bytes([1] + [0] * 15), direction=TO_DEVICE, patches=[SECTOR])


def constant(offsets, data):
    """A task that reads a sector at each offset, all into the same buffer."""
    return Task(READ, memoryview(offsets), 512, 512, mode=CONSTANT, base=data.offset)


@pytest.mark.parametrize("indirect", [True, False])
def test_a_read_is_header_data_status_in_that_order(indirect):
    """SPL-2."""
    bench = Bench(indirect=indirect)
    data = bench.pool.take(4096)
    assert bench.queue.submit(READ, 1024, 4096, data.offset, 7)
    assert bench.arrivals() == []
    bench.queue.kick()
    assert bench.kicks == 1
    (head,) = bench.arrivals()
    header, body, status = bench.chain(head)
    # type IN, reserved, sector 2
    assert bytes(bench.at(header[0], 16)) == b"\0\0\0\0" + b"\0\0\0\0" + b"\2\0\0\0\0\0\0\0"
    assert header[1:] == (16, 0)
    assert body == (IOVA + data.offset, 4096, WRITE)
    assert status[1:] == (1, WRITE)
    assert bytes(bench.at(status[0], 1)) == b"\xff"  # poisoned
    bench.answer(head, b"\0", b"x" * 4096)
    assert [tuple(f)[:3] for f in bench.queue.poll()] == [(7, 0, b"\0")]
    assert bytes(data.view()) == b"x" * 4096
    assert bench.queue.in_flight == 0


def test_a_scsi_read_has_its_response_before_the_data_and_a_write_after():
    """SPL-2; 5.6.6.1."""
    bench = Bench(layout=SCSI)
    data = bench.pool.take(512)
    for direction, want in (
        (FROM_DEVICE, [(51, 0), (108, WRITE), (512, WRITE)]),
        (TO_DEVICE, [(51, 0), (512, 0), (108, WRITE)]),
    ):
        template = Template(bytes(51), direction=direction)
        bench.queue.submit(template, 0, 512, data.offset, 0)
        bench.queue.kick()
        (head,) = bench.arrivals()
        assert [entry[1:] for entry in bench.chain(head)] == want
        bench.answer(head, bytes(12))
        assert len(bench.queue.poll()) == 1


def test_a_payload_is_a_descriptor_of_its_own_with_patches_in_it():
    bench = Bench()
    template = Template(
        b"\x0b" + bytes(15),
        payload=bytes(16),
        patches=[Patch(OFFSET, 16, 8, shift=9), Patch(NBYTES, 24, 4, shift=9)],
    )
    bench.queue.submit(template, 8192, 1 << 20, 0, 0)
    bench.queue.kick()
    header, payload, status = bench.chain(bench.arrivals()[0])
    assert (header[1], payload[1:], status[1:]) == (16, (16, 0), (1, WRITE))
    # sector 16, 2048 sectors, flags 0
    want = b"\x10\0\0\0\0\0\0\0" + b"\0\x08\0\0" + b"\0\0\0\0"
    assert bytes(bench.at(payload[0], 16)) == want


def test_patches_are_big_endian_where_they_say_so_and_tags_differ():
    bench = Bench(layout=SCSI)
    patches = [
        Patch(TAG, 8, 8),
        Patch(OFFSET, 21, 4, big_endian=True, shift=9),
        Patch(NBYTES, 26, 2, big_endian=True, shift=9),
    ]
    template = Template(bytes(51), direction=FROM_DEVICE, patches=patches)
    data = bench.pool.take(1024)
    tags = set()
    for _ in range(3):
        bench.queue.submit(template, 0x12345678 << 9, 1024, data.offset, 0)
        bench.queue.kick()
        (head,) = bench.arrivals()
        header = bytes(bench.at(bench.chain(head)[0][0], 51))
        assert header[21:28] == b"\x12\x34\x56\x78" + b"\0" + b"\0\x02"
        tags.add(header[8:16])
    assert len(tags) == 3


@pytest.mark.parametrize("indirect, slots", [(True, 8), (False, 2)])
def test_a_full_queue_says_no_and_loses_nothing(indirect, slots):
    bench = Bench(indirect=indirect)
    assert bench.queue.slots == slots
    data = bench.pool.take(512)
    sent = [bench.queue.submit(READ, 0, 512, data.offset, i) for i in range(slots + 3)]
    assert sent == [True] * slots + [False] * 3
    bench.queue.kick()
    for head in bench.arrivals():
        bench.answer(head, b"\0")
    assert sorted(f.token for f in bench.queue.poll()) == list(range(slots))
    assert bench.queue.submit(READ, 0, 512, data.offset, 0)


def test_a_queue_too_small_for_one_request_is_refused():
    with pytest.raises(RequestError, match="a queue of 2 descriptors has no room for a request"):
        queue_bytes(2, BLK, 1, False)
    with pytest.raises(RequestError, match="no room for a request of 10"):
        queue_bytes(8, BLK, 8, True)  # SPL-7: also inside an indirect table


@pytest.mark.parametrize("indirect", [True, False])
def test_data_is_cut_into_segments_and_too_many_are_refused(indirect):
    bench = Bench(16, indirect=indirect, segments=4, segment_bytes=1024)
    data = bench.pool.take(8192)
    bench.queue.submit(READ, 0, 3584, data.offset, 0)
    bench.queue.kick()
    body = bench.chain(bench.arrivals()[0])[1:-1]
    places = [IOVA + data.offset + at for at in (0, 1024, 2048, 3072)]
    lengths = [1024, 1024, 1024, 512]
    assert body == [(p, n, WRITE) for p, n in zip(places, lengths, strict=True)]
    with pytest.raises(RequestError, match="do not fit in 4 segments of 1024"):
        bench.queue.submit(READ, 0, 4608, data.offset, 0)
    assert bench.queue.in_flight == 1
    # The slot that refused is laid out anew for what fits.
    assert bench.queue.submit(READ, 0, 512, data.offset, 1)


def test_a_mapping_of_pages_gives_each_page_its_address():
    pages = array("Q", [IOVA + page * 4096 for page in range(512)])
    pages[300], pages[301] = 0xA000_0000, 0x5000_0000
    bench = Bench(table=Mapping(12, pages), segments=3)
    queue = bench.queue
    queue.submit(READ, 0, 8192, 300 * 4096, 0)
    queue.kick()
    (head,) = bench.arrivals()
    body = bench.chain(head)[1:-1]
    assert body == [(0xA000_0000, 4096, WRITE), (0x5000_0000, 4096, WRITE)]


def straddles(place, nbytes, shift):
    return place >> shift != (place + nbytes - 1) >> shift


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("layout", [BLK, SCSI], ids=["blk", "scsi"])
@pytest.mark.parametrize(
    "shift, size, segments",
    [(12, 4, 2), (12, 8, 1), (12, 64, 100), (12, 128, 1), (21, 4, 1), (21, 1024, 126), (21, 256, 300)],
)
def test_no_descriptor_straddles_two_pages(layout, shift, size, segments, indirect):
    """The device has pages in no order: what goes on past the end of one is somebody else's memory."""
    if not indirect:
        segments = min(segments, 5)
    segments = min(segments, size - 2, most_segments(layout, 1 << shift))
    region = Region(8 << 20)
    pool = Pool(region, 1 << shift)
    table = array("Q", [(1 << 40) - (page << shift + 1) for page in range(region.size >> shift)])
    pool.take(4096 * 3)
    if size > 128:
        pool.take((2 << 20) - 65536)  # a queue would begin shortly before the page's end
    nbytes = queue_bytes(size, layout, segments, indirect, page=1 << shift)
    memory = pool.take(nbytes)
    mapping = Mapping(shift, table)
    queue = RequestQueue(
        memory,
        region.view,
        mapping,
        size,
        layout,
        segments=segments,
        indirect=indirect,
        event_idx=False,
    )
    assert not straddles(memory.offset, split.areas(size)[2], shift), "the ring"
    page = 1 << shift
    ours = {iova: number * page for number, iova in enumerate(table)}
    data = pool.take((segments - 1) * 4096 if segments > 1 else 512)
    command = Template(bytes(layout.request), payload=bytes(layout.payload))
    peer = Peer(memory.view(), size)
    ring = [(0, 16 * size), (peer.available, 4 + 2 * size), (peer.used, 6 + 8 * size)]
    places = [(memory.offset + at, length) for at, length in ring]
    for slot in range(queue.slots):
        template, moved = (READ, data.nbytes) if slot % 2 else (command, 0)
        assert queue.submit(template, 0, moved, data.offset, slot)
        queue.kick()
        head = peer.head(slot)
        chain = [peer.descriptor(head)]
        if indirect:
            address, length, _, _ = chain[0]
            assert not straddles(address, length, shift), "the table"
            at = ours[address & -page] + (address & page - 1)
            assert memory.offset <= at <= memory.offset + nbytes - length
            chain = [struct.unpack_from("<QIHH", region.view, at + 16 * i) for i in range(length // 16)]
        else:
            while chain[-1][2] & NEXT:
                chain.append(peer.descriptor(chain[-1][3]))
        for address, length, _, _ in chain:
            assert not straddles(address, length, shift)
            at = ours[address & -page] + (address & page - 1)
            owner = memory if at >= memory.offset and at < memory.offset + nbytes else data
            assert owner.offset <= at <= owner.offset + owner.nbytes - length
            if owner is memory:
                places.append((at, length))
    places.sort()
    assert all(a + n <= b for (a, n), (b, _) in zip(places, places[1:], strict=False))
    region.close()


@pytest.mark.parametrize("indirect", [True, False])
def test_a_slot_used_again_points_at_the_new_data(indirect):
    """The descriptors stay; address, sector and poison are written anew."""
    bench = Bench(indirect=indirect)
    buffers = [bench.pool.take(512) for _ in range(5)]
    for i, data in enumerate(buffers):
        bench.queue.submit(READ, 512 * i, 512, data.offset, i)
        bench.queue.kick()
        (head,) = bench.arrivals()
        header, body, status = bench.chain(head)
        assert body == (IOVA + data.offset, 512, WRITE)
        assert bytes(bench.at(header[0], 16))[8:] == struct.pack("<Q", i)
        assert bytes(bench.at(status[0], 1)) == b"\xff"
        bench.answer(head, b"\0")
        assert bench.queue.poll()[0].result == 0


def test_a_status_that_was_not_written_is_no_success():
    bench = Bench()
    data = bench.pool.take(512)
    for _ in range(2):
        bench.queue.submit(READ, 0, 512, data.offset, 0)
        bench.queue.kick()
        (head,) = bench.arrivals()
        bench.peer.use(head, 513)  # nothing written but the used element
        assert bench.queue.poll()[0].result == 0xFF


@pytest.mark.parametrize("length", [0, 1, 513, 0xFFFFFFFF])
def test_the_used_length_decides_nothing(length):
    """SPL-14: success is the status byte."""
    bench = Bench()
    data = bench.pool.take(512)
    bench.queue.submit(READ, 0, 512, data.offset, 0)
    bench.queue.kick()
    (head,) = bench.arrivals()
    status = bench.chain(head)[-1]
    bench.at(status[0], 1)[0] = 0
    bench.peer.use(head, length)
    assert bench.queue.poll()[0].result == 0


def serve(bench, disk, stop, order=None):
    """A device in a thread: reads and writes a bytearray until told to stop."""
    while not stop.is_set():
        heads = bench.arrivals()
        if not heads:
            time.sleep(0)
            continue
        for head in order(heads) if order else heads:
            entries = bench.chain(head)
            header = bytes(bench.at(entries[0][0], 16))
            kind, sector = struct.unpack("<IxxxxQ", header)
            at = sector * 512
            for address, length, _ in entries[1:-1]:
                if at + length > len(disk):
                    pass  # an error, told in the status
                elif kind == 0:
                    bench.at(address, length)[:] = disk[at : at + length]
                elif kind == 1:
                    disk[at : at + length] = bench.at(address, length)
                at += length
            bench.at(entries[-1][0], 1)[0] = 1 if at > len(disk) else 0
            bench.peer.use(head, 1)


@pytest.fixture
def served():
    """Start a serving thread; it ends with the test."""
    stop, threads = threading.Event(), []

    def start(bench, disk, **how):
        thread = threading.Thread(target=serve, args=(bench, disk, stop), kwargs=how)
        thread.start()
        threads.append(thread)

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def abandon(queue):
    """As a lease does it whose caller has left."""
    kept = Kept(0, [])
    kept.count = queue.abandon_task(kept)


def finish(queue, task, seconds=20):
    faults = []
    end = time.monotonic() + seconds
    while (reason := queue.run(task, 1_000_000, 100_000)) != codes.DONE:
        assert time.monotonic() < end, f"still {reason}"
        if reason == codes.FAULT:
            for finished in queue.faults():
                task.fail(finished.token, errno.EIO)
                faults.append(finished)
        else:
            assert reason in (codes.TICK, codes.IDLE)
            time.sleep(0)
    return faults


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("mode", ["in place", "bounced"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_task_moves_every_item_to_its_place(served, indirect, mode, shuffle):
    bench = Bench(16, indirect=indirect)
    disk = bytearray(bytes(range(256)) * 1024)
    served(bench, disk, order=reversed if shuffle else None)
    offsets = array("Q", [(i * 37 % 200) * 1024 for i in range(100)])
    data = bench.pool.take(100 * 1024)
    user = bytearray(100 * 1024)
    if mode == "in place":
        task = Task(READ, memoryview(offsets), 1024, 512, base=data.offset)
    else:
        bounce = dict(mode=BOUNCED, base=data.offset, user=memoryview(user), cells=3)
        task = Task(READ, memoryview(offsets), 1024, 512, **bounce)
    assert finish(bench.queue, task) == []
    got = bytes(data.view()) if mode == "in place" else bytes(user)
    assert got == b"".join(bytes(disk[o : o + 1024]) for o in offsets)
    assert list(task.status) == [0] * 100
    assert bench.queue.in_flight == 0

    into = bytes(reversed(got))
    data.view()[:] = into
    user[:] = into
    where = array("Q", [i * 1024 for i in range(100)])
    if mode == "in place":
        task = Task(WRITE_, memoryview(where), 1024, 1024, base=data.offset)
    else:
        data.view()[:] = bytes(len(data))
        bounce = dict(mode=BOUNCED, base=data.offset, user=memoryview(user), cells=5)
        task = Task(WRITE_, memoryview(where), 1024, 1024, **bounce)
    assert finish(bench.queue, task) == []
    assert bytes(disk[: 100 * 1024]) == into


def test_the_last_part_of_an_item_may_be_shorter(served):
    bench = Bench(16)
    disk = bytearray(bytes(range(256)) * 64)
    served(bench, disk)
    data = bench.pool.take(5120)
    task = Task(READ, memoryview(array("Q", [512])), 5120, 2048, base=data.offset)
    assert task.total == 3
    finish(bench.queue, task)
    assert bytes(data.view()) == bytes(disk[512 : 512 + 5120])


def test_a_failed_part_fails_its_item_with_the_first_error_by_position(served):
    bench = Bench(16)
    disk = bytearray(4096)
    served(bench, disk, order=reversed)
    offsets = array("Q", [0, 3584, 1024])
    data = bench.pool.take(3 * 1536)
    task = Task(READ, memoryview(offsets), 1536, 512, base=data.offset)
    faults = finish(bench.queue, task)
    assert sorted(f.token for f in faults) == [4, 5]  # the parts of item 1 that are past the end
    assert list(task.status) == [0, -errno.EIO, 0]
    assert task.offset(4) == 4096


def test_no_more_than_depth_parts_are_in_flight():
    bench = Bench(16)
    data = bench.pool.take(512 * 10)
    task = Task(READ, memoryview(array("Q", range(0, 5120, 512))), 512, 512, base=data.offset, depth=4)
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    assert task.active == 4 and len(bench.arrivals()) == 4


def test_constant_data_is_read_again_and_again(served):
    bench = Bench(16)
    disk = bytearray(b"\xee" * 8192)
    served(bench, disk)
    zeros = bench.pool.take(512)
    zeros.view()[:] = bytes(512)
    task = Task(
        WRITE_,
        memoryview(array("Q", [512])),
        4096,
        512,
        mode=CONSTANT,
        base=zeros.offset,
    )
    finish(bench.queue, task)
    assert bytes(disk) == b"\xee" * 512 + bytes(4096) + b"\xee" * 3584


def test_abandoned_requests_keep_their_slots_until_the_device_returns_them():
    """CLN-2."""
    bench = Bench(4)
    data = bench.pool.take(512)
    task = constant(array("Q", [0, 512]), data)
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    abandon(bench.queue)
    assert bench.queue.orphans == 2 and bench.queue.in_flight == 2
    heads = bench.arrivals()
    before = [bench.chain(head) for head in heads]
    other = Task(READ, memoryview(array("Q", range(0, 2048, 512))), 512, 512, mode=CONSTANT, base=data.offset)
    assert bench.queue.run(other, 1000, 0) == codes.IDLE
    assert other.active == 2  # the other two slots are not to be had
    assert [bench.chain(head) for head in heads] == before  # CLN-1
    for head in heads:
        bench.answer(head, b"\0")
    assert bench.queue.run(other, 1000, 0) == codes.IDLE
    assert other.active == 2 and bench.queue.sweep() and not bench.queue.sweep()
    assert bench.queue.run(other, 1000, 0) == codes.IDLE
    assert bench.queue.orphans == 0 and other.active == 4 and other.finished == 0


@contextlib.contextmanager
def interrupted_at(step):
    """A Ctrl-C after so many instructions of interpreted code in virtio.ring."""
    left = [step]

    def trace(frame, event, argument):
        if "/virtio/ring/" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    gc.disable()  # what an earlier test left has finalizers of virtio.ring, in which it would be lost
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


@pytest.mark.parametrize("form", [SPLIT, PACKED])
def test_a_ctrl_c_comes_between_calls_and_never_amid_one(form):
    step = 1
    while True:
        bench = Bench(4, form=form)
        task = constant(array("Q", [0, 512]), bench.pool.take(512))
        with contextlib.suppress(KeyboardInterrupt), interrupted_at(step):
            bench.queue.run(task, 1000, 0)
            break
        assert (task.active, bench.kicks) in ((0, 0), (2, 1))
        assert bench.queue.in_flight == task.active
        step += 23
    assert (step > 500) == INTERPRETED


def test_a_device_that_sleeps_is_notified_once_and_one_at_work_sees_the_first_ones_early():
    bench = Bench(64)
    task = constant(array("Q", [0] * 256), bench.pool.take(512))

    def run():
        """One slice: how many requests the device sees, and how often it was notified of them."""
        before = bench.kicks
        assert bench.queue.run(task, 1000, 0) in (codes.IDLE, codes.TICK)
        heads = bench.arrivals()
        for head in heads:
            bench.answer(head, b"\0", bytes(512))
        return len(heads), bench.kicks - before

    assert run() == (64, 1)
    assert run() == (64, 1)
    bench.peer.set_used_flags(1)  # VIRTQ_USED_F_NO_NOTIFY (2.7.14)
    assert run() == (64, 0)
    bench.peer.set_used_flags(0)  # and asleep again: known when the first 16 are published
    assert run() == (64, 2)


class Counted:
    """What is kept for a request, as a buffer is."""

    def __init__(self):
        self.held = 1

    def let_go(self):
        self.held -= 1


def test_single_requests_of_several_owners_are_kept_apart_and_in_order(served):
    bench = Bench(16)
    data = bench.pool.take(4096)
    kept = [Counted() for _ in range(9)]
    for token in range(9):
        assert bench.queue.submit(READ, 0, 512, data.offset, token, token % 3, kept[token])
    bench.queue.kick()
    served(bench, bytearray(4096))
    deadline = time.monotonic() + 5
    while bench.queue.in_flight:
        assert time.monotonic() < deadline
        bench.queue.look()
    assert [f.token for f in bench.queue.poll(2, 1)] == [1, 4]
    assert [f.token for f in bench.queue.poll(9, 2)] == [2, 5, 8]
    assert [f.token for f in bench.queue.poll(9, 1)] == [7]
    assert [one.held for one in kept] == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert bench.queue.abandon(0) == 3  # all of them are back
    assert bench.queue.orphans == 0
    assert [one.held for one in kept] == [0] * 9 and bench.queue.poll(9, 0) == []


def test_a_forsaken_request_keeps_what_it_uses_until_it_is_back():
    """CLN-1, CLN-2."""
    bench = Bench(4)
    data = bench.pool.take(2048)
    kept = [Counted() for _ in range(3)]
    for token, template in enumerate((READ, WRITE_, READ)):
        bench.queue.submit(template, 512 * token, 512, data.offset + 512 * token, token, 7, kept[token])
    bench.queue.kick()
    heads = bench.arrivals()
    assert not bench.queue.forsake(8, 1) and not bench.queue.forsake(7, 3)
    assert bench.queue.forsake(7, 1) and not bench.queue.forsake(7, 1)
    assert bench.queue.forsake(7, 0)
    assert (bench.queue.orphans, bench.queue.orphan_changes) == (2, 1)
    assert bench.queue.overlaps_orphan(0, 513) and bench.queue.overlaps_orphan(1023, 512)
    assert not bench.queue.overlaps_orphan(0, 512) and not bench.queue.overlaps_orphan(1024, 512)
    for head in heads[:2]:
        bench.answer(head, b"\0")
    bench.queue.look()
    assert [one.held for one in kept] == [1, 1, 1]
    assert bench.queue.sweep() and (bench.queue.orphans, bench.queue.orphan_changes) == (0, 0)
    assert [one.held for one in kept] == [0, 0, 1]
    assert not bench.queue.overlaps_orphan(0, 2048)
    bench.answer(heads[2], b"\0")
    assert [f.token for f in bench.queue.poll(9, 7)] == [2] and kept[2].held == 0


def test_what_a_dead_device_keeps_is_let_go_of():
    bench = Bench(4)
    data = bench.pool.take(512)
    kept = Counted()
    bench.queue.submit(READ, 0, 512, data.offset, 1, 5, kept)
    bench.queue.kick()
    assert bench.queue.abandon(5) == 1 and kept.held == 1
    bench.queue.detach()
    bench.queue.forget()
    assert kept.held == 0


def test_requests_one_by_one_survive_a_task_in_between(served):
    bench = Bench(16)
    data = bench.pool.take(4096)
    for token in (1, 2, 3):
        bench.queue.submit(READ, 0, 512, data.offset, token)
    bench.queue.kick()
    served(bench, bytearray(4096))
    task = constant(array("Q", [0] * 50), data)
    finish(bench.queue, task)
    got = bench.queue.poll(2)
    got += bench.queue.poll(2)
    assert [f.token for f in got] == [1, 2, 3]


@pytest.mark.parametrize("bad", [8, 3, 0xFFFFFFFF])
def test_a_device_that_breaks_the_ring_stops_the_task(bad):
    bench = Bench(8)
    data = bench.pool.take(512)
    task = Task(READ, memoryview(array("Q", [0])), 512, 512, base=data.offset)
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    bench.peer.use(bad)
    assert bench.queue.run(task, 1000, 0) == codes.BROKEN
    assert bench.queue.broken and list(task.status) == [-errno.EINPROGRESS]


def test_stop_brings_a_spinning_task_back_from_any_thread():
    bench = Bench(8)
    data = bench.pool.take(512)
    task = Task(READ, memoryview(array("Q", [0])), 512, 512, base=data.offset)
    reasons = []
    thread = threading.Thread(
        target=lambda: reasons.append(bench.queue.run(task, 1 << 62, 1 << 62)), daemon=True
    )
    thread.start()
    while not bench.peer.avail_idx:
        time.sleep(0)
    bench.queue.stop()
    thread.join(5)
    assert reasons == [codes.LOST] and bench.queue.stopped


def test_a_spin_ends_at_its_slice():
    bench = Bench(8)
    data = bench.pool.take(512)
    task = Task(READ, memoryview(array("Q", [0])), 512, 512, base=data.offset)
    assert bench.queue.run(task, 1_000_000, 1 << 62) == codes.TICK


def test_after_detach_nothing_is_sent_and_no_memory_is_touched():
    bench = Bench(8)
    data = bench.pool.take(512)
    task = Task(READ, memoryview(array("Q", [0])), 512, 512, base=data.offset)
    bench.queue.detach()
    before = bytes(bench.region.view)
    assert bench.queue.run(task, 1000, 0) == codes.LOST
    assert not bench.queue.submit(READ, 0, 512, data.offset, 0)
    bench.queue.kick()
    bench.queue.arm()
    assert bench.queue.poll() == [] and task.started == 0
    assert bytes(bench.region.view) == before


@pytest.mark.parametrize("case", ["used", "answered, then reset", "a bad head"])
def test_a_poll_after_detach_finds_nothing_whatever_was_there_before(case):
    bench = Bench(8)
    data = bench.pool.take(512)
    bench.queue.submit(READ, 0, 512, data.offset, 0)
    bench.queue.kick()
    (head,) = bench.arrivals()
    if case == "a bad head":
        bench.peer.use(9999, 1)
    else:
        bench.answer(head, b"\0")
    if case == "answered, then reset":
        bench.queue.rewind()
    else:
        bench.queue.poll()
    broken = bench.queue.broken
    assert broken == (case == "a bad head")
    bench.queue.detach()
    assert (bench.queue.poll(), bench.queue.broken) == ([], broken)


def test_many_more_requests_than_the_16_bit_index_holds(served):
    bench = Bench(64, event_idx=True)
    disk = bytearray(512)
    served(bench, disk)
    data = bench.pool.take(512)
    task = Task(READ, memoryview(array("Q", bytes(8 * 70_000))), 512, 512, mode=CONSTANT, base=data.offset)
    finish(bench.queue, task, seconds=100)
    assert task.finished == 70_000 and not any(task.status)


def test_data_of_a_fixed_length_does_not_follow_the_range():
    """WRITE SAME: one block of data for any number of blocks."""
    bench = Bench(layout=SCSI)
    patch = Patch(NBYTES, 29, 4, big_endian=True, shift=9)
    template = Template(bytes(51), direction=TO_DEVICE, data_bytes=512, patches=[patch])
    zeros = bench.pool.take(512)
    for nbytes in (1 << 20, 1 << 20, 512):
        bench.queue.submit(template, 0, nbytes, zeros.offset, 0)
        bench.queue.kick()
        (head,) = bench.arrivals()
        header, body, _ = bench.chain(head)
        assert body == (IOVA + zeros.offset, 512, 0)
        assert bytes(bench.at(header[0] + 29, 4)) == (nbytes >> 9).to_bytes(4, "big")
        bench.answer(head, bytes(12))
        assert len(bench.queue.poll()) == 1


def test_a_part_sent_again_takes_its_place_and_no_other_is_lost():
    bench = Bench(8)
    data = bench.pool.take(512 * 20)
    task = Task(READ, memoryview(array("Q", range(0, 512 * 20, 512))), 512, 512, base=data.offset)
    failed: set[int] = set()
    while bench.queue.run(task, 1000, 0) in (codes.IDLE, codes.FAULT):
        for finished in bench.queue.faults():
            assert finished.token not in failed
            failed.add(finished.token)
            if finished.token == 18:
                task.succeed(finished.token)  # whoever knows the device says that it is none
                data.view()[512 * 18] = 18
            else:
                task.again(finished.token)
        for head in bench.arrivals():
            header, body, _ = bench.chain(head)
            (sector,) = struct.unpack_from("<Q", bench.at(header[0], 16), 8)
            assert body[0] == IOVA + data.offset + 512 * sector
            good = sector in failed or sector % 3
            bench.answer(head, b"\0" if good else b"\1", bytes([sector]) * 512)
    assert failed == {0, 3, 6, 9, 12, 15, 18}
    assert list(task.status) == [0] * 20 and task.active == 0
    assert bytes(data.view()[::512]) == bytes(range(20))


def test_what_was_read_with_trouble_is_there_all_the_same():
    """And is counted, its bytes too: the last part is shorter."""
    bench = Bench(4)
    cells = bench.pool.take(2048)
    user, stats = bytearray(3 * 512), Stats()
    task = Task(
        READ,
        memoryview(array("Q", [0])),
        3 * 512,
        1024,
        mode=BOUNCED,
        base=cells.offset,
        user=memoryview(user),
        cells=2,
        stats=stats,
    )
    bench.queue.run(task, 1000, 0)
    for head, byte in zip(bench.arrivals(), b"ab", strict=True):
        bench.answer(head, b"\1", bytes([byte]) * 1024)
    assert bench.queue.run(task, 1000, 0) == codes.FAULT
    for finished in bench.queue.faults():
        task.succeed(finished.token, finished.began)
    assert bench.queue.run(task, 1000, 0) == codes.DONE
    assert list(task.status) == [0]
    assert user == b"a" * 1024 + b"b" * 512
    assert stats.counts(READ_KIND)[:2] == (2, 3 * 512)


def test_bits_outside_the_mask_decide_nothing():
    """A target may leave the status qualifier of a good response unwritten."""
    bench = Bench(layout=SCSI)
    template = Template(bytes(51))
    # sense length 4, residual 4, qualifier 2, status, response
    responses = {
        b"\0\0\0\0" + b"\0\0\0\0" + b"\xff\xff" + b"\0" + b"\0": 0,
        b"\0\0\0\0" + b"\1\0\0\0" + b"\xff\xff" + b"\0" + b"\0": 1,
        b"\0\0\0\0" + b"\0\0\0\0" + b"\xff\xff" + b"\2" + b"\0": 2 << 48,
        b"\0\0\0\0" + b"\xff\xff\xff\xff" + b"\xff\xff" + b"\xff" + b"\xff": SCSI_MASK,
    }
    for response, result in responses.items():
        bench.queue.submit(template, 0, 0, 0, 0)
        bench.queue.kick()
        bench.answer(bench.arrivals()[0], response)
        assert [f.result for f in bench.queue.poll()] == [result]


def test_what_was_back_when_the_device_was_reset_is_not_slept_through():
    bench = Bench(4)
    data = bench.pool.take(1024)
    for token in range(2):
        bench.queue.submit(READ, 0, 512, data.offset, token, 3)
    bench.queue.kick()
    bench.answer(bench.arrivals()[1], b"\0")
    bench.queue.rewind()
    assert not bench.queue.arm()
    assert [f.token for f in bench.queue.poll(9, 3)] == [1]
    assert bench.queue.arm() and bench.queue.in_flight == 1  # the other is with the device again


def test_what_was_back_before_resets_is_handed_out_oldest_first():
    bench = Bench(8)
    data = bench.pool.take(512)
    for token in range(6):
        bench.queue.submit(READ, 0, 512, data.offset, token, 3)
    bench.queue.kick()
    heads = bench.arrivals()
    for first in (0, 3):  # twice, without a poll in between
        for head in heads[first : first + 2]:
            bench.answer(head, b"\0")
        bench.queue.rewind()
        bench.seen = bench.peer.used_idx = 0
        bench.queue.kick()
    assert [f.token for f in bench.queue.poll(9, 3)] == [0, 1, 3, 4]


# Where a request's parts are.


def spans(bench, head):
    """Of a request's header, of what is between, and of its response: places in the queue's memory."""
    start = IOVA + bench.memory.offset
    header, *between, response = (
        range(address - start, address - start + length) for address, length, _ in bench.chain(head)
    )
    return header, between, response


def lines(span):
    """The cache lines that it touches."""
    return {byte // 64 for byte in span}


def apart(spans):
    every = [byte for span in spans for byte in span]
    return len(every) == len(set(every))


def halves(bench):
    """The two halves of a split ring."""
    peer = bench.peer
    return [
        range(peer.available, peer.available + 4 + 2 * peer.size + 2 * bench.queue.ring.event_idx),
        range(peer.used, peer.used + 6 + 8 * peer.size),  # a device might write avail_event in any case
    ]


@pytest.mark.parametrize("size, beside", [(4, 3), (8, 0)])
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_request_on_a_small_ring_is_one_cache_line_each_way(size, beside, event_idx):
    """SPL-1: the header in that of the available ring, the status in that of the used one; and in no area."""
    bench = Bench(size, event_idx=event_idx)
    data = bench.pool.take(512)
    for token in range(size):
        assert bench.queue.submit(READ, 0, 512, data.offset, token)
    bench.queue.kick()
    available, used = halves(bench)
    found = [spans(bench, head) for head in bench.arrivals()]
    for header, _, status in found[:beside]:
        assert lines(header) == lines(available) and lines(status) == lines(used)
    ring_end = split.areas(size)[2] // 64
    for header, _, status in found[beside:]:
        assert lines(header) == lines(status) and len(lines(header)) == 1 and min(lines(header)) >= ring_end
    own = [lines(header) for header, _, _ in found[beside:]]
    assert apart(own)
    parts = [span for header, _, status in found for span in (header, status)]
    assert len(found) == size and apart([range(16 * size), available, used, *parts])


@pytest.mark.parametrize("event_idx", [False, True])
def test_as_many_in_flight_as_a_small_ring_has_keep_apart_many_times_round(event_idx):
    """SPL-1: from each other, and from what either side writes of the ring."""
    bench = Bench(4, event_idx=event_idx)
    chance = random.Random(1)
    data = bench.pool.take(4 * 512)
    for turn in range(50):
        sectors = chance.sample(range(1 << 40), 4)
        for token, sector in enumerate(sectors):
            assert bench.queue.submit(READ, sector * 512, 512, data.offset + 512 * token, token)
        assert not bench.queue.submit(READ, 0, 512, data.offset, 4)
        for at in range(4):  # that are on the ring, unseen: each has had a status of 0 before
            (status,) = spans(bench, bench.peer.head(bench.seen + at))[2]
            assert bench.memory.view()[status] == 0xFF, turn
        assert bench.arrivals() == []
        bench.queue.kick()
        bench.queue.arm()  # which writes used_event, or flags, before the headers
        bench.peer.set_used_flags(0)
        bench.peer.set_avail_event(bench.peer.avail_idx)  # before the statuses
        heads = bench.arrivals()
        assert len(heads) == 4
        for head in chance.sample(heads, 4):
            header, body, _ = bench.chain(head)
            token = (body[0] - IOVA - data.offset) // 512
            # type IN, reserved, sector
            want = b"\0\0\0\0" + b"\0\0\0\0" + struct.pack("<Q", sectors[token])
            assert bytes(bench.at(header[0], 16)) == want
            bench.answer(head, b"\0", struct.pack("<Q", sectors[token]) * 64)
        bench.peer.set_avail_event(0xA5A5)  # whatever the device likes
        finished = bench.queue.poll()
        assert sorted((f.token, f.result) for f in finished) == [(token, 0) for token in range(4)]
        assert bytes(data.view()) == b"".join(struct.pack("<Q", sector) * 64 for sector in sectors)
    assert bench.peer.avail_idx == 200


def test_each_status_beside_a_small_ring_is_that_of_its_own_request():
    bench = Bench(4)
    data = bench.pool.take(512)
    for turn in range(8):
        for token in range(4):
            bench.queue.submit(READ, 0, 512, data.offset, token)
        bench.queue.kick()
        heads = bench.arrivals()
        bench.answer(heads[turn % 4], b"\1")
        bench.peer.use(heads[(turn + 1) % 4], 513)  # without a status
        for step in (2, 3):
            bench.answer(heads[(turn + step) % 4], b"\0")
        results = {f.token: (f.result, f.response) for f in bench.queue.poll()}
        first = turn % 4
        want = [(1, b"\1"), (0xFF, b"\xff"), (0, b"\0"), (0, b"\0")]
        assert results == {(first + step) % 4: want[step] for step in range(4)}


@pytest.mark.parametrize("size", [4, 8])
def test_what_a_device_had_when_it_was_reset_is_sent_again_as_it_was(size):
    """CLN-2: header and descriptors as they were, the status poisoned anew."""
    bench = Bench(size)
    data = bench.pool.take(512 * size)
    for token in range(size):
        template = WRITE_ if token % 2 else READ
        bench.queue.submit(template, 512 * (token + 5), 512, data.offset + 512 * token, token, 3)
    bench.queue.kick()
    heads = bench.arrivals()
    sent = {head: (bench.chain(head), bytes(bench.at(bench.chain(head)[0][0], 16))) for head in heads}
    bench.answer(heads[1], b"\0")  # and is found to be back in spite of the reset
    for head in heads[2:]:
        bench.at(bench.chain(head)[-1][0], 1)[0] = 0  # a status that came too late to be told of
    bench.queue.rewind()
    bench.seen = bench.peer.used_idx = 0
    bench.queue.kick()
    again = bench.arrivals()
    assert sorted(again) == sorted(head for head in heads if head != heads[1])
    for head in again:
        chain, header = sent[head]
        assert bench.chain(head) == chain and bytes(bench.at(chain[0][0], 16)) == header
        assert bytes(bench.at(chain[-1][0], 1)) == b"\xff"
        bench.answer(head, b"\0")
    finished = bench.queue.poll(owner=3)
    assert sorted((f.token, f.result) for f in finished) == [(token, 0) for token in range(size)]


@pytest.mark.parametrize(
    "size, layout, form, event_idx",
    [
        *(
            (size, layout, PACKED, event_idx)
            for size in (4, 8)
            for layout in (BLK, SCSI)
            for event_idx in (0, 1)
        ),
        *((8, layout, SPLIT, False) for layout in (BLK, SCSI, dialogue.LAYOUT, WIDE)),
        *((4, layout, SPLIT, True) for layout in (SCSI, dialogue.LAYOUT)),  # by two bytes
    ],
)
def test_beside_a_ring_without_room_for_both_parts_there_is_neither(size, layout, form, event_idx):
    bench = Bench(size, layout=layout, form=form, event_idx=bool(event_idx))
    for token in range(size):
        assert bench.queue.submit(Template(bytes(layout.request)), 0, 0, 0, token)
    ring_end = form.areas(size)[2]
    assert ring_end % 64 == 0
    for slot in range(size):
        # A descriptor of either form begins with address and length: here those of a table.
        address, length = struct.unpack_from("<QI", bench.memory.view(), 16 * slot)
        table = bench.at(address, length)
        for at in range(0, length, 16):
            (place,) = struct.unpack_from("<Q", table, at)
            assert place - IOVA - bench.memory.offset >= ring_end


@pytest.mark.parametrize("form", [SPLIT, LEGACY])
def test_a_ring_of_direct_descriptors_has_a_request_beside_it_too(form):
    """One on a ring of four, whose three descriptors are no part of a line that the device writes."""
    bench = Bench(4, indirect=False, form=form)
    available, used, _ = form.areas(4)
    data = bench.pool.take(512)
    for sector in range(9):
        bench.queue.submit(READ, 512 * sector, 512, data.offset, sector)
        bench.queue.kick()
        (header, _, (status,)) = spans(bench, 0)
        assert lines(header) == {available // 64} and status // 64 == used // 64
        assert header.start >= available + 14 and status >= used + 38
        assert bytes(bench.memory.view()[header.start : header.stop]) == bytes(8) + struct.pack("<Q", sector)
        assert bench.memory.view()[status] == 0xFF
        bench.memory.view()[status] = 0
        bench.peer.used = used
        bench.peer.use(0, 513)
        assert [(f.token, f.result) for f in bench.queue.poll()] == [(sector, 0)]


@pytest.mark.parametrize("layout", [SCSI, dialogue.LAYOUT], ids=["bare", "with a payload"])
@pytest.mark.parametrize("size, indirect", [(4, True), (8, True), (64, True), (64, False)])
def test_a_scsi_result_is_aligned_in_the_cache_line_of_its_header(layout, size, indirect):
    bench = Bench(size, layout=layout, indirect=indirect)
    for token in range(bench.queue.slots):
        assert bench.queue.submit(Template(bytes(layout.request)), 0, 0, 0, token)
    bench.queue.kick()
    seen = []
    for number, head in enumerate(bench.arrivals()):
        header, _, response = spans(bench, head)
        result = response[layout.result_offset : layout.result_offset + 8]
        assert result.start % 8 == 0 and len(lines(header)) == 1
        if size == 4 and number == 0:  # without EVENT_IDX there is room for one, each part beside its ring
            available, used = halves(bench)
            assert lines(header) == lines(available) and lines(result) == lines(used)
            seen += [available, used]
        else:
            assert lines(header) == lines(result)
        assert bytes(bench.memory.view()[result.start : result.stop]) == b"\xff" * 8  # poisoned
        seen += [header, response]
    assert len(seen) >= 2 * bench.queue.slots and apart(seen)


@pytest.mark.parametrize("layout", [BLK, dialogue.LAYOUT], ids=["blk", "scsi"])
@pytest.mark.parametrize("size, indirect", [(4, True), (8, True), (64, False)])
def test_a_payload_is_apart_from_header_response_and_table(layout, size, indirect):
    bench = Bench(size, layout=layout, indirect=indirect)
    slots = bench.queue.slots
    for token in range(slots):
        template = Template(
            bytes([token]) * layout.request,
            payload=bytes([0x80 + token]) * layout.payload,
            patches=[Patch(OFFSET, layout.request, 8, shift=9)],
        )
        assert bench.queue.submit(template, token << 9, 512, 0, token)
    bench.queue.kick()
    heads = bench.arrivals()
    chains = [bench.chain(head) for head in heads]
    assert [[length for _, length, _ in chain] for chain in chains] == [
        [layout.request, layout.payload, layout.response]
    ] * slots
    parts = [range(address, address + length) for chain in chains for address, length, _ in chain]
    parts += [
        range(IOVA + bench.memory.offset + half.start, IOVA + bench.memory.offset + half.stop)
        for half in (range(16 * size), *halves(bench))
    ]
    if indirect:
        tables = [bench.peer.descriptor(head)[:2] for head in heads]
        parts += [range(address, address + length) for address, length in tables]
    assert apart(parts)
    for head, chain in zip(heads, chains, strict=True):  # the device writes as much as it may
        bench.at(chain[-1][0], layout.response)[:] = b"\xaa" * layout.response
        bench.peer.use(head, layout.response)
    for token, (header, payload, _) in enumerate(chains):
        assert bytes(bench.at(*header[:2])) == bytes([token]) * layout.request
        want = struct.pack("<Q", token) + bytes([0x80 + token]) * (layout.payload - 8)
        assert bytes(bench.at(*payload[:2])) == want
    assert [f.response for f in bench.queue.poll()] == [b"\xaa" * layout.response] * slots
