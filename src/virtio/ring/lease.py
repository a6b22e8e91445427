"""Who may use a request queue, and how to wait for it: one thread at a time, every wait bounded.

Compiled, as no signal handler runs between two steps of compiled code: Ctrl-C leaves no lock taken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from typing import TYPE_CHECKING, TypeAlias

from virtio.errors import (
    ChannelInUse,
    ClosedError,
    DeviceError,
    ProtocolError,
    QueueFullError,
    RequestError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.ring import eventfd
from virtio.ring.codes import BROKEN, DONE, FAULT, FROM_DEVICE, IDLE, LOST, PAUSED, TICK, UNFIT
from virtio.ring.requests import Finished, Kept, RequestQueue
from virtio.ring.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtio.ring.buffer import Buffer

# What a bad result means: the result, where on the disk, whether it was a transfer of data.
Explain: TypeAlias = "Callable[[Finished, int, bool], DeviceError | None]"

log = logging.getLogger("virtio.ring")

_RETIRE_S = 5.0
_TURN_S = 10.0  # how long a caller waits for one who has borrowed its lease
_PARK_S = 0.001  # between two looks whether a call has paused
_GIVE_WAY_S = 0.01  # how long a caller lets somebody borrow his queue, who may be asleep
_ENTERED_S = 1.0  # and for one who submits: that takes microseconds
_IN_USE = "another thread is inside a call on this queue: open a channel in each thread"
_TRIES = 8  # of a request that a transient error hits
_PAUSE_S = 0.001  # before the second try; longer before each further one
_FOREVER_S = 1e6  # longer than poll(2) can wait, and anybody
# How long a compiled loop goes on at most. It comes back to the interpreter for 10 to 20 us, while all that
# is in flight waits. In the main thread it has to, for a Ctrl-C, and where there are orphans, which hold
# slots; in others it is for what `watch` says, which is in no such hurry.
_SLICE_NS = 50_000_000
_SLICE_ELSEWHERE_NS = 1_000_000_000
_SHARE = 16  # of the time that is left until the deadline, which moves where `watch` sees progress
_SLICE_LEAST_NS = 1_000_000  # for what was sent at the last moment


_REASONS = {
    DONE: "done",
    TICK: "still at it",
    IDLE: "nothing to do but wait",
    FAULT: "a bad result",
    BROKEN: "broken",
    LOST: "lost",
    PAUSED: "paused",
    UNFIT: "does not fit",
}


def deadline_in(seconds: float | None) -> int | None:
    """The moment, on the monotonic clock in nanoseconds, that is so many seconds away; None: never."""
    if seconds is None or seconds > _FOREVER_S:
        return None
    return time.monotonic_ns() + int(seconds * 1e9)


def _slice(deadline: int | None, moment: int | None, hurry: bool) -> int:
    """How many ns a compiled loop may go on in this thread, if something is to be done at that moment."""
    now, longest = time.monotonic_ns(), _SLICE_NS
    if not hurry and threading.get_ident() != threading.main_thread().ident:
        left = _SLICE_ELSEWHERE_NS if deadline is None else (deadline - now) // _SHARE
        longest = max(_SLICE_NS, min(_SLICE_ELSEWHERE_NS, left))
    return longest if moment is None else min(longest, max(_SLICE_LEAST_NS, moment - now))


def _earlier(deadline: int | None, seconds: float | None) -> int | None:
    """The deadline, or the moment in so many seconds if that comes first."""
    if seconds is None:
        return deadline
    moment = deadline_in(seconds)
    return moment if deadline is None or moment is None else min(deadline, moment)


def _let_go(buffers: Iterable[Buffer]) -> None:
    for buffer in buffers:
        buffer.let_go()


class Life:
    """Whether the device `name` is still there, for all who wait for it. Owns an eventfd.

    `end` may be called from any thread, and counts once; from then on `fd` is readable, compiled
    loops come back, and `check` raises.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = eventfd.make_eventfd()
        self.error: VirtioError | None = None
        self.on_end: Callable[[VirtioError], None] = lambda error: None  # called once, in any thread
        self._queues: list[RequestQueue] = []
        self._lock = threading.Lock()
        _alive.add(self)

    def adopt(self, queue: RequestQueue) -> None:
        """Stop this queue too when the life ends."""
        with self._lock:
            self._queues.append(queue)
            if self.error is not None:
                queue.stop()

    def end(self, error: VirtioError) -> None:
        """The device is no more, and this is what everybody is told."""
        with self._lock:
            if self.error is not None:
                return
            self.error = type(error)(*error.args)  # a copy: the traceback holds on to everything
            for queue in self._queues:
                queue.stop()
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)
        self.on_end(error)

    def check(self) -> None:
        """Raise what ended this life, each time as a new exception."""
        if self.error is not None:
            raise type(self.error)(*self.error.args) from None

    def signal(self, fd: int) -> None:
        """Signal an eventfd of the device's, in any thread, if it is there yet: else the number may be
        another file's."""
        with self._lock:
            if self.error is not None:
                return
            try:
                own = os.dup(fd)
            except OSError:  # no descriptor is left: then with the lock
                eventfd.signal(fd)
                return
        try:
            eventfd.signal(own)  # without the lock: a hostile peer may make even this block
        finally:
            os.close(own)

    def drain(self, fd: int) -> None:
        """Take what was signalled, in the same way."""
        with self._lock:
            if self.error is None:
                eventfd.drain(fd)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until this life ends; then raise what ended it."""
        end = time.monotonic() + seconds
        poll = select.poll()
        with self._lock:
            self.check()
            poll.register(self.fd, select.POLLIN)
        poll.poll(max(0.0, end - time.monotonic()) * 1000)
        self.check()

    def close(self) -> None:
        """End it as closed, and close the descriptor; idempotent."""
        self.end(ClosedError("the controller was closed"))
        with self._lock:
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _forked(self) -> None:
        """In the child of a fork: the parent keeps the device, and its descriptors stay silent."""
        self._lock = threading.Lock()
        self.error = ClosedError(
            f"this controller belongs to the parent of process {os.getpid()}: attach again here"
        )
        for queue in self._queues:
            queue.stop()


_alive: weakref.WeakSet[Life] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for life in list(_alive):
        life._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)


class Sole:
    """For a `with` block that one thread at a time may be inside; ChannelInUse, so worded, for others."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise ChannelInUse(self._words)

    def __exit__(self, *exc: object) -> None:
        self._lock.release()


class Lease:
    """A request queue in the hands of one caller at a time. Closes `completion_fd`'s owner not.

    `late`, if set, is called when a call has timed out and left requests in flight.
    """

    def __init__(self, queue: RequestQueue, life: Life, completion_fd: int) -> None:
        self.queue = queue
        self.life = life
        self.completion_fd = completion_fd
        self.told = log.isEnabledFor(logging.DEBUG)  # once: what is not asked for costs nothing
        self.late: Callable[[Lease], None] | None = None
        self._lock = threading.Lock()
        self._gate = threading.Condition()  # of those who pause it, and of the call that is amid it then
        self._pausing = self._parked = False
        self._inside = False  # a caller, not somebody who has borrowed it
        self._wanting: set[int] = set()  # threads that want to borrow it
        self._poll = select.poll()
        self._poll.register(completion_fd, select.POLLIN)
        self._poll.register(life.fd, select.POLLIN)
        life.adopt(queue)
        if not self.told:
            queue.wake_by(completion_fd, life.fd)

    def wake(self) -> None:
        """Wake up who sleeps on the completion descriptor; from any thread."""
        self.life.signal(self.completion_fd)

    def drain(self) -> None:
        """Take what was signalled on the completion descriptor."""
        self.life.drain(self.completion_fd)

    def __enter__(self) -> Lease:
        self.life.check()
        if self._wanting:
            self._give_way()
        if not self._lock.acquire(blocking=False) and (
            self._inside or not self._lock.acquire(timeout=_TURN_S)
        ):
            raise ChannelInUse(_IN_USE)
        try:
            self.life.check()
            self._enter(None)
        except BaseException:
            self._lock.release()
            raise
        self._inside = True
        return self

    def _give_way(self) -> None:
        """Let somebody borrow the queue between two calls that follow each other at once."""
        end = time.monotonic() + _GIVE_WAY_S
        while self._wanting and time.monotonic() < end:
            time.sleep(0)

    def _enter(self, deadline: int | None) -> None:
        """Keep everybody from submitting one by one, who holds no lock; for who holds it."""
        self.queue.taken = True
        if self.queue.entered:
            end = time.monotonic() + _ENTERED_S
            while self.queue.entered:
                if time.monotonic() > end or (deadline is not None and time.monotonic_ns() >= deadline):
                    self.queue.taken = False
                    raise ChannelInUse(_IN_USE)
                time.sleep(0)
        if self.queue.renounced:
            self.queue.settle_renounced()

    def wait_turn(self, deadline: int | None) -> None:
        """Wait for whoever has borrowed the queue; ChannelInUse if a caller has it, or RequestTimeout."""
        if self._inside:
            raise ChannelInUse(_IN_USE)
        with self.borrow(deadline):
            pass

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        late = kind is not None and issubclass(kind, RequestTimeout) and self.queue.orphans > 0
        self._inside = False
        self._leave()
        if late and self.late is not None:
            self.late(self)

    @contextlib.contextmanager
    def borrow(self, deadline: int | None) -> Iterator[None]:
        """Use the queue between two calls of its owner's, who waits meanwhile; RequestTimeout if there is
        no such moment before the deadline."""
        self.life.check()
        left = -1 if deadline is None else max(0.0, (deadline - time.monotonic_ns()) / 1e9)
        self._wanting.add(threading.get_ident())
        try:
            if not self._lock.acquire(timeout=left):
                raise RequestTimeout(f"a queue of {self.life.name} was never idle")
        finally:
            self._wanting.discard(threading.get_ident())
        try:
            self.life.check()
            self._enter(deadline)
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        try:
            self.queue.taken = False
            if self.queue.awaited:  # by somebody whose wake-up we may have taken
                self.wake()
        finally:
            self._lock.release()

    def pause(self, deadline: int | None) -> None:
        """Have the queue to oneself, even amid a call, which waits for `resume`; RequestTimeout.

        One at a time, which the caller sees to.
        """
        with self._gate:
            self._pausing = True
        try:
            self.queue.pause(True)
            self.wake()  # who sleeps wakes up and sees
            while not self._lock.acquire(timeout=_PARK_S):
                with self._gate:
                    if self._parked:  # it keeps the lock: nobody else may have the queue amid its call
                        return
                if deadline is not None and time.monotonic_ns() >= deadline:
                    raise RequestTimeout(f"a call on a queue of {self.life.name} does not pause")
            try:
                self._enter(deadline)
            except BaseException:
                self._lock.release()
                raise
        except BaseException:
            self._go_on()
            raise

    def resume(self) -> None:
        """Let go of what `pause` took; calls go on."""
        with self._gate:
            parked = self._parked
        self._go_on()
        if not parked:
            self._leave()

    def _go_on(self) -> None:
        self.queue.pause(False)
        with self._gate:
            self._pausing = False
            self._gate.notify_all()

    def _park(self) -> None:
        """Amid a call: let somebody have the queue who wants it paused. Ctrl-C waits until he is done."""
        interrupt = None
        with self._gate:
            self._parked = True
            while self._pausing:
                try:
                    self._gate.wait()
                except BaseException as error:
                    interrupt = error
            self._parked = False
        if interrupt is not None:
            raise interrupt

    def retire(self) -> None:
        """Wait until no call is inside, and let none in any more; the life must have ended."""
        end = time.monotonic() + _RETIRE_S
        came_back = self._lock.acquire(timeout=_RETIRE_S)
        while self.queue.entered and time.monotonic() < end:  # by who holds no lock
            time.sleep(0)
        if not came_back or self.queue.entered:
            raise RequestTimeout("a call on this queue did not come back at the end of its device")

    def forget(self) -> None:
        """Let go of what was kept for a device that is no more."""
        self.queue.forget()

    def execute(
        self,
        task: Task,
        deadline: int | None,
        spin_ns: int,
        explain: Explain,
        watch: Callable[[], int | None] | None = None,
    ) -> DeviceError | None:
        """Run a task to its end; the error of its first failed part by position, or None.

        To be called inside `with lease`. `explain` says what a bad result means. On a time-out, a lost
        device or Ctrl-C the requests in flight become orphans: they keep their slots and the task's
        buffers until the device returns them, and nothing is written by this queue before that. `watch`,
        if given, is called between two slices of the compiled loop, and says what the deadline is from then
        on.
        """
        for buffer in task.buffers:
            buffer.check()
        self.queue.check(task)
        if self.queue.orphan_changes and task.template.direction != FROM_DEVICE:
            self.settle(deadline, changes=True)
        for buffer in task.buffers:
            buffer.hold()
        try:
            return self._drive(task, deadline, spin_ns, explain, watch)
        finally:
            kept = Kept(0, task.buffers, task)
            if task.active:
                kept.count = self.queue.abandon_task(kept)
            if not kept.count:
                _let_go(task.buffers)

    def _drive(
        self,
        task: Task,
        deadline: int | None,
        spin_ns: int,
        explain: Explain,
        watch: Callable[[], int | None] | None,
    ) -> DeviceError | None:
        first, error = task.total, None
        tries: dict[int, int] = {}
        while True:
            pause = None if task.throttle is None else task.throttle.admit(task)
            slice_ns = _slice(deadline, _earlier(deadline, pause), self.queue.orphans > 0)
            reason = self.queue.run(task, slice_ns, spin_ns if pause is None else 0)
            swept = self.queue.orphans > 0 and self.queue.sweep()
            if self.told:
                self._tell(task, reason)
            if reason == DONE:
                return error
            if reason == FAULT:
                for finished in self.queue.faults():
                    failure = explain(finished, task.offset(finished.token), task.template.transfer)
                    if failure is None:
                        task.succeed(finished.token, finished.began)
                        continue
                    again = failure.transient and task.load is None
                    if again and self._try_again(finished.token, tries, deadline):
                        task.again(finished.token)
                        continue
                    task.fail(finished.token, failure.errno or 0)
                    if finished.token < first:
                        first, error = finished.token, failure
            elif reason == UNFIT:
                raise RequestError(
                    f"{task.part_bytes} bytes do not fit in {self.queue.segments} segments of "
                    f"{self.queue.segment_bytes}"
                )
            elif reason in (BROKEN, LOST):
                self.raise_broken()
            elif reason == PAUSED:
                self._park()
            else:
                if watch is not None:
                    deadline = watch()
                if pause is not None and not task.active:
                    self._check_limit(deadline, task)
                if self.queue.clogged:
                    raise QueueFullError(
                        f"all {self.queue.slots} slots of this queue of {self.life.name} hold answers to "
                        "requests that were submitted one by one: `poll` for them first"
                    )
                self.check_deadline(deadline, self.queue.in_flight)
                if reason == IDLE and not swept:  # which may have made room
                    self.sleep(_earlier(_earlier(deadline, pause), task.pause()))

    def _tell(self, task: Task, reason: int) -> None:
        """What a run came to, for a trace."""
        log.debug(
            "queue %d: %d of %d requests of %d bytes submitted, %d completed: %s",
            self.queue.number,
            task.started,
            task.total,
            task.part_bytes,
            task.finished,
            _REASONS[reason],
        )

    def _try_again(self, part: int, tries: dict[int, int], deadline: int | None) -> bool:
        """Whether a part that a transient error hit is worth another try; waits a little before."""
        tries[part] = tries.get(part, 0) + 1
        late = deadline is not None and time.monotonic_ns() >= deadline
        if tries[part] > _TRIES or late or self.life.error is not None:
            return False
        if tries[part] > 1:
            time.sleep(_PAUSE_S * tries[part])
        return True

    def sleep(self, deadline: int | None) -> None:
        """Sleep until the device has completed something, the deadline, or the device's end."""
        begun = time.monotonic_ns() if self.told else 0
        if self.queue.arm():
            left = -1 if deadline is None else max(0, deadline - time.monotonic_ns())
            for fd, _ in self._poll.poll(None if left < 0 else left / 1e6):
                if fd == self.completion_fd:
                    eventfd.drain(self.completion_fd)
        self.queue.disarm()
        if self.told:
            slept = (time.monotonic_ns() - begun) // 1000
            log.debug("queue %d: slept %d us, %d in flight", self.queue.number, slept, self.queue.in_flight)
        self._check_kicks()
        self.life.check()

    def doze(self, deadline: int | None) -> None:
        """Sleep, after somebody has armed the queue, until the device has completed something, the
        deadline, or the device's end."""
        left = -1 if deadline is None else max(0, deadline - time.monotonic_ns())
        for fd, _ in self._poll.poll(None if left < 0 else left / 1e6):
            if fd == self.completion_fd:
                eventfd.drain(self.completion_fd)
        self._check_kicks()
        self.life.check()

    def _check_kicks(self) -> None:
        if self.queue.kick_failure:
            code = self.queue.kick_failure
            self.life.end(TransportError(code, f"cannot kick {self.life.name}: {os.strerror(code)}"))

    @contextlib.contextmanager
    def holding(self, *buffers: Buffer) -> Iterator[None]:
        """For requests submitted one by one: what is still in flight at the end is orphaned."""
        for buffer in buffers:
            buffer.hold()
        try:
            yield
        finally:
            kept = Kept(0, buffers)
            self.queue.abandon(0, kept)
            if not kept.count:
                _let_go(buffers)

    def gather(self, least: int, deadline: int | None) -> list[Finished]:
        """At least so many of the requests submitted one by one; sleeps until they are back."""
        finished = self.collect()
        while len(finished) < least:
            self.check_deadline(deadline, self.queue.in_flight)
            self.sleep(deadline)
            finished += self.collect()
        return finished

    def collect(self) -> list[Finished]:
        """Those of the requests submitted one by one that are back."""
        if self.queue.paused:
            self._park()
        finished = self.queue.poll(self.queue.slots)
        if self.told:
            log.debug("queue %d: %d answers are here", self.queue.number, len(finished))
        if self.queue.broken:
            self.raise_broken()
        return finished

    def settle(self, deadline: int | None, *, changes: bool = False) -> None:
        """Wait until no orphan is left, or with `changes` none that changes the disk.

        RequestTimeout at the deadline.
        """
        while True:
            if self.queue.paused:
                self._park()
            self.queue.kick()  # one of them may not have been shown yet
            self.queue.look()
            self.queue.sweep()
            if self.queue.broken:
                self.raise_broken()
            left = self.queue.orphan_changes if changes else self.queue.orphans
            if not left:
                return
            self.check_deadline(deadline, left)
            self.sleep(deadline)

    def check_deadline(self, deadline: int | None, waiting: int) -> None:
        if deadline is not None and time.monotonic_ns() >= deadline:
            raise RequestTimeout(
                f"{self.life.name} has not answered {waiting} requests in time; they may still take effect"
            )

    def _check_limit(self, deadline: int | None, task: Task) -> None:
        if deadline is not None and time.monotonic_ns() >= deadline:
            raise RequestTimeout(
                f"the rate limits of the disk let {task.started} requests be sent in time, and no more: "
                "raise them, or the time-out"
            )

    def raise_broken(self) -> None:
        """Raise what has ended the device, or this queue."""
        if self.queue.broken:
            self.life.end(ProtocolError(f"{self.life.name} broke its ring: {self.queue.ring.fault()}"))
        self.life.check()
        raise ClosedError("the queue was stopped")
