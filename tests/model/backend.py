"""The back end: a listening socket, a thread, one front end after another."""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.model.options import Options
from tests.model.ring import Chain, Ring
from tests.model.session import Disk, Lost, Record, Session, ack_of
from tests.model.wire import HEADER, NEED_REPLY, VERSION, BackendRequest

_MOST_VIOLATIONS = 50
_T = TypeVar("_T")
_RDHUP = 0x2000  # POLLRDHUP, which the select module has no name for


class Backend:
    """Serves `device` on a socket of its own while the context lasts, then checks (see `check`).

    `log` and `violations` may be read at any time; everything else of a session belongs to the
    thread, where `do` runs a function.
    """

    def __init__(self, device: Disk, options: Options | None = None, **changes: Any) -> None:
        """`changes` set fields of the options."""
        self.device = device
        self.options = options or Options()
        for name, value in changes.items():
            if not hasattr(self.options, name):
                raise TypeError(f"no such option: {name}")
            setattr(self.options, name, value)
        self.log: list[Record] = []
        self.violations: list[str] = []
        self.failure: str = ""
        self.session: Session | None = None
        self.rings: dict[int, Ring] = {}
        """Those of the session, or of the last one: counters and flags are good for ever."""
        self._changed = threading.Condition()
        self._jobs: collections.deque[Callable[[], None]] = collections.deque()
        self._stop = False
        self._folder = tempfile.TemporaryDirectory(prefix="model-")
        self.path = str(Path(self._folder.name) / "socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(4)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        device.violate = self._violate
        self._thread = threading.Thread(target=self._main, name="model back end", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What `attach` takes."""
        return f"user:{self.path}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if kind is None:
            self.check()
        elif self.violations and error is not None:
            error.add_note("the model saw: " + "; ".join(self.violations))

    def close(self) -> None:
        """End the session and the thread, remove the socket; may be called again."""
        if not self._stop:
            self._stop = True
            os.eventfd_write(self._wake, 1)
            self._thread.join(10)
            if self._thread.is_alive():
                raise AssertionError("the model's thread does not end")
            self._listener.close()
            os.close(self._wake)
            self._folder.cleanup()

    def check(self) -> None:
        """AssertionError with all violations so far, and if the model itself failed."""
        if self.failure:
            raise AssertionError(f"the model failed: {self.failure}")
        if self.violations:
            raise AssertionError("\n".join(self.violations))

    # What happened

    def names(self) -> list[str]:
        """The names of all records."""
        return [record.name for record in list(self.log)]

    def values(self, name: str) -> list[Any]:
        """What all messages of this name carried."""
        return [record.value for record in list(self.log) if record.name == name]

    def wait_for(self, predicate: Callable[[], bool], timeout: float = 5.0) -> bool:
        """Wait until something that the thread does makes this true; false after the time-out."""
        end = time.monotonic() + timeout
        with self._changed:
            while not predicate():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(left, 0.02))
        return True

    # Making things happen

    def do(self, job: Callable[[], _T], timeout: float = 5.0) -> _T:
        """Run a function in the back end's thread, and give its result or its exception."""
        result: list[_T] = []
        errors: list[BaseException] = []
        done = threading.Event()

        def run() -> None:
            try:
                result.append(job())
            except BaseException as error:
                errors.append(error)
            done.set()

        self._jobs.append(run)
        os.eventfd_write(self._wake, 1)
        if not done.wait(timeout):
            raise AssertionError(f"the model's thread is stuck {self.failure}")
        if errors:
            raise errors[0]
        return result[0]

    def release(self, order: Callable[[list[Chain]], list[Chain]] | None = None) -> int:
        """Complete the chains that were held, here in the order given; how many."""

        def job() -> int:
            count = 0
            for ring in self.rings.values():
                held, ring.held = ring.held, []
                if not ring.started:
                    continue
                chains = order(held) if order is not None else held
                ring.finish([(chain, self.device.handle(chain) or 0) for chain in chains])
                count += len(chains)
            return count

        return int(self.do(job))

    def spur(self, times: int = 1) -> None:
        """Signal every call descriptor for nothing."""

        def job() -> None:
            for ring in self.rings.values():
                ring.ring_call(times)

        self.do(job)

    def disconnect(self) -> None:
        """Close the connection, as a back end that dies does."""

        def job() -> None:
            if self.session is not None:
                self._end("told to")

        self.do(job)

    def request(
        self,
        number: int = BackendRequest.CONFIG_CHANGE_MSG,
        payload: bytes = b"",
        *,
        need_reply: bool = True,
        fds: tuple[int, ...] = (),
    ) -> int | None:
        """Send a message on the back-end channel; the value of the answer, if there is one."""
        session = self.session
        if session is None or session.channel is None:
            raise AssertionError("VHU-17: there is no back-end channel")
        flags = VERSION | (NEED_REPLY if need_reply else 0)
        message = HEADER.pack(number, flags, len(payload)) + payload
        socket.send_fds(session.channel, [message], list(fds))
        if not need_reply:
            return None
        answer = b""
        while len(answer) < HEADER.size + 8:
            try:
                part = session.channel.recv(HEADER.size + 8 - len(answer))
            except TimeoutError:
                part = b""
            if not part:
                break
            answer += part
        value = ack_of(answer)
        if value is None or HEADER.unpack_from(answer)[0] != number:
            self._violate("VHU-18", f"back-end message {number} was answered with {answer.hex()!r}")
        return value

    # The thread

    def _violate(self, clause: str, text: str) -> None:
        if len(self.violations) < _MOST_VIOLATIONS:
            self.violations.append(f"{clause}: {text}")

    def _record(self, record: Record) -> None:
        with self._changed:
            self.log.append(record)
            self._changed.notify_all()

    def _main(self) -> None:
        try:
            while not self._stop:
                self._turn()
            if self.session is not None:
                self._end("the model was closed")
        except BaseException:
            self.failure = traceback.format_exc()
            if self.session is not None:
                self.session.connection.close()

    def _turn(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        session = self.session
        if session is None:
            poller.register(self._listener, select.POLLIN)
        else:
            poller.register(session.connection, _RDHUP if session.hung else select.POLLIN)
            for ring in session.rings.values():
                if ring.kick >= 0 and not (self.options.polling and ring.started):
                    poller.register(ring.kick, select.POLLIN)
        polling = self.options.polling and session is not None
        ready = {fd for fd, _ in poller.poll(0 if polling else 1000)}
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        while self._jobs:
            self._jobs.popleft()()
        session = self.session
        if session is None:
            if self._listener.fileno() in ready:
                connection, _ = self._listener.accept()
                self.session = Session(connection, self.device, self.options, self._violate, self._record)
                self.rings = self.session.rings
                self._record(Record("connect"))
            return
        try:
            # Messages first: what was sent before a kick counts before it.
            if session.hung and session.connection.fileno() in ready:
                raise Lost("end of stream")
            session.pump()
            session.kicks(ready)
            session.serve(None if polling else ready)
        except Lost as lost:
            self._end(str(lost))
        if not polling or not ready:
            with self._changed:
                self._changed.notify_all()

    def _end(self, why: str) -> None:
        assert self.session is not None
        running = sorted(ring.index for ring in self.session.rings.values() if ring.started)
        self.session.close()
        self.session = None
        self._record(Record("disconnect", (why, running)))
