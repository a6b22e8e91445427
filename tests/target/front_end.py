"""The other half of a target's tests: a driver and a front end in plain bytes, which know no `virtio`."""

import contextlib
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

GUEST = 0x4000_0000  # where the memory below is for descriptors
USER = 0x7F00_0000_0000  # and for vring addresses

NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags (virtio 2.7.5)

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG, RESET_DEVICE = 21, 24, 25, 34
GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS = 36, 37, 38, 39, 40

VERSION_1, EVENT_IDX, INDIRECT_DESC, PROTOCOL_FEATURES = 1 << 32, 1 << 29, 1 << 28, 1 << 30
MQ, REPLY_ACK, CONFIG, RESET, MEM_SLOTS, STATUS = 1 << 0, 1 << 3, 1 << 9, 1 << 13, 1 << 15, 1 << 16
BACKEND_REQ = 1 << 5
NOFD = 1 << 8

_barrier = threading.Lock()  # taking it is a full barrier


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


class Driver:
    """One split ring in the first 16 KiB of some memory from `offset` on; data anywhere else."""

    def __init__(self, memory: memoryview, size: int, offset: int = 0, *, event_idx: bool = False) -> None:
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc, self.avail, self.used = offset, offset + 16 * size, offset + 24 * size
        self.index = self.seen = 0

    def areas(self) -> tuple[memoryview, memoryview, memoryview]:
        return (
            self.memory[self.desc : self.avail],
            self.memory[self.avail : self.used],
            self.memory[self.used :],
        )

    def describe(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0, *, at: int = -1
    ) -> None:
        """Write descriptor `index` of the ring's table, or of the table `at` some offset."""
        where = (self.desc if at < 0 else at) + 16 * index
        struct.pack_into("<QIHH", self.memory, where, address, length, flags, following)

    def chain(self, buffers: Sequence[tuple[int, int, int]], first: int = 0, *, at: int = -1) -> None:
        """Descriptors from `first` on for (address, length, flags), each but the last with NEXT."""
        for number, (address, length, flags) in enumerate(buffers, first):
            more = NEXT if number + 1 < first + len(buffers) else 0
            self.describe(number, address, length, flags | more, number + 1 if more else 0, at=at)

    def offer(self, *heads: int) -> bool:
        """Make heads available; whether the device wants to be kicked (2.7.13)."""
        old = self.index
        for head in heads:
            struct.pack_into("<H", self.memory, self.avail + 4 + 2 * (self.index % self.size), head)
            self.index = (self.index + 1) & 0xFFFF
        self.memory[self.avail + 2 : self.avail + 4].cast("H")[0] = self.index
        with _barrier:
            if self.event_idx:
                event = int(struct.unpack_from("<H", self.memory, self.used + 4 + 8 * self.size)[0])
                return (self.index - event - 1) & 0xFFFF < (self.index - old) & 0xFFFF
            return self.memory[self.used] & 1 == 0

    def used_index(self) -> int:
        return int(self.memory[self.used + 2 : self.used + 4].cast("H")[0])

    def want_call(self) -> None:
        """Ask to be called at the next used buffer, with EVENT_IDX (2.7.7)."""
        struct.pack_into("<H", self.memory, self.avail + 4 + 2 * self.size, self.seen)
        with _barrier:
            pass

    def take(self) -> list[tuple[int, int]]:
        """(id, length) of all that was used since."""
        end, found = self.used_index(), []
        while self.seen != end:
            where = self.used + 4 + 8 * (self.seen % self.size)
            found.append(struct.unpack_from("<II", self.memory, where))
            self.seen = (self.seen + 1) & 0xFFFF
        return found


class FrontEnd:
    """A vhost-user front end with one memory region and some rings; a context manager."""

    def __init__(self, sock: socket.socket, size: int = 1 << 20) -> None:
        self.sock = sock
        sock.settimeout(10)
        self.memfd = os.memfd_create("front-end")
        os.ftruncate(self.memfd, size)
        self.size = size
        self.memory = memoryview(mmap.mmap(self.memfd, size))
        self.rings: dict[int, Driver] = {}
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.extensions = 0

    @classmethod
    def connect(cls, path: str) -> "FrontEnd":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(sock)

    def __enter__(self) -> "FrontEnd":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        for fd in (self.memfd, *self.kicks.values(), *self.calls.values()):
            os.close(fd)

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        socket.send_fds(self.sock, [struct.pack("=III", request, flags, len(payload)) + payload], fds)

    def receive(self) -> tuple[int, int, bytes]:
        """Request, flags and payload of a reply; EOFError when the target has gone."""
        request, flags, size = struct.unpack("=III", self._read(12))
        return request, flags, self._read(size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        answered, flags, reply = self.receive()
        assert (answered, flags) == (request, 1 | 4)  # version 1, a reply
        return reply

    def number(self, request: int) -> int:
        return int(struct.unpack("=Q", self.ask(request))[0])

    def region(self, guest: int = GUEST, user: int = USER, offset: int = 0, size: int = 0) -> bytes:
        return struct.pack("=QQQQ", guest, size or self.size, user, offset)

    def hello(self, features: int = VERSION_1 | PROTOCOL_FEATURES, extensions: int = MQ | CONFIG) -> None:
        """Everything up to and with the memory table."""
        self.send(SET_OWNER)
        self.number(GET_FEATURES)
        if features & PROTOCOL_FEATURES:
            self.number(GET_PROTOCOL_FEATURES)
            self.send(SET_PROTOCOL_FEATURES, u64(extensions))
            self.extensions = extensions
        self.send(SET_FEATURES, u64(features))
        self.features = features
        self.send(SET_MEM_TABLE, struct.pack("=II", 1, 0) + self.region(), [self.memfd])

    def ring(self, index: int, size: int = 64, base: int = 0) -> Driver:
        """Set up ring `index`, in its own 16 KiB, and kick it once."""
        ring = Driver(self.memory, size, index * 0x4000, event_idx=bool(self.features & EVENT_IDX))
        self.rings[index] = ring
        ring.index = ring.seen = base
        struct.pack_into("<H", self.memory, ring.avail + 2, base)
        struct.pack_into("<H", self.memory, ring.used + 2, base)
        for fds in (self.kicks, self.calls):
            fds[index] = fds.get(index) or os.eventfd(0, os.EFD_NONBLOCK)
        self.send(SET_VRING_NUM, state(index, size))
        self.send(SET_VRING_BASE, state(index, base))
        areas = (USER + ring.desc, USER + ring.used, USER + ring.avail, 0)
        self.send(SET_VRING_ADDR, struct.pack("=IIQQQQ", index, 0, *areas))
        self.send(SET_VRING_CALL, u64(index), [self.calls[index]])
        self.send(SET_VRING_KICK, u64(index), [self.kicks[index]])
        if self.features & PROTOCOL_FEATURES:
            self.send(SET_VRING_ENABLE, state(index, 1))
        os.eventfd_write(self.kicks[index], 1)
        return ring

    def request(
        self, index: int, readable: Sequence[bytes], writable: Sequence[int]
    ) -> tuple[int, list[bytes]]:
        """Send one request with these buffers; the used length, and what is in the writable ones."""
        ring = self.rings[index]
        at = 0x80000  # the upper half is for data
        buffers = []
        for data in readable:
            self.memory[at : at + len(data)] = data
            buffers.append((GUEST + at, len(data), 0))
            at += len(data)
        start = at
        for length in writable:
            buffers.append((GUEST + at, length, WRITE))
            at += length
        self.memory[start:at] = b"\xee" * (at - start)
        ring.chain(buffers)
        if ring.offer(0):
            os.eventfd_write(self.kicks[index], 1)
        ((head, length),) = self.wait(index)
        assert head == 0
        parts = []
        for size in writable:
            parts.append(bytes(self.memory[start : start + size]))
            start += size
        return length, parts

    def wait(self, index: int, timeout: float = 10) -> list[tuple[int, int]]:
        """What was used since, polled for; EOFError when the target closed the connection."""
        deadline = time.monotonic() + timeout
        while not (found := self.rings[index].take()):
            if select.select([self.sock], [], [], 0.0002)[0] and self.ended():
                raise EOFError
            if time.monotonic() > deadline:
                raise TimeoutError(f"ring {index}: nothing used after {timeout} s")
        return found

    def ended(self) -> bool:
        """Whether the target ends the connection; waits for it."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


@contextlib.contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)
