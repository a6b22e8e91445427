"""How changes go from the target's process to that of a session, which has a copy of the device.

A pair of sockets that keep messages apart; JSON, and the descriptor of a disk that is added. One
change is under way at a time.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any

from virtio.errors import RequestError, TransportError
from virtio.target.changes import Change, Changes
from virtio.target.store import adopt, describe

_MOST = 1 << 17  # more than any message: what a client may send, and a description


def pair() -> tuple[Sender, socket.socket]:
    """Both ends; the second is for a Receiver, in another process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Sender(ours), theirs


class Sender:
    """The target's end; owns its socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, change: Change) -> None:
        """Let the session know; at its end, nothing."""
        message: dict[str, Any] = {"method": change.method, "parameters": dict(change.parameters)}
        fds = []
        if change.store is not None:
            fd, message["disk"] = describe(change.store)
            fds = [fd]
        try:
            socket.send_fds(self._sock, [json.dumps(message).encode()], fds, socket.MSG_NOSIGNAL)
        except ConnectionError:
            pass  # which `answer` notices too

    def answer(self, timeout: float) -> bool:
        """Whether the session has answered in time, or is at its end; RequestError if it refused."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(1000 * max(0.0, timeout)):
            return False
        try:
            data = self._sock.recv(_MOST)
        except ConnectionError:
            data = b""
        if data and (problem := json.loads(data)["problem"]) is not None:
            raise RequestError(problem)
        return True

    def close(self) -> None:
        self._sock.close()


class Receiver:
    """The session's end: applies changes to its device; owns its socket."""

    def __init__(self, sock: socket.socket, changes: Changes) -> None:
        self._sock, self._changes = sock, changes
        self._problem: str | None = None

    def fileno(self) -> int:
        return self._sock.fileno()

    def apply(self) -> None:
        """Take one change and apply it; ProtocolError if the driver does not let us tell it."""
        data, fds, _, _ = socket.recv_fds(self._sock, _MOST, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise TransportError("the target has gone")
        message = json.loads(data)
        store = adopt(fds[0], message["disk"]) if fds else None
        self._problem = None
        try:
            self._changes.apply(Change(message["method"], message["parameters"], store))
        except (RequestError, OSError) as error:
            self._problem = str(error)
            if store is not None:
                store.close()

    def answer(self) -> None:
        """Say what became of it."""
        self._sock.send(json.dumps({"problem": self._problem}).encode())

    def close(self) -> None:
        self._sock.close()
