"""Gathering bursts of completions: decided by trial, and of no consequence but for time."""

import threading

import pytest

from tests.conftest import INTERPRETED
from tests.ring.test_load import loaded
from tests.ring.test_requests import Bench, serve
from virtio.ring import codes
from virtio.ring.gather import Gathering
from virtio.ring.load import Load

TRIAL, PERIOD, PERIOD_NO = 8, 128, 1928  # epochs of a trial; and from it to the next, after a yes or a no


class Epochs:
    """Epochs of one `Gathering`, which take a time of their own without it and another one with it."""

    def __init__(self, gathering=None):
        self.gathering = gathering or Gathering()
        self.now = 0
        self.gathering.begin(self.now)

    def past(self, count, without, gathered):
        """Let so many pass; how each was done."""
        ways = []
        for _ in range(count):
            ways.append(self.gathering.on)
            self.gathering.count(1000)
            self.now += gathered if ways[-1] else without
            self.gathering.end_epoch(self.now)
        return ways


def test_it_is_off_until_a_trial_of_both_ways_by_turns_has_shown_that_it_costs_nothing():
    epochs = Epochs()
    assert epochs.past(TRIAL, 1_000_000, 1_000_000) == [False, True] * (TRIAL // 2)
    assert epochs.past(PERIOD - TRIAL, 1_000_000, 1_000_000) == [True] * (PERIOD - TRIAL)


@pytest.mark.parametrize(("gathered", "on"), [(900, True), (1005, True), (1020, False), (1500, False)])
def test_what_it_may_cost_is_a_hundredth(gathered, on):
    epochs = Epochs()
    epochs.past(TRIAL, 1_000_000, gathered * 1000)
    assert epochs.gathering.on is on


def test_an_outcome_holds_until_the_next_trial_and_not_longer():
    epochs = Epochs()
    epochs.past(PERIOD, 1_000_000, 1_000_000)
    assert epochs.past(TRIAL, 1_000_000, 2_000_000) == [False, True] * (TRIAL // 2)
    assert epochs.past(PERIOD_NO - TRIAL, 1_000_000, 2_000_000) == [False] * (PERIOD_NO - TRIAL)
    epochs.past(TRIAL, 1_000_000, 1_000_000)
    assert epochs.gathering.on  # nothing is left of what was measured a trial ago


def test_one_epoch_that_is_as_fast_does_not_make_up_for_others():
    epochs = Epochs()
    epochs.past(TRIAL - 2, 1_000_000, 1_200_000)
    epochs.past(2, 1_000_000, 1_000_000)
    assert not epochs.gathering.on


@pytest.mark.skipif(INTERPRETED, reason="interpreted, a look takes long enough: it never rests")
def test_it_rests_for_longer_between_looks_where_a_request_takes_longer():
    epochs = Epochs()
    rests = []
    for ns in (10, 130, 600, 5000):
        epochs.past(1, 1000 * ns, 1000 * ns)
        rests.append(epochs.gathering.rests)
    assert rests == [2, 26, 120, 150]


def test_a_run_that_is_shorter_than_an_epoch_tries_nothing():
    gathering = Gathering()
    for _ in range(100):
        gathering.begin(0)
        gathering.count(4095)
        assert not gathering.on


def test_a_trial_that_a_run_did_not_finish_leaves_nothing_gathered_and_an_outcome_lasts():
    epochs = Epochs()
    epochs.past(TRIAL - 1, 1_000_000, 1_000_000)
    assert epochs.gathering.on  # it is the turn of that way
    epochs.gathering.begin(epochs.now)
    assert not epochs.gathering.on
    epochs.past(TRIAL, 1_000_000, 1_000_000)
    epochs.gathering.begin(epochs.now)
    assert epochs.gathering.on


@pytest.mark.parametrize("depth", [8, 9, 32])
def test_all_requests_are_done_and_no_more_at_once_than_the_depth_while_it_gathers(depth):
    bench, disk, stop = Bench(32), bytearray(b"\x5a" * 4096), threading.Event()
    Epochs(bench.queue.gathering).past(TRIAL, 1_000_000, 1_000_000)
    device = threading.Thread(target=serve, args=(bench, disk, stop))
    device.start()
    try:
        load = Load(512, 4096, random=True, requests=500)
        task = loaded(bench, load, depth)
        while (reason := bench.queue.run(task, 1_000_000, 1_000_000)) != codes.DONE:
            assert reason in (codes.TICK, codes.IDLE)
            assert task.active <= depth
    finally:
        stop.set()
        device.join()
    assert (load.latency.count, load.errors, bench.queue.in_flight) == (500, 0, 0)
    assert bench.queue.gathering.on
