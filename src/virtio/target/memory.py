"""The memory that a front end shares, as both of its names for it find it (Memory access)."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from virtio.errors import ProtocolError
from virtio.ring.device import SLOTS, GuestMemory
from virtio.wire.vhost_user import MemoryRegion

_ALIGN = 16  # of addresses and offsets, so that what is aligned over there is aligned here


class SharedMemory:
    """The regions of one front end; `guest` translates the addresses in descriptors.

    A mapping lives as long as a view of it does; the descriptors stay their sender's.
    """

    def __init__(self) -> None:
        self._regions: list[tuple[MemoryRegion, memoryview]] = []
        self.guest = GuestMemory()

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        """Take a whole table (SET_MEM_TABLE)."""
        if len(fds) != len(regions):
            raise ProtocolError(f"{len(regions)} memory regions with {len(fds)} descriptors")
        self._use([(region, _map(region, fd)) for region, fd in zip(regions, fds, strict=True)])

    def add(self, region: MemoryRegion, fds: Sequence[int]) -> None:
        """Take one more region (ADD_MEM_REG)."""
        if len(fds) != 1:
            raise ProtocolError(f"a memory region with {len(fds)} descriptors, want 1")
        if len(self._regions) == SLOTS:
            raise ProtocolError(f"a memory region more than the {SLOTS} slots")
        self._use([*self._regions, (region, _map(region, fds[0]))])

    def remove(self, region: MemoryRegion) -> None:
        """Let one region go (REM_MEM_REG); its offset in the file does not matter."""
        kept = [entry for entry in self._regions if _names(entry[0]) != _names(region)]
        if len(kept) == len(self._regions):
            raise ProtocolError(f"no such memory region: {region.describe()}")
        self._use(kept)

    def area(self, name: str, address: int, nbytes: int, align: int) -> memoryview:
        """The bytes at a user address, by which the front end names its rings (Vring address)."""
        if address % align:
            raise ProtocolError(f"{name} at {address:#x}, want a multiple of {align}")
        for region, view in self._regions:
            offset = address - region.user_address
            if 0 <= offset and offset + nbytes <= region.size:
                return view[offset : offset + nbytes]
        raise ProtocolError(f"{name}: {nbytes} bytes at {address:#x} are not in a memory region")

    def _use(self, regions: list[tuple[MemoryRegion, memoryview]]) -> None:
        self._regions = regions
        self.guest = GuestMemory([(region.guest_address, view) for region, view in regions])


def _names(region: MemoryRegion) -> tuple[int, int, int]:
    return region.guest_address, region.user_address, region.size


def _map(region: MemoryRegion, fd: int) -> memoryview:
    if region.size == 0 or (region.guest_address | region.user_address | region.mmap_offset) % _ALIGN:
        raise ProtocolError(f"empty or unaligned memory region: {region.describe()}")
    if max(region.guest_address, region.user_address) + region.size >= 1 << 64:
        raise ProtocolError(f"memory region past the end of memory: {region.describe()}")
    end = region.mmap_offset + region.size
    try:  # from the start of the file, as with huge pages not every offset can be mapped
        return memoryview(mmap.mmap(fd, end))[region.mmap_offset :]
    except (OSError, ValueError, OverflowError) as error:
        raise ProtocolError(f"memory region {region.describe()}: {error}") from error
