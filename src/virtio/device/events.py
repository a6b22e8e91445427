"""The event queue of virtio-scsi (5.6.6.3): buffers that the device fills when something happens."""

from __future__ import annotations

import contextlib
import logging
import os
import select
from collections.abc import Callable

from virtio import control
from virtio.errors import ProtocolError
from virtio.ring.buffer import Buffer
from virtio.ring.doorbell import Doorbell
from virtio.ring.format import SPLIT, RingFormat
from virtio.ring.lease import Life
from virtio.ring.region import Mapping
from virtio.transport.base import QueuePort
from virtio.wire.virtio import DESC_WRITE
from virtio.wire.virtio_scsi import Event

log = logging.getLogger("virtio.scsi")

BUFFERS = 64  # always with the device, or as many as the queue has room for
_LOOK_S = 0.1  # between two looks where there is no interrupt
_NBYTES = 16  # struct virtio_scsi_event (5.6.6.3)
_MOST_NBYTES = 4096  # of one event, whatever the device's event_info_size says


class EventQueue:
    """Buffers with the device, all the time; `listen` has each event told in the control thread.

    Owns its ring and `memory`, of `event_queue_bytes`; closes nothing.
    """

    def __init__(
        self,
        memory: Buffer,
        mapping: Mapping,
        size: int,
        event_bytes: int,
        life: Life,
        *,
        event_idx: bool,
        form: RingFormat = SPLIT,
    ) -> None:
        self._memory = memory
        self._life = life
        self._first, self._step = _shape(size, event_bytes, form)
        self._ring = form.ring(memory.view()[: self._first], size, event_idx)
        self._doorbell = Doorbell()
        self._fd = -1
        self._timer: control.Timer | None = None
        for head in range(min(size, BUFFERS)):
            address = mapping.iova(memory.offset + self._first + head * self._step)
            self._ring.describe(head, address, self._step, DESC_WRITE, 0)
        self._fill()

    def _fill(self) -> None:
        for head in range(min(self._ring.size, BUFFERS)):
            self._offer(head)
        self._ring.publish()

    def rewind(self) -> None:
        """Begin anew with a device that was reset; while nothing is told."""
        self._ring.rewind()
        self._fill()

    def _offer(self, head: int) -> None:
        begin = self._first + head * self._step
        self._memory.view()[begin : begin + self._step] = bytes(self._step)
        self._ring.offer(head)

    def listen(self, port: QueuePort, told: Callable[[Event | None], None]) -> None:
        """Tell of each event from now on, and of one that nobody can read as None."""
        doorbell, completion_fd, polled = port
        self._doorbell, self._fd, self._told = doorbell, completion_fd, told
        doorbell.ring()  # there are buffers, since before the device was allowed to look
        if polled:
            self._timer = control.Timer(_LOOK_S, self._look)
        else:
            if not self._ring.arm():
                os.eventfd_write(completion_fd, 1)
            control.watch(completion_fd, select.EPOLLIN, self._completed)

    def detach(self) -> None:
        """Let go of the memory, after the device has; idempotent."""
        self._ring.detach()
        self._doorbell = Doorbell()
        self._memory.close()

    def silence(self) -> None:
        """Tell nothing any more; before the descriptor is closed. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
        elif self._fd >= 0:
            control.unwatch(self._fd)
        self._timer, self._fd = None, -1

    def _completed(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self._ring.disarm()
        self._look()
        if self._fd >= 0 and not self._ring.arm():
            os.eventfd_write(self._fd, 1)  # there is more: after the others had their turn

    def _look(self) -> None:
        for _ in range(BUFFERS):
            head = self._ring.reap()
            if head == -2:
                self.silence()
                words = f"{self._life.name} broke its event queue: {self._ring.fault()}"
                self._life.end(ProtocolError(words))
                return
            if head == -1:
                break
            event = self._read(head)
            self._offer(head)
            self._told(event)
        if self._ring.publish():
            self._doorbell.ring()

    def _read(self, head: int) -> Event | None:
        begin = self._first + head * self._step
        event = Event.decode(bytes(self._memory.view()[begin : begin + _NBYTES]))
        log.debug("event %s", event)
        return event if self._ring.used_length >= _NBYTES else None


def event_queue_bytes(size: int, event_bytes: int, form: RingFormat = SPLIT) -> int:
    """How much shared memory an event queue takes."""
    first, step = _shape(size, event_bytes, form)
    return first + min(size, BUFFERS) * step


def _shape(size: int, event_bytes: int, form: RingFormat) -> tuple[int, int]:
    """Where the buffers begin, and from one to the next: none of them straddles two pages."""
    nbytes = min(max(event_bytes, _NBYTES), _MOST_NBYTES)
    step = max(64, 1 << (nbytes - 1).bit_length())
    return -(-form.areas(size)[2] // step) * step, step
