"""What the PCI transport needs from below: one function's registers, memory for it, its interrupts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from virtio.ring.doorbell import Doorbell
    from virtio.ring.region import Mapping, Region


class Line(NamedTuple):
    """The INTx interrupt of a function (PCI 3.0, 6.2.4): a level, which may be shared with others.

    `fd`, the windows' own, is readable once the line was up, and from then on the line is masked.
    `rearm` empties `fd` and unmasks the line; it is called after the device was asked why, which
    lowers the line (4.1.4.5), and if it is still up then, `fd` becomes readable again.
    """

    fd: int
    rearm: Callable[[], None]


class Windows(Protocol):
    """A PCI function in our hands: its memory and I/O accesses enabled, and from `map` on bus mastering.

    Any thread may call `read`, `write` and those of the configuration space. Widths are in bytes: 1, 2
    or 4, offsets multiples of them, values in the processor's order. Of a function that is gone, all
    bits read 1 and writes are lost, or both raise TransportError.
    """

    name: str  # "0000:00:04.0"
    removal: int | None  # an eventfd, readable once the kernel wants the function back
    translated: bool  # an IOMMU stands between the device and memory: it knows the addresses of `map`

    def read_config(self, offset: int, width: int) -> int: ...

    def write_config(self, offset: int, width: int, value: int) -> None: ...

    def bar_bytes(self, bar: int) -> int:
        """The size of a BAR, of memory or I/O ports; 0 where there is none, or no access to it."""

    def read(self, bar: int, offset: int, width: int) -> int: ...

    def write(self, bar: int, offset: int, width: int, value: int) -> None: ...

    def doorbell(self, bar: int, offset: int, value: int) -> Doorbell:
        """What stores the 16 bits of `value` there. It is rung by any thread, until `close`."""

    def region(self, nbytes: int) -> Region:
        """Memory that `map` can show the device; the caller closes it, after the windows."""

    def map(self, region: Region) -> Mapping:
        """Let the device reach a region until `close`: where it finds it. It was reset before."""

    def interrupts(self, count: int) -> Sequence[int]:
        """Enable MSI-X: non-blocking eventfds, the windows' own, of vectors 0, 1, ..

        `count` at most, which is no more than the device's table has; fewer where there are fewer,
        and none, with MSI-X off, where it cannot be had. Called once at most.
        """

    def line(self) -> Line | None:
        """Enable INTx, unmasked, or None where there is none. Once at most, with MSI-X off."""

    def close(self) -> None:
        """Let the function go; idempotent. Afterwards it reaches no memory of ours."""
