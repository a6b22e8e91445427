"""DMA memory in a user's hands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cython

from virtio.errors import ClosedError

if not cython.compiled:
    from virtio.ring._mem import Py_buffer, address, expose, null, window
    from virtio.ring._os import replace_mapping

if TYPE_CHECKING:
    from virtio.ring.region import Pool


class Buffer:
    """Bytes of a region, lent by a pool; supports the buffer protocol (`memoryview`, NumPy).

    `offset` is where the bytes lie in their region. `exports` counts the views that live, and
    `busy` the requests in flight that use it. Closing a viewed one raises BufferError, unless an
    exception passes through its `with` block, whose traceback may well hold the view; the bytes go
    back when the last view and the last request have. It stays readable as long as a view lives,
    whatever becomes of its controller.
    """

    def __init__(self, view: memoryview, offset: int, pool: Pool) -> None:
        self.offset = offset
        self.nbytes = len(view)
        self.exports = 0
        self.busy = 0
        self.closed = False
        self.pool = pool
        self._view = view
        self._mem = window(view)

    def close(self) -> None:
        """Give the bytes back to the pool; idempotent."""
        if self.closed:
            return
        if self.exports:
            raise BufferError(f"{self.exports} views of this buffer are still alive")
        self.closed = True
        self._give_back()

    def _give_back(self) -> None:
        """To the pool, once it is closed and nobody uses it any more."""
        if self.closed and not self.exports and not self.busy:
            self.pool.give_back(self)
            self._view = memoryview(b"")  # a handle that is kept keeps no memory mapped
            self._mem = null()

    def hold(self) -> None:
        """A request in flight uses these bytes from now on."""
        self.check()
        self.busy += 1

    def let_go(self) -> None:
        """The device is done with what `hold` announced."""
        self.busy -= 1
        self._give_back()

    def check(self) -> None:
        """Raise ClosedError if this buffer was closed."""
        if self.closed:
            raise ClosedError("this buffer was closed")

    def __del__(self) -> None:
        if not self.closed:  # dropped without it: nobody can use these bytes any more
            self.closed = True
            self._give_back()

    def view(self) -> memoryview:
        """The bytes, for this library's own use: not counted in `exports`."""
        self.check()
        return self._view

    def __len__(self) -> int:
        return self.nbytes

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None or not self.exports:
            self.close()
        self.closed = True

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.exports} views, {self.busy} in flight"
        return f"<Buffer {self.nbytes} bytes at {self.offset:#x}, {state}>"

    # The buffer protocol: the C form when compiled, the Python form (3.12) when interpreted.

    @cython.annotation_typing(True)  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def __getbuffer__(self, buffer: cython.pointer[Py_buffer], flags: cython.int) -> None:
        self.check()
        expose(buffer, self, self._mem, flags)  # type: ignore[arg-type]
        self.exports += 1

    @cython.annotation_typing(True)  # type: ignore[no-untyped-call,untyped-decorator,unused-ignore]
    def __releasebuffer__(self, buffer: cython.pointer[Py_buffer]) -> None:
        self.exports -= 1
        self._give_back()

    def __buffer__(self, flags: int) -> memoryview:
        self.check()
        self.exports += 1
        return self._view[:]

    def __release_buffer__(self, view: memoryview) -> None:
        view.release()
        self.exports -= 1
        self._give_back()


def address_of(view: memoryview) -> int:
    """Where a view's bytes begin in this process."""
    return int(address(window(view)))


def substitute(view: memoryview, fd: int, fresh: memoryview, fresh_fd: int) -> None:
    """Copy what is in a mapped memfd to another one, mapped as `fresh`, and map that where `view` is.

    No other thread of the interpreter runs in between. OSError if it cannot be mapped there.
    """
    code = replace_mapping(window(view), fd, window(fresh), fresh_fd)
    if code:
        raise OSError(code, os.strerror(code))
