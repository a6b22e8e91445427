"""What a machine takes from a program that never sleeps: its interrupts, and whoever else has its cores; and
whether anybody has them now.

noise.py SECONDS: of the core that it is on, as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from typing import NamedTuple

from peers import CLIENT_CORE, TARGET_CORE

_FROM_US = 16  # what is shorter is not told from the interpreter's own moments


class Noise(NamedTuple):
    """Interruptions of 16 us or more: how many a second, and their part of the time."""

    times: float
    percent: float


def measure(seconds: float) -> dict[str, Noise]:
    """Of the target's core and the client's, both at work."""
    watchers = {
        core: subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, __file__, str(seconds)], stdout=subprocess.PIPE
        )
        for core in {TARGET_CORE, CLIENT_CORE}
    }
    return {str(core): Noise(*json.loads(watcher.communicate()[0])) for core, watcher in watchers.items()}


def busy(seconds: float) -> float:
    """The percentage of the two cores' time in which somebody had them."""
    before = _ticks()
    time.sleep(seconds)
    idle, whole = (after - then for after, then in zip(_ticks(), before, strict=True))
    return 100 - 100 * idle / max(1, whole)


def _ticks() -> tuple[int, int]:
    """Of both cores since the machine started: idle ones, and all (proc_stat(5))."""
    names = {f"cpu{core}" for core in (TARGET_CORE, CLIENT_CORE)}
    idle = whole = 0
    with open("/proc/stat") as lines:
        for name, *words in map(str.split, lines):
            if name in names:
                ticks = [int(word) for word in words[:8]]  # what guests have is in the first two, too
                idle += ticks[3] + ticks[4]
                whole += sum(ticks)
    return idle, whole


def _watch(seconds: float) -> Noise:
    gc.disable()
    count = lost = 0
    clock, least = time.perf_counter_ns, 1000 * _FROM_US
    begun = last = clock()
    end = begun + int(1e9 * seconds)
    while last < end:
        now = clock()
        if now - last >= least:
            count += 1
            lost += now - last
        last = now
    return Noise(count / seconds, 100 * lost / (last - begun))


if __name__ == "__main__":
    print(json.dumps(_watch(float(sys.argv[1]))))
