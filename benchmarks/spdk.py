"""SPDK's vhost target, and its own initiator, bdevperf: of a built tree that SPDK_DIR names.

Both want memory in huge pages, and a core each: they poll.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from peers import CLIENT_CORE, PATIENCE_S, TARGET_CORE, Failed, Measured

from virtio.errors import VirtioError
from virtio_bdev.rpc.client import call

_MEMORY_MIB = 512  # of each
_BLOCK = 512
_BEGUN = 1000  # requests that have ended
_RAM_BYTES, _NULL_BYTES = 64 << 20, 1 << 30
_DELAY_US = 50


def tree(left_out: list[str]) -> Path | None:
    """The built tree, or None and why."""
    if "SPDK_DIR" not in os.environ:
        left_out.append(
            "SPDK: SPDK_DIR names no built tree (with build/bin/vhost and build/examples/bdevperf)"
        )
        return None
    found = Path(os.environ["SPDK_DIR"])
    for program in ("build/bin/vhost", "build/examples/bdevperf"):
        if not (found / program).exists():
            left_out.append(f"SPDK: {found} has no {program}")
            return None
    with open("/proc/meminfo") as lines:
        pages = dict(line.split(":") for line in lines)
    free = int(pages["HugePages_Free"]) * int(pages["Hugepagesize"].split()[0]) >> 10
    if free < 2 * _MEMORY_MIB:
        left_out.append(
            f"SPDK: {free} MiB of huge pages are free, want {2 * _MEMORY_MIB}: "
            f"echo {_MEMORY_MIB} > /proc/sys/vm/nr_hugepages"
        )
        return None
    with open("/proc/mounts") as lines:
        if not any(line.split()[2] == "hugetlbfs" for line in lines):
            left_out.append("SPDK: huge pages are not mounted: mount -t hugetlbfs none /dev/hugepages")
            return None
    return found


@contextlib.contextmanager
def target(spdk: Path, kind: str, backing: str) -> Iterator[tuple[str, str]]:
    """A disk of its vhost target on the target's core: its socket, and its RPC.

    A "RAM disk", "null", or "delayed": a RAM disk that takes 50 us for a request, and any number at once.
    """
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as folder:
        make = "bdev_null_create" if backing == "null" else "bdev_malloc_create"
        nbytes = _NULL_BYTES if backing == "null" else _RAM_BYTES
        disk: dict[str, object] = {"name": "Disk0", "num_blocks": nbytes // _BLOCK, "block_size": _BLOCK}
        bdevs = [(make, disk)]
        if backing == "delayed":
            disk["name"] = "Base0"
            latencies = {f"{of}_{rw}_latency": _DELAY_US for of in ("avg", "p99") for rw in ("read", "write")}
            delay = {"name": "Disk0", "base_bdev_name": "Base0", **latencies}
            bdevs.append(("bdev_delay_create", delay))
        if kind == "blk":
            calls = [("vhost_create_blk_controller", {"ctrlr": "socket", "dev_name": "Disk0"})]
        else:
            calls = [("vhost_create_scsi_controller", {"ctrlr": "socket"})]
            unit = {"ctrlr": "socket", "scsi_target_num": 0, "bdev_name": "Disk0"}
            calls.append(("vhost_scsi_controller_add_target", unit))
        config = _configuration(f"{folder}/config", {"bdev": bdevs, f"vhost_{kind}": calls})
        argv = [
            str(spdk / "build/bin/vhost"),
            "-c",
            config,
            "-S",
            folder,
            *_common(f"{folder}/rpc", TARGET_CORE),
        ]
        path = f"{folder}/socket"
        with _running(argv, path):
            yield path, f"{folder}/rpc"


def _common(rpc: str, core: int) -> list[str]:
    options = ["-r", rpc, "-m", f"[{core}]", "-s", str(_MEMORY_MIB), "-u", "--iova-mode", "va"]
    return [*options, "--single-file-segments", "--silence-noticelog", "--disable-cpumask-locks"]


def _configuration(path: str, subsystems: dict[str, list[tuple[str, dict[str, object]]]]) -> str:
    described = [
        {
            "subsystem": name,
            "config": [
                {"method": method} | ({"params": params} if params else {}) for method, params in calls
            ],
        }
        for name, calls in subsystems.items()
    ]
    Path(path).write_text(json.dumps({"subsystems": described}))
    return path


@contextlib.contextmanager
def _running(argv: list[str], ready: str) -> Iterator[None]:
    """A program, from when it has made the socket `ready` on."""
    log = Path(f"{ready}.log")
    with log.open("wb") as said:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not os.path.exists(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{argv[0]} does not start: {log.read_text()[-1000:]}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def bdevperf(spdk: Path, socket: str, kind: str, rw: str, bs: int, depth: int, seconds: float) -> Measured:
    """What SPDK's initiator gets from a disk; its own time is that of polls that found something."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as folder:
        where = {"name": "Disk", "trtype": "user", "traddr": socket, "dev_type": kind}
        attach = ("bdev_virtio_attach_controller", {**where, "vq_count": 2, "vq_size": 512})
        calls = [attach, ("bdev_wait_for_examine", {})]
        config = _configuration(f"{folder}/config", {"bdev": calls})
        rpc = f"{folder}/rpc"
        argv = [str(spdk / "build/examples/bdevperf"), "-c", config, "-l", *_common(rpc, CLIENT_CORE)]
        argv += ["-w", rw, "-o", str(bs), "-q", str(depth), "-t", f"{seconds:.0f}"]
        with at_work(rpc, seconds) as own:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=PATIENCE_S + seconds, stdin=subprocess.DEVNULL
            )
    total = re.search(r"^\W*Total\s+:\s+([\d.]+)", done.stdout, re.MULTILINE)
    p99 = re.search(r"^\s*99\.00000% :\s+([\d.]+)us", done.stdout, re.MULTILINE)
    if done.returncode or total is None or p99 is None:
        raise Failed(f"bdevperf: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return Measured(float(total[1]), float(p99[1]), own.busy_ns)


@dataclasses.dataclass
class Work:
    """What a process of SPDK did between two moments amid a run: of polls that found something."""

    busy_ns: float | None = None  # a request
    percent: float | None = None  # of its time


@contextlib.contextmanager
def at_work(rpc: str, seconds: float) -> Iterator[Work]:
    """Look twice at the process that answers there, amid a run of so many seconds in the body."""
    work, over = Work(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(rpc, seconds, work, over))
    watcher.start()
    try:
        yield work
    finally:
        over.set()
        watcher.join()


def _watch(rpc: str, seconds: float, work: Work, over: threading.Event) -> None:
    """The run begins when requests end."""
    first = begun = None
    while not over.wait(0.02 if begun is None else 0.5 * seconds):
        try:
            now = _sample(rpc)
        except VirtioError:
            continue  # it is not there yet, or not any more
        if first is None:
            first = now
        elif begun is None:
            if now.requests - first.requests >= _BEGUN:
                begun = now
        else:
            requests, busy, passed = (b - a for a, b in zip(begun, now, strict=True))
            if requests > 0:
                work.busy_ns, work.percent = busy / requests, 100 * busy / passed
            return


class _Sample(NamedTuple):
    requests: int  # that have ended
    busy_ns: float  # of all its threads
    passed_ns: float


def _sample(rpc: str) -> _Sample:
    statistics = json.loads(call(rpc, "bdev_get_iostat", None, 1.0))["bdevs"]
    threads = json.loads(call(rpc, "thread_get_stats", None, 1.0))
    requests = max((one["num_read_ops"] + one["num_write_ops"] for one in statistics), default=0)
    busy, idle = (sum(thread[what] for thread in threads["threads"]) for what in ("busy", "idle"))
    tick_ns = 1e9 / threads["tick_rate"]
    return _Sample(requests, busy * tick_ns, (busy + idle) * tick_ns)
