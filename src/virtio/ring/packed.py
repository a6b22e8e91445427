"""Packed virtqueue, driver side (2.8): one ring of descriptors, which both sides write.

To its owner it is what a split ring is. A head's descriptors are kept in private memory, as a split
ring has them in its table, and copied into the ring when it is offered: there they are wherever the ring
has come to. The buffer ID (2.8.6) is the head. All heads together have no more descriptors than the
ring, so there is always room.
"""

from __future__ import annotations

import cython

from virtio.ring.split import up

if not cython.compiled:
    from virtio.ring._mem import (
        fill,
        full_fence,
        load_acquire_u16,
        load_u8,
        load_u16,
        load_u32,
        load_u64,
        store_release_u16,
        store_u8,
        store_u16,
        store_u32,
        store_u64,
        window,
    )
    from virtio.ring._vring import (
        AT,
        AVAIL,
        DESC,
        DISABLE,
        ENABLE,
        FAULTY,
        FLAGS,
        ID,
        LENGTH,
        NEXT,
        NOTHING,
        OFF_WRAP,
        USED,
        WANTS,
        WRAP,
        WRITE,
    )

MAX_SIZE = 32768  # 2.8
_LINE = 64


def areas(size: int) -> tuple[int, int, int]:
    """Offsets of the driver's area, of the device's area (2.8.10) and of the end, for `size` descriptors.

    The descriptor ring is at 0. What the driver writes and what the device writes are in different
    cache lines, as far as the layout has it so.
    """
    if not 0 < size <= MAX_SIZE:
        raise ValueError(f"queue size {size} is not from 1 to {MAX_SIZE}")
    driver = up(DESC * size, _LINE)
    return driver, driver + _LINE, driver + 2 * _LINE


class PackedRing:
    """The driver's half of one packed virtqueue; one thread at a time, which its owner sees to."""

    def __init__(self, memory: memoryview, size: int, *, event_idx: bool) -> None:
        """`memory` is the three areas as `areas(size)` lays them out; the ring clears it."""
        self._driver, self._device, end = areas(size)
        if len(memory) < end:
            raise ValueError(f"{len(memory)} bytes are too few for a ring of {size}: want {end}")
        self._view = memory
        self._mem = window(memory)
        self.size = size
        self.event_idx = event_idx
        self.used_length = 0
        self._table_owner = bytearray(DESC * size)
        self._table = window(self._table_owner)
        self._counts_owner = bytearray(2 * size)  # of each head: how many descriptors it takes in the ring
        self._counts = window(self._counts_owner)
        self._heads = bytearray(size)  # 1: the device has it
        self._given = window(self._heads)
        self._begin()

    def _begin(self) -> None:
        fill(self._mem, 0, 0, len(self._view))
        fill(self._given, 0, 0, self.size)
        # Private state: the device may scribble on anything in shared memory.
        self._next = self._used = 0  # positions in the ring
        self._bits = AVAIL  # flags of what is made available: those of the wrap counter
        self._used_wrap = True
        self._outstanding = 0
        self._first = self._first_flags = 0  # what `publish` shows
        self._offered = 0  # descriptors since then
        self.disarm()

    def outstanding(self) -> int:
        """How many published heads the device has not used yet."""
        return self._outstanding

    def idle(self) -> bool:
        """Whether the device has used all that it was given, reaped or not."""
        at, wrap, left = self._used, self._used_wrap, self._outstanding
        while left:
            flags = load_acquire_u16(self._mem, DESC * at + FLAGS)
            head = load_u16(self._mem, DESC * at + ID)
            if bool(flags & AVAIL) != wrap or bool(flags & USED) != wrap or head >= self.size:
                return False
            at += max(1, load_u16(self._counts, 2 * head))
            if at >= self.size:
                at -= self.size
                wrap = not wrap
            left -= 1
        return True

    def detach(self) -> None:
        """Let go of the memory: from now on the ring works on bytes of its own, for nobody."""
        self._view = memoryview(bytearray(len(self._view)))
        self._mem = window(self._view)
        self._begin()

    def rewind(self) -> None:
        """Begin anew from index 0, for a device that was reset; descriptors stay as they are."""
        self._begin()

    def describe(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """Fill a descriptor of a head that the device does not have (2.8.6); `following` is an index too."""
        descriptor = DESC * index
        store_u64(self._table, descriptor, address)
        store_u32(self._table, descriptor + LENGTH, length)
        store_u16(self._table, descriptor + ID, following)
        store_u16(self._table, descriptor + FLAGS, flags)

    def redirect(self, index: int, address: int) -> None:
        """Change only the address of a descriptor of a head that the device does not have."""
        store_u64(self._table, DESC * index, address)

    def offer(self, head: int) -> None:
        """Put a head in the ring, unseen by the device until `publish` (2.8.21.1).

        Its first descriptor becomes available last; the first one of all that are offered, by `publish`.
        """
        first = at = self._next
        first_bits = bits = self._bits
        index = head
        count = 0
        while True:
            source = DESC * index
            place = DESC * at
            store_u64(self._mem, place, load_u64(self._table, source))
            store_u32(self._mem, place + LENGTH, load_u32(self._table, source + LENGTH))
            store_u16(self._mem, place + ID, head)
            flags = load_u16(self._table, source + FLAGS)
            if count:
                store_u16(self._mem, place + FLAGS, flags | bits)
            count += 1
            at += 1
            if at == self.size:
                at = 0
                bits ^= AVAIL | USED
            if not flags & NEXT:
                break
            index = load_u16(self._table, source + ID)
        flags = load_u16(self._table, DESC * head + FLAGS) | first_bits
        if self._offered:
            store_release_u16(self._mem, DESC * first + FLAGS, flags)
        else:
            self._first = first
            self._first_flags = flags
        self._next = at
        self._bits = bits
        self._offered += count
        store_u16(self._counts, 2 * head, count)
        store_u8(self._given, head, 1)
        self._outstanding += 1

    def publish(self) -> bool:
        """Show the device what was offered; true when it wants to be notified (2.8.21.3)."""
        if self._offered == 0:
            return False
        store_release_u16(self._mem, DESC * self._first + FLAGS, self._first_flags)
        count = self._offered
        self._offered = 0
        full_fence()  # the descriptors go out before the device's wish comes in (2.8.21.3.1)
        wish = load_u32(self._mem, self._device)  # in one piece
        wants = wish >> 16 & 3
        if wants != AT or not self.event_idx:
            return wants != DISABLE
        # As positions since the ring's beginning: those before the last wrap are negative.
        event = wish & WRAP - 1
        lap = AVAIL if wish & WRAP else USED  # as flags of what is made available in it
        if lap != self._bits:
            event -= self.size
        passed = self._next
        passed -= event + 1
        return 0 <= passed < count

    def reap(self) -> int:
        """Take the next used head (2.8.22): the head, -1 if there is none, -2 if the device erred."""
        place = DESC * self._used
        flags = load_acquire_u16(self._mem, place + FLAGS)
        if self._used_wrap:
            if flags & (AVAIL | USED) != AVAIL | USED:
                return NOTHING
        elif flags & (AVAIL | USED):
            return NOTHING
        if self._outstanding == 0:
            return FAULTY
        head = load_u16(self._mem, place + ID)
        if head >= self.size or not load_u8(self._given, head):
            return FAULTY
        self.used_length = load_u32(self._mem, place + LENGTH) if flags & WRITE else 0
        store_u8(self._given, head, 0)
        self._outstanding -= 1
        self._used += load_u16(self._counts, 2 * head)
        if self._used >= self.size:
            self._used -= self.size
            self._used_wrap = not self._used_wrap
        return head

    def fault(self) -> str:
        """What was wrong when `reap` said -2: for the error message, read anew."""
        if self._outstanding == 0:
            return f"descriptor {self._used} is marked used with no buffers outstanding"
        head = load_u16(self._mem, DESC * self._used + ID)
        return f"used id {head} is not an outstanding buffer of {self.size}"

    def arm(self) -> bool:
        """Ask for an interrupt at the next used buffer; true when there is none yet: sleep then."""
        if self.event_idx:
            store_u16(self._mem, self._driver + OFF_WRAP, self._used | (WRAP if self._used_wrap else 0))
            store_release_u16(self._mem, self._driver + WANTS, AT)
        else:
            store_u16(self._mem, self._driver + WANTS, ENABLE)
        full_fence()  # the wish goes out before the descriptor comes in
        flags = load_acquire_u16(self._mem, DESC * self._used + FLAGS)
        both = AVAIL | USED
        return flags & both != (both if self._used_wrap else 0)

    def disarm(self) -> None:
        """Ask for no interrupts: a hint, which the device may ignore (2.8.14)."""
        store_u16(self._mem, self._driver + WANTS, DISABLE)
