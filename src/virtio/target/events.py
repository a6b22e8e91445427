"""The event queue of the virtio SCSI host device (5.6.6.3)."""

from __future__ import annotations

from dataclasses import replace

from virtio.errors import ProtocolError
from virtio.ring.device import DeviceRing
from virtio.wire.virtio_scsi import EVENTS_MISSED, Event, EventType

_NOTHING = Event(EventType.NO_EVENT, bytes(8), 0)


class EventQueue:
    """Writes events into buffers that the driver left; what there is no buffer for is missed."""

    def __init__(self, index: int) -> None:
        """`index` is the number of the ring, for complaints."""
        self.ring: DeviceRing | None = None  # while it is served
        self._index = index
        self._missed = False

    def reset(self) -> None:
        """The driver begins anew, and knows that it has to look at everything."""
        self._missed = False

    def put(self, event: Event) -> None:
        """Tell the driver, with word of what was missed before."""
        self._missed = not self._write(event)

    def tend(self) -> None:
        """Tell a driver that missed something, if it has a buffer now."""
        if self._missed:
            self.put(_NOTHING)

    def _write(self, event: Event) -> bool:
        if self.ring is None:
            return False
        ring = self.ring
        while (head := ring.pop()) == -1:
            if ring.arm():  # the driver will kick when it has a buffer again
                return False
        if head < 0:
            raise ProtocolError(f"ring {self._index}: {ring.fault()}")
        data = replace(event, event=event.event | EVENTS_MISSED * self._missed).encode()
        if ring.writable < len(data):
            raise ProtocolError(f"event buffer of {ring.writable} bytes, want {len(data)}")
        ring.push(head, ring.scatter(0, data))
        ring.notify()
        return True
