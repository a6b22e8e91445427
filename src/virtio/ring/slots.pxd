"""C types for slots.py; all code is there."""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from virtio.ring._mem cimport (
    Mem,
    copy,
    fill,
    load_acquire_u32,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    store_field,
    store_release_u32,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
    window,
)
from virtio.ring._os cimport now_ns, relax, sleep_on, ticks
from virtio.ring._vring cimport *
from virtio.ring.codes cimport *
from virtio.ring.doorbell cimport Doorbell
from virtio.ring.gather cimport Gathering
from virtio.ring.packed cimport PackedRing
from virtio.ring.split cimport SplitRing
from virtio.ring.task cimport Task
from virtio.ring.template cimport Template

cdef int _WRITES
cdef uint32_t _CLOCK_EVERY, _ROUNDS, _EAGER, _RESTING, _REST_BITS, _REST_MOST
cdef int _AT_ONCE, _ALL
cdef uint32_t _QUIET, _GATHER_FROM
cdef uint64_t _MOMENT


cdef class Slots:
    cdef readonly object ring
    cdef SplitRing _split
    cdef PackedRing _packed
    cdef readonly uint32_t slots, segments, orphans, orphan_changes
    cdef readonly uint64_t segment_bytes
    cdef readonly bint indirect, packed
    cdef public bint broken, taken, entered, woken, renounced
    cdef public uint32_t awaited
    cdef list _kept, _renounced
    cdef object _buffer, _layout, _region_view, _table_array
    cdef object _records_owner, _free_array, _faults_array, _ended_array, _early_array, _stop_owner
    cdef Doorbell _doorbell
    cdef readonly Gathering gathering
    cdef Task _nothing
    cdef object _places_array
    cdef Mem _places
    cdef Mem _region, _iovas, _records, _free, _faults, _ended, _early, _stop
    cdef int _shift, _wake_fd, _end_fd
    cdef readonly uint32_t number
    cdef uint64_t _page_mask, _sequence, _now
    cdef size_t _slots_at, _stride, _payload_at, _table_at, _result_at, _response_bytes
    cdef bint _result_wide, _response_first, _at_work
    cdef uint64_t _result_mask
    cdef uint32_t _free_first, _unused
    cdef uint32_t _chain, _free_count, _fault_count, _ended_first, _ended_count, _early_count

    @cython.locals(spins=uint32_t, begun=uint64_t, record=size_t)
    cdef bint await_slot(self, uint32_t slot, uint64_t spin_ns) noexcept nogil
    cdef uint32_t _next_ended(self) noexcept nogil
    @cython.locals(last=uint32_t)
    cdef void _put_ended(self, uint32_t slot) noexcept nogil
    @cython.locals(begun=uint64_t, busy=uint64_t, now=uint64_t, spins=uint32_t, rounds=uint32_t,
                   patience=uint64_t, filled=int, got=int, began=uint64_t, timed=bint,
                   left=uint64_t, pause=uint64_t, slept=int, in_vain=uint32_t, rests=uint32_t,
                   due=uint32_t, most=uint64_t, paced=bint, tries=bint, yields=bint, gathers=bint)
    cdef int _run(self, Task task, uint64_t slice_ns, uint64_t spin_ns) noexcept nogil
    @cython.locals(count=int, limit=int, started=int, rung=bint)
    cdef int _feed(self, Task task) noexcept nogil
    @cython.locals(count=int, part=uint64_t, item=uint64_t, within=uint64_t, nbytes=uint64_t,
                   place=uint64_t, data=uint64_t, offset=uint64_t, slot=int, now=uint64_t)
    cdef int _fill(self, Task task, int limit) noexcept nogil
    @cython.locals(room=uint64_t, ripe=uint64_t, part=uint64_t, data=uint64_t, place=uint64_t, slot=int)
    cdef int _fill_load(self, Task task, uint64_t limit) noexcept nogil
    @cython.locals(moved=uint64_t, slot=uint32_t, record=size_t, base=size_t, header=size_t, same=bint, i=int,
                   patch=size_t, within=size_t,
                   source=int, value=uint64_t, key=uint32_t, laid=int)
    cdef int _start(self, Template template, uint64_t offset, uint64_t nbytes, uint64_t data,
                    uint64_t token, uint32_t state) noexcept nogil
    @cython.locals(count=uint32_t, total=uint32_t, index=uint32_t, place=uint64_t, left=uint64_t,
                   size=uint64_t, flags=int, table=uint64_t, header=size_t, payload=size_t)
    cdef int _lay_out(self, uint32_t slot, size_t base, Template template, uint64_t data,
                      uint64_t nbytes) noexcept nogil
    @cython.locals(index=uint32_t, address=uint64_t)
    cdef void _move_data(self, uint32_t slot, size_t base, Template template,
                         uint64_t data) noexcept nogil
    cdef void _describe_response(self, uint32_t slot, size_t base, uint32_t index,
                                 uint32_t total) noexcept nogil
    @cython.locals(address=uint64_t, entry=size_t, first=uint32_t, following=uint32_t)
    cdef void _describe(self, uint32_t slot, size_t base, uint32_t index, uint32_t total,
                        uint64_t place, uint32_t nbytes, int flags) noexcept nogil
    cdef void _describe_ring(
        self, uint32_t index, uint64_t address, uint32_t length, uint16_t flags, uint16_t following
    ) noexcept nogil
    cdef void _redirect(self, uint32_t index, uint64_t address) noexcept nogil
    @cython.locals(head=uint32_t)
    cdef void _offer(self, uint32_t slot) noexcept nogil
    @cython.locals(wanted=bint)
    cdef bint _publish(self) noexcept nogil
    @cython.locals(quiet=bint)
    cdef bint _arm(self) noexcept nogil
    cdef void _disarm(self) noexcept nogil
    @cython.locals(slept=int)
    cdef int _sleep(self, uint64_t ns) noexcept nogil
    @cython.locals(head=int)
    cdef int _reap(self) noexcept nogil
    @cython.locals(ready=uint32_t)
    cdef uint32_t _ready(self) noexcept nogil
    cdef uint64_t _iova(self, uint64_t place) noexcept nogil
    @cython.locals(size=uint64_t)
    cdef uint64_t _segment(self, uint64_t place, uint64_t nbytes) noexcept nogil
    @cython.locals(count=uint32_t, most=uint32_t, head=int, slot=uint32_t, record=size_t, result=uint64_t,
                   state=uint32_t, last=uint32_t)
    cdef int _collect(self, Task task) noexcept nogil
    @cython.locals(place=size_t, result=uint64_t)
    cdef uint64_t _result(self, uint32_t slot) noexcept nogil
    @cython.locals(began=uint64_t, nbytes=uint64_t, write=bint)
    cdef void _complete(self, Task task, size_t record) noexcept nogil
    @cython.locals(part=uint64_t, data=uint64_t, item=uint64_t, place=uint64_t, last=uint32_t)
    cdef void _deliver(self, Task task, size_t record) noexcept nogil
    @cython.locals(data=uint64_t)
    cdef uint64_t _take_cell(self, Task task) noexcept nogil
    cdef void _start_over(self) noexcept nogil
    cdef uint32_t _next_free(self) noexcept nogil
    cdef void _take_next_free(self) noexcept nogil
    @cython.locals(last=uint32_t)
    cdef void _release(self, uint32_t slot) noexcept nogil
    cdef size_t _header(self, uint32_t slot) noexcept nogil
    cdef size_t _response(self, uint32_t slot) noexcept nogil
    cdef void _poison(self, uint32_t slot) noexcept nogil
