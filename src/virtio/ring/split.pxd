"""C types for split.py; all code is there."""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from virtio.ring._mem cimport (
    Mem,
    fill,
    full_fence,
    load_acquire_u16,
    load_u8,
    load_u16,
    load_u32,
    store_release_u16,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
    window,
)
from virtio.ring._vring cimport *


@cython.final
cdef class SplitRing:
    cdef readonly uint32_t size, used_length
    cdef readonly bint event_idx
    cdef object _view, _heads
    cdef Mem _mem, _given
    cdef size_t _avail, _used
    cdef uint32_t _mask
    cdef uint16_t _avail_idx, _published, _used_idx, _seen_idx

    cpdef uint32_t outstanding(self) noexcept nogil
    @cython.locals(descriptor=size_t)
    cpdef void describe(
        self, uint32_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t following
    ) noexcept nogil
    cpdef void redirect(self, uint32_t index, uint64_t address) noexcept nogil
    @cython.locals(slot=uint32_t)
    cpdef void offer(self, uint16_t head) noexcept nogil
    @cython.locals(old=uint16_t, event=uint16_t, passed=uint16_t)
    cpdef bint publish(self) noexcept nogil
    cpdef uint32_t ready(self) noexcept nogil
    @cython.locals(pending=uint16_t, element=size_t, head=uint32_t)
    cpdef int reap(self) noexcept nogil
    cpdef bint arm(self) noexcept nogil
    cpdef void disarm(self) noexcept nogil
