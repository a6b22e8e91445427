"""The JSON form of a configuration: SPDK's, a list of RPC calls for each subsystem."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from virtio.errors import RequestError
from virtio.transport import sysfs
from virtio_bdev.config import BdevSpec, Config, ConfigError, Line, registered
from virtio_bdev.qos import RateLimits

ATTACH = "bdev_virtio_attach_controller"
LIMIT = "bdev_set_qos_limit"
_LEAST_IOS = 1000
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
    rings: Literal["any", "split"] = "any"

    def spec(self) -> BdevSpec:
        """The same for us; ConfigError for what we do not have, or cannot be."""
        if self.trtype not in ("user", "pci"):
            raise ConfigError(f"trtype {self.trtype!r}: only user and pci are supported")
        if self.trtype == "pci" and not sysfs.ADDRESS.fullmatch(self.traddr):
            raise ConfigError(f"traddr {self.traddr!r}: want a PCI address such as 0000:00:04.0")
        place = self.traddr if self.trtype == "user" else sysfs.normal(self.traddr)
        return registered(
            address=f"{self.trtype}:{place}",
            name=self.name,
            dev_type=self.dev_type,
            queues=self.vq_count or (1 if self.trtype == "user" else None),
            at_least=1,
            queue_size=self.vq_size or None,
            timeout=self.timeout,
            reconnect=self.reconnect,
            rings=self.rings,
        )


class SetQosLimit(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The parameters of `bdev_set_qos_limit`: what is left out stays, 0 is no limit."""

    name: str
    rw_ios_per_sec: int | None = None
    rw_mbytes_per_sec: int | None = None
    r_mbytes_per_sec: int | None = None
    w_mbytes_per_sec: int | None = None

    def limits(self, before: RateLimits) -> RateLimits:
        """What the limits are then; IOPS are rounded up to thousands, as by SPDK.

        ValueError without any, RequestError for what is none.
        """
        given = {name: getattr(self, name) for name in RateLimits._fields}
        wanted = {name: value for name, value in given.items() if value is not None}
        if not wanted:
            raise ValueError(f"no limit, want at least one of {', '.join(RateLimits._fields)}")
        limits = before._replace(**wanted)
        limits.check()  # before -5 is rounded up to 0, which is no limit
        return limits._replace(rw_ios_per_sec=-(-limits.rw_ios_per_sec // _LEAST_IOS) * _LEAST_IOS)


def attach_of(name: str, spec: BdevSpec) -> Attach:
    """The parameters that attach this controller again."""
    kind, _, place = spec.address.partition(":")
    if kind == "pci":  # whose queues SPDK decides about
        dev_type = spec.dev_type or "scsi"
        return Attach(name, dev_type, "pci", place, timeout=spec.timeout, rings=spec.rings)
    return Attach(
        name=name,
        dev_type=spec.dev_type or "scsi",
        trtype="user",
        traddr=place,
        vq_count=spec.queues or 0,
        vq_size=spec.queue_size or 0,
        timeout=spec.timeout,
        reconnect=spec.reconnect,
        rings=spec.rings,
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
    limits: dict[str, RateLimits] = {}
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
                elif call.method == LIMIT:
                    try:
                        params = msgspec.convert(call.params, SetQosLimit)
                        limits[params.name] = params.limits(limits.get(params.name, RateLimits()))
                    except (ValueError, RequestError) as error:
                        raise ConfigError(f"{path}: {LIMIT}: {error}") from error
                elif call.method not in _EMPTY:
                    ignored[call.method] = None
    ours = _of_ours(limits, lines, ignored)
    return Config(path, lines, list(ignored), ours)


def _of_ours(
    limits: dict[str, RateLimits], lines: list[Line], ignored: dict[str, None]
) -> dict[str, RateLimits]:
    """The limits of disks that may be ours: those of other modules are skipped like all of them."""
    names = tuple(line.spec.name or "" for line in lines)
    ours = {name: wanted for name, wanted in limits.items() if name.startswith(names)}
    for name in limits.keys() - ours.keys():
        ignored[f"{LIMIT} of {name}"] = None
    return ours


def parse(params: object) -> Config:
    """The same out of a request."""
    try:
        return choose("the configuration", msgspec.convert(params, _File).subsystems)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the configuration: {error}") from error


def calls(controllers: dict[str, BdevSpec], limits: dict[str, RateLimits]) -> list[dict[str, object]]:
    """The calls that attach these controllers again, in order, and limit their disks."""
    attached = [
        {"method": ATTACH, "params": msgspec.to_builtins(attach_of(name, spec))}
        for name, spec in controllers.items()
    ]
    limited = [
        {
            "method": LIMIT,
            "params": {"name": name} | {key: value for key, value in wanted._asdict().items() if value},
        }
        for name, wanted in limits.items()
    ]
    return [*attached, *limited, {"method": "bdev_wait_for_examine"}]
