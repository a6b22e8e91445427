"""The clients that take turns, each a process on a core of its own, and the disk that they share.

Of those that are not there somebody keeps a list, `left_out`; so of rows whose client or target fails.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Wait = Literal["poll", "event"]

ROOT = Path(__file__).parents[1]
BLKIO = ROOT / "build" / "blkio"
_WAYS = Path(__file__).with_name("ways.py")
PATIENCE_S = 30.0
_NBYTES = 1 << 30
_FILE_BYTES = 256 << 20

_IOTHREAD = ["--object", "iothread,id=t0,poll-max-ns=100000000"]


class Failed(Exception):
    """A target that does not start, or a client that does not end well; says which, and what it said."""


def _cores() -> tuple[int, int]:
    """The target's and the client's: two that we may use, not halves of one if that can be helped."""
    ours = sorted(os.sched_getaffinity(0))
    first = ours[0]
    try:
        listed = Path(f"/sys/devices/system/cpu/cpu{first}/topology/core_cpus_list").read_text()
    except OSError:
        listed = ""
    halves = {
        core
        for part in listed.split(",")
        if part.strip()
        for low, _, high in [part.partition("-")]
        for core in range(int(low), int(high or low) + 1)
    }
    others = [core for core in ours if core not in halves] or ours[1:] or ours
    return first, others[0]


TARGET_CORE, CLIENT_CORE = _cores()


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process, and those that it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def leaving_out(what: str, left_out: list[str]) -> Iterator[None]:
    """Go on with the next row where one fails."""
    try:
        yield
    except (Failed, subprocess.TimeoutExpired) as error:
        left_out.append(f"{what}: {error}")


def has_daemon(left_out: list[str]) -> bool:
    """Whether qemu-storage-daemon is there; noted, if not."""
    if not shutil.which("qemu-storage-daemon"):
        left_out.append("qemu-storage-daemon, and what is compared on it (Debian: qemu-system-common)")
        return False
    return True


def versions() -> dict[str, str]:
    """Of those that are there."""
    found = {"SPDK": os.environ.get("SPDK_DIR", "")}
    if found["SPDK"]:
        path = Path(found["SPDK"], "VERSION")
        found["SPDK"] = path.read_text().strip() if path.exists() else "?"
    if shutil.which("qemu-storage-daemon"):
        said = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True).stdout
        found["qemu-storage-daemon"] = said.partition("\n")[0]
    library = next(BLKIO.glob("tree/usr/lib/*/libblkio.so.1.*"), None)
    if library is not None:
        found["libblkio"] = library.name.removeprefix("libblkio.so.")
    return {name: version for name, version in found.items() if version}


@contextlib.contextmanager
def storage_daemon(backing: str, *, nbd: bool = False) -> Iterator[str]:
    """qemu-storage-daemon on the target's core, with a disk that is nothing or a file in RAM: its socket."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/dev/shm") as folder:
        disk = f"driver=null-co,node-name=n0,size={_NBYTES},read-zeroes=on"
        if backing != "null-co":
            with open(f"{folder}/disk", "wb") as file:
                file.write(os.urandom(1 << 20) * (_FILE_BYTES >> 20))
            disk = f"driver=file,filename={folder}/disk,node-name=n0"
        path = f"{folder}/socket"
        if nbd:
            export = ["--nbd-server", f"addr.type=unix,addr.path={path}"]
            export += ["--export", "type=nbd,id=e0,node-name=n0,name=disk,writable=on,iothread=t0"]
        else:
            export = ["--export", f"type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={path}"]
            export[-1] += ",writable=on,num-queues=4,iothread=t0"
        argv = [
            "taskset",
            "-c",
            str(TARGET_CORE),
            "qemu-storage-daemon",
            "--blockdev",
            disk,
            *_IOTHREAD,
            *export,
        ]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        daemon = subprocess.Popen(argv, **quiet)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not os.path.exists(path):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    raise Failed("qemu-storage-daemon does not start")
                time.sleep(0.01)
            yield path
        finally:
            daemon.kill()
            daemon.wait()


def _client(*argv: str, seconds: float, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["taskset", "-c", str(CLIENT_CORE), *argv],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S + seconds,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise Failed(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


class Measured(NamedTuple):
    """Requests a second; and what not all tell: the 99th percentile of latency, own time for a request."""

    iops: float
    p99_us: float | None
    busy_ns: float | None


def ours(
    socket: str,
    rw: str,
    bs: int,
    depth: int,
    wait: Wait,
    seconds: float,
    *,
    kind: str = "blk",
    busy: bool = False,
) -> Measured:
    """`virtio-bdev bench`."""
    said = _client(
        *(sys.executable, "-m", "virtio_bdev", "bench", f"user:{socket}", "--dev-type", kind),
        *("--queues", "1", "--rw", rw, "--bs", str(bs), "--iodepth", str(depth), "--yes", "--json"),
        *("--runtime", str(seconds), "--wait", wait, *(["--busy"] if busy else [])),
        seconds=seconds,
    )
    job = json.loads(said)["jobs"][0]
    used = job["write" if rw.endswith("write") else "read"]
    return Measured(
        used["iops"], used["clat_ns"]["percentile"]["99.000000"] / 1000, job.get("busy_ns_per_io")
    )


@functools.cache
def _blkio() -> Path | None:
    """blkio-bench, out of Debian's packages if it is not there yet."""
    program = BLKIO / "blkio-bench"
    if program.exists():
        return program
    if not shutil.which("mmdebstrap") or not shutil.which("cc"):
        return None
    sources = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True
    )
    mirrors = [line for line in sources.stdout.split() if "security" not in line]
    tree = BLKIO / "tree"
    BLKIO.mkdir(parents=True, exist_ok=True)
    argv = [
        "mmdebstrap",
        "--variant=extract",
        "--include=libblkio1,libblkio-dev",
        "trixie",
        str(tree),
        *mirrors[:1],
    ]
    try:
        subprocess.run(argv, check=True, capture_output=True, timeout=300)
        shutil.copy(next(tree.glob("usr/lib/*/libblkio.so.1.*")), BLKIO / "libblkio.so.1")
        shutil.copy(tree / "usr/include/blkio.h", BLKIO)
        source = tree / "usr/share/doc/libblkio-dev/examples/blkio-bench.c"
        flags = [
            "-O2",
            f"-I{BLKIO}",
            "-o",
            str(program),
            str(source),
            str(BLKIO / "libblkio.so.1"),
            "-lpthread",
        ]
        subprocess.run(["cc", *flags], check=True, capture_output=True, timeout=60)
    except (subprocess.SubprocessError, OSError, StopIteration):
        return None
    return program


def blkio(left_out: list[str]) -> Path | None:
    """libblkio's own benchmark, or None, which is noted."""
    program = _blkio()
    if program is None:
        left_out.append(
            "libblkio: its packages of Debian 13 (libblkio1, libblkio-dev) want mmdebstrap, cc and a mirror"
        )
    return program


def blkio_bench(
    program: Path, socket: str, rw: str, bs: int, depth: int, wait: Wait, seconds: float
) -> Measured:
    """libblkio's own benchmark, which tells no latencies."""
    said = _client(
        *(str(program), f"--runtime={seconds:.0f}", f"--readwrite={rw}", f"--blocksize={bs}"),
        *(["--poll"] if wait == "poll" else []),
        *(f"--iodepth={depth}", "virtio-blk-vhost-user", f"path={socket}"),
        seconds=seconds,
        env={"LD_LIBRARY_PATH": str(program.parent)},
    )
    match = re.search(r'"kiops":\s*([0-9.]+)', said)
    assert match is not None, said
    return Measured(1000 * float(match[1]), None, None)


@functools.cache
def _fio() -> str | None:
    """A fio that has the libblkio engine, which few packages have: $FIO, else the one on the PATH."""
    program = os.environ.get("FIO") or shutil.which("fio")
    if program is None:
        return None
    engines = subprocess.run([program, "--enghelp"], capture_output=True, text=True).stdout
    return program if "libblkio" in engines.split() else None


def fio(left_out: list[str]) -> str | None:
    """fio with libblkio, or None, which is noted."""
    program = _fio()
    if program is None:
        left_out.append("fio on libblkio, for its p99: FIO is to name a fio with the libblkio engine")
    return program


def fio_on_libblkio(
    program: str, socket: str, rw: str, bs: int, depth: int, wait: Wait, seconds: float
) -> Measured:
    """fio's loop over libblkio: slower than blkio-bench's, but it tells latencies."""
    said = _client(
        *(program, "--name=bench", "--ioengine=libblkio", "--libblkio_driver=virtio-blk-vhost-user"),
        *(f"--libblkio_path={socket}", "--thread", f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}"),
        *("--time_based", f"--runtime={seconds}", f"--size={_FILE_BYTES}", "--output-format=json"),
        *(["--hipri"] if wait == "poll" else ["--libblkio_wait_mode=eventfd"]),
        seconds=seconds,
    )
    used = json.loads(said)["jobs"][0]["write" if rw.endswith("write") else "read"]
    return Measured(used["iops"], used["clat_ns"]["percentile"]["99.000000"] / 1000, None)


@functools.cache
def _system_python() -> str | None:
    """An interpreter that has libnbd's bindings: the system's, if any."""
    for python in (sys.executable, "/usr/bin/python3"):
        if os.path.exists(python):
            if subprocess.run([python, "-c", "import nbd"], capture_output=True).returncode == 0:
                return python
    return None


def has_libnbd(left_out: list[str]) -> bool:
    """Whether it takes part; noted, if not."""
    if _system_python() is None:
        left_out.append("libnbd: its Python bindings (Debian: python3-libnbd)")
        return False
    return True


def python_way(way: str, depth: int, seconds: float) -> float:
    """Requests a second of one of the ways in ways.py."""
    with storage_daemon("null-co", nbd=way == "libnbd") as socket:
        return way_to(way, socket, depth, seconds)


def way_to(way: str, socket: str, depth: int, seconds: float, kind: str = "blk") -> float:
    """The same to a disk that is there."""
    python = (_system_python() if way == "libnbd" else None) or sys.executable
    return float(_client(python, str(_WAYS), way, socket, str(depth), str(seconds), kind, seconds=seconds))
