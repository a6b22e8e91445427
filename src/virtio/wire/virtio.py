"""What every virtio device shares: status, features, descriptor flags (virtio 1.4, 2 and 6)."""

from __future__ import annotations

import enum
from typing import NamedTuple

MAX_QUEUE_SIZE = 32768  # of either ring layout (2.7, 2.8)

DESC_NEXT = 1  # the buffer goes on in the descriptor `next` (2.7.5)
DESC_WRITE = 2  # the device writes it, else it reads it
DESC_INDIRECT = 4  # it holds a table of descriptors (2.7.5.3)


class Status(enum.IntFlag):
    """The device status field (2.1); bits are only ever added, a reset clears them all."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


class Feature(enum.IntFlag):
    """Feature bits that belong to no device type (6), as masks; the first two are legacy (6.3)."""

    NOTIFY_ON_EMPTY = 1 << 24
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43


class DeviceType(enum.IntEnum):
    """Device IDs of the devices that we drive (5)."""

    BLOCK = 2
    SCSI = 8


class ConfigField(NamedTuple):
    """Where a field of a device's configuration space is, and how wide, in bytes (2.5)."""

    offset: int
    width: int


def config_fields(layout: str, offset: int = 0) -> list[ConfigField]:
    """The fields of a `struct` format whose first byte is at `offset` of the configuration space."""
    fields = []
    count = ""
    for code in layout.lstrip("<"):
        if code.isdecimal():
            count += code
        elif code == "x":
            offset += int(count or 1)
            count = ""
        else:
            for _ in range(int(count or 1)):
                fields.append(ConfigField(offset, _WIDTHS[code]))
                offset += _WIDTHS[code]
            count = ""
    return fields


_WIDTHS = {"?": 1, "B": 1, "H": 2, "I": 4, "Q": 8}


def feature_names(bits: int, device: type[enum.IntFlag]) -> list[str]:
    """The names of the set bits, lowest first; `device` names the type's own ("bit 57": nobody)."""
    names = {member.value: member.name for member in (*Feature, *device)}
    masks = (1 << bit for bit in range(bits.bit_length()))
    return [names.get(m) or f"bit {m.bit_length() - 1}" for m in masks if bits & m]
