"""The control thread: one epoll loop a process, for everything that is not a request.

It exists while something is watched or timed. Callbacks run in it, one at a time, and must not block.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable

from virtio.errors import TransportError

log = logging.getLogger("virtio.control")

_JOIN_S = 1.0

Callback = Callable[[int], None]  # called with the epoll events


class _Loop:
    """One thread and what it watches. Owns its epoll and wake-up descriptors."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callback] = {}
        self.timers: set[Timer] = set()
        self.stopped = False
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
                self.stopped = True
                self.wake()
                raise
            undo.pop_all()

    def stop(self) -> None:
        """Tell the thread to end; for who holds the lock."""
        self.stopped = True
        self.wake()

    def join(self) -> None:
        """Wait until it has, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)  # at the end of the interpreter it never comes

    def wake(self) -> None:
        """Let the thread look at its timers anew."""
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self.epoll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while True:
            for fd, events in self.epoll.poll(self._patience()):
                if fd == self._wake:
                    with _lock:
                        if self.stopped:
                            self.close()
                            return
                        os.eventfd_read(self._wake)
                    continue
                with _lock:
                    callback = self.callbacks.get(fd)
                    if callback is not None:
                        self._call(callback, events)
            self._tick()

    def _patience(self) -> float | None:
        """How long to wait for events: until the next timer is due."""
        with _lock:
            due = min((timer.due for timer in self.timers), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def _tick(self) -> None:
        with _lock:
            now = time.monotonic()
            for timer in [timer for timer in self.timers if timer.due <= now]:
                if timer in self.timers:  # none of those before it has cancelled it
                    timer.due = now + timer.seconds
                    self._call(timer.callback)

    def _call(self, callback: Callable[..., None], *details: int) -> None:
        try:
            callback(*details)
        except Exception:  # one watcher's mistake must not end everybody's loop
            log.exception("a callback of the control thread failed")


_lock = threading.RLock()  # held while a callback runs, and to look at `_loop`
_loop: _Loop | None = None
_ended: _Loop | None = None  # the last one that was told to end


def watch(fd: int, events: int, callback: Callback) -> None:
    """Call `callback(events)` in the control thread whenever epoll reports `events` on `fd`.

    Level-triggered: a callback that does not clear the reason must `unwatch`. TransportError when
    there is no descriptor, thread or memory left to do it.
    """
    with _lock:
        loop = _running()
        loop.callbacks[fd] = callback
        try:
            loop.epoll.register(fd, events)
        except OSError as error:
            unwatch(fd)
            raise _cannot(error) from error


def unwatch(fd: int) -> None:
    """Stop watching, before the descriptor is closed; no callback for it runs afterwards."""
    idle = None
    with _lock:
        if _loop is not None and _loop.callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # it never came to be watched
                _loop.epoll.unregister(fd)
            idle = _idle()
        idle = idle or _ended  # by itself, perhaps: in a callback that has unwatched this descriptor
    if idle is not None:
        idle.join()


class Timer:
    """Calls `callback()` in the control thread every so many `seconds`, until it is cancelled.

    TransportError when there is no descriptor, thread or memory left to do it.
    """

    def __init__(self, seconds: float, callback: Callable[[], None]) -> None:
        self.seconds, self.callback = seconds, callback
        self.due = time.monotonic() + seconds
        with _lock:
            loop = _running()
            loop.timers.add(self)
            loop.wake()

    def cancel(self) -> None:
        """Call no more; idempotent."""
        idle = None
        with _lock:
            if _loop is not None and self in _loop.timers:
                _loop.timers.discard(self)
                idle = _idle()
        if idle is not None:
            idle.join()


def _running() -> _Loop:
    """The loop, begun if there is none; for who holds the lock."""
    global _loop
    if _loop is None:
        try:
            _loop = _Loop()
        except (OSError, RuntimeError) as error:
            raise _cannot(error) from error
    return _loop


def _idle() -> _Loop | None:
    """The loop, if nobody needs it any more, told to end; for who holds the lock to join after that."""
    global _loop, _ended
    idle = None
    if _loop is not None and not _loop.callbacks and not _loop.timers:
        idle, _loop = _loop, None
        _ended = idle
        idle.stop()
    return idle


def _cannot(error: Exception) -> TransportError:
    code = getattr(error, "errno", None) or errno.EAGAIN
    return TransportError(code, f"no control thread: {error}; see `ulimit -n` and `ulimit -u`")


def _after_fork_in_child() -> None:
    global _loop, _ended, _lock
    _lock = threading.RLock()
    _ended = None
    if _loop is not None:
        _loop.close()
        _loop = None


os.register_at_fork(after_in_child=_after_fork_in_child)
