"""A back end that goes away and comes back, with what was under way."""

import asyncio
import contextlib
import os
import random
import threading
import time
from array import array

import pytest

from tests.conformance.driver import DEPTHS, KINDS, backend, connect, ended, exercise, fill
from tests.model.options import PROTOCOL_FEATURES
from tests.model.wire import P
from virtio.errors import ClosedError, TransportError
from virtio_bdev import Lost, aio


@contextlib.contextmanager
def load(opened, content, batches=1 << 30):
    """Verified random batches in a thread of their own until the end of the context."""
    stop, failures, done = threading.Event(), [], []

    def read():
        chance = random.Random(1)
        try:
            while not stop.is_set() and len(done) < batches:
                offsets = array("Q", [512 * chance.randrange(len(content) // 512) for _ in range(100)])
                into = bytearray(100 * 512)
                opened.read_batch(offsets, 512, into).raise_for_status()
                for number, offset in enumerate(offsets):
                    assert into[number * 512 : number * 512 + 512] == content[offset : offset + 512]
                done.append(1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()
        assert failures == []


def returned(model, connections):
    assert model.wait_for(lambda: model.names().count("connect") >= connections)
    started = lambda: model.rings and all(ring.started for ring in list(model.rings.values()))  # noqa: E731
    assert model.wait_for(started)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [PROTOCOL_FEATURES, P.CONFIG], ids=["all features", "few features"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_under_load_nobody_notices(kind, features, depth):
    with backend(kind, protocol_features=features) as model:
        with connect(model, queues=1, reconnect=5, depth=depth) as controller:
            bdev = next(iter(controller.values()))
            with bdev.open(timeout=10) as opened:
                content = fill(model)
                with load(opened, content) as done:
                    for times in range(2, 7):
                        before = len(done)
                        assert model.wait_for(lambda before=before: len(done) > before)
                        model.disconnect()
                        returned(model, times)
                exercise(model, opened)
            assert bdev.state == "online" and list(controller.values()) == [bdev]
    ended(model, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_what_was_under_way_completes_once(kind, depth):
    """What the back end had taken and not answered is asked of the next one; no buffer stays busy."""
    with backend(kind) as model, connect(model, queues=1, reconnect=5, depth=depth) as controller:
        bdev = next(iter(controller.values()))
        with bdev.open() as opened, controller.buffer(16 * 512) as buffer:
            count = min(16, opened.queue.slots)
            content = fill(model)
            model.options.hold = lambda chain: chain.ring.index >= model.device.first_queue
            for token in range(count):
                assert opened.submit_read(token * 512, buffer, token, at=token * 512, nbytes=512)
            opened.kick()
            assert model.wait_for(lambda: sum(len(r.held) for r in list(model.rings.values())) == count)
            model.options.hold = None
            model.disconnect()
            done, deadline = [], time.monotonic() + 5
            while len(done) < count and time.monotonic() < deadline:
                done += opened.poll()
            time.sleep(0.05)
            assert sorted(done + opened.poll()) == [(token, None) for token in range(count)]
            assert buffer.view()[: count * 512] == content[: count * 512] and buffer.busy == 0


def test_a_command_of_ones_own_is_not_sent_twice():
    with backend("scsi") as model, connect(model, queues=1, reconnect=5) as controller:
        model.options.hold = lambda chain: chain.ring.index >= model.device.first_queue
        failures = []

        def ask():
            try:
                controller.scsi(0, 0, bytes(6))
            except TransportError as error:
                failures.append(str(error))

        asking = threading.Thread(target=ask)
        asking.start()
        assert model.wait_for(lambda: sum(len(r.held) for r in list(model.rings.values())) == 1)
        model.options.hold = None
        model.disconnect()
        asking.join(10)
        assert len(failures) == 1 and "unknown" in failures[0]


def test_asyncio_goes_on():
    async def main():
        with backend("blk") as model:
            content = fill(model)
            async with await aio.attach(model.address, dev_type="blk", queues=1, reconnect=5) as controller:
                async with controller["VirtioBlk0"].open() as opened:
                    for times in range(2, 5):
                        reads = [opened.read(512 * i, 512) for i in range(500)]
                        answers = asyncio.gather(*reads)
                        await asyncio.sleep(0)
                        model.disconnect()
                        assert b"".join(await answers) == content[: 500 * 512]
                        returned(model, times)

    asyncio.run(main())


def test_one_that_stays_away_is_lost_in_time():
    model = backend("blk")
    with model, connect(model, queues=1, reconnect=0.3) as controller:
        events = controller.events()
        bdev = controller["VirtioBlk0"]
        begun = time.monotonic()
        model.close()
        while bdev.state == "online" and time.monotonic() < begun + 5:
            time.sleep(0.001)
        assert bdev.state == "away"
        event = events.wait(5)
        assert isinstance(event, Lost) and bdev.state == "lost"
        assert 0.3 <= time.monotonic() - begun < 3
        with pytest.raises(TransportError, match=r"has gone, and does not come back: .* no such socket"):
            bdev.open()


def test_one_that_comes_back_as_another_device_is_lost():
    with backend("blk") as model, connect(model, queues=1, reconnect=0.3) as controller:
        events = controller.events()
        model.device.features &= ~1 << 6  # BLK_SIZE
        model.disconnect()
        event = events.wait(5)
        assert isinstance(event, Lost) and "other features than before" in str(event.error)


def test_closing_while_it_is_away_waits_for_nothing():
    fds = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    model = backend("blk")
    with model, connect(model, queues=1, reconnect=60) as controller:
        with controller["VirtioBlk0"].open() as opened:
            model.close()
            while controller["VirtioBlk0"].state == "online":
                time.sleep(0.001)
            begun = time.monotonic()
            controller.close()
            assert time.monotonic() - begun < 2
            with pytest.raises(ClosedError):
                opened.read(0, 512)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (fds, threads)


def test_a_hundred_times_cost_no_descriptor_and_no_memory():
    with backend("blk") as model, connect(model, queues=2, reconnect=5) as controller:
        with controller["VirtioBlk0"].open() as opened:
            for times in range(2, 102):
                model.disconnect()
                returned(model, times)
                opened.read(0, 4096)
                if times == 10:
                    before = len(os.listdir("/proc/self/fd")), threading.active_count(), mapped()

            def settled() -> bool:  # a chore may just end
                after = len(os.listdir("/proc/self/fd")), threading.active_count()
                return after[0] <= before[0] + 1 and after[1] <= before[1] + 1

            assert model.wait_for(settled)
            assert mapped() <= before[2] + 4096


def mapped():
    """KiB of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4
