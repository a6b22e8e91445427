"""The clock, the spin hint, eventfds, mappings, registers in files; `_os.pxd` is the twin without the GIL."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from virtio.ring import eventfd
from virtio.ring._mem import Mem, address

_MAP_FIXED = 0x10


def now_ns() -> int:
    """Monotonic time in nanoseconds, the clock of `time.monotonic_ns`."""
    return time.monotonic_ns()


def ticks() -> int:
    """Time in ticks of the processor, where there are any that all cores share; here in nanoseconds."""
    return time.monotonic_ns()


def relax() -> None:
    """Tell the processor, here the other threads, that this one spins."""
    time.sleep(0)


def signal_eventfd(fd: int) -> int:
    """Add one to an eventfd; 0, or the errno. A full one counts as signalled, and is left alone: whoever
    shares it may have made it block."""
    try:
        eventfd.signal(fd)
    except OSError as error:
        return error.errno or 0
    return 0


def write_eventfd(fd: int) -> int:
    """The same without a look whether it is full: it blocks where a peer has made it so."""
    return signal_eventfd(fd)


def sleep_on(fd: int, end: int, ns: int) -> int:
    """Sleep until `fd`, an eventfd, is readable, and take what is in it, or for so long: 1, or 0.

    -1 if `end` was readable, a signal came, or anything else that its caller has to look at.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(end, select.POLLIN)
    found = poll.poll(ns / 1e6)
    if found == [(fd, select.POLLIN)]:
        eventfd.drain(fd)
        return 1
    return -1 if found else 0


def replace_mapping(at: Mem, fd: int, fresh: Mem, fresh_fd: int) -> int:
    """Copy what a memfd mapped as `at` has to another one, mapped as `fresh`, and map that at `at`.

    0, or the errno.
    """
    end = 0
    while end < len(at):
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)  # holes stay without memory
            end = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            begin, end = 0, len(at)
        fresh[begin:end] = at[begin:end]
    libc = ctypes.PyDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    where, size = ctypes.c_void_p(address(at)), ctypes.c_size_t(len(at))
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if libc.mmap(where, size, protection, flags, fresh_fd, ctypes.c_long(0)) != where.value:
        return ctypes.get_errno()
    libc.madvise(where, size, mmap.MADV_DONTFORK)
    return 0


def write_at(fd: int, offset: int, value: int, width: int) -> int:
    """Write a number of `width` bytes in one piece, in the machine's byte order; 0, or the errno."""
    try:
        done = os.pwrite(fd, value.to_bytes(width, sys.byteorder), offset)
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if done == width else errno.EIO


def make_whole(cls: type) -> None:
    """Let no Ctrl-C come amid the public methods of a class, as none comes amid compiled ones."""
    for name, method in list(vars(cls).items()):
        if callable(method) and not name.startswith("_"):
            setattr(cls, name, _whole(method))


def _whole(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            return method(*args, **kwargs)
        came: list[Any] = []
        signal.signal(signal.SIGINT, lambda *what: came.append(what))
        try:
            return method(*args, **kwargs)
        finally:
            signal.signal(signal.SIGINT, handler)
            if came:
                handler(*came[0])

    return call
