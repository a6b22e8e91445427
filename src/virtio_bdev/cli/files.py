"""Files that are copied from and to: unbuffered, "-" for stdin and stdout, errors that name them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

import click


class File:
    """An open file; its descriptor is owned by `opened`."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def left(self) -> int | None:
        """Bytes from here to the end, where that is known beforehand."""
        with self.errors():
            kind = os.fstat(self.fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                return None
            here = os.lseek(self.fd, 0, os.SEEK_CUR)
            end = os.lseek(self.fd, 0, os.SEEK_END)
            os.lseek(self.fd, here, os.SEEK_SET)
            return max(0, end - here)

    def fill(self, view: memoryview) -> int:
        """Read until the view is full or the file ends; a pipe gives less at a time."""
        filled = 0
        with self.errors():
            while filled < len(view) and (got := os.readv(self.fd, [view[filled:]])):
                filled += got
        return filled

    def write(self, view: memoryview) -> None:
        """Write all of it."""
        with self.errors():
            while view:
                view = view[os.write(self.fd, view) :]

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Let what goes wrong name the file; a pipe that nobody reads is for `main`."""
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise click.ClickException(f"{self.name}: {error.strerror or error}") from error


@contextlib.contextmanager
def opened(path: str, *, write: bool) -> Iterator[File]:
    """A file to read, or one to write from its beginning."""
    if path == "-":
        yield File(1, "standard output") if write else File(0, "standard input")
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if write else os.O_RDONLY
    file = File(-1, path)
    with file.errors():
        file.fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield file
    finally:
        with file.errors():
            os.close(file.fd)
