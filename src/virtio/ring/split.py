"""Split virtqueue, driver side (2.7): a table of descriptors, and a ring of heads each way.

A ring here is the three areas and the rules for passing heads through them; which descriptors a
head stands for is its owner's business, who writes them with `describe` while the device cannot
see them.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from virtio.ring._mem import (
        fill,
        full_fence,
        load_acquire_u16,
        load_u8,
        load_u16,
        load_u32,
        store_release_u16,
        store_u8,
        store_u16,
        store_u32,
        store_u64,
        window,
    )
    from virtio.ring._vring import (
        DESC,
        ELEM,
        EVENT,
        FAULTY,
        IDX,
        NO_INTERRUPT,
        NO_NOTIFY,
        NOTHING,
        RING,
    )

MAX_SIZE = 32768  # 2.7
ALIGN, LEGACY_ALIGN = 64, 4096  # of the used ring: ours, and the only one before version 1 (2.7.2)


def up(value: int, align: int) -> int:
    """The next multiple of a power of two."""
    return (value + align - 1) & ~(align - 1)


def areas(size: int, align: int = ALIGN) -> tuple[int, int, int]:
    """Offsets of the available ring, of the used ring and of the end, for `size` descriptors.

    The descriptor table is at 0. An `align` of 64 keeps what the driver writes and what the device
    writes in different cache lines; both are within 2.7's alignments of 16, 2 and 4.
    """
    if not 0 < size <= MAX_SIZE or size & (size - 1):
        raise ValueError(f"queue size {size} is not a power of two from 1 to {MAX_SIZE}")
    available = DESC * size
    used = up(available + RING + 2 * size + 2, align)
    return available, used, up(used + RING + ELEM * size + 2, align)


def room(size: int, event_idx: bool, align: int = ALIGN) -> tuple[range, range]:
    """The bytes that are left in the cache line of each ring, where that has but one line; else none.

    Without EVENT_IDX there is no used_event (2.7.10), and its bytes are left too; those of avail_event are
    not, as a device might write them all the same.
    """
    available, used, _ = areas(size, align)
    event = EVENT if event_idx else 0
    return (
        _left(available, available + RING + 2 * size + event),
        _left(used, used + RING + ELEM * size + EVENT),
    )


def _left(begin: int, end: int) -> range:
    line = up(begin + 1, ALIGN)
    return range(end, line) if end < line else range(0)


class SplitRing:
    """The driver's half of one split virtqueue; one thread at a time, which its owner sees to."""

    def __init__(self, memory: memoryview, size: int, *, event_idx: bool, align: int = ALIGN) -> None:
        """`memory` is the three areas as `areas(size, align)` lays them out; the ring clears it."""
        self._avail, self._used, end = areas(size, align)
        if len(memory) < end:
            raise ValueError(f"{len(memory)} bytes are too few for a ring of {size}: want {end}")
        self._view = memory
        self._mem = window(memory)
        fill(self._mem, 0, 0, end)  # used.flags too (2.7.10)
        self.size = size
        self.event_idx = event_idx
        self.used_length = 0
        self._mask = size - 1
        # Private state: the device may scribble on anything in shared memory.
        self._avail_idx = self._published = self._used_idx = self._seen_idx = 0
        self._heads = bytearray(size)  # 1: the device has it
        self._given = window(self._heads)
        self.disarm()

    def outstanding(self) -> int:
        """How many published heads the device has not used yet."""
        return (self._published - self._used_idx) & 0xFFFF

    def idle(self) -> bool:
        """Whether the device has used all that it was given, reaped or not."""
        return load_acquire_u16(self._mem, self._used + IDX) == self._published

    def detach(self) -> None:
        """Let go of the memory: from now on the ring works on bytes of its own, for nobody."""
        self._view = memoryview(bytearray(len(self._view)))
        self._mem = window(self._view)
        self.rewind()

    def rewind(self) -> None:
        """Begin anew from index 0, for a device that was reset; descriptors stay as they are."""
        # No byte more: there may be headers and responses behind each.
        event = EVENT if self.event_idx else 0
        fill(self._mem, self._avail, 0, RING + 2 * self.size + event)
        fill(self._mem, self._used, 0, RING + ELEM * self.size + EVENT)
        fill(self._given, 0, 0, self.size)
        self._avail_idx = self._published = self._used_idx = self._seen_idx = 0
        self.disarm()

    def describe(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """Fill a descriptor of a head that the device does not have (2.7.5)."""
        descriptor = DESC * index
        store_u64(self._mem, descriptor, address)
        store_u32(self._mem, descriptor + 8, length)
        store_u16(self._mem, descriptor + 12, flags)
        store_u16(self._mem, descriptor + 14, following)

    def redirect(self, index: int, address: int) -> None:
        """Change only the address of a descriptor of a head that the device does not have."""
        store_u64(self._mem, DESC * index, address)

    def offer(self, head: int) -> None:
        """Put a head on the available ring, unseen by the device until `publish` (2.7.13.2)."""
        slot = self._avail_idx & self._mask
        store_u16(self._mem, self._avail + RING + 2 * slot, head)
        store_u8(self._given, head, 1)
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the device what was offered; true when it wants to be notified (2.7.13.3)."""
        if self._published == self._avail_idx:
            return False
        old = self._published
        store_release_u16(self._mem, self._avail + IDX, self._avail_idx)
        self._published = self._avail_idx
        full_fence()  # the index goes out before flags or event come in (2.7.13.4.1)
        if self.event_idx:
            event = load_u16(self._mem, self._used + RING + ELEM * self.size)
            passed = (self._avail_idx - event - 1) & 0xFFFF
            return passed < ((self._avail_idx - old) & 0xFFFF)
        return not load_u16(self._mem, self._used) & NO_NOTIFY

    def reap(self) -> int:
        """Take the next used head (2.7.14): the head, -1 if there is none, -2 if the device erred.

        `used_length` is the length that the device claims; only a bound for replies, never a
        proof of success (2.7.8.2).
        """
        pending = self.ready()
        if pending == 0:
            return NOTHING
        if pending > self.outstanding():
            return FAULTY
        element = self._used + RING + ELEM * (self._used_idx & self._mask)
        head = load_u32(self._mem, element)
        if head >= self.size or not load_u8(self._given, head):
            return FAULTY
        self.used_length = load_u32(self._mem, element + 4)
        store_u8(self._given, head, 0)
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        return head

    def ready(self) -> int:
        """How many used heads there are to reap, when last looked at; looks if there were none.

        As the device says, who may lie.
        """
        if self._seen_idx == self._used_idx:
            self._seen_idx = load_acquire_u16(self._mem, self._used + IDX)
        return (self._seen_idx - self._used_idx) & 0xFFFF

    def fault(self) -> str:
        """What was wrong when `reap` said -2: for the error message, the id is read anew."""
        pending = (self._seen_idx - self._used_idx) & 0xFFFF
        if pending > self.outstanding():
            return f"used index moved by {pending} with {self.outstanding()} buffers outstanding"
        element = self._used + RING + ELEM * (self._used_idx & self._mask)
        return f"used id {load_u32(self._mem, element)} is not an outstanding head of {self.size}"

    def arm(self) -> bool:
        """Ask for an interrupt at the next used buffer; true when there is none yet: sleep then."""
        if self.event_idx:
            store_u16(self._mem, self._avail + RING + 2 * self.size, self._used_idx)
        else:
            store_u16(self._mem, self._avail, 0)
        full_fence()  # the request goes out before the used index comes in (2.7.7)
        return load_acquire_u16(self._mem, self._used + IDX) == self._used_idx

    def disarm(self) -> None:
        """Ask for no interrupts: a hint, which the device may ignore (2.7.7)."""
        if self.event_idx:
            # An index that was just passed is met again only after 65,535 more buffers.
            store_u16(self._mem, self._avail + RING + 2 * self.size, self._used_idx - 1 & 0xFFFF)
        else:
            store_u16(self._mem, self._avail, NO_INTERRUPT)
