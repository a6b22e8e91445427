"""What is said on stderr: errors and warnings always, what goes on in the library with -v and -vv."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any

import click

from virtio.errors import VirtioError


class _Formatter(logging.Formatter):
    """Seconds since the start, who speaks, and what; a warning says whose it is instead."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            return f"virtio-bdev: warning: {record.getMessage()}"
        source = record.name.removeprefix("virtio.").replace("_", "-")
        return f"{record.relativeCreated / 1000:9.6f} {source:10} {record.getMessage()}"


def set_up(verbosity: int) -> None:
    """Show warnings; from 1 on every vhost-user message, from 2 on the events of the rings too."""
    logger = logging.getLogger("virtio")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter())
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.DEBUG if verbosity > 1 else logging.INFO if verbosity else logging.WARNING)
    logging.getLogger("virtio.vhost_user").setLevel(logging.DEBUG if verbosity else logging.WARNING)


def _callback(ctx: click.Context, param: click.Parameter, value: int) -> None:
    if value:
        set_up(value)


def verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """-v, which may be given before the command's name and after it."""
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_callback,
        help="Show every vhost-user message on stderr; -vv: also what the rings do.",
    )(command)


def words(error: VirtioError) -> str:
    """An error in a line, without the number that an OSError begins with."""
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.strerror:
        name = errno.errorcode.get(error.errno or 0)
        return error.strerror + (f" [{name}]" if name else "")
    return str(error)
