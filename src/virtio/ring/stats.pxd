"""C types for stats.py; all code is there."""

cimport cython
from libc.stdint cimport uint64_t

from virtio.ring._bits cimport bit_length
from virtio.ring._mem cimport (
    Mem,
    fill,
    load_acquire_u32,
    load_u64,
    null,
    store_release_u32,
    store_u64,
    window,
)
from virtio.ring._os cimport now_ns, ticks

cdef int _GRANULARITY
cdef int _FIELDS
cdef uint64_t _NEVER
cdef size_t _OPS, _BYTES, _TOTAL, _MAX, _MIN, _BYTES_OF_KIND, _LINE, _KEPT


@cython.final
cdef class Stats:
    cdef public bint on
    cdef public uint64_t failed
    cdef object _array, _buckets_array
    cdef Mem _counts, _buckets

    cpdef void count(self, int kind, uint64_t nbytes, uint64_t began, uint64_t now) noexcept nogil
    @cython.locals(at=size_t, bucket=size_t)
    cpdef void add(self, int kind, uint64_t nbytes, uint64_t took) noexcept nogil


@cython.locals(bits=int, shift=int)
cdef uint64_t _bucket(uint64_t value) noexcept nogil
