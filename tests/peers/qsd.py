"""qemu-storage-daemon as a peer: one disk on one vhost-user-blk socket, and its monitor."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.peers.qmp import Monitor

WAIT_S = 10.0  # for anything that it is asked to do

IN_MEMORY = "driver=null-co,node-name=disk,size=1073741824,read-zeroes=on"


def file_node(path: Path, name: str = "disk") -> str:
    """The --blockdev option for a file; reads of the file see at once what was written through it."""
    return f"driver=file,filename={path},node-name={name},discard=unmap"


def faulty_nodes(path: Path, rule: str) -> list[str]:
    """The same with a blkdebug rule; events such as flush_to_disk are those of the node on top."""
    fault = ",".join(f"inject-error.0.{option}" for option in rule.split(","))
    return [
        file_node(path, "file"),
        f"driver=blkdebug,node-name=faulty,image=file,{fault}",
        "driver=raw,node-name=disk,file=faulty",
    ]


class StorageDaemon:
    """A running daemon that exports the node "disk"; a context manager, which ends it in any case.

    It is ready to be attached once this is made: its monitor, a socket pair, is the last thing that it
    opens, and the greeting is awaited. `poll_ns` is for how long its thread looks at the rings before it
    sleeps and has to be kicked; None: its main thread serves the rings, and sleeps at once.
    """

    def __init__(
        self,
        program: str,
        nodes: Sequence[str],
        *,
        writable: bool = True,
        queues: int = 4,
        poll_ns: int | None = 32768,
        block_size: int = 512,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qsd-")  # short: a socket's path is limited
        self.path = f"{self._folder.name}/disk.sock"
        self.address = f"user:{self.path}"
        command = [program]
        for node in nodes:
            command += ["--blockdev", node]
        export = (
            f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={self.path},"
            f"writable={'on' if writable else 'off'},num-queues={queues},logical-block-size={block_size}"
        )
        if poll_ns is not None:
            command += ["--object", f"iothread,id=thread,poll-max-ns={poll_ns}"]
            export += ",iothread=thread"
        command += ["--export", export]
        self._command = command
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(WAIT_S)
        monitor = ["--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "chardev=qmp"]
        with theirs:
            self._process = subprocess.Popen(
                self._command + monitor, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True
            )
        self.pid = self._process.pid
        self._monitor = Monitor(ours, self._fail)
        self._monitor.greet()

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a monitor command, and return what it returns."""
        return self._monitor.run(command, arguments)

    def wait_for_event(self, name: str) -> None:
        """Return when an event of that name has come, since the beginning."""
        self._monitor.wait_for_event(name)

    def pause(self) -> None:
        """Make it hang: none of its threads runs when this returns."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> float:
        """End it with SIGKILL, without waiting; the time (monotonic) just before."""
        moment = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)
        return moment

    def restart(self) -> None:
        """Another process in place of one that was killed, with the same disk on the same socket."""
        self._process.communicate(timeout=WAIT_S)
        self._monitor.close()
        os.unlink(self.path)
        self._start()

    def switches(self) -> int:
        """How often its threads were put to sleep so far: no more while nothing reaches it."""
        total = 0
        for status in Path(f"/proc/{self.pid}/task").glob("*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a worker thread that ended
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                total += int(fields["voluntary_ctxt_switches"])
        return total

    def close(self) -> str:
        """End it, at once: what it said on stderr. Idempotent."""
        if self._process.returncode is not None:
            return ""
        self._process.kill()  # QEMU 7.2 would hang if told to quit while a front end is connected
        _, said = self._process.communicate(timeout=WAIT_S)
        self._monitor.close()
        self._folder.cleanup()
        return said

    def _fail(self, what: str) -> NoReturn:
        raise AssertionError(f"qemu-storage-daemon {what}: {self.close()}")

    def __enter__(self) -> "StorageDaemon":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def readable(fd: int, seconds: float = WAIT_S) -> bool:
    """Whether a descriptor becomes readable in that time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
