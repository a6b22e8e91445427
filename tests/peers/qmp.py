"""QEMU's monitor (QMP), on one end of a socket pair."""

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any, NoReturn


class Monitor:
    """Owns its socket; `greet` comes first. `fail` is called with what went wrong."""

    def __init__(self, ours: socket.socket, fail: Callable[[str], NoReturn]) -> None:
        self.events: list[str] = []
        self._socket = ours
        self._lines = ours.makefile("r")
        self._fail = fail

    def greet(self) -> None:
        """Wait for the greeting: then it takes commands."""
        if "QMP" not in self.receive():
            self._fail("did not greet")
        self.run("qmp_capabilities")

    def run(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a command, and return what it returns."""
        message = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(message).encode() + b"\n")
        while "event" in (answer := self.receive()):
            self.events.append(answer["event"])
        if "return" not in answer:
            self._fail(f"answered {command} with {answer}")
        return answer["return"]

    def wait_for_event(self, name: str) -> None:
        """Return when an event of that name has come, since the beginning."""
        while name not in self.events:
            self.events.append(self.receive().get("event", ""))

    def receive(self) -> dict[str, Any]:
        """The next message."""
        line = ""
        with contextlib.suppress(ConnectionResetError):
            line = self._lines.readline()
        if not line:
            self._fail("ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
