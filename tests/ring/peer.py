"""The device's half of a split ring, byte by byte, for tests: it does what it is told, right or wrong."""

import struct


class Peer:
    """Sees the areas of a ring of `size` at the start of `memory`, laid out 64 bytes aligned."""

    def __init__(self, memory: memoryview, size: int) -> None:
        self.memory, self.size = memory, size
        self.available = 16 * size
        self.used = (self.available + 6 + 2 * size + 63) & ~63
        self.used_idx = 0

    def u16(self, at: int) -> int:
        return memoryview(self.memory[at : at + 2]).cast("H")[0]

    def set_u16(self, at: int, value: int) -> None:
        self.memory[at : at + 2].cast("H")[0] = value

    @property
    def avail_flags(self) -> int:
        return self.u16(self.available)

    @property
    def avail_idx(self) -> int:
        return self.u16(self.available + 2)

    @property
    def used_event(self) -> int:
        return self.u16(self.available + 4 + 2 * self.size)

    def head(self, position: int) -> int:
        return self.u16(self.available + 4 + 2 * (position % self.size))

    def descriptor(self, index: int) -> tuple[int, int, int, int]:
        """Address, length, flags, next."""
        return struct.unpack_from("<QIHH", self.memory, 16 * index)

    def use(self, head: int, length: int = 0) -> None:
        element = self.used + 4 + 8 * (self.used_idx % self.size)
        struct.pack_into("<II", self.memory, element, head, length)
        self.move_used(1)

    def move_used(self, count: int) -> None:
        self.used_idx = (self.used_idx + count) & 0xFFFF
        self.set_u16(self.used + 2, self.used_idx)

    def set_used_flags(self, flags: int) -> None:
        self.set_u16(self.used, flags)

    def set_avail_event(self, index: int) -> None:
        self.set_u16(self.used + 4 + 8 * self.size, index)
