"""Targets forked from a process that has imported already what it takes: most tests begin with one, and would
each wait a tenth of a second for that. What is forked has the same command line, and runs the same code."""

import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

_LONGEST = 1 << 17  # an order: a command line and an environment
_lock = threading.Lock()


class Forked:
    """As much of `subprocess.Popen` as `virtio.target.serve` needs."""

    def __init__(self, stdin: int, stdout: int, report: int) -> None:
        self.stdin, self.stdout = os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0)
        self._report = os.fdopen(report, "rb", 0)
        self.pid = int(self._report.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a target", timeout or 0.0)
            self.returncode = int(self._report.readline())
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()
        self._report.close()


def start(arguments: Sequence[str]) -> Any:
    """A target with this command line; its standard input and output are pipes, its errors go to ours."""
    pipes = [os.pipe() for _ in range(3)]
    (stdin, to), (out, stdout), (report, said) = pipes
    order = {"arguments": list(arguments), "environment": dict(os.environ), "folder": os.getcwd()}
    with _lock:
        orders, _ = _parent()
        socket.send_fds(orders, [json.dumps(order).encode()], [stdin, stdout, 2, said])
    for fd in (stdin, stdout, said):
        os.close(fd)
    return Forked(to, out, report)


def end() -> None:
    """Let go of the process that forks, if there is one."""
    if _parent.cache_info().currsize:
        orders, process = _parent()
        orders.close()
        process.wait()


@functools.cache
def _parent() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """Where the process that forks takes its orders, and itself; it ends with the socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.warm"],
            stdin=theirs.fileno(),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    return ours, process


def _fork_for_ever(orders: socket.socket) -> None:
    from virtio.target import server

    while True:
        order, fds, _, _ = socket.recv_fds(orders, _LONGEST, 4)
        if not order:
            return
        if not os.fork():
            orders.close()
            _watch(server.main, json.loads(order), *fds)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _watch(main: Any, order: dict[str, Any], stdin: int, stdout: int, stderr: int, report: int) -> NoReturn:
    """Fork once more, and report the child's number and, in the end, its exit status."""
    try:
        pid = os.fork()
        if not pid:
            _be(main, order, stdin, stdout, stderr)
        for fd in (0, stdin, stdout, stderr):
            os.close(fd)
        os.write(report, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(report, b"%d\n" % os.waitstatus_to_exitcode(status))
    finally:
        os._exit(0)


def _be(main: Any, order: dict[str, Any], stdin: int, stdout: int, stderr: int) -> NoReturn:
    code = 70
    try:
        os.setsid()
        for number, fd in enumerate((stdin, stdout, stderr)):
            os.dup2(fd, number)
        os.closerange(3, 256)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        main(order["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _fork_for_ever(socket.socket(fileno=os.dup(0)))
