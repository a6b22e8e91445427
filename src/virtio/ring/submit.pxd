"""C types for submit.py; all code is there."""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t

from virtio.ring._mem cimport load_acquire_u32, load_u16, load_u32, load_u64, store_u32, store_u64
from virtio.ring._os cimport ticks
from virtio.ring.buffer cimport Buffer
from virtio.ring.codes cimport *
from virtio.ring.requests cimport RequestQueue
from virtio.ring.stats cimport Stats
from virtio.ring.template cimport Template


@cython.final
cdef class Geometry:
    cdef public int64_t size, block_size, max_transfer
    cdef public bint read_only, online, limited
    cdef public Template read, write


@cython.final
cdef class Budget:
    cdef public int64_t depth, in_flight
    cdef object __weakref__


cdef class Submitter:
    cdef readonly RequestQueue queue
    cdef readonly uint32_t owner, own
    cdef readonly Geometry geometry
    cdef readonly Budget budget
    cdef readonly Stats stats
    cdef public object _pool, _done, _later, _error
    cdef public dict _tries

    @cython.locals(queue=RequestQueue)
    cdef int _begin(self) except -1
    @cython.locals(geometry=Geometry, room=int64_t)
    cdef bint _is_plain(self, Template template, int64_t offset, Buffer buffer, int64_t at, int64_t nbytes)
    @cython.locals(queue=RequestQueue, slot=int, record=size_t, done=bint)
    cpdef int attempt(self, Template template, int64_t offset, Buffer buffer, int64_t nbytes,
                      uint64_t spin_ns) except -2
    cdef int _close(self, uint32_t slot) except -1
    @cython.locals(queue=RequestQueue, slot=uint32_t, whose=uint32_t)
    cpdef object answer(self)
    cpdef void credit(self, Template template, uint64_t nbytes, uint64_t began)
    @cython.locals(queue=RequestQueue)
    cpdef give_up(self)
    cpdef bint submit(self, Template template, int64_t offset, Buffer buffer, int64_t at, int64_t nbytes,
                      uint64_t token) except -1
    @cython.locals(sent=bint, began=uint64_t)
    cdef bint _send(self, Template template, int64_t offset, int64_t nbytes, int64_t data, uint64_t token,
                    Buffer buffer) except -1
    cpdef bint submit_plain(self, Template template, int64_t offset, int64_t nbytes, int64_t most,
                            int64_t data, uint64_t token) except -1
    cdef _settle_renounced(self)
    @cython.locals(found=bint)
    cpdef bint cancel(self, uint64_t token) except -1
    @cython.locals(queue=RequestQueue, slot=uint32_t)
    cdef bint _unsend(self, uint64_t token) except -1
    cdef bint _judged(self, uint32_t slot, list completions) except -1
    cpdef list poll(self, int64_t limit=*)
    @cython.locals(queue=RequestQueue, completions=list, slot=uint32_t, whose=uint32_t, token=uint64_t,
                   now=uint64_t, full=bint, passed=bint)
    cdef list _poll(self, int64_t limit)
    @cython.locals(record=size_t)
    cdef void _count(self, uint32_t slot, uint64_t now) noexcept
    @cython.locals(queue=RequestQueue)
    cpdef bint arm(self) except -1
