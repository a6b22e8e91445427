"""Whether to answer in one go what a device completes in one burst: found out by trying both.

A device takes the requests that it finds, works on them, and gives them back in a burst. What is submitted
amid that burst is in its next round, what comes a moment later in the one after: rounds grow and shrink,
and latencies with them. What is submitted when the burst is over stays together. A device that is the limit
has another round to do meanwhile: its rate remains what it was, and latencies are shorter and more even.
One that has time left loses by each moment that a request is held back. Which of these it is cannot be
seen; so the loop tries.
"""

from __future__ import annotations

import cython

if not cython.compiled:
    from virtio.ring._os import now_ns

# Requests of an epoch: at depth 32, 128 rounds. Epochs of 16 rounds look alike on a disk whose clock ticks
# every 10 us, which gathering costs 14 %: what the other way did to its rounds lasts for longer.
_EPOCH = 4096
_TRIAL = 8  # epochs of a trial, of which every other one is with gathering
_HELD = 120  # epochs for which a yes holds
_HELD_NO = 1920  # and a no: the wrong way, in four epochs of a trial, would else be seen in p99
_TOLERANCE = 100  # one part in so many, by which the two differ anyway
_FRACTION = 1 << 10  # of a nanosecond, in which the time of a request is told
# A burst is over when nothing came for some time: two looks, with a rest each for every so many ns of a
# request, which is the time of four requests where `pause` takes 60 cycles. Interpreted, none: a look takes
# longer.
_REST_NS = 5 if cython.compiled else 1 << 40
_REST_MOST = 150


class Gathering:
    """Whether the loop gathers (`on`): not before a trial has shown that it costs nothing.

    A trial goes by the time of all epochs of either way: gathered, some are as fast as they can be where
    others are not. It is of one run: what was not tried to the end is not gathered. A run that is shorter has
    what was found before.
    `rests` is how many there are between two looks at whether a burst is over.
    """

    def __init__(self) -> None:
        self.on = False
        self.rests = 0
        self._epochs = self._done = self._since = 0
        self._with = self._without = 0  # times of a request in the epochs of this trial

    def begin(self, now: int) -> None:
        """A run begins `now`, in nanoseconds, and so does an epoch."""
        self._done, self._since = 0, now
        if self._epochs < _TRIAL:
            self._try()

    def count(self, done: int) -> None:
        """So many requests came back; at the end of an epoch this looks at the clock."""
        self._done += done
        if self._done >= _EPOCH:
            self.end_epoch(now_ns())

    def end_epoch(self, now: int) -> None:
        """Say how to go on, after an epoch that ends `now`, with at least one request."""
        took = (now - self._since) * _FRACTION // self._done
        self.rests = min(took // (_FRACTION * _REST_NS), _REST_MOST)
        self._done, self._since = 0, now
        self._epochs += 1
        if self._epochs <= _TRIAL:
            if self.on:
                self._with += took
            else:
                self._without += took
            self.on = not self.on
        if self._epochs == _TRIAL:
            self.on = self._with - self._with // _TOLERANCE <= self._without
        elif self._epochs == _TRIAL + (_HELD if self.on else _HELD_NO):
            self._try()

    def _try(self) -> None:
        """A trial begins, without gathering."""
        self.on = False
        self._epochs = 0
        self._with = self._without = 0
