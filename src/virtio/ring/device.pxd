"""C types for device.py; all code is there."""

cimport cython
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

from virtio.ring._mem cimport (
    Mem,
    full_fence,
    load_acquire_u16,
    load_u16,
    load_u32,
    load_u64,
    null,
    store_release_u16,
    store_u16,
    store_u32,
    store_u64,
    window,
)
from virtio.ring._os cimport signal_eventfd
from virtio.ring._vring cimport *

cdef size_t _SPAN, _PIECE
cdef uint64_t _MOST_BYTES
cdef int _JUMP, _INDEX, _LOOP, _NESTED, _TABLE, _ZERO, _ORDER, _UNMAPPED, _PIECES, _LONG, _TORN, _BUFFER


@cython.final
cdef class GuestMemory:
    cdef readonly int count
    cdef readonly uint64_t offset, room
    cdef Mem _table
    cdef Mem[64] _windows  # SLOTS
    cdef object _spans, _views

    @cython.locals(index=int, start=uint64_t, size=uint64_t)
    cpdef int locate(self, uint64_t address) noexcept nogil


@cython.final
cdef class DeviceRing:
    cdef readonly uint32_t size, head
    cdef readonly uint64_t readable, writable
    cdef readonly bint event_idx, indirect, packed
    cdef public int call_fd
    cdef GuestMemory _memory
    cdef object _areas, _pieces
    cdef Mem _desc, _avail, _used, _chain
    cdef uint32_t _mask, _count, _split, _most
    cdef uint64_t _what
    cdef int _why
    cdef bint _attached
    cdef uint16_t _avail_idx, _used_idx, _told
    cdef object _list_owner, _lengths_owner
    cdef dict _held
    cdef Mem _list, _lengths
    cdef uint32_t _at, _used_at, _lap, _used_lap, _taken, _fresh

    @cython.locals(flags=uint16_t)
    cdef bint _is_available(self, uint32_t at, uint32_t lap) noexcept nogil
    @cython.locals(at=uint32_t, lap=uint32_t, place=size_t, head=uint32_t)
    cdef int _pop_packed(self) noexcept nogil
    @cython.locals(place=size_t, flags=uint16_t, length=uint32_t)
    cdef void _push_packed(self, uint32_t head, uint32_t written) noexcept nogil
    @cython.locals(count=int32_t, wish=uint32_t, wants=uint16_t, event=int32_t, passed=int32_t)
    cdef bint _is_called(self) noexcept nogil

    @cython.locals(pending=uint16_t, head=uint16_t)
    cpdef int pop(self) noexcept nogil
    cpdef int again(self, uint32_t head) except -3
    @cython.locals(
        table=Mem, base=uint64_t, at=uint64_t, index=uint32_t, count=uint32_t, left=uint32_t,
        nested=bint, address=uint64_t, length=uint32_t, flags=uint16_t, following=uint16_t,
        region=int, taken=uint32_t, piece=size_t,
    )
    cdef int _walk(self, uint32_t head) noexcept nogil
    cdef int _refuse(self, int why, uint64_t what) noexcept nogil
    @cython.locals(length=uint64_t, taken=uint64_t, at=uint64_t, region=uint32_t)
    cdef list _views(self, uint32_t index, uint32_t end, uint64_t skip, uint64_t nbytes)
    cpdef list readable_views(self, uint64_t skip, uint64_t nbytes)
    cpdef list writable_views(self, uint64_t skip, uint64_t nbytes)
    @cython.locals(element=size_t)
    cpdef void push(self, uint32_t head, uint32_t written) noexcept nogil
    @cython.locals(old=uint16_t, event=uint16_t, passed=uint16_t, wanted=bint)
    cpdef int notify(self) noexcept nogil
    cpdef bint arm(self) noexcept nogil
    cpdef void disarm(self) noexcept nogil
