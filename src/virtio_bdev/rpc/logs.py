"""SPDK's log levels and flags, as those of the standard module's loggers."""

from __future__ import annotations

import logging

from virtio_bdev.rpc.errors import INVALID_PARAMS, RpcError

LEVELS = {
    "DISABLED": logging.CRITICAL + 1,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "NOTICE": 25,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
}
FLAGS = ("bdev", "control", "device", "pci", "ring", "rpc", "scsi", "vhost_user")
"""The loggers under "virtio": one a subsystem."""

logging.addLevelName(LEVELS["NOTICE"], "NOTICE")


def level() -> str:
    """What is logged at least."""
    now = logging.getLogger("virtio").getEffectiveLevel()
    return min((name for name, at in LEVELS.items() if at >= now), key=LEVELS.__getitem__, default="DISABLED")


def set_level(name: str) -> None:
    """Log that and what is worse; a flag that is set logs all."""
    if name not in LEVELS:
        raise RpcError(INVALID_PARAMS, f"Invalid parameters: level {name!r}, want one of {', '.join(LEVELS)}")
    logging.getLogger("virtio").setLevel(LEVELS[name])


def flags() -> dict[str, bool]:
    """Which subsystems log all they can."""
    return {name: logging.getLogger(f"virtio.{name}").level == logging.DEBUG for name in FLAGS}


def set_flag(name: str, value: bool) -> None:
    """Have a subsystem, or "all" of them, log all it can, or as much as `level` says."""
    if name not in (*FLAGS, "all"):
        raise RpcError(INVALID_PARAMS, f"Invalid parameters: flag {name!r}, want all, {', '.join(FLAGS)}")
    for each in FLAGS if name == "all" else (name,):
        logging.getLogger(f"virtio.{each}").setLevel(logging.DEBUG if value else logging.NOTSET)
