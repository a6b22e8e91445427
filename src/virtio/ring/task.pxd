"""C types for task.py; all code is there."""

cimport cython
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from virtio.ring._mem cimport (
    Mem,
    load_i32,
    load_u32,
    load_u64,
    null,
    store_i32,
    store_u32,
    window,
)
from virtio.ring._os cimport ticks
from virtio.ring.load cimport Load
from virtio.ring.stats cimport Stats
from virtio.ring.template cimport Template

cdef int32_t _EINPROGRESS


@cython.locals(i=int64_t, offset=uint64_t)
cdef int64_t _first_bad(Mem offsets, int64_t count, uint64_t last, uint64_t grid) noexcept nogil


@cython.final
cdef class Task:
    cdef readonly Template template, other
    cdef readonly Load load
    cdef readonly Stats stats
    cdef readonly bint counted
    cdef public object throttle
    cdef public uint64_t allowed
    cdef readonly object buffers, status
    cdef readonly object data_end
    cdef readonly uint64_t item_bytes, part_bytes, parts, total, started, finished, active
    cdef object _offsets_view, _user_view, _left_array, _cell_array
    cdef dict _failed
    cdef Mem _offsets, _user, _status, _left, _cells
    cdef int _mode
    cdef uint64_t _base, _depth, _apart
    cdef object _again_array
    cdef Mem _again
    cdef uint32_t _all_cells, _free_cells, _first_cell, _again_count

    @cython.locals(item=uint64_t, left=uint32_t)
    cdef void _finish(self, uint64_t part, bint good) noexcept nogil
    cdef void _count(self) noexcept nogil
