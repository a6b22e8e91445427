"""How a driver tells the device that buffers are available (2.3, 4.1.5.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import cython

if not cython.compiled:
    from virtio.ring._mem import device_fence, null, store_u16, store_u32, window
    from virtio.ring._os import signal_eventfd, write_at, write_eventfd

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Doorbell:
    """One of four, rung without the GIL as far as it can be:

    - `Doorbell(fd)`: an eventfd, as vhost-user has them;
    - `Doorbell(memory=view, at=offset, value=...)`: a register in mapped memory, which is stored to;
    - `Doorbell(fd, at=offset, value=...)`: a register in a file, as of VFIO or sysfs: `pwrite`;
    - `Doorbell(call=function)`: anything else.

    A register is `width` bytes wide, 2 or 4. Descriptors are their maker's, who closes them once nobody
    can ring any more; memory stays mapped as long as the doorbell lives. The peer shares a kick
    eventfd and may fill its counter, so a full one counts as rung.
    """

    def __init__(
        self,
        fd: int = -1,
        call: Callable[[], None] | None = None,
        *,
        memory: Buffer | None = None,
        at: int = -1,
        value: int = 0,
        width: int = 2,
    ) -> None:
        """ValueError for a register that is unaligned, outside of its memory, or too narrow."""
        if memory is not None and memoryview(memory).readonly:
            raise ValueError("a doorbell in memory that cannot be written")
        self.fd = fd
        self.failure = 0
        self._call = call
        self._owner = None if memory is None else memoryview(memory)
        self._mapped = memory is not None
        self._placed = at >= 0
        if self._mapped or self._placed:
            _check(at, value, width, 1 << 63 if self._owner is None else self._owner.nbytes)
        self._mem = null() if self._owner is None else window(self._owner)
        self._at = max(0, at)
        self._value = value
        self._width = width
        self._begun = self._done = self._seen = 0  # unguarded rings

    def ring(self) -> None:
        """Notify the device; an errno is left in `failure`, for whoever waits to find."""
        if self._mapped:
            device_fence()  # what is in memory goes out before the device is told to look
            if self._width == 2:
                store_u16(self._mem, self._at, self._value)
            else:
                store_u32(self._mem, self._at, self._value)
        elif self._placed:
            self.failure = write_at(self.fd, self._at, self._value, self._width)
        elif self.fd >= 0:
            self.failure = signal_eventfd(self.fd)
        else:
            with cython.gil:
                self._ring_call()

    def ring_unguarded(self) -> None:
        """The same for who has let go of the interpreter: a peer could make this block, see `blocked`.

        It saves the system call that asks whether an eventfd is full.
        """
        if self.fd < 0 or self._placed or self._mapped:
            self.ring()
            return
        self._begun += 1
        self.failure = write_eventfd(self.fd)
        self._done += 1

    def blocked(self) -> bool:
        """Whether the same unguarded ring was under way when this was called last."""
        begun = self._begun
        found = begun != self._done and begun == self._seen
        self._seen = begun
        return bool(found)

    def _ring_call(self) -> None:
        if self._call is not None:
            self._call()


def _check(at: int, value: int, width: int, nbytes: int) -> None:
    if width not in (2, 4) or at < 0 or at % width or at + width > nbytes or value >> 8 * width:
        raise ValueError(f"a doorbell of {width} bytes at {at:#x} of {nbytes:#x}, its value {value:#x}")
