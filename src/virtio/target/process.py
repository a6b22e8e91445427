"""A target as a child process, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from virtio.errors import RequestTimeout, TransportError


@dataclass(frozen=True, slots=True)
class Served:
    """A running target."""

    path: str
    pid: int

    @property
    def address(self) -> str:
        """What `virtio_bdev.attach` takes."""
        return f"user:{self.path}"


@contextlib.contextmanager
def serve(
    dev_type: str = "scsi",
    *disks: str,
    ram: str = "64M",
    queues: int = 4,
    path: str | None = None,
    without: Iterable[str] = (),
    timeout: float = 10.0,
) -> Iterator[Served]:
    """Run a target while the block lasts; it also ends with this process.

    `disks` are as for `run`, or one of `ram` bytes if there are none; `path` is that of the socket,
    which is otherwise in a directory of its own. Its complaints go to our standard error. Raises
    TransportError if the target cannot start, RequestTimeout if it takes longer than `timeout`.
    """
    with contextlib.ExitStack() as stack:
        if path is None:
            directory = tempfile.mkdtemp(prefix="virtio-target-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            path = os.path.join(directory, "socket")
        command = [sys.executable, "-P", "-m", "virtio.target", path, "--lifeline"]
        command += [f"--dev-type={dev_type}", f"--queues={queues}"]
        command += [f"--disk={disk}" for disk in disks or (f"ram:{ram}",)]
        command += [f"--without={name}" for name in without]
        found = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its end is the lifeline
                stdout=subprocess.PIPE,
                start_new_session=True,  # so that Ctrl-C is ours to handle first
                env={**os.environ, "PYTHONPATH": found},
            )
        )
        stack.callback(_end, process)
        _await_ready(process, timeout)
        yield Served(path, process.pid)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


def _await_ready(process: subprocess.Popen[bytes], timeout: float) -> None:
    assert process.stdout is not None
    line = b""
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    deadline = time.monotonic() + timeout
    while not line.endswith(b"\n"):
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise RequestTimeout(f"the target was not ready after {timeout} s")
        data = os.read(process.stdout.fileno(), 4096)
        if not data:
            code = process.wait()
            raise TransportError(f"the target ended with exit status {code} at once")
        line += data
