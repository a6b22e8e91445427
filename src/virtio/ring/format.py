"""The two layouts of a virtqueue, and the choice between them (2.6)."""

from __future__ import annotations

from typing import NamedTuple

from virtio.ring import packed, split
from virtio.ring.packed import PackedRing
from virtio.ring.split import SplitRing


class RingFormat(NamedTuple):
    """Packed, or split with the used ring at multiples of `align` bytes."""

    packed: bool = False
    align: int = split.ALIGN

    def areas(self, size: int) -> tuple[int, int, int]:
        """Offsets of the driver's area, of the device's and of the end; the descriptors are at 0 (2.6)."""
        return packed.areas(size) if self.packed else split.areas(size, self.align)

    def room(self, size: int, event_idx: bool) -> tuple[range, range]:
        """What is left of the cache lines of the driver's area and of the device's, where each is but one."""
        return (range(0), range(0)) if self.packed else split.room(size, event_idx, self.align)

    def lengths(self, size: int) -> tuple[int, int, int]:
        """Bytes of the descriptors, of the driver's area and of the device's."""
        return (16 * size, 4, 4) if self.packed else (16 * size, 2 * size + 6, 8 * size + 6)

    def ring(self, memory: memoryview, size: int, event_idx: bool) -> SplitRing | PackedRing:
        """The driver's half in that memory, which it clears."""
        if self.packed:
            return PackedRing(memory, size, event_idx=event_idx)
        return SplitRing(memory, size, event_idx=event_idx, align=self.align)


SPLIT, PACKED = RingFormat(), RingFormat(packed=True)
LEGACY = RingFormat(align=split.LEGACY_ALIGN)  # the only one before version 1 (2.7.2)
