"""A target as a child process, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from virtio.errors import RequestError, RequestTimeout, TransportError

_ANSWER_S = 10.0  # for the control socket, which waits for a session itself


@dataclass(frozen=True, slots=True)
class Served:
    """A running target."""

    path: str
    pid: int
    control_path: str | None = None

    @property
    def address(self) -> str:
        """What `virtio_bdev.attach` takes."""
        return f"user:{self.path}"

    def control(self, method: str, **parameters: object) -> Any:
        """Change the target while it runs, or look at it: see docs/cli.md for the methods.

        Returns when a front end, if one is connected, is served so. RequestError with what the
        target says if it does not do it; TransportError or RequestTimeout if it does not answer.
        """
        if self.control_path is None:
            raise RequestError("the target has no control socket: serve(..., control=True)")
        request = {"jsonrpc": "2.0", "method": method, "params": parameters, "id": 1}
        reply = json.loads(_exchange(self.control_path, json.dumps(request).encode() + b"\n"))
        if "error" in reply:
            raise RequestError(reply["error"]["message"])
        return reply["result"]


@contextlib.contextmanager
def serve(
    dev_type: str = "scsi",
    *disks: str,
    ram: str = "64M",
    queues: int = 4,
    path: str | None = None,
    packed: bool = False,
    without: Iterable[str] = (),
    control: bool = False,
    timeout: float = 10.0,
) -> Iterator[Served]:
    """Run a target while the block lasts; it also ends with this process.

    `disks` are as for `run`, or one of `ram` bytes if there are none; `packed` and `without` too. `path` is
    that of the socket, which is otherwise in a directory of its own. With `control`, there is another
    beside it, for `Served.control`. Its complaints go to our standard error. Raises
    TransportError if the target cannot start, RequestTimeout if it takes longer than `timeout`.
    """
    with contextlib.ExitStack() as stack:
        if path is None:
            directory = tempfile.mkdtemp(prefix="virtio-target-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            path = os.path.join(directory, "socket")
        arguments = [path, "--lifeline", f"--dev-type={dev_type}", f"--queues={queues}"]
        arguments += [f"--disk={disk}" for disk in disks or (f"ram:{ram}",)]
        arguments += ["--packed"] if packed else []
        arguments += [f"--without={name}" for name in without]
        control_path = f"{path}.control" if control else None
        arguments += [f"--control={control_path}"] if control_path else []
        process = stack.enter_context(_start(arguments))
        stack.callback(_end, process)
        _await_ready(process, timeout)
        yield Served(path, process.pid, control_path)


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A target with this command line, its standard input, which is its lifeline, and output in pipes."""
    found = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "virtio.target", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # so that Ctrl-C is ours to handle first
        env={**os.environ, "PYTHONPATH": found},
    )


def _exchange(path: str, line: bytes) -> bytes:
    """Send a line to a socket, and take one."""
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_ANSWER_S)
            sock.connect(path)
            sock.sendall(line)
            while not answer.endswith(b"\n") and (data := sock.recv(1 << 16)):
                answer += data
    except TimeoutError:
        raise RequestTimeout(f"{path} has not answered in {_ANSWER_S:g} s") from None
    except OSError as error:
        raise TransportError(f"{path}: {error}") from error
    if not answer.endswith(b"\n"):
        raise TransportError(f"{path} was closed before it answered")
    return bytes(answer)


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
