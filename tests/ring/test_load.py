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

from tests.ring.test_requests import IOVA, READ, Bench, abandon, finish, serve
from virtio.errors import RequestError
from virtio.ring import requests
from virtio.ring.load import Histogram, Load
from virtio.ring.requests import LOADED, Task

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


def loaded(bench, load, depth):
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


# The histogram.

VALUES = st.lists(
    st.integers(0, 63).flatmap(lambda bits: st.integers(0, (1 << bits) - 1)), min_size=1, max_size=60
)


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
    assert 0 < load.latency.minimum <= load.latency.maximum <= load.now - load.begun


def test_each_request_in_flight_has_a_cell_of_its_own_and_there_are_no_more_than_depth():
    bench = Bench(16)
    load = Load(512, 1 << 20, random=False)
    task = loaded(bench, load, 5)
    base = task.data_end - 5 * 512
    cells = {IOVA + base + 512 * i for i in range(5)}
    assert bench.queue.run(task, 1000, 0) == requests.IDLE
    heads = bench.arrivals()
    for _ in range(20):
        assert {bench.chain(head)[1][0] for head in heads} == cells
        first, second, *rest = heads
        bench.answer(second, b"\0")
        bench.answer(first, b"\0")
        assert bench.queue.run(task, 1000, 0) == requests.IDLE
        heads = rest + bench.arrivals()
        assert task.active == len(heads) == 5
    sectors = sorted(int.from_bytes(bench.at(bench.chain(head)[0][0], 16)[8:], "little") for head in heads)
    assert sectors == [40, 41, 42, 43, 44]


def test_latency_counts_from_before_the_ring_to_after_it():
    bench = Bench(8)
    load = Load(512, 4096, random=False, requests=1)
    task = loaded(bench, load, 1)
    before = time.monotonic_ns()
    assert bench.queue.run(task, 1000, 0) == requests.IDLE
    shown = time.monotonic_ns()
    while time.monotonic_ns() < shown + 5_000_000:
        pass
    answered = time.monotonic_ns()
    bench.answer(bench.arrivals()[0], b"\0")
    assert bench.queue.run(task, 1000, 0) == requests.DONE
    assert answered - shown <= load.latency.minimum <= time.monotonic_ns() - before


def test_the_clock_is_read_once_for_few_requests_and_again_for_several_or_after_a_break():
    load = Load(512, 4096, random=False)
    load.enter()
    assert load.begin(1)
    load.complete(load.begun, False)
    seen = load.now
    assert load.begin(1) and load.now == seen  # what replaces a request begins when it was done
    load.complete(seen, False)
    assert load.begin(32) and load.now > load.begun + load.latency.maximum
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
    assert load.now >= load.deadline == load.begun + 20_000_000
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
        assert bench.queue.run(task, 1000, 0) == requests.IDLE
        bench.answer(bench.arrivals()[0], b"\0")
    assert bench.queue.run(task, 1000, 0) == requests.IDLE
    bench.peer.use(bench.arrivals()[0], 513)  # nothing but the used element
    assert bench.queue.run(task, 1000, 0) == requests.FAULT
    (fault,) = bench.queue.faults()
    assert (fault.token, fault.result) == (2, 0xFF)
    assert task.fail(fault.token, errno.EIO)
    assert bench.queue.run(task, 1000, 0) == requests.DONE
    assert (load.errors, load.latency.count) == (1, 2)


def test_a_fault_that_was_none_is_done_without_a_time():
    bench = Bench(8)
    load = Load(512, 4096, random=False, requests=3)
    task = loaded(bench, load, 3)
    assert bench.queue.run(task, 1000, 0) == requests.IDLE
    for head, status in zip(bench.arrivals(), [0, 1, 0], strict=True):
        bench.answer(head, bytes([status]))
    assert bench.queue.run(task, 1000, 0) == requests.FAULT
    (fault,) = bench.queue.faults()
    task.succeed(fault.token)
    assert bench.queue.run(task, 1000, 0) == requests.DONE
    assert (task.finished, load.latency.count, load.errors) == (3, 2, 0)


def test_slices_stops_and_broken_rings_bring_it_back():
    bench = Bench(8)
    task = loaded(bench, Load(512, 4096, random=True), 2)
    assert bench.queue.run(task, 1_000_000, 1 << 62) == requests.TICK
    bench.peer.use(7)
    assert bench.queue.run(task, 1_000_000, 1 << 62) == requests.BROKEN
    bench = Bench(8)
    bench.queue.stop()
    assert bench.queue.run(loaded(bench, Load(512, 4096, random=True), 2), 1000, 0) == requests.LOST


def test_what_was_abandoned_is_no_part_of_the_next_load(served):
    bench = Bench(8)
    first = Load(512, 4096, random=True)
    assert bench.queue.run(loaded(bench, first, 3), 1000, 0) == requests.IDLE
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
