"""Where the parts of a request are in shared memory: of a slot of its own, or beside a small ring."""

from __future__ import annotations

from typing import NamedTuple

from virtio.errors import RequestError
from virtio.ring.format import SPLIT, RingFormat
from virtio.ring.split import up

_LINE = 64  # bytes of a cache line

ONE_PAGE = 1 << 62  # more than there is: memory in one piece for the device


class Layout(NamedTuple):
    """What the requests of one kind of device look like in memory; sizes in bytes.

    The result is one byte, or eight where the mask is wider than one, at `result_offset` of the
    response, little-endian; all went well when the bits of `result_mask` in it are 0.
    `response_first`: the response comes before the data read (virtio-scsi, 5.6.6.1), not after it
    (virtio-blk, 5.2.6).
    """

    request: int
    payload: int
    response: int
    result_offset: int
    result_mask: int
    response_first: bool

    @property
    def result_bytes(self) -> int:
        """How wide the result is."""
        return 8 if self.result_mask > 0xFF else 1


def queue_bytes(
    size: int,
    layout: Layout,
    segments: int,
    indirect: bool,
    *,
    form: RingFormat = SPLIT,
    page: int = ONE_PAGE,
) -> int:
    """How much shared memory a request queue of `size` descriptors takes.

    Where the device has it in pages of `page` bytes, as a `Pool` of such pages lends it.
    """
    first, stride, slots = shape(size, layout, segments, indirect, form, page)
    return first + stride * slots


def most_segments(layout: Layout, page: int) -> int:
    """How many data segments a request may have so that its slot fits in a page."""
    table = slot_parts(layout).table
    return max(0, min((page - table) // 16 - 2, 1 << 16))


class SlotParts(NamedTuple):
    """Where the parts of a slot are, behind its header; in bytes."""

    response: int
    payload: int
    table: int


def slot_parts(layout: Layout) -> SlotParts:
    """Where they are in such a layout."""
    # The result is in the header's cache line if there is room, whatever comes after it in the response:
    # a line less to be passed back and forth. One of 8 bytes is aligned.
    width = layout.result_offset + layout.result_bytes
    response = layout.request + -(layout.request + width) % layout.result_bytes
    if response + width > _LINE:
        response = up(layout.request, _LINE) + -width % layout.result_bytes
    payload = up(response + layout.response, 8)
    return SlotParts(response, payload, up(payload + layout.payload, _LINE))


def shape(
    size: int, layout: Layout, segments: int, indirect: bool, form: RingFormat, page: int
) -> tuple[int, int, int]:
    """Where the slots begin, the bytes of one, and their number.

    A descriptor covers memory in one piece: in pages, no slot straddles two.
    """
    table = slot_parts(layout).table
    stride = up(table + (2 + segments) * 16, _LINE) if indirect else table
    first = form.areas(size)[2]
    for _, response in beside(size, layout, form, event_idx=False):  # which has the most
        first = max(first, up(response + layout.response, _LINE))
    if page != ONE_PAGE:
        stride = 1 << (stride - 1).bit_length()
        first = up(first, stride)
        if stride > page:
            raise RequestError(f"a request of {segments} segments does not fit in a page of {page} bytes")
    slots = size if indirect else size // (2 + segments)
    if slots == 0 or 2 + segments > size:
        raise RequestError(f"a queue of {size} descriptors has no room for a request of {2 + segments}")
    return first, stride, slots


def beside(size: int, layout: Layout, form: RingFormat, event_idx: bool) -> list[tuple[int, int]]:
    """Where headers and results fit in the cache lines that the two halves of a ring have anyway.

    Of each request that has room there the beginnings of its header and of its response, of which what
    comes after the result may be behind the line.
    """
    heads, results = form.room(size, event_idx)
    align = 4 if layout.request % 8 else 8
    width = layout.result_offset + layout.result_bytes
    head, response = heads.start, results.start
    places: list[tuple[int, int]] = []
    while True:
        head = up(head, align)
        response += -(response + width) % layout.result_bytes
        if head + layout.request > heads.stop or response + width > results.stop:
            return places
        places.append((head, response))
        head += layout.request
        response += layout.response
