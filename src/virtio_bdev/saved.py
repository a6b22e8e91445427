"""The JSON form of a configuration: SPDK's, a list of RPC calls for each subsystem."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from virtio_bdev.config import BdevSpec, Config, ConfigError, Line, registered

ATTACH = "bdev_virtio_attach_controller"
# What SPDK writes and what has no meaning here, or is always so.
_EMPTY = ("bdev_wait_for_examine",)


class Attach(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The parameters of `bdev_virtio_attach_controller`: SPDK's, then ours. 0 means the default."""

    name: str
    dev_type: Literal["blk", "scsi"]
    trtype: Literal["user", "pci", "vfio-user"]
    traddr: str
    vq_count: int = 0
    vq_size: int = 0
    timeout: float = 5.0
    reconnect: float = 0.0

    def spec(self) -> BdevSpec:
        """The same for us; ConfigError for what we do not have, or cannot be."""
        if self.trtype != "user":
            raise ConfigError(f"trtype {self.trtype!r}: only user is supported")
        return registered(
            address=f"user:{self.traddr}",
            name=self.name,
            dev_type=self.dev_type,
            queues=self.vq_count or 1,
            at_least=1,
            queue_size=self.vq_size or None,
            timeout=self.timeout,
            reconnect=self.reconnect,
        )


def attach_of(name: str, spec: BdevSpec) -> Attach:
    """The parameters that attach this controller again."""
    return Attach(
        name=name,
        dev_type=spec.dev_type,
        trtype="user",
        traddr=spec.address.removeprefix("user:"),
        vq_count=spec.queues or 0,
        vq_size=spec.queue_size or 0,
        timeout=spec.timeout,
        reconnect=spec.reconnect,
    )


class _Call(msgspec.Struct):
    method: str
    params: Any = None


class _Subsystem(msgspec.Struct):
    subsystem: str
    config: list[_Call | list[_Call]] | None = None


class _File(msgspec.Struct):
    subsystems: list[_Subsystem]


def read(path: str, data: bytes) -> Config:
    """What a file asks for; ConfigError says where it cannot be. What is not ours is in `ignored`."""
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return choose(path, file.subsystems)


def choose(path: str, subsystems: list[_Subsystem]) -> Config:
    """The devices among all calls; the names of the others."""
    lines: list[Line] = []
    ignored: dict[str, None] = {}
    for subsystem in subsystems:
        for each in subsystem.config or ():
            for call in each if isinstance(each, list) else [each]:
                if call.method == ATTACH:
                    where = f"{path}: device {len(lines) + 1}"
                    try:
                        spec = msgspec.convert(call.params, Attach).spec()
                    except (msgspec.ValidationError, ConfigError) as error:
                        raise ConfigError(f"{where}: {error}") from error
                    if any(spec.name == line.spec.name for line in lines):
                        raise ConfigError(f"{where}: there is a {spec.name!r} already")
                    lines.append(Line(where, spec))
                elif call.method not in _EMPTY:
                    ignored[call.method] = None
    return Config(path, lines, list(ignored))


def parse(params: object) -> Config:
    """The same out of a request."""
    try:
        return choose("the configuration", msgspec.convert(params, _File).subsystems)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the configuration: {error}") from error


def calls(controllers: dict[str, BdevSpec]) -> list[dict[str, object]]:
    """The calls that attach these controllers again, in order."""
    attached = [
        {"method": ATTACH, "params": msgspec.to_builtins(attach_of(name, spec))}
        for name, spec in controllers.items()
    ]
    return [*attached, {"method": "bdev_wait_for_examine"}]
