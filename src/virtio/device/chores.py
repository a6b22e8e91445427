"""What a device gives its driver to do beside requests: in one thread, while there is something."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable

from virtio.errors import ClosedError, VirtioError

log = logging.getLogger("virtio.device")

_JOIN_S = 10.0


class Chores:
    """Chores in the order they came, one at a time. A chore that waits already is not added again.

    Its thread begins with a chore after `begin`, and ends with the last; a chore may block, as long
    as the end of the device ends that.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._chores: dict[Hashable, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._begun = self._closed = False
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def mine(self) -> bool:
        """Whether this is the process they belong to, and not a child of a fork."""
        return os.getpid() == self._pid

    def add(self, key: Hashable, chore: Callable[[], None]) -> None:
        """Have `chore` done soon; from any thread, but not from a child of a fork."""
        if self.mine:
            with self._lock:
                if not self._closed:
                    self._chores.setdefault(key, chore)
                    self._start()

    def begin(self) -> None:
        """What was added, and will be, may be done from now on."""
        with self._lock:
            self._begun = True
            self._start()

    def close(self) -> None:
        """Forget what has not begun, and wait for the one that has; idempotent."""
        if not self.mine:
            return
        with self._lock:
            self._closed = True
            self._chores.clear()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_S)

    def _start(self) -> None:
        if self._begun and self._chores and self._thread is None:
            thread = threading.Thread(target=self._run, name="virtio-chores", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: whoever comes next tries again
                self._thread = None
                log.warning("%s: a chore has to wait: %s", self.name, error)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._chores:
                    self._thread = None
                    return
                chore = self._chores.pop(next(iter(self._chores)))
            try:
                chore()
            except ClosedError:
                pass
            except VirtioError as error:
                log.warning("%s: %s", self.name, error)
            except Exception:  # one mistake of ours must not end all the others
                log.exception("%s: a chore failed", self.name)
            del chore  # and with it its device, which may be gone by the time the next one comes
