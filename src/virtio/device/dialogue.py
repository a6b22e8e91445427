"""Commands to logical units one by one: probes, many of them under way at once, and anybody's own."""

from __future__ import annotations

import contextlib
import errno
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from virtio.errors import RequestTimeout, TransportError
from virtio.ring.buffer import Buffer
from virtio.ring.codes import FROM_DEVICE, NO_DATA, TAG, TO_DEVICE
from virtio.ring.layout import Layout
from virtio.ring.requests import Finished
from virtio.ring.template import Patch, Template
from virtio.wire.virtio_scsi import (
    CDB_SIZE,
    REPORT_LUNS_WLUN,
    SENSE_SIZE,
    RequestHeader,
    Response,
    ResponseCode,
    encode_lun,
)

from .probe import NO_ANSWER, REPLY_BYTES, Command, Conversation, Pause, Reply

if TYPE_CHECKING:
    from virtio.ring.lease import Lease
    from virtio.ring.region import Pool

T = TypeVar("T")

CDB_AT = 19  # where the command begins in a request (5.6.6.1)
TAG_PATCH = Patch(TAG, 8, 8)
LAYOUT = Layout(
    request=CDB_AT + CDB_SIZE,
    payload=24,  # the parameters of an UNMAP of one range (SBC-3, 5.28)
    response=12 + SENSE_SIZE,
    result_offset=4,  # residual, status qualifier, status and response: 0 when all is well
    result_mask=0xFFFF_0000_FFFF_FFFF,  # but for the qualifier, which SPDK's target leaves unwritten
    response_first=True,
)
UNWRITTEN = LAYOUT.result_mask

_AT_ONCE = 32  # conversations under way
_REPEATS = 8  # commands of one conversation that came back without an answer, and are sent again


class _Turn(NamedTuple):
    """A command that the device has; the conversation is None where nobody waits any more."""

    conversation: int | None
    command: Command
    room: Buffer  # that the conversation took, of those for all
    data: Buffer  # where its data goes
    give_up: int  # when it counts as never answered


class Dialogue(Generic[T]):
    """Conversations with targets, over a queue that is the caller's; all of them end by a deadline.

    A command that is not answered in half of the time there is counts as one that never is, so that
    a dead unit does not stop the others: `dead` counts those.
    """

    def __init__(self, lease: Lease, pool: Pool, deadline: int | None) -> None:
        self.dead = 0
        self._lease, self._pool, self._deadline = lease, pool, deadline
        self._patience = 1 << 62 if deadline is None else max(0, deadline - time.monotonic_ns()) // 2
        self._turns: dict[int, _Turn] = {}  # by token
        self._rooms: list[Buffer] = []  # for data from the device, not in use
        self._ready: deque[tuple[int, Reply | None]] = deque()  # who can go on, and with what
        self._wishes: deque[tuple[int, Command]] = deque()  # what waits for a room
        self._paused: list[tuple[int, int]] = []  # until when, and who
        self._unanswered = Counter[int]()  # commands of each conversation
        self._next_token = 0

    def run(self, conversations: Sequence[tuple[int, Conversation[T]]]) -> list[T]:
        """What each came to, in order; the first of each pair is the target that it is with.

        RequestTimeout when they are not through at the deadline.
        """
        self._conversations = conversations
        self._results: dict[int, T] = {}
        self._ready.extend((number, None) for number in range(len(conversations)))
        queue = self._lease.queue
        with contextlib.ExitStack() as self._held:
            for _ in range(min(_AT_ONCE, queue.slots, len(conversations))):
                self._rooms.append(self._held.enter_context(self._pool.take(REPLY_BYTES)))
            self._held.callback(queue.abandon, 0)  # before the rooms go, which the device may have yet
            while True:
                self._wake_up()
                while self._ready:
                    self._go_on(*self._ready.popleft())
                while self._wishes and self._rooms and self._send(*self._wishes[0]):
                    self._wishes.popleft()
                if len(self._results) == len(conversations):
                    break
                queue.kick()
                if not self._listen():
                    self._lease.sleep(self._until())
        return [self._results[number] for number in range(len(conversations))]

    def _wake_up(self) -> None:
        """Let those go on whose pause is over, or who have waited too long for an answer."""
        now = time.monotonic_ns()
        for pause in [pause for pause in self._paused if pause[0] <= now]:
            self._paused.remove(pause)
            self._ready.append((pause[1], None))
        for token, turn in self._turns.items():
            if turn.conversation is not None and turn.give_up <= now:
                self.dead += 1
                self._ready.append((turn.conversation, NO_ANSWER))
                self._turns[token] = turn._replace(conversation=None)

    def _go_on(self, number: int, reply: Reply | None) -> None:
        """Let a conversation hear a reply, or a pause end, and do what it wants next."""
        target, conversation = self._conversations[number]
        try:
            wish = next(conversation) if reply is None else conversation.send(reply)
        except StopIteration as end:
            self._results[number] = end.value
            return
        if isinstance(wish, Pause):
            self._paused.append((time.monotonic_ns() + int(wish.seconds * 1e9), number))
        else:
            self._wishes.append((number, wish))

    def _send(self, number: int, wish: Command) -> bool:
        """Send a command; false if the queue is full, of orphans of others then."""
        target, _ = self._conversations[number]
        room = self._rooms[-1]
        data = room
        if wish.nbytes > room.nbytes:
            data = self._pool.take(wish.nbytes)
        data.view()[: wish.nbytes] = bytes(wish.nbytes)
        address = REPORT_LUNS_WLUN if wish.lun is None else encode_lun(target, wish.lun)
        template = command(address, wish.cdb, FROM_DEVICE if wish.nbytes else NO_DATA)
        if not submit_holding(self._lease, template, wish.nbytes, data, self._next_token):
            return False
        self._rooms.pop()
        give_up = time.monotonic_ns() + self._patience
        self._turns[self._next_token] = _Turn(number, wish, room, data, give_up)
        self._next_token += 1
        return True

    def _listen(self) -> bool:
        """Hear the replies that came; whether there were any."""
        heard = self._lease.collect()
        for finished in heard:
            turn = self._turns.pop(finished.token)
            self._rooms.append(turn.room)
            if turn.conversation is not None and self._to_repeat(turn.conversation, finished):
                self._wishes.append((turn.conversation, turn.command))
            elif turn.conversation is not None:
                self._ready.append((turn.conversation, reply_of(finished, turn.data, turn.command.nbytes)))
            if turn.data is not turn.room:
                turn.data.close()
        return bool(heard)

    def _to_repeat(self, number: int, finished: Finished) -> bool:
        """Whether a command came back without an answer, as all do when the device is reset."""
        if finished.result == UNWRITTEN:
            self._unanswered[number] += 1
        return finished.result == UNWRITTEN and self._unanswered[number] <= _REPEATS

    def _until(self) -> int | None:
        """When there is something to do without a reply; RequestTimeout at the deadline."""
        if self._deadline is not None and time.monotonic_ns() >= self._deadline:
            left = len(self._conversations) - len(self._results)
            raise RequestTimeout(f"{self._lease.life.name}: {left} targets or units were not heard in time")
        moments = [until for until, _ in self._paused]
        moments += [turn.give_up for turn in self._turns.values() if turn.conversation is not None]
        if self._deadline is not None:
            moments.append(self._deadline)
        return min(moments, default=None)


def submit_holding(lease: Lease, template: Template, nbytes: int, data: Buffer, token: int) -> bool:
    """Submit a request of the driver's own, which keeps `data` until it is back."""
    data.hold()
    if lease.queue.submit(template, 0, nbytes, data.offset, token, 0, data):
        return True
    data.let_go()
    return False


def command(address: bytes, cdb: bytes, direction: int, patches: Sequence[Patch] = ()) -> Template:
    """A command to the unit whose address, of eight bytes, this is."""
    request = RequestHeader(address, 0, cdb=cdb).encode()
    return Template(request, direction=direction, patches=[TAG_PATCH, *patches])


def reply_of(finished: Finished, room: Buffer, nbytes: int) -> Reply:
    """What came back for a command that had `nbytes` at the beginning of `room` for its data."""
    if finished.result == UNWRITTEN:
        return Reply(ResponseCode.FAILURE, 0, b"", b"")
    response = Response.decode(finished.response)
    came = max(0, nbytes - response.residual)
    return Reply(response.response, response.status, response.sense, bytes(room.view()[:came]))


def execute(
    lease: Lease, pool: Pool, address: bytes, cdb: bytes, data: bytes, nbytes: int, deadline: int | None
) -> Reply:
    """One command, with `data` to the device or room for `nbytes` from it; the queue is the caller's."""
    direction = TO_DEVICE if data else FROM_DEVICE if nbytes else NO_DATA
    size = len(data) or nbytes
    with pool.take(max(1, size)) as room:
        try:
            room.view()[:size] = data or bytes(size)
            while not submit_holding(lease, command(address, cdb, direction), size, room, 0):
                lease.settle(deadline)  # only orphans can have all slots
            lease.queue.kick()
            (finished,) = lease.gather(1, deadline)
            if finished.result == UNWRITTEN:
                words = "was reset, or has written no response: it is unknown what became of the command"
                raise TransportError(errno.EIO, f"{lease.life.name} {words}")
            return reply_of(finished, room, nbytes)
        finally:
            lease.queue.abandon(0)
