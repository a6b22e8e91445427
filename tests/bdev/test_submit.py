"""Requests submitted one by one and polled, against the embedded target."""

import errno
import os
import random
import select
import time

import pytest

import virtio_bdev
from virtio.errors import ClosedError, DeviceError, ReadOnlyError, RequestError, TransportError
from virtio.target import serve

BLOCK = 4096


def gather(channel, count, seconds=10):
    """So many completions, in whatever order."""
    done, deadline = [], time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < deadline, f"{done} of {count}"
        done += channel.poll()
    return done


def fill(controller):
    data = random.Random(1).randbytes(16 << 20)
    with open(controller.image, "r+b") as image:
        image.write(data)
    return data


def test_what_is_submitted_comes_back_with_its_token_and_its_data(channel, controller):
    content = fill(controller)
    chance = random.Random(2)
    with controller.buffer(24 * BLOCK) as buffer:
        for _ in range(20):
            blocks = [chance.randrange(len(content) // BLOCK) for _ in range(24)]
            for token, block in enumerate(blocks):
                assert channel.submit_read(block * BLOCK, buffer, token, at=token * BLOCK, nbytes=BLOCK)
            assert sorted(gather(channel, 24)) == [(token, None) for token in range(24)]
            for token, block in enumerate(blocks):
                got = buffer.view()[token * BLOCK : (token + 1) * BLOCK]
                assert got == content[block * BLOCK : (block + 1) * BLOCK]
        assert buffer.busy == 0


def test_every_kind_of_request(channel, controller):
    data = os.urandom(BLOCK)
    with controller.buffer(BLOCK) as buffer:
        buffer.view()[:] = data
        assert channel.submit_write(3 * BLOCK, buffer, 2**63)
        assert buffer.busy == 1
        assert gather(channel, 1) == [(2**63, None)]
        assert channel.submit_flush(1)
        assert gather(channel, 1) == [(1, None)]
        with open(controller.image, "rb") as image:
            image.seek(3 * BLOCK)
            assert image.read(BLOCK) == data
        assert channel.submit_write_zeroes(3 * BLOCK, BLOCK, 3)
        assert channel.submit_write_zeroes(4 * BLOCK, BLOCK, 4, unmap=False)
        assert channel.submit_unmap(5 * BLOCK, BLOCK, 5)
        assert sorted(gather(channel, 3)) == [(3, None), (4, None), (5, None)]
        assert channel.read(3 * BLOCK, BLOCK) == bytes(BLOCK)


def test_a_full_queue_is_false_and_not_an_error(controller):
    content = fill(controller)
    bdev = next(iter(controller.values()))
    with bdev.open() as channel, controller.buffer(BLOCK) as buffer:
        sent = 0
        while channel.submit_read(0, buffer, sent):
            sent += 1
            assert sent <= 256
        assert sent == min(channel.queue.slots, bdev.limits.depth)
        assert buffer.busy == sent
        assert len(gather(channel, sent)) == sent
        assert channel.submit_read(0, buffer, 0) and gather(channel, 1) == [(0, None)]
        assert buffer.view() == content[:BLOCK]


def test_poll_gives_no_more_than_asked_for_and_forgets_none(channel, controller):
    with controller.buffer(BLOCK) as buffer:
        for token in range(10):
            channel.submit_read(0, buffer, token)
        seen = []
        deadline = time.monotonic() + 5
        while len(seen) < 10 and time.monotonic() < deadline:
            some = channel.poll(3)
            assert len(some) <= 3
            seen += some
        assert sorted(seen) == [(token, None) for token in range(10)]
        assert channel.poll() == []


def test_two_channels_that_poll_for_few_each_get_theirs_oldest_first(controller):
    bdev = next(iter(controller.values()))
    with bdev.open() as one, bdev.open() as two, controller.buffer(BLOCK) as buffer:
        for _ in range(30):
            for token in range(6):
                assert one.submit_read(0, buffer, token) and two.submit_read(0, buffer, token)
            seen = {one: [], two: []}
            deadline = time.monotonic() + 10
            one.kick()
            time.sleep(0.001)  # all are back, as a rule: in turns
            while sum(map(len, seen.values())) < 12:
                assert time.monotonic() < deadline, seen
                for channel, limit in ((one, 2), (two, 1)):
                    seen[channel] += [token for token, _ in channel.poll(limit)]
            assert seen == {one: list(range(6)), two: list(range(6))}


def test_armed_one_can_sleep_on_the_descriptor_and_is_always_woken(channel, controller):
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    with controller.buffer(BLOCK) as buffer:
        for turn in range(3000):
            channel.submit_read(turn % 4096 * BLOCK, buffer, turn)
            while not (done := channel.poll()):
                if channel.arm():
                    assert poll.poll(10_000), f"slept through completion {turn}"
            assert done == [(turn, None)]


def test_two_channels_of_a_thread_get_their_own_and_wake_each_other(controller):
    bdev = next(iter(controller.values()))
    with bdev.open() as one, bdev.open() as two, controller.buffer(BLOCK) as buffer:
        assert one.fileno() == two.fileno()
        poll = select.poll()
        poll.register(one.fileno(), select.POLLIN)
        for turn in range(300):
            one.submit_read(0, buffer, 1)
            one.kick()
            two.submit_read(0, buffer, 2)
            if turn % 3 == 0:
                two.read(0, BLOCK)  # which takes everybody's answers, and the wake-up
            seen = []
            while len(seen) < 2:
                seen += [("one", *done) for done in one.poll()] + [("two", *done) for done in two.poll()]
                if len(seen) < 2 and one.arm() and two.arm():
                    assert poll.poll(10_000), f"{seen} in turn {turn}"
            assert sorted(seen) == [("one", 1, None), ("two", 2, None)]


def test_blocking_calls_go_on_beside_what_was_submitted(channel, controller):
    content = fill(controller)
    with controller.buffer(24 * BLOCK) as buffer:
        for token in range(24):
            channel.submit_read(token * BLOCK, buffer, token, at=token * BLOCK, nbytes=BLOCK)
        assert channel.read(1 << 20, 1 << 20) == content[1 << 20 : 2 << 20]
        assert len(gather(channel, 24)) == 24
        assert buffer.view() == content[: 24 * BLOCK]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda c, b: c.submit_read(100, b, 0), "not on the 512-byte grid"),
        (lambda c, b: c.submit_read(-512, b, 0), "do not lie within"),
        (lambda c, b: c.submit_read(16 << 20, b, 0), "do not lie within"),
        (lambda c, b: c.submit_read((16 << 20) - 512, b, 0), "do not lie within"),
        (lambda c, b: c.submit_read(2**63 - 512, b, 0, nbytes=512), "do not lie within"),
        (lambda c, b: c.submit_read(0, b, 0, at=2**62, nbytes=512), "of a buffer of 4096"),
        (lambda c, b: c.submit_read(0, b, 0, at=-512, nbytes=512), "512 bytes at -512 of a buffer of 4096"),
        (lambda c, b: c.submit_read(0, b, 0, nbytes=8192), "8192 bytes at 0 of a buffer of 4096"),
        (lambda c, b: c.submit_read(0, b, 0, nbytes=0), "0 bytes in one request"),
        (lambda c, b: c.submit_unmap(0, 1 << 40, 0), "do not lie within"),
        (lambda c, b: c.submit_unmap(0, 0, 0), "0 bytes in one request"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sent(channel, controller, call, words):
    with controller.buffer(BLOCK) as buffer:
        with pytest.raises(RequestError, match=words):
            call(channel, buffer)
        assert buffer.busy == 0 and channel.queue.in_flight == 0


def test_the_rest_of_a_buffer_is_what_is_meant_where_no_length_is_given(channel, controller):
    content = fill(controller)
    with controller.buffer(BLOCK) as buffer:
        assert channel.submit_read(0, buffer, 7, at=512) and gather(channel, 1) == [(7, None)]
        assert buffer.view()[512:] == content[: BLOCK - 512]


def test_buffers_and_channels_that_are_closed_or_foreign_are_refused(controller):
    bdev = next(iter(controller.values()))
    with serve("blk", ram="1M") as other, virtio_bdev.attach(other.address, dev_type="blk") as foreign:
        with foreign.buffer(BLOCK) as buffer, bdev.open() as channel:
            with pytest.raises(RequestError, match="not one of this controller's"):
                channel.submit_read(0, buffer, 0)
    with bdev.open() as channel:
        buffer = controller.buffer(BLOCK)
        buffer.close()
        with pytest.raises(ClosedError):
            channel.submit_read(0, buffer, 0)
    with controller.buffer(BLOCK) as buffer:
        with pytest.raises(ClosedError):
            channel.submit_read(0, buffer, 0)


def test_a_read_only_disk_takes_no_write(tmp_path):
    with serve("scsi", "ram:1M,ro") as target, virtio_bdev.attach(target.address) as controller:
        with controller["VirtioScsi0t0"].open() as channel, controller.buffer(BLOCK) as buffer:
            with pytest.raises(ReadOnlyError):
                channel.submit_write(0, buffer, 0)
            assert channel.submit_flush(1) and channel.poll() == [(1, None)]


@pytest.mark.parametrize("kind", ["blk", "scsi"])
def test_an_error_of_the_device_comes_with_its_token_and_its_offset(kind):
    with (
        serve(kind, "ram:1M,fail-read=8192") as target,
        virtio_bdev.attach(target.address, dev_type=kind) as controller,
        next(iter(controller.values())).open() as channel,
        controller.buffer(BLOCK) as buffer,
    ):
        for token in range(4):
            channel.submit_read(token * BLOCK, buffer, token)
        done = dict(gather(channel, 4))
        assert [token for token, error in done.items() if error] == [2]
        assert isinstance(done[2], DeviceError) and (done[2].errno, done[2].offset) == (errno.EIO, 8192)
        assert buffer.busy == 0


def test_a_lost_device_is_an_exception_of_poll():
    with serve("blk", ram="1M") as target:
        controller = virtio_bdev.attach(target.address, dev_type="blk")
        channel = controller["VirtioBlk0"].open()
        buffer = controller.buffer(BLOCK)
    with pytest.raises(TransportError):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            channel.submit_read(0, buffer, 1)
            channel.poll()
    channel.close()
    controller.close()
    buffer.close()
    assert buffer.busy == 0


def test_a_closed_channel_leaves_its_requests_to_the_device_and_their_buffers_with_them(tmp_path):
    with (
        serve("blk", "ram:1M,delay=0.2") as target,
        virtio_bdev.attach(target.address, dev_type="blk", queues=1) as controller,
    ):
        free = controller.device.pool.free_bytes
        buffer = controller.buffer(BLOCK)
        channel = controller["VirtioBlk0"].open()
        channel.submit_read(0, buffer, 1)
        channel.kick()
        channel.close()
        buffer.close()
        assert buffer.busy == 1 and controller.device.pool.free_bytes < free
        with controller["VirtioBlk0"].open() as channel:
            channel.read(0, BLOCK)
            assert channel.poll() == []
        assert buffer.busy == 0 and controller.device.pool.free_bytes == free


def test_a_cancelled_write_keeps_others_out_of_its_range_until_it_has_landed():
    """CLN-2."""
    with (
        serve("blk", "ram:1M,delay=0.2") as target,
        virtio_bdev.attach(target.address, dev_type="blk", queues=1) as controller,
        controller["VirtioBlk0"].open() as channel,
    ):
        first, second = controller.buffer(BLOCK), controller.buffer(BLOCK)
        first.view()[:], second.view()[:] = b"1" * BLOCK, b"2" * BLOCK
        channel.submit_write(0, first, 1)
        channel.kick()
        assert channel.cancel(1) and not channel.cancel(1)
        assert not channel.submit_write(512, second, 2, nbytes=512)
        assert channel.submit_write(BLOCK, second, 3)
        assert gather(channel, 1) == [(3, None)] and first.busy == 0
        assert channel.submit_write(512, second, 2, nbytes=512) and gather(channel, 1) == [(2, None)]
        assert channel.read(0, BLOCK) == b"1" * 512 + b"2" * 512 + b"1" * (BLOCK - 1024)
        first.close()
        second.close()


def test_several_buffers_in_one_call(channel, controller):
    parts = [os.urandom(size) for size in (100, 412, 4096, 3584)]
    channel.writev(512, parts)
    with open(controller.image, "rb") as image:
        image.seek(512)
        assert image.read(8192) == b"".join(parts)
    into = [bytearray(len(part)) for part in parts]
    channel.readv(512, into)
    assert into == parts
    with pytest.raises(RequestError, match="grid"):
        channel.readv(0, [bytearray(100)])
