"""C types for doorbell.py; all code is there."""

cimport cython
from libc.stdint cimport uint64_t

from virtio.ring._mem cimport Mem, device_fence, null, store_u16, store_u32, window
from virtio.ring._os cimport signal_eventfd, write_at, write_eventfd


@cython.final
cdef class Doorbell:
    cdef readonly int fd, failure
    cdef object _call, _owner
    cdef Mem _mem
    cdef bint _mapped
    cdef uint64_t _at
    cdef bint _placed
    cdef unsigned int _value
    cdef int _width
    cdef uint64_t _begun, _done, _seen
    cpdef void ring(self) noexcept nogil
    cpdef void ring_unguarded(self) noexcept nogil
