"""Resetting a device that has requests (virtio 2.4, 3.3; vhost-user's RESET_DEVICE)."""

import mmap
import random
import threading
import time
from array import array

import pytest

from tests.conformance.driver import DEPTHS, KINDS, backend, channel, connect, ended, exercise, fill
from tests.model.options import PROTOCOL_FEATURES
from tests.model.wire import P
from virtio.errors import RequestTimeout

RESETS = {
    "RESET_DEVICE and STATUS": PROTOCOL_FEATURES,
    "STATUS alone": PROTOCOL_FEATURES & ~P.RESET_DEVICE,
    "RESET_DEVICE alone": PROTOCOL_FEATURES & ~P.STATUS,
}


def held(model):
    return [chain for ring in list(model.rings.values()) for chain in ring.held]


def first_requests(model, most):
    """For `hold`: the first so many that come by request queues."""
    seen = []

    def hold(chain):
        if chain.ring.index < model.device.first_queue or len(seen) >= most:
            return False
        seen.append(chain)
        return True

    return hold


@pytest.mark.parametrize("features", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_what_the_device_had_is_sent_again_and_completes_once(kind, features, depth):
    """RST-1, CLN-2, VHU-22: the model looks at every message, and forgets what it was given."""
    with (
        backend(kind, protocol_features=features) as model,
        channel(model, queues=2, depth=depth) as opened,
    ):
        content = fill(model)
        offsets = array("Q", random.Random(1).sample(range(0, 1 << 20, 512), 300))
        into = bytearray(300 * 512)
        model.options.hold = first_requests(model, min(20, opened.queue.slots))
        failures = []

        def read():
            try:
                opened.read_batch(offsets, 512, into).raise_for_status()
            except BaseException as error:
                failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert model.wait_for(lambda: len(held(model)) >= min(10, opened.queue.slots))
        opened.bdev.controller.device.restart()
        reader.join(10)
        assert not reader.is_alive() and failures == []
        for number, offset in enumerate(offsets):
            assert into[number * 512 : number * 512 + 512] == content[offset : offset + 512]
        if features & P.STATUS:
            assert model.values("SET_STATUS").count(0) >= 2, "RST-1: no reset by status"
        assert model.names().count("RESET_DEVICE") == bool(features & P.RESET_DEVICE), "VHU-22"
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_requests_one_by_one_are_sent_again_too(kind, depth):
    with backend(kind) as model, channel(model, queues=1, depth=depth) as opened:
        content = fill(model)
        controller = opened.bdev.controller
        count = min(16, opened.queue.slots)
        with controller.buffer(count * 512) as buffer:
            model.options.hold = first_requests(model, count)
            for token in range(count):
                assert opened.submit_read(token * 512, buffer, token, at=token * 512, nbytes=512)
            opened.kick()
            assert model.wait_for(lambda: len(held(model)) == count)
            controller.device.restart()
            done, deadline = [], time.monotonic() + 5
            while len(done) < count and time.monotonic() < deadline:
                done += opened.poll()
            assert sorted(done) == [(token, None) for token in range(count)]
            assert buffer.view() == content[: count * 512] and buffer.busy == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_reset_ends_what_was_given_up(kind, depth):
    """CLN-2: its memory comes back, and the late answer never."""
    with backend(kind) as model, channel(model, queues=1, timeout=0.2, depth=depth) as opened:
        model.options.hold = lambda chain: chain.ring.index >= model.device.first_queue
        with pytest.raises(RequestTimeout):
            opened.write(0, bytes(4096))
        queue = opened.queue
        assert queue.orphans > 0
        opened.bdev.controller.device.restart()
        model.options.hold = None
        assert queue.orphans == 0 and queue.in_flight == 0
        opened.timeout = 5
        exercise(model, opened)


def test_without_any_reset_what_the_device_has_is_waited_for():
    """A back end that knows neither STATUS nor RESET_DEVICE may complete what it had at any time."""
    bare = PROTOCOL_FEATURES & ~(P.STATUS | P.RESET_DEVICE)
    with backend("blk", protocol_features=bare) as model:
        with connect(model, queues=1, timeout=0.5) as controller:
            (bdev,) = controller.values()
            with bdev.open(timeout=5) as opened:
                content = fill(model)
                model.options.hold = first_requests(model, 4)
                with controller.buffer(4 * 512) as buffer:
                    for token in range(4):
                        opened.submit_read(token * 512, buffer, token, at=token * 512, nbytes=512)
                    opened.kick()
                    assert model.wait_for(lambda: len(held(model)) == 4)
                    later = threading.Timer(0.1, model.release)
                    later.start()
                    bdev.reset()
                    assert dict(opened.poll()) == dict.fromkeys(range(4))
                    assert buffer.view() == content[:2048]
                assert model.names().count("connect") == 1


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_unit_that_is_not_reset_is_reset_with_its_device(depth):
    with backend("scsi") as model, channel(model, queues=1, depth=depth) as opened:
        model.device.manage = lambda tmf: 11  # FUNCTION REJECTED
        content = fill(model)
        opened.bdev.reset()
        assert [tmf.subtype for tmf in model.device.tmfs] == [5]
        assert model.values("SET_STATUS").count(0) >= 2
        assert opened.read(0, 4096) == content[:4096]
        exercise(model, opened)


def test_what_no_task_management_brings_back_the_reset_of_the_device_does():
    with backend("scsi") as model, channel(model, queues=1, timeout=0.2) as opened:
        model.device.manage = lambda tmf: 0  # and does nothing
        opened.bdev.controller.device.transport.timeout = 0.3
        model.options.hold = first_requests(model, 1)
        with pytest.raises(RequestTimeout):
            opened.read(0, 512)
        assert model.wait_for(lambda: model.values("SET_STATUS").count(0) >= 2, 10)
        assert model.wait_for(lambda: opened.queue.orphans == 0)
        opened.timeout = 5
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_what_hangs_and_knows_no_reset_is_connected_to_again_with_other_memory(kind):
    """CLN-2: whatever the old connection's memory is used for later, nobody sees it."""
    bare = PROTOCOL_FEATURES & ~(P.STATUS | P.RESET_DEVICE)
    with backend(kind, protocol_features=bare) as model:
        with connect(model, queues=2, timeout=0.5) as controller:
            device = controller.device
            bdev = next(iter(controller.values()))
            with bdev.open(timeout=5) as opened, controller.buffer(4 * 512) as buffer:
                content = fill(model)
                kept = bytes(range(256)) * 2
                model.options.hold = first_requests(model, 2)
                with (
                    controller.buffer(512) as written,
                    open(f"/proc/self/fd/{device._region.fd}", "r+b") as old,
                ):
                    written.view()[:] = kept
                    opened.submit_read(512, buffer, 1, nbytes=512)
                    opened.submit_write(8192, written, 2)
                    opened.kick()
                    assert model.wait_for(lambda: len(held(model)) == 2)
                    threading.Thread(target=device.restart).start()
                    done, deadline = [], time.monotonic() + 10
                    with mmap.mmap(old.fileno(), 0) as memory:
                        while len(done) < 2 and time.monotonic() < deadline:
                            done += opened.poll()
                        memory[:] = b"\xaa" * len(memory)
                    assert sorted(done) == [(1, None), (2, None)]
                    assert written.view() == kept == model.device.disk[8192:8704]
                assert buffer.view()[:512] == content[512:1024]
                assert model.names().count("connect") == 2
                exercise(model, opened)
    ended(model, 2)


@pytest.mark.parametrize("depth", DEPTHS)
def test_resets_rescans_and_a_call_share_one_queue(depth):
    """Whoever borrows the queue waits for the call that a reset has only paused."""
    with backend("scsi") as model, channel(model, queues=1, timeout=20, depth=depth) as opened:
        content = fill(model)
        controller = opened.bdev.controller
        stop, failures, batches = threading.Event(), [], []

        def forever(work):
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                failures.append(error)

        def read():
            into = bytearray(100 * 512)
            opened.read_batch(array("Q", range(0, 100 * 512, 512)), 512, into).raise_for_status()
            assert into == content[: 100 * 512]
            batches.append(1)

        workers = [threading.Thread(target=forever, args=(work,)) for work in (read, controller.rescan)]
        for worker in workers:
            worker.start()
        for _ in range(30):
            controller.device.restart()
            time.sleep(0.01)
        stop.set()
        for worker in workers:
            worker.join(20)
            assert not worker.is_alive()
        assert failures == [] and batches
        assert opened.bdev.state == "online"
