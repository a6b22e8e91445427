"""A load: its offsets, its histogram, and its requests against a device in a thread."""

import errno
import math
import statistics
import threading
import time
from array import array
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from tests.conftest import INTERPRETED
from tests.ring.test_requests import IOVA, READ, Bench, abandon, finish, serve
from virtio.errors import RequestError
from virtio.ring import codes
from virtio.ring._bits import mix
from virtio.ring.codes import LOADED
from virtio.ring.load import Histogram, Load
from virtio.ring.skew import Skew
from virtio.ring.stats import READ as READS, WRITE as WRITES, Stats, tick_rate
from virtio.ring.task import Task

NOTHING = memoryview(array("Q"))


@pytest.fixture
def served():
    """Start a serving thread; it ends with the test."""
    stop, threads = threading.Event(), []

    def start(bench, disk, **how):
        threads.append(threading.Thread(target=serve, args=(bench, disk, stop), kwargs=how))
        threads[-1].start()

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def loaded(bench, load, depth, **how):
    """A task that reads what the load says."""
    data = bench.pool.take(depth * load.nbytes)
    return Task(
        READ,
        NOTHING,
        load.nbytes,
        load.nbytes,
        mode=LOADED,
        base=data.offset,
        cells=depth,
        depth=depth,
        load=load,
        **how,
    )


# Offsets.


def test_a_sequence_goes_to_the_end_and_begins_again_without_the_rest_that_is_too_small():
    load = Load(1024, 3 * 1024 + 512, random=False)
    assert [load.offset(i) for i in range(7)] == [0, 1024, 2048, 0, 1024, 2048, 0]
    assert load.offset(3 * 10**15 + 2) == 2048


def test_random_offsets_are_splitmix64_in_proportion():
    load = Load(4, 1 << 62, random=True, seed=0)
    # The first two numbers of SplitMix64 from 0, of which 60 bits are used.
    assert [load.offset(i) for i in (0, 1)] == [0xE220A8397B1DCDAF >> 4 << 2, 0x6E789E6AA1B965F4 >> 4 << 2]


def test_random_offsets_cover_the_whole_disk_alike():
    blocks = 61
    load = Load(512, blocks * 512 + 511, random=True, seed=7)
    counts = [0] * blocks
    for i in range(100 * blocks):
        block, rest = divmod(load.offset(i), 512)
        assert rest == 0
        counts[block] += 1
    assert min(counts) > 50 and max(counts) < 150


@given(
    st.integers(1, 1 << 40),
    st.integers(1, 1 << 22),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 1 << 62),
    st.booleans(),
)
def test_no_request_passes_the_end_of_the_disk(blocks, block_size, seed, number, random):
    size = blocks * block_size + block_size - 1
    offset = Load(block_size, size, random=random, seed=seed).offset(number)
    assert offset % block_size == 0 and 0 <= offset <= size - block_size


def test_the_seed_decides_the_offsets():
    first, again, other = (
        [Load(512, 1 << 40, random=True, seed=seed).offset(i) for i in range(20)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_load_that_does_not_fit_or_has_nothing_to_do_is_refused():
    with pytest.raises(RequestError, match="requests of 1024 bytes on 512 bytes"):
        Load(1024, 512, random=True)
    with pytest.raises(RequestError, match="requests of 0 bytes on 512 bytes"):
        Load(0, 512, random=True)
    with pytest.raises(RequestError, match="a load of 0 requests"):
        Load(512, 512, random=True, requests=0)


# Some blocks more often than others: the counts of many, beside what the law says.


def counts(skew, blocks, number=200_000):
    found = [0] * blocks
    for i in range(number):
        found[skew.block(mix(i + 1))] += 1
    return sorted(found, reverse=True)


@pytest.mark.parametrize("theta", [0.5, 0.99, 1.0, 1.2, 3.0])
@pytest.mark.parametrize("blocks", [1, 2, 7, 1000])
def test_zipf_has_each_rank_as_often_as_the_law_says(theta, blocks):
    number = 200_000 if not INTERPRETED else 20_000
    seen = counts(Skew("zipf", theta, blocks), blocks, number)
    weights = [(k + 1) ** -theta for k in range(blocks)]
    for rank in range(min(5, blocks)):
        want = number * weights[rank] / sum(weights)
        assert abs(seen[rank] - want) < 5 * math.sqrt(want) + 3  # of one rank, five standard deviations
    half = sum(weights[: blocks // 2]) / sum(weights)
    assert sum(seen[: blocks // 2]) / number == pytest.approx(half, abs=0.03)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_pareto_has_a_share_of_the_blocks_met_by_all_but_that_share(share):
    number = 200_000 if not INTERPRETED else 20_000
    seen = counts(Skew("pareto", share, 1000), 1000, number)
    assert sum(seen[: int(1000 * share)]) / number == pytest.approx(1 - share, abs=0.02)


def test_ranks_are_spread_over_the_disk_one_to_one():
    blocks = 1000
    # By so steep a law nearly all go to one block; by pareto's with a half, all to all.
    assert {Skew("pareto", 0.5, blocks).block(scale_up(i, blocks)) for i in range(blocks)} == set(
        range(blocks)
    )


def scale_up(rank, blocks):
    """A number that has this rank by a law that prefers none."""
    return int((rank + 0.5) / blocks * 2**64)


@given(
    st.sampled_from([("zipf", 0.01), ("zipf", 1.0), ("zipf", 9.9), ("pareto", 1e-9), ("pareto", 0.999)]),
    st.integers(1, 1 << 55),
    st.integers(0, (1 << 64) - 1),
)
def test_no_law_leaves_the_disk(law, blocks, number):
    assert 0 <= Skew(*law, blocks).block(number) < blocks


# When requests begin.


def test_requests_begin_when_there_is_room_for_a_batch_of_them():
    bench = Bench(16)
    load = Load(512, 512 * 64, random=False, requests=20, batch=3)
    task = loaded(bench, load, 8)
    arrived = []

    def turn(answered):
        for head in arrived[:answered]:
            bench.answer(head, b"\0")
        del arrived[:answered]
        bench.queue.run(task, 0, 0)
        new = bench.arrivals()
        arrived.extend(new)
        return len(new)

    # 8 at first; then none until three have ended; the last 20 - 8 - 3 - 4 - 3 = 2 wait for nobody.
    assert [turn(n) for n in (0, 1, 1, 1, 4, 2, 1, 4)] == [8, 0, 0, 3, 4, 0, 3, 2]


def test_a_rate_lets_them_begin_at_even_intervals():
    load = Load(512, 1 << 20, random=False, rate=1000)
    load.enter()
    begun = load.now
    assert load.ripe() >= 1 and load.pause(load.ripe()) <= 1_000_000
    time.sleep(0.05)
    ripe = load.ripe()
    assert abs(ripe - 1 - (load.now - begun) * 1000 / tick_rate()) < 1
    longest = 50_000_000  # ns, after which it looks whether it was stopped
    assert load.pause(ripe - 1) == longest  # it may begin: what it waits for is not the time
    assert Load(512, 1 << 20, random=False).pause(0) == longest
    slow = Load(512, 1 << 20, random=False, rate=1)
    slow.enter()
    assert slow.pause(slow.ripe()) == longest


@pytest.mark.parametrize("rate", [1e9, 3e8, 12345.678])
def test_a_rate_is_kept_however_high_and_however_long_nobody_looked(rate):
    load = Load(512, 1 << 20, random=False, rate=rate)
    load.enter()
    for _ in range(3):
        time.sleep(0.02)
        before = time.monotonic()
        ripe = load.ripe()
        assert time.monotonic() - before < 0.01  # at once, not one after the other
        due = 1 + (load.now - load.begun) * rate / tick_rate()
        assert abs(ripe - due) <= 1 + 1e-9 * due


@pytest.mark.parametrize("how", [dict(rate=-1), dict(rate=math.inf), dict(batch=0)])
def test_a_rate_and_a_batch_have_bounds(how):
    with pytest.raises(RequestError, match="requests a second, .* together: want more than 0"):
        Load(512, 512, random=True, **how)


# The histogram.

VALUES = st.lists(
    st.integers(0, 63).flatmap(lambda bits: st.integers(0, (1 << bits) - 1)), min_size=1, max_size=60
).filter(lambda values: sum(values) < 1 << 64)


def exact(values, percent):
    """The percentile by its definition."""
    rank = max(1, math.ceil(Fraction(str(percent)) * len(values) / 100))
    return sorted(values)[rank - 1]


@given(VALUES, st.sampled_from([0, 1, 50, 90, 99, 99.9, 99.99, 100]))
def test_a_percentile_is_within_four_tenths_of_a_percent(values, percent):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    want = exact(values, percent)
    assert abs(histogram.percentile(percent) - want) <= want / 256


@given(VALUES)
def test_mean_minimum_and_maximum_are_exact_and_every_value_is_in_a_narrow_bucket(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    assert (histogram.minimum, histogram.maximum) == (min(values), max(values))
    assert (histogram.count, histogram.total) == (len(values), sum(values))
    assert math.isclose(histogram.mean, statistics.fmean(values))
    buckets = histogram.buckets()
    for bucket in buckets:
        assert bucket.values == sum(bucket.low <= value <= bucket.high for value in values)
        assert bucket.high - bucket.low <= bucket.low / 128
    assert sum(bucket.values for bucket in buckets) == len(values)


@given(st.lists(st.integers(1_000, 100_000_000), min_size=1, max_size=60))
def test_the_standard_deviation_is_that_of_all_values(values):
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    assert math.isclose(histogram.stddev, statistics.pstdev(values), rel_tol=1e-6, abs_tol=1)


def test_the_largest_value_has_a_bucket():
    histogram = Histogram()
    histogram.record((1 << 64) - 1)
    assert histogram.buckets() == [(255 << 56, (1 << 64) - 1, 1)]


def test_an_empty_histogram_is_all_zeros():
    histogram = Histogram()
    seen = histogram.minimum, histogram.maximum, histogram.mean, histogram.stddev, histogram.percentile(99)
    assert seen == (0, 0, 0.0, 0.0, 0) and histogram.buckets() == []


# On a queue.


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("shuffle", [False, True])
def test_so_many_requests_are_done_and_timed(served, indirect, shuffle):
    bench = Bench(32, indirect=indirect, event_idx=True)
    served(bench, bytearray(64 << 10), order=reversed if shuffle else None)
    load = Load(1024, 64 << 10, random=True, requests=3000)
    task = loaded(bench, load, 7)
    assert finish(bench.queue, task) == []
    assert task.finished == task.started == load.latency.count == 3000
    assert bench.queue.in_flight == 0 and load.errors == 0
    assert 0 < load.latency.minimum <= load.latency.maximum <= load.seconds * 1e9


def test_each_request_in_flight_has_a_cell_of_its_own_and_there_are_no_more_than_depth():
    bench = Bench(16)
    load = Load(512, 1 << 20, random=False)
    task = loaded(bench, load, 5)
    base = task.data_end - 5 * 512
    cells = {IOVA + base + 512 * i for i in range(5)}
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    heads = bench.arrivals()
    for _ in range(20):
        assert {bench.chain(head)[1][0] for head in heads} == cells
        first, second, *rest = heads
        bench.answer(second, b"\0")
        bench.answer(first, b"\0")
        assert bench.queue.run(task, 1000, 0) == codes.IDLE
        heads = rest + bench.arrivals()
        assert task.active == len(heads) == 5
    sectors = sorted(int.from_bytes(bench.at(bench.chain(head)[0][0], 16)[8:], "little") for head in heads)
    assert sectors == [40, 41, 42, 43, 44]


def test_latency_counts_from_before_the_ring_to_after_it():
    bench = Bench(8)
    load = Load(512, 4096, random=False, requests=1)
    task = loaded(bench, load, 1)
    before = time.monotonic_ns()
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    shown = time.monotonic_ns()
    while time.monotonic_ns() < shown + 5_000_000:
        pass
    answered = time.monotonic_ns()
    bench.answer(bench.arrivals()[0], b"\0")
    assert bench.queue.run(task, 1000, 0) == codes.DONE
    assert answered - shown <= load.latency.minimum <= time.monotonic_ns() - before


def test_the_clock_is_read_once_for_few_requests_and_again_for_several_or_after_a_break():
    load = Load(512, 4096, random=False)
    load.enter()
    assert load.begin(1)
    load.complete(load.begun, False)
    seen = load.now
    assert load.begin(1) and load.now == seen  # what replaces a request begins when it was done
    load.complete(seen, False)
    assert load.begin(32) and load.now > seen
    load.complete(seen, False)
    seen = load.now
    load.enter()
    assert load.begin(1) and load.now > seen


def test_it_ends_at_its_time_and_waits_for_what_is_in_flight(served):
    bench = Bench(16)
    served(bench, bytearray(4096))
    load = Load(512, 4096, random=True, runtime_ns=20_000_000)
    task = loaded(bench, load, 8)
    finish(bench.queue, task)
    assert load.now >= load.deadline == load.begun + math.ceil(tick_rate() * 20 / 1000)
    assert task.total == task.started == task.finished == load.latency.count > 0


def test_the_first_error_ends_it_and_says_where(served):
    bench = Bench(16)
    served(bench, bytearray(32 << 10))
    load = Load(512, 64 << 10, random=False)
    task = loaded(bench, load, 4)
    faults = finish(bench.queue, task)
    assert min(task.offset(fault.token) for fault in faults) == 32 << 10
    assert load.errors == len(faults) <= 4
    assert load.latency.count == 64 and task.finished == 64 + load.errors
    assert bench.queue.in_flight == 0


def test_a_status_that_was_not_written_is_an_error_of_the_load():
    bench = Bench(8)
    load = Load(512, 4096, random=False, requests=9)
    task = loaded(bench, load, 1)
    for _ in range(2):
        assert bench.queue.run(task, 1000, 0) == codes.IDLE
        bench.answer(bench.arrivals()[0], b"\0")
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    bench.peer.use(bench.arrivals()[0], 513)  # nothing but the used element
    assert bench.queue.run(task, 1000, 0) == codes.FAULT
    (fault,) = bench.queue.faults()
    assert (fault.token, fault.result) == (2, 0xFF)
    assert task.fail(fault.token, errno.EIO)
    assert bench.queue.run(task, 1000, 0) == codes.DONE
    assert (load.errors, load.latency.count) == (1, 2)


def test_a_fault_that_was_none_is_done_without_a_time():
    bench = Bench(8)
    load = Load(512, 4096, random=False, requests=3)
    task = loaded(bench, load, 3)
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    for head, status in zip(bench.arrivals(), [0, 1, 0], strict=True):
        bench.answer(head, bytes([status]))
    assert bench.queue.run(task, 1000, 0) == codes.FAULT
    (fault,) = bench.queue.faults()
    task.succeed(fault.token)
    assert bench.queue.run(task, 1000, 0) == codes.DONE
    assert (task.finished, load.latency.count, load.errors) == (3, 2, 0)


def test_slices_stops_and_broken_rings_bring_it_back():
    bench = Bench(8)
    task = loaded(bench, Load(512, 4096, random=True), 2)
    assert bench.queue.run(task, 1_000_000, 1 << 62) == codes.TICK
    bench.peer.use(7)
    assert bench.queue.run(task, 1_000_000, 1 << 62) == codes.BROKEN
    bench = Bench(8)
    bench.queue.stop()
    assert bench.queue.run(loaded(bench, Load(512, 4096, random=True), 2), 1000, 0) == codes.LOST


def test_what_was_abandoned_is_no_part_of_the_next_load(served):
    bench = Bench(8)
    first = Load(512, 4096, random=True)
    assert bench.queue.run(loaded(bench, first, 3), 1000, 0) == codes.IDLE
    abandon(bench.queue)
    second = Load(512, 4096, random=True, requests=100)
    task = loaded(bench, second, 3)
    served(bench, bytearray(4096))
    finish(bench.queue, task)
    assert (first.latency.count, second.latency.count) == (0, 100)
    bench.queue.look()
    bench.queue.sweep()
    assert bench.queue.orphans == 0


def test_a_load_and_the_mode_for_it_need_each_other():
    load = Load(512, 4096, random=True)
    with pytest.raises(RequestError, match="need each other"):
        Task(READ, NOTHING, 512, 512, load=load)
    with pytest.raises(RequestError, match="need each other"):
        Task(READ, NOTHING, 512, 512, mode=LOADED, cells=1)


def test_latencies_are_counted_when_there_is_time_for_that_and_none_is_lost():
    """However many there are before, and reads and writes apart."""
    load = Load(512, 1 << 20, random=False, reads=50)
    load.enter()
    for number in range(1000):
        load.complete(load.begun, number % 4 == 0)
    assert 0 < load.latency.count + load.written.count < 1000
    load.settle()
    assert (load.latency.count, load.written.count) == (750, 250)
    load.settle()
    assert (load.latency.count, load.written.count) == (750, 250)


def test_all_that_a_load_does_is_counted_of_the_disk_too_also_in_its_ramp():
    load, stats = Load(512, 1 << 20, random=False, reads=50, ramp_ns=1), Stats()
    load.account(stats)
    load.enter()
    load.complete(load.begun, False)
    assert load.begin(1) and not load.warming
    for number in range(100):
        load.complete(load.begun, number % 4 == 0)
    load.settle()
    assert (load.latency.count, load.written.count) == (75, 25)
    counts = stats.counts(READS)
    assert counts[:2] == (76, 76 * 512) and stats.counts(WRITES)[:2] == (25, 25 * 512)
    assert counts.longest * 1_000_000_000 // tick_rate() >= load.latency.maximum - 1
    assert 0 <= counts.shortest <= counts.longest <= counts.total


@pytest.mark.parametrize("on", [True, False])
def test_what_fails_and_what_turns_out_well_is_counted_where_a_disk_counts(on):
    bench, stats = Bench(8), Stats()
    stats.on = on
    load = Load(512, 4096, random=False, requests=3)
    task = loaded(bench, load, 3, stats=stats)
    assert bench.queue.run(task, 1000, 0) == codes.IDLE
    for head, status in zip(bench.arrivals(), [0, 1, 1], strict=True):
        bench.answer(head, bytes([status]))
    assert bench.queue.run(task, 1000, 0) == codes.FAULT
    good, bad = bench.queue.faults()
    task.succeed(good.token, good.began)
    task.fail(bad.token, errno.EIO)
    assert bench.queue.run(task, 1000, 0) == codes.DONE
    counts = stats.counts(READS)
    assert (counts.requests, counts.nbytes, stats.failed) == ((2, 1024, 1) if on else (0, 0, 0))
    assert (counts.total >= counts.longest > 0) == on


def test_a_request_that_ended_before_it_began_took_no_time():
    load = Load(512, 1 << 20, random=False)
    load.enter()
    load.complete(load.begun + (1 << 40), False)
    load.settle()
    assert load.latency.count == 1 and load.latency.maximum == 0


def test_the_clock_of_a_load_is_as_fast_as_the_systems():
    load = Load(512, 1 << 20, random=False, rate=1.0)
    before = time.monotonic_ns()
    load.enter()
    entered = time.monotonic_ns()
    while time.monotonic_ns() - entered < 50_000_000:
        pass
    looked = time.monotonic_ns()
    load.ripe()
    after = time.monotonic_ns()
    assert 0.99 * (looked - entered) <= load.seconds * 1e9 <= 1.01 * (after - before)


@pytest.mark.parametrize(("depth", "batch"), [(32, 20), (32, 16), (24, 12), (18, 4), (32, 1)])
def test_a_device_at_work_is_given_all_that_there_is_room_for(depth, batch):
    bench = Bench(32)
    bench.peer.set_used_flags(1)  # VIRTQ_USED_F_NO_NOTIFY (2.7.14): it polls
    task = loaded(bench, Load(512, 1 << 20, random=True, requests=4 * depth, batch=batch), depth)
    for _ in range(4):
        assert bench.queue.run(task, 1000, 0) in (codes.IDLE, codes.TICK)
        heads = bench.arrivals()
        assert len(heads) == depth
        for head in heads:
            bench.answer(head, b"\0", bytes(512))
    finish(bench.queue, task)
    assert bench.kicks == 0


def test_what_comes_back_later_took_longer_also_when_nothing_is_submitted_in_between():
    bench, waited = Bench(8), 0.2
    load = Load(512, 4096, random=True, requests=4, batch=2)
    task = loaded(bench, load, 2)

    def device():
        for pause in (0, waited, 0, 0):
            while not (waiting := bench.arrivals()) and not left:
                time.sleep(0)
            left.extend(waiting)
            time.sleep(pause)
            bench.answer(left.pop(0), b"\0")

    left = []
    thread = threading.Thread(target=device)
    thread.start()
    while (reason := bench.queue.run(task, 10**9, 10**9)) != codes.DONE:
        assert reason in (codes.TICK, codes.IDLE)
    thread.join()
    assert load.latency.count == 4
    slow = sum(bucket.values for bucket in load.latency.buckets() if bucket.high >= waited * 1e9)
    assert slow == 1  # the second: not the two that began after it, either
