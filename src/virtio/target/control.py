"""The control socket of a target: JSON-RPC 2.0, one object a line, each way.

What can be asked is in `virtio.target.changes`. A client may be slow, rude or gone: it is read
only while it reads, holds at most two messages of ours, and gives way to others when there are
too many.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias

from virtio.errors import VirtioError
from virtio.target.changes import BadParameters, UnknownMethod
from virtio.target.listener import Listener

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS = -32700, -32600, -32601, -32602
INTERNAL_ERROR, FAILED = -32603, -32000

Call: TypeAlias = Callable[[str, Mapping[str, Any]], object]

_LINE_MAX = 1 << 16  # bytes of one message
_CLIENTS_MAX = 32
_FIELDS = {"jsonrpc", "method", "params", "id"}


class ControlServer:
    """Serves clients from an event loop, in which `fileno` is readable when there is work."""

    def __init__(self, path: str, call: Call) -> None:
        self.path = path
        self._call = call
        self._listener = Listener(path, 0o600)
        self._listener.sock.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._clients: dict[int, _Client] = {}  # the one that was silent for longest comes first

    def fileno(self) -> int:
        return self._epoll.fileno()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the clients, and take the socket away."""
        self.leave()
        self._listener.close()

    def leave(self) -> None:
        """In a process that was forked: let go of the sockets, which are the parent's."""
        self._epoll.close()  # first, as it is shared: to take a client out of it takes him from both
        for client in self._clients.values():
            client.sock.close()
        self._clients.clear()

    def serve(self) -> None:
        """Do what is to be done now; every client gets a turn, none is waited for."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._clients:  # not gone for another that came in this round
                self._serve(fd)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.sock.accept()
        except OSError:
            return  # it has gone again
        if len(self._clients) == _CLIENTS_MAX:
            self._drop(next(iter(self._clients)))
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock)
        self._epoll.register(sock, select.EPOLLIN)

    def _serve(self, fd: int) -> None:
        client = self._clients[fd] = self._clients.pop(fd)  # to the end: this one is not silent
        try:
            stays = client.serve(self._call)
        except OSError:
            stays = False  # it left without a word
        if stays:
            self._epoll.modify(fd, select.EPOLLOUT if client.outbox else select.EPOLLIN)
        else:
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        client = self._clients.pop(fd)
        self._epoll.unregister(fd)
        client.sock.close()


class _Client:
    """One connection, with what came and went in part."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.outbox = b""
        self._inbox = bytearray()

    def serve(self, call: Call) -> bool:
        """Send what waits; if all is sent, read once and answer. False at the end."""
        if self.outbox:
            self._send(b"")
        elif data := self.sock.recv(_LINE_MAX):
            self._inbox += data
        else:
            return False
        while not self.outbox and (end := self._inbox.find(b"\n")) >= 0:
            line = bytes(self._inbox[:end])
            del self._inbox[: end + 1]
            self._send(answer(line, call))
        if len(self._inbox) > _LINE_MAX and b"\n" not in self._inbox:
            with contextlib.suppress(BlockingIOError):
                self.sock.send(answer(bytes(self._inbox), call))
            return False  # there is no telling where the next message begins
        return True

    def _send(self, data: bytes) -> None:
        self.outbox += data
        with contextlib.suppress(BlockingIOError):
            self.outbox = self.outbox[self.sock.send(self.outbox, socket.MSG_NOSIGNAL) :]


class _Problem(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def answer(line: bytes, call: Call) -> bytes:
    """The line that answers this one; none to a notification."""
    identity: object = None
    try:
        request = _decode(line)
        identity = request.get("id")
        method, parameters = _check(request)
        reply: dict[str, object] = {"result": _do(call, method, parameters)}
    except _Problem as problem:
        identity = identity if _identifies(identity) else None
        reply = {"error": {"code": problem.code, "message": str(problem)}}
    else:
        if "id" not in request:
            return b""
    return json.dumps({"jsonrpc": "2.0", **reply, "id": identity}).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any]:
    if len(line) > _LINE_MAX:
        raise _Problem(INVALID_REQUEST, f"a message of more than {_LINE_MAX} bytes")
    try:
        request = json.loads(line.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _Problem(PARSE_ERROR, f"not JSON: {str(error)[:200]}") from None
    if not isinstance(request, dict):
        raise _Problem(INVALID_REQUEST, "a request is an object")
    return request


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check(request: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    identity, method, parameters = request.get("id"), request.get("method"), request.get("params", {})
    if request.get("jsonrpc") != "2.0":
        raise _Problem(INVALID_REQUEST, 'jsonrpc has to be "2.0"')
    if not isinstance(method, str) or not set(request) <= _FIELDS:
        raise _Problem(INVALID_REQUEST, "a request has a method, params and an id, nothing else")
    if not _identifies(identity):
        raise _Problem(INVALID_REQUEST, "an id is a string, a number or null")
    if not isinstance(parameters, dict):
        raise _Problem(INVALID_PARAMS, "params have names")
    return method, parameters


def _identifies(identity: object) -> bool:
    if isinstance(identity, float):
        return math.isfinite(identity)  # JSON has 1e999, and no word for what it becomes
    return identity is None or (isinstance(identity, str | int) and not isinstance(identity, bool))


def _do(call: Call, method: str, parameters: Mapping[str, Any]) -> object:
    try:
        return call(method, parameters)
    except UnknownMethod as error:
        raise _Problem(METHOD_NOT_FOUND, str(error)) from None
    except BadParameters as error:
        raise _Problem(INVALID_PARAMS, str(error)) from None
    except (VirtioError, OSError, ValueError) as error:  # the last: a path that is none
        raise _Problem(FAILED, str(error)) from None
    except Exception as error:
        traceback.print_exc()  # a mistake of ours
        raise _Problem(INTERNAL_ERROR, f"{type(error).__name__}: {error}") from error
