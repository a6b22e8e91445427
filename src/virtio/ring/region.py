"""The memory that a controller shares with its device, and nothing else does."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from virtio.errors import ClosedError, TransportError
from virtio.ring.buffer import Buffer, address_of, substitute

HUGE_PAGE = 2 << 20
_SEALS = 0x1 | 0x2 | 0x4  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW
_ADD_SEALS = 1033  # F_ADD_SEALS; `fcntl` has it by name from 3.12 on


class Mapping(NamedTuple):
    """Where a region is for the device: page number `i` of it is at `table[i]` (an IOVA).

    A region that is contiguous there has one page, of `1 << shift` bytes, and one entry. Pages are of
    4096 bytes or more.
    """

    shift: int
    table: array[int]

    @classmethod
    def contiguous(cls, iova: int) -> Mapping:
        return cls(62, array("Q", [iova]))

    def iova(self, offset: int) -> int:
        """Where the device finds the byte at `offset` of the region."""
        return self.table[offset >> self.shift] + (offset & (1 << self.shift) - 1)


class Region:
    """A sealed memfd mapped into this process: huge pages if there are any, else ordinary ones.

    Owns the file descriptor and the mapping. After `close()` the descriptor is gone; the mapping
    goes with the last view of it. A child of a fork has neither (MADV_DONTFORK, close-on-exec).
    """

    def __init__(self, nbytes: int, *, must_be_huge: bool = False) -> None:
        """TransportError if there is no such memory."""
        self.size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE
        try:
            self.fd, memory, self.huge = _map(self.size, (True,) if must_be_huge else (True, False))
        except OSError as error:
            if must_be_huge:
                raise self._no_huge_pages(error) from error
            raise self._unmappable(error) from error
        self.view = memoryview(memory)
        _mapped.add(memory)
        self.address = address_of(self.view)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def renew(self) -> None:
        """Put the same bytes in a memfd of their own, at the same addresses.

        Whoever has the old one, a back end that hangs, keeps it as it is: what it was to write is right, and
        what it reads nobody sees. No thread runs Python code meanwhile; one that fills a buffer without
        the interpreter's lock at this moment (`readinto`) may lose that. TransportError if there is no
        memory for it.
        """
        try:
            fd, memory, huge = _map(self.size, (True, False))
        except OSError as error:
            raise self._unmappable(error) from error
        try:
            with memory, memoryview(memory) as fresh:
                substitute(self.view, self.fd, fresh, fd)
        except OSError as error:
            os.close(fd)
            raise self._unmappable(error) from error
        os.close(self.fd)
        self.fd, self.huge = fd, huge

    def _unmappable(self, error: OSError) -> TransportError:
        return TransportError(
            error.errno or errno.ENOMEM,
            f"cannot map {self.size >> 20} MiB of shared memory: {error.strerror or error}; "
            "see `ulimit -v`, `ulimit -n`, /proc/meminfo and the memory control group",
        )

    def _no_huge_pages(self, error: OSError) -> TransportError:
        pages = self.size // HUGE_PAGE
        return TransportError(
            error.errno or errno.ENOMEM,
            f"no {pages} huge pages of {HUGE_PAGE >> 20} MiB are free: {error.strerror or error}; try "
            f"`sysctl vm.nr_hugepages={max(32, pages)}` as root",
        )

    def close(self) -> None:
        """Close the descriptor and drop the mapping; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self.view = memoryview(b"")


_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_inherited: list[mmap.mmap] = []


def _after_fork_in_child() -> None:
    """The child does not have those mappings (MADV_DONTFORK), and must not unmap what takes their place."""
    _inherited.extend(_mapped)


os.register_at_fork(after_in_child=_after_fork_in_child)


def _map(nbytes: int, kinds: Sequence[bool]) -> tuple[int, mmap.mmap, bool]:
    """A sealed memfd mapped: of huge pages, or not, whichever of these can be had first."""
    for huge in kinds:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if huge else 0)
        try:
            fd = os.memfd_create("virtio-bdev", flags)
        except OSError:
            if huge is not kinds[-1]:
                continue
            raise
        try:
            os.ftruncate(fd, nbytes)
            populate = mmap.MAP_POPULATE if huge else 0  # a page that is not there would be SIGBUS
            memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED | populate)
            memory.madvise(mmap.MADV_DONTFORK)
            fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
        except OSError:
            os.close(fd)
            if huge is kinds[-1]:
                raise
        else:
            return fd, memory, huge
    raise AssertionError("unreachable")


class Pool:
    """Lends out the bytes of one region; first fit, for set-up and buffers, not for requests.

    Where the device has it in pages of `page` bytes, what fits in one straddles none, and what does not
    begins with one.
    """

    def __init__(self, region: Region, page: int = 1 << 62) -> None:
        self.region = region
        self.page = page
        self._lock = threading.Lock()
        self._free = [(0, region.size)]  # (offset, end), sorted, never adjacent
        self._returned: deque[tuple[int, int]] = deque()  # a collector may return one at any moment

    @property
    def free_bytes(self) -> int:
        """How many bytes are not lent, in however many pieces."""
        with self._lock:
            self._merge()
            return sum(end - offset for offset, end in self._free)

    def take(self, nbytes: int, align: int = 4096) -> Buffer:
        """A buffer of `nbytes`, zeroed or not; TransportError(ENOMEM) when none is left."""
        if nbytes <= 0:
            raise ValueError(f"a buffer of {nbytes} bytes")
        if self.region.fd < 0:
            raise ClosedError("the controller of this memory was closed")
        with self._lock:
            self._merge()
            for i, (start, end) in enumerate(self._free):
                offset = -(-start // align) * align
                if offset // self.page != (offset + nbytes - 1) // self.page:
                    offset = -(-offset // self.page) * self.page
                if offset + _room(nbytes) <= end:
                    pieces = [(start, offset), (offset + _room(nbytes), end)]
                    self._free[i : i + 1] = [piece for piece in pieces if piece[0] < piece[1]]
                    break
            else:
                raise TransportError(
                    errno.ENOMEM,
                    f"no {nbytes} bytes in one piece left of the pool's {self.region.size}: close "
                    "buffers that are not needed",
                )
        return Buffer(self.region.view[offset : offset + nbytes], offset, self)

    def give_back(self, buffer: Buffer) -> None:
        """Take the bytes of a buffer that closes; for `Buffer` to call, from anywhere."""
        self._returned.append((buffer.offset, buffer.offset + _room(buffer.nbytes)))

    def _merge(self) -> None:
        """Put what was returned between its neighbours."""
        while self._returned:
            pieces = sorted([*self._free, self._returned.popleft()])
            merged = pieces[:1]
            for piece in pieces[1:]:
                if piece[0] == merged[-1][1]:
                    merged[-1] = (merged[-1][0], piece[1])
                else:
                    merged.append(piece)
            self._free = merged


def _room(nbytes: int) -> int:
    """No two buffers share a cache line."""
    return -(-nbytes // 64) * 64
