"""The front end's memory regions, and the two kinds of address that point into them."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field


class Fault(Exception):
    """An address that no region holds."""


@dataclass
class Region:
    """One region of a memory table, mapped; `close` may find it in use, and then says so."""

    guest: int
    size: int
    user: int
    offset: int
    pages: mmap.mmap = field(repr=False)
    memory: memoryview = field(repr=False)
    u16: memoryview = field(repr=False)
    u32: memoryview = field(repr=False)

    @classmethod
    def map(cls, guest: int, size: int, user: int, offset: int, fd: int) -> Region:
        """Map what `fd` holds from `offset` on; the caller keeps and closes the descriptor."""
        have = os.fstat(fd).st_size
        if size == 0 or offset + size > have:
            raise Fault(f"{size} bytes at {offset} of a file of {have}")
        pages = mmap.mmap(fd, offset + size)
        memory = memoryview(pages)[offset:]
        even = memory[: size & ~3]
        return cls(guest, size, user, offset, pages, memory, even.cast("H"), even.cast("I"))

    def close(self) -> None:
        self.u16.release()
        self.u32.release()
        self.memory.release()
        # Views of exceptions' frames may still hold it; the collector closes it then.
        try:
            self.pages.close()
        except BufferError:
            pass


class Memory:
    """All regions of a session."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def guest(self, address: int, length: int) -> tuple[Region, int]:
        """The region and the offset in it of a guest address; the whole range must be inside."""
        for region in self.regions:
            offset = address - region.guest
            if 0 <= offset and offset + length <= region.size:
                return region, offset
        raise Fault(f"guest address {address:#x}, {length} bytes, is in no region")

    def user(self, address: int, length: int) -> tuple[Region, int]:
        """The same for a user address."""
        for region in self.regions:
            offset = address - region.user
            if 0 <= offset and offset + length <= region.size:
                return region, offset
        raise Fault(f"user address {address:#x}, {length} bytes, is in no region")

    def close(self) -> None:
        for region in self.regions:
            region.close()
        self.regions.clear()
