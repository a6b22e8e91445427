"""C types for packed.py; all code is there."""

cimport cython
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from virtio.ring._mem cimport (
    Mem,
    fill,
    full_fence,
    load_acquire_u16,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    store_release_u16,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
    window,
)
from virtio.ring._vring cimport *


@cython.final
cdef class PackedRing:
    cdef readonly uint32_t size, used_length
    cdef readonly bint event_idx
    cdef object _view, _heads
    cdef Mem _mem, _given
    cdef object _table_owner, _counts_owner
    cdef Mem _table, _counts
    cdef size_t _driver, _device
    cdef uint32_t _next, _used, _outstanding, _first, _offered
    cdef uint16_t _bits, _first_flags
    cdef bint _used_wrap

    cpdef uint32_t outstanding(self) noexcept nogil
    @cython.locals(descriptor=size_t)
    cpdef void describe(
        self, uint32_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t following
    ) noexcept nogil
    cpdef void redirect(self, uint32_t index, uint64_t address) noexcept nogil
    @cython.locals(
        first=uint32_t, at=uint32_t, first_bits=uint16_t, bits=uint16_t, index=uint32_t, count=uint16_t,
        source=size_t, place=size_t, flags=uint16_t
    )
    cpdef void offer(self, uint16_t head) noexcept nogil
    @cython.locals(count=int32_t, wish=uint32_t, wants=uint16_t, lap=uint16_t, event=int32_t, passed=int32_t)
    cpdef bint publish(self) noexcept nogil
    @cython.locals(place=size_t, flags=uint16_t, head=uint32_t)
    cpdef int reap(self) noexcept nogil
    @cython.locals(flags=uint16_t, both=uint16_t)
    cpdef bint arm(self) noexcept nogil
    cpdef void disarm(self) noexcept nogil
