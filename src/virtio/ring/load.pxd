"""C types for load.py; all code is there."""

cimport cython
from libc.stdint cimport uint64_t

from virtio.ring._bits cimport bit_length, mix, scale, whole
from virtio.ring._mem cimport Mem, fill, load_u64, store_u64, window
from virtio.ring._os cimport ticks
from virtio.ring.skew cimport Skew
from virtio.ring.stats cimport Stats

cdef uint64_t _LAST, _SEVERAL, _GAMMA, _FRACTION, _HELD, _HEED_NS
cdef int _SUB_BITS, _EXACT, _BUCKETS, _READ, _WRITE


@cython.final
cdef class Histogram:
    cdef readonly uint64_t count, total, maximum
    cdef uint64_t _least
    cdef double _squares
    cdef object _owner
    cdef Mem _counts

    @cython.locals(index=uint64_t, bits=int)
    cpdef void record(self, uint64_t value) noexcept nogil
    cpdef void clear(self) noexcept nogil
    @cython.locals(index=int, count=uint64_t)
    cpdef add(self, Histogram other)
    @cython.locals(index=int, count=uint64_t, shift=int, low=uint64_t, width=uint64_t)
    cpdef list buckets(self)


@cython.final
cdef class Load:
    cdef readonly uint64_t nbytes, requests, begun, now, deadline, ended
    cdef readonly int reads
    cdef readonly Histogram latency, written
    cdef public uint64_t errors, busy
    cdef readonly uint64_t batch
    cdef readonly bint paced, timed
    cdef Skew _skew
    cdef uint64_t _from, _ripe, _due
    cdef double _interval
    cdef uint64_t _blocks, _runtime, _seed, _base, _ramp
    cdef bint _random, _entered, _fresh, _stopped
    cdef uint64_t _rate, _ns_of_tick
    cdef Stats _stats
    cdef object _took_owner
    cdef Mem _took
    cdef uint64_t _held

    @cython.locals(block=uint64_t)
    cpdef uint64_t offset(self, uint64_t number) noexcept nogil
    @cython.locals(mixed=uint64_t)
    cpdef bint is_write(self, uint64_t number) noexcept nogil
    cdef uint64_t _ns(self, uint64_t passed) noexcept nogil
    cpdef void enter(self) noexcept nogil
    cpdef uint64_t ripe(self) noexcept nogil
    @cython.locals(until=uint64_t, left=uint64_t)
    cpdef uint64_t pause(self, uint64_t started) noexcept nogil
    cpdef bint begin(self, uint64_t count) noexcept nogil
    @cython.locals(took=uint64_t)
    cpdef void complete(self, uint64_t began, bint write) noexcept nogil
    @cython.locals(index=uint64_t, took=uint64_t, written=bint)
    cpdef void settle(self) noexcept nogil
