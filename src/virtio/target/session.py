"""The back end's side of one vhost-user connection: messages in, replies out, rings served.

After QEMU's docs/interop/vhost-user.rst; section names in brackets. Everything that the front end
sends is checked, and what may not be ends the session with a ProtocolError. One thread does all:
between two messages no request is in progress. One module, as messages and the rings that they
set up are one state.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from virtio.errors import ProtocolError
from virtio.ring import eventfd
from virtio.ring.device import SLOTS, DeviceRing
from virtio.target.held import Kept
from virtio.target.memory import SharedMemory
from virtio.wire.vhost_user import (
    MAX_FDS,
    PROTOCOL_FEATURES,
    BackendRequest,
    ConfigSpace,
    Decoder,
    MemoryTable,
    Message,
    ProtocolFeature,
    Request,
    SingleMemoryRegion,
    VringAddress,
    VringFd,
    VringState,
    decode_u64,
    encode_u64,
    expected_ack,
)
from virtio.wire.virtio import Feature

FEATURES = Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | PROTOCOL_FEATURES
EXTENSIONS = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.BACKEND_REQ
)
MAX_QUEUES = 256  # a ring's number has eight bits in SET_VRING_KICK

_CONFIG_SPACE = 256  # the most that front ends ask for
_SPIN_NS = 50_000  # how long to look for requests before sleeping
_LOOK_NS = 200_000  # how long to serve busy rings before looking at the socket
_BATCH = 16  # requests between two calls of the driver

_GATES: dict[int, ProtocolFeature] = {  # the extension that a request belongs to
    Request.GET_QUEUE_NUM: ProtocolFeature.MQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
}
_TELLS_CONFIG = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ


class Device(Protocol):
    """What a session serves."""

    features: int  # of the device type
    acked: int  # set by the session: what of them the driver takes
    config: bytes  # its configuration space
    handlers: Sequence[Callable[[DeviceRing], int] | None]  # one a queue; None: for the device to pop
    settle: Callable[[], None]  # set by the session: do what is available on all queues but 0

    def set_config(self, offset: int, data: bytes) -> bool:
        """Write to the configuration space; false when that may not be."""

    def reset(self) -> None:
        """Be as at the start of a session."""

    def use(self, rings: Mapping[int, DeviceRing]) -> None:
        """These rings, by number, are started and enabled; no others may be touched."""

    def drop(self, ring: DeviceRing) -> None:
        """A ring has stopped: forget what is held of it."""

    def tend(self) -> float:
        """Do what is due; in how many seconds to be called again, -1 if only something else tells."""

    def forget(self) -> None:
        """Here is no driver: be as for one that comes new."""


class Changed(Protocol):
    """Where changes of the device come from while it is served."""

    def fileno(self) -> int:
        """Readable when there is one."""

    def apply(self) -> None:
        """Take it, and change the device."""

    def answer(self) -> None:
        """Say that it is done."""


class _Vring:
    """One ring, as far as messages have described it; owns its file descriptors."""

    def __init__(self, index: int, handler: Callable[[DeviceRing], int] | None) -> None:
        self.index, self.handler = index, handler
        self.size = self.base = 0
        self.addresses: VringAddress | None = None
        self.kick = self.call = -1
        self.polled = self.enabled = False
        self.ring: DeviceRing | None = None  # while it is started (Ring states)


class _Refused(Exception):
    """The request was in order, but cannot be done."""


class Session:
    """Serves one front end until it leaves; owns the socket and all descriptors that it is sent."""

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        features: int = FEATURES,
        extensions: int = EXTENSIONS,
        changes: Changed | None = None,
    ) -> None:
        """`features`, to which the device's are added, and `extensions` are what to offer."""
        self._sock, self._device, self._changes = sock, device, changes
        self._back: socket.socket | None = None  # the channel on which we ask the front end
        device.settle = self._settle
        self._features, self._extensions = features | device.features, int(extensions)
        self._acked = self._acked_extensions = 0
        self._status = 0
        self._memory = SharedMemory()
        self._vrings = [_Vring(i, handler) for i, handler in enumerate(device.handlers)]
        self._live: list[tuple[_Vring, DeviceRing]] = []  # the rings to serve
        self._kicks: dict[int, _Vring] = {}
        self._decoder = Decoder()
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)
        if changes is not None:
            self._epoll.register(changes, select.EPOLLIN)
        self._handlers: dict[int, Callable[[bytes, list[int]], bytes | None]] = {
            Request.GET_FEATURES: lambda payload, fds: encode_u64(self._features),
            Request.SET_FEATURES: self._set_features,
            Request.GET_PROTOCOL_FEATURES: lambda payload, fds: encode_u64(self._extensions),
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.SET_OWNER: lambda payload, fds: None,
            Request.RESET_OWNER: lambda payload, fds: None,  # deprecated, to be ignored
            Request.GET_QUEUE_NUM: lambda payload, fds: encode_u64(len(self._vrings)),
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.GET_MAX_MEM_SLOTS: lambda payload, fds: encode_u64(SLOTS),
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: lambda payload, fds: None,  # an error ends the session
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_STATUS: lambda payload, fds: encode_u64(self._status),
            Request.SET_STATUS: self._set_status,
            Request.RESET_DEVICE: self._reset_device,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
        }

    def run(self) -> None:
        """Serve until the front end leaves; ProtocolError when it breaks the protocol."""
        awake = look = 0
        while True:
            worked = False
            for vring, ring in self._live:
                worked |= self._serve(vring, ring)
            now = time.monotonic_ns()
            if worked:
                awake = now + _SPIN_NS
            if now < awake and now < look:
                continue
            rest = self._device.tend()
            for fd, _ in self._epoll.poll(0 if now < awake else self._doze(rest)):
                if fd in self._kicks:
                    self._kicked(self._kicks[fd])
                elif fd == self._sock.fileno():
                    if not self._receive():
                        return
                elif self._changes is not None and fd == self._changes.fileno():
                    self._change(self._changes)
            look = time.monotonic_ns() + _LOOK_NS
            for _, ring in self._live:
                ring.disarm()

    def close(self) -> None:
        """Let go of everything."""
        for fd in self._decoder.close():
            os.close(fd)
        for vring in self._vrings:
            self._stop(vring)
            self._set_call(vring, -1)
        self._set_back(None)
        self._memory = SharedMemory()
        self._epoll.close()
        self._sock.close()

    # Rings

    def _serve(self, vring: _Vring, ring: DeviceRing) -> bool:
        """Do what is available, at most once around the ring; whether there was anything."""
        handle = vring.handler
        if handle is None or (head := ring.pop()) == -1:
            return False
        for count in range(1, ring.size + 1):
            if head < 0:
                break
            try:
                ring.push(head, handle(ring))
            except Kept:
                pass  # the device pushes it
            if count % _BATCH == 0:
                ring.notify()
            head = ring.pop() if count < ring.size else -1
        ring.notify()
        if head == -2:
            raise ProtocolError(f"ring {vring.index}: {ring.fault()}")
        return True

    def _settle(self) -> None:
        for vring, ring in self._live:
            if vring.index:
                self._serve(vring, ring)

    def _doze(self, rest: float) -> float:
        """Ask for kicks; how long one may sleep: `rest` at most (-1: for ever), or not at all."""
        idle = [ring.arm() for _, ring in self._live]
        polled = any(v.polled and v.enabled and v.ring is not None for v in self._vrings)
        return rest if all(idle) and not polled else 0

    def _kicked(self, vring: _Vring) -> None:
        try:
            if not os.read(vring.kick, 8):
                raise ProtocolError(f"the kick descriptor of ring {vring.index} has ended")
        except BlockingIOError:
            return  # someone else read it first
        except OSError as error:
            raise ProtocolError(f"the kick descriptor of ring {vring.index}: {error}") from error
        if vring.ring is None:
            self._start(vring)

    @property
    def _packed(self) -> bool:
        return bool(self._acked & Feature.RING_PACKED)

    def _start(self, vring: _Vring) -> None:
        if not vring.size or vring.addresses is None:
            raise ProtocolError(f"ring {vring.index} kicked before its size and addresses came")
        try:
            vring.ring = DeviceRing(
                vring.size,
                vring.base,
                event_idx=bool(self._acked & Feature.EVENT_IDX),
                indirect=bool(self._acked & Feature.INDIRECT_DESC),
                packed=self._packed,
            )
        except ValueError as error:
            raise ProtocolError(f"ring {vring.index}: {error}") from error
        vring.ring.call_fd = vring.call
        self._attach(vring)
        self._choose()

    def _stop(self, vring: _Vring) -> None:
        """Stop a ring. The kick descriptor goes too: a late kick in it would start it again."""
        if vring.ring is not None:
            vring.base = vring.ring.index
            self._device.drop(vring.ring)
        vring.ring = None
        self._set_kick(vring, -1)
        self._choose()

    def _set_kick(self, vring: _Vring, fd: int) -> None:
        if vring.kick >= 0:
            del self._kicks[vring.kick]
            self._epoll.unregister(vring.kick)
            os.close(vring.kick)
        vring.kick = -1
        vring.polled = False
        if fd >= 0:
            self._epoll.register(fd, select.EPOLLIN)
            self._kicks[fd] = vring
            vring.kick = fd

    def _set_call(self, vring: _Vring, fd: int) -> None:
        """Take another call descriptor. What has just been told by the old one, its front end may not see any
        more (QEMU, when a guest unmasks a vector): so the new one tells it again."""
        if vring.ring is not None:
            vring.ring.call_fd = fd
            if fd >= 0:
                with contextlib.suppress(OSError):
                    eventfd.signal(fd)
        if vring.call >= 0:
            os.close(vring.call)
        vring.call = fd

    def _choose(self) -> None:
        """A ring is served if it is started and enabled, and not left to the device.

        The status does not count: QEMU 7.2 never sends DRIVER_OK to a SCSI device.
        """
        live = [(v, v.ring) for v in self._vrings if v.enabled and v.ring is not None]
        self._live = [(vring, ring) for vring, ring in live if vring.handler is not None]
        self._device.use({vring.index: ring for vring, ring in live})

    def _attach(self, vring: _Vring) -> None:
        if vring.ring is None or vring.addresses is None:
            return
        index, size, at = vring.index, vring.size, vring.addresses
        avail, used, align = (4, 4, 4) if self._packed else (6 + 2 * size, 6 + 8 * size, 2)
        vring.ring.attach(
            self._memory.guest,
            self._memory.area(f"descriptor table {index}", at.descriptor, 16 * size, 16),
            self._memory.area(f"available ring {index}", at.available, avail, align),
            self._memory.area(f"used ring {index}", at.used, used, 4),
        )

    # Changes of the device

    def _change(self, changes: Changed) -> None:
        before = self._device.config
        changes.apply()
        for vring, handler in zip(self._vrings, self._device.handlers, strict=True):
            vring.handler = handler
        if self._device.config != before and self._acked_extensions & _TELLS_CONFIG == _TELLS_CONFIG:
            self._tell(Message(BackendRequest.CONFIG_CHANGE_MSG))
        changes.answer()

    def _tell(self, message: Message) -> None:
        """Tell the front end, unless it has left so much unread that it will look anyway.

        No answer is asked for: it may wait for one of ours at this moment.
        """
        if self._back is None:
            return
        data = message.encode()
        try:
            if self._back.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) != len(data):
                self._set_back(None)
        except BlockingIOError:
            pass
        except OSError:
            self._set_back(None)  # the front end has closed it

    def _set_back(self, sock: socket.socket | None) -> None:
        if self._back is not None:
            self._back.close()
        self._back = sock

    # Messages

    def _receive(self) -> bool:
        """Read what a message still needs, and answer it once it is whole; false at the end."""
        try:
            data, fds, flags, _ = socket.recv_fds(
                self._sock, self._decoder.wanted, MAX_FDS + 1, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            return False
        messages = self._decoder.feed(data, fds)
        try:
            for message in messages:
                reply = self.handle(message)
                if reply is not None:
                    self._sock.sendall(reply.encode())
        except (BrokenPipeError, ConnectionResetError):
            return False
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"more than {MAX_FDS} descriptors with one message")
        return bool(data)

    def handle(self, message: Message) -> Message | None:
        """Do what a message asks; the reply, where one is due (Communication)."""
        fds = list(message.fds)
        failed = 0
        payload = None
        try:
            if message.request not in self._handlers:
                raise ProtocolError(f"{message.name} is for nothing that was offered")
            gate = _GATES.get(message.request)
            if gate is not None and not self._acked_extensions & gate:
                raise ProtocolError(f"{message.name} without {gate.name}")
            payload = self._handlers[message.request](message.payload, fds)
        except _Refused:
            failed = 1
        finally:
            for fd in fds:  # which no handler took
                os.close(fd)
        if payload is None and expected_ack(message, self._acked_extensions):
            payload = encode_u64(failed)
        return None if payload is None else message.reply(payload)

    def _set_features(self, payload: bytes, fds: list[int]) -> None:
        features = decode_u64(payload)
        if features & ~self._features:
            raise ProtocolError(f"features {features:#x}, offered were {self._features:#x}")
        self._acked = self._device.acked = features
        if not features & PROTOCOL_FEATURES:  # then rings start enabled (Ring states)
            for vring in self._vrings:
                vring.enabled = True
            self._choose()

    def _set_protocol_features(self, payload: bytes, fds: list[int]) -> None:
        extensions = decode_u64(payload)
        if extensions & ~self._extensions:
            raise ProtocolError(f"protocol features {extensions:#x}, offered were {self._extensions:#x}")
        self._acked_extensions = extensions

    def _set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        self._memory.replace(MemoryTable.decode(payload).regions, fds)
        self._reattach()

    def _add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        self._memory.add(SingleMemoryRegion.decode(payload).region, fds)
        self._reattach()

    def _rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        self._memory.remove(SingleMemoryRegion.decode(payload).region)
        self._reattach()

    def _reattach(self) -> None:
        for vring in self._vrings:
            self._attach(vring)

    def _vring(self, index: int) -> _Vring:
        if index >= len(self._vrings):
            raise ProtocolError(f"ring {index}, there are {len(self._vrings)}")
        return self._vrings[index]

    def _stopped(self, state: VringState, most: int) -> _Vring:
        vring = self._vring(state.index)
        if vring.ring is not None or state.num > most:
            raise ProtocolError(f"{state.num} for ring {state.index}, which runs or takes {most}")
        return vring

    def _set_vring_num(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.decode(payload)
        if state.num == 0 or (state.num & (state.num - 1) and not self._packed):
            raise ProtocolError(f"size {state.num} of ring {state.index}, want a power of two")
        self._stopped(state, 32768).size = state.num

    def _set_vring_base(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.decode(payload)
        self._stopped(state, 0xFFFFFFFF if self._packed else 0xFFFF).base = state.num

    def _set_vring_addr(self, payload: bytes, fds: list[int]) -> None:
        addresses = VringAddress.decode(payload)
        vring = self._vring(addresses.index)
        vring.addresses = addresses
        self._attach(vring)

    def _set_vring_kick(self, payload: bytes, fds: list[int]) -> None:
        vring = self._vring_fd(payload, fds)
        try:
            for fd in fds:
                os.set_blocking(fd, False)  # another reader may be faster
            self._set_kick(vring, fds[0] if fds else -1)
        except OSError as error:
            raise ProtocolError(f"kick descriptor of ring {vring.index}: {error}") from error
        if fds:
            fds.clear()  # the ring has it now, and starts when it is kicked
        else:
            vring.polled = True
            if vring.ring is None:
                self._start(vring)

    def _set_vring_call(self, payload: bytes, fds: list[int]) -> None:
        vring = self._vring_fd(payload, fds)
        self._set_call(vring, fds.pop() if fds else -1)

    def _vring_fd(self, payload: bytes, fds: list[int]) -> _Vring:
        """The ring that is sent a descriptor, or is to have none."""
        what = VringFd.decode(payload)
        if len(fds) != (0 if what.nofd else 1):
            raise ProtocolError(f"{len(fds)} descriptors for ring {what.index}, want 1 or its NOFD")
        return self._vring(what.index)

    def _set_vring_enable(self, payload: bytes, fds: list[int]) -> None:
        state = VringState.decode(payload)
        if state.num > 1:
            raise ProtocolError(f"{state.num} to enable ring {state.index}, want 0 or 1")
        self._vring(state.index).enabled = bool(state.num)
        self._choose()

    def _get_vring_base(self, payload: bytes, fds: list[int]) -> bytes:
        vring = self._vring(VringState.decode(payload).index)
        self._stop(vring)
        return VringState(vring.index, vring.base).encode()

    def _get_config(self, payload: bytes, fds: list[int]) -> bytes:
        asked = ConfigSpace.decode(payload)
        if not asked.size or asked.offset + asked.size > _CONFIG_SPACE:
            return b""  # the answer that means an error
        config = self._device.config.ljust(_CONFIG_SPACE, b"\0")
        part = config[asked.offset : asked.offset + asked.size]
        return ConfigSpace(asked.offset, asked.size, asked.flags, part).encode()

    def _set_config(self, payload: bytes, fds: list[int]) -> None:
        asked = ConfigSpace.decode(payload)
        if not self._device.set_config(asked.offset, asked.payload):
            raise _Refused

    def _set_status(self, payload: bytes, fds: list[int]) -> None:
        self._status = decode_u64(payload) & 0xFF
        if self._status == 0:
            self._reset_device(b"", fds)

    def _reset_device(self, payload: bytes, fds: list[int]) -> None:
        self._status = 0
        self._device.reset()
        for vring in self._vrings:
            self._stop(vring)
            vring.base = 0
            vring.enabled = not self._acked & PROTOCOL_FEATURES

    def _set_backend_req_fd(self, payload: bytes, fds: list[int]) -> None:
        if len(fds) != 1:
            raise ProtocolError(f"{len(fds)} descriptors for the channel back, want 1")
        try:
            self._set_back(socket.socket(fileno=fds[0]))
        except OSError as error:
            raise ProtocolError(f"the channel back: {error}") from error
        fds.clear()
