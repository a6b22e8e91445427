"""The virtio SCSI host device: what travels around a SCSI command (virtio 1.4, 5.6)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from virtio.errors import ProtocolError, RequestError
from virtio.wire import scsi
from virtio.wire._record import Record
from virtio.wire.virtio import config_fields

SENSE_SIZE = 96  # after a reset, until the driver writes sense_size and cdb_size (5.6.4)
CDB_SIZE = 32
MAX_TARGET = 255
MAX_LUN = 16383
REPORT_LUNS_WLUN = b"\xc1\x01\0\0\0\0\0\0"  # instead of a target and LUN (5.6.6.1)


class ScsiFeature(enum.IntFlag):
    """Feature bits of the SCSI host device (5.6.3), as masks."""

    INOUT = 1 << 0
    HOTPLUG = 1 << 1
    CHANGE = 1 << 2
    T10_PI = 1 << 3


class ResponseCode(enum.IntEnum):
    """What became of a request or a task management function on the way (5.6.6.1, 5.6.6.2)."""

    OK = 0
    FUNCTION_COMPLETE = 0
    OVERRUN = 1
    ABORTED = 2
    BAD_TARGET = 3
    RESET = 4
    BUSY = 5
    TRANSPORT_FAILURE = 6
    TARGET_FAILURE = 7
    NEXUS_FAILURE = 8
    FAILURE = 9
    FUNCTION_SUCCEEDED = 10
    FUNCTION_REJECTED = 11
    INCORRECT_LUN = 12


class ControlType(enum.IntEnum):
    """The first number of every request on the control queue (5.6.6.2)."""

    TMF = 0
    AN_QUERY = 1
    AN_SUBSCRIBE = 2


class TaskFunction(enum.IntEnum):
    """Task management functions, `subtype` of a TaskManagement (5.6.6.2)."""

    ABORT_TASK = 0
    ABORT_TASK_SET = 1
    CLEAR_ACA = 2
    CLEAR_TASK_SET = 3
    I_T_NEXUS_RESET = 4
    LOGICAL_UNIT_RESET = 5
    QUERY_TASK = 6
    QUERY_TASK_SET = 7


EVENTS_MISSED = 1 << 31  # beside any EventType: some were lost for want of buffers (5.6.6.3)


class EventType(enum.IntEnum):
    """What happened (5.6.6.3)."""

    NO_EVENT = 0
    TRANSPORT_RESET = 1
    ASYNC_NOTIFY = 2
    PARAM_CHANGE = 3


class ResetReason(enum.IntEnum):
    """`reason` of a TRANSPORT_RESET; for LUN 0 it may mean the whole target (5.6.6.3)."""

    HARD = 0
    RESCAN = 1
    REMOVED = 2


@dataclass(frozen=True, slots=True)
class ScsiConfig(Record):
    """The configuration space (5.6.4); a driver may write sense_size and cdb_size alone.

    The defaults are what to assume of a device whose space cannot be read (SPDK's target has no
    CONFIG): the sizes that a reset restores, QEMU's limits, which SPDK's target keeps too, and
    every target that can be addressed, since an absent one answers at once.
    """

    num_queues: int = 1
    seg_max: int = 126
    max_sectors: int = 0xFFFF
    cmd_per_lun: int = 128
    event_info_size: int = 16
    sense_size: int = SENSE_SIZE
    cdb_size: int = CDB_SIZE
    max_channel: int = 0
    max_target: int = MAX_TARGET
    max_lun: int = MAX_LUN
    FORMAT = struct.Struct("<IIIIIIIHHI")
    FIELDS = config_fields(FORMAT.format)

    @classmethod
    def decode(cls, payload: bytes) -> ScsiConfig:
        """Accepts a longer payload (CFG-3)."""
        # A bare super() would mean the class as it was before slots=True made another of it.
        return super(ScsiConfig, cls).decode(payload[: cls.FORMAT.size])


def encode_lun(target: int, lun: int) -> bytes:
    """The eight bytes that address a logical unit: 1, target, flat LUN, zeros (5.6.6.1)."""
    if not 0 <= target <= MAX_TARGET or not 0 <= lun <= MAX_LUN:
        raise RequestError(f"target {target} LUN {lun}, there are 0 to {MAX_TARGET} and 0 to {MAX_LUN}")
    return bytes((1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0))


def decode_lun(address: bytes) -> tuple[int, int]:
    """Target and LUN; the LUN may be in flat or, as in QEMU's events, in peripheral form."""
    if len(address) != 8 or address[0] != 1:
        raise ProtocolError(f"LUN address {address.hex()}, want 8 bytes beginning with 01")
    return address[1], scsi.decode_lun(address[2:])


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """What the device reads before the data (5.6.6.1); `lun` is eight bytes, see encode_lun."""

    lun: bytes
    tag: int
    task_attr: int = 0
    prio: int = 0
    crn: int = 0
    cdb: bytes = b""

    def encode(self, cdb_size: int = CDB_SIZE) -> bytes:
        """19 + `cdb_size` bytes, the command padded with zeros."""
        if len(self.lun) != 8 or len(self.cdb) > cdb_size:
            raise RequestError(
                f"LUN of {len(self.lun)} bytes, command of {len(self.cdb)}, want 8 and {cdb_size}"
            )
        head = _REQUEST.pack(self.lun, self.tag, self.task_attr, self.prio, self.crn)
        return head + self.cdb.ljust(cdb_size, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> RequestHeader:
        """The command is all that follows the 19 bytes, padding included."""
        if len(data) < _REQUEST.size:
            raise ProtocolError(f"SCSI request of {len(data)} bytes, want {_REQUEST.size} or more")
        lun, tag, task_attr, prio, crn = _REQUEST.unpack_from(data)
        return cls(lun, tag, task_attr, prio, crn, data[_REQUEST.size :])


@dataclass(frozen=True, slots=True)
class Response:
    """What the device writes before the data (5.6.6.1); `sense` is `sense_len` bytes long.

    `status` is SCSI's and counts only when `response` is OK. `residual` is how many bytes of data
    were not transferred.
    """

    sense_len: int = 0
    residual: int = 0
    status_qualifier: int = 0
    status: int = 0
    response: int = ResponseCode.OK
    sense: bytes = b""

    def encode(self, sense_size: int = SENSE_SIZE) -> bytes:
        """12 + `sense_size` bytes; the length written is that of the sense data which fits."""
        sense = self.sense[:sense_size]
        head = _RESPONSE.pack(len(sense), self.residual, self.status_qualifier, self.status, self.response)
        return head + sense.ljust(sense_size, b"\0")

    @classmethod
    def decode(cls, data: bytes, sense_size: int = SENSE_SIZE) -> Response:
        """A `sense_len` beyond `sense_size` or the data is cut to what is there."""
        if len(data) < _RESPONSE.size:
            raise ProtocolError(f"SCSI response of {len(data)} bytes, want {_RESPONSE.size} or more")
        sense_len, residual, qualifier, status, response = _RESPONSE.unpack_from(data)
        sense = data[_RESPONSE.size :][: min(sense_len, sense_size)]
        return cls(len(sense), residual, qualifier, status, response, sense)


@dataclass(frozen=True, slots=True)
class TaskManagement:
    """A TMF on the control queue, 24 bytes; one byte comes back, a ResponseCode (5.6.6.2)."""

    subtype: int
    lun: bytes
    tag: int = 0

    def encode(self) -> bytes:
        if len(self.lun) != 8:
            raise RequestError(f"LUN of {len(self.lun)} bytes, want 8")
        return _TMF.pack(ControlType.TMF, self.subtype, self.lun, self.tag)

    @classmethod
    def decode(cls, data: bytes) -> TaskManagement:
        if len(data) != _TMF.size:
            raise ProtocolError(f"task management of {len(data)} bytes, want {_TMF.size}")
        type_, subtype, lun, tag = _TMF.unpack(data)
        if type_ != ControlType.TMF:
            raise ProtocolError(f"control request of type {type_}, want {ControlType.TMF}")
        return cls(subtype, lun, tag)


@dataclass(frozen=True, slots=True)
class Event:
    """What the device writes into a buffer of the event queue (5.6.6.3).

    `event` is an EventType, perhaps with EVENTS_MISSED; `lun` may come in either form, or be zeros
    where it means nothing.
    """

    event: int
    lun: bytes
    reason: int

    @property
    def type(self) -> int:
        """The EventType, one that we know or not."""
        return self.event & ~EVENTS_MISSED

    @property
    def missed(self) -> bool:
        """Whether earlier events were lost: rescan."""
        return bool(self.event & EVENTS_MISSED)

    @property
    def additional_sense(self) -> tuple[int, int]:
        """Of a PARAM_CHANGE: the additional sense code and its qualifier."""
        return self.reason & 0xFF, self.reason >> 8 & 0xFF

    def encode(self) -> bytes:
        if len(self.lun) != 8:
            raise RequestError(f"LUN of {len(self.lun)} bytes, want 8")
        return _EVENT.pack(self.event, self.lun, self.reason)

    @classmethod
    def decode(cls, data: bytes) -> Event:
        """Accepts a longer buffer: event_info_size may be more."""
        if len(data) < _EVENT.size:
            raise ProtocolError(f"event of {len(data)} bytes, want {_EVENT.size} or more")
        return cls(*_EVENT.unpack_from(data))


_REQUEST = struct.Struct("<8sQBBB")
_RESPONSE = struct.Struct("<IIHBB")
_TMF = struct.Struct("<II8sQ")
_EVENT = struct.Struct("<I8sI")
