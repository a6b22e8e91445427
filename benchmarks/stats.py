"""What counting costs: nanoseconds a request, with and without, on a device that answers at once.

The device is a few NumPy operations at each kick, in the driver's own thread: the same for all, so their
difference is the counting. By turns; medians. Run it alone on a machine: python benchmarks/stats.py
"""

from __future__ import annotations

import statistics
import time
from array import array

import numpy as np

from virtio.ring import split
from virtio.ring.codes import CONSTANT, FROM_DEVICE, OFFSET
from virtio.ring.doorbell import Doorbell
from virtio.ring.layout import Layout, queue_bytes
from virtio.ring.region import Mapping, Pool, Region
from virtio.ring.requests import RequestQueue
from virtio.ring.stats import Stats
from virtio.ring.task import Task
from virtio.ring.template import Patch, Template

SIZE, REQUESTS, TURNS = 256, 200_000, 41
LAYOUT = Layout(16, 0, 1, 0, 0xFF, False)  # virtio-blk's


class NullDevice:
    """Uses whatever is available, with status 0, at each kick."""

    def __init__(self) -> None:
        region = Region(4 << 20)
        pool = Pool(region)
        self.memory = pool.take(queue_bytes(SIZE, LAYOUT, 1, True))
        self.data = pool.take(4096)
        mapping = Mapping.contiguous(1 << 32)
        self.queue = RequestQueue(
            self.memory, region.view, mapping, SIZE, LAYOUT, indirect=True, event_idx=False
        )
        self.queue.connect(Doorbell(call=self._kicked))
        available, used, end = split.areas(SIZE)
        ring = np.frombuffer(region.view, np.uint8)[self.memory.offset :]
        self._available = ring[available : available + 4 + 2 * SIZE].view(np.uint16)
        self._used_idx = ring[used + 2 : used + 4].view(np.uint16)
        self._used = ring[used + 4 : used + 4 + 8 * SIZE].view(np.uint32)
        stride = (queue_bytes(SIZE, LAYOUT, 1, True) - end) // SIZE
        self._status = ring[end + 16 : end + SIZE * stride : stride]  # behind the header
        self._seen = 0

    def _kicked(self) -> None:
        now = int(self._available[1])
        places = np.arange(self._seen, self._seen + (now - self._seen & 0xFFFF)) % SIZE
        heads = self._available[2 + places]
        self._status[heads] = 0
        self._used[2 * places] = heads
        self._seen = now
        self._used_idx[0] = now


def once(device: NullDevice, stats: Stats | None, offsets: memoryview, template: Template) -> float:
    """Nanoseconds a request of one batch."""
    task = Task(template, offsets, 4096, 4096, mode=CONSTANT, base=device.data.offset, stats=stats)
    begun = time.perf_counter_ns()
    while device.queue.run(task, 1 << 40, 1 << 40):
        pass
    return (time.perf_counter_ns() - begun) / len(offsets)


def main() -> None:
    device = NullDevice()
    template = Template(bytes(16), direction=FROM_DEVICE, patches=[Patch(OFFSET, 8, 8, shift=9)])
    offsets = memoryview(array("Q", range(0, REQUESTS * 4096, 4096)))
    plain, counted, bucketed = Stats(), Stats(), Stats()
    plain.on = False
    bucketed.enable_histogram(True)
    figures: dict[str, list[float]] = {"off": [], "on": [], "with histogram": []}
    for _ in range(TURNS):
        for name, stats in zip(figures, (plain, counted, bucketed), strict=True):
            figures[name].append(once(device, stats, offsets, template))
    medians = {name: statistics.median(values) for name, values in figures.items()}
    print(
        f"{REQUESTS} requests of 4 KiB, queue of {SIZE}, {TURNS} turns: ns a request, the device's included"
    )
    for name, median in medians.items():
        spread = statistics.quantiles(figures[name], n=4)
        print(
            f"  {name:15} {median:6.1f}  ({spread[0]:.1f} .. {spread[2]:.1f})"
            f"  {median - medians['off']:+5.1f}"
        )


if __name__ == "__main__":
    main()
