"""What a request may cost the driver, in instructions: no noise moves them, so this guards its speed."""

import subprocess
import sys
from array import array

import pytest

import virtio_bdev
from tests.conftest import INTERPRETED, ROOT
from tests.needs import module, program
from virtio.target import serve
from virtio_bdev import bench

VALGRIND = program("valgrind")
module("numpy")

# What was measured (benchmarks/instructions.py), and a tenth more.
BUDGETS = [
    ("split, indirect", "batch", 560),
    ("packed, indirect", "batch", 640),
    ("split, indirect", "submit and poll, QD 32", 1000),
]

pytestmark = pytest.mark.skipif(INTERPRETED, reason="it counts what is compiled")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout, way, budget", BUDGETS)
def test_a_request_takes_no_more_instructions_than_it_did(layout, way, budget):
    argv = [sys.executable, str(ROOT / "benchmarks/instructions.py"), layout, way]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=True).stdout
    where, _, told = said.partition(way)
    assert where.strip() == layout
    assert 100 < int(told.split()[0]) <= budget, said


def calls(what):
    """How many calls the interpreter makes or sees meanwhile, of functions in Python and of compiled ones."""
    count = 0

    def see(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        what()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kind", ["blk", "scsi"])
@pytest.mark.parametrize("wait", ["poll", "event"])
@pytest.mark.parametrize("way", ["batch", "bench"])
def test_ten_times_as_many_requests_are_no_more_calls_of_the_interpreter(kind, wait, way):
    """But for what it does twenty times a second, whatever there is to do."""
    with (
        serve(kind, "ram:1M") as target,
        virtio_bdev.attach(target.address, dev_type=kind) as controller,
        next(iter(controller.values())).open(wait=wait) as channel,
    ):

        def move(count):
            if way == "bench":
                bench.run(channel, bench.Job(requests=count, bs=512))
            else:
                offsets = array("Q", [i % 2048 * 512 for i in range(count)])
                channel.read_batch(offsets, 512, into[: count * 512]).raise_for_status()

        into = memoryview(bytearray(100_000 * 512))
        move(10_000)
        few, many = (calls(lambda count=count: move(count)) for count in (10_000, 100_000))
    assert few < 2_000
    assert many < few + 2_000
