"""Reads and writes of one disk by one event loop."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from virtio.errors import (
    ClosedError,
    DeviceError,
    QueueFullError,
    RequestError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.ring.buffer import Buffer
from virtio_bdev.channel import Channel as BlockingChannel, flat

if TYPE_CHECKING:
    from typing_extensions import Buffer as BufferProtocol

    from virtio_bdev.aio import Bdev

_POLL_AT_ONCE = 256  # completions between two looks at everything else in the loop
_PAGE = 4096  # what the smallest of buffers takes of the pool
_CACHED_BYTES = 1 << 20  # of bounce buffers of each size, that a channel keeps
_ZERO_BYTES = 256 << 10  # of zeros, where the device cannot write zeroes itself


class Borrowed(Exception):
    """Somebody has the queue at this moment, for a rescan or a reset: it is to be tried again."""


class _Inner(BlockingChannel):
    """A channel that does not wait for who has the queue: the loop would stand still."""

    def _turn(self) -> None:
        raise Borrowed


class _Call:
    """One request on its way: how to begin it, and who waits."""

    __slots__ = ("begin", "due", "future", "token")

    def __init__(
        self, begin: Callable[[int], bool], token: int, due: float, future: asyncio.Future[None]
    ) -> None:
        self.begin, self.token, self.due, self.future = begin, token, due, future


class Channel:
    """Reads and writes of one disk by one event loop, as many calls under way as there are tasks.

    Offsets and lengths are in bytes, multiples of the disk's block size. Buffers of `Controller.buffer`
    are used in place, others are copied. Errors are as those of `virtio_bdev.Channel`.
    """

    def __init__(self, bdev: Bdev, *, timeout: float | None, max_waiting: int) -> None:
        self.bdev = bdev
        self.timeout = timeout
        self.max_waiting = max_waiting
        self.waiting: deque[_Call] = deque()
        self.inner = _Inner(bdev.blocking, wait="adaptive", timeout=None)
        self._geometry = self.inner.geometry
        self._loop = asyncio.get_running_loop()
        self._reactor = bdev.controller.reactor(self.inner._lease)
        self._reactor.join(self)
        self._calls: dict[int, _Call] = {}  # with the device, in the order in which they began
        self._tokens = itertools.count()
        self._rooms: dict[int, list[Buffer]] = {}  # bounce buffers by size
        self._timer: asyncio.TimerHandle | None = None
        self._error: VirtioError | None = None

    # Calls.

    async def read(self, offset: int, nbytes: int) -> bytes:
        """The bytes of the disk from `offset` on."""
        self._check(offset, nbytes)
        if nbytes > self._geometry.max_transfer:
            into = bytearray(nbytes)
            await self.readinto(offset, into)
            return bytes(into)
        return await self._read_part(offset, nbytes, None) if nbytes else b""

    async def readinto(self, offset: int, into: BufferProtocol | Buffer) -> None:
        """Fill a writable buffer with the bytes of the disk from `offset` on."""
        if isinstance(into, Buffer):
            await self._in_place(offset, into, write=False)
            return
        view = flat(into, writable=True)
        self._check(offset, view.nbytes)
        await self._parts(
            view.nbytes, lambda at, size: self._read_part(offset + at, size, view[at : at + size])
        )

    async def write(self, offset: int, data: BufferProtocol | Buffer, *, fua: bool = False) -> None:
        """Write bytes at `offset`; with `fua` they are durable when the call returns."""
        if isinstance(data, Buffer):
            await self._in_place(offset, data, write=True)
        else:
            view = flat(data)
            self._check(offset, view.nbytes, write=True)
            await self._parts(
                view.nbytes, lambda at, size: self._write_part(offset + at, view[at : at + size])
            )
        if fua:
            await self.flush()

    async def readv(self, offset: int, into: Sequence[BufferProtocol]) -> None:
        """Fill several buffers, one after another."""
        views = [flat(one, writable=True) for one in into]
        data = memoryview(await self.read(offset, sum(view.nbytes for view in views)))
        for view in views:
            view[:] = data[: view.nbytes]
            data = data[view.nbytes :]

    async def writev(self, offset: int, data: Sequence[BufferProtocol], *, fua: bool = False) -> None:
        """Write several buffers, one after another."""
        await self.write(offset, b"".join(flat(one) for one in data), fua=fua)

    async def flush(self) -> None:
        """Make durable what was written and has completed, by whichever channel."""
        self._check(0, 0)
        try:
            await self._call(self._begin_flush)
        except DeviceError as error:
            if error.errno != errno.EOPNOTSUPP or self.bdev.blocking.disk.flush_known:
                error.offset = None
                raise

    async def unmap(self, offset: int, nbytes: int) -> None:
        """Tell the disk that these bytes are not needed any more."""
        self._check(offset, nbytes, write=True)
        limits = self.bdev.limits
        if not limits.max_unmap:
            raise RequestError(f"{self.bdev.name} does not support unmap")
        submit = self.inner.submit_unmap
        for at, size in limits.unmap_parts(offset, nbytes):
            await self._call(functools.partial(submit, at, size))

    async def write_zeroes(self, offset: int, nbytes: int, *, unmap: bool = True) -> None:
        """Make these bytes zero; with `unmap` the disk may give the space back, if it can."""
        self._check(offset, nbytes, write=True)
        most = self.bdev.limits.max_write_zeroes
        if most:
            submit = self.inner.submit_write_zeroes
            try:
                await self._parts(
                    nbytes,
                    lambda at, size: self._call(lambda token: submit(offset + at, size, token, unmap=unmap)),
                    most,
                )
                return
            except DeviceError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        most = max(_ZERO_BYTES, self.bdev.block_size)
        zeros = bytes(min(nbytes, most, self.bdev.limits.max_transfer))
        await self._parts(
            nbytes, lambda at, size: self._write_part(offset + at, memoryview(zeros)[:size]), len(zeros)
        )

    def release(self) -> None:
        """Close at once; idempotent; for the reactor to call."""
        if self.inner.closed:
            return
        self.end(ClosedError(f"this channel of {self.bdev.name} was closed"))
        if self._timer is not None:
            self._timer.cancel()
        self._reactor.leave(self)
        self.drop_rooms()
        self.inner.close()

    async def close(self) -> None:
        """Close: calls under way raise ClosedError; idempotent."""
        self.release()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<aio {repr(self.inner)[1:-1]}, {len(self._calls)} under way, {len(self.waiting)} waiting>"

    # How they are done.

    def _check(self, offset: int, nbytes: int, *, write: bool = False) -> None:
        if self._error is not None:
            raise type(self._error)(*self._error.args)
        self.inner._check(offset, nbytes, write=write)

    def _begin_flush(self, token: int) -> bool:
        begun = self.inner.submit_flush(token)
        if self.inner._done:  # without the device, whose completion would tell
            self._reactor.restless.add(self)
        return begun

    def _in_place(self, offset: int, buffer: Buffer, *, write: bool) -> Coroutine[Any, Any, None]:
        """Move data between the disk and memory that the device can reach."""
        submit = self.inner.submit_write if write else self.inner.submit_read
        nbytes = buffer.nbytes
        if 0 < nbytes <= self._geometry.max_transfer and 0 <= offset <= self._geometry.size:
            return self._call(functools.partial(submit, offset, buffer))  # which looks at all else
        buffer.check()
        self._check(offset, nbytes, write=write)
        return self._parts(
            nbytes,
            lambda at, size: self._call(lambda token: submit(offset + at, buffer, token, at=at, nbytes=size)),
        )

    async def _parts(
        self, nbytes: int, do: Callable[[int, int], Coroutine[Any, Any, object]], most: int | None = None
    ) -> None:
        """`do(at, size)` for each part of so many bytes; at the same time, the first error last."""
        step = most or self._geometry.max_transfer
        if nbytes <= step:
            if nbytes:
                await do(0, nbytes)
            return
        parts = [do(at, min(step, nbytes - at)) for at in range(0, nbytes, step)]
        results = await asyncio.gather(*parts, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _read_part(self, offset: int, nbytes: int, into: memoryview | None) -> bytes:
        room = await self._bounced(self.inner.submit_read, offset, nbytes)
        view = room.view()[:nbytes]
        result = b""
        if into is None:
            result = bytes(view)
        else:
            into[:] = view
        self._give(room)
        return result

    async def _write_part(self, offset: int, data: memoryview) -> None:
        self._give(await self._bounced(self.inner.submit_write, offset, data.nbytes, data))

    async def _bounced(
        self, submit: Callable[..., bool], offset: int, nbytes: int, data: memoryview | None = None
    ) -> Buffer:
        """Move data by way of a bounce buffer, to be given back, which takes `data` along."""
        room: Buffer | None = None

        def begin(token: int) -> bool:
            nonlocal room
            if room is None:  # else it has one since it was tried last
                room = self._take(nbytes)
                if room is None:
                    return False
                if data is not None:
                    room.view()[:nbytes] = data
            return submit(offset, room, token, nbytes=nbytes)

        try:
            await self._call(begin)
        except BaseException:
            if room is not None:
                self._reactor.lent -= 1
                room.close()  # to the pool, once the device has returned it
            raise
        assert room is not None
        return room

    def _take(self, nbytes: int) -> Buffer | None:
        """A bounce buffer; None if there is none now, but will be when a request is back."""
        size = 1 << (nbytes - 1).bit_length()
        rooms = self._rooms.get(size)
        room = rooms.pop() if rooms else self._new_room(size)
        self._reactor.lent += room is not None
        return room

    def _new_room(self, size: int) -> Buffer | None:
        while True:
            try:
                return self.bdev.controller.buffer(size)
            except TransportError as error:
                if error.errno != errno.ENOMEM:
                    raise
                if not self._reactor.drop_rooms():
                    if self._reactor.lent or self.inner.queue.in_flight:
                        return None
                    raise

    def _give(self, room: Buffer) -> None:
        self._reactor.lent -= 1
        rooms = self._rooms.setdefault(room.nbytes, [])
        if len(rooms) * max(room.nbytes, _PAGE) < _CACHED_BYTES and not self.inner.closed:
            rooms.append(room)
        else:
            room.close()

    def drop_rooms(self) -> bool:
        """Give back the bounce buffers that are kept; whether there were any; for `Reactor` to call."""
        dropped = [room for rooms in self._rooms.values() for room in rooms]
        self._rooms.clear()
        for room in dropped:
            room.close()
        return bool(dropped)

    async def _call(self, begin: Callable[[int], bool]) -> None:
        """One request, begun now or in its turn, until it is back."""
        if self._error is not None:
            raise type(self._error)(*self._error.args)
        due = float("inf") if self.timeout is None else time.monotonic() + self.timeout
        call = _Call(begin, next(self._tokens), due, self._loop.create_future())
        begun = False
        if not self.waiting and not self._reactor.given_up:
            try:
                begun = begin(call.token)
            except Borrowed:
                pass  # in its turn, then
        if begun:
            self._calls[call.token] = call
        elif len(self.waiting) >= self.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} calls wait for {self.bdev.name} already")
        else:
            self.waiting.append(call)
            self._reactor.line_up(self)
        self._reactor.submitted()
        if self._timer is None and self.timeout is not None:
            self._timer = self._loop.call_later(self.timeout, self._expire)
        try:
            await call.future
        except asyncio.CancelledError:
            if self._calls.pop(call.token, None) is not None:
                self._reactor.give_up(self, call.token)
            raise

    # What the reactor and the timer do.

    def collect(self) -> bool:
        """Let those go on whose requests are back; whether there were any; for the reactor to call."""
        done = self.inner.poll(_POLL_AT_ONCE)
        for token, error in done:
            call = self._calls.pop(token, None)
            if call is not None and not call.future.done():
                if error is None:
                    call.future.set_result(None)
                else:
                    call.future.set_exception(error)
        return bool(done)

    def begin_next(self) -> bool:
        """Begin the call that has waited longest; false if there is none, or no room for it; for the reactor
        to call.
        """
        while self.waiting and self.waiting[0].future.done():
            self.waiting.popleft()
        if not self.waiting:
            return False
        call = self.waiting[0]
        try:
            if not call.begin(call.token):
                return False
            self._calls[call.token] = call
        except Borrowed:
            raise
        except Exception as error:  # also what is no number: the others are not to wait for it
            call.future.set_exception(error)
        self.waiting.popleft()
        return True

    def end(self, error: VirtioError) -> None:
        """Let all calls raise this, now and from now on; for the reactor to call."""
        self._error = self._error or error
        for call in [*self._calls.values(), *self.waiting]:
            if not call.future.done():
                call.future.set_exception(type(error)(*error.args))
        self._calls.clear()
        self.waiting.clear()

    def _expire(self) -> None:
        """Give up the calls whose time is up."""
        self._timer = None
        now = time.monotonic()
        for call in [call for call in itertools.chain(self._calls.values(), self.waiting) if call.due <= now]:
            if not call.future.done():
                words = f"{self.bdev.name} has not answered in {self.timeout} s; it may still take effect"
                call.future.set_exception(RequestTimeout(words))
            if self._calls.pop(call.token, None) is not None:
                self._reactor.give_up(self, call.token)
                self._reactor.overdue = True
        self.waiting = deque(call for call in self.waiting if not call.future.done())
        first = next(itertools.chain(self._calls.values(), self.waiting), None)
        if first is not None:
            self._timer = self._loop.call_later(max(0.0, first.due - now), self._expire)
