"""QEMU's PCI devices without a guest: their registers through its qtest socket, its memory shared.

The machine's processor halts at its first instruction, and we are firmware and driver. Guest memory is
a memfd of ours, so that only register accesses cross the socket; interrupt messages are aimed at that memory
too, where a thread finds them.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import subprocess
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from tests.peers.qmp import Monitor
from virtio.errors import TransportError
from virtio.ring.buffer import address_of
from virtio.ring.doorbell import Doorbell
from virtio.ring.region import Mapping, Region
from virtio.transport.windows import Line

WAIT_S = 10.0  # for anything that it is asked to do

_RAM_BYTES = 256 << 20
_MESSAGES_AT = 1 << 20  # a page for each function's interrupt messages
_REGIONS_AT = 2 << 20
_MEMORY_AT, _PORTS_AT = 0xE0000000, 0xC000  # where BARs may be on a q35
_FIRMWARE = bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd".ljust(16, b"\0")  # at its reset vector: cli; hlt; jmp hlt
_EJECT = 0xAE08  # of the PIIX4's ACPI hot plug: a bit for each slot
_LOOK_S = 0.0002  # between two looks at the interrupt messages

_MAP_FIXED = 0x10
_SIZES = {1: "b", 2: "w", 4: "l"}


class Qtest:
    """The line protocol on one end of a socket pair, which it owns; any thread may call."""

    def __init__(self, ours: socket.socket) -> None:
        self.accesses = 0
        self._socket = ours
        self._lines = ours.makefile("rb")
        self._lock = threading.RLock()

    def ask(self, line: str) -> str:
        """Run one command: what comes after OK."""
        with self._lock:
            self.accesses += 1
            try:
                self._socket.sendall(line.encode() + b"\n")
                while (answer := self._lines.readline().decode()).startswith("IRQ"):
                    pass
            except OSError as error:
                raise TransportError(errno.EIO, f"qtest {line!r}: {error}") from error
        if not answer.startswith("OK"):
            raise TransportError(errno.EIO, f"qtest answered {line!r} with {answer!r}")
        return answer[2:].strip()

    def load(self, address: int, width: int, ports: bool = False) -> int:
        return int(self.ask(f"{'in' if ports else 'read'}{_SIZES[width]} {address:#x}"), 0)

    def store(self, address: int, width: int, value: int, ports: bool = False) -> None:
        self.ask(f"{'out' if ports else 'write'}{_SIZES[width]} {address:#x} {value:#x}")

    def load_config(self, slot: int, offset: int, width: int) -> int:
        """PCI configuration space, through the ports of old."""
        with self._lock:
            self.store(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC, ports=True)
            return self.load(0xCFC + (offset & 3), width, ports=True)

    def store_config(self, slot: int, offset: int, width: int, value: int) -> None:
        with self._lock:
            self.store(0xCF8, 4, 0x80000000 | slot << 11 | offset & 0xFC, ports=True)
            self.store(0xCFC + (offset & 3), width, value, ports=True)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Machine:
    """A running QEMU with these devices; a context manager, which ends it in any case.

    A `pc` has a bus whose devices can be unplugged.
    """

    def __init__(self, program: str, *arguments: str, kind: str = "q35") -> None:
        self.ram = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.ram, _RAM_BYTES)
        firmware = os.memfd_create("firmware", os.MFD_CLOEXEC)
        os.write(firmware, _FIRMWARE)
        qtest, their_qtest = socket.socketpair()
        qmp, their_qmp = socket.socketpair()
        for ours in (qtest, qmp):
            ours.settimeout(WAIT_S)
        ram = f"/proc/self/fd/{self.ram}"
        inherited = [self.ram, firmware, their_qtest.fileno(), their_qmp.fileno()]
        with their_qtest, their_qmp:
            self._process = subprocess.Popen(
                [program, "-machine", f"{kind},memory-backend=ram", "-accel", "tcg", "-nodefaults"]
                + ["-display", "none", "-bios", f"/proc/self/fd/{firmware}", "-m", f"{_RAM_BYTES >> 20}M"]
                + ["-object", f"memory-backend-file,id=ram,size={_RAM_BYTES},share=on,mem-path={ram}"]
                + ["-chardev", f"socket,id=qtest,fd={their_qtest.fileno()}", "-qtest", "chardev:qtest"]
                + ["-qtest-log", "none"]
                + ["-chardev", f"socket,id=qmp,fd={their_qmp.fileno()}", "-mon", "qmp,mode=control"]
                + list(arguments),
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        os.close(firmware)
        self.qtest = Qtest(qtest)
        self._lent: dict[int, int] = {}  # of the memory for regions: address and end
        self._memory_at, self._ports_at = _MEMORY_AT, _PORTS_AT
        self._bars: dict[int, dict[int, tuple[bool, int, int]]] = {}
        self._monitor = Monitor(qmp, self._fail)
        self._monitor.greet()

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a monitor command, and return what it returns."""
        return self._monitor.run(command, arguments)

    def unplug(self, name: str, slot: int) -> None:
        """Remove a device from the bus of a `pc`, as its owner's operating system would let it go."""
        self.qmp("device_del", {"id": name})
        self.qtest.store(_EJECT, 4, 1 << slot, ports=True)
        end = time.monotonic() + WAIT_S
        while self.qtest.load_config(slot, 0, 2) != 0xFFFF:
            assert time.monotonic() < end, f"{name} is still there"

    def functions(self) -> Iterator[int]:
        """The slots of the bus that have a device of virtio's vendor."""
        for slot in range(32):
            if self.qtest.load_config(slot, 0, 2) == 0x1AF4:
                yield slot

    def windows(self, slot: int) -> "QtestWindows":
        """The device in a slot of the bus; its BARs have got addresses."""
        if slot not in self._bars:
            self._bars[slot] = self._assign(slot)
        return QtestWindows(self, slot, self._bars[slot])

    def _assign(self, slot: int) -> dict[int, tuple[bool, int, int]]:
        """Of each BAR whether it is of ports, address and size: what firmware does (PCI 3.0, 6.2.5.1)."""
        found = {}
        index = 0
        while index < 6:
            number, at = index, 0x10 + 4 * index
            self.qtest.store_config(slot, at, 4, 0xFFFFFFFF)
            mask = self.qtest.load_config(slot, at, 4)
            ports, wide = bool(mask & 1), mask & 7 == 4
            index += 2 if wide else 1
            mask &= ~3 if ports else ~15
            if not mask:
                continue
            if wide:
                self.qtest.store_config(slot, at + 4, 4, 0xFFFFFFFF)
                mask |= self.qtest.load_config(slot, at + 4, 4) << 32
                self.qtest.store_config(slot, at + 4, 4, 0)
            size = (1 << (64 if wide else 32)) - mask
            if ports:
                size &= 0xFFFF
                address = self._ports_at = -(-self._ports_at // size) * size
                self._ports_at += size
            else:
                address = self._memory_at = -(-self._memory_at // size) * size
                self._memory_at += size
            self.qtest.store_config(slot, at, 4, address)
            found[number] = ports, address, size
        return found

    def lend(self, nbytes: int) -> int:
        """The address of so many bytes of guest memory that are nobody's."""
        at = _REGIONS_AT
        for start, end in sorted(self._lent.items()):
            if at + nbytes <= start:
                break
            at = end
        assert at + nbytes <= _RAM_BYTES, "guest memory is full"
        self._lent[at] = at + nbytes
        return at

    def give_back(self, at: int) -> None:
        del self._lent[at]

    def kill(self) -> None:
        """End QEMU at once, under its users."""
        self._process.kill()
        self._process.wait(WAIT_S)

    def close(self) -> str:
        """End it: what it said on stderr. Idempotent."""
        if self.ram < 0:
            return ""
        self._process.kill()
        _, said = self._process.communicate(timeout=WAIT_S)
        self._monitor.close()
        self.qtest.close()
        os.close(self.ram)
        self.ram = -1
        return said

    def _fail(self, what: str) -> NoReturn:
        raise AssertionError(f"QEMU {what}: {self.close()}")

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class GuestRegion(Region):
    """Bytes of the guest's memory, `iova` being their address there."""

    def __init__(self, ram: int, iova: int, nbytes: int) -> None:
        self.iova, self.size, self.huge = iova, nbytes, False
        self.fd = os.dup(ram)
        self.view = memoryview(mmap.mmap(ram, nbytes, mmap.MAP_SHARED, offset=iova))
        self.address = address_of(self.view)


class ScatteredRegion(Region):
    """The same in pages that are nowhere next to each other: in reverse order."""

    def __init__(self, ram: int, iova: int, nbytes: int, shift: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.size, self.huge, page = nbytes, False, 1 << shift
        self.fd = os.dup(ram)
        memory = mmap.mmap(-1, nbytes, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        self.view = memoryview(memory)
        self.address = address_of(self.view)
        table = array("Q", range(iova + nbytes - page, iova - page, -page))
        for number, place in enumerate(table):
            at = self.address + number * page
            mapped = libc.mmap(at, page, 3, mmap.MAP_SHARED | _MAP_FIXED, ram, place)
            assert mapped == at, os.strerror(ctypes.get_errno())
        self.mapping = Mapping(shift, table)


class QtestWindows:
    """`virtio.transport.pci.Windows` on a device of a machine.

    `vectors` bounds the interrupts that it can provide; None: as many as the device has. `counts` says how
    many messages of each vector were seen, several in a row counted once; or how often INTx was up, which
    there is if `has_line` says so.
    """

    translated = False
    removal = None

    def __init__(self, machine: Machine, slot: int, bars: dict[int, tuple[bool, int, int]]) -> None:
        self.name = f"0000:00:{slot:02x}.0"
        self.slot = slot
        self.vectors: int | None = None
        self.has_line = False
        self.counts: list[int] = []
        self._machine = machine
        self._qtest = machine.qtest
        self._bars = bars
        self.shift = 0  # where not: memory comes in pages of 1 << shift, in no order
        self._lent: list[int] = []
        self._eventfds: list[int] = []
        self._watcher: threading.Thread | None = None
        self._closing = threading.Event()
        self._unmasked = threading.Event()  # INTx
        self._unmasked.set()
        self._closed = False
        self._command(7)  # I/O and memory accesses, and bus mastering

    def read_config(self, offset: int, width: int) -> int:
        return self._qtest.load_config(self.slot, offset, width)

    def write_config(self, offset: int, width: int, value: int) -> None:
        self._qtest.store_config(self.slot, offset, width, value)

    def bar_bytes(self, bar: int) -> int:
        return self._bars[bar][2] if bar in self._bars else 0

    def read(self, bar: int, offset: int, width: int) -> int:
        ports, address, _ = self._bars[bar]
        return self._qtest.load(address + offset, width, ports)

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        ports, address, _ = self._bars[bar]
        self._qtest.store(address + offset, width, value, ports)

    def doorbell(self, bar: int, offset: int, value: int) -> Doorbell:
        def ring() -> None:
            with contextlib.suppress(TransportError):  # it has gone: others will notice
                self.write(bar, offset, 2, value)

        return Doorbell(call=ring)

    def region(self, nbytes: int) -> Region:
        at = self._machine.lend(nbytes)
        self._lent.append(at)
        if self.shift:
            return ScatteredRegion(self._machine.ram, at, nbytes, self.shift)
        return GuestRegion(self._machine.ram, at, nbytes)

    def map(self, region: Region) -> Mapping:
        if isinstance(region, ScatteredRegion):
            return region.mapping
        assert isinstance(region, GuestRegion)
        return Mapping.contiguous(region.iova)

    def interrupts(self, count: int) -> Sequence[int]:
        """Enable MSI-X, each vector's message being a word of guest memory that it makes 1."""
        count = count if self.vectors is None else min(count, self.vectors)
        if not count:
            return ()
        at = self._msix()
        table = self.read_config(at + 4, 4)
        bar, offset = table & 7, table & ~7
        messages = _MESSAGES_AT + 4096 * self.slot
        for vector in range(count):
            for place, word in enumerate((messages + 4 * vector, 0, 1, 0)):  # address, data, not masked
                self.write(bar, offset + 16 * vector + 4 * place, 4, word)
        self.write_config(at + 2, 2, 0x8000)
        self._eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        self.counts = [0] * count
        self._watcher = threading.Thread(target=self._watch, args=(messages,), name=f"msix {self.name}")
        self._watcher.start()
        return self._eventfds

    def line(self) -> Line | None:
        """INTx as the device's interrupt status bit shows it (PCI 3.0, 6.2.3)."""
        if not self.has_line or not self.read_config(0x3D, 1):
            return None
        self._eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)]
        self.counts = [0]
        self._watcher = threading.Thread(target=self._watch_line, name=f"intx {self.name}")
        self._watcher.start()
        return Line(self._eventfds[0], self._rearm)

    def _rearm(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._eventfds[0])
        self._unmasked.set()

    def close(self) -> None:
        """Stop all DMA, and give back the memory."""
        if self._closed:
            return
        self._closed = True
        self._closing.set()
        self._unmasked.set()
        if self._watcher is not None:
            self._watcher.join()
        with contextlib.suppress(TransportError):
            self._command(0)
        for fd in self._eventfds:
            os.close(fd)
        for at in self._lent:
            self._machine.give_back(at)

    def _command(self, bits: int) -> None:
        self.write_config(4, 2, bits)

    def _msix(self) -> int:
        at = self.read_config(0x34, 1)
        while self.read_config(at, 1) != 0x11:
            at = self.read_config(at + 1, 1)
        return at

    def _watch(self, messages: int) -> None:
        ram = mmap.mmap(self._machine.ram, 4096, mmap.MAP_SHARED, offset=messages)
        with memoryview(ram) as view, view.cast("I") as words:
            while not self._closing.is_set():
                for vector, fd in enumerate(self._eventfds):
                    if words[vector]:
                        words[vector] = 0  # first: what comes from now on is another one
                        self.counts[vector] += 1
                        os.eventfd_write(fd, 1)
                time.sleep(_LOOK_S)
        ram.close()

    def _watch_line(self) -> None:
        while self._unmasked.wait() and not self._closing.is_set():
            with contextlib.suppress(TransportError):
                if self.read_config(6, 2) & 8:
                    self._unmasked.clear()
                    self.counts[0] += 1
                    os.eventfd_write(self._eventfds[0], 1)
            time.sleep(_LOOK_S)
