"""What a processor does with 64-bit numbers in one instruction; `_bits.py` is the interpreted twin."""

from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    static inline int vr_bit_length(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }
    static inline uint64_t vr_mix(uint64_t x) {
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31; }
    static inline uint64_t vr_whole(double x) { return (uint64_t)x; }
    static inline uint64_t vr_scale(uint64_t x, uint64_t n) {
        return (uint64_t)((unsigned __int128)x * n >> 64); }
    """
    int bit_length "vr_bit_length"(uint64_t value) noexcept
    uint64_t mix "vr_mix"(uint64_t value) noexcept
    uint64_t whole "vr_whole"(double value) noexcept
    uint64_t scale "vr_scale"(uint64_t value, uint64_t count) noexcept
