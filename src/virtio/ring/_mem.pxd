"""Loads, stores, fences and copies on raw memory; `_mem.py` is the interpreted twin.

In a checked build every access past the end of its window aborts the process.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE, Py_buffer, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    typedef struct { char *base; size_t size; } vr_mem;
    #ifdef VIRTIO_CHECKED
    static inline char *vr_at(vr_mem m, size_t o, size_t n) {
        if (o > m.size || n > m.size - o) {
            fprintf(stderr, "virtio: access of %zu bytes at %zu in a window of %zu\\n", n, o, m.size);
            abort();
        }
        return m.base + o;
    }
    #else
    #define vr_at(m, o, n) ((m).base + (o))
    #endif
    #define VR(T, m, o) ((T *)vr_at(m, o, sizeof(T)))
    static inline uint8_t vr_ld8(vr_mem m, size_t o) { return *VR(const volatile uint8_t, m, o); }
    static inline uint16_t vr_ld16(vr_mem m, size_t o) { return *VR(const volatile uint16_t, m, o); }
    static inline uint32_t vr_ld32(vr_mem m, size_t o) { return *VR(const volatile uint32_t, m, o); }
    static inline int32_t vr_ldi32(vr_mem m, size_t o) { return *VR(const volatile int32_t, m, o); }
    static inline uint64_t vr_ld64(vr_mem m, size_t o) { return *VR(const volatile uint64_t, m, o); }
    static inline void vr_st8(vr_mem m, size_t o, uint8_t v) { *VR(volatile uint8_t, m, o) = v; }
    static inline void vr_st16(vr_mem m, size_t o, uint16_t v) { *VR(volatile uint16_t, m, o) = v; }
    static inline void vr_st32(vr_mem m, size_t o, uint32_t v) { *VR(volatile uint32_t, m, o) = v; }
    static inline void vr_sti32(vr_mem m, size_t o, int32_t v) { *VR(volatile int32_t, m, o) = v; }
    static inline void vr_st64(vr_mem m, size_t o, uint64_t v) { *VR(volatile uint64_t, m, o) = v; }
    static inline void vr_field(vr_mem m, size_t o, uint64_t v, int width, int big) {
        char *p = vr_at(m, o, width);
        uint32_t v4;
        uint16_t v2;
        if (big) v = __builtin_bswap64(v) >> (64 - 8 * width);
        switch (width) {
        case 8: memcpy(p, &v, 8); break;
        case 4: v4 = (uint32_t)v; memcpy(p, &v4, 4); break;
        case 2: v2 = (uint16_t)v; memcpy(p, &v2, 2); break;
        default: for (; width; width--, v >>= 8) *p++ = (char)v;
        }
    }
    /* Real devices are outside of the domain that ordinary barriers of this processor order (6.1). */
    #if defined(__aarch64__)
    #define VR_DEVICES(kind) __asm__ __volatile__("dmb " kind ::: "memory")
    #else
    #define VR_DEVICES(kind) ((void)0)
    #endif
    static inline uint16_t vr_ld16_acq(vr_mem m, size_t o) {
        uint16_t v = __atomic_load_n(VR(const uint16_t, m, o), __ATOMIC_ACQUIRE);
        VR_DEVICES("oshld");
        return v;
    }
    static inline uint32_t vr_ld32_acq(vr_mem m, size_t o) {
        return __atomic_load_n(VR(const uint32_t, m, o), __ATOMIC_ACQUIRE); }
    static inline void vr_st16_rel(vr_mem m, size_t o, uint16_t v) {
        VR_DEVICES("osh");
        __atomic_store_n(VR(uint16_t, m, o), v, __ATOMIC_RELEASE); }
    static inline void vr_st32_rel(vr_mem m, size_t o, uint32_t v) {
        __atomic_store_n(VR(uint32_t, m, o), v, __ATOMIC_RELEASE); }
    static inline uint32_t vr_swap32(vr_mem m, size_t o, uint32_t v) {
        return __atomic_exchange_n(VR(uint32_t, m, o), v, __ATOMIC_ACQ_REL); }
    static inline void vr_fence(void) {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        VR_DEVICES("osh");
    }
    static inline void vr_device_fence(void) {
    #if defined(__x86_64__)
        __asm__ __volatile__("sfence" ::: "memory");
    #else
        __sync_synchronize();
        VR_DEVICES("oshst");
    #endif
    }
    static inline void vr_copy(vr_mem to, size_t t, vr_mem from, size_t f, size_t n) {
        memcpy(vr_at(to, t, n), vr_at(from, f, n), n); }
    static inline void vr_fill(vr_mem m, size_t o, int v, size_t n) { memset(vr_at(m, o, n), v, n); }
    """
    ctypedef struct Mem "vr_mem":
        char *base
        size_t size
    uint8_t load_u8 "vr_ld8"(Mem mem, size_t offset) noexcept
    uint16_t load_u16 "vr_ld16"(Mem mem, size_t offset) noexcept
    uint32_t load_u32 "vr_ld32"(Mem mem, size_t offset) noexcept
    int32_t load_i32 "vr_ldi32"(Mem mem, size_t offset) noexcept
    uint64_t load_u64 "vr_ld64"(Mem mem, size_t offset) noexcept
    void store_u8 "vr_st8"(Mem mem, size_t offset, uint8_t value) noexcept
    void store_u16 "vr_st16"(Mem mem, size_t offset, uint16_t value) noexcept
    void store_u32 "vr_st32"(Mem mem, size_t offset, uint32_t value) noexcept
    void store_i32 "vr_sti32"(Mem mem, size_t offset, int32_t value) noexcept
    void store_u64 "vr_st64"(Mem mem, size_t offset, uint64_t value) noexcept
    void store_field "vr_field"(Mem mem, size_t offset, uint64_t value, int width, int big_endian) noexcept
    uint16_t load_acquire_u16 "vr_ld16_acq"(Mem mem, size_t offset) noexcept
    uint32_t load_acquire_u32 "vr_ld32_acq"(Mem mem, size_t offset) noexcept
    void store_release_u16 "vr_st16_rel"(Mem mem, size_t offset, uint16_t value) noexcept
    void store_release_u32 "vr_st32_rel"(Mem mem, size_t offset, uint32_t value) noexcept
    uint32_t swap_u32 "vr_swap32"(Mem mem, size_t offset, uint32_t value) noexcept
    void full_fence "vr_fence"() noexcept
    void device_fence "vr_device_fence"() noexcept
    void copy "vr_copy"(Mem to, size_t to_offset, Mem source, size_t offset, size_t nbytes) noexcept
    void fill "vr_fill"(Mem mem, size_t offset, int value, size_t nbytes) noexcept


cdef inline Mem window(object owner) except *:
    cdef Py_buffer view
    cdef Mem mem
    PyObject_GetBuffer(owner, &view, PyBUF_SIMPLE)
    mem.base = <char *>view.buf
    mem.size = view.len
    PyBuffer_Release(&view)  # the caller keeps the owner, and so the bytes, where they are
    return mem


cdef inline Mem null() noexcept:
    cdef Mem mem
    mem.base = NULL
    mem.size = 0
    return mem


cdef inline size_t address(Mem mem) noexcept:
    return <size_t>mem.base


cdef inline int expose(Py_buffer *view, object owner, Mem mem, int flags) except -1:
    return PyBuffer_FillInfo(view, owner, mem.base, mem.size, 0, flags)
