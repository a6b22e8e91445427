"""What is left behind where a call ends early: by Ctrl-C, a time-out, a cancellation, a close."""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from array import array

import pytest

import virtio_bdev
from virtio.errors import ClosedError, QueueFullError, RequestTimeout
from virtio.ring import lease as leases
from virtio.target import serve

BLOCK = 512
BLOCKS = 8
compiled = pytest.mark.skipif(
    leases.__file__.endswith(".py"), reason="interpreted, a signal handler runs between any two steps"
)


@pytest.fixture
def interrupt():
    """A function that makes a call, and has KeyboardInterrupt raised in it in so many seconds."""
    wanted = False

    def handle(*signal):
        nonlocal wanted
        if wanted:
            wanted = False
            raise KeyboardInterrupt

    def interrupted(seconds, call, *arguments):
        nonlocal wanted
        wanted = True
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            call(*arguments)
            wanted = False
        except KeyboardInterrupt:
            pass

    before = signal.signal(signal.SIGALRM, handle)
    yield interrupted
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def one_disk(options="", kind="blk", **how):
    """A disk on a queue, each of whose first blocks is full of its own number; its target too."""
    with (
        serve(kind, f"ram:1M{options}", queues=1, **how) as target,
        virtio_bdev.attach(target.address, dev_type=kind, queues=1) as controller,
    ):
        (disk,) = controller.values()
        with disk.open() as channel:
            for number in range(BLOCKS):
                channel.write(number * BLOCK, bytes([number]) * BLOCK)
        yield disk, target


def settled(queue):
    """Wait until the device has returned all requests of nobody's."""
    deadline = time.monotonic() + 10
    while queue.orphans or queue.renounced:
        assert time.monotonic() < deadline
        queue.look()
        queue.sweep()
    return queue.in_flight


@compiled
def test_a_read_after_one_that_was_interrupted_has_its_own_bytes(interrupt):
    with one_disk(",delay=0.002") as (disk, _), disk.open() as channel:
        for turn in range(100):
            moment = 0.00004 + turn % 20 * 0.000004  # when spinning becomes sleeping
            interrupt(moment, channel.read, 0, BLOCK)
            number = 1 + turn % (BLOCKS - 1)
            assert channel.read(number * BLOCK, BLOCK) == bytes([number]) * BLOCK
            assert settled(channel.queue) == 0


def test_a_read_that_was_given_up_while_somebody_had_the_queue_is_nobodys_answer():
    with one_disk(",delay=0.1") as (disk, _), disk.open(timeout=0.3) as channel:
        lease = channel._lease

        def have_the_queue():
            time.sleep(0.03)  # amid the read
            lease.pause(None)
            time.sleep(1)
            lease.resume()

        other = threading.Thread(target=have_the_queue)
        other.start()
        begun = time.monotonic()
        with pytest.raises(RequestTimeout):
            channel.read(0, BLOCK)
        assert time.monotonic() - begun < 1  # once its time, not twice
        other.join()
        channel.timeout = 10
        assert channel.read(5 * BLOCK, BLOCK) == bytes([5]) * BLOCK
        assert settled(channel.queue) == 0


@compiled
def test_a_channel_that_is_closed_after_an_interrupt_leaves_others_asleep(interrupt):
    with one_disk(",delay=0.02") as (disk, _), disk.open() as other:
        for turn in range(20):
            with disk.open() as channel:
                interrupt(0.00004 + turn * 0.000004, channel.read, 0, BLOCK)
        deadline = time.monotonic() + 10
        while other.poll() or not other.arm():
            assert time.monotonic() < deadline
        assert settled(other.queue) == 0 and other.budget.in_flight == 0


@compiled
def test_no_interrupt_leaves_a_lock_taken_or_a_buffer_busy(interrupt):
    offsets, into = array("Q", [0, BLOCK, 2 * BLOCK]), bytearray(3 * BLOCK)

    def read_and_read():
        while True:
            channel.read_batch(offsets, BLOCK, into)

    with one_disk() as (disk, _), disk.open() as channel:
        for turn in range(2000):
            interrupt(0.00002 + turn % 30 * 0.00001, read_and_read)
            assert settled(channel.queue) == 0
            assert channel._scratch is None or not channel._scratch.busy
        channel.read_batch(offsets, BLOCK, into)
        assert into == b"".join(bytes([number]) * BLOCK for number in range(3))


def test_an_interrupt_amid_a_call_that_waits_for_a_reset_is_raised_after_it(interrupt):
    with one_disk(",delay=0.3") as (disk, _), disk.open() as channel:
        lease = channel._lease
        paused, over = threading.Event(), []

        def have_the_queue():
            time.sleep(0.1)
            lease.pause(None)
            paused.set()
            time.sleep(0.5)
            over.append(time.monotonic())
            lease.resume()

        other = threading.Thread(target=have_the_queue)
        other.start()
        offsets, into = array("Q", range(0, BLOCKS * BLOCK, BLOCK)), bytearray(BLOCKS * BLOCK)
        interrupt(0.3, channel.read_batch, offsets, BLOCK, into)
        assert paused.is_set() and over and time.monotonic() >= over[0]
        other.join()
        for _ in range(2):
            assert channel.read(3 * BLOCK, BLOCK) == bytes([3]) * BLOCK
            lease.pause(None)  # what the next reset does
            lease.resume()


def test_an_interrupt_of_a_reset_that_waits_for_a_queue_lets_its_calls_go_on(interrupt):
    with one_disk() as (disk, _), disk.open(timeout=1) as channel:
        lease = channel._lease
        lease._lock.acquire()  # somebody is amid a call, and not in the compiled loop
        threading.Timer(0.3, lease._lock.release).start()
        interrupt(0.1, disk.reset)
        assert not channel.queue.paused
        time.sleep(0.3)
        channel.flush()


def test_an_interrupt_while_an_answer_is_judged_loses_no_answer(monkeypatch):
    with one_disk(",fail-read=512k") as (disk, _), disk.open() as channel:
        judge = channel._judge
        with disk.controller.buffer(BLOCK) as buffer:
            for token, offset in enumerate((0, BLOCK, 512 << 10, BLOCK)):
                assert channel.submit_read(offset, buffer, token)
            channel.kick()
            time.sleep(0.05)  # all are back, as a rule

            def interrupted(*how):
                monkeypatch.setattr(channel, "_judge", judge)
                raise KeyboardInterrupt

            monkeypatch.setattr(channel, "_judge", interrupted)
            seen = {}
            deadline = time.monotonic() + 10
            while len(seen) < 4:
                assert time.monotonic() < deadline, seen
                with contextlib.suppress(KeyboardInterrupt):
                    seen |= dict(channel.poll())
        assert {token for token, error in seen.items() if error is None} == {0, 1, 3}
        assert channel.queue.in_flight == channel.budget.in_flight == 0


def test_a_cancelled_write_that_waited_to_be_sent_again_is_not():
    with one_disk(kind="scsi", control=True) as (disk, target), disk.open() as channel:
        with disk.controller.buffer(BLOCK) as old, disk.controller.buffer(BLOCK) as new:
            old.view()[:], new.view()[:] = b"A" * BLOCK, b"B" * BLOCK
            target.control("set_fault", target=0, lun=0, busy=1000)
            assert channel.submit_write(0, old, 1)
            deadline = time.monotonic() + 10
            while not channel._later or channel._tries[1] < 4:  # so that its pause is some ms
                assert time.monotonic() < deadline
                channel.poll()
            target.control("set_fault", target=0, lun=0, busy=0)
            if channel._later:
                assert channel.cancel(1) and not channel.cancel(1)
                assert not old.busy and channel.budget.in_flight == 0
            assert channel.submit_write(0, new, 2)
            while (2, None) not in channel.poll():
                assert time.monotonic() < deadline
            time.sleep(0.05)
            channel.poll()
            assert channel.read(0, BLOCK) == b"B" * BLOCK


@pytest.mark.parametrize("wait", ["poll", "adaptive", "event"])
def test_who_sleeps_is_woken_if_a_blocking_call_took_his_answer(wait):
    with one_disk(",delay=0.03") as (disk, _), disk.open(wait=wait) as channel:
        with disk.controller.buffer(BLOCK) as buffer:
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN)
            for token in range(3):
                assert channel.submit_read(0, buffer, token)
                while not channel.arm():
                    assert channel.poll() == []
                assert channel.read(BLOCK, BLOCK) == bytes([1]) * BLOCK
                assert poll.poll(10_000)
                assert channel.poll() == [(token, None)]


def test_who_sleeps_is_woken_if_another_channel_took_his_answer():
    with one_disk(",delay=0.03") as (disk, _), disk.open() as one, disk.open() as two:
        with disk.controller.buffer(BLOCK) as buffer:
            poll = select.poll()
            poll.register(one.fileno(), select.POLLIN)
            assert one.submit_read(0, buffer, 1) and one.arm()
            time.sleep(0.1)
            assert two.poll() == [] and poll.poll(10_000)
            assert one.poll() == [(1, None)]
            while not one.arm():
                assert one.poll() == []
            assert not poll.poll(0)


@pytest.mark.parametrize("call", ["arm", "alarm"])
def test_after_a_close_no_file_with_the_descriptors_number_is_touched(call, tmp_path):
    with serve("blk", "ram:1M") as target:
        controller = virtio_bdev.attach(target.address, dev_type="blk", queues=1)
        (disk,) = controller.values()
        channel, buffer = disk.open(), controller.buffer(BLOCK)
        if call == "alarm":  # of a limit, which wakes up who waits for it
            disk.set_rate_limits(virtio_bdev.RateLimits(rw_ios_per_sec=20))
            while channel.submit_read(0, buffer, 0):
                pass
        number = channel.fileno()
        buffer.close()
        controller.close()
        ours, theirs = socket.socketpair()
        os.dup2(ours.fileno(), number)
        theirs.send(b"12345678")
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, number)
            stack.callback(ours.close)
            stack.callback(theirs.close)
            if call == "arm":
                with pytest.raises(ClosedError):
                    channel.arm()
            else:
                time.sleep(0.3)
            channel.close()
            assert os.read(number, 100) == b"12345678"
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(8)


def test_a_blocking_call_beside_answers_that_nobody_polls_for_says_so():
    with one_disk() as (disk, _), disk.open() as channel, disk.controller.buffer(BLOCK) as buffer:
        sent = 0
        while channel.submit_read(0, buffer, sent):
            sent += 1
        channel.kick()
        with pytest.raises(
            QueueFullError, match=f"all {sent} slots .* hold answers .*: `poll` for them first"
        ):
            channel.read_batch(array("Q", [0]), BLOCK, bytearray(BLOCK))
        assert len(channel.poll(sent)) == sent
        assert channel.read(BLOCK, BLOCK) == bytes([1]) * BLOCK


def test_a_disk_that_was_removed_leaves_no_answer_that_keeps_others_awake():
    with (
        serve("scsi", "0:0=ram:1M", "1:0=ram:1M", control=True) as target,
        virtio_bdev.attach(target.address, queues=1) as controller,
    ):
        (gone, stays) = controller.values()
        with gone.open() as one, stays.open() as two, controller.buffer(BLOCK) as buffer:
            assert one.submit_read(0, buffer, 1)
            one.kick()
            time.sleep(0.05)
            target.control("remove_disk", target=0, lun=0)
            deadline = time.monotonic() + 10
            while gone.geometry.online:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(virtio_bdev.TransportError, match="was removed"):
                one.poll()
            while two.poll() or not two.arm():
                assert time.monotonic() < deadline
            assert not buffer.busy
