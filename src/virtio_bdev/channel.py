"""Moving data: the calls of a thread to a disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
import warnings
from array import array
from typing import TYPE_CHECKING, Literal

from virtio import control
from virtio.device.base import weakly
from virtio.device.dialogue import execute
from virtio.device.scsi_errors import error_of
from virtio.errors import (
    ChannelInUse,
    ClosedError,
    DeviceError,
    RequestError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.ring.buffer import Buffer
from virtio.ring.codes import BOUNCED, CONSTANT, IN_PLACE, LOADED
from virtio.ring.lease import Sole, deadline_in
from virtio.ring.stats import OTHER, READ, WRITE
from virtio.ring.submit import Submitter
from virtio.ring.task import Task, first_bad_offset
from virtio.ring.template import Template
from virtio.wire.scsi import compare_and_write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer as BufferProtocol

    from virtio.device.disk import Disk
    from virtio.ring.load import Load
    from virtio.ring.requests import Finished
    from virtio_bdev.bdev import Bdev

Wait = Literal["adaptive", "poll", "event"]

_OFFSETS = ("Q", "q", "L", "l")  # formats of 64-bit integers; a negative one is past any end
_SPIN_NS = {"adaptive": 50_000, "poll": 1 << 62, "event": 0}
_BOUNCE_BYTES = 8 << 20  # of the pool, for one call
_COPIED_BYTES = 64 << 10  # that a blocking call copies in one piece
_TRIES = 8  # of a single request that a transient error hits
_PAUSE_S = 0.001  # between two of them, growing
_CLOSE_S = 1.0
_LEAVE_S = 0.05  # how long a load that was stopped waits for what is in flight
_ZERO_BYTES = 256 << 10  # of zeros, where the device cannot write zeroes itself

_owners = itertools.count(1)  # of single requests: each channel is one


class Batch:
    """What became of a batch: `status` has one negative errno an item, 0 for success.

    An item that was not finished, because the batch was cut short, has -EINPROGRESS.
    """

    def __init__(self, status: array[int], first: DeviceError | None, index: int) -> None:
        self.status = status
        self._first = first
        self._index = index

    def raise_for_status(self) -> None:
        """Raise the DeviceError of the first item that failed, if any."""
        if self._first is not None:
            self._first.add_note(f"item {self._index} of a batch of {len(self.status)}")
            raise self._first

    def __len__(self) -> int:
        return len(self.status)

    def __repr__(self) -> str:
        bad = sum(1 for code in self.status if code)
        return f"<Batch of {len(self.status)}, {bad} failed>"


class Channel(Submitter):
    """Reads and writes of one disk on one queue lease, one call at a time.

    Offsets and lengths are in bytes, multiples of the disk's block size. All channels that a
    thread opens on one controller share a queue, and a call on one of them while another is under
    way raises ChannelInUse. Buffers of `Controller.buffer` are used in place, others are copied.
    Any call raises RequestError, before anything is sent, for what can be known to be wrong;
    DeviceError for what the device refuses; RequestTimeout; TransportError or ProtocolError when
    the device is lost; ClosedError.
    """

    def __init__(self, bdev: Bdev, *, wait: Wait, timeout: float | None) -> None:
        self.closed = True  # until there is a lease
        if wait not in _SPIN_NS:
            raise RequestError(f"wait={wait!r}, want one of {', '.join(_SPIN_NS)}")
        self.bdev = bdev
        self.timeout = timeout
        self.wait = wait
        self._controller = bdev.controller
        self._scratch: Buffer | None = None
        self._bouncing = Sole("another thread is inside a call on this channel: open one in each thread")
        self._lease = lease = self._controller.take_lease()
        super().__init__(
            lease.queue,
            next(_owners),
            next(_owners),
            bdev.geometry,
            bdev.budget(lease),
            bdev.counters(lease),
        )
        self._pool = self._controller.device.pool
        self._alarm: control.Timer | None = None  # for who was refused by a limit
        self.closed = False

    # Calls.

    def read(self, offset: int, nbytes: int) -> bytes:
        """The bytes of the disk from `offset` on."""
        self._check(offset, nbytes)
        if 0 < nbytes <= _BOUNCE_BYTES:  # into the pool, and from there in one copy
            with self._bouncing:
                scratch = self._bounce(nbytes, 1)
                view = scratch.view()[:nbytes]
                if not self._at_once(self.geometry.read, offset, nbytes, scratch):
                    self._transfer(self._disk.read, _one(offset), nbytes, scratch, view)
                return bytes(view)
        data = bytearray(nbytes)
        self.readinto(offset, data)
        return bytes(data)

    def readinto(self, offset: int, into: BufferProtocol | Buffer) -> None:
        """Fill a writable buffer with the bytes of the disk from `offset` on."""
        if isinstance(into, Buffer) and self._at_once(self.geometry.read, offset, into.nbytes, into):
            return
        view = flat(into, writable=True)
        self._check(offset, view.nbytes)
        if 0 < view.nbytes <= _COPIED_BYTES and self._controller.device.locate(view) < 0:
            view[:] = self.read(offset, view.nbytes)
        else:
            self._transfer(self._disk.read, _one(offset), view.nbytes, into, view)

    def write(self, offset: int, data: BufferProtocol | Buffer, *, fua: bool = False) -> None:
        """Write bytes at `offset`; with `fua` they are durable when the call returns."""
        if isinstance(data, Buffer) and not fua:
            if self._at_once(self.geometry.write, offset, data.nbytes, data):
                return
        view = flat(data)
        self._check(offset, view.nbytes, write=True)
        elsewhere = self._controller.device.locate(view) < 0
        if not fua and 0 < view.nbytes <= _COPIED_BYTES and elsewhere:
            with self._bouncing:
                scratch = self._bounce(view.nbytes, 1)
                scratch.view()[: view.nbytes] = view
                if self._at_once(self.geometry.write, offset, view.nbytes, scratch):
                    return
        template = self._disk.write_fua if fua else None
        self._transfer(template or self._disk.write, _one(offset), view.nbytes, data, view)
        if fua and template is None:
            self.flush()

    def readv(self, offset: int, into: Sequence[BufferProtocol]) -> None:
        """Fill several writable buffers, one after another; together they are on the grid."""
        views = [flat(one, writable=True) for one in into]
        data = memoryview(self.read(offset, sum(view.nbytes for view in views)))
        for view in views:
            view[:] = data[: view.nbytes]
            data = data[view.nbytes :]

    def writev(self, offset: int, data: Sequence[BufferProtocol], *, fua: bool = False) -> None:
        """Write several buffers, one after another; together they are on the grid."""
        self.write(offset, b"".join(flat(one) for one in data), fua=fua)

    def unmap(self, offset: int, nbytes: int) -> None:
        """Tell the disk that these bytes are not needed any more; they may read anything after."""
        self._check(offset, nbytes, write=True)
        if self._disk.unmap is None:
            raise RequestError(f"{self.bdev.name} does not support unmap")
        limits = self._disk.limits
        head = limits.unmap_head(offset, nbytes)
        self._command(self._disk.unmap, offset, head, head)
        self._command(self._disk.unmap, offset + head, nbytes - head, limits.max_unmap)

    def write_zeroes(self, offset: int, nbytes: int, *, unmap: bool = True) -> None:
        """Make these bytes zero; with `unmap` the disk may give the space back, if it can."""
        self._check(offset, nbytes, write=True)
        template = self._disk.write_zeroes_unmap if unmap else self._disk.write_zeroes
        if template is None or not self._zeroes_by_device(template, offset, nbytes):
            part = min(self._disk.limits.max_transfer, max(_ZERO_BYTES, self._disk.block_size))
            self._zeroes(self._disk.write, offset, nbytes, part, part)

    def _zeroes_by_device(self, template: Template, offset: int, nbytes: int) -> bool:
        """False if the device turns out not to know the request."""
        limit = self._disk.limits.max_write_zeroes
        try:
            if template.data_bytes:
                self._zeroes(template, offset, nbytes, limit, template.data_bytes)
            else:
                self._command(template, offset, nbytes, limit)
        except DeviceError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    def _zeroes(self, template: Template, offset: int, nbytes: int, part: int, size: int) -> None:
        """Requests whose data is always the same `size` zeros."""
        if nbytes:
            with self._controller.buffer(size) as zeros:
                zeros.view()[:] = bytes(size)
                self._run(
                    Task(
                        template,
                        _one(offset),
                        nbytes,
                        min(part, nbytes),
                        mode=CONSTANT,
                        base=zeros.offset,
                        depth=self._depth,
                        buffers=[zeros],
                        stats=self.stats,
                    )
                )

    def compare_and_write(self, offset: int, expected: BufferProtocol, data: BufferProtocol) -> bool:
        """Write `data` if the disk has `expected` there, in one step that nobody can come between.

        Whether it had. RequestError where the disk has no such operation, or takes at most
        `limits.max_compare_and_write` bytes. After a RequestTimeout it is unknown what was done.
        """
        old, new = flat(expected), flat(data)
        self._check(offset, new.nbytes, write=True)
        most = self._disk.limits.max_compare_and_write
        if not most:
            raise RequestError(
                f"{self.bdev.name} has no compare and write (virtio-scsi alone has, and not every disk there)"
            )
        if old.nbytes != new.nbytes or not 0 < new.nbytes <= most:
            raise RequestError(
                f"{old.nbytes} bytes to compare and {new.nbytes} to write: {self.bdev.name} takes "
                f"{most} of each at most"
            )
        block = self.bdev.block_size
        cdb = compare_and_write(offset // block, new.nbytes // block)
        deadline = deadline_in(self.timeout)
        for _ in range(_TRIES):
            with self._lease as lease:
                pool = self._controller.device.pool
                reply = execute(lease, pool, self._disk.address, cdb, b"".join((old, new)), 0, deadline)
            error = error_of(reply, offset)
            if error is None or not error.transient:
                break
        if error is not None and error.errno != errno.EILSEQ:
            raise error
        return error is None

    def flush(self) -> None:
        """Make durable what was written and has completed, by whichever channel.

        A disk that offers no flush is taken to write through (5.2.5.2), and so is one that says nothing
        of a cache and does not know the command.
        """
        self._check_open()
        if self._disk.flush is not None and not self._disk.read_only:
            try:
                self._command(self._disk.flush, 0, 1, 1)
            except DeviceError as error:
                if error.errno != errno.EOPNOTSUPP or self._disk.flush_known:
                    error.offset = None
                    raise

    def read_batch(self, offsets: BufferProtocol, nbytes: int, into: BufferProtocol) -> Batch:
        """Read `nbytes` at each of many offsets; item `i` goes to `into[i * nbytes:]`.

        `offsets` are 64-bit integers: an `array("Q")`, a NumPy array, a memoryview. One compiled
        loop runs all of it without the GIL, as many requests in flight as the queue holds. An
        error of the device is told in the Batch; a batch that is cut short, by the exception that
        is raised, which has it as `batch`.
        """
        return self._batch(self._disk.read, offsets, nbytes, into, write=False)

    def write_batch(self, offsets: BufferProtocol, nbytes: int, data: BufferProtocol) -> Batch:
        """Write `nbytes` at each of many offsets; item `i` comes from `data[i * nbytes:]`."""
        return self._batch(self._disk.write, offsets, nbytes, data, write=True)

    # One by one.

    def submit_flush(self, token: int) -> bool:
        """Begin to make durable what has been written; false: not now."""
        self._check_open()
        if self._disk.flush is None or self._disk.read_only:
            self._done.append((token, None))
            return True
        block = self._disk.block_size
        return self.submit_plain(self._disk.flush, 0, block, block, 0, token)

    def submit_unmap(self, offset: int, nbytes: int, token: int) -> bool:
        """Begin to give bytes back, at most `limits.max_unmap`; false: not now."""
        template = self._disk.unmap
        if template is None:
            raise RequestError(f"{self.bdev.name} does not support unmap")
        return self.submit_plain(template, offset, nbytes, self._disk.limits.max_unmap, 0, token)

    def submit_write_zeroes(self, offset: int, nbytes: int, token: int, *, unmap: bool = True) -> bool:
        """Begin to write zeroes, at most `limits.max_write_zeroes` bytes; false: not now."""
        template = self._disk.write_zeroes_unmap if unmap else self._disk.write_zeroes
        if template is None:
            raise RequestError(f"{self.bdev.name} does not support write zeroes: write them")
        data = self._controller.zeros(self._disk.block_size) if template.data_bytes else 0
        return self.submit_plain(template, offset, nbytes, self._disk.limits.max_write_zeroes, data, token)

    def fileno(self) -> int:
        """A descriptor to sleep on until something is back, after `arm` has said that it is safe.

        All channels of a thread on one controller share it.
        """
        return self._lease.completion_fd

    def _turn(self) -> None:
        if self.queue.entered:
            raise ChannelInUse("another thread is inside a call on this queue: open a channel in each thread")
        self._lease.wait_turn(deadline_in(self.timeout))

    def _alive(self) -> None:
        self._check_open()
        if self.queue.broken or self.queue.stopped:
            self._lease.raise_broken()

    def _examine(
        self, template: Template, offset: int, nbytes: int, most: int, buffer: Buffer | None, at: int
    ) -> bool:
        self._check(offset, nbytes, write=template.changes)
        if buffer is not None:
            buffer.check()
            if buffer.pool is not self._pool:
                raise RequestError("the buffer is not one of this controller's")
            if at < 0 or at > buffer.nbytes - nbytes:
                raise RequestError(f"{nbytes} bytes at {at} of a buffer of {buffer.nbytes}")
        if not 0 < nbytes <= most:
            raise RequestError(f"{nbytes} bytes in one request, want 1 to {most}")
        if template.changes and self.queue.orphan_changes:
            self.queue.look()
            self.queue.sweep()
            return not self.queue.overlaps_orphan(offset, nbytes)
        return True

    def _judge(self, slot: int, finished: Finished) -> bool:
        offset, transfer = self.queue.place(slot)
        error = self._disk.explain(finished, offset, transfer)
        tries = self._tries.pop(finished.token, 0)
        if error is not None and error.transient and tries < _TRIES:
            self._tries[finished.token] = tries + 1
            self._later.append((time.monotonic() + _PAUSE_S * tries, slot))
            return False
        self._error = error
        return True

    def _admit(self, kind: int, nbytes: int) -> bool:
        throttle = self.bdev.throttle
        if throttle is None or kind == OTHER:
            return True
        granted, wait = throttle.take(kind, 1, nbytes)
        if not granted and self._alarm is None:
            self._alarm = control.Timer(wait, weakly(self._ring))
        return bool(granted)

    def _ring(self) -> None:
        """There may be room by now, for who sleeps on the completion descriptor; in the control thread."""
        self._silence()
        if not self.closed:
            self._wake()

    def _silence(self) -> None:
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.cancel()

    def _send_again(self) -> None:
        now = time.monotonic()
        for later in [later for later in self._later if later[0] <= now]:
            self._later.remove(later)
            self.queue.again(later[1])
        self.queue.kick()

    def _wake(self) -> None:
        self.queue.woken = True
        self._lease.wake()

    def _drain(self) -> None:
        self._lease.drain()

    def apply(self, load: Load, depth: int) -> None:
        """Put a load on the disk, `depth` requests in flight, until it ends; for `bench` to call.

        It writes random bytes. The first error of the device ends it, and is raised when all requests are
        back; the channel's time-out is for each answer, not for the whole. A load that is stopped waits a
        twentieth of a second for what is in flight, which may still take effect after that.
        """
        self._check(0, load.nbytes, write=load.reads < 100)
        limits, name = self._disk.limits, self.bdev.name
        if load.nbytes > limits.max_transfer:
            raise RequestError(
                f"requests of {load.nbytes} bytes: {name} takes at most {limits.max_transfer} in one"
            )
        most = min(limits.depth, self._lease.queue.slots)
        if depth < 1:
            raise RequestError(f"{depth} requests in flight, want 1 to {most}")
        if depth > most:
            device = self._controller.device
            alone = min(device.depth_on(1), self._lease.queue.slots)
            raise RequestError(
                f"{depth} requests in flight, want 1 to {most}: more than {name} takes on each of "
                f"{len(device.leases)} queues" + (f"; with one queue {alone}" if alone > most else "")
            )
        mixed = 0 < load.reads < 100
        with self._cells(load.nbytes, 2 * depth if mixed else depth) as cells:
            if load.reads < 100:
                cells.view()[:] = os.urandom(cells.nbytes)
            task = Task(
                self._disk.read if load.reads else self._disk.write,
                memoryview(array("Q")),
                load.nbytes,
                load.nbytes,
                mode=LOADED,
                base=cells.offset,
                cells=depth,
                depth=depth,
                buffers=[cells],
                load=load,
                other=self._disk.write,
                stats=self.stats,
            )
            seen, deadline, stopping = 0, deadline_in(self.timeout), False

            def watch() -> int | None:
                nonlocal seen, deadline, stopping
                if load.stopped:
                    if not stopping:
                        stopping, deadline = True, deadline_in(_LEAVE_S)
                elif task.finished != seen or not task.active:
                    seen, deadline = task.finished, deadline_in(self.timeout)
                return deadline

            self._limit(task)
            with self._lease as lease:
                spin = _SPIN_NS[self.wait]
                try:
                    error = lease.execute(task, deadline, spin, self._disk.explain, watch)
                except RequestTimeout:
                    if not load.stopped:
                        raise
                    load.finish()
                    error = None
        if error is not None:
            raise error

    def close(self) -> None:
        """Give the queue back if this was the thread's last channel; idempotent."""
        if not self.closed:
            self.closed, self._pool = True, None
            self._silence()
            if self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            if self.budget.in_flight:
                self._later.clear()
                for owner in (self.owner, self.own):
                    self.queue.renounce(owner, self.budget)
                with contextlib.suppress(VirtioError), self._lease.borrow(deadline_in(_CLOSE_S)):
                    pass  # which does it
            self._controller.return_lease(self._lease)

    # How they are done.

    def _at_once(self, template: Template, offset: int, nbytes: int, buffer: Buffer) -> bool:
        """Do the usual case of a blocking call: one request, answered soon. False if it is another case,
        and nothing was done, or nothing that may not be done again.
        """
        spin = _SPIN_NS[self.wait]
        if not spin or self._lease.told:
            return False
        try:
            state = self.attempt(template, offset, buffer, nbytes, min(spin, _SPIN_NS["adaptive"]))
            if state:
                return state > 0
            said = self._wait_for_answer()
        except BaseException as cause:
            self.give_up()
            late = self._lease.late
            if isinstance(cause, RequestTimeout) and self.queue.orphans and late is not None:
                late(self._lease)
            raise
        if isinstance(said, bool):
            return True
        error = self._disk.explain(said, offset, template.transfer)
        if error is None or not error.transient:
            if error is None:
                self.credit(template, nbytes, said.began)
                return True
            self.stats.failed += self.stats.on
            try:
                raise error
            finally:
                del error  # or its traceback and this frame hold on to each other
        return False

    def _wait_for_answer(self) -> Finished | bool:
        """Of what `attempt` has begun."""
        deadline = deadline_in(self.timeout)
        slept = bool(self.queue.awaited)
        try:
            while not (said := self.answer()):
                self._lease.check_deadline(deadline, self.queue.in_flight)
                if self.wait != "poll" and self.arm():
                    self._lease.doze(deadline)
            return said
        finally:
            if slept:  # somebody, whose answers and wake-up were taken
                self._wake()

    def _batch(
        self,
        template: Template,
        offsets: BufferProtocol,
        nbytes: int,
        user: BufferProtocol | Buffer,
        *,
        write: bool,
    ) -> Batch:
        try:
            where = memoryview(offsets)
        except TypeError:
            raise RequestError(
                'offsets: want 64-bit integers in a buffer, such as array("Q", offsets)'
            ) from None
        integers = where.format.lstrip("@=<") in _OFFSETS and where.itemsize == 8
        if not integers or where.ndim != 1:
            raise RequestError(
                f"offsets of format {where.format!r}, {where.itemsize} bytes, in {where.ndim} dimensions: "
                'want 64-bit integers, such as array("Q")'
            )
        if not where.c_contiguous:
            raise RequestError("offsets are not contiguous (a slice with a step?)")
        view = flat(user, writable=not write)
        self._check(0, nbytes, write=write)
        if nbytes == 0 and len(where):
            raise RequestError("items of 0 bytes")
        if view.nbytes < len(where) * nbytes:
            raise RequestError(f"{view.nbytes} bytes for {len(where)} items of {nbytes}")
        if len(where) == 0:
            return Batch(array("i"), None, 0)
        where = where.cast("B").cast("Q")
        bad = first_bad_offset(where, nbytes, self.bdev.block_size, self.bdev.size)
        if bad >= 0:
            self._check(where[bad], nbytes)
            raise RequestError(f"offset {where[bad]} of item {bad}")
        return self._transfer(template, where, nbytes, user, view, raising=False)

    def _transfer(
        self,
        template: Template,
        offsets: memoryview,
        nbytes: int,
        user: object,
        view: memoryview,
        *,
        raising: bool = True,
    ) -> Batch:
        """Move data from or to the user's memory, in place if the device can reach it."""
        if nbytes == 0:
            return Batch(array("i"), None, 0)
        limits = self._disk.limits
        part = min(nbytes, limits.max_transfer)
        place = self._controller.device.locate(view)
        if isinstance(user, Buffer) and user.pool is not self._controller.device.pool:
            place = -1
        if place >= 0:
            held = [user] if isinstance(user, Buffer) else []
            task = Task(
                template,
                offsets,
                nbytes,
                part,
                mode=IN_PLACE,
                base=place,
                user=view,
                depth=self._depth,
                buffers=held,
                stats=self.stats,
            )
        else:
            total = -(-nbytes // part) * len(offsets)
            with self._bouncing:
                scratch = self._bounce(part, min(total, limits.depth, self._lease.queue.slots))
                task = Task(
                    template,
                    offsets,
                    nbytes,
                    part,
                    mode=BOUNCED,
                    base=scratch.offset,
                    user=view,
                    cells=scratch.nbytes // part,
                    depth=self._depth,
                    buffers=[scratch],
                    stats=self.stats,
                )
                return self._run(task, raising=raising)
        return self._run(task, raising=raising)

    def _bounce(self, part: int, cells: int) -> Buffer:
        """A buffer of up to so many cells of `part` bytes, kept for the next call."""
        nbytes = max(part, min(cells * part, _BOUNCE_BYTES))
        scratch = self._scratch
        if scratch is not None and not scratch.busy and nbytes <= scratch.nbytes:
            return scratch
        if scratch is not None:
            self._scratch = None
            scratch.close()
        while True:
            try:
                self._scratch = self._controller.buffer(nbytes)
                return self._scratch
            except TransportError as error:
                if error.errno != errno.ENOMEM or nbytes <= part:
                    raise
                nbytes = max(part, nbytes // 2)

    def _cells(self, nbytes: int, count: int) -> Buffer:
        try:
            return self._controller.buffer(nbytes * count)
        except TransportError as error:
            if error.errno != errno.ENOMEM:
                raise
            free = self._controller.device.pool.free_bytes
            raise RequestError(
                f"{count} requests of {nbytes} bytes want {count * nbytes} bytes of memory that the device "
                f"can reach, and {free} are free: fewer or smaller ones will do"
            ) from None

    def _command(self, template: Template, offset: int, nbytes: int, part: int) -> None:
        """A request without data; nothing at all for a range of 0 bytes."""
        if nbytes:
            self._run(
                Task(
                    template,
                    _one(offset),
                    nbytes,
                    min(part, nbytes),
                    depth=self._depth,
                    stats=self.stats,
                )
            )

    def _run(self, task: Task, *, raising: bool = True) -> Batch:
        deadline = deadline_in(self.timeout)
        try:
            if self.queue.taken:
                self._lease.wait_turn(deadline)
            self._limit(task)
            with self._lease as lease:
                error = lease.execute(task, deadline, _SPIN_NS[self.wait], self._disk.explain)
        except VirtioError as broken:
            broken.batch = Batch(task.status, None, 0)
            raise
        if error is not None and raising:
            try:
                raise error
            finally:
                del error  # or its traceback and this frame hold on to each other
        first = next((i for i, code in enumerate(task.status) if code), 0) if error else 0
        return Batch(task.status, error, first)

    def _limit(self, task: Task) -> None:
        if self.bdev.throttle is not None and task.template.kind in (READ, WRITE):
            task.throttle, task.allowed = self.bdev.throttle, 0

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"this channel of {self.bdev.name} was closed")
        self.bdev.check_online()

    @property
    def _depth(self) -> int:
        """Requests that may be in flight beside those that were submitted one by one."""
        return int(max(1, self._disk.limits.depth - self.budget.in_flight))

    @property
    def _disk(self) -> Disk:
        return self.bdev.disk  # another one after a change of size

    def _check(self, offset: int, nbytes: int, *, write: bool = False) -> None:
        self._check_open()
        self.bdev.check(offset, nbytes, write=write)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self.closed:
            warnings.warn(f"{self!r} was not closed", ResourceWarning, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Channel to {self.bdev.name}, {'closed' if self.closed else self.wait}>"


def _one(offset: int) -> memoryview:
    return memoryview(array("Q", [offset]))


def flat(data: BufferProtocol | Buffer, *, writable: bool = False) -> memoryview:
    """A flat view of a user's memory, bytes."""
    view = data.view() if isinstance(data, Buffer) else memoryview(data)
    if not view.c_contiguous:
        raise RequestError("the buffer is not contiguous")
    if writable and view.readonly:
        raise RequestError("the buffer is read-only, and is to be read into")
    return view.cast("B") if view.nbytes else memoryview(bytearray())
