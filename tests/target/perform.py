"""One request through one handler of a device, in this process."""

from collections.abc import Callable, Sequence

from tests.target.front_end import GUEST, WRITE, Driver
from virtio.ring.device import DeviceRing, GuestMemory

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
