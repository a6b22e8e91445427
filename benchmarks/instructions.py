"""Instructions of the driver for a request, counted by callgrind: the one figure that no noise can move.

instructions.py [LAYOUT [WAY]]          what each layout takes, by way in
instructions.py --load LAYOUT WAY N     the load that is counted: N reads of 4 KiB
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

REQUESTS = 6_000
DEPTH = 32
# By way in, the compiled functions that are counted, with what they call; nothing else is.
WAYS = {
    "batch": ["*RequestQueue_run*"],
    "bench, QD 32": ["*RequestQueue_run*"],
    "submit and poll, QD 32": ["*__pyx_pw_*Submitter*submit_read*", "*__pyx_pw_*Submitter*poll*"],
}
_MODULES = {"slots", "requests", "task", "split", "packed", "doorbell", "stats", "load", "submit", "gather"}
_HERE = Path(__file__)
_PATIENCE_S = 300.0


def load(layout: str, way: str, requests: int) -> None:
    """Reads into the pool, on a device that answers at once."""
    from null_device import null_channel

    from virtio_bdev import bench

    with null_channel(layout, queue_size=256) as (channel, _):
        with channel.bdev.controller.buffer(4096) as buffer:
            channel.readinto(0, buffer)
            if way == "submit and poll, QD 32":
                for _ in range(requests // DEPTH):
                    for token in range(DEPTH):
                        channel.submit_read(4096 * token, buffer, token)
                    channel.poll(DEPTH)
        if way == "bench, QD 32":
            bench.run(channel, bench.Job(iodepth=DEPTH, requests=requests, seed=1))
        elif way == "batch":
            offsets = memoryview(array("Q", range(0, requests * 4096, 4096)))
            with channel.bdev.controller.buffer(requests * 4096) as into:
                channel.read_batch(offsets, 4096, into)


def can_count(left_out: list[str]) -> bool:
    """Whether callgrind is there; noted, if not."""
    if not shutil.which("valgrind"):
        left_out.append("instructions: they are counted with callgrind (Debian: valgrind)")
        return False
    return True


def count(layout: str, requests: int, way: str = "batch") -> dict[str, int]:
    """The instructions that such a load has run, by shared object."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        argv = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--compress-strings=no"]
        argv += ["--compress-pos=no", *(f"--toggle-collect={loop}" for loop in WAYS[way])]
        argv += [sys.executable, str(_HERE), "--load", layout, way, str(requests)]
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


def a_request(layout: str, way: str = "batch") -> dict[str, float]:
    """Instructions for a request, by module of `virtio.ring`."""
    requests = REQUESTS // DEPTH * DEPTH
    counted = count(layout, requests, way)
    return {name: counted[name] / requests for name in sorted(_MODULES & counted.keys())}


def total(layout: str, way: str) -> float:
    """Of all of them."""
    return sum(a_request(layout, way).values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        from null_device import LAYOUTS

        for layout in sys.argv[1:2] or LAYOUTS:
            for way in sys.argv[2:3] or WAYS:
                found = a_request(layout, way)
                words = ", ".join(f"{name} {value:.0f}" for name, value in found.items() if value >= 0.5)
                print(f"{layout:18} {way:24} {sum(found.values()):6.0f} instructions a request: {words}")
