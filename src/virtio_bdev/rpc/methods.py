"""The methods: SPDK's names, parameters and results. docs/rpc.md says where ours differ, and why."""

from __future__ import annotations

import base64
import errno
import importlib.metadata
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from virtio.device.scsi import ScsiDevice
from virtio.errors import RequestError, VirtioError
from virtio.ring.stats import GRANULARITY, RANGES, tick_rate
from virtio.transport import sysfs
from virtio_bdev import saved
from virtio_bdev.bdev import Bdev
from virtio_bdev.rpc import logs
from virtio_bdev.rpc.errors import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, RpcError
from virtio_bdev.rpc.hotplug import Hotplug
from virtio_bdev.rpc.system import System
from virtio_bdev.stats import IoCounts, IoStats

_MAX_WAIT_S = 3600.0
_HOTPLUG_US, _MAX_HOTPLUG_US = 100_000, 10_000_000
_TICK_RATE = 1_000_000_000  # of iostat: nanoseconds


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Method(NamedTuple):
    parameters: type[Any]
    run: Callable[[System, Any], Awaitable[object]]


_METHODS: dict[str, _Method] = {}
P = TypeVar("P", bound=msgspec.Struct)
_Handler = Callable[[System, P], Awaitable[object]]


def _method(parameters: type[P]) -> Callable[[_Handler[P]], _Handler[P]]:
    """A handler of that name, which gets decoded parameters."""

    def register(run: _Handler[P]) -> _Handler[P]:
        _METHODS[run.__name__] = _Method(parameters, run)
        return run

    return register


class Methods:
    """What an `RpcServer` calls."""

    def __init__(self, system: System) -> None:
        self._system = system

    async def __call__(self, name: str, params: object) -> object:
        """The result of a method; RpcError for anything else."""
        method = _METHODS.get(name)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, "Method not found: rpc_get_methods lists them")
        if method.parameters is _Nothing and params is not None:
            raise RpcError(INVALID_PARAMS, f"{name} requires no parameters")
        try:
            decoded = msgspec.convert({} if params is None else params, method.parameters)
        except msgspec.ValidationError as error:
            takes = ", ".join(method.parameters.__struct_fields__)
            words = f"spdk_json_decode_object failed: {error}: it takes {takes}"
            raise RpcError(INTERNAL_ERROR, words) from error
        return await method.run(self._system, decoded)


# Controllers and their disks.


@_method(saved.Attach)
async def bdev_virtio_attach_controller(system: System, params: saved.Attach) -> object:
    if params.name in system.held:
        raise RpcError(INVALID_PARAMS, f"Invalid argument: there is a controller {params.name!r} already")
    if params.trtype != "user" and (params.vq_count or params.vq_size):
        words = f"vq_count or vq_size is not allowed for {params.trtype.upper()} transport type."
        raise RpcError(-errno.EINVAL, words)
    if params.trtype == "pci" and not sysfs.ADDRESS.fullmatch(params.traddr):
        raise RpcError(-errno.EINVAL, f"Invalid PCI address {params.traddr!r}")
    try:
        return await system.attach(params.spec())
    except (VirtioError, MemoryError) as error:
        raise _invalid(error) from error


def _invalid(error: Exception) -> RpcError:
    return RpcError(INVALID_PARAMS, f"Invalid argument: {getattr(error, 'strerror', None) or error}")


class _Name(msgspec.Struct, forbid_unknown_fields=True):
    name: str


@_method(_Name)
async def bdev_virtio_detach_controller(system: System, params: _Name) -> object:
    await system.detach(params.name)
    return True


@_method(_Nothing)
async def bdev_virtio_scsi_get_devices(system: System, params: _Nothing) -> object:
    found = []
    for name, held in system.controllers():
        device = held.controller.blocking.device
        if isinstance(device, ScsiDevice):
            found.append({"name": name, "virtio": held.controller.blocking.describe()})
    return found


class _SetHotplug(msgspec.Struct, forbid_unknown_fields=True):
    enable: bool
    period_us: int = 0


@_method(_SetHotplug)
async def bdev_virtio_blk_set_hotplug(system: System, params: _SetHotplug) -> object:
    if params.period_us < 0:
        raise RpcError(INVALID_PARAMS, f"Invalid parameters: period_us {params.period_us}, want 0 or more")
    period = min(params.period_us or _HOTPLUG_US, _MAX_HOTPLUG_US) / 1e6
    before, system.hotplug = system.hotplug, None
    if before is not None:
        await before.close()
    if params.enable and system.hotplug is None:
        system.hotplug = Hotplug(system, period)
    return True


class _GetBdevs(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    timeout: int = 0  # milliseconds


@_method(_GetBdevs)
async def bdev_get_bdevs(system: System, params: _GetBdevs) -> object:
    if params.name is None:
        return [bdev.describe() for bdev in system.bdevs()]
    if params.timeout > 0:
        return [(await system.wait_for(params.name, min(params.timeout / 1e3, _MAX_WAIT_S))).describe()]
    return [system.bdev(params.name).describe()]


@_method(_Nothing)
async def bdev_wait_for_examine(system: System, params: _Nothing) -> object:
    return True  # nothing claims disks here


# What was asked of the disks.


class _GetIostat(msgspec.Struct, forbid_unknown_fields=True):
    names: list[str] | None = None
    per_channel: bool = False
    reset_mode: Literal["all", "maxmin", "error", "none"] = "none"


@_method(_GetIostat)
async def bdev_get_iostat(system: System, params: _GetIostat) -> object:
    bdevs = [system.bdev(name) for name in params.names] if params.names else list(system.bdevs())
    now = {"tick_rate": _TICK_RATE, "ticks": time.monotonic_ns()}
    if params.per_channel:
        if len(bdevs) != 1:
            raise RpcError(INVALID_PARAMS, "Invalid parameters: per_channel wants one name")
        channels = [
            {"thread_id": number} | _iostat(stats) for number, stats in enumerate(bdevs[0].queue_stats)
        ]
        answer = now | {"name": bdevs[0].name, "channels": channels}
    else:
        answer = now | {"bdevs": [{"name": bdev.name} | _iostat(bdev.stats) for bdev in bdevs]}
    if params.reset_mode != "none":
        for bdev in bdevs:
            _reset(bdev, params.reset_mode)
    return answer


def _reset(bdev: Bdev, mode: str) -> None:
    whole = mode == "all"
    bdev.reset_stats(counts=whole, extremes=whole or mode == "maxmin", failures=whole or mode == "error")


def _iostat(stats: IoStats) -> dict[str, object]:
    answer: dict[str, object] = {}
    kinds = {"read": stats.read, "write": stats.write, "unmap": stats.unmap, "copy": IoCounts(0, 0, 0, 0, 0)}
    past = {"read": "read", "write": "written", "unmap": "unmapped", "copy": "copied"}
    for kind, counts in kinds.items():
        answer |= {f"bytes_{past[kind]}": counts.nbytes, f"num_{kind}_ops": counts.requests}
    for kind, counts in kinds.items():
        answer[f"{kind}_latency_ticks"] = counts.total_ns
        answer[f"max_{kind}_latency_ticks"] = counts.longest_ns
        answer[f"min_{kind}_latency_ticks"] = counts.shortest_ns
    return answer | {"io_error": {"failed": stats.failed} if stats.failed else {}}


class _ResetIostat(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    mode: Literal["all", "maxmin", "error"] = "all"


@_method(_ResetIostat)
async def bdev_reset_iostat(system: System, params: _ResetIostat) -> object:
    for bdev in system.bdevs() if params.name is None else [system.bdev(params.name)]:
        _reset(bdev, params.mode)
    return True


class _EnableHistogram(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    enable: bool


@_method(_EnableHistogram)
async def bdev_enable_histogram(system: System, params: _EnableHistogram) -> object:
    system.bdev(params.name).keep_stats(histogram=params.enable)
    return True


@_method(_Name)
async def bdev_get_histogram(system: System, params: _Name) -> object:
    buckets = system.bdev(params.name).histogram
    if buckets is None:
        raise RpcError(
            -errno.ENOMEM, "Cannot allocate memory: no histogram is kept, see bdev_enable_histogram"
        )
    return {
        "histogram": base64.b64encode(buckets.tobytes()).decode(),
        "granularity": GRANULARITY,
        "min_range": 0,
        "max_range": RANGES,
        "tsc_rate": tick_rate(),
    }


@_method(saved.SetQosLimit)
async def bdev_set_qos_limit(system: System, params: saved.SetQosLimit) -> object:
    bdev = system.bdev(params.name)
    try:
        bdev.set_rate_limits(params.limits(bdev.rate_limits))
    except (RequestError, ValueError) as error:
        raise RpcError(INVALID_PARAMS, f"Invalid parameters: {error}") from error
    return True


# What has happened.


@_method(_Nothing)
async def notify_get_types(system: System, params: _Nothing) -> object:
    return ["bdev_register", "bdev_unregister", "bdev_resize"]


class _GetNotifications(msgspec.Struct, forbid_unknown_fields=True):
    id: int = 0
    max: int | None = None


@_method(_GetNotifications)
async def notify_get_notifications(system: System, params: _GetNotifications) -> object:
    later = [each._asdict() for each in system.notifications if each.id >= params.id]
    return later if params.max is None else later[: max(0, params.max)]


# The configuration.


@_method(_Nothing)
async def framework_wait_init(system: System, params: _Nothing) -> object:
    return True


@_method(_Nothing)
async def framework_get_subsystems(system: System, params: _Nothing) -> object:
    return [{"subsystem": "bdev", "depends_on": []}]


class _GetConfig(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    with_batches: bool = False


@_method(_GetConfig)
async def framework_get_config(system: System, params: _GetConfig) -> object:
    if params.name != "bdev":
        raise RpcError(INVALID_PARAMS, f"Subsystem '{params.name}' not found")
    return saved.calls(system.specs(), system.limits())


@_method(_Nothing)
async def save_config(system: System, params: _Nothing) -> object:
    return {"subsystems": [{"subsystem": "bdev", "config": saved.calls(system.specs(), system.limits())}]}


@_method(_Name)
async def save_subsystem_config(system: System, params: _Name) -> object:
    config = await framework_get_config(system, _GetConfig(params.name))
    return {"subsystem": params.name, "config": config}


class _LoadConfig(msgspec.Struct, forbid_unknown_fields=True):
    subsystems: list[dict[str, Any]]


@_method(_LoadConfig)
async def load_config(system: System, params: _LoadConfig) -> object:
    """All of it or nothing; what is not ours is named."""
    attached: list[str] = []
    names: list[str] = []
    try:
        config = saved.parse({"subsystems": params.subsystems})
        for line in config.lines:
            assert line.spec.name is not None
            names += await system.attach(line.spec)
            attached.append(line.spec.name)
        system.limit(config.limits)
    except (VirtioError, MemoryError, RpcError) as error:
        for name in attached:
            await system.detach(name)
        if isinstance(error, RpcError):
            raise
        raise _invalid(error) from error
    return {"bdevs": names, "skipped": config.ignored}


# The daemon itself.


class _GetMethods(msgspec.Struct, forbid_unknown_fields=True):
    current: bool = False
    include_aliases: bool = False


@_method(_GetMethods)
async def rpc_get_methods(system: System, params: _GetMethods) -> object:
    return sorted(_METHODS)


@_method(_Nothing)
async def spdk_get_version(system: System, params: _Nothing) -> object:
    version = importlib.metadata.version("virtio-bdev")
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version)
    assert match is not None
    major, minor, patch = (int(part or 0) for part in match.group(1, 2, 3))
    fields = {"major": major, "minor": minor, "patch": patch, "suffix": match[4]}
    return {"version": f"virtio-bdev v{version}", "fields": fields}


class _Level(msgspec.Struct, forbid_unknown_fields=True):
    level: str


class _Flag(msgspec.Struct, forbid_unknown_fields=True):
    flag: str


@_method(_Nothing)
async def log_get_level(system: System, params: _Nothing) -> object:
    return logs.level()


@_method(_Level)
async def log_set_level(system: System, params: _Level) -> object:
    logs.set_level(params.level)
    return True


@_method(_Nothing)
async def log_get_flags(system: System, params: _Nothing) -> object:
    return logs.flags()


@_method(_Flag)
async def log_set_flag(system: System, params: _Flag) -> object:
    logs.set_flag(params.flag, True)
    return True


@_method(_Flag)
async def log_clear_flag(system: System, params: _Flag) -> object:
    logs.set_flag(params.flag, False)
    return True
