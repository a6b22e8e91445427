"""A recording virtio PCI device: configuration space and registers, without anything behind its queues.

Typed from the virtio 1.4 specification (4.1) and PCI 3.0. Every access is recorded, and judged at once:
`violations` has what a driver must not have done, each beginning with its clause. It misbehaves on request.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

NO_VECTOR = 0xFFFF
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1, ACCESS_PLATFORM, RING_PACKED, NOTIF_CONFIG_DATA, RING_RESET = (
    1 << bit for bit in (32, 33, 34, 39, 40)
)
COMMON_AT, ISR_AT, DEVICE_AT, NOTIFY_AT = 0x000, 0x100, 0x200, 0x400  # in the BAR that has them
BAR, BAR_BYTES = 4, 0x1000

# struct virtio_pci_common_cfg (4.1.4.3): offset, width, whether the driver may write it, name.
_COMMON = {
    offset: (width, writable, name)
    for offset, width, writable, name in (
        (0, 4, True, "device_feature_select"),
        (4, 4, False, "device_feature"),
        (8, 4, True, "driver_feature_select"),
        (12, 4, True, "driver_feature"),
        (16, 2, True, "config_msix_vector"),
        (18, 2, False, "num_queues"),
        (20, 1, True, "device_status"),
        (21, 1, False, "config_generation"),
        (22, 2, True, "queue_select"),
        (24, 2, True, "queue_size"),
        (26, 2, True, "queue_msix_vector"),
        (28, 2, True, "queue_enable"),
        (30, 2, False, "queue_notify_off"),
        (32, 4, True, "queue_desc"),
        (36, 4, True, "queue_desc_hi"),
        (40, 4, True, "queue_driver"),
        (44, 4, True, "queue_driver_hi"),
        (48, 4, True, "queue_device"),
        (52, 4, True, "queue_device_hi"),
        (56, 2, False, "queue_notif_config_data"),
        (58, 2, True, "queue_reset"),
        (60, 2, False, "admin_queue_index"),
        (62, 2, False, "admin_queue_num"),
    )
}
_ADDRESSES = (
    "queue_desc",
    "queue_desc_hi",
    "queue_driver",
    "queue_driver_hi",
    "queue_device",
    "queue_device_hi",
)


class Access(NamedTuple):
    """One access of the driver; `where` is a register's name, "notify", "device+8", "config+4" or "isr"."""

    is_write: bool
    where: str
    value: int
    queue: int = -1  # that was selected


class Cap(NamedTuple):
    """One virtio_pci_cap, as a device might have it; `extra` is what follows its 16 bytes."""

    cfg_type: int
    bar: int
    offset: int
    length: int
    extra: bytes = b""
    cap_len: int | None = None  # None: what it is

    def encode(self, following: int) -> bytes:
        size = 16 + len(self.extra) if self.cap_len is None else self.cap_len
        head = struct.pack(
            "<BBBBB3xII", 9, following, size, self.cfg_type, self.bar, self.offset, self.length
        )
        return head + self.extra


@dataclass
class Queue:
    limit: int
    size: int = 0
    vector: int = NO_VECTOR
    enabled: bool = False
    resetting: int = 0  # reads of queue_reset until it is over
    set_up: dict[str, int] = field(default_factory=dict)  # what was written since the last reset
    checked_vector: bool = True


@dataclass
class PciDevice:
    """By default a virtio-blk device of 16 MiB with four queues of 256 and five interrupt vectors."""

    vendor: int = 0x1AF4
    device: int = 0x1042
    revision: int = 1
    header_type: int = 0
    offered: int = VERSION_1 | RING_RESET | 1 << 12 | 1 << 28 | 1 << 29
    config: bytes = struct.pack("<QII4xI8xHH", 32768, 0, 0, 512, 0, 4)
    # Offset and width of each field of `config`, and the feature that it comes with.
    fields: Sequence[tuple[int, int, int]] = (
        (0, 8, 0),
        (8, 4, 1 << 1),
        (12, 4, 1 << 2),
        (20, 4, 1 << 6),
        (32, 1, 1 << 11),
        (34, 2, 1 << 12),
    )
    num_queues: int = 4
    queue_limit: int = 256
    notify_multiplier: int = 4
    notify_offs: Sequence[int] | None = None  # None: the queue's index
    notif_data: int = 0x5000  # and the queue's index
    vectors: int = 5  # in the MSI-X table; 0: no MSI-X
    refused_vectors: frozenset[int] = frozenset()
    caps: Sequence[Cap] | None = None  # None: one of each kind
    reset_reads: int = 0  # of the status before a reset is over
    queue_reset_reads: int = 0
    keeps_features_ok: bool = True
    flips: int = 0  # how often the configuration changes while it is read
    gone: bool = False
    isr: int = 0

    def __post_init__(self) -> None:
        self.log: list[Access] = []
        self.violations: list[str] = []
        self.notified: list[int] = []  # the queues
        self.accepted = 0
        self.generation = 0
        self.msix_enabled = False
        self._resetting = 0
        self._status = 0
        self._must_read_status = False
        self._pci_cfg = [0, 0, 0]  # bar, offset, length
        self._space = bytearray(self._build())
        self._clear()

    def _clear(self) -> None:
        self._status = 0
        self._selected = {"device_feature_select": 0, "driver_feature_select": 0, "queue_select": 0}
        self._driver_features = [0, 0]
        self._config_vector = NO_VECTOR
        self._config_vector_checked = True
        self.accepted = 0
        self.queues = [Queue(self.queue_limit, self.queue_limit) for _ in range(self.num_queues)]

    # Configuration space.

    def default_caps(self) -> list[Cap]:
        """One capability of each kind, in the order of their types."""
        return [
            Cap(1, BAR, COMMON_AT, 64),
            Cap(2, BAR, NOTIFY_AT, 0x400, struct.pack("<I", self.notify_multiplier)),
            Cap(3, BAR, ISR_AT, 1),
            Cap(4, BAR, DEVICE_AT, len(self.config)),
            Cap(5, 0, 0, 0, bytes(4)),
        ]

    def _build(self) -> bytes:
        space = bytearray(256)
        struct.pack_into("<HHHHB", space, 0, self.vendor, self.device, 6, 0x10, self.revision)
        space[0x0E] = self.header_type
        struct.pack_into("<I", space, 0x10 + 4 * BAR, 0xFE000000 | 0xC)
        struct.pack_into("<HH", space, 0x2C, 0x1AF4, 0x1100)
        self._caps = list(self.default_caps() if self.caps is None else self.caps)
        at = 0x40
        places = []
        for cap in self._caps:
            places.append(at)
            at += 16 + len(cap.extra)
        msix = at if self.vectors else 0
        for cap, place, following in zip(self._caps, places, [*places[1:], msix], strict=False):
            body = cap.encode(following)
            space[place : place + len(body)] = body
        if self.vectors:
            struct.pack_into("<BBHII", space, msix, 0x11, 0, self.vectors - 1, 1, 1 | 0x800)
        space[0x34] = places[0] if places else msix
        self._pci_cfg_at = next((p for c, p in zip(self._caps, places, strict=True) if c.cfg_type == 5), 0)
        return bytes(space)

    @property
    def space(self) -> bytes:
        """The configuration space, as it is now."""
        return bytes(self._space)

    def read_config(self, offset: int, width: int) -> int:
        if self.gone:
            return (1 << 8 * width) - 1
        self._judge(width in (1, 2, 4) and offset % width == 0, f"PCI-3: {width} config bytes at {offset}")
        if self._pci_cfg_at and offset == self._pci_cfg_at + 16:
            if not self._pci_cfg[2]:
                return 0  # a look at all of the space: the window shows nothing yet
            self._judge_window(width)
            return self.read(self._pci_cfg[0], self._pci_cfg[1], width)
        return int.from_bytes(self._space[offset : offset + width], "little")

    def write_config(self, offset: int, width: int, value: int) -> None:
        if self.gone:
            return
        at = self._pci_cfg_at
        registers = {at + 4: 0, at + 8: 1, at + 12: 2} if at else {}
        if offset in registers:
            self._pci_cfg[registers[offset]] = value
        elif at and offset == at + 16:
            self._judge_window(width)
            self.write(self._pci_cfg[0], self._pci_cfg[1], width, value)
        else:
            self._judge(offset < 0x40, f"PCI-9: wrote {width} bytes of capabilities at {offset:#x}")
            self.log.append(Access(True, f"config+{offset}", value))

    def _judge_window(self, width: int) -> None:
        bar, offset, length = self._pci_cfg
        self._judge(length == width and offset % length == 0, f"PCI-19: {length} bytes at {offset}")
        inside = any(
            cap.cfg_type != 5 and cap.bar == bar and cap.offset <= offset < cap.offset + cap.length
            for cap in self._caps
        )
        self._judge(inside, f"PCI-19: BAR {bar} offset {offset:#x} belongs to no capability")

    # Registers.

    def read(self, bar: int, offset: int, width: int) -> int:
        """A load of so many bytes."""
        if self.gone:
            return (1 << 8 * width) - 1
        where, inner = self._place(bar, offset)
        if where == "common":
            return self._read_common(inner, width)
        self._judge_after_reset(where)
        if where == "device":
            return self._read_device(inner, width)
        if where == "isr":
            self._judge(not self.msix_enabled, "PCI-17: read the ISR status with MSI-X on")
            self.log.append(Access(False, "isr", self.isr))
            value, self.isr = self.isr, 0
            return value
        return 0

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """A store of so many bytes."""
        if self.gone:
            return
        where, inner = self._place(bar, offset)
        if where == "common":
            self._write_common(inner, width, value)
            return
        self._judge_after_reset(where)
        if where == "notify":
            self._notify(inner, width, value)
        elif where == "device":
            self.log.append(Access(True, f"device+{inner}", value))
            self._judge(bool(self._status & FEATURES_OK), "INI-2: wrote the configuration before FEATURES_OK")
        else:
            self._judge(False, f"PCI-9: wrote {where}")

    def _place(self, bar: int, offset: int) -> tuple[str, int]:
        for name, at, size in (
            ("common", COMMON_AT, 64),
            ("isr", ISR_AT, 4),
            ("device", DEVICE_AT, 0x200),
            ("notify", NOTIFY_AT, BAR_BYTES - NOTIFY_AT),
        ):
            if bar == BAR and at <= offset < at + size:
                return name, offset - at
        self._judge(False, f"PCI-7, PCI-8: access to BAR {bar} offset {offset:#x}, where nothing is")
        return "nothing", offset

    def _judge(self, good: bool, violation: str) -> None:
        if not good:
            self.violations.append(violation)

    def _judge_after_reset(self, what: str) -> None:
        self._judge(not self._must_read_status, f"PCI-13: touched {what} before the status read 0")

    def _queue(self) -> Queue | None:
        number = self._selected["queue_select"]
        return self.queues[number] if number < len(self.queues) else None

    def _register(self, offset: int, width: int) -> tuple[bool, str]:
        if offset not in _COMMON:
            self._judge(False, f"PCI-3: {width} bytes at {offset} of the common configuration")
            return False, "nothing"
        want, writable, name = _COMMON[offset]
        self._judge(width == want, f"PCI-3: {name} accessed with {width} bytes, want {want}")
        if name != "device_status":
            self._judge_after_reset(name)
        return writable, name

    def _read_common(self, offset: int, width: int) -> int:
        _, name = self._register(offset, width)
        value = self._value(name)
        self.log.append(Access(False, name, value, self._selected["queue_select"]))
        return value

    def _value(self, name: str) -> int:
        queue = self._queue()
        if name in self._selected:
            return self._selected[name]
        if name == "device_feature":
            half = self._selected["device_feature_select"]
            return self.offered >> 32 * half & 0xFFFFFFFF
        if name == "driver_feature":
            half = self._selected["driver_feature_select"]
            return self._driver_features[half] if half < 2 else 0
        if name == "config_msix_vector":
            self._config_vector_checked = True
            return self._config_vector
        if name == "num_queues":
            return self.num_queues
        if name == "device_status":
            if self._resetting:
                self._resetting -= 1
                return FAILED
            self._must_read_status = False
            return self._status
        if name == "config_generation":
            return self.generation & 0xFF
        if name == "queue_notif_config_data":
            self._judge(bool(self.accepted & NOTIF_CONFIG_DATA), f"CFG-2: {name} without its feature")
            return self.notif_data + self._selected["queue_select"]
        if queue is None:
            return 0
        if name == "queue_size":
            return queue.size
        if name == "queue_msix_vector":
            queue.checked_vector = True
            return queue.vector
        if name == "queue_enable":
            return int(queue.enabled)
        if name == "queue_notify_off":
            return self._notify_off(self._selected["queue_select"])
        if name == "queue_reset":
            self._judge(bool(self.accepted & RING_RESET), f"CFG-2: {name} without its feature")
            if queue.resetting:
                queue.resetting -= 1
                return 1
            return 0
        return queue.set_up.get(name, 0)

    def _notify_off(self, index: int) -> int:
        return index if self.notify_offs is None else self.notify_offs[index]

    def _write_common(self, offset: int, width: int, value: int) -> None:
        writable, name = self._register(offset, width)
        self.log.append(Access(True, name, value, self._selected["queue_select"]))
        self._judge(writable, f"PCI-10: wrote {name}")
        if name in self._selected:
            self._selected[name] = value
        elif name == "device_status":
            self._write_status(value)
        elif name == "driver_feature":
            self._judge(not self._status & FEATURES_OK, "INI-3: wrote features after FEATURES_OK")
            self._judge(bool(self._status & DRIVER), "INI-1: wrote features before DRIVER")
            half = self._selected["driver_feature_select"]
            self._judge(half < 2 or not value, f"FEA-1: accepted feature bits of word {half}")
            if half < 2:
                self._driver_features[half] = value
        elif name == "config_msix_vector":
            self._config_vector = self._take_vector(value)
            self._config_vector_checked = False
        elif name.startswith("queue_"):
            self._write_queue(name, value)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._clear()
            self._resetting = self.reset_reads
            self._must_read_status = True
            return
        self._judge_after_reset(f"status {value:#x}")
        self._judge(not self._status & FAILED, f"STA-2: wrote status {value:#x} after FAILED")
        self._judge(value & self._status == self._status, f"STA-1: status {self._status:#x} to {value:#x}")
        added = value & ~self._status
        self._judge(not added & DRIVER or bool(value & ACKNOWLEDGE), "INI-1: DRIVER before ACKNOWLEDGE")
        self._judge(not added & DRIVER_OK or bool(value & FEATURES_OK), "INI-1: DRIVER_OK too early")
        if added & FEATURES_OK:
            self.accepted = self._driver_features[0] | self._driver_features[1] << 32
            extra = self.accepted & ~self.offered
            self._judge(not extra, f"FEA-1: accepted {extra:#x}, which was not offered")
            if not self.keeps_features_ok:
                value &= ~FEATURES_OK
        if added & DRIVER_OK:
            self._judge(
                self._config_vector_checked and all(queue.checked_vector for queue in self.queues),
                "PCI-20: a vector was not read back",
            )
        self._status = value

    def _take_vector(self, vector: int) -> int:
        self._judge(
            vector == NO_VECTOR or vector < self.vectors, f"PCI-20: vector {vector} of {self.vectors}"
        )
        return NO_VECTOR if vector in self.refused_vectors or vector >= self.vectors else vector

    def _write_queue(self, name: str, value: int) -> None:
        index, queue = self._selected["queue_select"], self._queue()
        self._judge(bool(self._status & FEATURES_OK), f"INI-1: wrote {name} before FEATURES_OK")
        if queue is None:
            self._judge(False, f"PCI-10: wrote {name} of queue {index}, there are {self.num_queues}")
            return
        self._judge(not queue.resetting, f"PCI-15: wrote {name} before the reset of queue {index} was over")
        if name == "queue_reset":
            self._judge(bool(self.accepted & RING_RESET), f"PCI-15: wrote {name} without its feature")
            self._judge(value == 1, f"PCI-15: wrote {value} to {name}")
            self.queues[index] = Queue(
                self.queue_limit, self.queue_limit, resetting=1 + self.queue_reset_reads
            )
            return
        self._judge(not queue.enabled, f"PCI-12: wrote {name} of queue {index} after its queue_enable")
        queue.set_up[name] = value
        if name == "queue_enable":
            self._judge(value == 1, f"PCI-14: wrote {value} to queue_enable")
            missing = [address for address in _ADDRESSES if address not in queue.set_up]
            self._judge(not missing, f"PCI-12: enabled queue {index} without {missing}")
            self._judge(queue.checked_vector, f"PCI-20: vector of queue {index} not read back")
            queue.enabled = True
        elif name == "queue_size":
            power = value and not value & (value - 1)
            self._judge(bool(power) and value <= queue.limit, f"PCI-11: queue_size {value}")
            queue.size = value
        elif name == "queue_msix_vector":
            queue.vector = self._take_vector(value)
            queue.checked_vector = False

    def _read_device(self, offset: int, width: int) -> int:
        self.log.append(Access(False, f"device+{offset}", width))
        for at, want, feature in self.fields:
            if at <= offset < at + want:
                parts = (at,) if want < 8 else (at, at + 4)
                good = offset in parts and width == min(want, 4)
                self._judge(good, f"PCI-3: {width} bytes at {offset} of the field at {at}")
                accepted = self.accepted if self._status & FEATURES_OK else self.offered
                self._judge(accepted & feature == feature, f"CFG-2: the field at {at} without its feature")
                break
        else:
            self._judge(False, f"CFG-2: {width} bytes at {offset}, where no field is")
        value = int.from_bytes(self.config[offset : offset + width], "little")
        if self.flips:
            self.flips -= 1
            self.generation += 1
            self.config = bytes([self.config[0] ^ 0xFF]) + self.config[1:]
        return value

    def _notify(self, offset: int, width: int, value: int) -> None:
        self._judge(width == 2, f"PCI-21: notified with {width} bytes")
        self._judge(bool(self._status & DRIVER_OK), "INI-5: notified before DRIVER_OK")
        for index in range(self.num_queues):
            want = index + (self.notif_data if self.accepted & NOTIF_CONFIG_DATA else 0)
            if offset == self._notify_off(index) * self.notify_multiplier and value == want:
                self.notified.append(index)
                self._judge(self.queues[index].enabled, f"PCI-12: notified queue {index}, not enabled")
                return
        self._judge(False, f"PCI-22: notified at {offset} with {value:#x}")

    # What a test asks.

    def written(self, where: str) -> list[int]:
        """The values written to a register, in order."""
        return [access.value for access in self.log if access.is_write and access.where == where]

    def address(self, queue: int, area: str) -> int:
        """Where the driver says an area of a queue is: desc, driver or device."""
        set_up = self.queues[queue].set_up
        return set_up[f"queue_{area}"] | set_up[f"queue_{area}_hi"] << 32
