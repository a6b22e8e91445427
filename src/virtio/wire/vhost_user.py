"""The vhost-user protocol: messages, their payloads, and the decoder of a connection.

After QEMU's docs/interop/vhost-user.rst; section names in brackets. Numbers are in native byte
order. Both ends of a connection, and the channel back, use this module; it is long because the
tables that tie requests to payloads and replies belong with them.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from virtio.errors import ProtocolError, RequestError
from virtio.wire._record import Record

VERSION = 1  # the two low bits of every header's flags (Header)
REPLY = 4
NEED_REPLY = 8

PROTOCOL_FEATURES = 1 << 30  # the virtio feature bit that stands for the negotiation of ours
NOFD = 1 << 8  # in a VringFd: no file descriptor came, poll instead
MAX_FDS = 8  # with one message
MAX_REGIONS = 8  # in one SET_MEM_TABLE
MAX_PAYLOAD = 4096  # more than any message has that we know


class Request(enum.IntEnum):
    """What a front end asks of a back end (Front-end message types)."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """What a back end asks of a front end, on the socket of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class ProtocolFeature(enum.IntFlag):
    """Extensions of the protocol (Protocol features), as masks."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


def encode_u64(value: int) -> bytes:
    """A payload that is one number."""
    return _U64.pack(value)


def decode_u64(payload: bytes) -> int:
    """The number in a payload of exactly eight bytes."""
    if len(payload) != _U64.size:
        raise ProtocolError(f"number of {len(payload)} bytes, want {_U64.size}")
    value: int = _U64.unpack(payload)[0]
    return value


@dataclass(frozen=True, slots=True)
class VringState(Record):
    """Payload of SET_VRING_NUM, _BASE, _ENABLE, _ENDIAN, GET_VRING_BASE and VRING_KICK."""

    index: int
    num: int
    FORMAT = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class VringAddress(Record):
    """Payload of SET_VRING_ADDR: user addresses (VHU-13), `log` a guest address."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int = 0
    FORMAT = struct.Struct("=IIQQQQ")


@dataclass(frozen=True, slots=True)
class VringFd:
    """Payload of SET_VRING_KICK, _CALL and _ERR; `nofd`: no descriptor comes with it."""

    index: int
    nofd: bool = False

    def encode(self) -> bytes:
        if not 0 <= self.index <= 0xFF:
            raise RequestError(f"ring {self.index} in a message that has room for 0 to 255")
        return encode_u64(self.index | NOFD * self.nofd)

    @classmethod
    def decode(cls, payload: bytes) -> VringFd:
        value = decode_u64(payload)
        return cls(value & 0xFF, bool(value & NOFD))

    def describe(self) -> str:
        return f"index={self.index}{' nofd' if self.nofd else ''}"


@dataclass(frozen=True, slots=True)
class MemoryRegion(Record):
    """One stretch of memory that the front end shares; `mmap_offset` is its place in its file."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int
    FORMAT = struct.Struct("=QQQQ")


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """Payload of SET_MEM_TABLE: at most eight regions, one descriptor each in the same order."""

    regions: tuple[MemoryRegion, ...]

    def encode(self) -> bytes:
        if len(self.regions) > MAX_REGIONS:
            raise RequestError(f"{len(self.regions)} memory regions, a table has {MAX_REGIONS}")
        return encode_u64(len(self.regions)) + b"".join(r.encode() for r in self.regions)

    @classmethod
    def decode(cls, payload: bytes) -> MemoryTable:
        if len(payload) < _TABLE.size:
            raise ProtocolError(f"memory table of {len(payload)} bytes, want {_TABLE.size} or more")
        count = _TABLE.unpack_from(payload)[0]
        if count > MAX_REGIONS:
            raise ProtocolError(f"memory table of {count} regions, {MAX_REGIONS} are allowed")
        size = _TABLE.size + count * MemoryRegion.FORMAT.size
        if len(payload) != size:
            raise ProtocolError(f"table of {count} regions in {len(payload)} bytes, want {size}")
        regions = MemoryRegion.FORMAT.iter_unpack(payload[_TABLE.size :])
        return cls(tuple(MemoryRegion(*fields) for fields in regions))

    def describe(self) -> str:
        return " ".join(f"[{region.describe()}]" for region in self.regions) or "no regions"


@dataclass(frozen=True, slots=True)
class SingleMemoryRegion:
    """Payload of ADD_MEM_REG (one descriptor) and REM_MEM_REG (none)."""

    region: MemoryRegion

    def encode(self) -> bytes:
        return encode_u64(0) + self.region.encode()

    @classmethod
    def decode(cls, payload: bytes) -> SingleMemoryRegion:
        want = _U64.size + MemoryRegion.FORMAT.size
        if len(payload) != want:
            raise ProtocolError(f"single memory region of {len(payload)} bytes, want {want}")
        return cls(MemoryRegion.decode(payload[_U64.size :]))

    def describe(self) -> str:
        return self.region.describe()


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """Payload of GET_CONFIG and SET_CONFIG: `size` bytes at `offset` of the device's own space.

    GET_CONFIG carries that many bytes both ways, which `encode` fills up with zeros. A back end
    that refuses answers with an empty payload: look for that before decoding. `flags` of a
    SET_CONFIG: 0 for a writable field, 1 in a migration.
    """

    offset: int
    size: int
    flags: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        if len(self.payload) > self.size:
            raise RequestError(f"{len(self.payload)} configuration bytes in a size of {self.size}")
        head = _CONFIG.pack(self.offset, self.size, self.flags)
        return head + self.payload.ljust(self.size, b"\0")

    @classmethod
    def decode(cls, payload: bytes) -> ConfigSpace:
        if len(payload) < _CONFIG.size:
            raise ProtocolError(f"configuration message of {len(payload)} bytes, want {_CONFIG.size} or more")
        offset, size, flags = _CONFIG.unpack_from(payload)
        if len(payload) - _CONFIG.size != size:
            raise ProtocolError(
                f"{len(payload) - _CONFIG.size} configuration bytes came, its size says {size}"
            )
        return cls(offset, size, flags, payload[_CONFIG.size :])

    def describe(self) -> str:
        return f"offset={self.offset} size={self.size} flags={self.flags}"


@dataclass(frozen=True, slots=True)
class InflightDescription(Record):
    """Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD; 24 bytes, padded as its C structure is."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    FORMAT = struct.Struct("=QQHH4x")


@dataclass(frozen=True, slots=True)
class Iotlb(Record):
    """Payload of IOTLB_MSG; `type`: 1 miss, 2 update, 3 invalidate, 4 access failed."""

    iova: int
    size: int
    user_address: int
    permissions: int
    type: int
    FORMAT = struct.Struct("=QQQBB6x")


@dataclass(frozen=True, slots=True)
class LogDescription(Record):
    """Payload of SET_LOG_BASE where LOG_SHMFD was negotiated."""

    size: int
    offset: int
    FORMAT = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class DeviceState(Record):
    """Payload of SET_DEVICE_STATE_FD; `direction`: 0 save, 1 load; `phase`: 0 stopped."""

    direction: int
    phase: int
    FORMAT = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class Message:
    """One message, either way; `fds` travel in the ancillary data of its first byte.

    Whoever is handed a message by a Decoder owns its descriptors.
    """

    request: int
    flags: int = VERSION
    payload: bytes = b""
    fds: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """Header and payload."""
        return _HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload

    def reply(self, payload: bytes, fds: tuple[int, ...] = ()) -> Message:
        """The message that answers this one."""
        return Message(self.request, VERSION | REPLY, payload, fds)

    @property
    def name(self) -> str:
        """The spec's name of a front end's request, "request 99" for one that has none."""
        return _name(Request, self.request)

    def describe(self, requests: type[enum.IntEnum] = Request) -> str:
        """One line for a trace; pass BackendRequest for the channel back. Never raises."""
        words = [_name(requests, self.request)]
        if self.flags & REPLY:
            words.append("reply")
        if self.payload:
            words.append(self._payload(requests))
        if self.flags & NEED_REPLY:
            words.append("need_reply")
        if self.fds:
            words.append(f"fds={list(self.fds)}")
        return " ".join(words)

    def _payload(self, requests: type[enum.IntEnum]) -> str:
        record = (_PAYLOADS if requests is Request else _BACKEND_PAYLOADS).get(self.request)
        if self.flags & REPLY and not (requests is Request and self.request in _REPLIES):
            record = None  # an acknowledgement: a bare number
        try:
            if record is None:
                return hex(decode_u64(self.payload))
            return record.decode(self.payload).describe()
        except ProtocolError:
            return f"payload={self.payload[:64].hex()} ({len(self.payload)} bytes)"


def expected_reply(request: int, protocol_features: int) -> bool:
    """Whether the request has a reply of its own, REPLY_ACK or not (Communication; VHU-4)."""
    needed = _REPLIES.get(request)
    return needed is not None and protocol_features & needed == needed


def expected_ack(message: Message, protocol_features: int, requests: type[enum.IntEnum] = Request) -> bool:
    """Whether REPLY_ACK asks for an answer, 0 for success, to this request (VHU-18, VHU-19).

    Pass BackendRequest for the channel back, where the same numbers are other requests.
    """
    own = requests is Request and expected_reply(message.request, protocol_features)
    acks = protocol_features & ProtocolFeature.REPLY_ACK
    return bool(acks and message.flags & NEED_REPLY and not own)


class Decoder:
    """Turns what one socket delivers into messages; holds descriptors until it hands them out.

    Descriptors come with the first byte of their message. Read at most `wanted` bytes at a time
    and no chunk crosses from one message into the next. In a longer chunk they are given to the
    last message that has bytes in it: the kernel joins what was sent without descriptors to what
    follows, and ends a read after data that has some.
    """

    def __init__(self, max_payload: int = MAX_PAYLOAD) -> None:
        self._max_payload = max_payload
        self._buffer = bytearray()
        self._fds: list[int] = []  # of the unfinished message; after an error, all not handed out
        self._broken = False

    @property
    def wanted(self) -> int:
        """How many bytes end the header or, that being here, the message; never 0."""
        return self._end() - len(self._buffer)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[Message]:
        """The messages that these bytes complete, from which the caller now owns the descriptors.

        Raises ProtocolError for a header that may not be, or too many descriptors, and for
        whatever follows; no message of that call is handed out: `close` returns the descriptors.
        """
        earlier, self._fds = self._fds, [*self._fds, *fds]
        if self._broken:
            raise ProtocolError(f"{len(data)} bytes after a message that broke the connection")
        self._broken = True  # unless all below goes well
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= (end := self._end()):
            request, flags, _ = _HEADER.unpack_from(self._buffer)
            messages.append(Message(request, flags, bytes(self._buffer[_HEADER.size : end])))
            del self._buffer[:end]
        owners: list[list[int]] = [[] for _ in range(len(messages) + 1)]  # last: the unfinished
        owners[0] += earlier
        owners[-1 if self._buffer or not messages else -2] += fds
        if (count := max(map(len, owners))) > MAX_FDS:
            raise ProtocolError(f"{count} descriptors with a message, {MAX_FDS} are allowed")
        self._fds, self._broken = owners.pop(), False
        return [replace(m, fds=tuple(own)) for m, own in zip(messages, owners, strict=True)]

    def close(self) -> list[int]:
        """The descriptors that were fed and never handed out, now the caller's; ends decoding."""
        held, self._fds, self._broken = self._fds, [], True
        return held

    def _end(self) -> int:
        """Where the header ends or, that being here, the message."""
        if len(self._buffer) < _HEADER.size:
            return _HEADER.size
        request, flags, size = _HEADER.unpack_from(self._buffer)
        if flags & _VERSION_MASK != VERSION:
            version = flags & _VERSION_MASK
            raise ProtocolError(f"message {request} of version {version}, want {VERSION}")
        if size > self._max_payload:
            raise ProtocolError(f"message {request} with {size} bytes, {self._max_payload} are allowed")
        return _HEADER.size + int(size)


class _Payload(Protocol):
    @classmethod
    def decode(cls, payload: bytes) -> _Payload: ...

    def describe(self) -> str: ...


_HEADER = struct.Struct("=III")  # request, flags, size of the payload
_VERSION_MASK = 3
_U64 = struct.Struct("=Q")
_TABLE = struct.Struct("=I4x")
_CONFIG = struct.Struct("=III")

_PAYLOADS: dict[int, type[_Payload]] = {
    Request.SET_MEM_TABLE: MemoryTable,
    Request.SET_LOG_BASE: LogDescription,
    Request.SET_VRING_NUM: VringState,
    Request.SET_VRING_ADDR: VringAddress,
    Request.SET_VRING_BASE: VringState,
    Request.GET_VRING_BASE: VringState,
    Request.SET_VRING_KICK: VringFd,
    Request.SET_VRING_CALL: VringFd,
    Request.SET_VRING_ERR: VringFd,
    Request.SET_VRING_ENABLE: VringState,
    Request.IOTLB_MSG: Iotlb,
    Request.SET_VRING_ENDIAN: VringState,
    Request.GET_CONFIG: ConfigSpace,
    Request.SET_CONFIG: ConfigSpace,
    Request.GET_INFLIGHT_FD: InflightDescription,
    Request.SET_INFLIGHT_FD: InflightDescription,
    Request.VRING_KICK: VringState,
    Request.ADD_MEM_REG: SingleMemoryRegion,
    Request.REM_MEM_REG: SingleMemoryRegion,
    Request.SET_DEVICE_STATE_FD: DeviceState,
}
_BACKEND_PAYLOADS: dict[int, type[_Payload]] = {
    BackendRequest.IOTLB_MSG: Iotlb,
    BackendRequest.VRING_CALL: VringState,
    BackendRequest.VRING_ERR: VringState,
}

# Requests with a reply of their own, and the extension that gives them one (0: always).
_REPLIES: dict[int, int] = {
    Request.GET_FEATURES: 0,
    Request.SET_LOG_BASE: ProtocolFeature.LOG_SHMFD,
    Request.GET_VRING_BASE: 0,
    Request.GET_PROTOCOL_FEATURES: 0,
    Request.GET_QUEUE_NUM: 0,
    Request.IOTLB_MSG: 0,
    Request.GET_CONFIG: 0,
    Request.CREATE_CRYPTO_SESSION: 0,
    Request.POSTCOPY_ADVISE: 0,
    Request.POSTCOPY_END: 0,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.GET_MAX_MEM_SLOTS: 0,
    Request.GET_STATUS: 0,
    Request.GET_SHARED_OBJECT: 0,
    Request.SET_DEVICE_STATE_FD: 0,
    Request.CHECK_DEVICE_STATE: 0,
}


def _name(requests: type[enum.IntEnum], number: int) -> str:
    try:
        return requests(number).name
    except ValueError:
        return f"request {number}"
