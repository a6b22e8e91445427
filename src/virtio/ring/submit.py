"""Requests one by one from Python: one compiled call submits one, one hands out many that came back."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import cython

from virtio.errors import RequestError

if not cython.compiled:
    from virtio.ring._mem import load_acquire_u32, load_u16, load_u32, load_u64, store_u32, store_u64
    from virtio.ring._os import ticks
    from virtio.ring.buffer import Buffer
    from virtio.ring.codes import (
        AWAITED,
        BEGAN,
        KIND,
        NBYTES_AT,
        NOBODY,
        OWNER,
        RECORD_BYTES,
        RESULT,
        TOKEN,
    )
    from virtio.ring.requests import RequestQueue
    from virtio.ring.stats import Stats
    from virtio.ring.template import Template

if TYPE_CHECKING:
    from typing import TypeAlias

    from virtio.errors import DeviceError
    from virtio.ring.requests import Finished

    # The token of a request that is back, and its error, or None if all went well.
    Completion: TypeAlias = tuple[int, DeviceError | None]


class Geometry:
    """What one disk takes: shared by all that submit to it, changed when the disk changes.

    Sizes in bytes. `online` is false once the disk has gone.
    """

    def __init__(self) -> None:
        self.size = self.block_size = self.max_transfer = 0
        self.read_only = self.online = False
        self.limited = False  # how many requests there may be a second
        self.read: Template = None  # type: ignore[assignment]  # set with all the others
        self.write: Template = None  # type: ignore[assignment]


class Budget:
    """How many single requests of one disk are in one queue, and how many there may be."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.in_flight = 0


class Submitter:
    """One owner's single requests to one disk, on a queue that its thread has.

    Everything that is not the usual case is the subclass's: `_turn` waits for the queue, `_examine`
    raises what is wrong with a request or says whether it has to wait, `_judge` explains a bad result.
    """

    def __init__(
        self, queue: RequestQueue, owner: int, own: int, geometry: Geometry, budget: Budget, stats: Stats
    ) -> None:
        """`owner` is whose requests are polled for, `own` whose those of `attempt` are."""
        self.queue = queue
        self.owner, self.own = owner, own
        self.geometry = geometry
        self.budget = budget
        self.stats = stats
        self._pool: object = None  # whose buffers these requests use; None: closed
        self._done: deque[Completion] = deque()  # without having been with the device
        self._later: list[tuple[float, int]] = []  # requests to send again: when, and which slots
        self._tries: dict[int, int] = {}  # of those, by token
        self._error: DeviceError | None = None  # of the request that was judged last

    # What the subclass adds.

    def _turn(self) -> None:
        """Wait until nobody else is inside a call on the queue."""
        raise NotImplementedError

    def _alive(self) -> None:
        """Raise what has ended the device, or the disk."""
        raise NotImplementedError

    def _examine(
        self, template: Template, offset: int, nbytes: int, most: int, buffer: Buffer | None, at: int
    ) -> bool:
        """Raise what is wrong with a request; else whether it may be sent now."""
        raise NotImplementedError

    def _admit(self, kind: int, nbytes: int) -> bool:
        """Whether a request may be sent now by the limits of its disk; else somebody is woken up later."""
        raise NotImplementedError

    def _judge(self, slot: int, finished: Finished) -> bool:
        """Explain a bad result, or send the request again; whether it is back, with `_error`."""
        raise NotImplementedError

    def _send_again(self) -> None:
        """Send those requests again whose pause is over."""
        raise NotImplementedError

    def _wake(self) -> None:
        """Wake up who sleeps on the completion descriptor, to look at everything once more."""
        raise NotImplementedError

    # The compiled calls. While one is under way, nobody else is inside a call on the queue.

    def _begin(self) -> int:
        queue = self.queue
        while True:
            if queue.entered:
                self._turn()
            queue.entered = True  # first, and `taken` looked at second: a lease does it the other way round
            if not queue.taken:
                if queue.renounced:
                    self._settle_renounced()
                return 0
            queue.entered = False
            self._turn()

    def _settle_renounced(self) -> None:
        try:
            self.queue.settle_renounced()
        except BaseException:
            self.queue.entered = False
            raise

    def submit_read(self, offset: int, into: Buffer, token: int, *, at: int = 0, nbytes: int = -1) -> bool:
        """Begin to read into a buffer of `Controller.buffer`, or a part of it; false: not now.

        The queue, or what the disk takes at a time, is full, or bytes of a cancelled write are still to
        land there: `poll`, and try again. `token`, a number from 0 to 2**64 - 1, comes back from `poll`.
        """
        return self.submit(self.geometry.read, offset, into, at, nbytes, token)

    def submit_write(self, offset: int, data: Buffer, token: int, *, at: int = 0, nbytes: int = -1) -> bool:
        """Begin to write from a buffer of `Controller.buffer`, or a part of it; false: not now."""
        return self.submit(self.geometry.write, offset, data, at, nbytes, token)

    def submit(
        self, template: Template, offset: int, buffer: Buffer, at: int, nbytes: int, token: int
    ) -> bool:
        """Queue a transfer between the disk at `offset` and the buffer at `at`; for `Channel` to call."""
        if nbytes < 0:
            nbytes = buffer.nbytes
            nbytes -= at
        self._begin()
        try:
            if not self._is_plain(template, offset, buffer, at, nbytes) and not self._examine(
                template, offset, nbytes, self.geometry.max_transfer, buffer, at
            ):
                return False
            return self._send(template, offset, nbytes, buffer.offset + at, token, buffer)
        finally:
            self.queue.entered = False

    def _is_plain(self, template: Template, offset: int, buffer: Buffer, at: int, nbytes: int) -> bool:
        """Whether there is nothing about a transfer that would have to be looked at."""
        geometry = self.geometry
        room = buffer.nbytes
        return not (
            not geometry.online
            or buffer.closed
            or buffer.pool is not self._pool
            or at < 0
            or nbytes <= 0
            or at > room - nbytes
            or nbytes > geometry.max_transfer
            or offset < 0
            or offset > geometry.size - nbytes
            or (offset | nbytes) & (geometry.block_size - 1)
            or (template.changes and (geometry.read_only or self.queue.orphan_changes != 0))
        )

    def attempt(self, template: Template, offset: int, buffer: Buffer, nbytes: int, spin_ns: int) -> int:
        """Do a transfer of the buffer's first bytes, spinning for at most so long; for `Channel` to call.

        1: it is done. 0: it is under way, or failed: `answer` will say. -1: it was not begun, because there
        is something about it that has to be looked at.
        """
        queue = self.queue
        self._begin()
        try:
            if (
                not self._is_plain(template, offset, buffer, 0, nbytes)
                or self.geometry.limited
                or self.budget.in_flight >= self.budget.depth
                or queue._free_count == 0
                or queue.broken
            ):
                return -1
            slot = queue._start(template, offset, nbytes, buffer.offset, 0, AWAITED)
            if slot < 0:
                return -1
            record = RECORD_BYTES * slot
            buffer.busy += 1
            queue._kept[slot] = buffer
            store_u32(queue._records, record + OWNER, self.own)
            store_u64(queue._records, record + BEGAN, ticks() if self.stats.on else 0)
            self.budget.in_flight += 1
            with cython.nogil:
                done = queue.await_slot(slot, spin_ns)
            if done:
                self._close(slot)
            if queue.orphans:
                queue.sweep()  # some may have come back with it
            return 1 if done else 0
        finally:
            queue.entered = False

    def _close(self, slot: int) -> None:
        """A request that went well is over."""
        if self.stats.on:
            self._count(slot, ticks())
        self.queue._release(slot)
        self.queue._let_go(slot)
        self.budget.in_flight -= 1

    def answer(self) -> Finished | bool:
        """What became of what `attempt` began: false as long as it is under way, true when it is done, else
        what the device said; for `Channel` to call."""
        queue = self.queue
        self._begin()
        try:
            if queue.awaited:
                queue.awaited = 0
                queue.disarm()
            queue.kick()
            queue.look()
            said: Finished | bool = False
            for _ in range(queue._ended_count):
                slot = queue._next_ended()
                whose = load_u32(queue._records, RECORD_BYTES * slot + OWNER)
                if whose == NOBODY:
                    queue._lose_orphan(slot)
                elif whose != self.own:
                    queue._put_ended(slot)
                elif load_u64(queue._records, RECORD_BYTES * slot + RESULT) == 0:
                    self._close(slot)
                    said = True
                else:
                    said = queue._report(slot)
                    queue._release(slot)
                    queue._let_go(slot)
                    self.budget.in_flight -= 1
            if said is False and (queue.broken or load_acquire_u32(queue._stop, 0) or self._pool is None):
                self._alive()
            return said
        finally:
            queue.entered = False

    def credit(self, template: Template, nbytes: int, began: int) -> None:
        """Count a request that turned out to have gone well; for `Channel` to call."""
        if self.stats.on:
            self.stats.count(template.kind, nbytes, began, ticks())

    def give_up(self) -> None:
        """Wait no more for what `attempt` may have begun, and which may take effect yet; for `Channel` to
        call. Waits for nobody: if somebody has the queue, whoever is next sees to it."""
        queue = self.queue
        queue.renounce(self.own, self.budget)
        if not queue.entered:
            queue.entered = True
            if not queue.taken:
                self._settle_renounced()
            queue.entered = False

    def submit_plain(
        self, template: Template, offset: int, nbytes: int, most: int, data: int, token: int
    ) -> bool:
        """Queue a request without data of its own; for `Channel` to call."""
        self._begin()
        try:
            if not self._examine(template, offset, nbytes, most, None, 0):
                return False
            return self._send(template, offset, nbytes, data, token, None)
        finally:
            self.queue.entered = False

    def _send(
        self, template: Template, offset: int, nbytes: int, data: int, token: int, buffer: Buffer | None
    ) -> bool:
        if self.budget.in_flight >= self.budget.depth:
            return False
        if self.geometry.limited and (self.queue._free_count == 0 or not self._admit(template.kind, nbytes)):
            return False
        if buffer is not None:
            buffer.busy += 1
        try:
            began = ticks() if self.stats.on else 0
            sent = self.queue.submit(template, offset, nbytes, data, token, self.owner, buffer, began)
        except RequestError:
            if buffer is not None:
                buffer.busy -= 1
            raise
        if sent:
            self.budget.in_flight += 1
        elif buffer is not None:
            buffer.busy -= 1
        return sent

    def kick(self) -> None:
        """Show the device what was submitted; `poll` and `arm` do so too."""
        self._begin()
        self.queue.kick()
        self.queue.entered = False

    def cancel(self, token: int) -> bool:
        """Give up waiting for a request, which may still take effect; false if it is not in flight.

        Its buffer stays busy until the device has returned it, and what it writes gets no other write
        before that. One that was to be sent again is not.
        """
        self._begin()
        self.queue.kick()
        found = self.queue.forsake(self.owner, token) or self._unsend(token)
        self.queue.entered = False
        if found:
            self.budget.in_flight -= 1
            self._tries.pop(token, None)
        return found

    def _unsend(self, token: int) -> bool:
        queue = self.queue
        for later in self._later:
            slot = later[1]
            if load_u64(queue._records, RECORD_BYTES * slot + TOKEN) == token:
                self._later.remove(later)
                queue.drop(slot)
                return True
        return False

    def poll(self, limit: int = 64) -> list[Completion]:
        """Show the device what was submitted, and hand out at most `limit` requests that are back.

        Oldest first, each with its token and its error or None. Never blocks.
        """
        self._begin()
        try:
            return self._poll(limit)
        finally:
            self.queue.entered = False

    def _poll(self, limit: int) -> list[Completion]:
        queue = self.queue
        if queue.awaited:
            if queue.awaited != self.owner:  # whose answers, and wake-up, may be taken here
                self._wake()
            queue.awaited = 0
            queue.disarm()
        queue.kick()
        queue.look()
        if queue.broken or load_acquire_u32(queue._stop, 0) or not self.geometry.online or self._pool is None:
            try:
                self._alive()
            except BaseException:  # nobody will ask for what is back
                self._later.clear()
                self.budget.in_flight -= queue.abandon(self.owner)
                raise
        if self._later:
            self._send_again()
        now = 0
        completions: list[Completion] = []
        while self._done and len(completions) < limit:
            completions.append(self._done.popleft())
        passed = False
        for _ in range(queue._ended_count):
            full = len(completions) >= limit
            if full and not passed:
                break  # else the rest is passed too: what was passed would be behind it, and so not in order
            slot = queue._next_ended()
            whose = load_u32(queue._records, RECORD_BYTES * slot + OWNER)
            if whose == self.owner and not full:
                token = load_u64(queue._records, RECORD_BYTES * slot + TOKEN)
                if load_u64(queue._records, RECORD_BYTES * slot + RESULT) == 0:
                    if self.stats.on:
                        if now == 0:
                            now = ticks()
                        self._count(slot, now)
                    queue._release(slot)
                    queue._let_go(slot)
                    self.budget.in_flight -= 1
                    if self._tries:
                        self._tries.pop(token, None)
                    completions.append((token, None))
                elif self._judged(slot, completions):
                    queue._release(slot)
                    queue._let_go(slot)
                    self.budget.in_flight -= 1
                    if self._error is not None and self.stats.on:
                        self.stats.failed += 1
                    elif self.stats.on:
                        self._count(slot, ticks())
                    completions.append((token, self._error))
                    self._error = None
            elif whose == NOBODY:
                queue._lose_orphan(slot)
            else:
                queue._put_ended(slot)
                passed = True
        return completions

    def _judged(self, slot: int, completions: list[Completion]) -> bool:
        try:
            return self._judge(slot, self.queue._report(slot))
        except BaseException:  # Ctrl-C: all are handed out next time
            self._done.extendleft(reversed(completions))
            self.queue._put_ended(slot)
            raise

    def _count(self, slot: int, now: int) -> None:
        record = RECORD_BYTES * slot
        self.stats.count(
            load_u16(self.queue._records, record + KIND),
            load_u64(self.queue._records, record + NBYTES_AT),
            load_u64(self.queue._records, record + BEGAN),
            now,
        )

    def arm(self) -> bool:
        """Show the device what was submitted, and have it signal the completion descriptor.

        True: nothing is back yet, and it is safe to sleep on the descriptor. False: `poll` first.
        """
        self._begin()
        try:
            queue = self.queue
            if queue.broken or load_acquire_u32(queue._stop, 0) or self._pool is None:
                self._alive()
            queue.kick()
            self._drain()
            if queue.woken:
                queue.woken = False
                return False
            if self._done or self._later or queue._ended_count or not queue.arm():
                return False
            queue.awaited = self.owner
            return True
        finally:
            self.queue.entered = False

    def _drain(self) -> None:
        """Take what signals there are on the completion descriptor."""
        raise NotImplementedError
