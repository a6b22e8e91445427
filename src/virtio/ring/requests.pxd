"""C types for requests.py; all code is there."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t

from virtio.ring._mem cimport load_u16, load_u32, load_u64, null, store_u16, store_u32, store_u64
from virtio.ring.codes cimport *
from virtio.ring.doorbell cimport Doorbell
from virtio.ring.slots cimport Slots
from virtio.ring.task cimport Task
from virtio.ring.template cimport Template


@cython.final
cdef class RequestQueue(Slots):
    cpdef void kick(self) noexcept
    cpdef void look(self) noexcept
    @cython.locals(reason=int)
    cpdef int run(self, Task task, uint64_t slice_ns, uint64_t spin_ns) noexcept
    @cython.locals(slot=int)
    cpdef bint submit(self, Template template, uint64_t offset, uint64_t nbytes, uint64_t data,
                      uint64_t token, uint32_t owner=*, kept=*, uint64_t began=*) except -1
    cpdef _lose_orphan(self, uint32_t slot)
    cpdef _let_go(self, uint32_t slot)
    cpdef drop(self, uint32_t slot)
    cpdef settle_renounced(self)
    cdef void _orphan(self, uint32_t slot) noexcept nogil
    @cython.locals(slot=uint32_t, record=size_t)
    cpdef bint forsake(self, uint32_t owner, uint64_t token) noexcept
    @cython.locals(slot=uint32_t, record=size_t, begin=uint64_t)
    cpdef bint overlaps_orphan(self, uint64_t offset, uint64_t nbytes) noexcept
    cdef object _take(self, uint32_t slot)
    @cython.locals(record=size_t, begin=size_t)
    cpdef object _report(self, uint32_t slot)
    cpdef void again(self, uint32_t slot) noexcept
