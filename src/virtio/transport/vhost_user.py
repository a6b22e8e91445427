"""The vhost-user front end: a device behind a Unix socket (QEMU's docs/interop/vhost-user.rst).

The order of messages is the one that all back ends accept. What a back end lacks of REPLY_ACK,
CONFIG, MQ, CONFIGURE_MEM_SLOTS, STATUS, RESET_DEVICE and BACKEND_REQ is done without.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from virtio import control
from virtio.errors import ProtocolError, RequestTimeout, TransportError, VirtioError
from virtio.ring.doorbell import Doorbell
from virtio.ring.eventfd import drain, make_eventfd, signal
from virtio.ring.lease import Life
from virtio.ring.region import Mapping, Region
from virtio.transport.base import QueuePort, RingAreas
from virtio.transport.session import Session, close_all, receive, send_reply
from virtio.wire.vhost_user import (
    PROTOCOL_FEATURES,
    BackendRequest,
    ConfigSpace,
    Decoder,
    MemoryRegion,
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
from virtio.wire.virtio import ConfigField, Feature, Status

log = logging.getLogger("virtio.vhost_user")

# What we can do of the protocol's extensions; BACKEND_REQ only where its answers are possible.
_EXTENSIONS = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
_GUEST_BASE = 1 << 32  # where our memory is for the back end: not where it is for us
_ENABLED = 1
_LOOK_S = 1.0  # between two looks at whether somebody is stuck in a kick
_PACKED_BASE = 0x8000_8000  # index 0 both ways, and both wrap counters 1
_RESET_POLL_S = 0.001
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class VhostUser:
    """A connection to a back end. Owns the socket, the channel back and every ring's eventfds."""

    allowed = int(Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED | Feature.ORDER_PLATFORM)
    required = int(Feature.VERSION_1)
    legacy = False

    def __init__(self, path: str, timeout: float = 5.0) -> None:
        """Connect and learn what the back end can do; each wait is bounded by `timeout` seconds.

        Raises TransportError, ProtocolError or RequestTimeout, and leaves nothing behind then.
        """
        self.address = f"user:{path}"
        self.path = path
        self._timeout = timeout
        self.on_config_change: Callable[[], None] = lambda: None
        self._pid = os.getpid()
        self._ports: list[tuple[int, int]] = []  # kick and call eventfd of each ring
        self._doorbells: dict[int, Doorbell] = {}  # by ring
        self._timer: control.Timer | None = None
        self._back: socket.socket | None = None
        self.life = Life(self.address)
        self.gone: VirtioError | None = None
        self.on_gone: Callable[[VirtioError], None] = self.life.end
        try:
            self._session = Session(path, timeout)
        except BaseException:
            self.life.close()
            raise
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def timeout(self) -> float:
        """Seconds that bound each wait from now on."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = self._session.timeout = seconds

    def _begin(self) -> None:
        self.gone = None
        self._status = Status(0)
        self._features = 0
        self._next_guest_address = _GUEST_BASE
        self._regions: list[MemoryRegion] = []
        self._region_fds: list[int] = []
        self._slots = 8
        self._shake_hands()
        control.watch(self._session.fileno(), _GONE, self._peer_gone)

    def _shake_hands(self) -> None:
        session = self._session
        session.tell(Request.SET_OWNER)
        self._offered = session.ask(Request.GET_FEATURES, decode_u64)
        self.max_queues: int | None = None
        if self._offered & PROTOCOL_FEATURES:
            offered = ProtocolFeature(session.ask(Request.GET_PROTOCOL_FEATURES, decode_u64))
            taken = offered & _EXTENSIONS
            session.tell(Request.SET_PROTOCOL_FEATURES, encode_u64(taken))
            session.features = taken
        if session.features & ProtocolFeature.MQ:
            self.max_queues = session.ask(Request.GET_QUEUE_NUM, decode_u64)
        if session.features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            self._slots = session.ask(Request.GET_MAX_MEM_SLOTS, decode_u64)
        if session.features & ProtocolFeature.BACKEND_REQ:
            self._open_back_channel()
        self.has_config = bool(session.features & ProtocolFeature.CONFIG)
        # GET_VRING_BASE alone: qemu-storage-daemon completes requests after it that it had before.
        self.resets = bool(session.features & (ProtocolFeature.RESET_DEVICE | ProtocolFeature.STATUS))

    # Status and features (3.1.1).

    def reset(self) -> None:
        """Status 0, and wait until it reads so (2.4). Without STATUS each connection begins anew."""
        self.set_status(Status(0))
        deadline = time.monotonic() + self._session.timeout
        while self.status():
            if time.monotonic() > deadline:
                raise RequestTimeout(
                    f"{self.address} still has status {self.status():#x} {self._session.timeout:g} s after "
                    "its reset"
                )
            time.sleep(_RESET_POLL_S)

    def status(self) -> Status:
        """The device status field; without STATUS what we wrote, as nobody could object."""
        if self._session.features & ProtocolFeature.STATUS:
            return Status(self._session.ask(Request.GET_STATUS, decode_u64) & 0xFF)
        return self._status

    def set_status(self, status: Status) -> None:
        """Write the device status field."""
        self._status = status
        if self._session.features & ProtocolFeature.STATUS:
            self._session.tell(Request.SET_STATUS, encode_u64(status))

    def offered(self) -> int:
        """Feature bits of the device, rings and transport, without the protocol's own bit."""
        return self._offered & ~PROTOCOL_FEATURES

    def accept(self, features: int) -> None:
        """Write the driver's features; the protocol's own bit is added wherever it was offered."""
        self._features = features | self._offered & PROTOCOL_FEATURES
        self._session.tell(Request.SET_FEATURES, encode_u64(self._features))

    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        """The first `nbytes` of the configuration space, in one message: there is no generation.

        TransportError if there is no access to it; ProtocolError for an answer of another size.
        """
        if not self.has_config:
            raise TransportError(
                errno.EOPNOTSUPP, f"{self.address} gives no access to its configuration space"
            )

        def decode(payload: bytes) -> bytes:
            if not payload:
                raise ProtocolError(f"{self.address} refused to read {nbytes} configuration bytes")
            answer = ConfigSpace.decode(payload)
            if (answer.offset, answer.size) != (0, nbytes):
                raise ProtocolError(
                    f"{self.address} sent {answer.size} configuration bytes from {answer.offset}, "
                    f"want {nbytes} from 0"
                )
            return answer.payload

        return self._session.ask(Request.GET_CONFIG, decode, ConfigSpace(0, nbytes).encode())

    # Memory and rings.

    def largest_queue(self, index: int) -> None:
        """Unknown: there is no message that asks for it."""

    def region(self, nbytes: int) -> Region:
        """Memory of the caller's, which any back end can map."""
        return Region(nbytes)

    def map(self, region: Region) -> Mapping:
        """Share a region; its descriptor stays the region's."""
        if len(self._regions) >= self._slots:
            raise TransportError(
                errno.ENOSPC, f"{self.address} takes no more than {self._slots} memory regions"
            )
        shared = MemoryRegion(self._next_guest_address, region.size, region.address, 0)
        self._next_guest_address += region.size
        self._regions.append(shared)
        self._region_fds.append(region.fd)
        session = self._session
        if session.features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            payload = SingleMemoryRegion(shared).encode()
            session.tell(Request.ADD_MEM_REG, payload, [region.fd])
        else:
            payload = MemoryTable(tuple(self._regions)).encode()
            session.tell(Request.SET_MEM_TABLE, payload, self._region_fds)
        if not session.features & ProtocolFeature.REPLY_ACK:
            session.ask(Request.GET_FEATURES, decode_u64)  # answered when the memory is mapped
        return Mapping.contiguous(shared.guest_address)

    def setup_queue(self, index: int, areas: RingAreas, base: int) -> QueuePort:
        """Describe ring `index`, and hand over its eventfds.

        It must be the next one, or after `stop` or `reconnect` one that was set up before: its descriptors
        keep their numbers, but the kick is a new one, as an old back end may live and take kicks.
        """
        if index > len(self._ports):
            raise ValueError(f"ring {index} set up after {len(self._ports)} others")
        session = self._session
        session.tell(Request.SET_VRING_NUM, VringState(index, areas.size).encode())
        first = _PACKED_BASE if areas.form.packed else base
        session.tell(Request.SET_VRING_BASE, VringState(index, first).encode())
        descriptor, available, used = (areas.region.address + offset for offset in areas[2:5])
        payload = VringAddress(index, 0, descriptor, used, available).encode()
        session.tell(Request.SET_VRING_ADDR, payload)
        if index == len(self._ports):
            self._ports.append(_make_eventfds())
        else:
            fresh = make_eventfd()
            os.dup2(fresh, self._ports[index][0], inheritable=False)
            os.close(fresh)
        kick, call = self._ports[index]
        doorbell = self._doorbells[index] = Doorbell(kick)
        session.tell(Request.SET_VRING_CALL, VringFd(index).encode(), [call])
        session.tell(Request.SET_VRING_KICK, VringFd(index).encode(), [kick])
        return QueuePort(doorbell, call)

    def start(self) -> None:
        """Enable every ring, say DRIVER_OK, and kick each ring once: that starts it."""
        if self._features & PROTOCOL_FEATURES:
            for index in range(len(self._ports)):
                payload = VringState(index, _ENABLED).encode()
                self._session.tell(Request.SET_VRING_ENABLE, payload)
        self.set_status(self._status | Status.DRIVER_OK)
        for kick, _ in self._ports:
            signal(kick)
        if self._timer is None:
            self._timer = control.Timer(_LOOK_S, self._look_at_kicks)

    def stop(self) -> None:
        """Stop every ring and wait for each: afterwards the back end writes no memory (VHU-9)."""
        self._stop_rings()
        self.reset()

    def renew(self) -> None:
        """Stop, and have the device as new, where `resets` says that this can be."""
        self._stop_rings()
        if self._session.features & ProtocolFeature.RESET_DEVICE:
            self._session.tell(Request.RESET_DEVICE)
        self.reset()

    def _stop_rings(self) -> None:
        for index in range(len(self._ports)):
            payload = VringState(index, 0).encode()
            self._session.ask(Request.GET_VRING_BASE, VringState.decode, payload)

    def close(self) -> None:
        """Stop the rings if that can still be done, and let go of everything; idempotent."""
        if os.getpid() == self._pid:
            self._unwatch()  # its end is not the device's from now on
            if self._session.error is None:
                with contextlib.suppress(VirtioError, OSError, MemoryError):
                    self.stop()
        self.life.close()
        self.hang_up()
        ports, self._ports = self._ports, []
        close_all([fd for port in ports for fd in port])

    def hang_up(self) -> None:
        """Close the connection as it is: for a back end that is not there, or hangs; idempotent."""
        if os.getpid() == self._pid:
            self._unwatch()
        if self.gone is None:
            self.gone = TransportError(errno.ENOTCONN, f"no connection to {self.path}")
        self._session.close()
        if self._back is not None:
            self._back.close()
            close_all(self._decoder.close())
            self._back = None

    def reconnect(self) -> None:
        """Connect again, in place of a connection that was hung up; a failed attempt leaves none."""
        self._session = Session(self.path, self._timeout)
        try:
            self._begin()
        except BaseException:
            self.hang_up()
            raise

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._session.closed:
            control.unwatch(self._session.fileno())
        if self._back is not None:
            control.unwatch(self._back.fileno())

    # The control thread's part.

    def _look_at_kicks(self) -> None:
        """A peer can fill a kick descriptor that it shares, and make it block: who kicks is freed, and
        told."""
        for doorbell in self._doorbells.values():
            if doorbell.blocked():
                words = f"{self.address} keeps a kick descriptor full, and has made it block"
                self.life.end(ProtocolError(words))
                drain(doorbell.fd)

    def _peer_gone(self, events: int) -> None:
        control.unwatch(self._session.fileno())
        self.gone = self._session.error or TransportError(
            errno.ECONNRESET, f"the back end at {self.path} closed the connection"
        )
        self.on_gone(self.gone)

    def _open_back_channel(self) -> None:
        try:
            self._back, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            words = "no sockets for the channel back: see `ulimit -n`"
            raise TransportError(error.errno or errno.EMFILE, words) from error
        self._decoder = Decoder()
        with theirs:
            self._back.setblocking(False)
            control.watch(self._back.fileno(), select.EPOLLIN, self._serve_back_end)
            self._session.tell(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def _serve_back_end(self, events: int) -> None:
        assert self._back is not None
        try:
            data, fds = receive(self._back, self._decoder.wanted)
            messages = self._decoder.feed(data, fds) if data else []
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as error:
            log.warning("%s: the channel back is closed: %s", self.address, error)
            data, messages = b"", []
        for message in messages:
            self._answer(message)
        if not data:
            control.unwatch(self._back.fileno())

    def _answer(self, message: Message) -> None:
        """CONFIG_CHANGE is accepted; nothing else was negotiated, so nothing else is granted."""
        assert self._back is not None
        log.debug("<< %s", message.describe(BackendRequest))
        close_all(message.fds)
        refused = message.request != BackendRequest.CONFIG_CHANGE_MSG
        if expected_ack(message, self._session.features, BackendRequest):
            send_reply(self._back, message.reply(encode_u64(refused)))
        if not refused:
            self.on_config_change()


def _make_eventfds() -> tuple[int, int]:
    kick = make_eventfd()
    try:
        return kick, make_eventfd()
    except TransportError:
        os.close(kick)
        raise
