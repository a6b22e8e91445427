"""Lost kicks and lost interrupts: sleeping on both sides, at random depths, until one would be missed.

A few requests in the suite; VIRTIO_LITMUS=5000000 for as many of each as that. What is missed is a
RequestTimeout, after `PATIENCE_S`.
"""

import contextlib
import os
import random
import threading
import time

import pytest

import virtio_bdev
from tests import needs
from tests.conftest import INTERPRETED
from tests.peers.qsd import IN_MEMORY, StorageDaemon
from virtio.target import serve
from virtio.wire.virtio import Feature
from virtio_bdev import bench

REQUESTS = int(os.environ.get("VIRTIO_LITMUS", "2000" if INTERPRETED else "50000"))
QUEUES, PATIENCE_S = 2, 10.0


@contextlib.contextmanager
def storage_daemon():
    program = needs.program("qemu-storage-daemon")
    with StorageDaemon(program, [IN_MEMORY], queues=QUEUES, poll_ns=0) as daemon:
        yield daemon.address


@contextlib.contextmanager
def own(packed):
    with serve("blk", "ram:1M", queues=QUEUES, packed=packed) as target:
        yield target.address


BACK_ENDS = {
    "qemu-storage-daemon": storage_daemon,
    "our target, split": lambda: own(False),
    "our target, packed": lambda: own(True),
}


@pytest.mark.timeout(24 * 3600 if "VIRTIO_LITMUS" in os.environ else 120)
@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("most", [128, 3], ids=["usual", "small"])
def test_no_kick_and_no_interrupt_is_lost(back_end, most, request):
    """At depths up to 3 also with what the ring's cache lines then hold beside it."""
    seed = random.getrandbits(64)
    done, failures = [0] * QUEUES, []
    with (
        BACK_ENDS[back_end]() as address,
        virtio_bdev.attach(
            address, dev_type="blk", queues=QUEUES, depth=most if most < 128 else None
        ) as controller,
    ):
        assert controller.device.queue_size == (256 if most == 128 else 4)
        assert controller.device.features & Feature.EVENT_IDX
        assert bool(controller.device.features & Feature.RING_PACKED) == ("packed" in back_end)
        (bdev,) = controller.values()

        def use(number):
            chance = random.Random(seed + number)
            try:
                with bdev.open(wait="event", timeout=PATIENCE_S) as channel:
                    while done[number] < REQUESTS // QUEUES and not failures:
                        job = one(chance, most)
                        assert bench.run(channel, job).requests == job.requests
                        done[number] += job.requests
            except BaseException as error:
                failures.append(f"after {done[number]} requests: {error!r}")

        begun = time.monotonic()
        threads = [threading.Thread(target=use, args=(number,)) for number in range(QUEUES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.monotonic() - begun
    assert not failures, f"seed {seed}: {failures}"
    request.node.add_report_section("call", "litmus", f"{sum(done):,} requests in {took:.1f} s")


def one(chance, most):
    """A burst: mostly at small depths, where each side sleeps most often."""
    depth = min(chance.choice([1, 1, 2, 3, chance.randint(1, 128)]), most)
    return bench.Job(
        rw=chance.choice(["read", "randread", "randrw"]),
        bs=chance.choice([512, 4096]),
        iodepth=depth,
        iodepth_batch=chance.randint(1, depth),
        requests=chance.randint(1, 2000),
    )
