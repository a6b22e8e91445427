"""C types for template.py; all code is there."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t

from virtio.ring._mem cimport Mem, null, window


@cython.final
cdef class Template:
    cdef readonly uint32_t key, request_bytes, payload_bytes
    cdef readonly uint64_t data_bytes
    cdef readonly bint transfer, changes
    cdef readonly int direction, kind
    cdef object _bytes, _patches
    cdef Mem _mem, _patch
    cdef int _patch_count
