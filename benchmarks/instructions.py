"""Instructions of the driver for a request, counted by callgrind: the one figure that no noise can move.

instructions.py [LAYOUT]...          what each layout takes
instructions.py --load LAYOUT N      the load that is counted: N reads of 4 KiB in one batch
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

REQUESTS = 6_000
_LOOP = "*RequestQueue_run*"  # the compiled loop, and what it calls: nothing else is counted
_HERE = Path(__file__)
_PATIENCE_S = 300.0


def load(layout: str, requests: int) -> None:
    """Reads into the pool, on a device that answers at once."""
    from null_device import null_channel

    with null_channel(layout, queue_size=256) as (channel, _):
        with channel.bdev.controller.buffer(4096) as buffer:
            channel.readinto(0, buffer)
        offsets = memoryview(array("Q", range(0, requests * 4096, 4096)))
        with channel.bdev.controller.buffer(requests * 4096) as into:
            channel.read_batch(offsets, 4096, into)


def count(layout: str, requests: int) -> dict[str, int]:
    """The instructions that such a load has run, by shared object."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        argv = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--compress-strings=no"]
        argv += [f"--toggle-collect={_LOOP}", "--compress-pos=no"]
        argv += [sys.executable, str(_HERE), "--load", layout, str(requests)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_PATIENCE_S)
        if done.returncode:
            raise RuntimeError(f"valgrind: {done.stderr[-2000:]}")
        return _by_object(Path(out).read_text())


def _by_object(profile: str) -> dict[str, int]:
    found: dict[str, int] = {}
    name, inclusive = "", False
    for line in profile.splitlines():
        if line.startswith("ob="):
            name = Path(line[3:]).name.partition(".")[0]
        elif line.startswith("calls="):
            inclusive = True  # the next line is what was called, which has its own lines
        elif line[:1].isdigit():
            if not inclusive:
                found[name] = found.get(name, 0) + int(line.split()[1])
            inclusive = False
    return found


def a_request(layout: str) -> dict[str, float]:
    """Instructions for a request, by module of `virtio.ring`."""
    counted = count(layout, REQUESTS)
    modules = {"slots", "requests", "task", "split", "packed", "doorbell", "stats", "load"}
    return {name: counted[name] / REQUESTS for name in sorted(modules & counted.keys())}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], int(sys.argv[3]))
    else:
        from null_device import LAYOUTS

        for layout in sys.argv[1:] or LAYOUTS:
            by_module = a_request(layout)
            words = ", ".join(f"{name} {value:.0f}" for name, value in by_module.items() if value >= 0.5)
            print(f"{layout:18} {sum(by_module.values()):6.0f} instructions a request: {words}")
