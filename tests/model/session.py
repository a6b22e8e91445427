"""One connection of a front end: its messages, and whether they came as they must.

Longer than most, because a check belongs where its message is handled.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from tests.model.memory import Fault, Memory, Region
from tests.model.options import Options
from tests.model.packed import PackedRing
from tests.model.ring import Chain, Ring, negotiated
from tests.model.wire import (
    CONFIG,
    GATE,
    GATE_CLAUSE,
    HEADER,
    INFLIGHT,
    MEM_TABLE,
    NEED_REPLY,
    NO_FD,
    ONE_REGION,
    REGION,
    REPLY,
    SIZE,
    U64,
    VERSION,
    VERSION_MASK,
    VRING_ADDR,
    VRING_STATE,
    F,
    P,
    Request,
    Status,
    bits,
)

_MOST_FDS = 32
_PATIENCE = 5.0
"""Seconds that the rest of a message may take."""

# What no front end that does not migrate, or serve an IOMMU, graphics or Xen, may take.
_NEVER = (
    P.LOG_SHMFD
    | P.RARP
    | P.MTU
    | P.CROSS_ENDIAN
    | P.CRYPTO_SESSION
    | P.PAGEFAULT
    | P.XEN_MMAP
    | P.SHARED_OBJECT
    | P.DEVICE_STATE
)


class Disk(Protocol):
    """What a session needs of a device."""

    features: int
    accepted: int
    violate: Callable[[str, str], None]

    @property
    def config(self) -> bytes: ...

    @property
    def disk(self) -> bytearray: ...

    @property
    def first_queue(self) -> int: ...

    def handle(self, chain: Chain) -> int | None: ...


class Record(NamedTuple):
    """Something that the front end did; names in lower case are not messages."""

    name: str
    value: Any = None
    fds: int = 0
    flags: int = 0


@dataclass
class Reply:
    """What goes back for one message."""

    request: int
    payload: bytes
    flags: int = VERSION | REPLY
    size: int | None = None
    """What the header says of the payload; None for the truth."""
    fds: list[int] = field(default_factory=list)

    def encode(self) -> bytes:
        size = len(self.payload) if self.size is None else self.size
        return HEADER.pack(self.request, self.flags, size) + self.payload


class Lost(Exception):
    """The connection is over."""


class Session:
    """Owned by the back end's thread. `close` ends it and frees all that it was given."""

    def __init__(
        self,
        connection: socket.socket,
        device: Disk,
        options: Options,
        violate: Callable[[str, str], None],
        record: Callable[[Record], None],
    ) -> None:
        self.connection = connection
        self.device = device
        self.options = options
        self.violate = violate
        self.record = record
        self.memory = Memory()
        self.rings: dict[int, Ring] = {}
        self.channel: socket.socket | None = None
        """The back-end request channel."""
        self.hung = False
        self.offered = 0
        self.features: int | None = None
        self.protocol: int | None = None
        self.status = 0
        self.rereads = 0
        """Status reads since FEATURES_OK was written."""
        self._owned = False
        self._asked_features = False
        self._failed = False
        self._stopped: dict[int, int] = {}
        self._handlers: dict[Request, Callable[[bytes, list[int]], bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
        }

    # The stream

    def pump(self) -> None:
        """Handle all messages that are there; Lost at the end of the stream."""
        while not self.hung and select.select([self.connection], [], [], 0)[0]:
            self._message()

    def _receive(self, nbytes: int, fds: list[int]) -> bytes:
        data = b""
        self.connection.settimeout(_PATIENCE)
        while len(data) < nbytes:
            try:
                part, more, _, _ = socket.recv_fds(self.connection, nbytes - len(data), _MOST_FDS)
            except (OSError, TimeoutError) as error:
                raise Lost(f"{error}") from None
            fds += more
            if not part:
                if data:
                    self.violate("VHU-3", f"the stream ended {len(data)} bytes into {nbytes}")
                raise Lost("end of stream")
            data += part
        return data

    def _message(self) -> None:
        fds: list[int] = []
        try:
            number, flags, size = HEADER.unpack(self._receive(HEADER.size, fds))
            payload = self._receive(size, fds) if 0 < size <= 4096 else b""
            if size > 4096:
                self.violate("VHU-1", f"message {number} says it has {size} bytes")
                raise Lost("nonsense")
            self._dispatch(number, flags, payload, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _dispatch(self, number: int, flags: int, payload: bytes, fds: list[int]) -> None:
        """Handle one message; a handler takes the descriptors that it keeps out of `fds`."""
        try:
            request = Request(number)
        except ValueError:
            self.violate("VHU-1", f"message {number} does not exist")
            raise Lost("nonsense") from None
        name, count = request.name, len(fds)
        if flags & VERSION_MASK != VERSION:
            self.violate("VHU-1", f"{name}: version bits {flags & VERSION_MASK}")
        if flags & REPLY:
            self.violate("VHU-1", f"{name}: the reply bit is set")
        if flags & ~(VERSION_MASK | REPLY | NEED_REPLY):
            self.violate("VHU-1", f"{name}: flags {flags:#x}")
        need_reply = bool(flags & NEED_REPLY)
        if need_reply and not (self.protocol or 0) & P.REPLY_ACK:
            self.violate("VHU-19", f"{name}: need_reply without REPLY_ACK")
        self._check_gate(request)
        if SIZE.get(request, -1) not in (-1, len(payload)):
            self.violate("VHU-1", f"{name}: {len(payload)} bytes, not {SIZE[request]}")
            raise Lost("nonsense")
        want = self._descriptors(request, payload)
        if want != count:
            clause = "VHU-12" if request is Request.SET_MEM_TABLE else "VHU-2"
            self.violate(clause, f"{name}: {count} descriptors, not {want}")
            raise Lost("nonsense")
        if name == self.options.drop_at:
            self.record(Record(name, self._decoded(request, payload), count, flags))
            raise Lost("told to drop the connection")
        if name == self.options.hang_on:
            self.hung = True
            self.record(Record(name, self._decoded(request, payload), count, flags))
            return
        if self._failed and not (request is Request.SET_STATUS and payload == bytes(8)):
            self.violate("STA-2", f"{name} after FAILED and before a reset")
        if not self._owned and request not in (
            Request.SET_OWNER,
            Request.GET_FEATURES,
            Request.GET_PROTOCOL_FEATURES,
            Request.SET_PROTOCOL_FEATURES,
        ):
            self.violate("VHU-6", f"{name} before SET_OWNER")
        value = self._decoded(request, payload)
        handler = self._handlers.get(request)
        answer: bytes | None = None
        ack = 0
        given: list[int] = []
        if handler is None:
            self.violate("VHU-5", f"{name} has no place here")
            ack = 1
        else:
            try:
                answer = handler(payload, fds)
            except Fault as fault:
                self.violate("VHU-12", f"{name}: {fault}")
                ack = 1
            except Lost:
                self.record(Record(name, value, count, flags))
                raise
            if request is Request.GET_INFLIGHT_FD:
                given = [fds.pop()]
        if answer is None and need_reply:
            answer = U64.pack(self.options.acks.get(name, ack))
        reply = None if answer is None else Reply(number, answer, fds=given)
        if reply is not None:
            self._check_no_early_kick(request, value)
        if reply is not None and select.select([self.connection], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                if self.connection.recv(1, socket.MSG_PEEK):
                    self.violate("VHU-4", f"another message came before the reply to {name}")
        self.record(Record(name, value, count, flags))
        if reply is not None and name in self.options.replies:
            reply = self.options.replies[name](reply)
        if reply is not None:
            self._send(reply)
        for fd in given:
            os.close(fd)

    def _check_no_early_kick(self, request: Request, value: Any) -> None:
        """While the front end waits for a reply, no ring can have been kicked but by mistake."""
        if request is Request.SET_STATUS and value & Status.DRIVER_OK:
            return
        if not (self.protocol or 0) & P.STATUS or self.status & Status.DRIVER_OK:
            return
        waiting = [ring.kick for ring in self.rings.values() if ring.kick >= 0 and not ring.started]
        more = self.connection.fileno()
        ready = select.select([more, *waiting], [], [], 0)[0]
        if ready and more not in ready:
            self.violate("INI-5", f"a ring was kicked at {request.name}, before DRIVER_OK")

    def _send(self, reply: Reply) -> None:
        data = reply.encode()
        try:
            if self.options.fragment:
                for at in range(len(data)):
                    self.connection.sendall(data[at : at + 1])
            elif reply.fds:
                socket.send_fds(self.connection, [data], reply.fds)
            else:
                self.connection.sendall(data)
        except (OSError, TimeoutError) as error:
            raise Lost(f"{error}") from None

    def _check_gate(self, request: Request) -> None:
        gate = GATE.get(request)
        if gate is not None and not (self.protocol or 0) & gate:
            clause = GATE_CLAUSE.get(request, "VHU-5")
            self.violate(clause, f"{request.name} without {gate.name}")
        if request in (Request.GET_PROTOCOL_FEATURES, Request.SET_PROTOCOL_FEATURES) and not (
            self._asked_features and self.offered & F.PROTOCOL_FEATURES
        ):
            self.violate("VHU-7", f"{request.name} without bit 30 offered")
        if request is Request.SET_VRING_ENABLE and not (self.features or 0) & F.PROTOCOL_FEATURES:
            self.violate("VHU-8", "SET_VRING_ENABLE without bit 30 negotiated")
        if request is Request.SET_MEM_TABLE and (self.protocol or 0) & P.CONFIGURE_MEM_SLOTS:
            self.violate("VHU-14", "SET_MEM_TABLE beside memory slots")

    def _descriptors(self, request: Request, payload: bytes) -> int:
        """How many descriptors must come with this message."""
        if request is Request.SET_MEM_TABLE:
            return int(MEM_TABLE.unpack_from(payload)[0]) if len(payload) >= MEM_TABLE.size else 0
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            (word,) = U64.unpack(payload)
            if word & ~(0xFF | NO_FD):
                self.violate("VHU-15", f"{request.name}: payload {word:#x}")
            return 0 if word & NO_FD else 1
        return int(
            request
            in (
                Request.SET_LOG_FD,
                Request.SET_BACKEND_REQ_FD,
                Request.SET_INFLIGHT_FD,
                Request.ADD_MEM_REG,
                Request.SET_DEVICE_STATE_FD,
            )
        )

    def _decoded(self, request: Request, payload: bytes) -> Any:
        if request in (Request.SET_FEATURES, Request.SET_PROTOCOL_FEATURES, Request.SET_STATUS):
            return U64.unpack(payload)[0]
        if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            return U64.unpack(payload)[0]
        if request in (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.GET_VRING_BASE,
            Request.SET_VRING_ENABLE,
            Request.VRING_KICK,
        ):
            return VRING_STATE.unpack(payload)
        if request is Request.SET_VRING_ADDR:
            return VRING_ADDR.unpack(payload)
        if request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            return REGION.unpack_from(payload, ONE_REGION.size)
        if request in (Request.GET_CONFIG, Request.SET_CONFIG) and len(payload) >= CONFIG.size:
            return CONFIG.unpack_from(payload)
        return payload

    # Features and ownership

    def _set_owner(self, payload: bytes, fds: list[int]) -> None:
        if self._owned:
            self.violate("VHU-6", "a second SET_OWNER")
        self._owned = True

    def _reset_owner(self, payload: bytes, fds: list[int]) -> None:
        self.violate("VHU-6", "RESET_OWNER")

    def _get_features(self, payload: bytes, fds: list[int]) -> bytes:
        self._asked_features = True
        self.offered = self.options.features | self.device.features
        return U64.pack(self.offered)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        (features,) = U64.unpack(payload)
        if not self._asked_features:
            self.violate("FEA-1", "SET_FEATURES before any GET_FEATURES")
        if features & ~self.offered:
            self.violate("FEA-1", f"accepted without offer: bits {bits(features & ~self.offered)}")
        known = (
            F.ANY_LAYOUT
            | F.INDIRECT_DESC
            | F.EVENT_IDX
            | F.PROTOCOL_FEATURES
            | F.VERSION_1
            | F.IN_ORDER
            | F.RING_PACKED
            | F.ORDER_PLATFORM
            | F.RING_RESET
            | F.NOTIFICATION_DATA
            | (1 << 24) - 1
        )
        if features & ~known:
            self.violate("FEA-3", f"accepted without sense here: bits {bits(features & ~known)}")
        if features & F.SR_IOV:
            self.violate("RFB-5", "SR_IOV accepted over vhost-user")
        if features & F.ACCESS_PLATFORM:
            self.violate("RFB-2", "ACCESS_PLATFORM accepted, and no IOTLB is served")
        if self.offered & F.VERSION_1 and not features & F.VERSION_1:
            self.violate("RFB-1", "VERSION_1 was offered and not accepted")
        if self.offered & F.PROTOCOL_FEATURES and not features & F.PROTOCOL_FEATURES:
            self.violate("VHU-8", "bit 30 was offered and not accepted")
        if (
            self.features is not None
            and features & ~self.features
            and (self.status & Status.FEATURES_OK or any(r.started for r in self.rings.values()))
        ):
            self.violate("INI-3", f"new features {bits(features & ~self.features)} after the end")
        if (self.protocol or 0) & P.STATUS and self.status != Status.ACKNOWLEDGE | Status.DRIVER:
            self.violate("INI-1", f"SET_FEATURES with status {self.status:#x}, not 3")
        self.features = features
        self.device.accepted = features & (1 << 24) - 1
        for ring in self.rings.values():
            negotiated(ring, features)
            ring.enabled = ring.enabled or not features & F.PROTOCOL_FEATURES

    def _get_protocol_features(self, payload: bytes, fds: list[int]) -> bytes:
        return U64.pack(self.options.protocol_features)

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        (features,) = U64.unpack(payload)
        wrong = features & ~self.options.protocol_features
        if wrong:
            self.violate("VHU-5", f"protocol features without offer: bits {bits(wrong)}")
        if features & _NEVER:
            self.violate("VHU-25", f"protocol features of no use: bits {bits(features & _NEVER)}")
        need = P.BACKEND_REQ | P.REPLY_ACK
        if features & P.INBAND_NOTIFICATIONS and features & need != need:
            self.violate("VHU-21", "INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK")
        if self.protocol is not None and self.protocol != features:
            self.violate("VHU-7", "a second, different SET_PROTOCOL_FEATURES")
        self.protocol = features

    # Status and configuration

    def _set_status(self, payload: bytes, fds: list[int]) -> None:
        (status,) = U64.unpack(payload)
        if status > 0xFF:
            self.violate("STA-1", f"status {status:#x} is no byte")
        old, self._failed = self.status, bool(status & Status.FAILED)
        if status == 0:
            self.status = 0
            self.features = None
            self.rereads = 0
            for ring in self.rings.values():
                if ring.outstanding and ring.started:
                    self.violate("CLN-2", f"reset while ring {ring.index} has buffers, not stopped")
                ring.forget()
            return
        if old & ~status & ~Status.DEVICE_NEEDS_RESET:
            self.violate("STA-1", f"status went from {old:#x} to {status:#x}: bits cleared")
        new = status & ~old & ~Status.FAILED
        order = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)
        for step, bit in enumerate(order):
            if new & bit:
                for earlier in order[:step]:
                    if not status & earlier:
                        self.violate("INI-1", f"{bit.name} without {earlier.name} ({status:#x})")
        if new & Status.FEATURES_OK:
            self.rereads = 0
            if self.features is None:
                self.violate("INI-1", "FEATURES_OK before SET_FEATURES")
        if new & Status.DRIVER_OK and not self._failed:
            if not self.rereads:
                self.violate("INI-1", "DRIVER_OK, and FEATURES_OK was not read back")
            if not old & Status.FEATURES_OK:
                self.violate("INI-4", "DRIVER_OK, and FEATURES_OK did not stay")
            if not any(ring.complete for ring in self.rings.values()):
                self.violate("INI-1", "DRIVER_OK before any queue was set up")
        if new & (new - 1):
            self.violate("INI-1", f"steps done at once: status {old:#x} to {status:#x}")
        self.status = status & ~self.options.refuse_status

    def _get_status(self, payload: bytes, fds: list[int]) -> bytes:
        if self.status & Status.FEATURES_OK or self.options.refuse_status:
            self.rereads += 1
        return U64.pack(self.status)

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        if len(payload) < CONFIG.size:
            self.violate("VHU-16", f"GET_CONFIG of {len(payload)} bytes")
            return b""
        offset, size, flags = CONFIG.unpack_from(payload)
        if size == 0 or size > 256:
            self.violate("VHU-16", f"GET_CONFIG asks for {size} bytes")
        if flags:
            self.violate("VHU-16", f"GET_CONFIG with flags {flags:#x}")
        if len(payload) != CONFIG.size + size:
            self.violate("VHU-16", f"GET_CONFIG of {size} bytes has {len(payload) - CONFIG.size}")
        config = self.device.config
        if offset + size > len(config):
            return b""
        return CONFIG.pack(offset, size, flags) + config[offset : offset + size]

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        offset, size, flags = CONFIG.unpack_from(payload)
        if flags not in (0, 1) or len(payload) != CONFIG.size + size:
            self.violate("VHU-16", f"SET_CONFIG of {size} bytes, flags {flags:#x}")
        if self.features is None or (
            (self.protocol or 0) & P.STATUS and not self.status & Status.FEATURES_OK
        ):
            self.violate("INI-2", f"configuration byte {offset} written before the features were")

    # Memory

    def _add(self, region: tuple[int, int, int, int], fd: int) -> None:
        guest, size, user, offset = region
        for other in self.memory.regions:
            if (guest < other.guest + other.size and other.guest < guest + size) or (
                user < other.user + other.size and other.user < user + size
            ):
                self.violate("VHU-12", f"region at {guest:#x} overlaps that at {other.guest:#x}")
        self.memory.regions.append(Region.map(guest, size, user, offset, fd))

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        count, _ = MEM_TABLE.unpack_from(payload)
        if not 0 < count <= 8:
            self.violate("VHU-12", f"{count} regions")
        if len(payload) < MEM_TABLE.size + count * REGION.size:
            self.violate("VHU-12", f"{len(payload)} bytes for {count} regions")
            raise Fault("short table")
        self._check_memory_idle("VHU-24", None)
        regions = [REGION.unpack_from(payload, MEM_TABLE.size + at * REGION.size) for at in range(count)]
        old, self.memory.regions = self.memory.regions, []
        for region, fd in zip(regions, fds, strict=True):
            self._add(region, fd)
        for ring in self.rings.values():
            ring.memory = self.memory
            if ring.addresses is not None:
                ring.place(*ring.addresses)
        for stale in old:
            stale.close()

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        if len(self.memory.regions) >= self.options.max_mem_slots:
            self.violate("VHU-14", f"a region more than the {self.options.max_mem_slots} slots")
        self._add(REGION.unpack_from(payload, ONE_REGION.size), fds[0])

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        guest, size, user, _ = REGION.unpack_from(payload, ONE_REGION.size)
        for region in self.memory.regions:
            if (region.guest, region.size, region.user) == (guest, size, user):
                self._check_memory_idle("VHU-24", region)
                self.memory.regions.remove(region)
                region.close()
                return
        self.violate("VHU-14", f"REM_MEM_REG of {guest:#x}, {size} bytes, {user:#x}: not there")

    def _check_memory_idle(self, clause: str, region: Region | None) -> None:
        for ring in self.rings.values():
            if ring.started and ring.outstanding:
                self.violate(clause, f"memory changed while ring {ring.index} has buffers")
            elif ring.started and region is not None and ring.uses(region):
                self.violate(clause, f"the memory of ring {ring.index} removed while it runs")

    def _get_max_mem_slots(self, payload: bytes, fds: list[int]) -> bytes:
        return U64.pack(self.options.max_mem_slots)

    # Rings

    def _ring(self, index: int, name: str) -> Ring:
        if index >= self.options.queue_num:
            clause = "VHU-15" if index > 255 else "VHU-11"
            self.violate(clause, f"{name} of ring {index}; there are {self.options.queue_num}")
        if index not in self.rings:
            if self.features is None:
                self.violate("INI-1", f"{name} before the features were agreed")
            if (self.protocol or 0) & P.STATUS and not (self.status & Status.FEATURES_OK and self.rereads):
                self.violate("INI-1", f"{name} before FEATURES_OK was read back")
            kind = PackedRing if (self.features or 0) & F.RING_PACKED else Ring
            ring = kind(index, self.options, self.violate)
            ring.memory = self.memory
            negotiated(ring, self.features or 0)
            ring.enabled = not (self.features or 0) & F.PROTOCOL_FEATURES
            self.rings[index] = ring
        ring = self.rings[index]
        if ring.started and name != "SET_VRING_ENABLE":
            self.violate("VHU-9", f"{name} of ring {index} while it runs")
        return ring

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        index, num = VRING_STATE.unpack(payload)
        ring = self._ring(index, "SET_VRING_NUM")
        if not 0 < num <= 32768 or num & (num - 1):
            self.violate("SPL-7", f"ring {index} of {num} is not a power of two up to 32768")
        if not self.options.min_queue_size <= num <= self.options.max_queue_size:
            raise Lost(f"a ring of {num}")
        ring.size = num

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        index, flags, descriptor, used, available, _ = VRING_ADDR.unpack(payload)
        ring = self._ring(index, "SET_VRING_ADDR")
        if flags:
            self.violate("VHU-25", f"SET_VRING_ADDR with flags {flags:#x}: logging")
        ring.place(descriptor, available, used)

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        index, num = VRING_STATE.unpack(payload)
        ring = self._ring(index, "SET_VRING_BASE")
        if num > 0xFFFF and not isinstance(ring, PackedRing):
            self.violate("VHU-10", f"SET_VRING_BASE of ring {index}: {num:#x}")
        if index in self._stopped and num not in (0, self._stopped[index]):
            self.violate("VHU-10", f"ring {index} stopped at {self._stopped[index]}, base is {num}")
        ring.base = num

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> bytes:
        index, num = VRING_STATE.unpack(payload)
        if num:
            self.violate("VHU-10", f"GET_VRING_BASE of ring {index} with num {num}")
        ring = self.rings.get(index)
        if ring is None:
            self.violate("VHU-9", f"GET_VRING_BASE of ring {index}, which was never set up")
            return VRING_STATE.pack(index, 0)
        if ring.started:
            ring.run(self.device.handle)  # what was published before is still ours to do
        self._stopped[index] = ring.stop()
        return VRING_STATE.pack(index, self._stopped[index])

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        word = U64.unpack(payload)[0]
        ring = self._ring(word & 0xFF, "SET_VRING_KICK")
        if ring.kick >= 0:
            os.close(ring.kick)
        ring.kick = fds.pop() if fds else -1
        ring.kick_known = True
        if ring.kick < 0 and ring.complete:
            ring.start()

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        word = U64.unpack(payload)[0]
        ring = self.rings.get(word & 0xFF)
        if ring is None or not ring.started:  # it may change while the ring runs
            ring = self._ring(word & 0xFF, "SET_VRING_CALL")
        if ring.call >= 0:
            os.close(ring.call)
        ring.call = fds.pop() if fds else -1
        ring.call_known = True

    def _set_vring_err(self, payload: bytes, fds: list[int]) -> None:
        word = U64.unpack(payload)[0]
        ring = self._ring(word & 0xFF, "SET_VRING_ERR")
        if ring.error >= 0:
            os.close(ring.error)
        ring.error = fds.pop() if fds else -1

    def _get_queue_num(self, payload: bytes, fds: list[int]) -> bytes:
        return U64.pack(self.options.queue_num)

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        index, enable = VRING_STATE.unpack(payload)
        ring = self._ring(index, "SET_VRING_ENABLE")
        if enable > 1:
            self.violate("VHU-8", f"SET_VRING_ENABLE of ring {index} with {enable}")
        ring.enabled = bool(enable)

    # The rest

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        if self.channel is not None:
            self.channel.close()
        self.channel = socket.socket(fileno=fds.pop())
        self.channel.settimeout(_PATIENCE)

    def _get_inflight_fd(self, payload: bytes, fds: list[int]) -> bytes:
        _, _, queues, size = INFLIGHT.unpack_from(payload)
        if self.features is None:
            self.violate("VHU-20", "GET_INFLIGHT_FD before SET_FEATURES")
        if any(ring.started for ring in self.rings.values()):
            self.violate("VHU-20", "GET_INFLIGHT_FD while a ring runs")
        nbytes = queues * (16 + 16 * size)
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.ftruncate(fd, nbytes)
        fds.append(fd)
        return INFLIGHT.pack(nbytes, 0, queues, size).ljust(len(payload), b"\0")

    def _set_inflight_fd(self, payload: bytes, fds: list[int]) -> None:
        _, _, queues, size = INFLIGHT.unpack_from(payload)
        for ring in self.rings.values():
            if ring.size not in (0, size) or ring.index >= queues:
                self.violate("VHU-20", f"in-flight area for {queues} queues of {size}")

    def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        self.status, self.features, self._failed = 0, None, False
        for ring in self.rings.values():
            ring.detach()
        self.rings.clear()  # set up anew, from the start
        self._stopped.clear()

    def kicks(self, ready: set[int]) -> None:
        """Look at the kick descriptors that were readable before the messages were handled."""
        for ring in self.rings.values():
            if ring.kick not in ready or not ring.drain_kick() or ring.started:
                continue
            if not ring.complete:
                self.violate("INI-5", f"ring {ring.index} was kicked before it was set up")
            elif (self.protocol or 0) & P.STATUS and not self.status & Status.DRIVER_OK:
                self.violate("INI-5", f"ring {ring.index} was kicked before DRIVER_OK")
            elif not ring.enabled:
                self.violate("INI-5", f"ring {ring.index} was kicked before it was enabled")
            gaps = set(range(ring.index)) - set(self.rings)
            if gaps:
                self.violate("VHU-11", f"ring {ring.index} starts, and {sorted(gaps)} are not there")
            if ring.complete:
                ring.start()
                self.record(Record("start", ring.index))

    def serve(self, ready: set[int] | None) -> None:
        """Run the rings whose kick was seen, or all: a sleeper wakes for nothing else."""
        for ring in self.rings.values():
            if ready is None or ring.kick in ready or ring.kick < 0:
                ring.run(self.device.handle)

    def close(self) -> None:
        """Close the connection and free what it brought."""
        self.connection.close()
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        for ring in self.rings.values():
            ring.detach()
        self.memory.close()


def ack_of(data: bytes) -> int | None:
    """The value of an answer on the back-end channel; None when it is not one."""
    if len(data) != HEADER.size + 8:
        return None
    _, flags, size = HEADER.unpack_from(data)
    if size != 8 or flags & (VERSION_MASK | REPLY) != VERSION | REPLY:
        return None
    return int(struct.unpack_from("=Q", data, HEADER.size)[0])
