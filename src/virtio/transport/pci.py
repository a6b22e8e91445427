"""virtio over PCI, the modern interface (4.1), on register windows that somebody below provides.

It knows no VFIO: who holds the function, maps memory for it and receives its interrupts is a
`Windows`. Registers are accessed by one thread at a time, the control thread's look at the status
excepted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from virtio import control
from virtio.errors import ProtocolError, RequestTimeout, TransportError, VirtioError
from virtio.ring.doorbell import Doorbell
from virtio.ring.lease import Life
from virtio.ring.region import Mapping, Region
from virtio.transport.base import QueuePort, RingAreas
from virtio.transport.windows import Windows
from virtio.wire.pci import Common, Function, Register, Structure, StructureKind
from virtio.wire.virtio import MAX_QUEUE_SIZE, ConfigField, Feature, Status

log = logging.getLogger("virtio.pci")

_GONE = 0xFF  # what every register of a device reads that is not there any more
_PATIENCE_S = 0.0005  # between two looks at a register that is waited for
_GENERATIONS = 100  # how often a configuration may change while it is read
_MAX_QUEUES = 256  # that ask for an interrupt vector of their own
_NOTIFY_BYTES = 2
_BAR, _OFFSET, _LENGTH, _DATA = 4, 8, 12, 16  # registers of the PCI_CFG capability (4.1.4.9)


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


class Pci:
    """A virtio PCI device with the modern interface. Owns its windows, and eventfds of its own.

    A queue has an interrupt vector to itself where there are enough, else it shares vector 0 with
    the configuration, and where there is none or the device refuses, its completion descriptor is
    always readable: who would sleep on it spins.
    """

    def __init__(self, windows: Windows, timeout: float = 5.0) -> None:
        """Find the structures of the device; each wait is bounded by `timeout` seconds.

        TransportError or ProtocolError if it is no device for us; the windows are closed then.
        """
        self.address = f"pci:{windows.name}"
        self.windows = windows
        self.timeout = timeout
        self.life = Life(self.address)
        self.on_config_change: Callable[[], None] = lambda: None
        self.allowed = int(
            Feature.INDIRECT_DESC
            | Feature.EVENT_IDX
            | Feature.ACCESS_PLATFORM  # an IOMMU is set up, or there is none in the way (6.1)
            | Feature.ORDER_PLATFORM
        )
        self.required = int(Feature.VERSION_1)
        self.resets = True
        if windows.translated:
            self.required |= Feature.ACCESS_PLATFORM  # without it, it would use physical addresses
        self._pid = os.getpid()
        self._closed = False
        self._gone = False
        self._generation = -1  # of the configuration that was read last
        self._features = 0
        self._status = Status(0)
        self._lock = threading.Lock()  # for what takes several accesses
        self._mappings: dict[int, Mapping] = {}  # by the region's address
        self._vectors: Sequence[int] | None = None  # eventfds; None until the first queue
        self._completions: dict[int, int] = {}  # by queue: its eventfd, where it is not a vector's
        self._sharers: list[int] = []  # of those, the ones that vector 0 is passed on to
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> None:
        words = (self.windows.read_config(offset, 4) for offset in range(0, 256, 4))
        function = Function.decode(b"".join(word.to_bytes(4, "little") for word in words))
        if function.device_type is None:
            raise TransportError(
                errno.ENODEV,
                f"{self.address} is {function.vendor:04x}:{function.device:04x}, no virtio device",
            )
        self.device_type = function.device_type
        self._table = function.msix.vectors if function.msix else 0
        common = self._structure(function, StructureKind.COMMON, Common.BYTES)
        notify = self._structure(function, StructureKind.NOTIFY, _NOTIFY_BYTES)
        if common is None or notify is None:
            which = "common configuration" if common is None else "notification"
            hint = "; it may have the legacy interface alone" if function.transitional else ""
            raise TransportError(errno.ENODEV, f"{self.address} has no usable {which} structure{hint}")
        self._common, self._notify = common, notify
        self._device = self._structure(function, StructureKind.DEVICE, 1)
        self.has_config = self._device is not None
        if _holds(common, Common.QUEUE_NOTIF_CONFIG_DATA):
            self.allowed |= Feature.NOTIF_CONFIG_DATA
        if _holds(common, Common.QUEUE_RESET):
            self.allowed |= Feature.RING_RESET
        self.max_queues: int | None = common.read(Common.NUM_QUEUES)

    def _structure(self, function: Function, kind: StructureKind, needed: int) -> _Registers | None:
        """The first of its kind that can be used: long enough, aligned, and within its BAR."""
        for structure in function.structures:
            if structure.kind != kind or structure.offset % (2 if kind == StructureKind.NOTIFY else 4):
                continue
            room = self.windows.bar_bytes(structure.bar)
            if room:
                nbytes = min(structure.length, room - structure.offset)
                if nbytes >= needed:
                    return _Registers(self.windows, structure, nbytes)
                continue
            detour = next((s for s in function.structures if s.kind == StructureKind.PCI_CFG), None)
            if detour is not None and structure.length >= needed:
                return _IndirectRegisters(self.windows, structure, structure.length, detour.at, self._lock)
        return None

    # Status and features (3.1.1).

    def reset(self) -> None:
        """Status 0, and wait until it reads so: until then the device may be using memory (4.1.4.3.2)."""
        self.set_status(Status(0))
        self._wait(lambda: self.status() == 0, "read status 0 after a reset")

    def status(self) -> Status:
        """The device status field; TransportError(ENODEV) if there is no device any more."""
        value = self._common.read(Common.DEVICE_STATUS)
        if value == _GONE:
            self._gone = True
            error = TransportError(errno.ENODEV, f"{self.address} is gone: its status reads ff")
            self.life.end(error)
            raise error
        return Status(value)

    def set_status(self, status: Status) -> None:
        """Write the device status field."""
        self._status = status
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
        for _ in range(_GENERATIONS):
            before = self._common.read(Common.CONFIG_GENERATION)
            space = bytearray(nbytes)
            for offset, width in fields:
                for at in range(offset, offset + width, 4):
                    part = min(4, offset + width - at)
                    space[at : at + part] = device.read(Register(at, part)).to_bytes(part, "little")
            if self._common.read(Common.CONFIG_GENERATION) == before:
                self._generation = before
                return bytes(space)
        raise ProtocolError(
            f"{self.address} changed its configuration {_GENERATIONS} times while it was read"
        )

    # Memory and rings.

    def region(self, nbytes: int) -> Region:
        """Memory that the device can reach once it is mapped."""
        return self.windows.region(nbytes)

    def map(self, region: Region) -> Mapping:
        """Let the device reach a region, until the windows are closed."""
        mapping = self._mappings[region.address] = self.windows.map(region)
        return mapping

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
            (16 * areas.size, 2 * areas.size + 6, 8 * areas.size + 6),
            strict=True,
        ):
            address = _iova(self._mappings[areas.region.address], offset, nbytes)
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

    def start(self) -> None:
        """DRIVER_OK: from now on the device looks at its queues."""
        if self._vectors:
            self._name_vector(Common.CONFIG_MSIX_VECTOR, 0)
        self.set_status(self._status | Status.DRIVER_OK)

    def stop(self) -> None:
        """Reset the device: afterwards it uses no memory."""
        self.reset()

    def renew(self) -> None:
        """The same: a reset device is as new."""
        self.stop()

    def close(self) -> None:
        """Reset the device if that can still be done, and let go of everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._pid:
            if self._vectors:
                control.unwatch(self._vectors[0])
            if self._status and not self._gone:
                with contextlib.suppress(VirtioError):
                    self.stop()
        self.life.close()
        self.windows.close()
        for fd in self._completions.values():
            os.close(fd)
        self._completions, self._sharers = {}, []

    # Interrupts and notifications.

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

    def _interrupt(self, index: int) -> tuple[int, bool]:
        """Choose a vector for the queue that is selected: the descriptor of its completions, and
        whether it says nothing."""
        vectors = self._open_vectors()
        own = 1 + index
        if own < len(vectors) and self._name_vector(Common.QUEUE_MSIX_VECTOR, own):
            return vectors[own], False
        shared = bool(vectors) and self._name_vector(Common.QUEUE_MSIX_VECTOR, 0)
        if index not in self._completions:
            self._completions[index] = _eventfd() if shared else _always_readable()
            log.debug("%s: queue %d %s", self.address, index, "shares vector 0" if shared else "is polled")
        if shared and self._completions[index] not in self._sharers:
            self._sharers.append(self._completions[index])
        return self._completions[index], not shared

    def _open_vectors(self) -> Sequence[int]:
        if self._vectors is None:
            assert self.max_queues is not None
            useful = min(1 + min(self.max_queues, _MAX_QUEUES), self._table)
            self._vectors = self.windows.interrupts(useful)[:useful] if useful else ()
            if self._vectors:
                control.watch(self._vectors[0], select.EPOLLIN, self._interrupted)
        return self._vectors

    def _name_vector(self, register: Register, vector: int) -> bool:
        """Whether the device takes the vector: it may lack what that needs (4.1.5.1.2)."""
        self._common.write(register, vector)
        return self._common.read(register) == vector

    def _interrupted(self, events: int) -> None:
        """Vector 0: maybe the configuration, maybe queues (4.1.5.4)."""
        assert self._vectors
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._vectors[0])
        for fd in self._sharers:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(fd, 1)
        try:
            if self.status() & Status.DEVICE_NEEDS_RESET:
                self.life.end(TransportError(errno.EIO, f"{self.address} has failed, and needs a reset"))
            elif self._common.read(Common.CONFIG_GENERATION) != self._generation:
                self.on_config_change()
        except VirtioError as error:
            log.warning("%s", error)

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            if time.monotonic() > deadline:
                raise RequestTimeout(f"{self.address} did not {what} in {self.timeout:g} s")
            time.sleep(_PATIENCE_S)


def _holds(registers: _Registers, register: Register) -> bool:
    return registers.nbytes >= register.offset + register.width


def _iova(mapping: Mapping, offset: int, nbytes: int) -> int:
    """Where the device finds bytes of a region, which must be in one piece for it."""
    first, last = offset >> mapping.shift, offset + nbytes - 1 >> mapping.shift
    step = 1 << mapping.shift
    for page in range(first, last):
        if mapping.table[page + 1] != mapping.table[page] + step:
            raise TransportError(errno.ENOMEM, f"a ring of {nbytes} bytes is in pieces for the device")
    return mapping.table[first] + (offset & (step - 1))


def _eventfd(flags: int = 0) -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | flags)


def _always_readable() -> int:
    """An eventfd with more in it than is ever taken out: who waits for it does not wait."""
    fd = _eventfd(os.EFD_SEMAPHORE)
    os.eventfd_write(fd, 1 << 63)
    return fd
