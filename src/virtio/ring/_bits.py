"""What a processor does with 64-bit numbers in one instruction; `_bits.pxd` is the compiled twin."""

from __future__ import annotations


def bit_length(value: int) -> int:
    """The place of the highest bit that is set, counted from 1; 0 for 0."""
    return value.bit_length()


def scale(value: int, count: int) -> int:
    """A 64-bit number brought down to 0 .. `count` - 1, in proportion."""
    return value * count >> 64
