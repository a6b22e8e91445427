"""The PCI functions that Linux knows, and which driver has them: sysfs, and nothing of the devices.

Binding is by `driver_override`, so that it concerns one function and lasts until it is undone or the
machine starts anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virtio.errors import RequestError, TransportError
from virtio.wire.pci import device_type

VFIO, UIO = "vfio-pci", "uio_pci_generic"
USER_DRIVERS = (VFIO, UIO)  # those that leave a function to a program
KINDS = {2: "blk", 8: "scsi"}  # the device types that we drive (5)
ADDRESS = re.compile(r"(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[01][0-9a-f]\.[0-7]", re.IGNORECASE)

_ROOT = Path("/sys/bus/pci")
_WAIT_S = 5.0  # for the kernel to let a driver have a function
_LOOK_S = 0.01
_VIRTIO_DISKS = ("block/*", "host*/target*/*/block/*")  # below a function's virtio device


def normal(address: str) -> str:
    """An address with its domain, as the kernel writes it; RequestError if it is none."""
    if not ADDRESS.fullmatch(address):
        raise RequestError(f"PCI address {address!r}, want one such as 0000:00:04.0")
    return address.lower() if address.count(":") == 2 else f"0000:{address.lower()}"


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A PCI function as it was when it was looked at."""

    address: str  # "0000:00:04.0"
    path: Path
    vendor: int
    device: int
    class_code: int
    driver: str | None
    group: int | None  # of its IOMMU; None where there is none
    members: tuple[str, ...]  # the other functions of that group

    @property
    def kind(self) -> str | None:
        """ "blk" or "scsi", or None for what we do not drive."""
        return KINDS.get(device_type(self.vendor, self.device) or 0)

    @property
    def is_bridge(self) -> bool:
        """Whether it is a PCI bridge, which a group may hold beside a user's devices."""
        return self.class_code >> 16 == 6

    def disks(self) -> list[Path]:
        """The kernel's block devices on it, as long as it has the kernel's driver."""
        found = (disk for below in _VIRTIO_DISKS for disk in self.path.glob(f"virtio*/{below}"))
        return sorted(found)

    def uses(self) -> list[str]:
        """What uses its disks or itself, in words; nothing: it can be taken away from its driver."""
        found = [f"{disk.name} {use}" for disk in self.disks() for use in _disk_uses(disk)]
        if self.driver in USER_DRIVERS:
            found += [f"process {holder}" for holder in self.holders()]
        return found

    def holders(self) -> list[str]:
        """The processes that have it open, of those that we may look at: "123 (qemu)"."""
        nodes = {os.path.join("/dev", name) for name in self.nodes()}
        nodes |= {str(resource) for resource in self.path.glob("resource?")}
        return [] if not nodes else sorted(_who_has(nodes))

    def nodes(self) -> list[str]:
        """Its device nodes, below /dev."""
        if self.driver == VFIO and self.group is not None:
            return [f"vfio/{self.group}"]
        if self.driver == UIO:
            return [node.name for node in self.path.glob("uio/uio*")]
        return []

    def again(self) -> PciFunction:
        """The same as it is now; TransportError if it is gone."""
        return _read(self.path)

    def bind(self, driver: str) -> PciFunction:
        """Have a driver take it, and no other until `restore`: as it is then.

        RequestError if it is in use; TransportError for what the kernel refuses.
        """
        self._release()
        _write(self.path / "driver_override", driver)
        try:
            return self._probe(driver)
        except TransportError:
            with contextlib.suppress(TransportError):
                self.again().restore()
            raise

    def restore(self) -> PciFunction:
        """Give it back to the driver that the kernel would choose; as it is then."""
        self._release()
        _write(self.path / "driver_override", "\n")
        return self._probe(None)

    def _release(self) -> None:
        if uses := self.uses():
            raise RequestError(f"{self.address} is in use: {', '.join(uses)}")
        if self.driver is not None:
            _write(self.path / "driver/unbind", self.address)

    def _probe(self, driver: str | None) -> PciFunction:
        _write(_bus(self.path) / "drivers_probe", self.address)
        end = time.monotonic() + _WAIT_S
        while (now := self.again()).driver is None or not _is_it(now.driver, driver):
            if time.monotonic() > end:
                raise TransportError(
                    errno.ETIMEDOUT,
                    f"{self.address} has the driver {now.driver}, not {driver or 'one of the kernel'}; the "
                    "kernel's log says why",
                )
            time.sleep(_LOOK_S)
        return now


def functions(root: Path = _ROOT) -> list[PciFunction]:
    """All functions of virtio block devices and SCSI controllers, in the order of their addresses."""
    found = []
    for path in sorted((root / "devices").glob("*:*:*.*")):
        with contextlib.suppress(TransportError):  # it has gone meanwhile
            function = _read(path)
            if function.kind is not None:
                found.append(function)
    return found


def find(address: str, root: Path = _ROOT) -> PciFunction:
    """The function at an address; TransportError if there is none, or it is none that we drive."""
    path = root / "devices" / normal(address)
    if not path.exists():
        known = ", ".join(function.address for function in functions(root)) or "none"
        raise TransportError(
            errno.ENODEV, f"there is no PCI device {path.name}; of virtio-blk and virtio-scsi: {known}"
        )
    function = _read(path)
    if function.kind is None:
        raise TransportError(
            errno.ENODEV,
            f"{function.address} is {function.vendor:04x}:{function.device:04x}, neither virtio-blk nor "
            "virtio-scsi",
        )
    return function


def look(address: str, root: Path = _ROOT) -> PciFunction | None:
    """Whatever is at an address."""
    with contextlib.suppress(TransportError):
        return _read(root / "devices" / normal(address))
    return None


def has_driver(driver: str, root: Path = _ROOT) -> bool:
    """Whether the kernel has a driver at the moment."""
    return (root / "drivers" / driver).exists()


def _is_it(driver: str, wanted: str | None) -> bool:
    """Whether that is the driver wanted; None: one of the kernel's own."""
    return driver not in USER_DRIVERS if wanted is None else driver == wanted


def _bus(path: Path) -> Path:
    return path.parent.parent


def _read(path: Path) -> PciFunction:
    try:
        vendor, device, class_code = (
            int((path / name).read_text(), 16) for name in ("vendor", "device", "class")
        )
    except (OSError, ValueError) as error:
        raise TransportError(errno.ENODEV, f"there is no PCI device {path.name} any more: {error}") from error
    group = _target(path / "iommu_group")
    with contextlib.suppress(OSError):
        members = tuple(
            sorted(name for name in os.listdir(path / "iommu_group/devices") if name != path.name)
        )
        return PciFunction(
            path.name, path, vendor, device, class_code, _target(path / "driver"), int(group or 0), members
        )
    return PciFunction(path.name, path, vendor, device, class_code, _target(path / "driver"), None, ())


def _target(link: Path) -> str | None:
    """The last part of what a symbolic link points to."""
    try:
        return os.path.basename(os.readlink(link))
    except OSError:
        return None


def _write(path: Path, words: str) -> None:
    try:
        path.write_text(words)
    except OSError as error:
        hint = "; root may do that" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise TransportError(
            error.errno or errno.EIO, f"cannot write {words!r} to {path}: {error.strerror}{hint}"
        ) from error


def _disk_uses(disk: Path) -> Iterator[str]:
    """What a block device or a partition of it is used for."""
    numbers = {}
    for part in (disk, *disk.glob(f"{disk.name}*")):
        with contextlib.suppress(OSError):
            numbers[(part / "dev").read_text().strip()] = part.name
            for holder in os.listdir(part / "holders"):
                yield f"is part of {holder}"
    found = False
    for fields in _lines("/proc/self/mountinfo"):
        if fields[2] in numbers:
            found = True
            yield f"is mounted at {fields[4]}"
    for fields in _lines("/proc/swaps"):
        if os.path.basename(fields[0]) in numbers.values():
            found = True
            yield "is used as swap"
    if not found and _is_claimed(f"/dev/{disk.name}"):
        yield "is held by the kernel or a program"


def _is_claimed(node: str) -> bool:
    """Whether somebody has a block device, or a part of it, for himself: mounted elsewhere, say."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _lines(path: str) -> Iterator[list[str]]:
    with contextlib.suppress(OSError), open(path) as file:
        for line in file:
            if len(fields := line.split()) > 4:
                yield fields


def _who_has(nodes: set[str]) -> Iterator[str]:
    wanted = {os.path.realpath(node) for node in nodes}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            if any(_target_of(link) in wanted for link in (process / "fd").iterdir()):
                yield f"{process.name} ({(process / 'comm').read_text().strip()})"


def _target_of(link: Path) -> str:
    """What a process has open; nothing, once it has closed that."""
    try:
        return os.readlink(link)
    except OSError:
        return ""
