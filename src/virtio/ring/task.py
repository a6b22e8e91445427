"""Many requests of one template, for a request queue to run without the GIL."""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Protocol

import cython

from virtio.errors import RequestError
from virtio.ring.codes import BOUNCED, CONSTANT, IN_PLACE, LOADED, NO_DATA

if not cython.compiled:
    from virtio.ring._mem import (
        Mem,
        load_i32,
        load_u32,
        load_u64,
        null,
        store_i32,
        store_u32,
        window,
    )
    from virtio.ring._os import ticks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio.ring.buffer import Buffer
    from virtio.ring.load import Load
    from virtio.ring.stats import Stats
    from virtio.ring.template import Template

_EINPROGRESS = errno.EINPROGRESS


class Throttle(Protocol):
    """What limits the rate of tasks."""

    def admit(self, task: Task) -> float | None:
        """Raise `task.allowed`; in how many seconds that may be done again, None if all is allowed."""


class Task:
    """`len(offsets)` items of `item_bytes` each, cut into parts of at most `part_bytes`.

    `status` gets one negative errno an item: 0 when done, -EINPROGRESS until then. `base` is where
    in the region the data is (IN_PLACE: item `i` at `base + i * item_bytes`; CONSTANT: always
    there) or where `cells` cells of `part_bytes` are (BOUNCED, from and to `user`; LOADED).
    At most `depth` parts are in flight. `buffers` are held as long as the device may touch them.

    Where there is a `throttle`, it decides how many parts are `allowed`, from 0 on.

    A LOADED one has the offsets of `load`, none of its own, items of one part, and no status; it
    starts nothing more after the load's end, or the first error. `other` is its template of writes, if it
    mixes them with reads; those have as many cells more, behind the others.
    """

    def __init__(
        self,
        template: Template,
        offsets: memoryview,
        item_bytes: int,
        part_bytes: int,
        *,
        mode: int = IN_PLACE,
        base: int = 0,
        user: memoryview | None = None,
        cells: int = 0,
        depth: int = 1 << 16,
        buffers: Sequence[Buffer] = (),
        load: Load | None = None,
        other: Template | None = None,
        stats: Stats | None = None,
    ) -> None:
        items = len(offsets)
        if mode == BOUNCED and user is None:
            raise ValueError("a task with bounce cells and nothing to copy from or to")
        if offsets.itemsize != 8 or not offsets.contiguous:
            raise RequestError("offsets must be contiguous unsigned 64-bit integers")
        if item_bytes <= 0 or part_bytes <= 0 or (mode >= BOUNCED and cells <= 0):
            raise RequestError(f"a task of {item_bytes} bytes in parts of {part_bytes}")
        if user is not None and user.nbytes < items * item_bytes:
            raise RequestError(f"{user.nbytes} bytes for {items} items of {item_bytes}")
        if (load is not None) != (mode == LOADED):
            raise RequestError("a load, and the mode LOADED, need each other")
        self.template = template
        self.other = other or template  # what a load does where it does not read
        self.load: Load = load  # type: ignore[assignment]  # None, but where `mode` is LOADED
        self.stats: Stats = stats  # type: ignore[assignment]  # None, but where `counted`
        self.counted = stats is not None and stats.on
        if load is not None and stats is not None and self.counted:
            load.account(stats)
        self.throttle: Throttle | None = None
        self.allowed = 1 << 62  # parts that may be started; a throttle raises it
        self.buffers = tuple(buffers)
        self.item_bytes, self.part_bytes = item_bytes, part_bytes
        self.parts = -(-item_bytes // part_bytes)
        self.total = items * self.parts if load is None else load.requests
        self.started = self.finished = self.active = 0
        self.status = array("i", [-_EINPROGRESS]) * items
        one = template.data_bytes or part_bytes
        moved = {IN_PLACE: items * item_bytes, CONSTANT: one}.get(mode, cells * part_bytes)
        self.data_end = 0 if template.direction == NO_DATA else base + moved
        self._failed: dict[int, int] = {}
        self._apart = 0  # how far behind the cells of a load's reads those of its writes are
        if load is not None and 0 < load.reads < 100:
            self._apart = cells * part_bytes
            self.data_end += self._apart
        self._mode, self._base, self._depth = mode, base, depth
        self._offsets_view, self._user_view = offsets, user
        self._offsets = window(offsets) if items else null()
        self._user = null() if user is None else window(user)
        self._status = window(self.status) if items else null()
        self._left_array = array("I", [self.parts]) * (items if self.parts > 1 else 0)
        self._left = window(self._left_array) if self._left_array else null()
        self._cell_array = array("Q", [base + cell * part_bytes for cell in range(cells)])
        self._cells = window(self._cell_array) if cells else null()
        self._all_cells = self._free_cells = cells  # in a ring, of which the free ones begin at
        self._first_cell = 0
        self._again_array = array("Q")
        self._again = null()
        self._again_count = 0

    def offset(self, part: int) -> int:
        """The byte on the disk where a part begins."""
        if self.load is not None:
            return self.load.offset(part)
        item = part // self.parts
        return load_u64(self._offsets, 8 * item) + part % self.parts * self.part_bytes

    def fail(self, part: int, code: int) -> bool:
        """Count a part as failed with an errno; true if it is the first by offset of its item."""
        if self.counted:
            self.stats.failed += 1
        if self.load is not None:
            self.load.errors += 1
            self.total = self.started
            self._count()
            return True
        item = part // self.parts
        first = part < self._failed.get(item, self.total)
        if first:
            self._failed[item] = part
            self.status[item] = -code
        self._finish(part, False)
        return first

    def succeed(self, part: int, began: int = 0) -> None:
        """Count a part that came back with a fault as done, as it was none; a load does not time it.

        `began` is as in `Finished`.
        """
        if self.counted:
            writes = self.load is not None and self.load.is_write(part)
            template = self.other if writes else self.template
            nbytes = min(self.part_bytes, self.item_bytes - part % self.parts * self.part_bytes)
            self.stats.count(template.kind, nbytes, began, ticks())
        if self.load is not None:
            self._count()
        else:
            self._finish(part, True)

    def pause(self) -> float | None:
        """Seconds that a load is to wait for answers at most; None where there is no load."""
        return None if self.load is None else self.load.pause(self.started) / 1e9

    def again(self, part: int) -> None:
        """Send a part that came back with a fault once more; for parts of no load."""
        self._again_array = self._again_array[: self._again_count] + array("Q", [part])
        self._again = window(self._again_array)
        self._again_count += 1
        self.active -= 1

    def _finish(self, part: int, good: bool) -> None:
        """One part less to wait for; the last good part of an item makes its status 0."""
        self._count()
        if self.parts == 1:
            if good:
                store_i32(self._status, 4 * part, 0)
            return
        item = part // self.parts
        left = load_u32(self._left, 4 * item) - 1
        store_u32(self._left, 4 * item, left)
        if left == 0 and load_i32(self._status, 4 * item) == -_EINPROGRESS:
            store_i32(self._status, 4 * item, 0)

    def _count(self) -> None:
        self.finished += 1
        self.active -= 1


def first_bad_offset(offsets: memoryview, nbytes: int, grid: int, size: int) -> int:
    """The index of the first of many byte offsets that is off the grid or ends past the disk.

    -1 if there is none. `offsets` are contiguous unsigned 64-bit integers; `nbytes` <= `size`.
    """
    mem = window(offsets)
    return _first_bad(mem, len(offsets), size - nbytes, grid)


def _first_bad(offsets: Mem, count: int, last: int, grid: int) -> int:
    for i in range(count):
        offset = load_u64(offsets, 8 * i)
        if offset > last or offset % grid:
            return i
    return -1
