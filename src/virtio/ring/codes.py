"""Numbers that the modules of a request queue say to each other; `codes.pxd` has them as constants of C."""

# Where a request's data is.
NO_DATA, TO_DEVICE, FROM_DEVICE = 0, 1, 2

# A patch of a template: what it stores; and how it is kept, in 16 bits each: source, offset, width,
# big-endian, shift.
OFFSET, NBYTES, TAG = 0, 1, 2
PATCH_BYTES = 10

# How a task finds the data of its parts: in place in the region, always the same bytes, through
# bounce cells, or in cells of whose content nothing becomes (a load).
IN_PLACE, CONSTANT, BOUNCED, LOADED = 0, 1, 2, 3

# A slot's private record: how long it is, and what is where in it. `OWNER` is whose single request it is,
# `CHANGES` whether it changes the disk, `KIND` what it is for `Stats`, `BEGAN` a tick.
RECORD_BYTES = 64
STATE, KEY, NBYTES_AT, OFFSET_AT, DATA, TOKEN, RESULT, BEGAN = 0, 4, 8, 16, 24, 32, 40, 48
OWNER, CHANGES, KIND = 56, 60, 62
NOBODY = 0xFFFFFFFF  # the owner of an orphan

# The states it goes through.
FREE, IN_TASK, SINGLE, ENDED, AWAITED = 0, 1, 2, 3, 4

# Why no slot was filled: there is none, or the request is too long for one.
FULL, MISFIT = -1, -2

# Why `run` came back, and why it is to.
DONE, TICK, IDLE, FAULT, BROKEN, LOST, UNFIT, PAUSED = 0, 1, 2, 3, 4, 5, 6, 7
STOP, PAUSE = 1, 2
