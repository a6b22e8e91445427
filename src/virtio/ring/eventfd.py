"""Eventfds that a peer shares: it may fill their counters, and even make them block. Nothing here does."""

from __future__ import annotations

import contextlib
import errno
import os
import select

from virtio.errors import TransportError


def make_eventfd() -> int:
    """A non-blocking eventfd, closed in programs that are run; TransportError when none is left."""
    try:
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    except OSError as error:
        raise TransportError(error.errno or errno.EMFILE, "no eventfd to be had: see `ulimit -n`") from error


def signal(fd: int) -> None:
    """Make it readable; one that is full is so already."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if poll.poll(0):
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(fd, 1)


def drain(fd: int) -> None:
    """Take what is in it; nothing, if somebody else was first."""
    try:
        os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:  # Linux before 5.8
            raise
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
