"""What drives one queue in an event loop: it collects what is back, begins what waits, and sleeps."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from virtio.errors import ClosedError, VirtioError
from virtio_bdev.aio.channel import Borrowed

if TYPE_CHECKING:
    from virtio.ring.lease import Lease
    from virtio_bdev.aio.channel import Channel

_IN_VAIN = 8  # looks for what is in flight, one each turn of the loop, before sleeping: which takes as long
_AWAY_S = 0.001  # between two looks whether somebody still has the queue


class Reactor:
    """Drives one queue in one loop, for all the channels that share it: in turns, and asleep in between."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.given_up: list[tuple[Channel, int]] = []  # that the queue is not told of yet
        self.overdue = False  # some of these had their time
        self.restless: set[Channel] = set()  # with something to do that no completion tells of
        self.lent = 0  # bounce buffers that calls have
        self._channels: dict[int, Channel] = {}  # by owner
        self._line: OrderedDict[Channel, None] = OrderedDict()  # with calls that wait, by turn
        self._due = False  # a turn, that the loop knows of
        self._in_vain = 0
        self.loop.add_reader(lease.completion_fd, self._signalled)
        self._life_fd = lease.life.fd
        if self._life_fd >= 0:
            self.loop.add_reader(self._life_fd, self._lost)

    def join(self, channel: Channel) -> None:
        self._channels[channel.inner.owner] = channel

    def leave(self, channel: Channel) -> None:
        self._channels.pop(channel.inner.owner, None)
        self._line.pop(channel, None)
        self.restless.discard(channel)
        if not self._channels:
            self._stop()

    def _stop(self) -> None:
        if not self.closed:
            self.closed = True
            self.loop.remove_reader(self.lease.completion_fd)
            if self._life_fd >= 0:
                self.loop.remove_reader(self._life_fd)

    def close(self) -> None:
        """End all of its channels."""
        for channel in list(self._channels.values()):
            channel.end(ClosedError(f"the controller of {channel.bdev.name} was closed"))
            channel.release()

    def close_in_its_loop(self) -> threading.Event:
        """`close`, from any thread; what is set when that is done."""
        done = threading.Event()

        def close() -> None:
            try:
                self.close()
            finally:
                done.set()

        try:
            self.loop.call_soon_threadsafe(close)
        except RuntimeError:  # the loop was closed
            done.set()
        return done

    def line_up(self, channel: Channel) -> None:
        """A call of this channel waits."""
        self._line.setdefault(channel)

    def give_up(self, channel: Channel, token: int) -> None:
        """Nobody waits for this request any more: the queue is told before anything else is begun."""
        self.given_up.append((channel, token))
        self.soon()

    def drop_rooms(self) -> bool:
        """Give the pool back the bounce buffers that no call has; whether there were any."""
        dropped = [channel.drop_rooms() for channel in self._channels.values()]
        return any(dropped)

    def submitted(self) -> None:
        """Something was submitted, or waits for room."""
        self._in_vain = 0
        self.soon()

    def soon(self) -> None:
        """There may be something to do: see to it once all that is ready now has run."""
        if not self._due and not self.closed:
            self._due = True
            self.loop.call_soon(self._due_turn)

    def _due_turn(self) -> None:
        self._due = False
        self._turn()

    def _signalled(self) -> None:
        if not self._due:  # else that turn is among what the loop runs now, and one is enough
            self._turn()

    def _turn(self) -> None:
        if self.closed:
            return
        try:
            if self.given_up:
                self._forsake()
            first = next(iter(self._channels.values()))
            moved = self._collect(first)
            for owner in first.inner.queue.owners():
                if owner in self._channels:
                    moved |= self._collect(self._channels[owner])
            for channel in list(self.restless):
                moved |= self._collect(channel)
            if self._line:
                moved |= self._feed()
            self._in_vain = 0 if moved else self._in_vain + 1
            soon = moved or self.restless or (self._in_vain <= _IN_VAIN and self.lease.queue.in_flight)
            if soon or first.inner.closed or not first.inner.arm():
                self.soon()
        except Borrowed:
            self._step_aside()
        except VirtioError as error:
            if not self.lease.life.error:
                self._fail(error)

    def _forsake(self) -> None:
        while self.given_up:
            channel, token = self.given_up[-1]
            channel.inner.cancel(token)
            self.given_up.pop()  # only now: the queue may be borrowed
        if self.overdue:
            self.overdue = False
            if self.lease.late is not None:
                self.lease.late(self.lease)

    def _collect(self, channel: Channel) -> bool:
        """Let calls of this channel go on; whether there were any. One whose disk was removed ends alone."""
        try:
            moved = channel.collect()
        except VirtioError as error:
            if self.lease.life.error or self.lease.queue.stopped:
                raise
            channel.end(error)
            channel.release()
            return False
        if channel.inner._later or channel.inner._done:
            self.restless.add(channel)
        elif self.restless:
            self.restless.discard(channel)
        return moved

    def _feed(self) -> bool:
        """Begin what waits, one call of each channel in turns; whether there was any.

        Whose turn it is outlasts the room for it: else a queue that gives back one request at a time
        would serve the first channel alone. So who began something goes to the end of the line.
        """
        begun = False
        able = list(self._line)
        while able:
            able = [channel for channel in able if channel.begin_next()]
            for channel in able:
                self._line.move_to_end(channel)
                begun = True
        for channel in [channel for channel in self._line if not channel.waiting]:
            del self._line[channel]
        return begun

    def _step_aside(self) -> None:
        """Somebody has the queue: look again in a moment. What the descriptor says meanwhile is theirs."""
        self._due = True
        self.loop.remove_reader(self.lease.completion_fd)
        self.loop.call_later(_AWAY_S, self._step_back)

    def _step_back(self) -> None:
        if not self.closed:
            self.loop.add_reader(self.lease.completion_fd, self._signalled)
            self._due_turn()

    def _lost(self) -> None:
        error = self.lease.life.error or ClosedError("the device has gone")
        self._fail(error)

    def _fail(self, error: VirtioError) -> None:
        for channel in list(self._channels.values()):
            channel.end(type(error)(*error.args))
        self._stop()
