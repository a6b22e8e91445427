"""C types for skew.py; all code is there."""

cimport cython
from libc.math cimport exp, expm1, log, log1p
from libc.stdint cimport uint64_t

from virtio.ring._bits cimport mix, whole

cdef uint64_t _GAMMA, _LAST
cdef double _UNIT, _SMALL


@cython.final
cdef class Skew:
    cdef uint64_t _blocks, _mask
    cdef double _by, _low, _high, _near, _power
    cdef bint _zipf

    @cython.locals(place=uint64_t)
    cpdef uint64_t block(self, uint64_t number) noexcept nogil
    @cython.locals(unit=double, place=double, under=double, found=double, nearest=double)
    cdef uint64_t _rank(self, uint64_t number) noexcept nogil
    @cython.locals(logarithm=double, power=double)
    cdef double _area(self, double end) noexcept nogil
    @cython.locals(power=double)
    cdef double _inverse(self, double area) noexcept nogil
