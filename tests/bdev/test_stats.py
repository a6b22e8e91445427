"""What is counted of each way in, and how."""

import dataclasses
import gc
import threading
import time
from array import array

import pytest

from tests.cli.program import eventually
from virtio.ring.stats import BUCKETS, READ, Stats, clock, tick_rate
from virtio.target import serve
from virtio_bdev import DeviceError, attach, bench


def test_what_a_load_does_is_counted(bdev, channel):
    result = bench.run(channel, bench.Job(rw="randrw", requests=500))
    stats = bdev.stats
    assert (stats.read.requests, stats.write.requests) == (result.reads.count, result.writes.count)
    assert stats.read.requests + stats.write.requests == 500
    assert stats.read.nbytes == 4096 * stats.read.requests
    assert abs(stats.write.total_ns - result.writes.total) <= 500
    bdev.keep_stats(counts=False)
    bench.run(channel, bench.Job(requests=500))
    assert bdev.stats == stats


def test_calls_batches_and_single_requests_are_counted(controller, bdev, channel):
    channel.write(0, bytes(8192))
    channel.read(0, 4096)
    channel.read_batch(array("Q", range(0, 100 * 4096, 4096)), 4096, bytearray(100 * 4096))
    channel.unmap(0, 1 << 20)
    channel.flush()
    with controller.buffer(4096) as buffer:
        for token in range(3):
            channel.submit_read(token * 4096, buffer, token)
        done = []
        assert eventually(lambda: done.extend(channel.poll()) or len(done) == 3)
    stats = bdev.stats
    assert (stats.read.requests, stats.read.nbytes) == (104, 104 * 4096)
    assert (stats.write.requests, stats.write.nbytes) == (1, 8192)
    assert (stats.unmap.requests, stats.unmap.nbytes) == (1, 1 << 20)
    assert stats.failed == 0
    for counts in stats[:3]:
        assert 0 < counts.shortest_ns <= counts.longest_ns <= counts.total_ns < 60e9
    assert bdev.queue_stats == [stats]
    bdev.reset_stats(counts=False, failures=False)
    assert bdev.stats.read == stats.read._replace(longest_ns=0, shortest_ns=0)
    channel.read(0, 4096)
    assert 0 < bdev.stats.read.shortest_ns == bdev.stats.read.longest_ns
    bdev.reset_stats()
    assert bdev.stats.read == (0, 0, 0, 0, 0)


def test_a_slow_disk_is_seen_to_be_slow():
    with serve("blk", ram="1M", control=True) as target, attach(target.address, dev_type="blk") as controller:
        bdev = controller["VirtioBlk0"]
        with bdev.open() as channel:
            target.control("set_fault", delay=0.05)
            begun = time.monotonic_ns()
            channel.read(0, 512)
            took = time.monotonic_ns() - begun
            assert 50e6 * 0.95 <= bdev.stats.read.longest_ns <= took * 1.05


def test_what_failed_is_counted_as_that():
    with serve("blk", ram="1M", control=True) as target, attach(target.address, dev_type="blk") as controller:
        bdev = controller["VirtioBlk0"]
        with bdev.open() as channel, controller.buffer(512) as buffer:
            target.control("set_fault", every=1)
            with pytest.raises(DeviceError):
                channel.read(0, 512)
            channel.submit_read(0, buffer, 1)
            done = []
            assert eventually(lambda: done.extend(channel.poll()) or done)
        assert (bdev.stats.failed, bdev.stats.read.requests) == (2, 0)


def test_each_queue_has_counters_of_its_own(bdev):
    def read():
        with bdev.open() as channel:
            for _ in range(50):
                channel.read(0, 512)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert sum(stats.read.requests for stats in bdev.queue_stats) == bdev.stats.read.requests == 150


def test_counting_can_be_left_out(bdev, channel):
    channel.read(0, 512)
    bdev.keep_stats(counts=False)
    channel.read(0, 512)
    assert bdev.stats.read.requests == 1
    bdev.keep_stats()
    channel.read(0, 512)
    assert bdev.stats.read.requests == 2


def test_a_histogram_is_kept_on_demand(bdev, channel):
    assert bdev.histogram is None
    bdev.keep_stats(histogram=True)
    assert len(bdev.histogram) == BUCKETS and not any(bdev.histogram)
    channel.read_batch(array("Q", [0] * 100), 512, bytearray(51200))
    assert sum(bdev.histogram) == 100
    bdev.keep_stats(histogram=False)
    assert bdev.histogram is None


def test_a_histogram_begins_anew_while_requests_are_counted(bdev):
    """In the same memory: the loop that counts holds no lock."""
    bdev.keep_stats(histogram=True)
    done = threading.Event()

    def read():
        with bdev.open() as channel:
            while not done.is_set():
                channel.read_batch(array("Q", [0] * 500), 512, bytearray(500 * 512)).raise_for_status()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert eventually(lambda: any(bdev.histogram))
        (stats,) = bdev._account._all()
        before = places(stats)
        for _ in range(50):
            bdev.keep_stats(histogram=False)
            bdev.keep_stats(histogram=True)
        assert places(stats) == before
        assert eventually(lambda: any(bdev.histogram))
    finally:
        done.set()
        reader.join()
    bdev.keep_stats(histogram=True)
    assert not any(bdev.histogram)


def places(stats):
    """Where its arrays have their memory."""
    return sorted(found.buffer_info() for found in reachable(stats) if isinstance(found, array))


def reachable(stats):
    """What an object holds: interpreted, in its dictionary."""
    held = gc.get_referents(stats)
    return held + [value for each in held if isinstance(each, dict) for value in each.values()]


def test_zeroes_that_are_written_are_counted_as_writes(bdev, channel):
    bdev.disk = dataclasses.replace(bdev.disk, write_zeroes=None, write_zeroes_unmap=None)
    channel.write_zeroes(0, 1 << 20)
    assert bdev.stats.write.nbytes == 1 << 20


@pytest.mark.parametrize(
    "ticks, bucket",
    [(0, 0), (127, 127), (128, 128), (255, 255), (256, 256), (257, 256), (511, 383), (512, 384)]
    + [((1 << 64) - 2, BUCKETS - 1)],
)
def test_buckets_are_spdks(ticks, bucket):
    """128 of them a range; the first two ranges have one tick each, the next ones twice as many."""
    stats = Stats()
    stats.enable_histogram(True)
    stats.count(READ, 0, 1, 1 + ticks)
    assert [number for number, count in enumerate(stats.histogram) if count] == [bucket]


def test_ticks_are_those_of_a_clock():
    first = clock()
    time.sleep(0.02)
    second = clock()
    rate = (second[0] - first[0]) / (second[1] - first[1]) * 1e9
    assert rate == pytest.approx(tick_rate(), rel=0.02)
