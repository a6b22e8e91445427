"""PCI configuration space, and where a virtio device says what is where (PCI 3.0, 6; virtio 4.1).

Tolerant as the specification asks for: what is reserved, unknown or too short is passed over, and
a chain of capabilities that bites its tail just ends.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from virtio.errors import ProtocolError

VENDOR = 0x1AF4
BARS = 6  # base address registers of an ordinary function; greater numbers are reserved
NO_VECTOR = 0xFFFF  # an event that raises no MSI-X interrupt (4.1.5.1.2)

_FIRST_ID, _LAST_ID = 0x1040, 0x107F  # 0x1040 and the device type (4.1.2)
_TRANSITIONAL = {0x1000: 1, 0x1001: 2, 0x1002: 5, 0x1003: 3, 0x1004: 8, 0x1005: 4, 0x1009: 9}

_HEADER_BYTES = 64
_SPACE_BYTES = 256  # where capabilities can be; the rest of PCI Express' 4096 bytes has others
_BARS_AT, _POINTER_AT = 0x10, 0x34
_HAS_CAPABILITIES = 0x10  # in the status register
_VENDOR_SPECIFIC, _MSIX = 0x09, 0x11  # capability IDs
_CAP = struct.Struct("<BBBBBB2xII")  # struct virtio_pci_cap (4.1.4)
_MULTIPLIER = struct.Struct("<I")  # after it, in the one for notifications (4.1.4.4)
_MSIX_CAP = struct.Struct("<BBHII")


class Register(NamedTuple):
    """Where a register is in its structure, and how wide its accesses are (4.1.3.1)."""

    offset: int
    width: int


class Common:
    """The registers of the common configuration structure (4.1.4.3); addresses are two each."""

    DEVICE_FEATURE_SELECT = Register(0, 4)
    DEVICE_FEATURE = Register(4, 4)
    DRIVER_FEATURE_SELECT = Register(8, 4)
    DRIVER_FEATURE = Register(12, 4)
    CONFIG_MSIX_VECTOR = Register(16, 2)
    NUM_QUEUES = Register(18, 2)
    DEVICE_STATUS = Register(20, 1)
    CONFIG_GENERATION = Register(21, 1)
    QUEUE_SELECT = Register(22, 2)
    QUEUE_SIZE = Register(24, 2)
    QUEUE_MSIX_VECTOR = Register(26, 2)
    QUEUE_ENABLE = Register(28, 2)
    QUEUE_NOTIFY_OFF = Register(30, 2)
    QUEUE_DESC = Register(32, 4), Register(36, 4)
    QUEUE_DRIVER = Register(40, 4), Register(44, 4)
    QUEUE_DEVICE = Register(48, 4), Register(52, 4)
    BYTES = 56  # that every device has; what follows comes with a feature
    QUEUE_NOTIF_CONFIG_DATA = Register(56, 2)
    QUEUE_RESET = Register(58, 2)


class Legacy:
    """The registers of the legacy interface, in the I/O ports of BAR 0 (4.1.4.10).

    The device's own configuration is after them: after the vectors too while MSI-X is enabled.
    """

    DEVICE_FEATURES = Register(0, 4)
    DRIVER_FEATURES = Register(4, 4)
    QUEUE_ADDRESS = Register(8, 4)  # in pages of `PAGE` bytes; 0: the queue is not in use
    QUEUE_SIZE = Register(12, 2)
    QUEUE_SELECT = Register(14, 2)
    QUEUE_NOTIFY = Register(16, 2)
    DEVICE_STATUS = Register(18, 1)
    ISR_STATUS = Register(19, 1)
    BYTES = 20
    CONFIG_MSIX_VECTOR = Register(20, 2)
    QUEUE_MSIX_VECTOR = Register(22, 2)
    BYTES_WITH_VECTORS = 24
    PAGE = 4096


class Bar(NamedTuple):
    """A base address register that is not reserved; `address` is 0 as long as nobody gave it one."""

    number: int
    address: int
    is_io: bool
    is_wide: bool  # 64 bits: the next register is its upper half
    is_prefetchable: bool


class StructureKind(enum.IntEnum):
    """What a virtio capability points to, `cfg_type` (4.1.4); others are of no use here."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5


class Structure(NamedTuple):
    """A virtio capability, itself `at` this offset of the configuration space (4.1.4).

    Nothing is said about whether the BAR exists or is that large. Of a PCI_CFG one, bar, offset
    and length are registers.
    """

    kind: StructureKind
    bar: int
    offset: int
    length: int
    at: int
    multiplier: int = 0  # of the queue's notify offset; NOTIFY alone


class Msix(NamedTuple):
    """The MSI-X capability (PCI 3.0, 6.8.2), itself `at` this offset of the configuration space."""

    at: int
    vectors: int
    enabled: bool
    table_bar: int
    table_offset: int
    pending_bar: int
    pending_offset: int


@dataclass(frozen=True, slots=True)
class Function:
    """What the configuration space of a virtio device says; its structures in order of preference."""

    vendor: int
    device: int
    revision: int
    subsystem_vendor: int
    subsystem: int
    bars: tuple[Bar, ...]
    structures: tuple[Structure, ...]
    msix: Msix | None

    @property
    def device_type(self) -> int | None:
        """The virtio device type, or None for what is no virtio device (4.1.2)."""
        return device_type(self.vendor, self.device)

    @property
    def transitional(self) -> bool:
        """Whether it has, by its ID, the legacy interface too (4.1.2.1)."""
        return self.vendor == VENDOR and self.device in _TRANSITIONAL

    @classmethod
    def decode(cls, space: bytes) -> Function:
        """Read 64 bytes or more; ProtocolError if nobody is there, or it is a bridge."""
        if len(space) < _HEADER_BYTES:
            raise ProtocolError(
                f"PCI configuration space of {len(space)} bytes, want {_HEADER_BYTES} or more"
            )
        vendor, device = struct.unpack_from("<HH", space)
        if vendor == 0xFFFF:
            raise ProtocolError("PCI vendor ffff: there is no such device, or it is gone")
        if space[0x0E] & 0x7F:
            raise ProtocolError(f"PCI header type {space[0x0E] & 0x7F:#x}, want 0: no bridge")
        subsystem_vendor, subsystem = struct.unpack_from("<HH", space, 0x2C)
        found = list(_capabilities(space))
        structures = (_structure(space, at) for kind, at in found if kind == _VENDOR_SPECIFIC)
        msix = (_msix(space, at) for kind, at in found if kind == _MSIX)
        return cls(
            vendor,
            device,
            space[0x08],
            subsystem_vendor,
            subsystem,
            tuple(_bars(struct.unpack_from(f"<{BARS}I", space, _BARS_AT))),
            tuple(structure for structure in structures if structure is not None),
            next((found for found in msix if found is not None), None),
        )


def device_type(vendor: int, device: int) -> int | None:
    """The virtio device type of these IDs, or None for what is no virtio device (4.1.2)."""
    if vendor != VENDOR:
        return None
    if _FIRST_ID <= device <= _LAST_ID:
        return device - _FIRST_ID
    return _TRANSITIONAL.get(device)


def _bars(registers: tuple[int, ...]) -> Iterator[Bar]:
    upper = False
    for index, low in enumerate(registers):
        kind = low >> 1 & 3
        if upper:
            upper = False
        elif low & 1:
            yield Bar(index, low & ~3, True, False, False)
        elif kind == 0:
            yield Bar(index, low & ~0xF, False, False, bool(low & 8))
        elif kind == 2 and index + 1 < BARS:
            upper = True
            yield Bar(index, registers[index + 1] << 32 | low & ~0xF, False, True, bool(low & 8))


def _capabilities(space: bytes) -> Iterator[tuple[int, int]]:
    """ID and offset of each; ends at whatever is no capability, or was seen before."""
    if not space[0x06] & _HAS_CAPABILITIES:
        return
    seen = set()
    at = space[_POINTER_AT] & ~3
    while _HEADER_BYTES <= at < min(len(space), _SPACE_BYTES) - 1 and at not in seen:
        if space[at] == 0xFF:
            return
        seen.add(at)
        yield space[at], at
        at = space[at + 1] & ~3


def _structure(space: bytes, at: int) -> Structure | None:
    end = min(len(space), _SPACE_BYTES)
    if at + _CAP.size > end:
        return None
    _, _, size, cfg_type, bar, _, offset, length = _CAP.unpack_from(space, at)
    if cfg_type not in _KINDS or (bar >= BARS and cfg_type != StructureKind.PCI_CFG):
        return None
    kind = StructureKind(cfg_type)
    longer = kind in (StructureKind.NOTIFY, StructureKind.PCI_CFG)
    needed = _CAP.size + (4 if longer else 0)
    if size < needed or at + needed > end:
        return None
    multiplier = 0
    if kind == StructureKind.NOTIFY:
        (multiplier,) = _MULTIPLIER.unpack_from(space, at + _CAP.size)
    return Structure(kind, bar, offset, length, at, multiplier)


_KINDS = frozenset(StructureKind)


def _msix(space: bytes, at: int) -> Msix | None:
    if at + _MSIX_CAP.size > min(len(space), _SPACE_BYTES):
        return None
    _, _, control, table, pending = _MSIX_CAP.unpack_from(space, at)
    if table & 7 >= BARS or pending & 7 >= BARS:
        return None
    return Msix(
        at,
        (control & 0x7FF) + 1,
        bool(control & 0x8000),
        table & 7,
        table & ~7,
        pending & 7,
        pending & ~7,
    )
