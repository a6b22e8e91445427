"""Rate limits, by each way in. What is asserted is a bound from above, which a slow machine only helps."""

import asyncio
import errno
import select
import threading
import time
from array import array

import pytest

from virtio_bdev import RateLimits, RequestError, aio

BURST_S = 0.05


def seconds(work):
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


@pytest.fixture(params=["ios", "bytes"])
def limited(request, bdev):
    """A disk of 1,000 requests of 4 KiB a second."""
    limits = RateLimits(rw_ios_per_sec=1000) if request.param == "ios" else RateLimits(r_mbytes_per_sec=4)
    bdev.set_rate_limits(limits)
    return bdev


def test_a_batch_takes_as_long_as_it_must(limited):
    with limited.open() as channel:
        offsets = array("Q", range(0, 400 * 4096, 4096))
        took = seconds(lambda: channel.read_batch(offsets, 4096, bytearray(400 * 4096)).raise_for_status())
    assert took > 0.4 * 0.97 - BURST_S


@pytest.mark.parametrize("wait", ["adaptive", "poll", "event"])
def test_so_do_calls_one_after_another(limited, wait):
    with limited.open(wait=wait) as channel:
        took = seconds(lambda: [channel.read(0, 4096) for _ in range(200)])
    assert took > 0.2 * 0.97 - BURST_S


def test_channels_of_several_threads_share_it(limited):
    def read():
        with limited.open() as channel:
            channel.read_batch(array("Q", [0] * 100), 4096, bytearray(100 * 4096)).raise_for_status()

    threads = [threading.Thread(target=read) for _ in range(4)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begun > 0.4 * 0.97 - BURST_S


def test_who_submits_and_sleeps_is_woken_up_when_there_is_room(limited):
    with limited.open() as channel, limited.controller.buffer(4096) as buffer:
        sleeper = select.poll()
        sleeper.register(channel.fileno(), select.POLLIN)
        begun, sent, done = time.monotonic(), 0, 0
        while done < 200:
            while sent < 200 and channel.submit_read(0, buffer, sent):
                sent += 1
            finished = channel.poll()
            assert all(error is None for _, error in finished)
            done += len(finished)
            if not finished and channel.arm():
                assert sleeper.poll(10_000)
        assert time.monotonic() - begun > 0.2 * 0.97 - BURST_S


def test_asyncio_waits_too(controller):
    address = controller.address
    kind = "blk" if "blk" in type(controller.device).__name__.lower() else "scsi"
    controller.close()

    async def main():
        async with await aio.attach(address, dev_type=kind) as again:
            bdev = next(iter(again.values()))
            bdev.blocking.set_rate_limits(RateLimits(rw_ios_per_sec=1000))
            async with bdev.open() as channel:
                begun = time.monotonic()
                await asyncio.gather(*(channel.read(0, 4096) for _ in range(300)))
                return time.monotonic() - begun

    assert asyncio.run(main()) > 0.3 * 0.97 - BURST_S


def test_writes_and_reads_have_limits_of_their_own(bdev):
    bdev.set_rate_limits(RateLimits(w_mbytes_per_sec=2))
    with bdev.open() as channel:
        assert (
            seconds(lambda: channel.write(0, bytes(1 << 20))) < 5
        )  # larger than what is saved up: it may go
        assert seconds(lambda: channel.write(0, bytes(4096))) > 0.4  # and is paid back
        channel.flush()
        channel.read(0, 1 << 20)
    bdev.set_rate_limits(RateLimits())
    assert bdev.throttle is None and not bdev.geometry.limited


def test_what_is_no_limit_is_told(bdev):
    with pytest.raises(RequestError, match="rw_ios_per_sec -1, want a number from 0"):
        bdev.set_rate_limits(RateLimits(rw_ios_per_sec=-1))


def test_the_time_out_counts_as_ever(controller):
    bdev = next(iter(controller.values()))
    bdev.set_rate_limits(RateLimits(rw_ios_per_sec=10))
    with bdev.open(timeout=0.3) as channel:
        with pytest.raises(TimeoutError, match=r"rate limits of the disk let \d requests be sent") as caught:
            channel.read_batch(array("Q", [0] * 100), 4096, bytearray(100 * 4096))
    status = caught.value.batch.status
    assert 0 < status.count(0) < 10 and status.count(-errno.EINPROGRESS) == 100 - status.count(0)


def test_who_waits_goes_on_when_there_is_no_limit_any_more(bdev):
    bdev.set_rate_limits(RateLimits(rw_ios_per_sec=1))
    lifted = threading.Timer(0.1, bdev.set_rate_limits, [RateLimits()])
    lifted.start()
    with bdev.open() as channel:  # at that rate it would take 20 minutes
        channel.read_batch(array("Q", [0] * 1200), 512, bytearray(1200 * 512)).raise_for_status()
    lifted.join()


def test_so_does_who_submits_and_sleeps(bdev):
    bdev.set_rate_limits(RateLimits(r_mbytes_per_sec=1))
    with bdev.open() as channel, bdev.controller.buffer(bdev.limits.max_transfer) as buffer:
        sleeper = select.poll()
        sleeper.register(channel.fileno(), select.POLLIN)
        size = min(buffer.nbytes, bdev.size)
        assert channel.submit_read(0, buffer, 0, nbytes=size)  # pays back for as many seconds as it has MiB
        assert not channel.submit_read(0, buffer, 1, nbytes=512)
        bdev.set_rate_limits(RateLimits())
        done, sent = [], False
        while len(done) < 2:
            sent = sent or channel.submit_read(0, buffer, 1, nbytes=512)
            done += channel.poll()
            if len(done) < 2 and channel.arm():
                assert sleeper.poll(10_000)
        assert sorted(done) == [(0, None), (1, None)]
