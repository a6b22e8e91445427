"""Constants of C for _vring.py, which says what they are. Cimported all at once; the `.py` lists which."""

cdef enum:
    DESC = 16
    NEXT = 1
    WRITE = 2
    INDIRECT = 4

    IDX = 2
    RING = 4
    ELEM = 8
    EVENT = 2
    NO_INTERRUPT = 1
    NO_NOTIFY = 1

    LENGTH = 8
    ID = 12
    FLAGS = 14
    AVAIL = 0x80
    USED = 0x8000
    OFF_WRAP = 0
    WANTS = 2
    ENABLE = 0
    DISABLE = 1
    AT = 2
    WRAP = 0x8000

    NOTHING = -1
    FAULTY = -2
