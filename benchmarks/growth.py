"""What it costs to have more queues, more disks, more units: on the embedded target.

That has one core, and this process another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import peers

import virtio_bdev
from virtio.target import Served, serve
from virtio_bdev import bench

Values = dict[str, list[float]]

_HOLD = """
import os, sys, virtio_bdev
with virtio_bdev.attach(sys.argv[1], dev_type="blk", queues=int(sys.argv[2])):
    print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024)
"""


def measure(turns: int, wants: Callable[[str], bool]) -> Iterator[tuple[str, str, Values]]:
    """What, unit, and figures by how many there were, of what is wanted."""
    rows: dict[str, tuple[str, Callable[[int], Values]]] = {
        "start of Python with the library": ("ms", _starts),
        "a request, one queue of several, embedded target": ("ns", _queues),
        "a request, so many queues at work, embedded target": ("ns", _at_work),
        "memory of a queue of 256, beside others": ("KiB", _queue_memory),
        "attaching so many disks": ("ms a disk", _attached),
        "memory of an attached disk, 1 queue": ("KiB", _held),
        "attaching a controller of so many units": ("ms", _units),
    }
    for what, (unit, measured) in rows.items():
        if wants(what):
            with peers.on_core(peers.CLIENT_CORE):
                figures = measured(turns)
            yield what, unit, figures


@contextmanager
def _target(kind: str, *disks: str, **how: Any) -> Iterator[Served]:
    with ExitStack() as stack:
        with peers.on_core(peers.TARGET_CORE):
            target = stack.enter_context(serve(kind, *disks, **how))
        yield target


def _starts(turns: int) -> Values:
    """Of an interpreter: bare, with `virtio`'s rings, and with all of `virtio_bdev`."""
    programs = {"bare": "", "virtio": "import virtio.device.blk", "virtio_bdev": "import virtio_bdev"}
    values: Values = {name: [] for name in programs}
    for _ in range(turns):
        for name, program in programs.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True)
            values[name].append(1e3 * (time.perf_counter() - begun))
    return values


def _queues(turns: int) -> Values:
    """The same load on one queue, of a controller with 1 to 16."""
    values: Values = {}
    with _target("blk", ram="16M", queues=16) as target:
        for _ in range(turns):
            for queues in (1, 4, 16):
                with virtio_bdev.attach(target.address, dev_type="blk", queues=queues) as controller:
                    (bdev,) = controller.values()
                    with bdev.open(wait="poll") as channel:
                        result = bench.run(channel, bench.Job(iodepth=32, requests=20_000))
                        values.setdefault(str(queues), []).append(1e9 / result.iops)
    return values


def _at_work(turns: int) -> Values:
    """The same number of requests, and as many in flight, on 1 to 4 queues at once, each of its own thread:
    all threads have one core here, so that what is left is the cost of having them."""
    values: Values = {}
    with _target("blk", ram="16M", queues=4) as target:
        for _ in range(turns):
            for queues in (1, 2, 4):
                with virtio_bdev.attach(target.address, dev_type="blk", queues=queues) as controller:
                    (bdev,) = controller.values()
                    job = bench.Job(iodepth=32 // queues, requests=40_000 // queues)
                    results = bench.run_jobs(bdev, job, queues)
                    seconds = max(result.seconds for result in results)
                    done = sum(result.requests for result in results)
                    values.setdefault(str(queues), []).append(1e9 * seconds / done)
    return values


def _queue_memory(turns: int) -> Values:
    """What 3 and 15 queues more take, each: private memory and what of the shared one was touched."""
    values: Values = {}
    with _target("blk", ram="1M", queues=16) as target:
        for _ in range(turns):
            held = {}
            for queues in (1, 4, 16):  # a process each: what one has let go of would serve the next
                argv = [sys.executable, "-c", _HOLD, target.address, str(queues)]
                held[queues] = float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
            for queues in (4, 16):
                values.setdefault(str(queues), []).append((held[queues] - held[1]) / (queues - 1))
    return values


def _attached(turns: int) -> Values:
    return _disks(turns, (1, 16, 256))[0]


def _held(turns: int) -> Values:
    return _disks(min(turns, 3), (16, 256))[1]


def _disks(turns: int, counts: tuple[int, ...]) -> tuple[Values, Values]:
    """By how many are attached: how long each takes, and how much memory."""
    times: Values = {}
    memory: Values = {}
    with ExitStack() as stack:
        targets = [stack.enter_context(_target("blk", ram="1M")) for _ in range(max(counts))]
        for _ in range(turns):
            for count in counts:
                before, begun = _resident(), time.perf_counter()
                with ExitStack() as attached:
                    for target in targets[:count]:
                        attached.enter_context(virtio_bdev.attach(target.address, dev_type="blk", queues=1))
                    took = 1e3 * (time.perf_counter() - begun) / count
                    grown = (_resident() - before) / count
                times.setdefault(str(count), []).append(took)
                memory.setdefault(str(count), []).append(grown)
    return times, memory


def _units(turns: int) -> Values:
    values: Values = {}
    for count in (1, 64, 1024):
        disks = [f"{number // 16}:{number % 16}=ram:1M" for number in range(count)]
        with _target("scsi", *disks) as target:
            for _ in range(turns):
                begun = time.perf_counter()
                with virtio_bdev.attach(target.address) as controller:
                    assert len(controller) == count
                    values.setdefault(str(count), []).append(1e3 * (time.perf_counter() - begun))
    return values


def _resident() -> float:
    """KiB of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
