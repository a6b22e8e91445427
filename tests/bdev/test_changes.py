"""Disks that come, go, grow, fail and hang in use: the embedded target, as its control tells it."""

import random
import threading
import time
from array import array

import pytest

import virtio_bdev
from virtio.errors import DeviceError, RequestError, RequestTimeout, TransportError
from virtio.target import serve
from virtio_bdev import Added, Lost, Removed, Resized


@pytest.fixture
def scsi():
    with serve("scsi", "0:0=ram:4M", "1:0=ram:4M", queues=3, control=True) as target:
        with virtio_bdev.attach(target.address, queues=2) as controller:
            yield target, controller


def test_a_disk_comes_grows_and_goes_while_another_is_read(scsi):
    target, controller = scsi
    events = controller.events()
    done, failures = threading.Event(), []

    def read():
        try:
            with controller["VirtioScsi0t0"].open(timeout=10) as channel:
                while not done.is_set():
                    channel.read(0, 1 << 20)
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(20):
            target.control("add_disk", target=1, lun=7, disk="ram:1M")
            (bdev,) = added = events.wait(10)
            assert isinstance(added, Added) and bdev is controller["VirtioScsi0t1l7"]
            with bdev.open(timeout=10) as channel:
                channel.write(0, bytes([turn]) * 512)
                target.control("resize_disk", target=1, lun=7, size=2 << 20)
                assert events.wait(10) == Resized(bdev, 1 << 20)
                channel.write((2 << 20) - 512, bytes([turn]) * 512)
                target.control("remove_disk", target=1, lun=7)
                assert events.wait(10) == Removed(bdev)
                with pytest.raises(TransportError, match="was removed"):
                    channel.read(0, 512)
    finally:
        done.set()
        reader.join()
    assert failures == [] and list(controller) == ["VirtioScsi0t0", "VirtioScsi0t1"]


def test_a_blk_disk_grows_and_shrinks_under_its_user():
    with serve("blk", "ram:4M", control=True) as target:
        with virtio_bdev.attach(target.address, dev_type="blk") as controller:
            events, bdev = controller.events(), controller["VirtioBlk0"]
            with bdev.open(timeout=10) as channel:
                for size in (8 << 20, 2 << 20, 16 << 20):
                    before = bdev.size
                    target.control("resize_disk", size=size)
                    assert events.wait(10) == Resized(bdev, before) and bdev.size == size
                    channel.write(size - 512, b"the  end" * 64)
                    assert channel.read(size - 512, 512) == b"the  end" * 64


@pytest.mark.parametrize("sense", [(0x29, 0), (0x2A, 9), (0x3F, 0x0E), (0x28, 0)])
def test_a_unit_attention_reaches_no_caller(scsi, sense):
    target, controller = scsi
    with controller["VirtioScsi0t0"].open(timeout=10) as channel, controller.buffer(512) as buffer:
        for _ in range(10):
            target.control("unit_attention", target=0, lun=0, asc=sense[0], ascq=sense[1])
            channel.read(0, 4096)
            target.control("unit_attention", target=0, lun=0, asc=sense[0], ascq=sense[1])
            assert channel.submit_read(0, buffer, 1)
            while not (done := channel.poll()):
                pass
            assert done == [(1, None)]


def test_a_busy_unit_is_asked_again_and_an_always_busy_one_is_an_error(scsi):
    target, controller = scsi
    with controller["VirtioScsi0t0"].open(timeout=10) as channel:
        target.control("set_fault", target=0, lun=0, busy=3)
        channel.read(0, 512)
        target.control("set_fault", target=0, lun=0, busy=1000)
        with pytest.raises(DeviceError, match="BUSY"):
            channel.read(0, 512)
        target.control("set_fault", target=0, lun=0, busy=0)
        channel.read(0, 512)


def test_every_third_command_that_fails_is_told_by_its_item(scsi):
    target, controller = scsi
    with controller["VirtioScsi0t0"].open(timeout=10) as channel:
        target.control("set_fault", target=0, lun=0, every=3)
        batch = channel.read_batch(array("Q", range(0, 300 * 512, 512)), 512, bytearray(300 * 512))
        assert sum(1 for code in batch.status if code) == 100
        target.control("set_fault", target=0, lun=0, every=None)
        channel.read(0, 1 << 20)


def test_what_hangs_is_aborted_and_the_unit_goes_on(scsi):
    """CLN-2: by task management, which the target answers after it has given the commands back."""
    target, controller = scsi
    content = random.Random(1).randbytes(64 << 10)
    with controller["VirtioScsi0t0"].open(timeout=0.3) as channel:
        channel.write(0, content)
        for _ in range(3):
            target.control("set_fault", target=0, lun=0, hang=True)
            with pytest.raises(RequestTimeout):
                channel.read_batch(array("Q", range(0, 8 * 4096, 4096)), 4096, bytearray(8 * 4096))
            deadline = time.monotonic() + 10
            while channel.queue.orphans:
                assert time.monotonic() < deadline, "nothing was aborted"
                time.sleep(0.01)
            target.control("set_fault", target=0, lun=0, hang=False)
            assert channel.read(0, len(content)) == content


def test_a_reset_of_a_unit_that_hangs_lets_its_requests_go_on_elsewhere_in_time(scsi):
    """Each request completes to its caller exactly once."""
    target, controller = scsi
    bdev = controller["VirtioScsi0t0"]
    content = random.Random(2).randbytes(1 << 20)
    results = []

    def read():
        with bdev.open(timeout=20) as channel:
            results.append(channel.read(0, 1 << 20))

    with bdev.open() as channel:
        channel.write(0, content)
    target.control("set_fault", target=0, lun=0, hang=True)
    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    assert not results
    threading.Timer(0.1, lambda: target.control("set_fault", target=0, lun=0, hang=False)).start()
    bdev.reset()
    reader.join(10)
    assert results == [content]


def test_compare_and_write_writes_where_it_finds_what_it_expects(scsi):
    target, controller = scsi
    bdev = controller["VirtioScsi0t0"]
    with bdev.open(timeout=10) as channel:
        old, new = b"old!" * 256, b"new!" * 256
        channel.write(1024, old)
        target.control("unit_attention", target=0, lun=0, asc=0x29, ascq=0)
        assert channel.compare_and_write(1024, old, new)
        assert channel.read(1024, 1024) == new
        assert not channel.compare_and_write(1024, old, bytes(1024))
        assert channel.read(1024, 1024) == new
        most = bdev.limits.max_compare_and_write
        with pytest.raises(RequestError, match=f"takes {most} of each at most"):
            channel.compare_and_write(0, bytes(most + 512), bytes(most + 512))
        with pytest.raises(RequestError, match="512 bytes to compare and 1024 to write"):
            channel.compare_and_write(0, bytes(512), bytes(1024))


def test_a_disk_that_cannot_compare_says_so():
    with serve("blk", ram="1M") as target:
        with virtio_bdev.attach(target.address, dev_type="blk") as controller:
            with controller["VirtioBlk0"].open() as channel:
                with pytest.raises(
                    RequestError, match=r"VirtioBlk0 has no compare and write \(virtio-scsi alone"
                ):
                    channel.compare_and_write(0, bytes(512), bytes(512))


def test_the_end_of_the_device_is_the_last_event():
    with serve("scsi", "ram:1M", control=True) as target:
        controller = virtio_bdev.attach(target.address)
        events = controller.events()
    assert isinstance(events.wait(5), Lost) and events.wait(5) is None
    assert list(events) == []
    controller.close()
