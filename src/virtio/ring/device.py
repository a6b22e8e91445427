"""Virtqueues, split and packed, device side (2.7, 2.8): trusts nothing that a driver writes.

A driver may change its memory at any moment, so `pop` copies every field of a descriptor once,
checks the copies, and keeps the chain as pieces of mapped memory in private memory. What a piece
holds is the driver's to change at any time: whoever parses it copies it first, with `gather`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cython

if not cython.compiled:
    from virtio.ring._mem import (
        full_fence,
        load_acquire_u16,
        load_u16,
        load_u32,
        load_u64,
        null,
        store_release_u16,
        store_u16,
        store_u32,
        store_u64,
        window,
    )
    from virtio.ring._os import signal_eventfd
    from virtio.ring._vring import (
        AT,
        AVAIL,
        DESC,
        DISABLE,
        ELEM,
        ENABLE,
        FAULTY,
        FLAGS,
        ID,
        IDX,
        INDIRECT,
        LENGTH,
        NEXT,
        NO_INTERRUPT,
        NO_NOTIFY,
        NOTHING,
        RING,
        USED,
        WANTS,
        WRAP,
        WRITE,
    )

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

SLOTS = 64  # regions in one GuestMemory
LONGEST = 1024  # entries of an indirect table where the queue is not longer: the most QEMU takes

_SPAN = 16  # a row of the region table: guest address, size
_PIECE = 16  # a row of the chain: region, length, offset in the region
_MOST_BYTES = 0xFFFFFFFF  # in one chain (2.7.5.2), so that the used length can tell them

_JUMP, _INDEX, _LOOP, _NESTED, _TABLE, _ZERO, _ORDER, _UNMAPPED, _PIECES, _LONG, _TORN, _BUFFER = range(12)
_FAULTS = (
    "available index moved by {}, more than the {} that the queue holds",
    "descriptor index {} is outside its table",
    "a chain of more than {} descriptors, so a loop",
    "flags {:#x} of an indirect descriptor that is nested, chained or not negotiated",
    "an indirect table of {} bytes",
    "a buffer of no bytes at {:#x}",
    "a readable buffer at {:#x} behind a writable one",
    "nothing is mapped at {:#x}",
    "a chain of more than {} pieces",
    "a chain of {} bytes",
    "a list whose descriptor at {} is not available",
    "buffer id {} is not below the {} that the queue holds",
)


class GuestMemory:
    """Where guest addresses are in this process; never changes, a new map takes its place."""

    def __init__(self, regions: Sequence[tuple[int, memoryview]] = ()) -> None:
        """`regions` are guest address and bytes (writable, contiguous) of each, kept alive here."""
        if len(regions) > SLOTS:
            raise ValueError(f"{len(regions)} regions, at most {SLOTS}")
        if not cython.compiled:
            self._windows = [null()] * SLOTS
        self.count = len(regions)
        self.offset = self.room = 0
        self._spans = bytearray(_SPAN * SLOTS)
        self._table = window(self._spans)
        self._views = [view for _, view in regions]
        for index in range(len(regions)):
            guest, view = regions[index]
            if guest + len(view) >= 1 << 64:
                raise ValueError(f"{len(view)} bytes at {guest:#x} pass the end of memory")
            store_u64(self._table, _SPAN * index, guest)
            store_u64(self._table, _SPAN * index + 8, len(view))
            self._windows[index] = window(view)

    def locate(self, address: int) -> int:
        """The region that holds an address, or -1; `offset` in it and `room` to its end are set."""
        for index in range(self.count):
            start = load_u64(self._table, _SPAN * index)
            size = load_u64(self._table, _SPAN * index + 8)
            if start <= address and address - start < size:
                self.offset = address - start
                self.room = size - self.offset
                return index
        return -1


class DeviceRing:
    """The device's half of one virtqueue: `pop` a chain, use its buffers, `push` its head.

    The head of a `packed` one is its buffer ID.
    """

    def __init__(
        self, size: int, base: int, *, event_idx: bool, indirect: bool, packed: bool = False
    ) -> None:
        """`base` is the available index to begin at, of a packed ring as vhost-user has it: both indices with
        their wrap counters. `attach` gives the ring its memory. ValueError for what cannot be."""
        if not 0 < size <= 32768 or (size & (size - 1) and not packed):
            raise ValueError(f"queue size {size} is not a power of two from 1 to 32768")
        if packed and max(base & 0x7FFF, base >> 16 & 0x7FFF) >= size:
            raise ValueError(f"base {base:#x} of a packed ring of {size}")
        self.packed = packed
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.readable = self.writable = 0
        self.head = 0
        self.call_fd = -1
        self._mask = size - 1
        self._avail_idx = base & 0xFFFF
        self._at, self._used_at = base & 0x7FFF, base >> 16 & 0x7FFF  # positions in a packed ring
        self._lap, self._used_lap = base >> 15 & 1, base >> 31 & 1  # and the wrap counters
        self._fresh = 0  # descriptors that were used since the driver was told
        self._list_owner = bytearray(DESC * size if packed else 0)
        self._list = window(self._list_owner)
        self._taken = 0  # descriptors in it
        self._lengths_owner = bytearray(2 * size if packed else 0)  # by buffer: how many it had
        self._lengths = window(self._lengths_owner)
        self._held: dict[int, bytes] = {}  # by buffer: its list
        self._most = max(size, LONGEST)
        self._pieces = bytearray(_PIECE * self._most)
        self._chain = window(self._pieces)
        self._count = self._split = 0
        self._why = self._what = 0
        self._attached = False
        self._desc = self._avail = self._used = null()

    @property
    def index(self) -> int:
        """The next available index: what the ring's base would be if it started again here."""
        if self.packed:
            return int(self._at | self._lap << 15 | self._used_at << 16 | self._used_lap << 31)
        return int(self._avail_idx)

    def attach(self, memory: GuestMemory, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        """Take the three areas (2.7) and the map for buffers; again when the map has changed."""
        for name, area, least in (
            ("descriptor table", desc, DESC * self.size),
            ("available ring", avail, 4 if self.packed else RING + 2 * self.size + 2),
            ("used ring", used, 4 if self.packed else RING + ELEM * self.size + 2),
        ):
            if len(area) < least:
                raise ValueError(f"{name} of {len(area)} bytes, want {least}")
        self._memory = memory
        self._areas = (desc, avail, used)
        self._desc, self._avail, self._used = window(desc), window(avail), window(used)
        if not self._attached:
            self._attached = True
            if self.packed:
                store_u16(self._used, WANTS, ENABLE)
                return
            self._used_idx = self._told = load_u16(self._used, IDX)
            store_u16(self._used, 0, 0)  # flags: with EVENT_IDX they stay so (2.7.10)

    def pop(self) -> int:
        """Take the next chain (2.7.14): its head, -1 if there is none, -2 if the driver erred.

        `head` says it too, and `readable` and `writable` are the bytes of the chain's two parts.
        """
        if self.packed:
            return self._pop_packed()
        pending = (load_acquire_u16(self._avail, IDX) - self._avail_idx) & 0xFFFF
        if pending == 0:
            return NOTHING
        if pending > self.size:
            return self._refuse(_JUMP, pending)
        head = load_u16(self._avail, RING + 2 * (self._avail_idx & self._mask))
        if self._walk(head) < 0:
            return FAULTY
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF
        self.head = head
        return head

    def _is_available(self, at: int, lap: int) -> bool:
        flags = load_acquire_u16(self._desc, DESC * at + FLAGS) & (AVAIL | USED)
        return flags == (AVAIL if lap else USED)

    def _pop_packed(self) -> int:
        if not self._is_available(self._at, self._lap):
            return NOTHING
        at = self._at
        lap = self._lap
        self._taken = 0
        while True:
            if self._taken == self.size:
                return self._refuse(_LOOP, self.size)
            if not self._is_available(at, lap):
                return self._refuse(_TORN, at)
            place = DESC * self._taken
            store_u64(self._list, place, load_u64(self._desc, DESC * at))
            store_u64(self._list, place + 8, load_u64(self._desc, DESC * at + 8))
            self._taken += 1
            at += 1
            if at == self.size:
                at = 0
                lap ^= 1
            if not load_u16(self._list, place + FLAGS) & NEXT:
                break
        head = load_u16(self._list, place + ID)
        if head >= self.size:
            return self._refuse(_BUFFER, head)
        if self._walk(head) < 0:
            return FAULTY
        store_u16(self._lengths, 2 * head, self._taken)
        self._at = at
        self._lap = lap
        self.head = head
        return head

    def hold(self) -> None:
        """Keep the chain that was popped last, for `again`: what is used may be written over a packed one."""
        if self.packed:
            self._held[self.head] = bytes(self._list_owner[: DESC * self._taken])

    def again(self, head: int) -> int:
        """Take up a chain that was popped, told to `hold` and not pushed yet, in place of the last: as `pop`.

        A split one is read anew, so it is the same only if the driver let it alone, as it has to. Its
        memory is where the map of today has it.
        """
        if self.packed:
            kept = self._held.pop(head)
            self._list_owner[: len(kept)] = kept
            self._taken = len(kept) // DESC
        if self._walk(head) < 0:
            return FAULTY
        self.head = head
        return head

    def _walk(self, head: int) -> int:
        """Check a chain and fill `_chain` with its pieces, the readable ones first."""
        table = self._desc
        base = 0
        index = head
        count = left = self.size
        nested = False
        if self.packed:
            table = self._list
            index = 0
            count = left = self._taken
        self._count = self._split = 0
        self.readable = self.writable = 0
        while True:
            if index >= count:
                return self._refuse(_INDEX, index)
            if left == 0:
                return self._refuse(_LOOP, count)
            left -= 1
            at = base + DESC * index
            address = load_u64(table, at)
            length = load_u32(table, at + 8)
            flags = load_u16(table, at + 12)
            following = load_u16(table, at + 14)
            if self.packed:  # in order, to the end of the list or table (2.8.6, 2.8.7)
                flags = load_u16(table, at + FLAGS) & (WRITE | (0 if nested else INDIRECT))
                following = index + 1
                if following < count:
                    flags |= NEXT
            if flags & INDIRECT:
                if nested or not self.indirect or flags & NEXT or (self.packed and index):
                    return self._refuse(_NESTED, flags)
                if length == 0 or length % DESC or length > DESC * self._most:
                    return self._refuse(_TABLE, length)
                region = self._memory.locate(address)
                if region < 0 or self._memory.room < length or address % 8:
                    return self._refuse(_UNMAPPED, address)
                nested = True
                table = self._memory._windows[region]
                base = self._memory.offset
                count = left = length // DESC
                index = 0
                continue
            if length == 0:
                return self._refuse(_ZERO, address)
            if flags & WRITE:
                self.writable += length
            elif self.writable:
                return self._refuse(_ORDER, address)
            else:
                self.readable += length
            while length:  # a buffer may cross from one region into the next
                region = self._memory.locate(address)
                if region < 0:
                    return self._refuse(_UNMAPPED, address)
                if self._count == self._most:
                    return self._refuse(_PIECES, self._most)
                taken = length
                if taken > self._memory.room:
                    taken = self._memory.room
                piece = _PIECE * self._count
                store_u32(self._chain, piece, region)
                store_u32(self._chain, piece + 4, taken)
                store_u64(self._chain, piece + 8, self._memory.offset)
                self._count += 1
                address += taken
                length -= taken
            if not flags & WRITE:
                self._split = self._count
            if not flags & NEXT:
                break
            index = following
        if self.readable + self.writable > _MOST_BYTES:
            return self._refuse(_LONG, self.readable + self.writable)
        return 0

    def _refuse(self, why: int, what: int) -> int:
        self._why = why
        self._what = what
        return FAULTY

    def fault(self) -> str:
        """What was wrong when `pop` said -2."""
        return _FAULTS[self._why].format(self._what, self.size)

    def readable_views(self, skip: int, nbytes: int) -> list[memoryview]:
        """At most `nbytes` of the part that the driver wrote, after `skip`; valid until `push`."""
        return self._views(0, self._split, skip, nbytes)

    def writable_views(self, skip: int, nbytes: int) -> list[memoryview]:
        """At most `nbytes` of the part that the driver reads, after `skip`; valid until `push`."""
        return self._views(self._split, self._count, skip, nbytes)

    def _views(self, index: int, end: int, skip: int, nbytes: int) -> list[memoryview]:
        views = []
        while nbytes > 0 and index < end:
            length = load_u32(self._chain, _PIECE * index + 4)
            if skip < length:
                taken = min(length - skip, nbytes)
                at = load_u64(self._chain, _PIECE * index + 8) + skip
                region = load_u32(self._chain, _PIECE * index)
                views.append(self._memory._views[region][at : at + taken])
                nbytes -= taken
                skip = 0
            else:
                skip -= length
            index += 1
        return views

    def gather(self, skip: int, nbytes: int) -> bytes:
        """A copy of at most `nbytes` of the readable part, after `skip`."""
        return b"".join(self.readable_views(skip, nbytes))

    def scatter(self, skip: int, data: Buffer) -> int:
        """Copy `data` into the writable part, after `skip`; how much of it there was room for."""
        source = memoryview(data)
        done = 0
        for view in self.writable_views(skip, len(source)):
            view[:] = source[done : done + len(view)]
            done += len(view)
        return done

    def push(self, head: int, written: int) -> None:
        """Give a chain back (2.7.8): `written` bytes of it, from the first writable one on, are set.

        A driver that polls sees it at once; one that sleeps is told by `notify`.
        """
        if self.packed:
            self._push_packed(head, written)
            return
        element = RING + ELEM * (self._used_idx & self._mask)
        store_u32(self._used, element, head)
        store_u32(self._used, element + 4, written)
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        store_release_u16(self._used, IDX, self._used_idx)

    def _push_packed(self, head: int, written: int) -> None:
        place = DESC * self._used_at
        store_u32(self._desc, place + LENGTH, written)
        store_u16(self._desc, place + ID, head)
        flags = AVAIL | USED if self._used_lap else 0
        store_release_u16(self._desc, place + FLAGS, flags | (WRITE if written else 0))
        length = load_u16(self._lengths, 2 * head)
        self._fresh += length
        self._used_at += length
        if self._used_at >= self.size:
            self._used_at -= self.size
            self._used_lap ^= 1

    def _is_called(self) -> bool:
        """Whether the driver of a packed ring wants to be told of what is fresh (2.8.14)."""
        count = self._fresh
        self._fresh = 0
        if count == 0:
            return False
        full_fence()  # the descriptors go out before the driver's wish comes in
        wish = load_u32(self._avail, 0)
        wants = wish >> 16 & 3
        if wants != AT or not self.event_idx:
            return wants != DISABLE
        event = wish & WRAP - 1
        if (wish >> 15 & 1) != self._used_lap:
            event -= self.size
        passed = self._used_at
        passed -= event + 1
        return 0 <= passed < count

    def notify(self) -> int:
        """Call the driver if it wants that for what was pushed since (2.7.7.2); 0, or an errno."""
        if self.packed:
            if self._is_called() and self.call_fd >= 0:
                return signal_eventfd(self.call_fd)
            return 0
        if self._told == self._used_idx:
            return 0
        old = self._told
        self._told = self._used_idx
        full_fence()  # the index goes out before flags or event come in
        if self.event_idx:
            event = load_u16(self._avail, RING + 2 * self.size)
            passed = (self._used_idx - event - 1) & 0xFFFF
            wanted = passed < ((self._used_idx - old) & 0xFFFF)
        else:
            wanted = not load_u16(self._avail, 0) & NO_INTERRUPT
        if wanted and self.call_fd >= 0:
            return signal_eventfd(self.call_fd)
        return 0

    def arm(self) -> bool:
        """Ask for a kick at the next available buffer; true if there is none yet: sleep then."""
        if self.packed:
            if self.event_idx:
                store_u16(self._used, 0, self._at | self._lap << 15)
                store_release_u16(self._used, WANTS, AT)
            else:
                store_u16(self._used, WANTS, ENABLE)
            full_fence()
            return not self._is_available(self._at, self._lap)
        if self.event_idx:
            store_u16(self._used, RING + ELEM * self.size, self._avail_idx)
        else:
            store_u16(self._used, 0, 0)
        full_fence()  # the request goes out before the available index comes in (2.7.10)
        return load_acquire_u16(self._avail, IDX) == self._avail_idx

    def disarm(self) -> None:
        """Ask for no kicks: a hint, which the driver may ignore (2.7.10)."""
        if self.packed:
            store_u16(self._used, WANTS, DISABLE)
        elif self.event_idx:
            # An index that was just passed is met again only after 65,535 more buffers.
            store_u16(self._used, RING + ELEM * self.size, (self._avail_idx - 1) & 0xFFFF)
        else:
            store_u16(self._used, 0, NO_NOTIFY)
