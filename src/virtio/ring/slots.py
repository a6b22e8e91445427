"""Fixed slots over one virtqueue, filled from templates, and the loop that keeps them busy.

A *slot* is room for one request in flight. Its shared half holds the request header, the response
and, with indirect descriptors, the table; its private half (64 bytes) records what was asked. Slot
`s` always uses the same descriptors, so most of a request is written once and stays. Beside a ring so
small that each half of it leaves room in its cache line, headers and responses are in these lines: a
request is then two lines that pass between two cores, one each way.

A *template* is one operation on one disk: the header's bytes and how to patch offset, length and
tag into them. A *task* is many requests of one template, run without the GIL: no Python per request.

The module is long because the loop and all that it does with slots are one compiled unit: what it
touches of a template or a task is a field in C, not a call.

The result field is poisoned before each submit: a device that completes a request without writing
a status must not find an old success there.
"""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING, Any

import cython

from virtio.errors import RequestError
from virtio.ring import stats
from virtio.ring.format import SPLIT, RingFormat
from virtio.ring.layout import beside, shape, slot_parts

if not cython.compiled:
    from virtio.ring._mem import (
        copy,
        fill,
        load_acquire_u32,
        load_u8,
        load_u16,
        load_u32,
        load_u64,
        store_field,
        store_release_u32,
        store_u8,
        store_u16,
        store_u32,
        store_u64,
        window,
    )
    from virtio.ring._os import make_whole, now_ns, relax, sleep_on, ticks
    from virtio.ring._vring import FAULTY, INDIRECT, NEXT, NOTHING, WRITE
    from virtio.ring.codes import (
        AWAITED,
        BEGAN,
        BOUNCED,
        BROKEN,
        CHANGES,
        CONSTANT,
        DATA,
        DONE,
        ENDED,
        FAULT,
        FREE,
        FROM_DEVICE,
        FULL,
        IDLE,
        IN_TASK,
        KEY,
        KIND,
        LOADED,
        LOST,
        MISFIT,
        NBYTES,
        NBYTES_AT,
        NO_DATA,
        OFFSET,
        OFFSET_AT,
        OWNER,
        PATCH_BYTES,
        PAUSE,
        PAUSED,
        RECORD_BYTES,
        RESULT,
        SINGLE,
        STATE,
        STOP,
        TICK,
        TO_DEVICE,
        TOKEN,
        UNFIT,
    )
    from virtio.ring.doorbell import Doorbell
    from virtio.ring.gather import Gathering
    from virtio.ring.task import Task
    from virtio.ring.template import Template

if TYPE_CHECKING:
    from typing import final

    from virtio.ring.buffer import Buffer
    from virtio.ring.layout import Layout
    from virtio.ring.region import Mapping
    from virtio.ring.requests import Kept
    from virtio.ring.submit import Budget
else:
    from cython import final  # such a method is called directly, not through a table

_WRITES = stats.WRITE
_CLOCK_EVERY = 64  # spins between two looks at the clock; a rest is one, too
# Spins before the first one that relaxes, some microseconds, where up to three requests are in flight: a fast
# target answers sooner, and a look that comes 40 to 140 cycles late costs more than it saves. Interpreted, to
# relax is to let others run.
_EAGER = 1000 if cython.compiled else 64
# Rests between looks that find nothing, in which the rings' cache lines are the device's, and a processor
# that is shared with it, too. A device that is the limit has one for each request that it has to do
# meanwhile, all the time: to write to a line that was looked at it has to get that line back, and all that it
# writes next waits. Any other has one for four of them, for so many looks: if it is not back then, it is
# waiting for something itself, and nobody disturbs it. Interpreted, none: each look takes longer.
_RESTING = 8
_REST_BITS = 2
_REST_MOST = 128 if cython.compiled else 0
_AT_ONCE = 16  # requests that are shown to a device which is at work: it begins while others are written
_ALL = 1 << 30
_GATHER_FROM = 8  # the depth from which gathering is tried: below, the device has little else to do
_QUIET = 2 if cython.compiled else 1  # looks that find nothing, after which a burst is over
_MOMENT = 3000  # ns of spinning in any case, where several answers are due: to sleep takes as long
_ROUNDS = 8  # rounds that moved something: each may copy megabytes


class Slots:
    """Slots, templates and one ring, split or packed; one thread at a time, which its owner sees to.

    Owns nothing but its private state: memory, doorbell and descriptors are its maker's. That state is all
    here, also what only `RequestQueue` does something with.

    `taken` says that somebody has the queue for a call, `entered` that somebody submits or polls,
    `awaited` who sleeps on the completion descriptor between calls, 0 for nobody, `woken` that he was
    woken up for something that is not a completion, and is to look at everything once more, and
    `renounced` that there is something for `settle_renounced` to do.
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

        Queues of one device with different numbers, by which a trace tells them, give their requests
        different tags.
        """
        first, stride, slots = shape(size, layout, segments, indirect, form, 1 << mapping.shift)
        within = slot_parts(layout)
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
        self.taken = self.entered = self.woken = self.renounced = False
        self.awaited = 0
        self._renounced: list[tuple[int, Budget]] = []  # owners
        self._doorbell = Doorbell()
        self.gathering = Gathering()
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
        near = [
            (memory.offset + head, memory.offset + response)
            for head, response in beside(size, layout, form, event_idx)
        ]
        own = (
            (base, base + within.response)
            for base in range(self._slots_at, self._slots_at + stride * slots, stride)
        )
        self._places_array = array("Q")  # of each slot: where in the region its header is, and its response
        for place, usual in itertools.zip_longest(near[:slots], own):
            self._places_array.extend(place or usual)
        self._places = window(self._places_array)
        self._result_at = layout.result_offset
        self._result_mask = layout.result_mask
        self._result_wide = layout.result_bytes > 1
        self._response_bytes = layout.response
        self._response_first = layout.response_first
        self._chain = 2 + segments
        self._records_owner = bytearray(RECORD_BYTES * slots)
        self._records = window(self._records_owner)
        # Free slots: those used before, in a ring, and the last so many, which were not since all were free.
        self._free_array = array("H", [0]) * slots
        self._free = window(self._free_array)
        self._free_first = 0
        self._free_count = self._unused = slots
        self._faults_array = array("H", [0]) * slots
        self._faults = window(self._faults_array)
        self._fault_count = 0
        self._ended_array = array("H", [0]) * slots
        self._ended = window(self._ended_array)
        self._ended_first = self._ended_count = 0
        self._early_array = array("H", [0]) * slots  # heads that were back when the device was reset
        self._early = window(self._early_array)
        self._early_count = 0
        self._at_work = False  # the device wanted no notification of what `_feed` showed it last
        self._now = 0  # when the device was last found to have used something, if anybody asked
        self._kept: list[Kept | Buffer | None] = [None] * slots
        self.number = number
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
        store_release_u32(self._stop, 0, STOP)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return load_acquire_u32(self._stop, 0) == STOP

    def pause(self, paused: bool) -> None:
        """Make a `run` in any thread come back with PAUSED, until this is taken back."""
        if not self.stopped:
            store_release_u32(self._stop, 0, PAUSE if paused else 0)

    @property
    def paused(self) -> bool:
        """Whether `pause` has been called, and not been taken back."""
        return load_acquire_u32(self._stop, 0) == PAUSE

    @property
    def in_flight(self) -> int:
        """Requests that the device has, orphans included."""
        return int(self.slots - self._free_count - self._fault_count - self._ended_count)

    def check(self, task: Task) -> None:
        """Raise RequestError unless all data of the task is in the region; before its first run."""
        self._check_data(task.data_end)

    def _check_data(self, end: int) -> None:
        if end > len(self._region_view):
            raise RequestError(f"data up to {end:#x} of a region of {len(self._region_view):#x}")

    @property
    def kick_failure(self) -> int:
        """The errno of a doorbell that could not be rung, or 0."""
        return self._doorbell.failure

    def arm(self) -> bool:
        """Ask for an interrupt; true when nothing is ready and it is safe to sleep."""
        return bool(self._arm())

    def disarm(self) -> None:
        """Ask for no interrupts again."""
        self._disarm()

    # The compiled inside: nothing below raises, allocates, or needs the interpreter.

    @final
    def await_slot(self, slot: int, spin_ns: int) -> bool:
        """Show the device what was submitted, and spin until the one request in this slot is back.

        At most for so long. Whether it went well; else it is a single request like others, or among
        those that ended. Without the interpreter; its state was AWAITED.
        """
        spins = 0
        begun = 0
        record = RECORD_BYTES * slot
        if self._publish():
            self._doorbell.ring_unguarded()
        while load_u32(self._records, record + STATE) == AWAITED:
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
        if load_u32(self._records, record + STATE) == AWAITED:
            store_u32(self._records, record + STATE, SINGLE)
            return False
        if load_u64(self._records, record + RESULT) == 0:
            return True
        self._put_ended(slot)
        return False

    @final
    def _run(self, task: Task, slice_ns: int, spin_ns: int) -> int:
        begun = now_ns()
        busy = begun  # when something last happened
        spins = 0
        due = 0  # so many spins, and it is time to look at the clock
        in_vain = 0  # looks since something happened
        rounds = 0
        began = 0  # the round, where that is wanted
        timed = task.load is not None and task.load.timed
        paced = task.load is not None and task.load.paced
        most = task._depth if task._depth < self.slots else self.slots
        # Where something else is the limit, each way is as fast, and gathering is of no use.
        tries = most >= _GATHER_FROM and task.allowed >= task.total and not paced
        if tries:
            self.gathering.begin(begun)
        if task.started == 0:
            self._start_over()
        while True:
            if timed:
                began = ticks()
            if load_acquire_u32(self._stop, 0):
                return PAUSED if load_acquire_u32(self._stop, 0) == PAUSE else LOST
            # While the device has an eighth of the depth at least, and there is more to start.
            yields = tries and self.gathering.on
            gathers = (
                yields
                and in_vain < _QUIET
                and most < 8 * task.active < 8 * most
                and task.started < task.total
            )
            filled = 0 if gathers else self._feed(task)
            if filled < 0:
                return UNFIT
            if task._mode == LOADED:
                task.load.settle()
            got = self._collect(task)
            if got < 0:
                return BROKEN
            if self._fault_count:
                return FAULT
            if task.finished == task.total:
                return DONE
            if got and tries:
                self.gathering.count(got)
            if filled or got:
                if timed:
                    task.load.busy += ticks() - began
                spins = 0
                in_vain = 0
                rounds += 1
                if rounds % _ROUNDS == 0 and now_ns() - begun > slice_ns:
                    return TICK
                continue
            rests = 0
            if yields:
                rests = task.active
            elif in_vain < _RESTING:
                rests = task.active >> _REST_BITS
            if rests > _REST_MOST:
                rests = _REST_MOST
            if gathers:
                rests = self.gathering.rests
            for _ in range(rests):
                relax()
            in_vain += 1
            if gathers:
                continue
            if spins == 0:
                busy = now_ns()
                due = _CLOCK_EVERY
            spins += 1 + rests
            if spins > _EAGER:
                relax()
            patience = spin_ns
            if patience < _MOMENT and task.active > 1 and self._wake_fd >= 0:
                patience = _MOMENT
            if spins >= due or patience == 0:
                due = spins + _CLOCK_EVERY
                if task.load is not None and task.load._stopped:
                    return TICK  # how long to wait for what is in flight is for the caller to say
                now = now_ns()
                if now - busy >= patience:
                    if now - begun >= slice_ns:
                        return IDLE
                    left = slice_ns - (now - begun)
                    pause = left
                    if task.load is not None:
                        pause = task.load.pause(task.started)
                        if pause > left:
                            pause = left
                    slept = self._sleep(pause)
                    if slept < 0 or (slept == 0 and pause == left):
                        return IDLE
                    spins = 0
                elif now - begun > slice_ns:
                    return TICK

    @final
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

    @final
    def _feed(self, task: Task) -> int:
        """Start as many parts as there is room for, and show them to the device; their number, or -2 if one
        does not fit. All are shown at once if the device wants to be notified: once is enough."""
        count = 0
        rung = False
        while True:
            limit = _AT_ONCE if self._at_work and not rung else _ALL
            started = self._fill(task, limit)
            if self._publish():
                self._doorbell.ring_unguarded()
                rung = True
            if started < 0:
                return MISFIT
            count += started
            if started < limit:
                break
        if count:
            self._at_work = not rung
        return count

    @final
    def _fill(self, task: Task, limit: int) -> int:
        """Start as many parts as there is room for, up to a limit; their number, or -2 if one does not
        fit."""
        if task._mode == LOADED:
            return self._fill_load(task, limit)
        count = 0
        now = 0
        while self._free_count and task.active < task._depth and count < limit:
            if task._mode == BOUNCED and task._free_cells == 0:
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
            if task._mode == BOUNCED:
                data = self._take_cell(task)
                if task.template.direction == TO_DEVICE:
                    copy(self._region, data, task._user, place, nbytes)
            elif task._mode != CONSTANT:
                data += place
            offset = load_u64(task._offsets, 8 * item) + within
            slot = self._start(task.template, offset, nbytes, data, part, IN_TASK)
            if slot < 0:
                return MISFIT
            if task.counted:
                if now == 0:
                    now = ticks()
                store_u64(self._records, RECORD_BYTES * slot + BEGAN, now)
            if task._again_count:
                task._again_count -= 1
            else:
                task.started += 1
            task.active += 1
            count += 1
        return count

    @final
    def _fill_load(self, task: Task, limit: int) -> int:
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
        if limit < task.load.batch:
            limit = task.load.batch
        if room > limit and room - limit >= task.load.batch:  # or the rest would not begin
            room = limit
        if room > self._free_count:
            room = self._free_count
        if room > task._free_cells:
            room = task._free_cells
        if not task.load.begin(room):
            task.total = task.started
            return 0
        for _ in range(room):
            part = task.started
            data = self._take_cell(task)
            place = task.load.offset(part)
            if task.load.is_write(part):
                data += task._apart
                slot = self._start(task.other, place, task.item_bytes, data, part, IN_TASK)
            else:
                slot = self._start(task.template, place, task.item_bytes, data, part, IN_TASK)
            if slot < 0:
                return MISFIT
            store_u64(self._records, RECORD_BYTES * slot + BEGAN, task.load.now)
            task.started += 1
            task.active += 1
        return room

    @final
    def _start(self, template: Template, offset: int, nbytes: int, data: int, token: int, state: int) -> int:
        """Fill a free slot and offer its head; the slot, -1 if none is free, -2 if too long."""
        if self._free_count == 0:
            return FULL
        if state != IN_TASK:
            self._start_over()
        slot = self._next_free()
        record = RECORD_BYTES * slot
        base = self._slots_at + self._stride * slot
        header = self._header(slot)
        moved = template.data_bytes if template.data_bytes else nbytes
        same = (
            load_u32(self._records, record + KEY) == template.key
            and load_u64(self._records, record + NBYTES_AT) == nbytes
        )
        if same and template.direction != NO_DATA and load_u64(self._records, record + DATA) != data:
            same = self._segment(data, moved) == moved
            if same:
                self._move_data(slot, base, template, data)
        key = template.key
        if not same:
            laid = self._lay_out(slot, base, template, data, moved)
            if laid < 0:
                store_u32(self._records, record + KEY, 0)
                return MISFIT
            if laid > 1:
                key = 0  # next time too: only one data descriptor can be moved
        self._take_next_free()
        self._sequence += 1
        for i in range(template._patch_count):
            patch = PATCH_BYTES * i
            source = load_u16(template._patch, patch)
            value = self._sequence
            if source == OFFSET:
                value = offset
            elif source == NBYTES:
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
        store_u32(self._records, record + STATE, state)
        store_u32(self._records, record + OWNER, 0)
        store_u16(self._records, record + CHANGES, template.changes)
        store_u16(self._records, record + KIND, template.kind)
        store_u32(self._records, record + KEY, key)
        store_u64(self._records, record + NBYTES_AT, nbytes)
        store_u64(self._records, record + OFFSET_AT, offset)
        store_u64(self._records, record + DATA, data)
        store_u64(self._records, record + TOKEN, token)
        self._offer(slot)
        return slot

    @final
    def _header(self, slot: int) -> int:
        return load_u64(self._places, 16 * slot)

    @final
    def _response(self, slot: int) -> int:
        return load_u64(self._places, 16 * slot + 8)

    @final
    def _poison(self, slot: int) -> None:
        """Make the result of a slot one that no success can be."""
        if self._result_wide:
            store_u64(self._region, self._response(slot) + self._result_at, 0xFFFFFFFFFFFFFFFF)
        else:
            store_u8(self._region, self._response(slot) + self._result_at, 0xFF)

    @final
    def _lay_out(self, slot: int, base: int, template: Template, data: int, nbytes: int) -> int:
        """Write a slot's header and descriptors: the number of data segments, -1 if they are too many."""
        header = self._header(slot)
        copy(self._region, header, template._mem, 0, template.request_bytes)
        count = 0
        if template.direction != NO_DATA:
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
        if self._response_first and template.direction != TO_DEVICE:
            self._describe_response(slot, base, index, total)
            index += 1
        if count:
            flags = WRITE if template.direction == FROM_DEVICE else 0
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
            self._describe_ring(slot, table, 16 * total, INDIRECT, 0)
        return count

    @final
    def _move_data(self, slot: int, base: int, template: Template, data: int) -> None:
        """Point the one data descriptor of a slot, which is written already, elsewhere."""
        index = 2 if self._response_first and template.direction == FROM_DEVICE else 1
        address = self._iova(data)
        if self.indirect:
            store_u64(self._region, base + self._table_at + 16 * index, address)
        else:
            self._redirect(slot * self._chain + index, address)

    @final
    def _describe_response(self, slot: int, base: int, index: int, total: int) -> None:
        self._describe(slot, base, index, total, self._response(slot), self._response_bytes, WRITE)

    @final
    def _describe(
        self, slot: int, base: int, index: int, total: int, place: int, nbytes: int, flags: int
    ) -> None:
        """Write descriptor `index` of a slot's `total`, in its table or in the ring."""
        address = self._iova(place)
        if index + 1 < total:
            flags |= NEXT
        if self.indirect:
            entry = base + self._table_at + 16 * index
            store_u64(self._region, entry, address)
            store_u32(self._region, entry + 8, nbytes)
            if self.packed:  # no chain, whose order is that of the table (2.8.7)
                store_u16(self._region, entry + 12, 0)
                store_u16(self._region, entry + 14, flags & WRITE)
            else:
                store_u16(self._region, entry + 12, flags)
                store_u16(self._region, entry + 14, index + 1 if flags & NEXT else 0)
        else:
            first = slot * self._chain
            following = first + index + 1 if flags & NEXT else 0
            self._describe_ring(first + index, address, nbytes, flags, following)

    @final
    def _describe_ring(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        if self.packed:
            self._packed.describe(index, address, length, flags, following)
        else:
            self._split.describe(index, address, length, flags, following)

    @final
    def _redirect(self, index: int, address: int) -> None:
        if self.packed:
            self._packed.redirect(index, address)
        else:
            self._split.redirect(index, address)

    @final
    def _offer(self, slot: int) -> None:
        head = slot if self.indirect else slot * self._chain
        if self.packed:
            self._packed.offer(head)
        else:
            self._split.offer(head)

    @final
    def _publish(self) -> bool:
        wanted: bool = self._packed.publish() if self.packed else self._split.publish()
        return wanted

    @final
    def _arm(self) -> bool:
        if self._early_count:
            return False
        quiet: bool = self._packed.arm() if self.packed else self._split.arm()
        return quiet

    @final
    def _disarm(self) -> None:
        if self.packed:
            self._packed.disarm()
        else:
            self._split.disarm()

    @final
    def _ready(self) -> int:
        """How many one look may take: what is there. To wait for more, which arrives by and by, would keep
        what was taken from being answered, and the line where the device says so from the device. A packed
        ring does not tell."""
        ready: int = self.slots if self.packed else self._split.ready()
        ready += self._early_count
        return ready if ready < self.slots else self.slots  # none, where the memory is not ours any more

    @final
    def _reap(self) -> int:
        head: int = self._packed.reap() if self.packed else self._split.reap()
        return head

    @final
    def _iova(self, place: int) -> int:
        """Where the device finds a byte of the region."""
        return load_u64(self._iovas, 8 * (place >> self._shift)) + (place & self._page_mask)

    @final
    def _segment(self, place: int, nbytes: int) -> int:
        """How many of `nbytes` at `place` one descriptor may cover."""
        size = self._page_mask + 1 - (place & self._page_mask)
        if size > self.segment_bytes:
            size = self.segment_bytes
        return size if size < nbytes else nbytes

    @final
    def _collect(self, task: Task) -> int:
        """Take what the device has used; how many, or -1 if it broke the ring."""
        count = 0
        most = self._ready()
        self._now = 0
        while count < most:
            if self._early_count:
                self._early_count -= 1
                head = load_u16(self._early, 2 * self._early_count)
            else:
                head = self._reap()
            if head == NOTHING:
                break
            if head == FAULTY:
                return -1
            count += 1
            slot = head if self.indirect else head // self._chain
            record = RECORD_BYTES * slot
            result = self._result(slot)
            state = load_u32(self._records, record + STATE)
            if state == IN_TASK and result == 0:
                self._complete(task, record)
                self._release(slot)
            else:
                store_u64(self._records, record + RESULT, result)
                if state == IN_TASK:
                    self._deliver(task, record)  # it may turn out to be a success
                    store_u16(self._faults, 2 * self._fault_count, slot)
                    self._fault_count += 1
                elif state != AWAITED:
                    self._put_ended(slot)
                store_u32(self._records, record + STATE, ENDED)
        return count

    @final
    def _result(self, slot: int) -> int:
        place = self._response(slot) + self._result_at
        result = load_u64(self._region, place) if self._result_wide else load_u8(self._region, place)
        return result & self._result_mask

    @final
    def _complete(self, task: Task, record: int) -> None:
        self._deliver(task, record)
        if task._mode == LOADED:
            write = load_u16(self._records, record + KIND) == _WRITES
            task.load.complete(load_u64(self._records, record + BEGAN), write)
            task.finished += 1  # as `Task._count` does, but in another module that is a call
            task.active -= 1
            return
        if task.counted:
            if self._now == 0:
                self._now = ticks()
            began = load_u64(self._records, record + BEGAN)
            task.stats.count(
                task.template.kind, load_u64(self._records, record + NBYTES_AT), began, self._now
            )
        task._finish(load_u64(self._records, record + TOKEN), True)

    @final
    def _deliver(self, task: Task, record: int) -> None:
        """Copy what was read through a cell to the user's memory; the cell is free again."""
        if task._mode < BOUNCED:
            return
        data = load_u64(self._records, record + DATA)
        if task._mode == BOUNCED and task.template.direction == FROM_DEVICE:
            part = load_u64(self._records, record + TOKEN)
            item = part // task.parts
            place = item * task.item_bytes + (part - item * task.parts) * task.part_bytes
            copy(task._user, place, self._region, data, load_u64(self._records, record + NBYTES_AT))
        if task._apart and data >= task._base + task._apart:
            data -= task._apart
        last = task._first_cell + task._free_cells
        if last >= task._all_cells:
            last -= task._all_cells
        store_u64(task._cells, 8 * last, data)
        task._free_cells += 1

    # In which order slots are used matters to the device, which finds header, table and its own record of
    # each by its head: one after the other, processors fetch them before they are asked for. So slots are
    # used in the order in which they came back, but no more of them than were ever in flight at once, of one
    # task or of requests one by one. Cells too: so a slot has the same one again, whose address is there.

    @final
    def _start_over(self) -> None:
        """Begin with the first slot again, if all are free."""
        if self._free_count == self.slots:
            self._free_first = 0
            self._unused = self.slots

    @final
    def _next_free(self) -> int:
        """Which slot is used next, of those that are free, of which there are some."""
        if self._free_count == self._unused:
            return self.slots - self._unused
        return load_u16(self._free, 2 * self._free_first)

    @final
    def _take_next_free(self) -> None:
        if self._free_count == self._unused:
            self._unused -= 1
        else:
            self._free_first += 1
            if self._free_first == self.slots:
                self._free_first = 0
        self._free_count -= 1

    @final
    def _take_cell(self, task: Task) -> int:
        """Of the free cells, of which there are some, the one that has been for longest."""
        data = load_u64(task._cells, 8 * task._first_cell)
        task._first_cell += 1
        if task._first_cell == task._all_cells:
            task._first_cell = 0
        task._free_cells -= 1
        return data

    @final
    def _release(self, slot: int) -> None:
        store_u32(self._records, RECORD_BYTES * slot + STATE, FREE)
        last = self._free_first + self._free_count - self._unused
        if last >= self.slots:
            last -= self.slots
        store_u16(self._free, 2 * last, slot)
        self._free_count += 1

    @final
    def _next_ended(self) -> int:
        slot = load_u16(self._ended, 2 * self._ended_first)
        self._ended_first = (self._ended_first + 1) % self.slots
        self._ended_count -= 1
        return slot

    @final
    def _put_ended(self, slot: int) -> None:
        last = (self._ended_first + self._ended_count) % self.slots
        store_u16(self._ended, 2 * last, slot)
        self._ended_count += 1


if not cython.compiled:
    make_whole(Slots)
