"""Constants of C for codes.py, which says what they are. Cimported all at once; the `.py` lists which."""

cdef enum:
    NO_DATA = 0
    TO_DEVICE = 1
    FROM_DEVICE = 2

    OFFSET = 0
    NBYTES = 1
    TAG = 2
    PATCH_BYTES = 10

    IN_PLACE = 0
    CONSTANT = 1
    BOUNCED = 2
    LOADED = 3

    RECORD_BYTES = 64
    STATE = 0
    KEY = 4
    NBYTES_AT = 8
    OFFSET_AT = 16
    DATA = 24
    TOKEN = 32
    RESULT = 40
    BEGAN = 48
    OWNER = 56
    CHANGES = 60
    KIND = 62

    FREE = 0
    IN_TASK = 1
    SINGLE = 2
    ENDED = 3
    AWAITED = 4

    FULL = -1
    MISFIT = -2

    DONE = 0
    TICK = 1
    IDLE = 2
    FAULT = 3
    BROKEN = 4
    LOST = 5
    UNFIT = 6
    PAUSED = 7
    STOP = 1
    PAUSE = 2

cdef enum:
    NOBODY = 0xFFFFFFFF  # by itself: the constants of one enum have one type
