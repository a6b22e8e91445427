"""C types for gather.py; all code is there."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t

from virtio.ring._os cimport now_ns

cdef uint32_t _TRIAL, _HELD, _HELD_NO
cdef uint64_t _EPOCH, _TOLERANCE, _FRACTION, _REST_NS, _REST_MOST


@cython.final
cdef class Gathering:
    cdef readonly bint on
    cdef readonly uint64_t rests
    cdef uint32_t _epochs
    cdef uint64_t _done, _since, _with, _without

    cpdef void begin(self, uint64_t now) noexcept nogil
    cpdef void count(self, uint64_t done) noexcept nogil
    @cython.locals(took=uint64_t)
    cpdef void end_epoch(self, uint64_t now) noexcept nogil
    cdef void _try(self) noexcept nogil
