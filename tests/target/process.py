"""A target as a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Process:
    """`python -m virtio.target` with its output in pipes."""

    def __init__(self, *arguments: str, path: str) -> None:
        self.path = path
        sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "virtio.target", path, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ASAN_OPTIONS": sanitizer},
        )

    def line(self) -> str:
        """The next complaint."""
        assert self.process.stderr
        return self.process.stderr.readline().decode().strip()

    def ready(self) -> "Process":
        assert self.process.stdout
        assert self.process.stdout.readline().decode() == f"ready: {self.path}\n"
        self.descriptors = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return self

    def end(self, number: int = signal.SIGTERM) -> tuple[int, bytes, bytes]:
        """Exit status, and what else was on standard output and error."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=10)
        return self.process.returncode, out, err

    def idle(self) -> bool:
        """Whether it comes to hold as many descriptors as before the first front end, and no child."""
        deadline = time.monotonic() + 10
        proc = Path(f"/proc/{self.process.pid}")
        while len(os.listdir(proc / "fd")) != self.descriptors or any(
            path.read_text() for path in proc.glob("task/*/children")
        ):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True
