"""The target's process: lets one front end after another in, and takes changes from outside.

Each session is a process of its own, so that a front end which shrinks its memory under us
(SIGBUS), or whatever else goes wrong, ends that session and nothing more. Its device is a copy, so
a change is applied there first, and here if it was not refused: that is what the next one gets.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from virtio.errors import RequestError, RequestTimeout, VirtioError
from virtio.target.blk import BlkDevice
from virtio.target.changes import Change, Changes
from virtio.target.control import ControlServer
from virtio.target.link import Receiver, Sender, pair
from virtio.target.listener import Listener
from virtio.target.session import Session
from virtio.target.virtio_scsi import ScsiDevice

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PR_SET_PDEATHSIG = 1  # prctl(2)
_GRACE_S = 2.0  # for a session to end when its front end has left
_PATIENCE_S = 2.0  # for a session to take a change
_WHY = {
    "SIGBUS": " (did the shared memory shrink?)",
    "SIGKILL": " (it was stuck when its front end left)",
}


class Host:
    """Serves a device on a socket; a context manager."""

    def __init__(
        self,
        path: str,
        device: ScsiDevice | BlkDevice,
        features: int,
        extensions: int,
        *,
        lifeline: int | None = None,
        control: str | None = None,
    ) -> None:
        """`lifeline` is a descriptor whose end ends `run`, `control` the path of a socket for changes."""
        self._device, self._features, self._extensions = device, features, extensions
        self._lifeline = lifeline
        self._changes = Changes(device)
        self._link: Sender | None = None  # to the session
        self._late: Change | None = None  # the session has not answered yet
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(Listener(path))
            self._control = stack.enter_context(ControlServer(control, self.call)) if control else None
            self._stack = stack.pop_all()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self) -> None:
        """Serve front ends, one at a time, until `lifeline` ends or for ever."""
        while self._wait(self._listener.fileno()):
            sock, _ = self._listener.sock.accept()
            if not self._session(sock):
                return

    def call(self, method: str, parameters: Mapping[str, Any]) -> object:
        """Do what a client of the control socket asks for."""
        change = self._changes.prepare(method, parameters)
        self._catch_up()
        try:
            if method != "list_disks":
                self._forward(change)
            return self._apply(change)
        except Exception:
            if change is not self._late:
                _abandon(change)
            raise

    def _forward(self, change: Change) -> None:
        """Have the session apply it; RequestError if that refuses."""
        if self._link is None:
            return
        if self._late is not None:
            raise RequestTimeout(f"the session is still stuck, with {self._late.method} to do")
        self._link.send(change)
        if not self._link.answer(_PATIENCE_S):
            self._late = change
            raise RequestTimeout(f"the session has not done it in {_PATIENCE_S:g} s: it will when it can")

    def _apply(self, change: Change) -> object:
        result = self._changes.apply(change)
        if self._link is not None:
            self._device.forget()  # what is to be told, the session tells
        return result

    def _catch_up(self) -> None:
        """Apply what the session was late with, if it has answered or ended since."""
        if self._late is None:
            return
        late = self._late
        try:
            if self._link is not None and not self._link.answer(0):
                return
            self._late = None
            self._apply(late)
        except (RequestError, OSError):
            self._late = None
            _abandon(late)

    def _session(self, sock: socket.socket) -> bool:
        """Serve one front end, in a process of its own; false when `lifeline` ended first."""
        link, theirs = pair()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid == 0:
            self._serve(sock, link, theirs)
        child = os.pidfd_open(pid)
        ended = False
        try:
            theirs.close()
            self._link = link
            self._device.forget()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            ended = self._wait(child, sock.fileno())
        finally:
            os.close(child)
            os.kill(pid, signal.SIGKILL)  # of no effect on one that has ended
            _, status = os.waitpid(pid, 0)
            self._link = None
            link.close()
            sock.close()
        self._catch_up()
        if ended and os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            print(f"session ended: killed by {name}{_WHY.get(name, '')}", file=sys.stderr, flush=True)
        return ended

    def _wait(self, fd: int, front_end: int | None = None) -> bool:
        """Wait until `fd` is readable, or the front end is gone for longer than a session takes to end.

        Meanwhile the control socket is served. False when `lifeline` came to its end first.
        """
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if self._lifeline is not None:
            poll.register(self._lifeline, select.POLLIN)
        if self._control is not None:
            poll.register(self._control.fileno(), select.POLLIN)
        if front_end is not None:
            poll.register(front_end, select.POLLRDHUP)
        deadline = float("inf")
        while (now := time.monotonic()) < deadline:
            grace = None if deadline == float("inf") else 1000 * (deadline - now)
            ready = [number for number, _ in poll.poll(grace)]
            if self._lifeline is not None and self._lifeline in ready and not os.read(self._lifeline, 4096):
                return False
            if fd in ready:
                return True
            if self._control is not None and self._control.fileno() in ready:
                self._control.serve()
            if front_end is not None and front_end in ready:
                poll.unregister(front_end)
                deadline = time.monotonic() + _GRACE_S
        return True

    def _serve(self, sock: socket.socket, link: Sender, theirs: socket.socket) -> NoReturn:
        """The session's own process, from fork to exit."""
        code = 1
        try:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            link.close()
            self._listener.leave()
            if self._control is not None:
                self._control.leave()
            changes = Receiver(theirs, self._changes)
            Session(sock, self._device, self._features, self._extensions, changes).run()
            code = 0
        except VirtioError as error:
            print(f"session ended: {error}", file=sys.stderr, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _abandon(change: Change) -> None:
    """What could not be done needs no disk."""
    if change.store is not None:
        change.store.close()
