"""The program as users run it: a process with arguments, output and an exit status."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import INTERPRETED

PROGRAM = (
    [sys.executable, "-m", "virtio_bdev"]
    if INTERPRETED
    else [str(Path(sys.executable).parent / "virtio-bdev")]
)
PATIENCE_S = 30.0  # for a process to end or to say something


def run(*arguments: object, stdin: bytes = b"", **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run it to its end."""
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=PATIENCE_S, **options)


def output(*arguments: object, stdin: bytes = b"") -> bytes:
    """What it prints when all is well."""
    done = run(*arguments, stdin=stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@contextlib.contextmanager
def started(*arguments: object, **options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """A running program, killed at the end of the block if it is still there."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with subprocess.Popen([*PROGRAM, *map(str, arguments)], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: "subprocess.Popen[bytes]", last: bytes) -> list[bytes]:
    """What it prints, up to the line that begins so."""
    assert process.stdout is not None
    lines: list[bytes] = []
    while not lines or not lines[-1].startswith(last):
        line = process.stdout.readline()
        assert line, (lines, process.stderr and process.stderr.read())
        lines.append(line)
    return lines


def stop(process: "subprocess.Popen[bytes]", number: int = signal.SIGTERM) -> tuple[int, bytes]:
    """Its exit status after a signal, and what it still had to say on stderr."""
    process.send_signal(number)
    said = process.communicate(timeout=PATIENCE_S)[1]
    return process.returncode, said


def eventually(condition: Any) -> bool:
    """Whether it becomes true before long."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    """The processes whose parent this one is."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def has_ended(pid: int) -> bool:
    """Whether there is no such process, but for its parent to hear of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
