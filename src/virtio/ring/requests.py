"""The request queue: slots and their loop, and what is rarer: single requests, faults, orphans, a reset."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cython

from virtio.errors import RequestError

if not cython.compiled:
    from virtio.ring._mem import load_u16, load_u32, load_u64, null, store_u16, store_u32, store_u64
    from virtio.ring._os import make_whole
    from virtio.ring.codes import (
        BEGAN,
        BROKEN,
        CHANGES,
        ENDED,
        IN_TASK,
        MISFIT,
        NBYTES_AT,
        NO_DATA,
        NOBODY,
        OFFSET_AT,
        OWNER,
        RECORD_BYTES,
        RESULT,
        SINGLE,
        STATE,
        TOKEN,
    )
    from virtio.ring.doorbell import Doorbell
    from virtio.ring.slots import Slots
    from virtio.ring.task import Task
    from virtio.ring.template import Template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.ring.buffer import Buffer
    from virtio.ring.submit import Budget


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


class RequestQueue(Slots):
    """A queue of requests, of a task or of somebody; one thread at a time, which its owner sees to.

    A request whose caller does not wait any more is an *orphan*: `orphans` counts them, and
    `orphan_changes` those that may yet change the disk.
    """

    def kick(self) -> None:
        """Show the device what was submitted, and notify it if it asked for that."""
        if self._publish():
            self._doorbell.ring()

    def look(self) -> None:
        """Take what the device has used, for `poll` and `sweep`; not amid a task, whose `run` does it."""
        if self._collect(self._nothing) < 0:
            self.broken = True

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
        if reason == BROKEN:
            self.broken = True
        return reason

    def rewind(self) -> None:
        """Begin anew with a device that was reset, which may be while a task is paused.

        What it had is offered again, but for orphans, which are done with, and for requests of nobody's
        channel (owner 0), which come back without a result: nobody knows what became of them. What it
        had used before is not lost.
        """
        before = [load_u16(self._early, 2 * i) for i in range(self._early_count)]
        found = []
        while (head := self._reap()) >= 0:
            found.append(head)
        found.reverse()  # the oldest is taken from the end
        self._early_count = 0
        for head in found + before:
            store_u16(self._early, 2 * self._early_count, head)
            self._early_count += 1
        back = {*found, *before}
        self.ring.rewind()
        self.broken = False
        for slot in range(self.slots):
            record = RECORD_BYTES * slot
            state = load_u32(self._records, record + STATE)
            head = slot if self.indirect else slot * self._chain
            if state not in (IN_TASK, SINGLE) or head in back:
                continue
            owner = load_u32(self._records, record + OWNER)
            if state == SINGLE and owner == NOBODY:
                self._lose_orphan(slot)
            elif state == SINGLE and owner == 0:
                store_u64(self._records, record + RESULT, self._result_mask)
                store_u32(self._records, record + STATE, ENDED)
                self._put_ended(slot)
            else:
                self._poison(slot)
                self._offer(slot)

    def submit(
        self,
        template: Template,
        offset: int,
        nbytes: int,
        data: int,
        token: int,
        owner: int = 0,
        kept: Buffer | None = None,
        began: int = 0,
    ) -> bool:
        """Put one request in a slot, unseen by the device until `kick`; false when none is free.

        `data` is where in the region its data is; `token` comes back from `poll` for its `owner`.
        `kept`, which has been told to `hold`, is let go of when the request is back. `began` is as in
        `Finished`.
        """
        if self._free_count == 0:
            return False
        if template.direction != NO_DATA:
            self._check_data(data + nbytes)
        slot = self._start(template, offset, nbytes, data, token, SINGLE)
        if slot == MISFIT:
            raise RequestError(
                f"{nbytes} bytes do not fit in {self.segments} segments of {self.segment_bytes}"
            )
        if slot < 0:
            return False
        store_u32(self._records, RECORD_BYTES * slot + OWNER, owner)
        store_u64(self._records, RECORD_BYTES * slot + BEGAN, began)
        self._kept[slot] = kept
        return True

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
            whose = load_u32(self._records, RECORD_BYTES * slot + OWNER)
            if whose == NOBODY:
                self._lose_orphan(slot)
            elif whose == owner and len(finished) < limit:
                finished.append(self._take(slot))
                self._let_go(slot)
            else:
                self._put_ended(slot)
        return finished

    @property
    def clogged(self) -> bool:
        """Whether all slots are those of requests that are back, and that nobody has polled for."""
        return bool(self._ended_count == self.slots > 0)

    def sweep(self) -> bool:
        """Let go of the orphans that were found to be back; whether there were any. Never blocks."""
        before = self.orphans
        self._hand_out(0, 0)
        return bool(self.orphans < before)

    def _lose_orphan(self, slot: int) -> None:
        self.orphans -= 1
        if load_u16(self._records, RECORD_BYTES * slot + CHANGES):
            self.orphan_changes -= 1
        self.drop(slot)

    def _let_go(self, slot: int) -> None:
        kept = self._kept[slot]
        if kept is not None:
            self._kept[slot] = None
            kept.let_go()

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
            if load_u32(self._records, RECORD_BYTES * slot + STATE) == IN_TASK:
                self._orphan(slot)
                self._kept[slot] = kept
                count += 1
        return count

    def abandon(self, owner: int, kept: Kept | None = None) -> int:
        """Make orphans of all single requests of an owner, who wants no answers any more.

        How many there were. Those that are in flight use `kept`, which counts them, or what they had; those
        that are back are over, also if they were to be sent again.
        """
        count = 0
        for _ in range(self._ended_count):
            slot = self._next_ended()
            if load_u32(self._records, RECORD_BYTES * slot + OWNER) == owner:
                self.drop(slot)
                count += 1
            else:
                self._put_ended(slot)
        for slot in range(self.slots):
            record = RECORD_BYTES * slot
            mine = load_u32(self._records, record + OWNER) == owner
            if mine and load_u32(self._records, record + STATE) == SINGLE:
                self._orphan(slot)
                if kept is not None:
                    self._kept[slot] = kept
                    kept.count += 1
                count += 1
            elif mine and owner and load_u32(self._records, record + STATE) == ENDED:
                self.drop(slot)
                count += 1
        return count

    def drop(self, slot: int) -> None:
        """Nobody wants what a request that is back, and handed out, has brought."""
        self._release(slot)
        self._let_go(slot)

    def renounce(self, owner: int, budget: Budget) -> None:
        """Have all single requests of an owner abandoned, off his budget: before anything else that is done
        with this queue. From the owner's thread, at any time, whoever has the queue."""
        self._renounced.append((owner, budget))
        self.renounced = True

    def settle_renounced(self) -> None:
        """Do what `renounce` asked for; for who has the queue."""
        self.renounced = False
        while self._renounced:
            owner, budget = self._renounced.pop()
            budget.in_flight -= self.abandon(owner)
        self.kick()  # what was never shown to the device would never come back

    def forsake(self, owner: int, token: int) -> bool:
        """Make an orphan of one single request; false if it is not in flight."""
        for slot in range(self.slots):
            record = RECORD_BYTES * slot
            if (
                load_u32(self._records, record + STATE) == SINGLE
                and load_u64(self._records, record + TOKEN) == token
                and load_u32(self._records, record + OWNER) == owner
            ):
                self._orphan(slot)
                return True
        return False

    def _orphan(self, slot: int) -> None:
        record = RECORD_BYTES * slot
        store_u32(self._records, record + STATE, SINGLE)
        store_u32(self._records, record + OWNER, NOBODY)
        self.orphans += 1
        if load_u16(self._records, record + CHANGES):
            self.orphan_changes += 1

    def overlaps_orphan(self, offset: int, nbytes: int) -> bool:
        """Whether an orphan may yet change these bytes, of whichever disk."""
        for slot in range(self.slots):
            record = RECORD_BYTES * slot
            begin = load_u64(self._records, record + OFFSET_AT)
            if (
                load_u32(self._records, record + OWNER) == NOBODY
                and load_u32(self._records, record + STATE) == SINGLE
                and load_u16(self._records, record + CHANGES)
                and begin < offset + nbytes
                and offset < begin + load_u64(self._records, record + NBYTES_AT)
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
                if load_u32(self._records, RECORD_BYTES * slot + STATE) == SINGLE
                and load_u32(self._records, RECORD_BYTES * slot + OWNER) == NOBODY
            )
        ]

    def detach(self) -> None:
        """Let go of the shared memory, after the device has; only `stop` may be called then."""
        self.stop()
        self.ring.detach()
        self._doorbell = Doorbell()  # what it was may be memory of the device
        self.slots = self._free_first = self._free_count = self._unused = 0
        self._fault_count = self._ended_count = self._early_count = 0
        self._buffer = None
        self._region = null()
        self._region_view = memoryview(b"")

    def _take(self, slot: int) -> Finished:
        self._release(slot)  # first: a Ctrl-C must not lose it
        return self._report(slot)

    def _report(self, slot: int) -> Finished:
        record = RECORD_BYTES * slot
        begin = self._response(slot)
        response = bytes(self._region_view[begin : begin + self._response_bytes])
        return Finished(
            load_u64(self._records, record + TOKEN),
            load_u64(self._records, record + RESULT),
            response,
            load_u64(self._records, record + BEGAN),
        )

    def again(self, slot: int) -> None:
        """Offer a request that came back once more, unseen by the device until `kick`."""
        self._poison(slot)
        store_u32(self._records, RECORD_BYTES * slot + STATE, SINGLE)
        self._offer(slot)

    def place(self, slot: int) -> tuple[int, bool]:
        """Of a single request that came back: the byte on the disk where it began, and whether it
        was a transfer."""
        record = RECORD_BYTES * slot
        return load_u64(self._records, record + OFFSET_AT), self._kept[slot] is not None

    def owners(self) -> list[int]:
        """Whose requests were found to be back."""
        found = []
        for step in range(self._ended_count):
            slot = load_u16(self._ended, 2 * ((self._ended_first + step) % self.slots))
            owner = load_u32(self._records, RECORD_BYTES * slot + OWNER)
            if owner not in found:
                found.append(owner)
        return found


if not cython.compiled:
    make_whole(RequestQueue)
