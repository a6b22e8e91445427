"""C types for buffer.py; all code is there."""

cimport cython

from virtio.ring._mem cimport Mem, Py_buffer, address, expose, null, window
from virtio.ring._os cimport replace_mapping


@cython.final
cdef class Buffer:
    cdef readonly size_t offset, nbytes
    cdef readonly Py_ssize_t exports
    cdef public Py_ssize_t busy
    cdef readonly bint closed
    cdef readonly object pool
    cdef object _view, __weakref__
    cdef Mem _mem
