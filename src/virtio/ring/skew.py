"""Some blocks more often than others: which of them a random number means, by Zipf's law or Pareto's."""

from __future__ import annotations

from typing import Literal, TypeAlias

import cython

from virtio.errors import RequestError

if not cython.compiled:
    from math import exp, expm1, log, log1p

    from virtio.ring._bits import mix, whole

Law: TypeAlias = Literal["zipf", "pareto"]

_UNIT = 2.0**-53  # what a random number of 53 bits is a multiple of
_GAMMA = 0x9E3779B97F4A7C15
_LAST = 0xFFFFFFFFFFFFFFFF
_SMALL = 1e-8


class Skew:
    """Which of `blocks` a 64-bit random number means.

    By "zipf" the block met most often is met `k ** by` times as often as the one that comes k-th; `by` is
    above 0, and 10 at most. By "pareto" a share of 1 - `by` of all requests goes to a share of `by` of the
    blocks: 0.2 is "80 to 20". Blocks that come one after another in rank are far apart on the disk. Zipf's
    ranks are exact, by rejection-inversion: Hoermann and Derflinger, "Rejection-inversion to generate
    variates from monotone discrete distributions", 1996.
    """

    def __init__(self, law: Law, by: float, blocks: int) -> None:
        self._zipf = law == "zipf"
        most = 10.0 if self._zipf else 1.0
        if not 0 < by < most:
            raise RequestError(f"{law}:{by:g}, want more than 0 and less than {most:g}")
        self._blocks, self._by = blocks, by
        self._mask = (1 << (blocks - 1).bit_length()) - 1
        self._low = self._high = self._near = self._power = 0.0
        if self._zipf:
            self._low = self._area(1.5) - 1.0
            self._high = self._area(blocks + 0.5)
            self._near = 2.0 - self._inverse(self._area(2.5) - exp(-by * log(2.0)))
        else:
            self._power = log(by) / log(1.0 - by)

    def block(self, number: int) -> int:
        """0 to `blocks` - 1."""
        place = self._rank(number)
        while True:  # one to one on the next power of two: again, until it is one of the blocks
            place = (place * _GAMMA + 1) & self._mask
            if place < self._blocks:
                return place

    def _rank(self, number: int) -> int:
        """0 for the block that is met most often."""
        while True:
            unit = (float(number >> 11) + 0.5) * _UNIT
            if not self._zipf:
                place = float(self._blocks) * exp(log(unit) * self._power)
                return whole(min(place, float(self._blocks - 1)))
            under = self._high + unit * (self._low - self._high)
            found = self._inverse(under)
            nearest = float(whole(min(max(found + 0.5, 1.0), float(self._blocks))))
            if nearest - found <= self._near or under >= self._area(nearest + 0.5) - exp(
                -self._by * log(nearest)
            ):
                return whole(nearest) - 1
            number = mix((number + _GAMMA) & _LAST)

    def _area(self, end: float) -> float:
        """Below x ** -by, from 1 to `end`."""
        logarithm = log(end)
        power = (1.0 - self._by) * logarithm
        if abs(power) < _SMALL:
            return logarithm * (1.0 + power / 2.0)
        return logarithm * (expm1(power) / power)

    def _inverse(self, area: float) -> float:
        """The end of such an area."""
        power = max(area * (1.0 - self._by), -1.0)
        if abs(power) < _SMALL:
            return exp(area * (1.0 - power / 2.0))
        return exp(area * (log1p(power) / power))
