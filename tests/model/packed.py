"""The device's half of a packed virtqueue, which checks the driver's (virtio 2.8)."""

from __future__ import annotations

from dataclasses import dataclass

from tests.model.memory import Fault, Region
from tests.model.ring import Chain, Ring, fence
from tests.model.wire import DESCRIPTOR, INDIRECT, NEXT, WRITE

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, AT = 0, 1, 2  # what an event suppression structure wants
FIRST = 0x8000_8000  # the base of a new ring: index 0 twice, both wrap counters 1


@dataclass(eq=False)
class PackedRing(Ring):
    """One packed virtqueue; `last` counts lists, positions are its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.next = self.used_at = 0
        self.wrap = self.used_wrap = 1
        self._busy = 0  # descriptors of the ring that are outstanding
        self._written: set[int] = set()  # positions given back since a list was there, whatever it is

    def place(self, descriptor: int, available: int, used: int) -> None:
        for name, address, align in (
            ("descriptor ring", descriptor, 16),
            ("driver area", available, 4),
            ("device area", used, 4),
        ):
            if address % align:
                self.violate("PKD-1", f"{name} of ring {self.index} at {address:#x}, not {align}-aligned")
        try:
            self._desc = (*self.memory.user(descriptor, 16 * self.size), 16 * self.size)
            self._avail = (*self.memory.user(available, 4), 4)
            self._used = (*self.memory.user(used, 4), 4)
        except Fault as fault:
            self.violate("VHU-13", f"ring {self.index}: {fault}")
            self._desc = self._avail = self._used = None
            return
        self.addresses = (descriptor, available, used)

    def start(self) -> None:
        if self._desc is None or self.base is None:
            self.violate("INI-5", f"ring {self.index} was kicked before it was set up")
            self.broken = True
            return
        if self.base != FIRST:
            self.violate("VHU-10", f"packed ring {self.index} starts at {self.base:#x}, not {FIRST:#x}")
        self.started = True
        self.next = self.used_at = self.last = self.used = self._busy = 0
        self.wrap = self.used_wrap = 1
        region, at, nbytes = self._desc
        if any(region.u16[place // 2 + 7] & USED for place in range(at, at + nbytes, 16)):
            self.violate("PKD-2", f"ring {self.index} starts with descriptors that look used")

    def stop(self) -> int:
        super().stop()
        return FIRST  # as a driver that begins anew has to have it

    def forget(self) -> None:
        super().forget()
        self._busy = 0
        self._written.clear()

    @staticmethod
    def _is_available(flags: int, wrap: int) -> bool:
        return bool(flags & AVAIL) == bool(wrap) != bool(flags & USED)

    def _flags(self, position: int) -> int:
        assert self._desc is not None
        region, at, _ = self._desc
        return int(region.u16[(at + 16 * position) // 2 + 7])

    def available(self) -> int:
        if self._desc is None:
            return self.last
        return self.last + self._is_available(self._flags(self.next), self.wrap)

    def _want(self, flags: int, event: int = 0) -> None:
        """Write the device's event suppression structure."""
        if self._used is not None:
            region, at, _ = self._used
            region.u16[at // 2] = event
            region.u16[at // 2 + 1] = flags

    def _quiet(self) -> None:
        if self.options.avail_event is None or not self.event_idx:
            self._want(DISABLE)

    def _arm(self) -> bool:
        if self.options.no_notify:
            self._want(DISABLE)
        elif not self.event_idx:
            self._want(ENABLE, 0x1234 if self.options.noise else 0)
        elif self.options.avail_event is None:
            self._want(AT, self.next | self.wrap << 15)
        fence()
        return self.available() == self.last

    def _take(self) -> list[Chain]:
        if not self.enabled:
            self.violate("VHU-8", f"ring {self.index} has buffers and was not enabled")
        self._check_wish()
        chains: list[Chain] = []
        while self.available() != self.last:
            chain = self._walk_list()
            if chain is None:
                self.broken = True
                return []
            chains.append(chain)
            self.last += 1
        choose = self.options.avail_event
        if choose is not None and self.event_idx:
            self._want(AT, choose(self) & 0xFFFF)
        return chains

    def _check_wish(self) -> None:
        """The driver's event suppression structure (2.8.14)."""
        assert self._avail is not None
        region, at, _ = self._avail
        flags = region.u16[at // 2 + 1]
        if flags > AT or (flags == AT and not self.event_idx):
            self.violate("PKD-12", f"event flags of ring {self.index} are {flags:#x}")

    def _walk_list(self) -> Chain | None:
        """Follow one list and check it; None when it cannot be followed."""
        assert self._desc is not None
        region, at, _ = self._desc
        position, wrap = self.next, self.wrap
        chain = Chain(self, -1, self.taken, [], [], [], [], False)
        where = f"position {position} of ring {self.index}"
        while True:
            raw = bytes(region.memory[at + 16 * position : at + 16 * position + 16])
            address, length, buffer, flags = DESCRIPTOR.unpack(raw)
            if not self._is_available(flags, wrap):
                self.violate("PKD-7", f"{where}: a list whose descriptor at {position} is not available yet")
                return None
            if self._busy >= self.size:
                self.violate("PKD-6", f"{where}: more than {self.size} descriptors outstanding")
                return None
            if len(chain.table) >= self.size:
                self.violate("PKD-4", f"{where}: a list of more than {self.size} descriptors")
                return None
            if flags & ~(NEXT | WRITE | INDIRECT | AVAIL | USED):
                self.violate("PKD-4", f"{where}: unknown flags {flags:#x}")
            self._busy += 1
            chain.table.append((position, raw))
            chain.descriptors.append((address, length, flags, buffer))
            self._written.discard(position)
            if flags & INDIRECT:
                if flags & NEXT or len(chain.table) > 1:
                    self.violate("PKD-10", f"{where}: INDIRECT in a list")
                    return None
                if not self._walk_table(chain, address, length, where):
                    return None
            elif not self._add(chain, address, length, flags, where):
                return None
            position, wrap = (position + 1, wrap) if position + 1 < self.size else (0, wrap ^ 1)
            if not flags & NEXT:
                break
        chain.head = buffer
        if chain.head in self.outstanding:
            self.violate("CLN-1", f"{where}: buffer {buffer} is outstanding already")
            return None
        self.next, self.wrap = position, wrap
        self.taken += 1
        self.outstanding[chain.head] = chain
        self.chains.append(chain)
        self.longest = max(self.longest, len(chain.descriptors))
        if len(self.outstanding) <= 64:
            self._check_overlap(chain)
        return chain

    def _walk_table(self, chain: Chain, address: int, nbytes: int, where: str) -> bool:
        if not self.may_indirect:
            self.violate("PKD-8", f"{where}: indirect, which was not negotiated")
        if nbytes % 16 or not 0 < nbytes <= 16 * self.size:
            self.violate("PKD-9", f"{where}: an indirect table of {nbytes} bytes")
            return False
        try:
            region, at = self.memory.guest(address, nbytes)
        except Fault as fault:
            self.violate("VHU-13", f"{where}: indirect table: {fault}")
            return False
        chain.indirect = True
        for place in range(at, at + nbytes, 16):
            raw = bytes(region.memory[place : place + 16])
            address, length, buffer, flags = DESCRIPTOR.unpack(raw)
            chain.descriptors.append((address, length, flags, buffer))
            if flags & ~WRITE:
                self.violate("PKD-8", f"{where}: flags {flags:#x} in an indirect table")
            if not self._add(chain, address, length, flags, where):
                return False
        return True

    def _add(self, chain: Chain, address: int, length: int, flags: int, where: str) -> bool:
        try:
            span = (*self.memory.guest(address, length), length)
        except Fault as fault:
            self.violate("VHU-13", f"{where}: buffer: {fault}")
            return False
        if flags & WRITE:
            chain.writable.append(span)
        elif chain.writable:
            self.violate("PKD-5", f"{where}: a readable descriptor after a writable one")
            return False
        else:
            chain.readable.append(span)
        return True

    # What is used

    def finish(self, ready: list[tuple[Chain, int]]) -> None:
        if not ready or self._desc is None or self._avail is None:
            return
        options = self.options
        region, at, _ = self._desc
        old = self.used
        for chain, length in ready:
            self._check_unchanged(chain)
            del self.outstanding[chain.head]
            entries = [(chain.head, length)]
            if options.complete is not None:
                entries = options.complete(self, chain, length)
            for buffer, claimed in entries:
                self._use(region, at + 16 * self.used_at, buffer, claimed)
                freed = range(self.used_at, self.used_at + len(chain.table))
                self._written.update(position % self.size for position in freed)
                self._move_used(len(chain.table))
            self._busy -= len(chain.table)
            self.done += 1
        for _ in range(options.skip_used):
            self._use(region, at + 16 * self.used_at, self.size, 0)
            self._move_used(1)
        options.skip_used = 0
        fence()  # the descriptors go out before the driver's wish comes in
        self.ring_call((self._is_wanted(old) or options.always_call) + options.spurious_calls)

    def _check_unchanged(self, chain: Chain) -> None:
        """Where nothing that was used has taken the place of a descriptor, it is as it was."""
        assert self._desc is not None
        region, at, _ = self._desc
        for position, raw in chain.table:
            place = at + 16 * position
            if position not in self._written and region.memory[place : place + 16] != raw:
                self.violate("PKD-2", f"descriptor {position} of ring {self.index} changed while outstanding")
        if chain.sent and chain.read() != chain.sent:
            self.violate(
                "CLN-2", f"what buffer {chain.head} gave the device to read changed while outstanding"
            )

    def _use(self, region: Region, place: int, buffer: int, length: int) -> None:
        region.u32[place // 4 + 2] = length & 0xFFFFFFFF
        region.u16[place // 2 + 6] = buffer & 0xFFFF
        fence()
        wrapped = AVAIL | USED if self.used_wrap else 0
        region.u16[place // 2 + 7] = wrapped | (WRITE if length else 0)

    def _move_used(self, count: int) -> None:
        """`used` counts positions for ever."""
        self.used += count
        self.used_at += count
        if self.used_at >= self.size:
            self.used_at -= self.size
            self.used_wrap ^= 1

    def _is_wanted(self, old: int) -> bool:
        assert self._avail is not None
        region, at, _ = self._avail
        event, flags = region.u16[at // 2], region.u16[at // 2 + 1]
        self._check_wish()
        if flags != AT:
            return bool(flags == ENABLE)
        return old <= self.absolute(event, self.used, self.used_at, self.used_wrap) < self.used

    def absolute(self, event: int, count: int, at: int, wrap: int) -> int:
        """The position of an event among all there ever were, near a `count` that is `at` here."""
        begin = count - at  # of this lap
        lap = 0 if event >> 15 == wrap else -1
        return int(begin + lap * self.size + (event & 0x7FFF))
