"""Requests through the handlers of a device, in this process."""

import contextlib
from collections.abc import Callable, Sequence

from tests.target.front_end import GUEST, WRITE, Driver
from virtio.ring.device import DeviceRing, GuestMemory
from virtio.target.held import Kept

_DATA = 0x4000


def perform(
    handler: Callable[[DeviceRing], int] | None, readable: Sequence[bytes], writable: Sequence[int]
) -> tuple[int, list[bytes]]:
    """The length given back, and what is then in each writable buffer, of which all was EE before."""
    assert handler is not None
    sizes = [*map(len, readable), *writable]
    memory = memoryview(bytearray(b"\xee" * (_DATA + sum(sizes))))
    memory[:_DATA] = bytes(_DATA)
    driver = Driver(memory, 64)
    buffers, at = [], _DATA
    for number, size in enumerate(sizes):
        buffers.append((GUEST + at, size, WRITE if number >= len(readable) else 0))
        at += size
    memory[_DATA : _DATA + sum(map(len, readable))] = b"".join(readable)
    driver.chain(buffers)
    driver.offer(0)
    ring = DeviceRing(64, 0, event_idx=False, indirect=False)
    ring.attach(GuestMemory([(GUEST, memory)]), *driver.areas())
    head = ring.pop()
    assert head == 0, ring.fault()
    ring.push(head, handler(ring))
    ((_, length),) = driver.take()
    ends = [sum(sizes[: number + 1]) + _DATA for number in range(len(readable), len(sizes))]
    return length, [bytes(memory[end - size : end]) for end, size in zip(ends, writable, strict=True)]


class Queue:
    """Both ends of one ring, in which requests may wait; head n has descriptors 2n and 2n + 1."""

    SIZE = 16
    _SLOT = 0x1000

    def __init__(self, *, event_idx: bool = False) -> None:
        self.memory = memoryview(bytearray(_DATA + self.SIZE * self._SLOT))
        self.driver = Driver(self.memory, self.SIZE, event_idx=event_idx)
        self.ring = DeviceRing(self.SIZE, 0, event_idx=event_idx, indirect=False)
        self.attach()

    def attach(self) -> None:
        self.ring.attach(GuestMemory([(GUEST, self.memory)]), *self.driver.areas())

    def put(self, slot: int, readable: bytes, writable: int) -> None:
        """Make a request available, whose head is 2 * `slot`; its writable part is all EE."""
        at = _DATA + slot * self._SLOT
        self.memory[at : at + self._SLOT] = readable.ljust(self._SLOT, b"\xee")
        buffers = [(GUEST + at, len(readable), 0)] if readable else []
        self.driver.chain([*buffers, (GUEST + at + len(readable), writable, WRITE)], 2 * slot)
        self.driver.offer(2 * slot)

    def serve(self, handler: Callable[[DeviceRing], int] | None) -> None:
        """Do all that is available, as a session does."""
        assert handler is not None
        while (head := self.ring.pop()) >= 0:
            with contextlib.suppress(Kept):
                self.ring.push(head, handler(self.ring))

    def take(self, readable: int) -> dict[int, bytes]:
        """What was written behind so many bytes, by slot, for all that was used since."""
        found = {}
        for head, length in self.driver.take():
            at = _DATA + head // 2 * self._SLOT + readable
            found[head // 2] = bytes(self.memory[at : at + length])
        return found
