"""What a processor does with 64-bit numbers in one instruction; `_bits.pxd` is the compiled twin."""

from __future__ import annotations

_LAST = 0xFFFFFFFFFFFFFFFF


def bit_length(value: int) -> int:
    """The place of the highest bit that is set, counted from 1; 0 for 0."""
    return value.bit_length()


def mix(value: int) -> int:
    """Another 64-bit number, which looks random; one to one. The last step of SplitMix64: Steele, Lea, Flood,
    "Fast splittable pseudorandom number generators"."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _LAST
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _LAST
    return value ^ value >> 31


def whole(value: float) -> int:
    """A number that is not negative, without what comes after its point."""
    return int(value)


def scale(value: int, count: int) -> int:
    """A 64-bit number brought down to 0 .. `count` - 1, in proportion."""
    return value * count >> 64
