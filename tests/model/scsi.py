"""A virtio-scsi device with disks on bytearrays (virtio 5.6), just enough SCSI to be enumerated."""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.model.ring import Chain

_COMMAND: Final = struct.Struct("<8sQBBB32s")  # lun, id, task_attr, prio, crn, cdb (5.6.6.1)
_RESPONSE: Final = struct.Struct("<IIHBB96s")  # sense_len, residual, qualifier, status, response, sense
_CONFIG: Final = struct.Struct("<IIIIIIIHHI")  # 5.6.4
EVENT_SIZE: Final = 16  # struct virtio_scsi_event (5.6.6.3)

OK, BAD_TARGET, INCORRECT_LUN = 0, 3, 12
GOOD, CHECK_CONDITION = 0, 2
NO_SENSE: Final = (0, 0, 0)
RECOVERED: Final = (1, 0x17, 1)  # recovered data with retries
UNIT_ATTENTION: Final = (6, 0x29, 0)
INVALID_COMMAND: Final = (5, 0x20, 0)
OUT_OF_RANGE: Final = (5, 0x21, 0)
INVALID_FIELD: Final = (5, 0x24, 0)
NO_SUCH_LUN: Final = (5, 0x25, 0)
READ_ONLY: Final = (7, 0x27, 0)


class ScsiFeature(enum.IntFlag):
    """Feature bits of the SCSI host device (5.6.3)."""

    INOUT = 1 << 0
    HOTPLUG = 1 << 1
    CHANGE = 1 << 2
    T10_PI = 1 << 3


class ScsiRequest(NamedTuple):
    """One command as it arrived, with the status it got; lun is -1 for a well-known one."""

    target: int
    lun: int
    cdb: bytes
    out: int
    room: int
    status: int


class Tmf(NamedTuple):
    """A task management function as it arrived (5.6.6.2)."""

    subtype: int
    lun: bytes
    tag: int


@dataclass
class Lun:
    """A direct-access disk."""

    blocks: int = 2048
    block_size: int = 512
    read_only: bool = False
    attention: tuple[int, int, int] | None = UNIT_ATTENTION
    """What the first command that may be refused is refused with."""
    name: int = 1
    """By which it can be told from others (page 83)."""

    def __post_init__(self) -> None:
        self.disk = bytearray(self.blocks * self.block_size)


def sense(key: int, asc: int, ascq: int) -> bytes:
    """Fixed-format sense data (SPC-4 4.5.3)."""
    return struct.pack(">BBBIBIBB4x", 0x70, 0, key, 0, 10, 0, asc, ascq)


@dataclass
class Scsi:
    """Its fields may be changed while it runs."""

    luns: dict[tuple[int, int], Lun] = field(default_factory=lambda: {(0, 0): Lun()})
    features: int = 0
    num_queues: int = 4
    seg_max: int = 126
    max_sectors: int = 65535
    cmd_per_lun: int = 128
    max_target: int = 7
    max_lun: int = 255
    tail: bytes = b""
    event_info_size: int = EVENT_SIZE
    status: Callable[[ScsiRequest], int | None] | None = None
    """Overrides the response byte; None leaves the whole response unwritten."""
    recovers: bool = False
    """Whether it has trouble with each read and write, and does it all the same (SPC-4 4.5.6)."""
    known: frozenset[int] | None = None
    """The operation codes that it knows, if not all of them."""
    manage: Callable[[Tmf], int | None] = field(default=lambda tmf: 0, repr=False)
    """The response to a task management function; None never gives one."""

    type_name: Final = "scsi"
    first_queue: Final = 2

    violate: Callable[[str, str], None] = field(default=lambda clause, text: None, repr=False)
    accepted: int = 0
    config_known: bool = False
    """Whether the driver has read the limits."""

    def __post_init__(self) -> None:
        self.requests: deque[ScsiRequest] = deque(maxlen=8192)
        self.events: deque[Chain] = deque(maxlen=256)
        self.tmfs: deque[Tmf] = deque(maxlen=1024)

    @property
    def disk(self) -> bytearray:
        """The first disk's bytes."""
        return next(iter(self.luns.values())).disk

    def post(self, event: int, lun: bytes, reason: int = 0) -> None:
        """Put an event into a buffer of the event queue; in the back end's thread."""
        chain = self.events.popleft()
        chain.write(struct.pack("<I8sI", event, lun, reason))
        chain.ring.finish([(chain, EVENT_SIZE)])

    def abort(self, chain: Chain, response: int = 2) -> None:
        """Give back a request that was held, as aborted (2) or reset (4); in the back end's thread."""
        chain.ring.held.remove(chain)
        chain.write(_RESPONSE.pack(0, 0, 0, 0, response, b""))
        chain.ring.finish([(chain, _RESPONSE.size)])

    @staticmethod
    def tag(chain: Chain) -> int:
        """The tag of a request."""
        return int(_COMMAND.unpack_from(chain.read())[1])

    @property
    def config(self) -> bytes:
        """struct virtio_scsi_config (5.6.4); to look at it is to know it."""
        self.config_known = True
        whole = _CONFIG.pack(
            self.num_queues,
            self.seg_max,
            self.max_sectors,
            self.cmd_per_lun,
            self.event_info_size,
            96,  # sense_size
            32,  # cdb_size
            0,  # max_channel
            self.max_target,
            self.max_lun,
        )
        return whole + self.tail

    def handle(self, chain: Chain) -> int | None:
        """Do one request; how many bytes were written, None for a buffer that is kept."""
        if chain.ring.index == 0:
            return self._control(chain)
        if chain.ring.index == 1:
            if chain.readable or chain.writable_size < max(EVENT_SIZE, self.event_info_size):
                self.violate("SCS-6", f"an event buffer of {chain.writable_size} writable bytes")
            self.events.append(chain)
            return None
        where = f"head {chain.head} of ring {chain.ring.index}"
        sent = chain.read()
        if len(sent) < _COMMAND.size or chain.writable_size < _RESPONSE.size:
            self.violate("SCS-11", f"{where}: {len(sent)} bytes to read, {chain.writable_size} to write")
            return 0
        lun, _, attribute, priority, crn, cdb = _COMMAND.unpack_from(sent)
        if attribute or priority or crn:
            self.violate("SCS-3", f"{where}: task_attr {attribute}, prio {priority}, crn {crn}")
        if len(chain.readable) + len(chain.writable) - 2 > self.seg_max:
            self.violate("SCS-11", f"{where}: more than seg_max {self.seg_max} data segments")
        out = sent[_COMMAND.size :]
        room = chain.writable_size - _RESPONSE.size
        data, code, response = self._command(where, lun, cdb, out, room)
        target, number = self._address(lun) or (-1, -1)
        request = ScsiRequest(target, number, cdb, len(out), room, code[0] and CHECK_CONDITION)
        chain.request = request
        self.requests.append(request)
        data = data[:room]
        if self.status is not None:
            override = self.status(request)
            if override is None:
                return 0
            response = override
        raw = sense(*code) if code != NO_SENSE else b""
        if self.recovers and not raw and cdb[0] in (0x28, 0x2A, 0x88, 0x8A):
            raw = sense(*RECOVERED)
        chain.write(
            _RESPONSE.pack(
                len(raw),
                (room or len(out)) - (len(data) if room else len(out) * (code == NO_SENSE)),
                0,
                CHECK_CONDITION if raw else GOOD,
                response,
                raw,
            )
        )
        chain.write(data, _RESPONSE.size)
        return _RESPONSE.size + len(data)

    def _control(self, chain: Chain) -> int | None:
        sent = chain.read()
        kind = struct.unpack_from("<I", sent)[0] if len(sent) >= 4 else -1
        if kind == 0 and len(sent) == 24 and chain.writable_size == 1:
            tmf = Tmf(*struct.unpack_from("<I8sQ", sent, 4))
            self.tmfs.append(tmf)
            response = self.manage(tmf)
            if response is None:
                return None
            chain.write(bytes([response]))
            return 1
        if kind in (1, 2) and len(sent) == 16 and chain.writable_size == 5:
            chain.write(bytes(5))
            return 5
        self.violate("SCS-11", f"control request {kind} of {len(sent)} bytes")
        return 0

    def _address(self, lun: bytes) -> tuple[int, int] | None:
        if lun[:2] == b"\xc1\x01":
            return 0, -1
        if lun[0] != 1 or lun[2] & 0xC0 not in (0, 0x40) or any(lun[4:]):
            return None
        return lun[1], (lun[2] & 0x3F) << 8 | lun[3]

    def _command(
        self, where: str, lun: bytes, cdb: bytes, out: bytes, room: int
    ) -> tuple[bytes, tuple[int, int, int], int]:
        """Data in, sense code and response of one command."""
        address = self._address(lun)
        if address is None or (lun[0] == 1 and not lun[2] & 0x40):
            self.violate("SCS-9", f"{where}: lun {lun.hex()}")
            return b"", NO_SENSE, BAD_TARGET
        target, number = address
        if self.config_known and (target > self.max_target or number > self.max_lun):
            self.violate("SCS-11", f"{where}: target {target}, lun {number} are over the limits")
        there = sorted(lun for at, lun in self.luns if at == target)
        if not there:
            return b"", NO_SENSE, BAD_TARGET
        code = cdb[0]
        if self.known is not None and code not in self.known:
            return b"", INVALID_COMMAND, OK
        if code == 0xA0:  # REPORT LUNS
            listed = b"".join(struct.pack(">BB6x", 0x40 * (n > 255) | n >> 8, n & 0xFF) for n in there)
            most = struct.unpack_from(">I", cdb, 6)[0]
            return (struct.pack(">I4x", len(listed)) + listed)[:most], NO_SENSE, OK
        disk = self.luns.get((target, number))
        if disk is None:
            if code == 0x12:  # INQUIRY: no device at this lun
                return bytes([0x7F, 0, 6, 2, 31]) + bytes(31), NO_SENSE, OK
            return b"", NO_SUCH_LUN, OK
        if disk.attention and code not in (0x12, 0x03):
            pending, disk.attention = disk.attention, None
            return b"", pending, OK
        data, result = self._disk_command(where, disk, cdb, out, room)
        return data, result, OK

    def _disk_command(
        self, where: str, disk: Lun, cdb: bytes, out: bytes, room: int
    ) -> tuple[bytes, tuple[int, int, int]]:
        code = cdb[0]
        last = disk.blocks - 1
        if code == 0x00:  # TEST UNIT READY
            return b"", NO_SENSE
        if code == 0x03:  # REQUEST SENSE
            pending, disk.attention = disk.attention or NO_SENSE, None
            return sense(*pending)[: cdb[4]], NO_SENSE
        if code == 0x12:  # INQUIRY
            return self._inquiry(disk, cdb)
        if code == 0x1A:  # MODE SENSE(6): header only, write-protect bit
            return bytes([3, 0, 0x80 * disk.read_only, 0])[: cdb[4]], NO_SENSE
        if code == 0x5A:  # MODE SENSE(10)
            return bytes([0, 6, 0, 0x80 * disk.read_only, 0, 0, 0, 0]), NO_SENSE
        if code == 0x25:  # READ CAPACITY(10)
            return struct.pack(">II", min(last, 0xFFFFFFFF), disk.block_size), NO_SENSE
        if code == 0x9E and cdb[1] & 0x1F == 0x10:  # READ CAPACITY(16)
            most = struct.unpack_from(">I", cdb, 10)[0]
            return struct.pack(">QIBB18x", last, disk.block_size, 0, 0)[:most], NO_SENSE
        if code in (0x35, 0x91):  # SYNCHRONIZE CACHE
            return b"", NO_SENSE
        if code in (0x28, 0x2A):  # READ(10), WRITE(10)
            start, count = struct.unpack_from(">I", cdb, 2)[0], struct.unpack_from(">H", cdb, 7)[0]
        elif code in (0x88, 0x8A):  # READ(16), WRITE(16)
            start, count = struct.unpack_from(">QI", cdb, 2)
        elif code == 0x93 and len(out) == disk.block_size:  # WRITE SAME(16)
            start, count = struct.unpack_from(">QI", cdb, 2)
            if start + count > disk.blocks:
                return b"", OUT_OF_RANGE
            disk.disk[start * disk.block_size : (start + count) * disk.block_size] = out * count
            return b"", NO_SENSE
        elif code == 0x42:  # UNMAP
            for at in range(8, len(out) // 16 * 16 + 8, 16):
                start, count = struct.unpack_from(">QI", out, at)
                if start + count > disk.blocks:
                    return b"", OUT_OF_RANGE
                size = disk.block_size
                disk.disk[start * size : (start + count) * size] = bytes(count * size)
            return b"", NO_SENSE
        else:
            return b"", INVALID_COMMAND
        size = disk.block_size
        if start + count > disk.blocks:
            self.violate("BLK-6", f"{where}: {count} blocks at {start} of {disk.blocks}")
            return b"", OUT_OF_RANGE
        if count * size // 512 > self.max_sectors:
            self.violate("SCS-11", f"{where}: {count} blocks, max_sectors is {self.max_sectors}")
        if code in (0x28, 0x88):
            if room != count * size or out:
                self.violate("SCS-11", f"{where}: a read of {count * size} bytes into {room}")
            with memoryview(disk.disk) as view:
                return bytes(view[start * size : (start + count) * size]), NO_SENSE
        if len(out) != count * size or room:
            self.violate("SCS-11", f"{where}: a write of {count * size} bytes from {len(out)}")
        if disk.read_only:
            return b"", READ_ONLY
        disk.disk[start * size : (start + count) * size] = out
        return b"", NO_SENSE

    def _inquiry(self, disk: Lun, cdb: bytes) -> tuple[bytes, tuple[int, int, int]]:
        most = struct.unpack_from(">H", cdb, 3)[0]
        if not cdb[1] & 1:
            standard = bytes([0, 0, 6, 2, 31, 0, 0, 2]) + b"MODEL   RECORDING DISK  1.0 "
            return standard[:most], NO_SENSE
        pages = {
            0x00: bytes([0x00, 0x80, 0x83, 0xB0]),
            0x80: b"model-serial",
            0x83: bytes([0x01, 0x03, 0, 8]) + struct.pack(">Q", 5 << 60 | disk.name),
            0xB0: bytes(60),
        }
        page = pages.get(cdb[2])
        if page is None:
            return b"", INVALID_FIELD
        return (struct.pack(">BBH", 0, cdb[2], len(page)) + page)[:most], NO_SENSE
