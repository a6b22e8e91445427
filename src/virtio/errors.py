"""Everything that can go wrong, sorted by whose fault it is.

The peer's: `ProtocolError` (it broke the protocol), `TransportError` (it cannot be reached or went
away), `DeviceError` (it did what was asked, and failed). The caller's: the others. All of them are
`VirtioError`.
"""

from __future__ import annotations

import errno
import os


class VirtioError(Exception):
    """The root of every error that this library raises on purpose.

    `batch` is what a batch call had come to when it was cut short by this error, else None.
    """

    batch: object = None


class TransportError(VirtioError, OSError):
    """The device cannot be reached, or has gone: a socket, mapping or file descriptor failed."""


class ProtocolError(VirtioError):
    """The peer sent what the specification does not allow; says what came and what was allowed."""


class DeviceError(VirtioError, OSError):
    """The device answered a request with an error.

    `errno` is the nearest POSIX error; `offset` the byte on the disk where the failed request
    began (None for a request without one); `status` the device's own status byte; `sense` the raw
    SCSI sense data, empty for other devices. `transient`: the device did nothing, and the same
    request may well succeed in a moment.
    """

    def __init__(
        self,
        code: int,
        message: str,
        *,
        offset: int | None = None,
        status: int = 0,
        sense: bytes = b"",
        transient: bool = False,
    ) -> None:
        super().__init__(code, message)
        self.offset = offset
        self.status = status
        self.sense = sense
        self.transient = transient

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at byte {self.offset}"
        name = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.strerror}{where} [{name}: {os.strerror(self.errno or 0)}]"


class RequestTimeout(VirtioError, TimeoutError):
    """The device did not answer in time; the request may still take effect."""


class RequestError(VirtioError, ValueError):
    """The request itself is wrong: off the block grid, past the end, or not supported here."""


class ReadOnlyError(RequestError):
    """A write to a disk that takes none."""


class ClosedError(VirtioError):
    """The handle was closed, or belongs to the process that this one was forked from."""


class ChannelInUse(VirtioError):
    """Another thread is inside a call on the same queue lease."""


class NoQueueError(VirtioError):
    """More threads want a queue than the controller has."""


class QueueFullError(VirtioError):
    """More requests wait for a place in the queue than may."""
