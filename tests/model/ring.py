"""The device's half of a split virtqueue, which checks the driver's (virtio 2.6 to 2.7).

Indices are stored through cast views: `struct.pack_into` clears a field before it stores it, and
a driver on another core can see that.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.model.memory import Fault, Memory, Region
from tests.model.options import Options
from tests.model.wire import DESCRIPTOR, INDIRECT, NEXT, WRITE, F

_NO_INTERRUPT = 1
_NO_NOTIFY = 1
_FENCE = threading.Lock()

Span = tuple[Region, int, int]  # region, offset in it, length


def fence() -> None:
    """Order what was stored before what is loaded after."""
    with _FENCE:  # a locked read-modify-write is a full barrier on x86-64
        pass


@dataclass(slots=True, eq=False)
class Chain:
    """One buffer that the driver made available, as it was when it was found."""

    ring: Ring
    head: int
    sequence: int
    descriptors: list[tuple[int, int, int, int]]
    """Address, length, flags, next; those of an indirect table follow the one that names it."""
    table: list[tuple[int, bytes]]
    """Index and bytes of those in the ring's own table."""
    readable: list[Span]
    writable: list[Span]
    indirect: bool
    request: object = None
    """What the device made of it."""
    sent: bytes = b""
    """All readable bytes, kept for chains that are held."""

    @property
    def readable_size(self) -> int:
        return sum(length for _, _, length in self.readable)

    @property
    def writable_size(self) -> int:
        return sum(length for _, _, length in self.writable)

    def read(self) -> bytes:
        """All device-readable bytes."""
        return b"".join(region.memory[offset : offset + length] for region, offset, length in self.readable)

    def write(self, data: bytes | memoryview, at: int = 0) -> int:
        """Put bytes into the device-writable part from byte `at` on; how many found room."""
        done = 0
        for region, offset, length in self.writable:
            if at >= length:
                at -= length
                continue
            room = min(length - at, len(data) - done)
            if room <= 0:
                break
            region.memory[offset + at : offset + at + room] = data[done : done + room]
            done += room
            at = 0
        return done


@dataclass(eq=False)
class Ring:
    """One virtqueue of the session; all of it is used by the back end's thread alone."""

    index: int
    options: Options
    violate: Callable[[str, str], None]
    size: int = 0
    base: int | None = None
    kick: int = -1
    call: int = -1
    error: int = -1
    kick_known: bool = False
    call_known: bool = False
    enabled: bool = False
    started: bool = False
    broken: bool = False
    event_idx: bool = False
    may_indirect: bool = False
    addresses: tuple[int, int, int] | None = None
    """User addresses of the descriptor table, the available ring and the used ring."""
    memory: Memory = field(default_factory=Memory)
    last: int = 0
    used: int = 0
    kicks: int = 0
    calls: int = 0
    taken: int = 0
    done: int = 0
    longest: int = 0
    """Descriptors of the longest chain."""
    outstanding: dict[int, Chain] = field(default_factory=dict)
    held: list[Chain] = field(default_factory=list)
    chains: deque[Chain] = field(default_factory=lambda: deque(maxlen=256))

    def __post_init__(self) -> None:
        self._owner: dict[int, int] = {}
        self._desc: Span | None = None
        self._avail: Span | None = None
        self._used: Span | None = None

    # Set-up

    def place(self, descriptor: int, available: int, used: int) -> None:
        """Find the three areas, given by user addresses (SET_VRING_ADDR)."""
        for name, address, align in (
            ("descriptor table", descriptor, 16),
            ("available ring", available, 2),
            ("used ring", used, 4),
        ):
            if address % align:
                self.violate("SPL-1", f"{name} of ring {self.index} at {address:#x}, not {align}-aligned")
        tail = 2 if self.event_idx else 0
        try:
            self._desc = (*self.memory.user(descriptor, 16 * self.size), 16 * self.size)
            length = 4 + 2 * self.size + tail
            self._avail = (*self.memory.user(available, length), length)
            length = 4 + 8 * self.size + tail
            self._used = (*self.memory.user(used, length), length)
        except Fault as fault:
            self.violate("VHU-13", f"ring {self.index}: {fault}")
            self._desc = self._avail = self._used = None
            return
        self.addresses = (descriptor, available, used)
        for (region, at, _), align in ((self._desc, 16), (self._avail, 2), (self._used, 4)):
            if at % align:
                self.violate("SPL-1", f"ring {self.index} is misaligned in its region at {at:#x}")
                self.broken = True
            del region

    @property
    def complete(self) -> bool:
        """Whether all that a ring needs was said."""
        known = self.kick_known and self.call_known and self.base is not None
        return bool(known and self.size and self._desc is not None)

    def uses(self, region: Region) -> bool:
        """Whether an area of the ring lies in a region."""
        return any(area is not None and area[0] is region for area in (self._desc, self._avail, self._used))

    def start(self) -> None:
        """The first kick was seen."""
        if self._used is None or self._avail is None or self.base is None:
            self.violate("INI-5", f"ring {self.index} was kicked before it was set up")
            self.broken = True
            return
        self.started = True
        self.last = self.base
        region, at, _ = self._used
        flags, self.used = region.u16[at // 2], region.u16[at // 2 + 1]
        if flags:
            self.violate("SPL-15", f"used.flags of ring {self.index} is {flags} at start, not 0")
        if self.used != self.base:
            self.violate(
                "VHU-10", f"ring {self.index} starts at base {self.base}, its used index is {self.used}"
            )

    def stop(self) -> int:
        """Stop, and give the next available index (GET_VRING_BASE).

        As with real back ends, kick and call must be given anew before the ring starts again.
        """
        self.drain_kick()
        self.started = self.kick_known = self.call_known = False
        self._close_fds()
        return self.last

    def detach(self) -> None:
        """Let go of descriptors and memory."""
        self.started = False
        self._desc = self._avail = self._used = None
        self._close_fds()
        self.outstanding.clear()
        self.held.clear()
        self.chains.clear()

    def forget(self) -> None:
        """The device was reset: what it had is the driver's again."""
        self._owner.clear()
        self.outstanding.clear()
        self.held.clear()
        self.chains.clear()

    def _close_fds(self) -> None:
        for fd in {self.kick, self.call, self.error} - {-1}:
            os.close(fd)
        self.kick = self.call = self.error = -1

    # The available ring

    def available(self) -> int:
        """The driver's available index."""
        if self._avail is None:
            return self.last
        region, at, _ = self._avail
        return int(region.u16[at // 2 + 1])

    def used_event(self) -> int:
        """Where the driver wants to be called (EVENT_IDX)."""
        assert self._avail is not None
        region, at, _ = self._avail
        return int(region.u16[at // 2 + 2 + self.size])

    def drain_kick(self) -> int:
        """How many kicks came since it was last asked; they count in `kicks`."""
        if self.kick < 0 or not select.select([self.kick], [], [], 0)[0]:
            return 0
        try:
            count = os.eventfd_read(self.kick)
        except BlockingIOError:
            return 0
        self.kicks += count
        return count

    def run(self, handle: Callable[[Chain], int | None]) -> int:
        """Take and handle all that is there, then arm; how many chains were completed.

        `handle` gives the bytes written, or None for a chain that it keeps.
        """
        completed = 0
        while self.started and not self.broken and self._avail is not None:
            if self.available() == self.last:
                if self._arm():
                    break
                continue
            self._quiet()
            chains = self._take()
            if not chains:
                break
            if self.options.order is not None:
                chains = self.options.order(chains)
            ready = []
            hold = self.options.hold
            for chain in chains:
                if hold is not None and hold(chain):
                    chain.sent = chain.read()
                    self.held.append(chain)
                    continue
                length = handle(chain)
                if length is not None:
                    ready.append((chain, length))
            self.finish(ready)
            completed += len(ready)
        return completed

    def _quiet(self) -> None:
        """While awake: no need to kick."""
        if self._used is not None and not self.event_idx:
            region, at, _ = self._used
            region.u16[at // 2] = _NO_NOTIFY

    def _arm(self) -> bool:
        """Ask for a kick; true when nothing came meanwhile."""
        if self._used is None:
            return True
        region, at, _ = self._used
        if self.event_idx and self.options.avail_event is None:
            region.u16[at // 2 + 2 + 4 * self.size] = self.last
        elif not self.event_idx and self.options.noise:
            region.u16[at // 2 + 2 + 4 * self.size] = self.last - 1 & 0xFFFF
        noise = self.event_idx and self.options.noise
        region.u16[at // 2] = _NO_NOTIFY if self.options.no_notify or noise else 0
        fence()  # the request to be kicked goes out before the index comes in
        return self.available() == self.last

    def _take(self) -> list[Chain]:
        assert self._avail is not None
        region, at, _ = self._avail
        flags, end = region.u16[at // 2], region.u16[at // 2 + 1]
        if self.event_idx:
            if flags:
                self.violate("SPL-12", f"avail.flags is {flags} with EVENT_IDX, not 0")
        elif flags > 1:
            self.violate("SPL-11", f"avail.flags is {flags}, neither 0 nor 1")
        if not self.enabled:
            self.violate("VHU-8", f"ring {self.index} has buffers and was not enabled")
        count = (end - self.last) & 0xFFFF
        if count + len(self.outstanding) > self.size:
            self.violate(
                "SPL-10",
                f"available index of ring {self.index} went from {self.last} to {end} with"
                f" {len(self.outstanding)} of {self.size} outstanding",
            )
            self.broken = True
            return []
        chains = []
        for step in range(count):
            head = region.u16[at // 2 + 2 + ((self.last + step) & 0xFFFF) % self.size]
            chain = self._walk(head)
            if chain is None:
                self.broken = True
                return []
            chains.append(chain)
        self.last = (self.last + count) & 0xFFFF
        choose = self.options.avail_event
        if choose is not None and self.event_idx:
            # Before anything is completed: the driver cannot have published more by then.
            assert self._used is not None
            region, at, _ = self._used
            region.u16[at // 2 + 2 + 4 * self.size] = choose(self) & 0xFFFF
        return chains

    def _walk(self, head: int) -> Chain | None:
        """Follow one chain and check it; None when it cannot be followed."""
        assert self._desc is not None
        where = f"head {head} of ring {self.index}"
        if head >= self.size:
            self.violate("SPL-4", f"{where}: only {self.size} descriptors")
            return None
        if head in self.outstanding:
            self.violate("CLN-1", f"{where} was made available again before it was used")
            return None
        region, at, _ = self._desc
        memory = region.memory
        chain = Chain(self, head, self.taken, [], [], [], [], False)
        limit, index, in_table, total = self.size, head, True, 0
        while True:
            if len(chain.descriptors) - chain.indirect >= self.size:
                self.violate("SPL-7", f"{where}: a chain or loop of over {self.size} descriptors")
                return None
            if index >= limit:
                self.violate("SPL-4", f"{where}: next is {index} of {limit}")
                return None
            raw = bytes(memory[at + 16 * index : at + 16 * index + 16])
            address, length, flags, following = DESCRIPTOR.unpack(raw)
            chain.descriptors.append((address, length, flags, following))
            if in_table:
                owner = self._owner.get(index)
                if owner == head:
                    self.violate("SPL-4", f"{where}: descriptor {index} is met twice: a loop")
                    return None
                if owner is not None:
                    self.violate("CLN-1", f"{where}: descriptor {index} is still part of head {owner}")
                    return None
                chain.table.append((index, raw))
                self._owner[index] = head
            if flags & ~(NEXT | WRITE | INDIRECT):
                self.violate("SPL-4", f"{where}: unknown flags {flags:#x}")
            if flags & INDIRECT:
                if not self.may_indirect:
                    self.violate("SPL-6", f"{where}: indirect, which was not negotiated")
                if not in_table:
                    self.violate("SPL-6", f"{where}: an indirect table inside another")
                    return None
                if flags & NEXT:
                    self.violate("SPL-8", f"{where}: flags INDIRECT and NEXT together")
                if length % 16 or not length:
                    self.violate("SPL-6", f"{where}: an indirect table of {length} bytes")
                    return None
                try:
                    region, at = self.memory.guest(address, length)
                except Fault as fault:
                    self.violate("VHU-13", f"{where}: indirect table: {fault}")
                    return None
                memory, limit, index, in_table = region.memory, length // 16, 0, False
                chain.indirect = True
                continue
            total += length
            if total > 1 << 32:
                self.violate("SPL-4", f"{where}: {total} bytes")
            try:
                span = (*self.memory.guest(address, length), length)
            except Fault as fault:
                self.violate("VHU-13", f"{where}: buffer: {fault}")
                return None
            if flags & WRITE:
                chain.writable.append(span)
            elif chain.writable:
                self.violate("SPL-2", f"{where}: a readable descriptor after a writable one")
                return None
            else:
                chain.readable.append(span)
            if not flags & NEXT:
                break
            index = following
        self.taken += 1
        self.outstanding[head] = chain
        self.chains.append(chain)
        self.longest = max(self.longest, len(chain.descriptors))
        if len(self.outstanding) <= 64:
            self._check_overlap(chain)
        return chain

    def _check_overlap(self, chain: Chain) -> None:
        """No byte that the device may write may be part of another outstanding chain."""
        for other in self.outstanding.values():
            if other is chain:
                continue
            for mine, theirs in (
                (chain.writable, other.writable),
                (chain.writable, other.readable),
                (chain.readable, other.writable),
            ):
                for region, at, length in mine:
                    for region2, at2, length2 in theirs:
                        if region is region2 and at < at2 + length2 and at2 < at + length:
                            self.violate(
                                "CLN-2",
                                f"heads {chain.head} and {other.head} of ring {self.index} share"
                                f" memory at offset {max(at, at2):#x}",
                            )
                            return

    # The used ring

    def finish(self, ready: list[tuple[Chain, int]]) -> None:
        """Put chains with their lengths on the used ring, show them at once, call if wanted."""
        if not ready or self._used is None or self._avail is None:
            return
        options = self.options
        region, at, _ = self._used
        old = self.used
        for chain, length in ready:
            self._check_unchanged(chain)
            del self.outstanding[chain.head]
            for index, _ in chain.table:
                del self._owner[index]
            entries = [(chain.head, length)]
            if options.complete is not None:
                entries = options.complete(self, chain, length)
            for head, claimed in entries:
                slot = at // 4 + 1 + 2 * (self.used % self.size)
                region.u32[slot] = head & 0xFFFFFFFF
                region.u32[slot + 1] = claimed & 0xFFFFFFFF
                self.used = (self.used + 1) & 0xFFFF
            self.done += 1
        self.used = (self.used + options.skip_used) & 0xFFFF
        options.skip_used = 0
        region.u16[at // 2 + 1] = self.used
        fence()  # the index goes out before the driver's wish comes in
        if self.event_idx:
            event = self.used_event()
            wanted = (self.used - event - 1) & 0xFFFF < (self.used - old) & 0xFFFF
        else:
            avail, base, _ = self._avail
            wanted = not avail.u16[base // 2] & _NO_INTERRUPT
        wanted = wanted or options.always_call
        self.ring_call(wanted + options.spurious_calls)

    def ring_call(self, times: int = 1) -> None:
        """Signal the call descriptor."""
        if self.call >= 0:
            with contextlib.suppress(BlockingIOError):
                for _ in range(times):
                    os.eventfd_write(self.call, 1)
                    self.calls += 1

    def _check_unchanged(self, chain: Chain) -> None:
        assert self._desc is not None
        region, at, _ = self._desc
        for index, raw in chain.table:
            if region.memory[at + 16 * index : at + 16 * index + 16] != raw:
                self.violate("CLN-1", f"descriptor {index} of head {chain.head} changed while outstanding")
        if chain.sent and chain.read() != chain.sent:
            self.violate("CLN-2", f"what head {chain.head} gave the device to read changed while outstanding")


def negotiated(ring: Ring, features: int) -> None:
    """Tell a ring what was agreed."""
    ring.event_idx = bool(features & F.EVENT_IDX)
    ring.may_indirect = bool(features & F.INDIRECT_DESC)
