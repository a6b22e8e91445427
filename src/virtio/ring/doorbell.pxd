"""C types for doorbell.py; all code is there."""

cimport cython

from virtio.ring._os cimport signal_eventfd


@cython.final
cdef class Doorbell:
    cdef readonly int fd, failure
    cdef object _call
    cpdef void ring(self) noexcept nogil
