"""The specification's numbers of virtqueues; `_vring.pxd` has them as constants of C."""

# A descriptor (2.7.5, 2.8.13): bytes of it, and its flags.
DESC = 16
NEXT, WRITE, INDIRECT = 1, 2, 4

# Split: where what is in the available and used rings (2.7.6, 2.7.8), bytes of a used element, of used_event
# and of avail_event, and the flags of the rings.
IDX, RING = 2, 4
ELEM = 8
EVENT = 2
NO_INTERRUPT = 1
NO_NOTIFY = 1

# Packed: where what is in a descriptor (2.8.13), and its flags besides (2.8.1).
LENGTH, ID, FLAGS = 8, 12, 14
AVAIL, USED = 1 << 7, 1 << 15
# Where what is in an event suppression structure (2.8.14), what it may want, and its wrap counter.
OFF_WRAP, WANTS = 0, 2
ENABLE, DISABLE, AT = 0, 1, 2
WRAP = 1 << 15

# What a ring says that has no head to give: none is there, or the other side erred.
NOTHING, FAULTY = -1, -2
