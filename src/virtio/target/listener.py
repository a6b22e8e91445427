"""A socket in the file system to which clients connect."""

from __future__ import annotations

import errno
import os
import socket
import stat

from virtio.errors import TransportError


class Listener:
    """Listens at a path, and takes that away at its end; a context manager, which owns its socket."""

    def __init__(self, path: str, mode: int = 0o777) -> None:
        """The socket of a dead process gives way, nothing else does. The umask counts too."""
        self.path = path
        _clear(path)
        self.sock = socket.socket(socket.AF_UNIX)
        try:
            os.fchmod(self.sock.fileno(), mode)  # before it can be seen
            self.sock.bind(path)
            self._inode = os.stat(path).st_ino
            self.sock.listen()
        except OSError as error:
            self.sock.close()
            raise TransportError(f"{path}: {error.strerror or error}") from error

    def fileno(self) -> int:
        return self.sock.fileno()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def leave(self) -> None:
        """In a process that was forked: let go of the socket, which is the parent's."""
        self.sock.close()

    def close(self) -> None:
        """Take the path away, unless it is another's by now."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        if os.path.exists(self.path) and os.stat(self.path).st_ino == self._inode:
            os.unlink(self.path)


def _clear(path: str) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise TransportError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:  # one with a full backlog lives too
            raise TransportError(f"{path} belongs to a living process")
    os.unlink(path)
