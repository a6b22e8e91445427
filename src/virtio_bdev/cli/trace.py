"""What the library says while it works, on stderr: warnings always, the rest with -v and -vv."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import click


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
