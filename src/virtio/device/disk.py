"""One disk, whatever kind of device it is behind: its limits and its request templates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtio.errors import DeviceError
    from virtio.ring.requests import Finished
    from virtio.ring.template import Template


class Limits(NamedTuple):
    """What one request to a disk may ask for; all in bytes, but `depth` in requests a queue.

    0 says that the disk cannot do it at all. An unmap gives back whole granules of `unmap_alignment`
    bytes, the first of which begins at `unmap_start`; 0 where that is not known.
    """

    max_transfer: int
    max_unmap: int = 0
    unmap_alignment: int = 0
    unmap_start: int = 0
    max_write_zeroes: int = 0
    max_compare_and_write: int = 0
    depth: int = 1 << 16

    def unmap_head(self, offset: int, nbytes: int) -> int:
        """How much of a long unmap comes first, so that the parts that follow cut no granule in two;
        for `Channel` to call."""
        granule = self.unmap_alignment
        odd = (offset - self.unmap_start) % granule if granule and nbytes > self.max_unmap else 0
        return min(granule - odd, self.max_unmap) if odd else 0

    def unmap_parts(self, offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Offset and length of each request of a long unmap; for `Channel` to call."""
        end = offset + nbytes
        size = self.unmap_head(offset, nbytes) or self.max_unmap
        while offset < end:
            size = min(size, end - offset)
            yield offset, size
            offset, size = offset + size, self.max_unmap


@dataclass(frozen=True, slots=True)
class Disk:
    """A virtio-blk device or a logical unit of a virtio-scsi one.

    `size` is in bytes, a multiple of `block_size`. `place` tells it from its controller's others:
    "" for virtio-blk, "t0", "t0l3" for a unit. `identity` tells whether it is still the same disk
    that is behind the place; `unique`: no other disk anywhere has it. `address` is that of a logical
    unit, for commands without a template. `flush_known`: the device has said
    that it takes a flush; if not, one that it does not know means that there is no cache.

    A template that is None is an operation it lacks; `write_fua` is durable when it has completed,
    `write_zeroes` leaves blocks allocated, `write_zeroes_unmap` need not; where these two have a
    `data_bytes`, they are given so many zeros. `explain` turns the bad result of a request, its
    offset, and whether it was a transfer of data, into an error, or None for a success after all.
    """

    place: str
    product: str
    serial: str
    size: int
    block_size: int
    read_only: bool
    limits: Limits
    read: Template
    write: Template
    write_fua: Template | None
    flush: Template | None
    unmap: Template | None
    write_zeroes: Template | None
    write_zeroes_unmap: Template | None
    explain: Callable[[Finished, int, bool], DeviceError | None] = field(repr=False)
    identity: str = ""
    unique: bool = False
    flush_known: bool = True
    address: bytes = b""
