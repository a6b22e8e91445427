"""PCI functions through uio_pci_generic, where there is no IOMMU: sysfs has their registers.

Such a function can write to any memory of the machine, which is why only root can do this, and nobody
gets it who has not bound the function to that driver. It is told physical addresses, of huge pages:
those stay where they are (Documentation/admin-guide/mm/pagemap.rst has how to ask).
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Literal

from virtio.errors import RequestError, TransportError
from virtio.ring.doorbell import Doorbell
from virtio.ring.region import HUGE_PAGE, Mapping, Region
from virtio.transport.sysfs import PciFunction
from virtio.transport.windows import Line
from virtio.wire.pci import BARS

_COMMAND = 4  # of configuration space: I/O and memory accesses, bus mastering, no interrupt
_ACCESSES, _MASTER, _NO_INTX = 3, 4, 0x400
_INTERRUPT_PIN = 0x3D
_IO, _MEMORY = 0x100, 0x200  # flags of a resource (include/linux/ioport.h)
_FORMATS: dict[int, Literal["B", "H", "I"]] = {1: "B", 2: "H", 4: "I"}
_PRESENT, _FRAME = 1 << 63, (1 << 55) - 1  # of an entry of pagemap
_SHIFT = HUGE_PAGE.bit_length() - 1


class UioWindows:
    """`Windows` on a PCI function that is bound to uio_pci_generic; owns its descriptors.

    The registers of a BAR in memory are mapped: once the kernel has removed the function, a touch of
    them is SIGBUS, so `read` and `write` look first whether it is there.
    """

    translated = False
    removal: int | None = None

    def __init__(self, function: PciFunction) -> None:
        """TransportError says what is missing, and which command mends it."""
        self.name = function.address
        self._path = function.path
        self._open = contextlib.ExitStack()  # what is to be closed
        self._memory: dict[int, memoryview[Any]] = {}  # BARs that are mapped
        self._ports: dict[int, int] = {}  # descriptors of BARs of I/O ports
        self._closed = False
        if function.group is not None:
            raise RequestError(
                f"{self.name} is behind an IOMMU, which does not know the addresses that uio_pci_generic has "
                f"to give it: bind it to vfio-pci (`virtio-bdev pci bind {self.name}`)"
            )
        try:
            nodes = function.nodes()
            if not nodes:
                raise TransportError(errno.ENODEV, f"{self.name} has no /dev/uioN: it was unbound")
            self._uio = self._descriptor(f"/dev/{nodes[0]}", os.O_RDWR | os.O_NONBLOCK)
            self._config = self._descriptor(str(self._path / "config"), os.O_RDWR)
            self._sizes = self._resources()
            self._command(clear=_MASTER, put=_ACCESSES | _NO_INTX)
        except BaseException:
            self.close()
            raise

    def _descriptor(self, path: str, flags: int) -> int:
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(f"open {path}", error) from error
        self._open.callback(os.close, fd)
        return fd

    def _failed(self, what: str, error: OSError) -> TransportError:
        hint = (
            "; without an IOMMU, only root may do that" if error.errno in (errno.EACCES, errno.EPERM) else ""
        )
        return TransportError(
            error.errno or errno.EIO, f"{self.name}: cannot {what}: {error.strerror or error}{hint}"
        )

    def _resources(self) -> dict[int, int]:
        """The BARs that can be reached, and their sizes."""
        found = {}
        try:
            lines = (self._path / "resource").read_text().splitlines()[:BARS]
        except OSError as error:
            raise self._failed("read its resources", error) from error
        for bar, line in enumerate(lines):
            first, last, flags = (int(word, 16) for word in line.split())
            nbytes = last - first + 1 if first else 0
            if not nbytes or not flags & (_IO | _MEMORY):
                continue
            fd = self._descriptor(str(self._path / f"resource{bar}"), os.O_RDWR | os.O_SYNC)
            if flags & _IO:
                self._ports[bar] = fd
            else:
                try:
                    memory = mmap.mmap(fd, max(nbytes, mmap.PAGESIZE), mmap.MAP_SHARED)
                except (OSError, ValueError):
                    continue  # the kernel has it for itself; there may be another way (4.1.4.9)
                memory.madvise(mmap.MADV_DONTFORK)
                self._memory[bar] = memoryview(memory)
            found[bar] = nbytes
        return found

    # Registers.

    def read_config(self, offset: int, width: int) -> int:
        """A register of the configuration space."""
        return self._read(self._config, offset, width)

    def write_config(self, offset: int, width: int, value: int) -> None:
        """Write such a register."""
        self._write(self._config, offset, width, value)

    def bar_bytes(self, bar: int) -> int:
        """The size of a BAR, 0 where there is none within reach."""
        return self._sizes.get(bar, 0)

    def read(self, bar: int, offset: int, width: int) -> int:
        """A register of a BAR."""
        if bar in self._ports:
            return self._read(self._ports[bar], offset, width)
        self._check_there()
        return int(self._register(bar, offset, width)[0])

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Write such a register."""
        if bar in self._ports:
            self._write(self._ports[bar], offset, width, value)
        else:
            self._check_there()
            self._register(bar, offset, width)[0] = value

    def _register(self, bar: int, offset: int, width: int) -> memoryview[int]:
        return self._memory[bar][offset : offset + width].cast(_FORMATS[width])

    def _check_there(self) -> None:
        if self._read(self._config, 0, 2) == 0xFFFF:
            raise TransportError(errno.ENODEV, f"{self.name} is gone")

    def _read(self, fd: int, offset: int, width: int) -> int:
        try:
            data = os.pread(fd, width, offset)
        except OSError as error:
            raise self._failed(f"read {width} bytes at {offset:#x}", error) from error
        if len(data) != width:
            raise TransportError(errno.ENODEV, f"{self.name}: {len(data)} bytes at {offset:#x}, want {width}")
        return int.from_bytes(data, "little")

    def _write(self, fd: int, offset: int, width: int, value: int) -> None:
        try:
            os.pwrite(fd, value.to_bytes(width, "little"), offset)
        except OSError as error:
            raise self._failed(f"write {width} bytes at {offset:#x}", error) from error

    def _command(self, *, clear: int = 0, put: int = 0) -> None:
        self.write_config(_COMMAND, 2, self.read_config(_COMMAND, 2) & ~clear | put)

    def doorbell(self, bar: int, offset: int, value: int) -> Doorbell:
        """A store to mapped memory, or a `pwrite` to I/O ports."""
        if bar in self._ports:
            return Doorbell(self._ports[bar], at=offset, value=value)
        return Doorbell(memory=self._memory[bar], at=offset, value=value)

    # Memory.

    def region(self, nbytes: int) -> Region:
        """Huge pages, as many as there are up to `nbytes`; TransportError if there is none."""
        while True:
            try:
                return Region(nbytes, must_be_huge=True)
            except TransportError:
                if nbytes <= 2 * HUGE_PAGE:
                    raise
                nbytes //= 2

    def map(self, region: Region) -> Mapping:
        """Where the pages of a region are in physical memory; from now on the function may use memory."""
        table = array("Q")
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                for at in range(region.address, region.address + region.size, HUGE_PAGE):
                    (entry,) = struct.unpack("=Q", os.pread(pagemap.fileno(), 8, at // mmap.PAGESIZE * 8))
                    if not entry & _PRESENT or not entry & _FRAME:
                        raise OSError(errno.EPERM, "the kernel does not tell where a page is")
                    table.append((entry & _FRAME) * mmap.PAGESIZE)
        except (OSError, struct.error) as error:
            failure = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            raise self._failed("find out physical addresses", failure) from error
        self._command(put=_MASTER)  # not before: whoever had it last may have been killed amid requests
        return Mapping(_SHIFT, table)

    # Interrupts.

    def interrupts(self, count: int) -> Sequence[int]:
        """None: uio_pci_generic has no MSI-X."""
        return ()

    def line(self) -> Line | None:
        """INTx; the kernel masks it in the function itself, whose command register unmasks it."""
        if not self.read_config(_INTERRUPT_PIN, 1):
            return None
        self._rearm()
        return Line(self._uio, self._rearm)

    def _rearm(self) -> None:
        with contextlib.suppress(OSError):  # nothing there, or nobody: others will notice
            os.read(self._uio, 4)
        with contextlib.suppress(TransportError):
            self._command(clear=_NO_INTX)

    def close(self) -> None:
        """Stop its DMA, and let go of everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        with self._open:
            self._memory.clear()
            if hasattr(self, "_config"):
                with contextlib.suppress(TransportError):
                    self._command(clear=_MASTER | _ACCESSES, put=_NO_INTX)
