"""What a machine takes from a program that never sleeps: its interrupts, and whoever else has its cores.

noise.py SECONDS: of the core that it is on, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
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
            ["taskset", "-c", core, sys.executable, __file__, str(seconds)], stdout=subprocess.PIPE
        )
        for core in (TARGET_CORE, CLIENT_CORE)
        if int(core) in os.sched_getaffinity(0)
    }
    return {core: Noise(*json.loads(watcher.communicate()[0])) for core, watcher in watchers.items()}


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
