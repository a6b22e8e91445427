"""The request queue: fixed slots over one virtqueue, filled from templates, no Python per request.

A *slot* is room for one request in flight. Its shared half holds the request header, the response
and, with indirect descriptors, the table; its private half (64 bytes) records what was asked. Slot
`s` always uses the same descriptors, so most of a request is written once and stays. Beside a ring so
small that each half of it leaves room in its cache line, headers and responses are in these lines: a
request is then two lines that pass between two cores, one each way.

A *template* is one operation on one disk: the header's bytes and how to patch offset, length and
tag into them. A *task* is many requests of one template, run without the GIL.

The module is long because the loop and all that it does with slots are one compiled unit: what it
touches of a template or a task is a field in C, not a call.

The result field is poisoned before each submit: a device that completes a request without writing
a status must not find an old success there.
"""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

import cython

from virtio.errors import RequestError
from virtio.ring.format import SPLIT, RingFormat
from virtio.ring.stats import WRITE
from virtio.ring.task import BOUNCED, CONSTANT, LOADED
from virtio.ring.template import FROM_DEVICE, NBYTES, NO_DATA, OFFSET, TO_DEVICE

if not cython.compiled:
    from virtio.ring._mem import (
        copy,
        fill,
        load_acquire_u32,
        load_u8,
        load_u16,
        load_u32,
        load_u64,
        null,
        store_field,
        store_release_u32,
        store_u8,
        store_u16,
        store_u32,
        store_u64,
        window,
    )
    from virtio.ring._os import make_whole, now_ns, relax, sleep_on, ticks
    from virtio.ring.doorbell import Doorbell
    from virtio.ring.task import Task
    from virtio.ring.template import Template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.ring.buffer import Buffer
    from virtio.ring.region import Mapping

# Why `run` came back.
DONE, TICK, IDLE, FAULT, BROKEN, LOST, UNFIT, PAUSED = 0, 1, 2, 3, 4, 5, 6, 7

_NO_DATA, _TO_DEVICE, _FROM_DEVICE = NO_DATA, TO_DEVICE, FROM_DEVICE
_WRITES = WRITE
_OFFSET, _NBYTES = OFFSET, NBYTES
_CONSTANT, _BOUNCED, _LOADED = CONSTANT, BOUNCED, LOADED
_DONE, _TICK, _IDLE, _FAULT, _BROKEN, _LOST, _UNFIT, _PAUSED = 0, 1, 2, 3, 4, 5, 6, 7
_STOP, _PAUSE = 1, 2  # why a `run` is to come back
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NOTHING, _RING_BROKEN = -1, -2
_FULL, _MISFIT = -1, -2

# A slot's private record, and the states it goes through.
_RECORD = 64
_STATE, _KEY, _LENGTH, _OFF, _DATA, _TOKEN, _RESULT, _TIME = 0, 4, 8, 16, 24, 32, 40, 48
_OWNER, _CHANGES, _KIND = 56, 60, 62  # whose single request it is; whether it changes the disk; for Stats
_FREE, _TASK, _SINGLE, _ENDED, _AWAITED = 0, 1, 2, 3, 4
_NOBODY = 0xFFFFFFFF  # the owner of an orphan

_PATCH = 10  # a packed patch: source, offset, width, big-endian, shift; 16 bits each
_CLOCK_EVERY = 64  # spins between two looks at the clock
# Spins before the first one that relaxes, some microseconds: a fast target answers sooner, and a look that
# comes 40 to 140 cycles late costs more than it saves. Interpreted, to relax is to let others run.
_EAGER = 1000 if cython.compiled else 64
_QUIET = 16  # looks that found nothing: what the device had ready is all here
_LINE = 64  # bytes of a cache line
_MOMENT = 3000  # ns of spinning in any case, where several answers are due: to sleep takes as long
_ROUNDS = 8  # rounds that moved something: each may copy megabytes

ONE_PAGE = 1 << 62  # more than there is: memory in one piece for the device


class Layout(NamedTuple):
    """What the requests of one kind of device look like in memory; sizes in bytes.

    The result is one byte, or eight where the mask is wider than one, at `result_offset` of the
    response, little-endian; all went well when the bits of `result_mask` in it are 0.
    `response_first`: the response comes before the data read (virtio-scsi, 5.6.6.1), not after it
    (virtio-blk, 5.2.6).
    """

    request: int
    payload: int
    response: int
    result_offset: int
    result_mask: int
    response_first: bool

    @property
    def result_bytes(self) -> int:
        """How wide the result is."""
        return 8 if self.result_mask > 0xFF else 1


class Finished(NamedTuple):
    """A request that came back: its token (or part), its result field, its response; its submit's tick."""

    token: int
    result: int
    response: bytes
    began: int = 0


class Kept:
    """What `count` orphans still use, for the last of them to let go of: buffers, and any object."""

    def __init__(self, count: int, buffers: Sequence[Buffer], used: object = None) -> None:
        self.count, self._buffers, self._used = count, buffers, used

    def let_go(self) -> None:
        """One of them is back."""
        self.count -= 1
        if not self.count:
            self._used = None
            for buffer in self._buffers:
                buffer.let_go()


def queue_bytes(
    size: int,
    layout: Layout,
    segments: int,
    indirect: bool,
    *,
    form: RingFormat = SPLIT,
    page: int = ONE_PAGE,
) -> int:
    """How much shared memory a request queue of `size` descriptors takes.

    Where the device has it in pages of `page` bytes, as a `Pool` of such pages lends it.
    """
    first, stride, slots = _shape(size, layout, segments, indirect, form, page)
    return first + stride * slots


def most_segments(layout: Layout, page: int) -> int:
    """How many data segments a request may have so that its slot fits in a page."""
    table = _slot(layout).table
    return max(0, min((page - table) // 16 - 2, 1 << 16))


def _up(value: int, align: int) -> int:
    return (value + align - 1) & ~(align - 1)


class _Slot(NamedTuple):
    """Where the parts of a slot are, behind its header; in bytes."""

    response: int
    payload: int
    table: int


def _slot(layout: Layout) -> _Slot:
    # The result is in the header's cache line if there is room, whatever comes after it in the response:
    # a line less to be passed back and forth. One of 8 bytes is aligned.
    width = layout.result_offset + layout.result_bytes
    response = layout.request + -(layout.request + width) % layout.result_bytes
    if response + width > _LINE:
        response = _up(layout.request, _LINE) + -width % layout.result_bytes
    payload = _up(response + layout.response, 8)
    return _Slot(response, payload, _up(payload + layout.payload, _LINE))


def _shape(
    size: int, layout: Layout, segments: int, indirect: bool, form: RingFormat, page: int
) -> tuple[int, int, int]:
    """Where the slots begin, the bytes of one, and their number.

    A descriptor covers memory in one piece: in pages, no slot straddles two.
    """
    table = _slot(layout).table
    stride = _up(table + (2 + segments) * 16, _LINE) if indirect else table
    first = form.areas(size)[2]
    for _, response in _beside(size, layout, form, event_idx=False):  # which has the most
        first = max(first, _up(response + layout.response, _LINE))
    if page != ONE_PAGE:
        stride = 1 << (stride - 1).bit_length()
        first = _up(first, stride)
        if stride > page:
            raise RequestError(f"a request of {segments} segments does not fit in a page of {page} bytes")
    slots = size if indirect else size // (2 + segments)
    if slots == 0 or 2 + segments > size:
        raise RequestError(f"a queue of {size} descriptors has no room for a request of {2 + segments}")
    return first, stride, slots


def _beside(size: int, layout: Layout, form: RingFormat, event_idx: bool) -> list[tuple[int, int]]:
    """Where headers and results fit in the cache lines that the two halves of a ring have anyway.

    Of each request that has room there the beginnings of its header and of its response, of which what
    comes after the result may be behind the line.
    """
    heads, results = form.room(size, event_idx)
    align = 4 if layout.request % 8 else 8
    width = layout.result_offset + layout.result_bytes
    head, response = heads.start, results.start
    places: list[tuple[int, int]] = []
    while True:
        head = _up(head, align)
        response += -(response + width) % layout.result_bytes
        if head + layout.request > heads.stop or response + width > results.stop:
            return places
        places.append((head, response))
        head += layout.request
        response += layout.response


class RequestQueue:
    """Slots, templates and one ring, split or packed; one thread at a time, which its owner sees to.

    Owns nothing but its private state: memory, doorbell and descriptors are its maker's.

    A request whose caller does not wait any more is an *orphan*: `orphans` counts them, and
    `orphan_changes` those that may yet change the disk. `taken` says that somebody has the queue for
    a call, `entered` that somebody submits or polls, `awaited` that somebody sleeps on the
    completion descriptor between calls, and `woken` that he was woken up for something that is not a
    completion, and is to look at everything once more.
    """

    def __init__(
        self,
        memory: Buffer,
        region: memoryview,
        mapping: Mapping,
        size: int,
        layout: Layout,
        *,
        segments: int = 1,
        segment_bytes: int = 1 << 30,
        indirect: bool,
        event_idx: bool,
        number: int = 0,
        form: RingFormat = SPLIT,
    ) -> None:
        """`memory` is `queue_bytes(...)` of `region`; data segments are at most `segment_bytes`.

        Queues of one device with different numbers give their requests different tags.
        """
        first, stride, slots = _shape(size, layout, segments, indirect, form, 1 << mapping.shift)
        within = _slot(layout)
        end = form.areas(size)[2]
        self._buffer: Buffer | None = memory  # keeps the region's bytes lent
        self.ring = form.ring(memory.view()[:end], size, event_idx)
        self.packed = form.packed
        self._split: Any = None if form.packed else self.ring  # the same, as what it is
        self._packed: Any = self.ring if form.packed else None
        self.slots = slots
        self.segments, self.segment_bytes = segments, segment_bytes
        self.indirect = indirect
        self.orphans = self.orphan_changes = 0
        self.broken = False
        self.taken = self.entered = self.awaited = self.woken = False
        self._doorbell = Doorbell()
        self._wake_fd = self._end_fd = -1
        self._layout = layout
        self._region_view = region
        self._region = window(region)
        self._table_array = mapping.table
        self._iovas = window(mapping.table)
        self._shift = mapping.shift
        self._page_mask = (1 << mapping.shift) - 1
        self._slots_at = memory.offset + first
        self._stride, self._payload_at, self._table_at = stride, within.payload, within.table
        beside = [
            (memory.offset + head, memory.offset + response)
            for head, response in _beside(size, layout, form, event_idx)
        ]
        own = (
            (base, base + within.response)
            for base in range(self._slots_at, self._slots_at + stride * slots, stride)
        )
        self._places_array = array("Q")  # of each slot: where in the region its header is, and its response
        for place, usual in itertools.zip_longest(beside[:slots], own):
            self._places_array.extend(place or usual)
        self._places = window(self._places_array)
        self._result_at = layout.result_offset
        self._result_mask = layout.result_mask
        self._result_wide = layout.result_bytes > 1
        self._response_bytes = layout.response
        self._response_first = layout.response_first
        self._chain = 2 + segments
        self._records_owner = bytearray(_RECORD * slots)
        self._records = window(self._records_owner)
        self._free_array = array("H", range(slots - 1, -1, -1))
        self._free = window(self._free_array)
        self._free_count = slots
        self._faults_array = array("H", [0]) * slots
        self._faults = window(self._faults_array)
        self._fault_count = 0
        self._ended_array = array("H", [0]) * slots
        self._ended = window(self._ended_array)
        self._ended_first = self._ended_count = 0
        self._early_array = array("H", [0]) * slots  # heads that were back when the device was reset
        self._early = window(self._early_array)
        self._early_count = 0
        self._now = 0  # when the device was last found to have used something, if anybody asked
        self._kept: list[Kept | Buffer | None] = [None] * slots
        self._sequence = number << 48
        self._stop_owner = bytearray(4)
        self._stop = window(self._stop_owner)
        self._nothing = Task(Template(b""), memoryview(array("Q")), 1, 1)
        fill(self._region, memory.offset + end, 0, first - end + stride * slots)

    def connect(self, doorbell: Doorbell) -> None:
        """How to notify the device from now on."""
        self._doorbell = doorbell

    def wake_by(self, wake_fd: int, end_fd: int) -> None:
        """The descriptor of completions, and one that is readable at the end: `run` sleeps on them itself,
        at most for its slice, before it says IDLE. -1: it never does."""
        self._wake_fd, self._end_fd = wake_fd, end_fd

    def stop(self) -> None:
        """Make a `run` in any thread come back with LOST, now and from now on; from any thread."""
        store_release_u32(self._stop, 0, _STOP)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return load_acquire_u32(self._stop, 0) == _STOP

    def pause(self, paused: bool) -> None:
        """Make a `run` in any thread come back with PAUSED, until this is taken back."""
        if not self.stopped:
            store_release_u32(self._stop, 0, _PAUSE if paused else 0)

    @property
    def paused(self) -> bool:
        """Whether `pause` has been called, and not been taken back."""
        return load_acquire_u32(self._stop, 0) == _PAUSE

    def rewind(self) -> None:
        """Begin anew with a device that was reset, which may be while a task is paused.

        What it had is offered again, but for orphans, which are done with, and for requests of nobody's
        channel (owner 0), which come back without a result: nobody knows what became of them. What it
        had used before is not lost.
        """
        while (head := self._reap()) >= 0:
            store_u16(self._early, 2 * self._early_count, head)
            self._early_count += 1
        back = {load_u16(self._early, 2 * i) for i in range(self._early_count)}
        self.ring.rewind()
        self.broken = False
        for slot in range(self.slots):
            record = _RECORD * slot
            state = load_u32(self._records, record + _STATE)
            head = slot if self.indirect else slot * self._chain
            if state not in (_TASK, _SINGLE) or head in back:
                continue
            owner = load_u32(self._records, record + _OWNER)
            if state == _SINGLE and owner == _NOBODY:
                self._lose_orphan(slot)
            elif state == _SINGLE and owner == 0:
                store_u64(self._records, record + _RESULT, self._result_mask)
                store_u32(self._records, record + _STATE, _ENDED)
                self._put_ended(slot)
            else:
                self._poison(slot)
                self._offer(slot)

    @property
    def in_flight(self) -> int:
        """Requests that the device has, orphans included."""
        return int(self.slots - self._free_count - self._fault_count - self._ended_count)

    # One by one.

    def submit(
        self,
        template: Template,
        offset: int,
        nbytes: int,
        data: int,
        token: int,
        owner: int = 0,
        kept: Buffer | None = None,
    ) -> bool:
        """Put one request in a slot, unseen by the device until `kick`; false when none is free.

        `data` is where in the region its data is; `token` comes back from `poll` for its `owner`.
        `kept`, which has been told to `hold`, is let go of when the request is back.
        """
        if self._free_count == 0:
            return False
        if template.direction != NO_DATA:
            self._check_data(data + nbytes)
        slot = self._start(template, offset, nbytes, data, token, _SINGLE)
        if slot == _MISFIT:
            raise RequestError(
                f"{nbytes} bytes do not fit in {self.segments} segments of {self.segment_bytes}"
            )
        if slot < 0:
            return False
        store_u32(self._records, _RECORD * slot + _OWNER, owner)
        self._kept[slot] = kept
        return True

    def kick(self) -> None:
        """Show the device what was submitted, and notify it if it asked for that."""
        if self._publish():
            self._doorbell.ring()

    def poll(self, limit: int = 64, owner: int = 0) -> list[Finished]:
        """Requests of one owner that came back, oldest first; never blocks. Not amid a task.

        `broken` tells of a bad device.
        """
        self.look()
        return self._hand_out(limit, owner)

    def _hand_out(self, limit: int, owner: int) -> list[Finished]:
        finished: list[Finished] = []
        for _ in range(self._ended_count):
            slot = self._next_ended()
            whose = load_u32(self._records, _RECORD * slot + _OWNER)
            if whose == _NOBODY:
                self._lose_orphan(slot)
            elif whose == owner and len(finished) < limit:
                finished.append(self._take(slot))
                self._let_go(slot)
            else:
                self._put_ended(slot)
        return finished

    def sweep(self) -> bool:
        """Let go of the orphans that were found to be back; whether there were any. Never blocks."""
        before = self.orphans
        self._hand_out(0, 0)
        return bool(self.orphans < before)

    def look(self) -> None:
        """Take what the device has used, for `poll` and `sweep`; not amid a task, whose `run` does it."""
        if self._collect(self._nothing) < 0:
            self.broken = True

    def _next_ended(self) -> int:
        slot = load_u16(self._ended, 2 * self._ended_first)
        self._ended_first = (self._ended_first + 1) % self.slots
        self._ended_count -= 1
        return slot

    def _put_ended(self, slot: int) -> None:
        last = (self._ended_first + self._ended_count) % self.slots
        store_u16(self._ended, 2 * last, slot)
        self._ended_count += 1

    def _lose_orphan(self, slot: int) -> None:
        self.orphans -= 1
        if load_u16(self._records, _RECORD * slot + _CHANGES):
            self.orphan_changes -= 1
        self._release(slot)
        self._let_go(slot)

    def _let_go(self, slot: int) -> None:
        kept = self._kept[slot]
        if kept is not None:
            self._kept[slot] = None
            kept.let_go()

    def _check_data(self, end: int) -> None:
        if end > len(self._region_view):
            raise RequestError(f"data up to {end:#x} of a region of {len(self._region_view):#x}")

    def await_slot(self, slot: int, spin_ns: int) -> bool:
        """Show the device what was submitted, and spin until the one request in this slot is back.

        At most for so long. Whether it went well; else it is a single request like others, or among
        those that ended. Without the interpreter; its state was AWAITED.
        """
        spins = 0
        begun = 0
        record = _RECORD * slot
        if self._publish():
            self._doorbell.ring_unguarded()
        while load_u32(self._records, record + _STATE) == _AWAITED:
            if self._collect(self._nothing) < 0:
                self.broken = True
                break
            if load_acquire_u32(self._stop, 0):
                break
            spins += 1
            if spins > _EAGER:
                relax()
            if spins % _CLOCK_EVERY == 0:
                if begun == 0:
                    begun = now_ns()
                elif now_ns() - begun >= spin_ns:
                    break
        if load_u32(self._records, record + _STATE) == _AWAITED:
            store_u32(self._records, record + _STATE, _SINGLE)
            return False
        if load_u64(self._records, record + _RESULT) == 0:
            return True
        self._put_ended(slot)
        return False

    # Many at once.

    def check(self, task: Task) -> None:
        """Raise RequestError unless all data of the task is in the region; before its first run."""
        self._check_data(task.data_end)

    @property
    def kick_failure(self) -> int:
        """The errno of a doorbell that could not be rung, or 0."""
        return self._doorbell.failure

    def run(self, task: Task, slice_ns: int, spin_ns: int) -> int:
        """Submit and complete a task's parts; says why it came back, at the latest after a slice.

        IDLE: nothing came for `spin_ns`; sleep on the completion descriptor (`arm` first). FAULT:
        take `faults()`, then run on. PAUSED: wait until it is taken back. BROKEN and LOST are final.
        """
        if task.load is not None:
            task.load.enter()
        with cython.nogil:
            reason = self._run(task, slice_ns, spin_ns)
        if task.load is not None:
            task.load.settle()
        if reason == _BROKEN:
            self.broken = True
        return reason

    def faults(self) -> list[Finished]:
        """The parts whose result was not good, with the part's number as token."""
        finished: list[Finished] = []
        while self._fault_count:
            self._fault_count -= 1
            finished.append(self._take(load_u16(self._faults, 2 * self._fault_count)))
        return finished

    def abandon_task(self, kept: Kept) -> int:
        """Make orphans of a task's requests that are in flight, which use `kept`; how many."""
        self.faults()
        count = 0
        for slot in range(self.slots):
            if load_u32(self._records, _RECORD * slot + _STATE) == _TASK:
                self._orphan(slot)
                self._kept[slot] = kept
                count += 1
        return count

    def abandon(self, owner: int, kept: Kept | None = None) -> int:
        """Make orphans of all single requests of an owner, who wants no answers any more.

        How many there were. Those that are in flight use `kept`, which counts them, or what they had.
        """
        count = 0
        for _ in range(self._ended_count):
            slot = self._next_ended()
            if load_u32(self._records, _RECORD * slot + _OWNER) == owner:
                self._release(slot)
                self._let_go(slot)
                count += 1
            else:
                self._put_ended(slot)
        for slot in range(self.slots):
            record = _RECORD * slot
            mine = load_u32(self._records, record + _OWNER) == owner
            if mine and load_u32(self._records, record + _STATE) == _SINGLE:
                self._orphan(slot)
                if kept is not None:
                    self._kept[slot] = kept
                    kept.count += 1
                count += 1
        return count

    def forsake(self, owner: int, token: int) -> bool:
        """Make an orphan of one single request; false if it is not in flight."""
        for slot in range(self.slots):
            record = _RECORD * slot
            if (
                load_u32(self._records, record + _STATE) == _SINGLE
                and load_u64(self._records, record + _TOKEN) == token
                and load_u32(self._records, record + _OWNER) == owner
            ):
                self._orphan(slot)
                return True
        return False

    def _orphan(self, slot: int) -> None:
        record = _RECORD * slot
        store_u32(self._records, record + _STATE, _SINGLE)
        store_u32(self._records, record + _OWNER, _NOBODY)
        self.orphans += 1
        if load_u16(self._records, record + _CHANGES):
            self.orphan_changes += 1

    def overlaps_orphan(self, offset: int, nbytes: int) -> bool:
        """Whether an orphan may yet change these bytes, of whichever disk."""
        for slot in range(self.slots):
            record = _RECORD * slot
            begin = load_u64(self._records, record + _OFF)
            if (
                load_u32(self._records, record + _OWNER) == _NOBODY
                and load_u32(self._records, record + _STATE) == _SINGLE
                and load_u16(self._records, record + _CHANGES)
                and begin < offset + nbytes
                and offset < begin + load_u64(self._records, record + _LENGTH)
            ):
                return True
        return False

    def forget(self) -> None:
        """Let go of all that requests keep, after the device has; it will not answer any more."""
        for slot in range(len(self._kept)):
            self._let_go(slot)

    def orphan_headers(self) -> list[bytes]:
        """The request header of each orphan, which tells the device which one is meant.

        As it is in shared memory: a device that has changed it means another request of its own.
        """
        return [
            bytes(self._region_view[begin : begin + self._layout.request])
            for begin in (
                self._header(slot)
                for slot in range(self.slots)
                if load_u32(self._records, _RECORD * slot + _STATE) == _SINGLE
                and load_u32(self._records, _RECORD * slot + _OWNER) == _NOBODY
            )
        ]

    def arm(self) -> bool:
        """Ask for an interrupt; true when nothing is ready and it is safe to sleep."""
        return bool(self._arm())

    def disarm(self) -> None:
        """Ask for no interrupts again."""
        self._disarm()

    def detach(self) -> None:
        """Let go of the shared memory, after the device has; only `stop` may be called then."""
        self.stop()
        self.ring.detach()
        self._doorbell = Doorbell()  # what it was may be memory of the device
        self.slots = self._free_count = self._fault_count = self._ended_count = 0
        self._buffer = None
        self._region = null()
        self._region_view = memoryview(b"")

    # The compiled inside: nothing below raises, allocates, or needs the interpreter.

    def _run(self, task: Task, slice_ns: int, spin_ns: int) -> int:
        begun = now_ns()
        busy = begun  # when something last happened
        spins = 0
        quiet = 0  # looks since something came
        rounds = 0
        most = task._depth if task._depth < self.slots else self.slots
        began = 0  # the round, where that is wanted
        timed = task.load is not None and task.load.timed
        while True:
            if timed:
                began = ticks()
            if load_acquire_u32(self._stop, 0):
                return _PAUSED if load_acquire_u32(self._stop, 0) == _PAUSE else _LOST
            # While the device has plenty to do, what comes in one go is answered in one go: the fewer moments
            # at which both sides touch the rings, the sooner the last of these requests is back.
            gathers = quiet < _QUIET and 4 * task.active > 3 * most
            filled = 0 if gathers else self._fill(task)
            if self._publish():
                self._doorbell.ring_unguarded()
            if filled < 0:
                return _UNFIT
            if task._mode == _LOADED:
                task.load.settle()
            got = self._collect(task)
            if got < 0:
                return _BROKEN
            if self._fault_count:
                return _FAULT
            if task.finished == task.total:
                return _DONE
            if got:
                quiet = 0
            if filled or got:
                if timed:
                    task.load.busy += ticks() - began
                spins = 0
                rounds += 1
                if rounds % _ROUNDS == 0 and now_ns() - begun > slice_ns:
                    return _TICK
                continue
            quiet += 1
            if gathers:
                continue
            if spins == 0:
                busy = now_ns()
            spins += 1
            if spins > _EAGER:
                relax()
            patience = spin_ns
            if patience < _MOMENT and task.active > 1 and self._wake_fd >= 0:
                patience = _MOMENT
            if spins % _CLOCK_EVERY == 0 or patience == 0:
                now = now_ns()
                if now - busy >= patience:
                    if now - begun >= slice_ns:
                        return _IDLE
                    left = slice_ns - (now - begun)
                    pause = left
                    if task.load is not None:
                        pause = task.load.pause(task.started)
                        if pause > left:
                            pause = left
                    slept = self._sleep(pause)
                    if slept < 0 or (slept == 0 and pause == left):
                        return _IDLE
                    spins = 0
                elif now - begun > slice_ns:
                    return _TICK

    def _sleep(self, ns: int) -> int:
        """Sleep, where `wake_by` has said by what that ends: 1 if there may be something, 0 if not, -1 if
        somebody has to look."""
        if self._wake_fd < 0 or self._doorbell.failure:
            return -1
        slept = 1
        if self._arm():
            slept = sleep_on(self._wake_fd, self._end_fd, ns)
        self._disarm()
        return slept

    def _fill(self, task: Task) -> int:
        """Start as many parts as there is room for; their number, or -2 if one does not fit."""
        if task._mode == _LOADED:
            return self._fill_load(task)
        count = 0
        now = 0
        while self._free_count and task.active < task._depth:
            if task._mode == _BOUNCED and task._free_cells == 0:
                break
            if task._again_count:
                part = load_u64(task._again, 8 * (task._again_count - 1))
            elif task.started < task.total and task.started < task.allowed:
                part = task.started
            else:
                break
            item = part // task.parts
            within = (part - item * task.parts) * task.part_bytes
            nbytes = task.item_bytes - within
            if nbytes > task.part_bytes:
                nbytes = task.part_bytes
            place = item * task.item_bytes + within
            data = task._base
            if task._mode == _BOUNCED:
                task._free_cells -= 1
                data = load_u64(task._cells, 8 * task._free_cells)
                if task.template.direction == _TO_DEVICE:
                    copy(self._region, data, task._user, place, nbytes)
            elif task._mode != _CONSTANT:
                data += place
            offset = load_u64(task._offsets, 8 * item) + within
            slot = self._start(task.template, offset, nbytes, data, part, _TASK)
            if slot < 0:
                return _MISFIT
            if task.counted:
                if now == 0:
                    now = ticks()
                store_u64(self._records, _RECORD * slot + _TIME, now)
            if task._again_count:
                task._again_count -= 1
            else:
                task.started += 1
            task.active += 1
            count += 1
        return count

    def _fill_load(self, task: Task) -> int:
        """The same for a load, which makes its offsets and wants to know when each part starts."""
        room = task._depth - task.active
        if room < task.load.batch and room < task.total - task.started:
            return 0
        if room > task.total - task.started:
            room = task.total - task.started
        if task.load.paced:
            ripe = task.load.ripe() - task.started
            if room > ripe:
                room = ripe
        if room > task.allowed - task.started:
            room = task.allowed - task.started
        if room > self._free_count:
            room = self._free_count
        if room > task._free_cells:
            room = task._free_cells
        if not task.load.begin(room):
            task.total = task.started
            return 0
        for _ in range(room):
            part = task.started
            task._free_cells -= 1
            data = load_u64(task._cells, 8 * task._free_cells)
            place = task.load.offset(part)
            if task.load.is_write(part):
                data += task._apart
                slot = self._start(task.other, place, task.item_bytes, data, part, _TASK)
            else:
                slot = self._start(task.template, place, task.item_bytes, data, part, _TASK)
            if slot < 0:
                return _MISFIT
            store_u64(self._records, _RECORD * slot + _TIME, task.load.now)
            task.started += 1
            task.active += 1
        return room

    def _start(self, template: Template, offset: int, nbytes: int, data: int, token: int, state: int) -> int:
        """Fill a free slot and offer its head; the slot, -1 if none is free, -2 if too long."""
        if self._free_count == 0:
            return _FULL
        slot = load_u16(self._free, 2 * (self._free_count - 1))
        record = _RECORD * slot
        base = self._slots_at + self._stride * slot
        header = self._header(slot)
        moved = template.data_bytes if template.data_bytes else nbytes
        same = (
            load_u32(self._records, record + _KEY) == template.key
            and load_u64(self._records, record + _LENGTH) == nbytes
        )
        if same and template.direction != _NO_DATA and load_u64(self._records, record + _DATA) != data:
            same = self._segment(data, moved) == moved
            if same:
                self._move_data(slot, base, template, data)
        key = template.key
        if not same:
            laid = self._lay_out(slot, base, template, data, moved)
            if laid < 0:
                store_u32(self._records, record + _KEY, 0)
                return _MISFIT
            if laid > 1:
                key = 0  # next time too: only one data descriptor can be moved
        self._free_count -= 1
        self._sequence += 1
        for i in range(template._patch_count):
            patch = _PATCH * i
            source = load_u16(template._patch, patch)
            value = self._sequence
            if source == _OFFSET:
                value = offset
            elif source == _NBYTES:
                value = nbytes
            within = load_u16(template._patch, patch + 2)
            if within < template.request_bytes:
                within += header
            else:
                within += base + self._payload_at - template.request_bytes
            store_field(
                self._region,
                within,
                value >> load_u16(template._patch, patch + 8),
                load_u16(template._patch, patch + 4),
                load_u16(template._patch, patch + 6) != 0,
            )
        self._poison(slot)
        store_u32(self._records, record + _STATE, state)
        store_u32(self._records, record + _OWNER, 0)
        store_u16(self._records, record + _CHANGES, template.changes)
        store_u16(self._records, record + _KIND, template.kind)
        store_u32(self._records, record + _KEY, key)
        store_u64(self._records, record + _LENGTH, nbytes)
        store_u64(self._records, record + _OFF, offset)
        store_u64(self._records, record + _DATA, data)
        store_u64(self._records, record + _TOKEN, token)
        self._offer(slot)
        return slot

    def _header(self, slot: int) -> int:
        return load_u64(self._places, 16 * slot)

    def _response(self, slot: int) -> int:
        return load_u64(self._places, 16 * slot + 8)

    def _poison(self, slot: int) -> None:
        """Make the result of a slot one that no success can be."""
        if self._result_wide:
            store_u64(self._region, self._response(slot) + self._result_at, 0xFFFFFFFFFFFFFFFF)
        else:
            store_u8(self._region, self._response(slot) + self._result_at, 0xFF)

    def _lay_out(self, slot: int, base: int, template: Template, data: int, nbytes: int) -> int:
        """Write a slot's header and descriptors: the number of data segments, -1 if they are too many."""
        header = self._header(slot)
        copy(self._region, header, template._mem, 0, template.request_bytes)
        count = 0
        if template.direction != _NO_DATA:
            place = data
            left = nbytes
            while left:
                size = self._segment(place, left)
                place += size
                left -= size
                count += 1
            if count > self.segments:
                return -1
        total = 2 + count + (1 if template.payload_bytes else 0)
        self._describe(slot, base, 0, total, header, template.request_bytes, 0)
        index = 1
        if template.payload_bytes:
            payload = base + self._payload_at
            copy(self._region, payload, template._mem, template.request_bytes, template.payload_bytes)
            self._describe(slot, base, index, total, payload, template.payload_bytes, 0)
            index += 1
        if self._response_first and template.direction != _TO_DEVICE:
            self._describe_response(slot, base, index, total)
            index += 1
        if count:
            flags = _WRITE if template.direction == _FROM_DEVICE else 0
            place = data
            left = nbytes
            while left:
                size = self._segment(place, left)
                self._describe(slot, base, index, total, place, size, flags)
                place += size
                left -= size
                index += 1
        if index < total:
            self._describe_response(slot, base, index, total)
        if self.indirect:
            table = self._iova(base + self._table_at)
            self._describe_ring(slot, table, 16 * total, _INDIRECT, 0)
        return count

    def _move_data(self, slot: int, base: int, template: Template, data: int) -> None:
        """Point the one data descriptor of a slot, which is written already, elsewhere."""
        index = 2 if self._response_first and template.direction == _FROM_DEVICE else 1
        address = self._iova(data)
        if self.indirect:
            store_u64(self._region, base + self._table_at + 16 * index, address)
        else:
            self._redirect(slot * self._chain + index, address)

    def _describe_response(self, slot: int, base: int, index: int, total: int) -> None:
        self._describe(slot, base, index, total, self._response(slot), self._response_bytes, _WRITE)

    def _describe(
        self, slot: int, base: int, index: int, total: int, place: int, nbytes: int, flags: int
    ) -> None:
        """Write descriptor `index` of a slot's `total`, in its table or in the ring."""
        address = self._iova(place)
        if index + 1 < total:
            flags |= _NEXT
        if self.indirect:
            entry = base + self._table_at + 16 * index
            store_u64(self._region, entry, address)
            store_u32(self._region, entry + 8, nbytes)
            if self.packed:  # no chain, whose order is that of the table (2.8.7)
                store_u16(self._region, entry + 12, 0)
                store_u16(self._region, entry + 14, flags & _WRITE)
            else:
                store_u16(self._region, entry + 12, flags)
                store_u16(self._region, entry + 14, index + 1 if flags & _NEXT else 0)
        else:
            first = slot * self._chain
            following = first + index + 1 if flags & _NEXT else 0
            self._describe_ring(first + index, address, nbytes, flags, following)

    def _describe_ring(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        if self.packed:
            self._packed.describe(index, address, length, flags, following)
        else:
            self._split.describe(index, address, length, flags, following)

    def _redirect(self, index: int, address: int) -> None:
        if self.packed:
            self._packed.redirect(index, address)
        else:
            self._split.redirect(index, address)

    def _offer(self, slot: int) -> None:
        head = slot if self.indirect else slot * self._chain
        if self.packed:
            self._packed.offer(head)
        else:
            self._split.offer(head)

    def _publish(self) -> bool:
        wanted: bool = self._packed.publish() if self.packed else self._split.publish()
        return wanted

    def _arm(self) -> bool:
        if self._early_count:
            return False
        quiet: bool = self._packed.arm() if self.packed else self._split.arm()
        return quiet

    def _disarm(self) -> None:
        if self.packed:
            self._packed.disarm()
        else:
            self._split.disarm()

    def _reap(self) -> int:
        head: int = self._packed.reap() if self.packed else self._split.reap()
        return head

    def _iova(self, place: int) -> int:
        """Where the device finds a byte of the region."""
        return load_u64(self._iovas, 8 * (place >> self._shift)) + (place & self._page_mask)

    def _segment(self, place: int, nbytes: int) -> int:
        """How many of `nbytes` at `place` one descriptor may cover."""
        size = self._page_mask + 1 - (place & self._page_mask)
        if size > self.segment_bytes:
            size = self.segment_bytes
        return size if size < nbytes else nbytes

    def _collect(self, task: Task) -> int:
        """Take what the device has used; how many, or -1 if it broke the ring."""
        count = 0
        self._now = 0
        while count < self.slots:
            if self._early_count:
                self._early_count -= 1
                head = load_u16(self._early, 2 * self._early_count)
            else:
                head = self._reap()
            if head == _NOTHING:
                break
            if head == _RING_BROKEN:
                return -1
            count += 1
            slot = head if self.indirect else head // self._chain
            record = _RECORD * slot
            result = self._result(slot)
            state = load_u32(self._records, record + _STATE)
            if state == _TASK and result == 0:
                self._complete(task, record)
                self._release(slot)
            else:
                store_u64(self._records, record + _RESULT, result)
                if state == _TASK:
                    self._deliver(task, record)  # it may turn out to be a success
                    store_u16(self._faults, 2 * self._fault_count, slot)
                    self._fault_count += 1
                elif state != _AWAITED:
                    self._put_ended(slot)
                store_u32(self._records, record + _STATE, _ENDED)
        return count

    def _result(self, slot: int) -> int:
        place = self._response(slot) + self._result_at
        result = load_u64(self._region, place) if self._result_wide else load_u8(self._region, place)
        return result & self._result_mask

    def _complete(self, task: Task, record: int) -> None:
        self._deliver(task, record)
        if task._mode == _LOADED:
            write = load_u16(self._records, record + _KIND) == _WRITES
            task.load.complete(load_u64(self._records, record + _TIME), write)
            task.finished += 1  # as `Task._count` does, but in another module that is a call
            task.active -= 1
            return
        if task.counted:
            if self._now == 0:
                self._now = ticks()
            began = load_u64(self._records, record + _TIME)
            task.stats.count(task.template.kind, load_u64(self._records, record + _LENGTH), began, self._now)
        task._finish(load_u64(self._records, record + _TOKEN), True)

    def _deliver(self, task: Task, record: int) -> None:
        """Copy what was read through a cell to the user's memory; the cell is free again."""
        if task._mode < _BOUNCED:
            return
        data = load_u64(self._records, record + _DATA)
        if task._mode == _BOUNCED and task.template.direction == _FROM_DEVICE:
            part = load_u64(self._records, record + _TOKEN)
            item = part // task.parts
            place = item * task.item_bytes + (part - item * task.parts) * task.part_bytes
            copy(task._user, place, self._region, data, load_u64(self._records, record + _LENGTH))
        if task._apart and data >= task._base + task._apart:
            data -= task._apart
        store_u64(task._cells, 8 * task._free_cells, data)
        task._free_cells += 1

    def _release(self, slot: int) -> None:
        store_u32(self._records, _RECORD * slot + _STATE, _FREE)
        store_u16(self._free, 2 * self._free_count, slot)
        self._free_count += 1

    def _take(self, slot: int) -> Finished:
        self._release(slot)  # first: a Ctrl-C must not lose it
        return self._report(slot)

    def _report(self, slot: int) -> Finished:
        record = _RECORD * slot
        begin = self._response(slot)
        response = bytes(self._region_view[begin : begin + self._response_bytes])
        return Finished(
            load_u64(self._records, record + _TOKEN),
            load_u64(self._records, record + _RESULT),
            response,
            load_u64(self._records, record + _TIME),
        )

    def again(self, slot: int) -> None:
        """Offer a request that came back once more, unseen by the device until `kick`."""
        self._poison(slot)
        store_u32(self._records, _RECORD * slot + _STATE, _SINGLE)
        self._offer(slot)

    def place(self, slot: int) -> tuple[int, bool]:
        """Of a single request that came back: the byte on the disk where it began, and whether it
        was a transfer."""
        record = _RECORD * slot
        return load_u64(self._records, record + _OFF), self._kept[slot] is not None

    def owners(self) -> list[int]:
        """Whose requests were found to be back."""
        found = []
        for step in range(self._ended_count):
            slot = load_u16(self._ended, 2 * ((self._ended_first + step) % self.slots))
            owner = load_u32(self._records, _RECORD * slot + _OWNER)
            if owner not in found:
                found.append(owner)
        return found


if not cython.compiled:
    make_whole(RequestQueue)
