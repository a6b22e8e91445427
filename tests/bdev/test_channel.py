"""Calls on channels, against the embedded target; the bytes are compared in its file."""

import errno
import random
import sys
import threading
from array import array

import pytest

import virtio_bdev
from tests.conftest import INTERPRETED
from tests.space import allocated, gave_back
from virtio.errors import (
    ChannelInUse,
    ClosedError,
    NoQueueError,
    ReadOnlyError,
    RequestError,
    TransportError,
)
from virtio.target import serve
from virtio_bdev.bench import Job

viewable = pytest.mark.skipif(
    INTERPRETED and sys.version_info < (3, 12),
    reason="interpreted classes have the buffer protocol from Python 3.12 on",
)


@pytest.mark.parametrize("nbytes", [512, 4096, 1 << 20, (5 << 20) + 512])
def test_what_is_written_is_in_the_file_and_is_read_back(channel, controller, nbytes):
    data = random.Random(nbytes).randbytes(nbytes)
    channel.write(3 * 512, data)
    with open(controller.image, "rb") as image:
        assert image.read(3 * 512) == bytes(3 * 512)
        assert image.read(nbytes) == data
        assert not any(image.read())
    assert channel.read(3 * 512, nbytes) == data
    into = bytearray(nbytes)
    channel.readinto(3 * 512, into)
    assert into == data


def test_the_last_block_can_be_read_and_written(channel, bdev):
    channel.write(bdev.size - 512, b"\xab" * 512)
    assert channel.read(bdev.size - 512, 512) == b"\xab" * 512


def test_nothing_is_read_and_written_as_nothing(channel, bdev):
    assert channel.read(bdev.size, 0) == b""
    channel.write(0, b"")
    channel.write_zeroes(0, 0)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: array("Q", data)])
def test_any_contiguous_buffer_can_be_written(channel, kind):
    data = random.Random(1).randbytes(8192)
    channel.write(0, kind(data))
    assert channel.read(0, 8192) == data


def test_pool_buffers_are_used_in_place(channel, controller):
    with controller.buffer(1 << 20) as buffer:
        buffer.view()[:] = random.Random(2).randbytes(1 << 20)
        free = controller.device.pool.free_bytes
        channel.write(4096, buffer)
        assert controller.device.pool.free_bytes == free  # no bounce memory was taken
        assert channel.read(4096, 1 << 20) == bytes(buffer.view())
        buffer.view()[:] = bytes(1 << 20)
        channel.readinto(4096, buffer)
        assert controller.image.read_bytes()[4096 : 4096 + (1 << 20)] == bytes(buffer.view())
        assert buffer.busy == 0


@viewable
def test_a_view_of_a_pool_buffer_is_used_in_place_too(channel, controller):
    with controller.buffer(8192) as buffer, memoryview(buffer) as view, view[512:1024] as part:
        part[:] = b"\x77" * 512
        free = controller.device.pool.free_bytes
        channel.write(0, part)
        assert controller.device.pool.free_bytes == free
    assert channel.read(0, 512) == b"\x77" * 512


def test_a_buffer_of_another_controller_is_copied(channel):
    with serve("blk", ram="1M") as target, virtio_bdev.attach(target.address, dev_type="blk") as other:
        with other.buffer(512) as buffer:
            buffer.view()[:] = b"\x55" * 512
            channel.write(0, buffer)
    assert channel.read(0, 512) == b"\x55" * 512


def test_a_closed_buffer_is_refused(channel, controller):
    buffer = controller.buffer(512)
    buffer.close()
    with pytest.raises(ClosedError, match="this buffer was closed"):
        channel.write(0, buffer)


def test_zeroes_are_written_where_asked_and_nowhere_else(channel, controller):
    channel.write(0, b"\xff" * (4 << 20))
    channel.write_zeroes(512, 3 << 20)
    channel.write_zeroes((3 << 20) + 1024, 512, unmap=False)
    want = b"\xff" * 512 + bytes(3 << 20) + b"\xff" * 512 + bytes(512)
    got = controller.image.read_bytes()[: 4 << 20]
    assert got[: len(want)] == want and set(got[len(want) :]) == {0xFF}


def test_unmap_gives_the_space_back_or_says_that_it_is_not_supported(channel, bdev, controller):
    channel.write(0, b"\xff" * (8 << 20))
    before = allocated(controller.image)
    if bdev.limits.max_unmap:
        channel.unmap(0, 8 << 20)
        assert gave_back(8 << 20, before, controller.image)
    else:
        with pytest.raises(RequestError, match="does not support unmap"):
            channel.unmap(0, 8 << 20)


def test_flush_and_fua_come_back(channel):
    channel.flush()
    channel.write(0, bytes(512), fua=True)


@pytest.mark.parametrize(
    "offset, nbytes, words",
    [
        (-512, 512, "do not lie within"),
        (0, -512, "do not lie within"),
        (16 << 20, 512, "do not lie within the 16777216 bytes"),
        ((16 << 20) - 512, 1024, "do not lie within"),
        (1 << 64, 512, "do not lie within"),
        (100, 512, "are not on the 512-byte grid"),
        (512, 100, "are not on the 512-byte grid"),
    ],
)
def test_a_range_off_the_disk_or_its_grid_is_refused_before_anything_is_sent(
    channel, bdev, offset, nbytes, words
):
    """BLK-6, BLK-9."""
    sent = channel._lease.queue.in_flight
    calls = [
        lambda: channel.unmap(offset, nbytes),
        lambda: channel.write_zeroes(offset, nbytes),
    ]
    if nbytes > 0:
        calls += [
            lambda: channel.read(offset, nbytes),
            lambda: channel.write(offset, bytes(nbytes)),
            lambda: (
                channel.read_batch(array("q", [0, offset]), nbytes, bytearray(2 * nbytes))
                if offset < 1 << 63
                else channel.read(offset, nbytes)
            ),
        ]
    for call in calls:
        with pytest.raises(RequestError, match=words):
            call()
    assert channel._lease.queue.in_flight == sent


def test_unfit_memory_is_refused(channel):
    with pytest.raises(RequestError, match="read-only, and is to be read into"):
        channel.readinto(0, bytes(512))
    with pytest.raises(RequestError, match="not contiguous"):
        channel.write(0, memoryview(bytearray(2048))[::2])
    with pytest.raises(RequestError, match="512 bytes for 2 items of 512"):
        channel.read_batch(array("Q", [0, 512]), 512, bytearray(512))
    square = memoryview(bytes(32)).cast("Q", (2, 2))
    for offsets in (array("I", [0, 512]), array("d", [0.0, 512.0]), square):
        with pytest.raises(RequestError, match="64-bit"):
            channel.read_batch(offsets, 512, bytearray(1024))
    with pytest.raises(RequestError, match=r'offsets: want 64-bit .* such as array\("Q", offsets\)'):
        channel.read_batch([0, 512], 512, bytearray(1024))
    with pytest.raises(RequestError, match=r"offsets are not contiguous \(a slice with a step\?\)"):
        channel.read_batch(memoryview(array("Q", range(0, 2048, 512)))[::2], 512, bytearray(1024))


@pytest.mark.parametrize("wrong", ["0", 0.0, None])
def test_what_is_no_whole_number_is_refused(channel, wrong):
    for call in (
        lambda: channel.read(wrong, 512),
        lambda: channel.readinto(wrong, bytearray(512)),
        lambda: channel.write(wrong, bytes(512)),
        lambda: channel.unmap(wrong, 512),
    ):
        with pytest.raises(RequestError, match=f"offset {wrong!r}, want a whole number"):
            call()
    with pytest.raises(RequestError, match=f"length {wrong!r}, want a whole number"):
        channel.read(0, wrong)


def test_whatever_has_an_index_is_a_whole_number(bdev):
    class Whole:
        def __index__(self):
            return 512

    bdev.check(Whole(), Whole())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("wait", ["adaptive", "poll", "event"])
def test_batches_move_every_item(bdev, controller, in_place, wait):
    rng = random.Random(3)
    offsets = array("Q", rng.sample(range(0, 16 << 20, 4096), 1000))
    data = rng.randbytes(4096 * 1000)
    with bdev.open(wait=wait) as channel, controller.buffer(len(data)) as buffer:
        buffer.view()[:] = data
        batch = channel.write_batch(offsets, 4096, buffer if in_place else data)
        assert list(batch.status) == [0] * 1000
        batch.raise_for_status()
        image = controller.image.read_bytes()
        for i, offset in enumerate(offsets):
            assert image[offset : offset + 4096] == data[4096 * i : 4096 * (i + 1)]
        into = bytearray(len(data))
        buffer.view()[:] = bytes(len(data))
        batch = channel.read_batch(offsets, 4096, buffer if in_place else into)
        assert list(batch.status) == [0] * 1000 and "0 failed" in repr(batch)
        assert (bytes(buffer.view()) if in_place else bytes(into)) == data


def test_batch_items_larger_than_a_request_are_split(channel, controller):
    offsets = array("Q", [0, 8 << 20])
    data = random.Random(4).randbytes(6 << 20)
    assert channel.write_batch(offsets, 3 << 20, data).status.tolist() == [0, 0]
    image = controller.image.read_bytes()
    assert image[: 3 << 20] == data[: 3 << 20]
    assert image[8 << 20 : 11 << 20] == data[3 << 20 :]


def test_a_depth_that_one_queue_would_take_is_said():
    with serve("scsi", "ram:1M", queues=2) as target:
        with virtio_bdev.attach(target.address, queues=2) as controller:
            bdev = controller["VirtioScsi0t0"]
            with bdev.open() as channel, pytest.raises(RequestError) as refused:
                channel.apply(Job().load(bdev), 256)
        with virtio_bdev.attach(target.address, queues=1) as controller:
            alone = controller["VirtioScsi0t0"].limits.depth
            with controller["VirtioScsi0t0"].open() as channel:
                with pytest.raises(RequestError, match="takes on each of 1 queues$"):
                    channel.apply(Job().load(channel.bdev), 256)
    assert str(refused.value).endswith(f"takes on each of 2 queues; with one queue {alone}")


def test_an_empty_batch_is_done(channel):
    assert len(channel.read_batch(array("Q"), 512, bytearray())) == 0


def test_a_closed_channel_and_a_closed_controller_say_so(bdev, controller):
    channel = bdev.open()
    channel.close()
    channel.close()
    with pytest.raises(ClosedError, match="channel of .* was closed"):
        channel.read(0, 512)
    channel = bdev.open()
    controller.close()
    with pytest.raises(ClosedError, match="controller of .* was closed"):
        channel.read(0, 512)
    assert bdev.state == "lost"
    channel.close()


def test_channels_of_one_thread_share_a_queue_and_threads_do_not(bdev, controller):
    first, second = bdev.open(), bdev.open()
    assert first._lease is second._lease
    others, opened, done = [], threading.Barrier(4), threading.Event()

    def work():
        with bdev.open() as channel:
            others.append(channel._lease)
            opened.wait(10)
            done.wait(10)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    opened.wait(10)
    assert len({id(lease) for lease in [first._lease, *others]}) == 4
    failures = []

    def one_too_many():
        try:
            bdev.open()
        except NoQueueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=one_too_many)
    thread.start()
    thread.join()
    assert len(failures) == 1 and "has 4 queues" in failures[0]
    done.set()
    for thread in threads:
        thread.join()
    first.close()
    second.close()
    with bdev.open():  # and the leases were given back
        pass


def test_a_second_call_on_a_lease_at_the_same_time_is_refused(channel):
    with channel._lease, pytest.raises(ChannelInUse, match="open a channel in each thread"):
        channel.read(0, 512)
    channel.read(0, 512)


def test_threads_with_channels_of_their_own_do_not_disturb_each_other(bdev, controller):
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        base = seed * (4 << 20)
        with bdev.open() as channel:
            for _ in range(50):
                offset = base + rng.randrange(0, 4 << 20, 4096)
                data = rng.randbytes(4096)
                channel.write(offset, data)
                if channel.read(offset, 4096) != data:
                    wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("dev_type", ["blk", "scsi"])
def test_a_read_only_disk_takes_no_writes(dev_type, tmp_path):
    """BLK-7."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        serve(dev_type, f"file:{image},ro") as target,
        virtio_bdev.attach(target.address, dev_type=dev_type) as controller,
    ):
        (bdev,) = controller.values()
        assert bdev.read_only
        with bdev.open() as channel:
            calls = [
                lambda: channel.write(0, bytes(512)),
                lambda: channel.write_zeroes(0, 512),
                lambda: channel.unmap(0, 512),
                lambda: channel.write_batch(array("Q", [0]), 512, bytes(512)),
            ]
            for call in calls:
                with pytest.raises(ReadOnlyError, match="is read-only"):
                    call()
            assert channel.read(0, 512) == bytes(512)
            channel.flush()


@pytest.mark.parametrize("dev_type", ["blk", "scsi"])
def test_blocks_of_4096_bytes_are_the_grid(dev_type):
    with (
        serve(dev_type, "ram:1M,bs=4096") as target,
        virtio_bdev.attach(target.address, dev_type=dev_type) as controller,
    ):
        (bdev,) = controller.values()
        assert bdev.block_size == 4096 and bdev.blocks == 256
        with bdev.open() as channel:
            channel.write(8192, b"\x11" * 4096)
            assert channel.read(4096, 12288) == bytes(4096) + b"\x11" * 4096 + bytes(4096)
            with pytest.raises(RequestError, match="4096-byte grid"):
                channel.read(512, 4096)


def test_a_lost_device_is_an_error_at_once_for_every_channel(controller, bdev):
    with bdev.open() as channel:
        channel.read(0, 512)
        controller.device.life.end(TransportError(errno.ECONNRESET, "gone"))
        with pytest.raises(TransportError, match="gone") as info:
            channel.read(0, 512)
        assert info.value.errno == errno.ECONNRESET
        with pytest.raises(TransportError, match="gone"):
            bdev.open()


def test_a_bad_way_to_wait_is_refused(bdev):
    with pytest.raises(RequestError, match="want one of adaptive, poll, event"):
        bdev.open(wait="forever")
