"""virtio over PCI: the modern interface (4.1), on register windows that somebody below provides.

It knows no VFIO: who holds the function, maps memory for it and receives its interrupts is a
`Windows`.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Sequence

from virtio.errors import ProtocolError, TransportError, VirtioError
from virtio.ring.doorbell import Doorbell
from virtio.transport.base import QueuePort, RingAreas
from virtio.transport.pci_base import MOST_READS, PciBase, never_still, read_fields, read_function
from virtio.transport.pci_legacy import LegacyPci, has_legacy
from virtio.transport.windows import Windows
from virtio.wire.pci import Common, Function, Register, Structure, StructureKind
from virtio.wire.virtio import MAX_QUEUE_SIZE, ConfigField, Feature

_NOTIFY_BYTES = 2
_BAR, _OFFSET, _LENGTH, _DATA = 4, 8, 12, 16  # registers of the PCI_CFG capability (4.1.4.9)
_ISR = Register(0, 1)
# What an offset is a multiple of (4.1.4), and how many bytes are the least.
_NEEDS = {
    StructureKind.COMMON: (4, Common.BYTES),
    StructureKind.NOTIFY: (2, _NOTIFY_BYTES),
    StructureKind.ISR: (1, 1),
    StructureKind.DEVICE: (4, 1),
}


def open_pci(windows: Windows, timeout: float = 5.0) -> Pci | LegacyPci:
    """The device behind these windows, by its modern interface or, where it has none, the legacy one.

    TransportError or ProtocolError if it has neither; the windows are closed then.
    """
    try:
        function = read_function(windows)
        modern = all(
            _registers(windows, function, kind, threading.Lock()) is not None
            for kind in (StructureKind.COMMON, StructureKind.NOTIFY)
        )
        legacy = not modern and has_legacy(windows, function)
    except BaseException:
        windows.close()
        raise
    return LegacyPci(windows, timeout) if legacy else Pci(windows, timeout)


class _Registers:
    """One structure of the device, in a BAR."""

    def __init__(self, windows: Windows, structure: Structure, nbytes: int) -> None:
        self.nbytes = nbytes
        self.multiplier = structure.multiplier
        self._windows = windows
        self._bar, self._offset = structure.bar, structure.offset

    def read(self, register: Register) -> int:
        return self._windows.read(self._bar, self._offset + register.offset, register.width)

    def write(self, register: Register, value: int) -> None:
        self._windows.write(self._bar, self._offset + register.offset, register.width, value)

    def doorbell(self, offset: int, value: int) -> Doorbell:
        return self._windows.doorbell(self._bar, self._offset + offset, value)


class _IndirectRegisters(_Registers):
    """The same where there is no access to the BAR: through configuration space (4.1.4.9)."""

    def __init__(
        self, windows: Windows, structure: Structure, nbytes: int, at: int, lock: threading.Lock
    ) -> None:
        super().__init__(windows, structure, nbytes)
        self._at = at
        self._lock = lock

    def read(self, register: Register) -> int:
        with self._lock:
            self._point_to(register)
            return self._windows.read_config(self._at + _DATA, register.width)

    def write(self, register: Register, value: int) -> None:
        with self._lock:
            self._point_to(register)
            self._windows.write_config(self._at + _DATA, register.width, value)

    def doorbell(self, offset: int, value: int) -> Doorbell:
        def ring() -> None:
            with contextlib.suppress(VirtioError):  # it is gone, which who waits for it finds out
                self.write(Register(offset, _NOTIFY_BYTES), value)

        return Doorbell(call=ring)

    def _point_to(self, register: Register) -> None:
        self._windows.write_config(self._at + _BAR, 1, self._bar)
        self._windows.write_config(self._at + _OFFSET, 4, self._offset + register.offset)
        self._windows.write_config(self._at + _LENGTH, 4, register.width)


def _registers(
    windows: Windows, function: Function, kind: StructureKind, lock: threading.Lock
) -> _Registers | None:
    """The first structure of its kind that can be used: long enough, aligned, and within its BAR."""
    align, needed = _NEEDS[kind]
    for structure in function.structures:
        if structure.kind != kind or structure.offset % align:
            continue
        room = windows.bar_bytes(structure.bar)
        if room:
            nbytes = min(structure.length, room - structure.offset)
            if nbytes >= needed:
                return _Registers(windows, structure, nbytes)
            continue
        detour = next((s for s in function.structures if s.kind == StructureKind.PCI_CFG), None)
        if detour is not None and structure.length >= needed:
            return _IndirectRegisters(windows, structure, structure.length, detour.at, lock)
    return None


class Pci(PciBase):
    """A virtio PCI device with the modern interface."""

    legacy = False

    def __init__(self, windows: Windows, timeout: float = 5.0) -> None:
        """Find the structures of the device; each wait is bounded by `timeout` seconds.

        TransportError or ProtocolError if it is no device for us; the windows are closed then.
        """
        self.allowed = int(
            Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.RING_PACKED
            | Feature.ACCESS_PLATFORM  # an IOMMU is set up, or there is none in the way (6.1)
            | Feature.ORDER_PLATFORM
        )
        self.required = int(Feature.VERSION_1)
        if windows.translated:
            self.required |= Feature.ACCESS_PLATFORM  # without it, it would use physical addresses
        self._generation = -1  # of the configuration that was read last
        self._features = 0
        super().__init__(windows, timeout)

    def _find(self, function: Function) -> None:
        lock = threading.Lock()  # for what takes several accesses
        common, notify, isr, device = (
            _registers(self.windows, function, kind, lock)
            for kind in (
                StructureKind.COMMON,
                StructureKind.NOTIFY,
                StructureKind.ISR,
                StructureKind.DEVICE,
            )
        )
        if common is None or notify is None:
            which = "common configuration" if common is None else "notification"
            hint = "; it may have the legacy interface alone" if function.transitional else ""
            raise TransportError(errno.ENODEV, f"{self.address} has no usable {which} structure{hint}")
        self._common, self._notify, self._isr, self._device = common, notify, isr, device
        self.has_config, self.has_isr = device is not None, isr is not None
        if _holds(common, Common.QUEUE_NOTIF_CONFIG_DATA):
            self.allowed |= Feature.NOTIF_CONFIG_DATA
        if _holds(common, Common.QUEUE_RESET):
            self.allowed |= Feature.RING_RESET
        self.max_queues: int | None = common.read(Common.NUM_QUEUES)

    # Status and features (3.1.1).

    def _read_status(self) -> int:
        return self._common.read(Common.DEVICE_STATUS)

    def _write_status(self, status: int) -> None:
        self._common.write(Common.DEVICE_STATUS, status)

    def offered(self) -> int:
        """The device's feature bits; those from 64 on are nobody's yet."""
        features = 0
        for half in range(2):
            self._common.write(Common.DEVICE_FEATURE_SELECT, half)
            features |= self._common.read(Common.DEVICE_FEATURE) << 32 * half
        return features

    def accept(self, features: int) -> None:
        """Write the driver's feature bits."""
        self._features = features
        for half in range(2):
            self._common.write(Common.DRIVER_FEATURE_SELECT, half)
            self._common.write(Common.DRIVER_FEATURE, features >> 32 * half & 0xFFFFFFFF)

    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        """The first `nbytes` of the configuration space, with these fields read, all of one moment.

        TransportError if there is none; ProtocolError if it is shorter, or never holds still.
        """
        device = self._device
        if device is None:
            raise TransportError(errno.EOPNOTSUPP, f"{self.address} has no device configuration")
        if device.nbytes < nbytes:
            raise ProtocolError(
                f"{self.address} has {device.nbytes} bytes of device configuration, want {nbytes}"
            )
        for _ in range(MOST_READS):
            before = self._common.read(Common.CONFIG_GENERATION)
            space = read_fields(nbytes, fields, lambda at, width: device.read(Register(at, width)))
            if self._common.read(Common.CONFIG_GENERATION) == before:
                self._generation = before
                return space
        raise never_still(self.address)

    def _config_changed(self) -> bool:
        return self._common.read(Common.CONFIG_GENERATION) != self._generation

    # Queues.

    def largest_queue(self, index: int) -> int:
        """The most descriptors that a queue can have, a power of two; 0: there is no such queue."""
        assert self.max_queues is not None
        if index >= self.max_queues:
            return 0
        self._common.write(Common.QUEUE_SELECT, index)
        size = min(self._common.read(Common.QUEUE_SIZE), MAX_QUEUE_SIZE)
        return 1 << size.bit_length() - 1 if size else 0

    def setup_queue(self, index: int, areas: RingAreas, base: int) -> QueuePort:
        """Tell the device where a queue is, and enable it (4.1.5.1.3)."""
        if base:
            raise ValueError(f"queue {index} from index {base}: over PCI every queue begins at 0")
        largest = self.largest_queue(index)  # selects it
        if areas.size > largest:
            raise TransportError(
                errno.EINVAL, f"{self.address} has no queue {index} of {areas.size}: its limit is {largest}"
            )
        common = self._common
        if common.read(Common.QUEUE_ENABLE):
            raise ProtocolError(f"{self.address} has queue {index} enabled before it was set up")
        common.write(Common.QUEUE_SIZE, areas.size)
        for registers, offset, nbytes in zip(
            (Common.QUEUE_DESC, Common.QUEUE_DRIVER, Common.QUEUE_DEVICE),
            (areas.descriptor, areas.available, areas.used),
            areas.form.lengths(areas.size),
            strict=True,
        ):
            address = self._iova(areas.region, offset, nbytes)
            common.write(registers[0], address & 0xFFFFFFFF)
            common.write(registers[1], address >> 32)
        completion_fd, polled = self._interrupt(index)
        doorbell = self._doorbell(index)
        common.write(Common.QUEUE_ENABLE, 1)  # after all the others (4.1.5.1.3)
        return QueuePort(doorbell, completion_fd, polled)

    def reset_queue(self, index: int) -> None:
        """Stop one queue and wait until it is (2.6.1); `setup_queue` starts it anew.

        Where RING_RESET was accepted.
        """
        self._common.write(Common.QUEUE_SELECT, index)
        self._common.write(Common.QUEUE_RESET, 1)
        self._wait(lambda: self._common.read(Common.QUEUE_RESET) == 0, f"reset queue {index}")

    def _doorbell(self, index: int) -> Doorbell:
        """For the queue that is selected; its address and value never change (4.1.5.2)."""
        offset = self._common.read(Common.QUEUE_NOTIFY_OFF) * self._notify.multiplier
        if offset % _NOTIFY_BYTES or offset + _NOTIFY_BYTES > self._notify.nbytes:
            raise ProtocolError(
                f"{self.address} wants queue {index} notified at {offset} of a structure of "
                f"{self._notify.nbytes} bytes"
            )
        value = index
        if self._features & Feature.NOTIF_CONFIG_DATA:
            value = self._common.read(Common.QUEUE_NOTIF_CONFIG_DATA)
        return self._notify.doorbell(offset, value)

    def _name_vector(self, vector: int, *, of_queue: bool) -> bool:
        """Whether it is taken: the device may lack what that needs (4.1.5.1.2)."""
        register = Common.QUEUE_MSIX_VECTOR if of_queue else Common.CONFIG_MSIX_VECTOR
        self._common.write(register, vector)
        return self._common.read(register) == vector

    def _read_isr(self) -> int:
        assert self._isr is not None
        return self._isr.read(_ISR)


def _holds(registers: _Registers, register: Register) -> bool:
    return registers.nbytes >= register.offset + register.width
