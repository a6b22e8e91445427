"""`virtio_bdev.bench`, against the embedded target."""

import dataclasses
import os
import signal
import threading
import time

import pytest

import virtio_bdev
from virtio.errors import (
    DeviceError,
    NoQueueError,
    ReadOnlyError,
    RequestError,
    RequestTimeout,
    TransportError,
)
from virtio.target import serve
from virtio_bdev import bench


@pytest.mark.parametrize("wait", ["poll", "adaptive", "event"])
@pytest.mark.parametrize("rw", ["read", "write", "randread", "randwrite"])
def test_so_many_requests_are_measured(bdev, rw, wait):
    with bdev.open(wait=wait) as channel:
        result = bench.run(channel, bench.Job(rw=rw, bs=4096, iodepth=8, requests=500))
    assert result.requests == result.latency.count == 500
    assert result.iops == pytest.approx(500 / result.seconds)
    assert result.bytes_per_second == pytest.approx(4096 * result.iops)
    latency = result.latency
    assert 0 < latency.minimum <= latency.percentile(50) <= latency.percentile(99.9) <= latency.maximum
    assert latency.maximum <= result.seconds * 1e9


def test_a_run_ends_at_its_time(channel):
    result = bench.run(channel, bench.Job(iodepth=4, runtime=0.1))
    assert 0.1 <= result.seconds < 5
    assert result.requests > 0


def test_a_sequence_of_writes_fills_the_whole_disk_with_random_bytes(channel, controller, bdev):
    bench.run(channel, bench.Job(rw="write", bs=1 << 20, iodepth=4, requests=bdev.size >> 20))
    bytes_seen = controller.image.read_bytes()
    assert len(bytes_seen) == bdev.size
    for at in range(0, bdev.size, 1 << 20):
        assert len(set(bytes_seen[at : at + 65536])) == 256


@pytest.mark.parametrize("rw", ["write", "randwrite", "randrw"])
def test_only_the_part_that_was_asked_for_is_touched(channel, controller, rw):
    bench.run(channel, bench.Job(rw=rw, bs=4096, offset=1 << 20, size=64 << 10, requests=1000))
    image = controller.image.read_bytes()
    assert not any(image[: 1 << 20]) and not any(image[(1 << 20) + (64 << 10) :])
    blocks = [image[(1 << 20) + at : (1 << 20) + at + 4096] for at in range(0, 64 << 10, 4096)]
    assert all(any(block) for block in blocks)


@pytest.mark.parametrize("rw", ["rw", "randrw"])
@pytest.mark.parametrize("percent", [0, 30, 100])
def test_reads_and_writes_are_mixed_and_counted_apart(channel, rw, percent):
    before = channel.bdev.geometry.size
    result = bench.run(channel, bench.Job(rw=rw, rwmixread=percent, requests=4000))
    assert result.requests == 4000 and before == channel.bdev.geometry.size
    assert result.reads.count == pytest.approx(40 * percent, abs=200 if 0 < percent < 100 else 0)
    assert result.latency.count == 4000 and result.latency.maximum == max(
        result.reads.maximum, result.writes.maximum
    )


def test_what_ends_in_the_ramp_is_not_counted(channel):
    long = bench.run(channel, bench.Job(runtime=0.1, ramp=0.8, iodepth=1))
    assert 0.1 <= long.seconds < 0.8


def test_who_follows_is_told_of_the_ramp_too_and_of_the_last_moment(bdev):
    told = []
    job = bench.Job(runtime=0.5, ramp=1.2, iodepth=1, rate_iops=500)
    (result,) = bench.run_jobs(bdev, job, progress=lambda *what: told.append(what))
    assert result.requests <= 251
    assert len(told) >= 2 and all(rate > 0 for _, rate in told)
    assert told[0][0] >= 1.0 and told[-1][0] >= 1.5


@pytest.mark.parametrize(
    "wait, rate, depth", [("poll", 2000, 8), ("adaptive", 2000, 8), ("event", 2000, 8), ("event", 200, 1)]
)
def test_no_more_requests_begin_a_second_than_asked_for(bdev, wait, rate, depth):
    with bdev.open(wait=wait) as channel:
        result = bench.run(channel, bench.Job(runtime=0.3, iodepth=depth, rate_iops=rate))
    assert 0.3 <= result.seconds < 0.3 + 2 / rate + 0.3
    assert result.requests <= rate * 0.3 + 1
    assert result.requests >= rate * 0.3 * 0.8  # on a machine that does something else, too


def test_a_slow_rate_ends_in_time_and_is_no_time_out(bdev):
    with bdev.open(timeout=0.3) as channel:
        result = bench.run(channel, bench.Job(runtime=0.9, iodepth=1, rate_iops=1))
    assert result.requests == 1 and 0.9 <= result.seconds < 1.0


def test_the_drivers_own_time_is_a_part_of_the_whole(channel):
    result = bench.run(channel, bench.Job(iodepth=8, runtime=0.2, busy=True))
    assert 0 < result.busy < result.seconds
    assert bench.run(channel, bench.Job(requests=10)).busy is None


def test_blocks_that_are_met_more_often(channel):
    """Zipf's law, seen in a disk's bytes: after so many writes some blocks are still as they were."""
    job = bench.Job(rw="randwrite", bs=512, size=512 * 4096, requests=16384, seed=1)
    untouched = {}
    for law in ("random", "zipf:1.2"):
        channel.write_zeroes(0, job.size)
        bench.run(channel, dataclasses.replace(job, random_distribution=law))
        data = channel.read(0, job.size)
        untouched[law] = sum(not any(data[at : at + 512]) for at in range(0, job.size, 512))
    assert untouched["random"] < 4096 * 0.03 < 4096 * 0.3 < untouched["zipf:1.2"]


def test_several_jobs_have_a_queue_each(bdev):
    told = []
    results = bench.run_jobs(
        bdev, bench.Job(runtime=1.2, iodepth=4), 3, progress=lambda *what: told.append(what)
    )
    assert len(results) == 3 and all(result.requests > 0 for result in results)
    assert not any(result.interrupted for result in results)
    (seconds, rate), *_ = told
    assert 1.0 <= seconds < 1.2
    assert 0 < rate <= 2 * sum(result.iops for result in results)
    assert len({result.job.seed for result in results}) == 3
    with pytest.raises(NoQueueError):
        bench.run_jobs(bdev, bench.Job(runtime=0.1), 5)
    assert bench.run_jobs(bdev, bench.Job(requests=10), 4)[3].requests == 10


def test_ctrl_c_ends_all_jobs_and_keeps_what_was_measured(bdev):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    results = bench.run_jobs(bdev, bench.Job(runtime=60), 2)
    assert time.monotonic() - begun < 10
    assert all(result.interrupted and result.requests > 0 for result in results)


@pytest.mark.parametrize("wait", ["poll", "adaptive", "event"])
def test_ctrl_c_does_not_wait_for_a_disk_that_hangs_and_counts_the_time_until_then(wait):
    with (
        serve("blk", "ram:1M,delay=60") as target,
        virtio_bdev.attach(target.address, dev_type="blk", queues=2) as disks,
    ):
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        results = bench.run_jobs(disks["VirtioBlk0"], bench.Job(runtime=60), 2, wait=wait)
        timer.join()
        assert threading.active_count() == len(threading.enumerate())
        assert not [thread for thread in threading.enumerate() if thread.name == "bench"]
        assert all(result.interrupted and result.requests == 0 for result in results)
        assert all(0.4 < result.seconds < 5 for result in results)
        disks.close(0.1)  # nor does it wait for that one's stop


def test_what_was_measured_before_ctrl_c_is_not_read_while_it_goes_on(bdev):
    """Each job's own thread has ended first: its time, and what it has counted, are of one moment."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    (result,) = bench.run_jobs(bdev, bench.Job(runtime=60, iodepth=1, rate_iops=5))
    assert 0.4 < result.seconds and result.iops <= 1 / 0.4 + 5
    assert not [thread for thread in threading.enumerate() if thread.name == "bench"]


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(offset=1 << 24), "do not lie within"),
        (dict(offset=100), "not on the 512-byte grid"),
        (dict(size=1 << 30), "1073741824 bytes from 0 on: want 4096 to 16777216"),
        (dict(size=512), "512 bytes from 0 on: want 4096 to"),
        (dict(rwmixread=101), "rwmixread=101, want a percentage"),
    ],
)
def test_a_part_that_is_none_is_told(bdev, how, words):
    with pytest.raises(RequestError, match=words):
        bench.run_jobs(bdev, bench.Job(**how))


def test_reading_writes_nothing(channel, controller):
    bench.run(channel, bench.Job(rw="randread", requests=100))
    assert not any(controller.image.read_bytes())


def test_nothing_stays_in_flight_or_lent(channel, controller):
    free = controller.device.pool.free_bytes
    bench.run(channel, bench.Job(requests=100))
    assert controller.device.pool.free_bytes == free
    assert channel.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(bs=1000), "1000 bytes at 0 are not on the 512-byte grid of"),
        (dict(bs=0), "requests of 0 bytes"),
        (dict(bs=32 << 20), "33554432 bytes at 0 do not lie within the 16777216 bytes of"),
        (dict(bs=4 << 20), "requests of 4194304 bytes: .* takes at most 1048576 in one"),
        (dict(iodepth=257), "257 requests in flight, want 1 to .* on each of 4 queues"),
        (dict(iodepth=0), "0 requests in flight, want 1 to "),
        (dict(rw="trim"), "rw='trim', want one of read, write, randread, randwrite"),
        (dict(runtime=0), "runtime=0, want more than 0 and at most 1e"),
        (dict(runtime=float("nan")), "runtime=nan, want more than 0"),
        (dict(runtime=1e300), "runtime=1e.*, want more than 0 and at most 1e"),
        (dict(ramp=float("inf")), "ramp=inf, want 0 to 1e"),
        (dict(ramp=-1), "ramp=-1, want 0 to 1e"),
        (dict(requests=0), "requests=0, want 1 or more"),
        (dict(rate_iops=1e12), "rate_iops=.*, want more than 0 and at most 1e"),
        (dict(rate_iops=0), "rate_iops=0, want more than 0"),
        (dict(rate_iops=float("nan")), "rate_iops=nan, want more than 0"),
        (dict(iodepth=4, iodepth_batch=5), "iodepth_batch=5, want 1 to 4, the iodepth"),
        (dict(iodepth_batch=0), "iodepth_batch=0, want 1 to 32"),
        (dict(random_distribution="normal:1"), "'normal:1', want random, zipf.:THETA. or pareto.:SHARE."),
        (dict(random_distribution="zipf:much"), "'zipf:much', want random, zipf"),
        (dict(random_distribution="zipf:"), "'zipf:', want random, zipf"),
        (dict(random_distribution="zipf:0"), "zipf:0, want more than 0 and less than 10"),
        (dict(random_distribution="pareto:1"), "pareto:1, want more than 0 and less than 1"),
        (dict(random_distribution="pareto:nan"), "'pareto:nan', want random, zipf"),
    ],
)
def test_what_cannot_be_is_refused(channel, how, words):
    with pytest.raises(RequestError, match=words):
        bench.run(channel, bench.Job(**how))


def test_more_memory_than_there_is_is_refused(bdev):
    with bdev.open() as channel, bdev.controller.buffer(40 << 20):
        with pytest.raises(RequestError, match="32 requests of 1048576 bytes want 33554432 bytes of memory"):
            bench.run(channel, bench.Job(bs=1 << 20, iodepth=32))


def test_a_read_only_disk_is_not_written():
    with serve("blk", "ram:1M,ro") as target, virtio_bdev.attach(target.address, dev_type="blk") as disks:
        with disks["VirtioBlk0"].open() as channel:
            with pytest.raises(ReadOnlyError, match="VirtioBlk0 is read-only"):
                bench.run(channel, bench.Job(rw="randwrite"))
            assert bench.run(channel, bench.Job(requests=10)).requests == 10


@pytest.mark.parametrize("kind", ["blk", "scsi"])
def test_the_first_error_of_the_disk_ends_it_and_is_told_with_its_place(kind):
    with (
        serve(kind, "ram:1M,fail-read=512k") as target,
        virtio_bdev.attach(target.address, dev_type=kind) as disks,
        next(iter(disks.values())).open() as channel,
    ):
        with pytest.raises(DeviceError) as caught:
            bench.run(channel, bench.Job(rw="read", iodepth=8))
        assert caught.value.offset == 512 << 10
        assert channel.read(0, 512) == bytes(512)


def test_a_disk_that_hangs_is_a_time_out_after_which_the_channel_goes_on():
    with (
        serve("blk", "ram:1M,delay=0.3") as target,
        virtio_bdev.attach(target.address, dev_type="blk") as disks,
        disks["VirtioBlk0"].open(timeout=0.1) as channel,
    ):
        with pytest.raises(RequestTimeout, match="has not answered 2 requests in time"):
            bench.run(channel, bench.Job(iodepth=2))
        channel.timeout = 10
        assert channel.read(0, 512) == bytes(512)


def test_the_time_out_is_for_an_answer_and_not_for_the_run():
    with (
        serve("blk", "ram:1M,delay=0.02") as target,
        virtio_bdev.attach(target.address, dev_type="blk") as disks,
        disks["VirtioBlk0"].open(timeout=0.5) as channel,
    ):
        assert bench.run(channel, bench.Job(iodepth=1, runtime=0.8)).seconds >= 0.8


def test_a_disk_that_goes_away_ends_it():
    with (
        serve("blk", "ram:1M") as target,
        virtio_bdev.attach(target.address, dev_type="blk") as disks,
        disks["VirtioBlk0"].open(wait="poll") as channel,
    ):
        end = threading.Timer(0.2, os.kill, (target.pid, signal.SIGKILL))
        end.start()
        with pytest.raises(TransportError):
            bench.run(channel, bench.Job(runtime=60))
        end.join()


@pytest.mark.parametrize("wait", ["poll", "event"])
def test_ctrl_c_ends_it_soon_and_the_channel_goes_on(bdev, wait):
    moments = []

    def interrupt():
        while not queue.in_flight:
            time.sleep(0)
        moments.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with bdev.open(wait=wait) as channel:
        queue = channel._lease.queue
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            bench.run(channel, bench.Job(runtime=60))
        assert time.monotonic() - moments[0] < 1  # 0.1 on a machine that does nothing else
        thread.join()
        assert channel.read(0, 512) == bytes(512)
        assert queue.orphans == 0 or queue.in_flight == queue.orphans
