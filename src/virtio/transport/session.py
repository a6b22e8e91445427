"""One vhost-user connection, seen from the front end: what is said, asked and answered."""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from virtio.errors import ClosedError, ProtocolError, RequestTimeout, TransportError, VirtioError
from virtio.wire.vhost_user import (
    NEED_REPLY,
    REPLY,
    VERSION,
    Decoder,
    Message,
    ProtocolFeature,
    Request,
    decode_u64,
    expected_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

log = logging.getLogger("virtio.vhost_user")

_MAX_PATH = 107  # bytes in a sockaddr_un, without the NUL
_MAX_FDS = 64  # more than any peer may send: what comes is counted, and closed


def connect(path: str, timeout: float, peer: str = "back end") -> socket.socket:
    """A connected, non-blocking socket; TransportError says what to do about a failure.

    `peer` is what errors call the other side.
    """
    if len(os.fsencode(path)) > _MAX_PATH:
        words = f"cannot connect to {path}: path too long, a socket's has at most {_MAX_PATH} bytes"
        raise TransportError(errno.ENAMETOOLONG, words)
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise TransportError(error.errno or errno.EIO, _advice(path, error, peer)) from error
    deadline = time.monotonic() + timeout
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:  # the peer's queue of connections is full
                if time.monotonic() >= deadline:
                    raise TransportError(
                        errno.EAGAIN,
                        f"the {peer} at {path} accepted no connection in {timeout:g} s: it may be "
                        "serving another",
                    ) from None
                time.sleep(0.01)
    except OSError as error:
        sock.close()
        if isinstance(error, TransportError):
            raise
        raise TransportError(error.errno or errno.EIO, _advice(path, error, peer)) from error


def _advice(path: str, error: OSError, peer: str) -> str:
    reason = {
        errno.ENOENT: f"there is no such socket: is the {peer} running, with this path?",
        errno.ECONNREFUSED: f"nobody listens there: the {peer} has ended, or it is not a socket",
        errno.EACCES: "no permission: writing to the socket and searching its folders is needed",
        errno.ENOTSOCK: "it is not a socket",
        errno.EPROTOTYPE: "it is a socket of another kind, not a stream",
        errno.EMFILE: "no file descriptor is left: see `ulimit -n`",
    }.get(error.errno or 0, error.strerror or str(error))
    return f"cannot connect to {path}: {reason}"


def receive(sock: socket.socket, nbytes: int) -> tuple[bytes, list[int]]:
    """Bytes and the descriptors that came with them, now the caller's; BlockingIOError if none."""
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        nbytes, socket.CMSG_SPACE(_MAX_FDS * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise ProtocolError(f"more than {_MAX_FDS} file descriptors with one message")
    return data, list(fds)


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody asked for."""
    for fd in fds:
        os.close(fd)


class Session:
    """Requests and replies on one socket, which it owns; any error ends it (VHU-3).

    Every wait is bounded by `timeout` seconds. One request at a time, from any thread.
    """

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self.timeout = timeout
        self.features = ProtocolFeature(0)
        self._socket = connect(path, timeout)
        self._decoder = Decoder()
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self.error: VirtioError | None = None

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether `close` was called: there is no descriptor any more."""
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Close the socket; idempotent. A child of a fork does not end its parent's connection."""
        if os.getpid() == self._pid:  # a child that lives on has the socket too
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        close_all(self._decoder.close())
        if self.error is None:
            self.error = ClosedError(f"the connection to {self.path} was closed")

    def tell(self, request: Request, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send what has no reply of its own; its acknowledgement is awaited where there is one."""
        acked = bool(self.features & ProtocolFeature.REPLY_ACK)
        message = Message(request, VERSION | (NEED_REPLY if acked else 0), payload, tuple(fds))
        refusal = self._exchange(message, decode_u64 if acked else None)
        if refusal:
            raise TransportError(
                errno.EIO,
                f"the back end at {self.path} refused {Message(request, VERSION, payload).describe()}: "
                f"it answered {refusal:#x}",
            )

    def ask(self, request: Request, decode: Callable[[bytes], T], payload: bytes = b"") -> T:
        """Send what has a reply of its own, and return what the reply's payload means."""
        if not expected_reply(request, self.features):
            raise ValueError(f"{request.name} has no reply")
        reply = self._exchange(Message(request, VERSION, payload), decode)
        assert reply is not None
        return reply

    def _exchange(self, message: Message, decode: Callable[[bytes], T] | None) -> T | None:
        with self._lock:
            if self.error is not None:
                raise type(self.error)(*self.error.args)
            try:
                deadline = time.monotonic() + self.timeout
                self._send(message, deadline)
                if decode is None:
                    return None
                with self._blaming(message):
                    return decode(self._reply(message, deadline).payload)
            except VirtioError as error:
                self.error = type(error)(*error.args)  # a copy: the traceback holds on to everything
                raise
            except OSError as error:
                self.error = self._gone(message, error)
                raise self._gone(message, error) from error
            except BaseException:  # Ctrl-C: the answer may come yet, and must not be taken for another's
                self.error = TransportError(errno.EINTR, f"{self.path}: interrupted at {message.name}")
                raise
            finally:
                if self.error is not None:  # the descriptor may be watched: `close` closes it
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)

    def _gone(self, message: Message, error: OSError | None = None) -> TransportError:
        code = errno.ECONNRESET if error is None else error.errno or errno.ECONNRESET
        return TransportError(code, f"the back end at {self.path} closed the connection at {message.name}")

    def _send(self, message: Message, deadline: float) -> None:
        if log.isEnabledFor(logging.DEBUG):
            log.debug("> %s", message.describe())
        data = memoryview(message.encode())
        fds: Sequence[int] = message.fds
        while data:
            try:
                sent = socket.send_fds(self._socket, [data], fds, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, message, deadline)
            else:
                data, fds = data[sent:], ()  # the descriptors went with the first byte

    def _reply(self, message: Message, deadline: float) -> Message:
        while True:
            self._wait(select.POLLIN, message, deadline)
            try:
                data, fds = receive(self._socket, self._decoder.wanted)
            except BlockingIOError:
                continue
            if not data:
                raise self._gone(message)
            for reply in self._decoder.feed(data, fds):
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("< %s", reply.describe())
                if reply.fds:
                    close_all(reply.fds)
                    raise ProtocolError(f"{len(reply.fds)} descriptors came with it, want none")
                if reply.request != message.request or not reply.flags & REPLY:
                    raise ProtocolError(
                        f"it is {reply.name}, flags {reply.flags:#x}, want {message.name}, flags "
                        f"{VERSION | REPLY:#x}"
                    )
                return reply

    @contextlib.contextmanager
    def _blaming(self, message: Message) -> Iterator[None]:
        """Let an error about bytes say whose they were, and what they should have answered."""
        try:
            yield
        except ProtocolError as error:
            doubt = "; is it a vhost-user back end?" if message.request == Request.GET_FEATURES else ""
            raise ProtocolError(f"{self.path} answered {message.name} badly: {error}{doubt}") from error

    def _wait(self, events: int, message: Message, deadline: float) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise RequestTimeout(
                f"the back end at {self.path} did not answer {message.name} in {self.timeout:g} s: "
                "it hangs, serves another front end, or is not a vhost-user back end"
            )


def send_reply(sock: socket.socket, message: Message) -> None:
    """Answer on the channel back; a peer that does not read its answers gets none."""
    with contextlib.suppress(BlockingIOError):
        sock.send(message.encode(), socket.MSG_NOSIGNAL)
