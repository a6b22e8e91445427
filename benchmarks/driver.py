"""The driver alone, on a device that answers at once: ns a request, by ring layout and way in.

The device's own time is taken off. By turns; medians. Run it alone on a machine: python benchmarks/driver.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from array import array
from collections.abc import Callable
from contextlib import ExitStack

from null_device import LAYOUTS, NullTransport, null_channel

from virtio_bdev import Channel, bench

ITEMS = 4096  # of a batch: 16 MiB
DEPTHS = (1, 32, 128)


def batch(channel: Channel, requests: int) -> None:
    """`read_batch` into the pool, as deep as the queue."""
    offsets = memoryview(array("Q", range(0, ITEMS * 4096, 4096)))
    with channel.bdev.controller.buffer(ITEMS * 4096) as buffer:
        for _ in range(requests // ITEMS):
            channel.read_batch(offsets, 4096, buffer)


def load(depth: int) -> Callable[[Channel, int], None]:
    """The loop of `virtio-bdev bench`, which makes offsets and takes times too."""

    def run(channel: Channel, requests: int) -> None:
        bench.run(channel, bench.Job(rw="randread", iodepth=depth, requests=requests))

    return run


def submit(depth: int) -> Callable[[Channel, int], None]:
    """`submit_read` and `poll` in a loop of Python's."""

    def run(channel: Channel, requests: int) -> None:
        with channel.bdev.controller.buffer(4096) as buffer:
            submit_read, poll = channel.submit_read, channel.poll
            done = 0
            while done < requests:
                for token in range(depth):
                    submit_read(4096 * token, buffer, token)
                done += len(poll(depth))

    return run


def blocking(channel: Channel, requests: int) -> None:
    """`readinto` a buffer of the pool, one at a time."""
    with channel.bdev.controller.buffer(4096) as buffer:
        for number in range(requests):
            channel.readinto(4096 * (number % 1024), buffer)


WAYS: dict[str, tuple[Callable[[Channel, int], None], int]] = {  # and its share of the requests
    "batch": (batch, 1),
    **{f"bench, QD {depth}": (load(depth), 1 if depth > 1 else 10) for depth in DEPTHS},
    **{f"submit and poll, QD {depth}": (submit(depth), 5) for depth in (1, 32)},
    "blocking": (blocking, 20),
}


def once(way: str, channel: Channel, transport: NullTransport, requests: int) -> float:
    """Nanoseconds a request."""
    run, share = WAYS[way]
    requests = max(ITEMS, requests // share)
    run(channel, ITEMS)  # what is done once is done
    transport.device_ns = 0
    begun = time.perf_counter_ns()
    run(channel, requests)
    took = time.perf_counter_ns() - begun - transport.device_ns
    return took / (requests // ITEMS * ITEMS if way == "batch" else requests)


def measure(
    turns: int, requests: int, wants: Callable[[str], bool] = lambda way: True
) -> dict[str, dict[str, list[float]]]:
    """By way in and layout, what each turn came to; of the ways that are wanted."""
    ways = [way for way in WAYS if wants(way)]
    figures: dict[str, dict[str, list[float]]] = {way: {layout: [] for layout in LAYOUTS} for way in ways}
    with ExitStack() as stack:
        channels = {layout: stack.enter_context(null_channel(layout)) for layout in LAYOUTS}
        for _ in range(turns):
            for way in ways:
                for layout, (channel, transport) in channels.items():
                    figures[way][layout].append(once(way, channel, transport, requests))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args()
    figures = measure(options.turns, options.requests)
    print(f"ns a request of 4 KiB, the device's own time taken off; medians of {options.turns} turns")
    print(f"{'':24}" + "".join(f"{layout:>18}" for layout in LAYOUTS))
    for way, by_layout in figures.items():
        print(f"{way:24}" + "".join(f"{statistics.median(v):18.1f}" for v in by_layout.values()))


if __name__ == "__main__":
    main()
