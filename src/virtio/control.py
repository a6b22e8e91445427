"""The control thread: one epoll loop a process, for everything that is not a request.

It exists while something is watched. Callbacks run in it, one at a time, and must not block.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
from collections.abc import Callable

from virtio.errors import TransportError

log = logging.getLogger("virtio.control")

_JOIN_S = 1.0

Callback = Callable[[int], None]  # called with the epoll events


class _Loop:
    """One thread and what it watches. Owns its epoll and wake-up descriptors."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callback] = {}
        with contextlib.ExitStack() as undo:
            self.epoll = select.epoll()
            undo.callback(self.epoll.close)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake)
            self.epoll.register(self._wake, select.EPOLLIN)
            self._thread = threading.Thread(target=self._run, name="virtio-control", daemon=True)
            try:
                self._thread.start()
            except KeyboardInterrupt:  # while it waited for the thread, which has the descriptors by now
                undo.pop_all()
                os.eventfd_write(self._wake, 1)
                raise
            undo.pop_all()

    def stop(self) -> None:
        """Let the thread end, and wait for that unless this is it."""
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)  # at the end of the interpreter it never comes

    def close(self) -> None:
        self.epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while True:
            for fd, events in self.epoll.poll():
                if fd == self._wake:
                    self.close()
                    return
                with _lock:
                    callback = self.callbacks.get(fd)
                    if callback is not None:
                        self._call(callback, events)

    def _call(self, callback: Callback, events: int) -> None:
        try:
            callback(events)
        except Exception:  # one watcher's mistake must not end everybody's loop
            log.exception("a callback of the control thread failed")


_lock = threading.RLock()  # held while a callback runs, and to look at `_loop`
_loop: _Loop | None = None


def watch(fd: int, events: int, callback: Callback) -> None:
    """Call `callback(events)` in the control thread whenever epoll reports `events` on `fd`.

    Level-triggered: a callback that does not clear the reason must `unwatch`. TransportError when
    there is no descriptor, thread or memory left to do it.
    """
    global _loop
    with _lock:
        try:
            if _loop is None:
                _loop = _Loop()
            _loop.callbacks[fd] = callback
            _loop.epoll.register(fd, events)
        except (OSError, RuntimeError) as error:
            unwatch(fd)
            code = getattr(error, "errno", None) or errno.EAGAIN
            words = f"no control thread: {error}; see `ulimit -n` and `ulimit -u`"
            raise TransportError(code, words) from error


def unwatch(fd: int) -> None:
    """Stop watching, before the descriptor is closed; no callback for it runs afterwards."""
    global _loop
    idle = None
    with _lock:
        if _loop is not None and _loop.callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it never came to be watched
                _loop.epoll.unregister(fd)
            if not _loop.callbacks:
                idle, _loop = _loop, None
    if idle is not None:
        idle.stop()


def _after_fork_in_child() -> None:
    global _loop, _lock
    _lock = threading.RLock()
    if _loop is not None:
        _loop.close()
        _loop = None


os.register_at_fork(after_in_child=_after_fork_in_child)
