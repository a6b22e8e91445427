"""PCI functions through VFIO: the kernel's way to give one to a program, behind an IOMMU.

As the kernel documents it (Documentation/driver-api/vfio.rst, include/uapi/linux/vfio.h): a container,
which is an IOMMU address space, holds a group, which is what the IOMMU can tell apart, and the group
has the function. All of it goes with the last descriptor, whatever becomes of the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import resource
import struct
from collections.abc import Sequence
from typing import NamedTuple

from virtio.errors import TransportError
from virtio.ring.doorbell import Doorbell
from virtio.ring.region import HUGE_PAGE, Mapping, Region
from virtio.transport.sysfs import PciFunction
from virtio.transport.windows import Line
from virtio.wire.pci import BARS

CONTAINER = "/dev/vfio/vfio"

# ioctl numbers: all are _IO(';', 100 + n).
_BASE = 0x3B64
_GET_API_VERSION, _CHECK_EXTENSION, _SET_IOMMU = _BASE, _BASE + 1, _BASE + 2
_GROUP_STATUS, _GROUP_SET_CONTAINER, _GROUP_GET_DEVICE = _BASE + 3, _BASE + 4, _BASE + 6
_DEVICE_INFO, _REGION_INFO, _IRQ_INFO, _SET_IRQS, _DEVICE_RESET = (_BASE + n for n in range(7, 12))
_IOMMU_INFO, _MAP_DMA = _BASE + 12, _BASE + 13

_API_VERSION = 0
_TYPE1, _TYPE1V2 = 1, 3
_GROUP_VIABLE = 1
_IS_PCI = 1 << 1
_READ, _WRITE, _MAPPABLE = 1, 2, 4  # what may be done with a region; READ and WRITE of a DMA mapping too
_IOMMU_HAS_CAPS = 2
_IOVA_RANGES = 1  # a capability of the IOMMU

_CONFIG_REGION = 7  # BARs are 0 to 5, 6 is the ROM
_INTX, _MSIX, _REQUEST = 0, 2, 4  # interrupt indices
_NO_DATA, _EVENTFDS, _UNMASK, _TRIGGER = 1, 4, 16, 32  # flags of SET_IRQS

_WORDS = struct.Struct("=II")  # argsz and flags, of every structure
_REGION = struct.Struct("=IIIIQQ")  # argsz, flags, index, cap_offset, size, offset
_IRQ = struct.Struct("=IIII")  # argsz, flags, index, count
_IRQS = struct.Struct("=IIIII")  # argsz, flags, index, start, count
_DEVICE = struct.Struct("=IIII")  # argsz, flags, regions, interrupts
_IOMMU = struct.Struct("=IIQI4x")  # argsz, flags, page sizes, cap_offset
_CAPABILITY = struct.Struct("=HHI")  # id, version, next
_DMA = struct.Struct("=IIQQQ")  # argsz, flags, vaddr, iova, size

_COMMAND, _ACCESSES, _MASTER = 4, 3, 4  # of configuration space: I/O and memory accesses, bus mastering
_FIRST_IOVA = HUGE_PAGE  # not 0, which looks like a mistake
LEAST_POOL = 3 * HUGE_PAGE  # fits with room in the 8 MiB that a user may usually lock
_IOVA_INFO_BYTES = 4096


class _Bar(NamedTuple):
    nbytes: int
    at: int  # in the device's descriptor
    mappable: bool


class VfioWindows:
    """`Windows` on a PCI function that is bound to vfio-pci; owns its descriptors.

    Registers are read and written by `pread` and `pwrite`, which fail, instead of raising SIGBUS, where
    there is nobody any more; doorbells are in mapped memory. Nobody else can have the function's
    IOMMU group meanwhile.
    """

    translated = True

    def __init__(self, function: PciFunction) -> None:
        """TransportError says what is missing, and which command mends it."""
        self.name = function.address
        self.removal: int | None = None
        self._open = contextlib.ExitStack()  # what is to be closed
        self._doorbells: dict[int, memoryview] = {}  # by BAR
        self._next_iova = _FIRST_IOVA
        self._vectors: list[int] = []
        self._closed = False
        try:
            self._enter(function)
            self._command(clear=_MASTER, put=_ACCESSES)
            self.removal = self._watch_removal()
        except BaseException:
            self.close()
            raise

    def _enter(self, function: PciFunction) -> None:
        """Open the group, put it in a container of its own, and get the function."""
        if function.group is None:
            raise TransportError(
                errno.ENODEV,
                f"{self.name} is in no IOMMU group: this machine has no IOMMU, or it is off (intel_iommu=on "
                "or amd_iommu=on on the kernel's command line; `virtio-bdev doctor` looks)",
            )
        self._container = self._descriptor(CONTAINER, "modprobe vfio-pci")
        if (version := fcntl.ioctl(self._container, _GET_API_VERSION)) != _API_VERSION:
            raise TransportError(errno.EPROTO, f"{CONTAINER} has version {version}, want {_API_VERSION}")
        path = f"/dev/vfio/{function.group}"
        self._group = self._descriptor(path, f"virtio-bdev pci bind {self.name}")
        status = bytearray(_WORDS.pack(_WORDS.size, 0))
        self._ioctl(self._group, _GROUP_STATUS, status, f"ask for the status of {path}")
        if not _WORDS.unpack(status)[1] & _GROUP_VIABLE:
            raise TransportError(
                errno.EPERM,
                f"IOMMU group {function.group} of {self.name} cannot be used as long as a kernel driver has "
                f"one of its other functions: {', '.join(function.members)}; see `virtio-bdev pci list`, and "
                "bind those to vfio-pci too",
            )
        self._ioctl(
            self._group,
            _GROUP_SET_CONTAINER,
            struct.pack("=i", self._container),
            f"put {path} in a container",
        )
        kind = _TYPE1V2 if fcntl.ioctl(self._container, _CHECK_EXTENSION, _TYPE1V2) else _TYPE1
        try:
            fcntl.ioctl(self._container, _SET_IOMMU, kind)
        except OSError as error:
            hint = ""
            if error.errno == errno.EPERM:
                hint = (
                    "; it cannot keep interrupts of devices apart (interrupt remapping), and the kernel "
                    "wants to be told that this is all right: allow_unsafe_interrupts=1 of vfio_iommu_type1"
                )
            raise self._failed("set the IOMMU up", error, hint) from error
        try:
            name = bytearray(self.name.encode() + b"\0")  # a mutable one, or ioctl does not say the result
            self._device = fcntl.ioctl(self._group, _GROUP_GET_DEVICE, name)
        except OSError as error:
            raise self._failed(f"get it out of {path}", error) from error
        self._open.callback(os.close, self._device)
        info = bytearray(_DEVICE.pack(_DEVICE.size, 0, 0, 0))
        self._ioctl(self._device, _DEVICE_INFO, info, "ask what it is")
        if not _DEVICE.unpack(info)[1] & _IS_PCI:
            raise TransportError(errno.ENODEV, f"{self.name} is no PCI device for VFIO")
        self._bars = [self._region_info(index) for index in range(BARS)]
        self._config = self._region_info(_CONFIG_REGION)
        self._ranges = self._iova_ranges()

    def _descriptor(self, path: str, hint: str) -> int:
        """Open a file of VFIO's."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            words = {
                errno.ENOENT: f"; try `{hint}`",
                errno.EACCES: f"; let yourself in: chown {os.geteuid()} {path}, or a udev rule",
                errno.EBUSY: "; a program, perhaps this one, has a function of that IOMMU group",
            }
            raise self._failed(f"open {path}", error, words.get(error.errno or 0, "")) from error
        self._open.callback(os.close, fd)
        return fd

    def _failed(self, what: str, error: OSError, hint: str = "") -> TransportError:
        return TransportError(
            error.errno or errno.EIO, f"{self.name}: cannot {what}: {error.strerror or error}{hint}"
        )

    def _ioctl(self, fd: int, number: int, argument: bytearray | bytes, what: str) -> None:
        try:
            fcntl.ioctl(fd, number, argument)
        except OSError as error:
            raise self._failed(what, error) from error

    def _region_info(self, index: int) -> _Bar:
        info = bytearray(_REGION.pack(_REGION.size, 0, index, 0, 0, 0))
        self._ioctl(self._device, _REGION_INFO, info, f"ask for region {index}")
        _, flags, _, _, nbytes, at = _REGION.unpack(info)
        usable = flags & (_READ | _WRITE) == _READ | _WRITE
        return _Bar(nbytes if usable else 0, at, bool(flags & _MAPPABLE))

    def _iova_ranges(self) -> list[tuple[int, int]]:
        """First and last address of what the IOMMU translates; an old kernel does not say."""
        info = bytearray(_IOVA_INFO_BYTES)
        _IOMMU.pack_into(info, 0, len(info), 0, 0, 0)
        self._ioctl(self._container, _IOMMU_INFO, info, "ask which addresses the IOMMU has")
        nbytes, flags, _, at = _IOMMU.unpack_from(info)
        seen = set()
        while flags & _IOMMU_HAS_CAPS and at and at not in seen and at + 16 <= len(info):
            seen.add(at)
            kind, _, following = _CAPABILITY.unpack_from(info, at)
            if kind == _IOVA_RANGES:
                (count,) = struct.unpack_from("=I", info, at + 8)
                count = min(count, (len(info) - at - 16) // 16)
                return [struct.unpack_from("=QQ", info, at + 16 + 16 * i) for i in range(count)]
            at = following
        return [(0, (1 << 32) - 1)]

    # Registers.

    def read_config(self, offset: int, width: int) -> int:
        """A register of the configuration space."""
        return self._read(self._config.at + offset, width, "configuration space")

    def write_config(self, offset: int, width: int, value: int) -> None:
        """Write such a register."""
        self._write(self._config.at + offset, width, value, "configuration space")

    def bar_bytes(self, bar: int) -> int:
        """The size of a BAR, 0 where there is none that can be read and written."""
        return self._bars[bar].nbytes if bar < BARS else 0

    def read(self, bar: int, offset: int, width: int) -> int:
        """A register of a BAR."""
        return self._read(self._bars[bar].at + offset, width, f"BAR {bar}")

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Write such a register."""
        self._write(self._bars[bar].at + offset, width, value, f"BAR {bar}")

    def _read(self, at: int, width: int, where: str) -> int:
        try:
            data = os.pread(self._device, width, at)
        except OSError as error:
            raise self._failed(f"read {where}", error) from error
        if len(data) != width:
            raise TransportError(errno.EIO, f"{self.name}: {where} gave {len(data)} bytes, want {width}")
        return int.from_bytes(data, "little")

    def _write(self, at: int, width: int, value: int, where: str) -> None:
        try:
            done = os.pwrite(self._device, value.to_bytes(width, "little"), at)
        except OSError as error:
            raise self._failed(f"write to {where}", error) from error
        if done != width:
            raise TransportError(errno.EIO, f"{self.name}: {where} took {done} bytes of {width}")

    def _command(self, *, clear: int = 0, put: int = 0) -> None:
        self.write_config(_COMMAND, 2, self.read_config(_COMMAND, 2) & ~clear | put)

    def doorbell(self, bar: int, offset: int, value: int) -> Doorbell:
        """A store to mapped memory where that can be had, else a `pwrite`."""
        window = self._bars[bar]
        if window.mappable and bar not in self._doorbells:
            with contextlib.suppress(OSError, ValueError):
                memory = mmap.mmap(self._device, window.nbytes, mmap.MAP_SHARED, offset=window.at)
                memory.madvise(mmap.MADV_DONTFORK)
                self._doorbells[bar] = memoryview(memory)
        if bar in self._doorbells:
            return Doorbell(memory=self._doorbells[bar], at=offset, value=value)
        return Doorbell(self._device, at=window.at + offset, value=value)

    # Memory.

    def region(self, nbytes: int) -> Region:
        """Memory for `map`: less than asked for where no more may be locked."""
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if limit != resource.RLIM_INFINITY and not may_lock() and limit < nbytes:
            nbytes = max(LEAST_POOL, (limit // 2) // HUGE_PAGE * HUGE_PAGE)
        return Region(nbytes)

    def map(self, region: Region) -> Mapping:
        """Let the function reach a region, which is locked in memory, until `close`."""
        iova = self._room(region.size)
        argument = _DMA.pack(_DMA.size, _READ | _WRITE, region.address, iova, region.size)
        try:
            fcntl.ioctl(self._container, _MAP_DMA, argument)
        except OSError as error:
            hint = ""
            if error.errno == errno.ENOMEM:
                limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
                hint = (
                    f"; this process may lock {limit} bytes, other mappings included, and needs "
                    f"{region.size} more: raise the limit (`ulimit -l`, here {region.size >> 9}; in systemd "
                    "LimitMEMLOCK=)"
                )
            raise self._failed(f"map {region.size} bytes for DMA", error, hint) from error
        self._next_iova = iova + region.size
        self._command(put=_MASTER)  # not before it was reset, whoever had it last
        return Mapping.contiguous(iova)

    def _room(self, nbytes: int) -> int:
        for first, last in self._ranges:
            iova = -(-max(first, self._next_iova) // HUGE_PAGE) * HUGE_PAGE
            if iova + nbytes - 1 <= last:
                return iova
        ranges = ", ".join(f"{first:#x}-{last:#x}" for first, last in self._ranges)
        raise TransportError(
            errno.ENOSPC, f"{self.name}: the IOMMU has no room for {nbytes} bytes; it has {ranges}"
        )

    # Interrupts.

    def interrupts(self, count: int) -> Sequence[int]:
        """Enable MSI-X: all vectors in one call, before anybody names one to the device."""
        count = min(count, self._interrupt_count(_MSIX))
        while count:
            fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
            try:
                self._set_irqs(_MSIX, _EVENTFDS | _TRIGGER, 0, *fds)
            except OSError as error:
                for fd in fds:
                    os.close(fd)
                if error.errno != errno.ENOSPC or count == 1:  # the host has no more
                    return ()
                count //= 2
            else:
                self._vectors = fds
                for fd in fds:
                    self._open.callback(os.close, fd)
                return fds
        return ()

    def line(self) -> Line | None:
        """Enable INTx, which the kernel masks at each interrupt."""
        if not self._interrupt_count(_INTX):
            return None
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._set_irqs(_INTX, _EVENTFDS | _TRIGGER, 0, fd)
        except OSError:
            os.close(fd)
            return None
        self._open.callback(os.close, fd)

        def rearm() -> None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            with contextlib.suppress(OSError):  # it is gone: others will notice
                self._set_irqs(_INTX, _NO_DATA | _UNMASK, 1)

        return Line(fd, rearm)

    def _watch_removal(self) -> int | None:
        """An eventfd that the kernel signals when it wants the function back."""
        if not self._interrupt_count(_REQUEST):
            return None
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open.callback(os.close, fd)
        try:
            self._set_irqs(_REQUEST, _EVENTFDS | _TRIGGER, 0, fd)
        except OSError:
            return None
        return fd

    def _interrupt_count(self, index: int) -> int:
        info = bytearray(_IRQ.pack(_IRQ.size, 0, index, 0))
        try:
            fcntl.ioctl(self._device, _IRQ_INFO, info)
        except OSError:
            return 0  # a kernel that does not know of it
        return int(_IRQ.unpack(info)[3])

    def _set_irqs(self, index: int, flags: int, count: int, *fds: int) -> None:
        nbytes = _IRQS.size + 4 * len(fds)
        argument = _IRQS.pack(nbytes, flags, index, 0, len(fds) or count) + struct.pack(f"={len(fds)}i", *fds)
        fcntl.ioctl(self._device, _SET_IRQS, argument)

    def close(self) -> None:
        """Stop its DMA, and let go of everything; idempotent.

        The kernel resets it, and takes what was mapped out of the IOMMU, with the last descriptor.
        """
        if self._closed:
            return
        self._closed = True
        with self._open:
            self._doorbells.clear()
            if hasattr(self, "_config"):
                with contextlib.suppress(TransportError):
                    self._command(clear=_MASTER | _ACCESSES)


def may_lock() -> bool:
    """Whether this process may lock as much memory as it wants (CAP_IPC_LOCK)."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> 14 & 1)
    return False
