"""A recording PCI device of the legacy interface: registers in I/O ports, nothing behind its queues.

Typed from the virtio 1.4 specification's legacy sections (2.7.2, 3.1.2, 4.1.4.10, 4.1.5.1). Every access is
recorded, and judged at once: `violations` has what a driver must not have done.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.model.pci import ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, NO_VECTOR, Access

ANY_LAYOUT = 1 << 27
PAGE = 4096

# Offset: width, whether the driver may write it, name.
_HEADER = {
    0: (4, False, "device_features"),
    4: (4, True, "driver_features"),
    8: (4, True, "queue_address"),
    12: (2, False, "queue_size"),
    14: (2, True, "queue_select"),
    16: (2, True, "queue_notify"),
    18: (1, True, "device_status"),
    19: (1, False, "isr_status"),
}
_VECTORS = {20: (2, True, "config_msix_vector"), 22: (2, True, "queue_msix_vector")}


@dataclass
class LegacyQueue:
    size: int
    address: int = 0  # in pages
    vector: int = NO_VECTOR
    checked_vector: bool = True


@dataclass
class LegacyDevice:
    """By default a virtio-blk device of 16 MiB with two queues of 128 and three interrupt vectors."""

    device: int = 0x1001
    offered: int = ANY_LAYOUT | 1 << 12 | 1 << 28 | 1 << 29
    config: bytes = struct.pack("<QII4xI8xHH", 32768, 0, 0, 512, 0, 2)
    # Offset and width of each field of `config`, and the feature that it comes with.
    fields: tuple[tuple[int, int, int], ...] = ((0, 8, 0), (34, 2, 1 << 12))
    sizes: tuple[int, ...] = (128, 128)
    vectors: int = 3
    refused_vectors: frozenset[int] = frozenset()
    ports: bool = True  # what BAR 0 is
    reset_reads: int = 0
    flips: int = 0  # how often the configuration changes while it is read
    isr: int = 0
    gone: bool = False
    log: list[Access] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    notified: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.msix_enabled = False
        self._resetting = 0
        self._must_read_status = False
        self._clear()

    def _clear(self) -> None:
        self._status = self.accepted = self._selected = 0
        self._config_vector = NO_VECTOR
        self._config_vector_checked = True
        self.queues = [LegacyQueue(size) for size in self.sizes]

    @property
    def bar_bytes(self) -> int:
        return 64 + len(self.config)

    @property
    def space(self) -> bytes:
        """The configuration space: a transitional device whose only capability is MSI-X."""
        space = bytearray(256)
        struct.pack_into("<HHHHB", space, 0, 0x1AF4, self.device, 5, 0x10, 0)
        struct.pack_into("<I", space, 0x10, 0xC001 if self.ports else 0xFE000000)
        struct.pack_into("<I", space, 0x14, 0xFE001000)
        struct.pack_into("<HH", space, 0x2C, 0x1AF4, 2)
        space[0x3D] = 1
        if self.vectors:
            space[0x34] = 0x40
            control = self.vectors - 1 | (0x8000 if self.msix_enabled else 0)
            struct.pack_into("<BBHII", space, 0x40, 0x11, 0, control, 1, 0x800 | 1)
        return bytes(space)

    def read_config(self, offset: int, width: int) -> int:
        return int.from_bytes(self.space[offset : offset + width], "little")

    def write_config(self, offset: int, width: int, value: int) -> None:
        self._judge(False, f"wrote the PCI configuration space at {offset:#x}")

    def _judge(self, good: bool, violation: str) -> None:
        if not good:
            self.violations.append(violation)

    def _register(self, offset: int, width: int) -> tuple[bool, str] | None:
        registers = _HEADER | (_VECTORS if self.msix_enabled else {})
        if offset not in registers:
            return None
        want, writable, name = registers[offset]
        self._judge(width == want, f"{name} accessed with {width} bytes, want {want}")
        if name != "device_status":
            self._judge(not self._must_read_status, f"touched {name} before the status read 0")
        return writable, name

    def read(self, bar: int, offset: int, width: int) -> int:
        self._judge(bar == 0, f"read BAR {bar}")
        if self.gone:
            return (1 << 8 * width) - 1
        found = self._register(offset, width)
        if found is None:
            return self._read_device(offset - (24 if self.msix_enabled else 20), width)
        value = self._value(found[1])
        self.log.append(Access(False, found[1], value, self._selected))
        return value

    def _value(self, name: str) -> int:
        queue = self.queues[self._selected] if self._selected < len(self.queues) else LegacyQueue(0)
        if name == "device_status" and self._resetting:
            self._resetting -= 1
            return FAILED
        if name == "device_status":
            self._must_read_status = False
            return self._status
        if name == "isr_status":
            self._judge(not self.msix_enabled, "read the ISR status with MSI-X on")
            value, self.isr = self.isr, 0
            return value
        if name == "queue_msix_vector":
            queue.checked_vector = True
        if name == "config_msix_vector":
            self._config_vector_checked = True
        return {
            "device_features": self.offered,
            "driver_features": self.accepted,
            "queue_address": queue.address,
            "queue_size": queue.size,
            "queue_select": self._selected,
            "queue_notify": 0,
            "config_msix_vector": self._config_vector,
            "queue_msix_vector": queue.vector,
        }[name]

    def _read_device(self, offset: int, width: int) -> int:
        self.log.append(Access(False, f"device+{offset}", width))
        for at, want, feature in self.fields:
            parts = (at,) if want < 8 else (at, at + 4)
            if offset in parts and width == min(want, 4):
                self._judge(self.accepted & feature == feature, f"the field at {at} without its feature")
                break
        else:
            self._judge(False, f"{width} bytes at {offset} of the configuration, where no such field is")
        value = int.from_bytes(self.config[offset : offset + width], "little")
        if self.flips:
            self.flips -= 1
            self.config = bytes([self.config[0] ^ 0xFF]) + self.config[1:]
        return value

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        self._judge(bar == 0, f"wrote BAR {bar}")
        if self.gone:
            return
        found = self._register(offset, width)
        if found is None:
            self._judge(False, f"wrote {width} bytes of the configuration at {offset}")
            return
        writable, name = found
        self.log.append(Access(True, name, value, self._selected))
        self._judge(writable, f"wrote {name}")
        if name == "device_status":
            self._write_status(value)
        elif name == "driver_features":
            self._judge(bool(self._status & DRIVER), "wrote features before DRIVER")
            self._judge(not self._status & DRIVER_OK, "wrote features after DRIVER_OK")
            self._judge(
                not value & ~self.offered, f"accepted {value & ~self.offered:#x}, which was not offered"
            )
            self.accepted = value
        elif name == "queue_select":
            self._selected = value
        elif name == "queue_notify":
            self._judge(bool(self._status & DRIVER_OK), "notified before DRIVER_OK")
            there = value < len(self.queues) and self.queues[value].address
            self._judge(bool(there), f"notified queue {value}, which is not there")
            self.notified.append(value)
        elif name == "config_msix_vector":
            self._config_vector, self._config_vector_checked = self._take(value), False
        else:
            self._write_queue(name, value)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._clear()
            self._resetting = self.reset_reads
            self._must_read_status = True
            return
        self._judge(not self._must_read_status, f"status {value:#x} before it read 0")
        self._judge(value & self._status == self._status, f"status {self._status:#x} to {value:#x}")
        known = ACKNOWLEDGE | DRIVER | DRIVER_OK | FAILED
        self._judge(not value & ~known, f"status {value:#x}, of which a legacy device knows {known:#x}")
        if value & ~self._status & DRIVER_OK:
            read = self._config_vector_checked and all(queue.checked_vector for queue in self.queues)
            self._judge(read, "a vector was not read back")
        self._status = value

    def _take(self, vector: int) -> int:
        self._judge(vector < self.vectors, f"vector {vector} of {self.vectors}")
        return NO_VECTOR if vector in self.refused_vectors else vector

    def _write_queue(self, name: str, value: int) -> None:
        if self._selected >= len(self.queues):
            self._judge(False, f"wrote {name} of queue {self._selected}")
            return
        queue = self.queues[self._selected]
        if name == "queue_address":
            self._judge(value > 0 and not queue.address, f"queue address {queue.address} to {value}")
            self._judge(not self._status & DRIVER_OK, "set up a queue after DRIVER_OK")
            queue.address = value
        elif name == "queue_msix_vector":
            queue.vector, queue.checked_vector = self._take(value), False

    def written(self, where: str) -> list[int]:
        """The values written to a register, in order."""
        return [access.value for access in self.log if access.is_write and access.where == where]
