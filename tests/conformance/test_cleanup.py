"""Taking buffers back, and taking the device down (virtio 3.3)."""

import random
from array import array

import pytest

from tests.conformance.driver import KINDS, TIMEOUT, backend, channel, connect, ended, exercise, fill
from tests.model import Chain
from tests.model.wire import F
from virtio.errors import RequestTimeout, VirtioError

BASE = F.VERSION_1 | F.PROTOCOL_FEATURES
RINGS = [BASE, BASE | F.INDIRECT_DESC | F.EVENT_IDX]


def held(model) -> list[Chain]:
    """All chains that the model keeps."""
    return [chain for ring in model.rings.values() for chain in ring.held]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_descriptors_of_a_request_that_timed_out_stay_as_they_are(kind, features):
    """CLN-1, CLN-2: more I/O goes on beside it; heads, descriptors and memory stay its own."""
    with backend(kind, features=features) as model:
        with channel(model, timeout=0.15, queues=1) as opened:
            content = fill(model)
            model.options.hold = lambda chain: True
            with pytest.raises(RequestTimeout):
                opened.read(4096, 4096)
            assert model.wait_for(lambda: len(held(model)) == 1)
            model.options.hold = None
            opened.timeout = TIMEOUT
            for turn in range(300):
                assert opened.read(512 * turn, 512) == content[512 * turn :][:512]
            assert model.release() == 1  # the model compares what it kept with what is there
            exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_answer_lands_in_nobody_elses_memory(kind):
    """CLN-2: reads that timed out are answered in the middle of others."""
    with backend(kind) as model, channel(model, timeout=0.2, queues=1) as opened:
        content = fill(model)
        model.options.hold = lambda chain: len(held(model)) < 8
        with pytest.raises(RequestTimeout):
            opened.read_batch(array("Q", range(0, 4096, 512)), 512, bytearray(4096))
        assert model.wait_for(lambda: len(held(model)) == 8)
        chance = random.Random(1)
        model.options.hold = None
        opened.timeout = TIMEOUT

        # Give each back by hand beside a request of now: both are outstanding, so both are legal.
        for _ in range(200):
            at = 512 * chance.randrange(len(content) // 512)
            assert opened.read(at, 512) == content[at : at + 512], "CLN-2: wrong data"
            if held(model) and chance.random() < 0.2:
                model.do(lambda: release_one(model))
        assert not held(model)
        exercise(model, opened)


def release_one(model) -> None:
    """Complete one chain that was held, in the model's thread."""
    for ring in model.rings.values():
        if ring.held:
            chain = ring.held.pop()
            ring.finish([(chain, model.device.handle(chain) or 0)])
            return


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_timed_out_keeps_its_data_until_the_device_has_it(kind):
    """CLN-2: what the device will read is not changed by what comes after."""
    with backend(kind) as model, channel(model, timeout=0.15, queues=1) as opened:
        data = random.Random(3).randbytes(4096)
        model.options.hold = lambda chain: True
        with pytest.raises(RequestTimeout):
            opened.write(8192, data)
        assert model.wait_for(lambda: len(held(model)) == 1)
        model.options.hold = None
        opened.timeout = TIMEOUT
        assert opened.read(0, 512) == bytes(512)
        assert model.release() == 1
        opened.flush()
        assert bytes(model.device.disk[8192 : 8192 + 4096]) == data, "CLN-2: the late write"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_rings_are_stopped_before_the_connection_ends(kind, features):
    """CLN-2, VHU-9, VHU-10: GET_VRING_BASE for each ring that runs, then the end."""
    with backend(kind, features=features) as model:
        with channel(model, queues=2) as opened:
            exercise(model, opened)
        _, running = model.values("disconnect")[0]
        assert running == [], f"CLN-2: rings {running} ran when the connection ended"
        stopped = [index for index, num in model.values("GET_VRING_BASE")]
        assert stopped == sorted(model.rings), f"VHU-9: rings {stopped} were stopped"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", RINGS)
def test_with_requests_outstanding_the_rings_are_stopped_first_too(kind, features):
    """CLN-2."""
    with backend(kind, features=features) as model:
        with connect(model, timeout=TIMEOUT) as controller:
            bdev = next(iter(controller.values()))
            with bdev.open(timeout=0.1) as opened:
                model.options.hold = lambda chain: True
                with pytest.raises(RequestTimeout):
                    opened.read(0, 512)
        ended(model)
        assert model.values("disconnect")[0][1] == [], "CLN-2: rings ran when it ended"


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_controller_takes_no_more_requests(kind):
    """CLN-2."""
    with backend(kind) as model:
        with connect(model) as controller:
            opened = next(iter(controller.values())).open(timeout=TIMEOUT)
            opened.read(0, 512)
        taken = {index: ring.taken for index, ring in model.rings.items()}
        with pytest.raises(VirtioError):
            opened.read(0, 512)
        opened.close()
        controller.close()
        ended(model)
        assert {index: ring.taken for index, ring in model.rings.items()} == taken
