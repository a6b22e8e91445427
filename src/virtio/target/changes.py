"""What can be asked of a device while it serves: its disks, and what they do wrong on purpose.

A change is prepared once, where the request came in, and applied by every process that has a copy
of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from virtio.errors import RequestError
from virtio.target.blk import BlkDevice
from virtio.target.scsi import LogicalUnit
from virtio.target.store import Faults, Store, parse_disk
from virtio.target.virtio_scsi import ScsiDevice
from virtio.wire.virtio_scsi import MAX_LUN, MAX_TARGET

Check: TypeAlias = Callable[[object], bool]

_MOST = (1 << 63) - 1
_LONGEST = 3600  # seconds of a delay


class UnknownMethod(RequestError):
    """There is no such thing to ask of this device."""


class BadParameters(RequestError):
    """The parameters are not those of the method."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to do; `store` is the disk that is added, whose descriptor goes with the change."""

    method: str
    parameters: Mapping[str, Any]
    store: Store | None = None


class _Method(NamedTuple):
    act: Callable[..., object]
    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Changes:
    """The changes that one device takes."""

    def __init__(self, device: ScsiDevice | BlkDevice) -> None:
        self.device = device
        faults = ("read", "write", "zero", "flush", "every", "delay", "hang")
        if isinstance(device, ScsiDevice):
            unit = ("target", "lun")
            scsi = _Scsi(device)
            self._methods = {
                "list_disks": _Method(scsi.list),
                "add_disk": _Method(scsi.add, (*unit, "disk")),
                "remove_disk": _Method(scsi.remove, unit),
                "resize_disk": _Method(scsi.resize, (*unit, "size")),
                "unit_attention": _Method(scsi.attention, (*unit, "asc", "ascq")),
                "set_fault": _Method(scsi.fault, unit, (*faults, "busy")),
            }
        else:
            blk = _Blk(device)
            self._methods = {
                "list_disks": _Method(blk.list),
                "resize_disk": _Method(blk.resize, ("size",)),
                "set_fault": _Method(blk.fault, (), faults),
            }

    def prepare(self, method: str, parameters: Mapping[str, Any]) -> Change:
        """Check what is asked for, and open the disk that it names."""
        if method not in self._methods:
            raise UnknownMethod(f"there is no method {method!r}, but {', '.join(self._methods)}")
        _, needed, optional = self._methods[method]
        for name in needed:
            if name not in parameters:
                raise BadParameters(f"{method} needs {name}")
        for name, value in parameters.items():
            if name not in needed and name not in optional:
                raise BadParameters(f"{method} takes no {name!r}")
            check, wanted = _CHECKS[name]
            if not check(value):
                raise BadParameters(f"{name} is {str(value)[:100]!r}, want {wanted}")
        rest = dict(parameters)
        spec = rest.pop("disk", None)
        return Change(method, rest, None if spec is None else parse_disk(spec))

    def apply(self, change: Change) -> object:
        """Do it; what to answer. RequestError or OSError if it cannot be, and then nothing was done."""
        act = self._methods[change.method].act
        return act(**change.parameters) if change.store is None else act(change.store, **change.parameters)


class _Scsi:
    def __init__(self, device: ScsiDevice) -> None:
        self._device = device

    def list(self) -> object:
        return [_entry(*unit) for unit in self._device.units()]

    def add(self, store: Store, target: int, lun: int) -> object:
        self._device.add(target, lun, store)
        return _entry(target, lun, self._device.unit(target, lun))

    def remove(self, target: int, lun: int) -> object:
        self._device.remove(target, lun).close()
        return True

    def resize(self, target: int, lun: int, size: int) -> object:
        self._device.resize(target, lun, size)
        return _entry(target, lun, self._device.unit(target, lun))

    def attention(self, target: int, lun: int, asc: int, ascq: int) -> object:
        self._device.attention(target, lun, asc, ascq)
        return True

    def fault(self, target: int, lun: int, **changes: Any) -> object:
        _set(self._device.unit(target, lun).faults, changes)
        self._device.refault()
        if changes.get("hang") is False:
            self._device.resume(target, lun)
        return True


class _Blk:
    def __init__(self, device: BlkDevice) -> None:
        self._device = device

    def list(self) -> object:
        return [_entry(0, 0, self._device)]

    def resize(self, size: int) -> object:
        self._device.resize(size)
        return _entry(0, 0, self._device)

    def fault(self, **changes: Any) -> object:
        _set(self._device.faults, changes)
        self._device.refault()
        if changes.get("hang") is False:
            self._device.resume()
        return True


def _entry(target: int, lun: int, disk: LogicalUnit | BlkDevice) -> dict[str, object]:
    store = disk.store
    return {
        "target": target,
        "lun": lun,
        "size": store.size,
        "block_size": store.block_size,
        "read_only": store.read_only,
        "serial": store.serial,
    }


def _set(faults: Faults, changes: Mapping[str, Any]) -> None:
    """Change what is named; null is no such fault."""
    for name, value in changes.items():
        if name not in ("read", "write", "zero", "flush"):
            setattr(faults, name, value or type(getattr(faults, name))())
        elif value is None:
            faults.fail.pop(name, None)
        else:
            faults.fail[name] = value
    if "every" in changes:
        faults.count = 0


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return check


def _seconds(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= _LONGEST  # which neither infinity nor NaN is


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


_OFFSET = (_or_null(_integer(0, _MOST)), "a byte offset or null")
_COUNT = (_or_null(_integer(0, _MOST)), "a number or null")

_CHECKS: dict[str, tuple[Check, str]] = {
    "target": (_integer(0, MAX_TARGET), f"0 to {MAX_TARGET}"),
    "lun": (_integer(0, MAX_LUN), f"0 to {MAX_LUN}"),
    "size": (_integer(1, _MOST), "a number of bytes"),
    "asc": (_integer(0, 0xFF), "0 to 255"),
    "ascq": (_integer(0, 0xFF), "0 to 255"),
    "disk": (lambda value: isinstance(value, str), "a description as --disk takes it"),
    **dict.fromkeys(("read", "write", "zero", "flush"), _OFFSET),
    "every": _COUNT,
    "busy": _COUNT,
    "delay": (_or_null(_seconds), f"seconds from 0 to {_LONGEST}, or null"),
    "hang": (lambda value: isinstance(value, bool), "true or false"),
}
