"""Many units on one controller."""

import gc
import os
import threading
import time
from array import array

import pytest

import virtio_bdev
from virtio.target import serve

UNITS = 1024
MOST_BYTES = 10 << 10  # of memory for a unit


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """1,024 units: 256 targets of four, all on one file with each block's number in it."""
    path = tmp_path_factory.mktemp("crowd") / "disk"
    path.write_bytes(array("Q", [at for at in range(2048) for _ in range(64)]).tobytes())
    disks = [f"{number % 256}:{number // 256}=file:{path}" for number in range(UNITS)]
    with serve("scsi", *disks, queues=4) as target:
        yield target


def test_a_thousand_units_are_found_in_little_time_and_memory(crowd, capsys):
    with virtio_bdev.attach(crowd.address):
        pass  # whatever is loaded at first is loaded
    gc.collect()
    before, start = resident(), time.monotonic()
    with virtio_bdev.attach(crowd.address) as controller:
        seconds = time.monotonic() - start
        gc.collect()
        each = (resident() - before) / UNITS
        assert len(controller) == UNITS
        with capsys.disabled():
            print(f"\n{UNITS} units found in {seconds:.2f} s, {each / 1024:.1f} KiB a unit", end=" ")
        assert each < MOST_BYTES


def test_every_one_is_read_by_three_threads_on_four_queues(crowd):
    with virtio_bdev.attach(crowd.address, queues=4) as controller:
        bdevs = list(controller.values())
        failures = []

        def work(number):
            try:
                channels = [bdev.open(timeout=20) for bdev in bdevs[number::3]]
                for at, channel in enumerate(channels):
                    want = array("Q", [at] * 64).tobytes()
                    assert channel.read(at * 512, 512) == want
                for channel in channels:
                    channel.close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
