"""virtio over PCI: the legacy interface (4.1.4.10), of devices that have no other.

Its registers are I/O ports, its fields in the driver's byte order (which is little-endian wherever
this runs), its rings of the size that the device wants, in pages of 4096 bytes. Requests are framed
as it asks for: headers and status bytes are descriptors of their own, always (2.7.4.3).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence

from virtio.errors import ProtocolError, TransportError
from virtio.transport.base import QueuePort, RingAreas
from virtio.transport.pci_base import MOST_READS, PciBase, never_still, read_fields
from virtio.transport.windows import Windows
from virtio.wire.pci import Function, Legacy, Register
from virtio.wire.virtio import MAX_QUEUE_SIZE, ConfigField, Feature

_BAR = 0
_MOST_PAGES = 1 << 32  # whose number the queue's address register can hold


def has_legacy(windows: Windows, function: Function) -> bool:
    """Whether a device has the legacy interface, within reach."""
    ports = any(bar.number == _BAR and bar.is_io for bar in function.bars)
    return function.transitional and ports and windows.bar_bytes(_BAR) >= Legacy.BYTES


class LegacyPci(PciBase):
    """A virtio PCI device of the legacy interface.

    It uses physical addresses whatever stands in the way (6.1): behind an IOMMU it is refused.
    """

    legacy = True
    has_isr = True
    max_queues: int | None = None

    def __init__(self, windows: Windows, timeout: float = 5.0) -> None:
        """Each wait is bounded by `timeout` seconds.

        TransportError or ProtocolError if it is no device for us; the windows are closed then.
        """
        self.allowed = int(Feature.ANY_LAYOUT | Feature.INDIRECT_DESC | Feature.EVENT_IDX)
        self.required = 0
        self._read: tuple[int, Sequence[ConfigField], bytes] | None = None  # the last configuration
        super().__init__(windows, timeout)

    def _find(self, function: Function) -> None:
        if not has_legacy(self.windows, function):
            raise TransportError(errno.ENODEV, f"{self.address} has no legacy interface within reach")
        if self.windows.translated:
            raise TransportError(
                errno.EOPNOTSUPP,
                f"{self.address} has the legacy interface alone, and would use physical addresses past "
                "the IOMMU: give it to a driver without one (uio_pci_generic), or have its modern "
                "interface turned on (QEMU: disable-modern=off)",
            )
        self.has_config = True
        self._msix_was_on = function.msix is not None and function.msix.enabled

    def _load(self, register: Register) -> int:
        return self.windows.read(_BAR, register.offset, register.width)

    def _store(self, register: Register, value: int) -> None:
        self.windows.write(_BAR, register.offset, register.width, value)

    # Status and features (3.1.2).

    def _read_status(self) -> int:
        return self._load(Legacy.DEVICE_STATUS)

    def _write_status(self, status: int) -> None:
        self._store(Legacy.DEVICE_STATUS, status)

    def offered(self) -> int:
        """The device's feature bits: there are 32."""
        return self._load(Legacy.DEVICE_FEATURES)

    def accept(self, features: int) -> None:
        """Write the driver's feature bits."""
        self._store(Legacy.DRIVER_FEATURES, features)

    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        """The first `nbytes` of the configuration space, with these fields read, all of one moment.

        ProtocolError if it is shorter, or never holds still. There is no generation: it is read until it
        is the same twice (2.5.4).
        """
        there = self.windows.bar_bytes(_BAR) - self._config_at
        if there < nbytes:
            raise ProtocolError(f"{self.address} has {there} bytes of device configuration, want {nbytes}")
        space = self._read_config(nbytes, fields)
        for _ in range(MOST_READS):
            before, space = space, self._read_config(nbytes, fields)
            if space == before:
                self._read = nbytes, fields, space
                return space
        raise never_still(self.address)

    def _read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        at = self._config_at
        return read_fields(nbytes, fields, lambda offset, width: self.windows.read(_BAR, at + offset, width))

    @property
    def _config_at(self) -> int:
        msix = self._msix_was_on if self._vectors is None else bool(self._vectors)
        return Legacy.BYTES_WITH_VECTORS if msix else Legacy.BYTES

    def _config_changed(self) -> bool:
        if self._read is None:
            return True
        nbytes, fields, space = self._read
        return self._read_config(nbytes, fields) != space

    # Queues.

    def largest_queue(self, index: int) -> int:
        """How many descriptors the queue has, neither more nor less (2.7.2); 0: there is no such queue."""
        self._store(Legacy.QUEUE_SELECT, index)
        size = self._load(Legacy.QUEUE_SIZE)
        if size & (size - 1) or size > MAX_QUEUE_SIZE:
            raise ProtocolError(
                f"{self.address} has queue {index} of {size}, want a power of two up to {MAX_QUEUE_SIZE}"
            )
        return size

    def setup_queue(self, index: int, areas: RingAreas, base: int) -> QueuePort:
        """Tell the device where a queue is, with which it is enabled (4.1.5.1.3)."""
        if base:
            raise ValueError(f"queue {index} from index {base}: over PCI every queue begins at 0")
        size = self.largest_queue(index)  # selects it
        if areas.size != size:
            raise TransportError(
                errno.EINVAL, f"{self.address} has no queue {index} of {areas.size}: it has {size}"
            )
        if self._load(Legacy.QUEUE_ADDRESS):
            raise ProtocolError(f"{self.address} has queue {index} in use before it was set up")
        used = areas.descriptor + -(-(18 * size + 6) // Legacy.PAGE) * Legacy.PAGE
        if (areas.available, areas.used) != (areas.descriptor + 16 * size, used):
            raise ValueError(f"areas {areas[1:]} are not those of a legacy ring")
        address = self._iova(areas.region, areas.descriptor, used + 8 * size + 6 - areas.descriptor)
        if address % Legacy.PAGE or address // Legacy.PAGE >= _MOST_PAGES:
            raise TransportError(
                errno.EFAULT, f"a ring at {address:#x}, want a page of 4096 below {_MOST_PAGES << 12:#x}"
            )
        completion_fd, polled = self._interrupt(index)
        doorbell = self.windows.doorbell(_BAR, Legacy.QUEUE_NOTIFY.offset, index)
        self._store(Legacy.QUEUE_ADDRESS, address // Legacy.PAGE)
        return QueuePort(doorbell, completion_fd, polled)

    def _name_vector(self, vector: int, *, of_queue: bool) -> bool:
        """Whether it is taken: the device may lack what that needs (4.1.5.1.2)."""
        register = Legacy.QUEUE_MSIX_VECTOR if of_queue else Legacy.CONFIG_MSIX_VECTOR
        self._store(register, vector)
        return self._load(register) == vector

    def _read_isr(self) -> int:
        return self._load(Legacy.ISR_STATUS)
