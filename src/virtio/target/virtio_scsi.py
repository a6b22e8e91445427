"""The virtio SCSI host device (5.6): framing around the commands of SCSI targets.

One module, as commands, the management of those that are held, and units that come and go share
the units and the way in which these are addressed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from virtio.errors import ProtocolError, RequestError
from virtio.ring.device import DeviceRing
from virtio.target.events import EventQueue
from virtio.target.held import Held
from virtio.target.scsi import (
    CAPACITY_CHANGED,
    CHANGES,
    FLUSHES,
    LUNS_CHANGED,
    READS,
    LogicalUnit,
    Overrun,
    ReportLuns,
    Target,
)
from virtio.target.store import Store
from virtio.wire.scsi import Sense, SenseKey, Status
from virtio.wire.virtio_scsi import (
    CDB_SIZE,
    REPORT_LUNS_WLUN,
    SENSE_SIZE,
    ControlType,
    Event,
    EventType,
    ResetReason,
    Response,
    ResponseCode,
    ScsiConfig,
    ScsiFeature,
    TaskFunction,
    TaskManagement,
    decode_lun,
    encode_lun,
)

_CDB = 19  # offset of the command in a request, behind LUN, tag, task_attr, prio and crn
_SENSE = 12  # offset of the sense data in a response
_SIZES = slice(20, 28)  # sense_size and cdb_size in the configuration space
_TMF_SIZE = 24
_EVENTS = 1  # the number of the event queue (5.6.2)
_AN_RESPONSE = bytes(4) + bytes([ResponseCode.OK])  # none of the events asked for (5.6.6.2)


_DATA = CHANGES | READS
_SLOW = _DATA | FLUSHES  # where a disk is
_RESETS = (TaskFunction.I_T_NEXUS_RESET, TaskFunction.LOGICAL_UNIT_RESET)
_QUERIES = (TaskFunction.QUERY_TASK, TaskFunction.QUERY_TASK_SET)
_OF_ONE_TASK = (TaskFunction.ABORT_TASK, TaskFunction.QUERY_TASK)


class Task(NamedTuple):
    """A command that is held."""

    target: int
    lun: int
    tag: int


class ScsiDevice:
    """A host device for targets by number; a control queue, an event queue, request queues."""

    # QEMU 7.2 accepts CHANGE whether it is offered or not.
    features = int(ScsiFeature.HOTPLUG | ScsiFeature.CHANGE)

    def __init__(
        self, targets: Mapping[int, Target], queues: int, *, largest: tuple[int, int] | None = None
    ) -> None:
        """`largest` are the target and LUN that the driver may expect, if not those of today."""
        self._targets = dict(targets)
        today = max(targets), max(max(target.units) for target in targets.values())
        max_target, max_lun = largest or today
        self._start = ScsiConfig(num_queues=queues, max_target=max_target, max_lun=max_lun).encode()
        self._queues = queues
        self._well_known = ReportLuns(REPORT_LUNS_WLUN, self._addresses)
        self._held: Held[Task] = Held()
        self._events = EventQueue(_EVENTS)
        self.acked = 0
        self.settle: Callable[[], None] = lambda: None
        self.refault()
        self.reset()

    def refault(self) -> None:
        """Faults have changed: only where there are some, every command is looked at first."""
        units = [unit for target in self._targets.values() for unit in target.units.values()]
        request = self._admit if any(unit.faults.wait for unit in units) else self.request
        self.handlers: Sequence[Callable[[DeviceRing], int] | None] = [self.control, None] + [
            request
        ] * self._queues
        for unit in units:
            unit.refault()

    def reset(self) -> None:
        """Back to the sizes that a driver finds, and tell it that there was a reset."""
        self.config = self._start
        self._sense_size, self._cdb_size = SENSE_SIZE, CDB_SIZE
        self._good = Response().encode(SENSE_SIZE)
        self._events.reset()
        for target in self._targets.values():
            for unit in target.units.values():
                unit.reset()

    def use(self, rings: Mapping[int, DeviceRing]) -> None:
        """These rings are the ones to serve, by number."""
        self._events.ring = rings.get(_EVENTS)

    def drop(self, ring: DeviceRing) -> None:
        """The ring has stopped."""
        self._held.drop(ring)

    def tend(self) -> float:
        """Do what has waited for its time, or for an event buffer."""
        self._events.tend()
        return self._held.tend(self._perform)

    # Units that come and go.

    def units(self) -> list[tuple[int, int, LogicalUnit]]:
        """Target, LUN and unit of all that there are."""
        return [
            (number, lun, unit)
            for number, target in sorted(self._targets.items())
            for lun, unit in sorted(target.units.items())
        ]

    def _addresses(self) -> list[bytes]:
        return [encode_lun(number, lun) for number, lun, _ in self.units()]

    def unit(self, target: int, lun: int) -> LogicalUnit:
        """One of them; RequestError if it is not there."""
        try:
            return self._targets[target].units[lun]
        except KeyError:
            raise RequestError(f"there is no disk {target}:{lun}") from None

    def add(self, target: int, lun: int, store: Store) -> None:
        """A unit comes to be, of which its neighbours and the driver are told (5.6.6.3)."""
        units = self._targets.setdefault(target, Target({})).units
        if lun in units:
            raise RequestError(f"there is a disk {target}:{lun} already")
        for unit in units.values():
            unit.attend(LUNS_CHANGED)
        units[lun] = LogicalUnit(store)
        self.refault()
        self._hotplug(target, lun, ResetReason.RESCAN)

    def remove(self, target: int, lun: int) -> Store:
        """A unit goes; a target without units is none. The store is the caller's."""
        store = self.unit(target, lun).store
        units = self._targets[target].units
        del units[lun]
        if not units:
            del self._targets[target]
        for unit in units.values():
            unit.attend(LUNS_CHANGED)
        self.refault()
        self.resume(target, lun)
        self._hotplug(target, lun, ResetReason.REMOVED)
        return store

    def resize(self, target: int, lun: int, size: int) -> None:
        """A unit has another size, of which its initiator and the driver are told."""
        self.unit(target, lun).resize(size)
        if self.acked & ScsiFeature.CHANGE:
            code = CAPACITY_CHANGED.asc | CAPACITY_CHANGED.ascq << 8
            self._events.put(Event(EventType.PARAM_CHANGE, encode_lun(target, lun), code))

    def attention(self, target: int, lun: int, asc: int, ascq: int) -> None:
        """The next command for a unit is told of something."""
        self.unit(target, lun).attend_next(Sense(SenseKey.UNIT_ATTENTION, asc, ascq))

    def resume(self, target: int, lun: int) -> None:
        """Do the commands that were held while their unit hung."""
        self._held.release(lambda task: (task.target, task.lun) == (target, lun), self._perform)

    def forget(self) -> None:
        """Be as for a driver that comes new; what is pending is another's to hear."""
        for _, _, unit in self.units():
            unit.forget()

    def _hotplug(self, target: int, lun: int, reason: ResetReason) -> None:
        if self.acked & ScsiFeature.HOTPLUG:
            self._events.put(Event(EventType.TRANSPORT_RESET, encode_lun(target, lun), reason))

    # The driver's side.

    def set_config(self, offset: int, data: bytes) -> bool:
        """The sizes of sense data and commands can be written, in reason (5.6.4)."""
        changed = bytearray(self.config)
        changed[offset : offset + len(data)] = data
        others = bytearray(changed)
        others[_SIZES] = self.config[_SIZES]
        if others != self.config:
            return False
        sizes = ScsiConfig.decode(bytes(changed))
        if not 18 <= sizes.sense_size <= 252 or not 16 <= sizes.cdb_size <= 255:
            return False
        self.config = bytes(changed)
        self._sense_size, self._cdb_size = sizes.sense_size, sizes.cdb_size
        self._good = Response().encode(self._sense_size)
        return True

    def request(self, ring: DeviceRing) -> int:
        """A command (5.6.6.1)."""
        head, tail = _CDB + self._cdb_size, _SENSE + self._sense_size
        if ring.readable < head or ring.writable < tail:
            raise ProtocolError(
                f"SCSI request of {ring.readable} readable bytes and {ring.writable} writable, "
                f"want at least {head} and {tail}"
            )
        header = ring.gather(0, head)
        sent, room = ring.readable - head, ring.writable - tail
        target: Target | ReportLuns
        try:
            number, lun = decode_lun(header[:8])
            target = self._targets[number]
        except (ProtocolError, KeyError):
            if header[:8] != REPORT_LUNS_WLUN:
                return self._respond(ring, Response(response=ResponseCode.BAD_TARGET))
            target, lun = self._well_known, 0
        try:
            status, sense, taken, given = target.handle(
                lun, header[_CDB:], ring.readable_views(head, sent), ring.writable_views(tail, room)
            )
        except Overrun:
            return self._respond(ring, Response(response=ResponseCode.OVERRUN))
        residual = sent + room - taken - given
        if status or residual:
            self._respond(ring, Response(len(sense), residual, 0, status, sense=sense))
        else:
            ring.scatter(0, self._good)
        return tail + given

    def _respond(self, ring: DeviceRing, response: Response) -> int:
        return ring.scatter(0, response.encode(self._sense_size))

    def _admit(self, ring: DeviceRing) -> int:
        """A command while some units have faults: done, held, or answered in another way."""
        room = ring.writable - _SENSE - self._sense_size
        sent = ring.readable - _CDB - self._cdb_size
        if sent < 0 or room < 0:
            return self.request(ring)  # which says what is wrong
        header = ring.gather(0, _CDB + 1)
        try:
            target, lun = decode_lun(header[:8])
            faults = self.unit(target, lun).faults
        except (ProtocolError, RequestError):
            return self.request(ring)
        task = Task(target, lun, int.from_bytes(header[8:16], "little"))
        if faults.hang:
            self._held.keep(ring, task)
        if faults.busy:
            faults.busy -= 1
            return self._respond(ring, Response(residual=sent + room, status=Status.BUSY))
        if faults.delay and header[_CDB] in _SLOW:
            self._held.keep(ring, task, time.monotonic() + faults.delay)
        return self._perform(ring)

    def _perform(self, ring: DeviceRing) -> int:
        """A command that is let through, to fail or not."""
        header = ring.gather(0, _CDB + 1)
        try:
            faults = self.unit(*decode_lun(header[:8])).faults
        except (ProtocolError, RequestError):
            return self.request(ring)
        if header[_CDB:] and header[_CDB] in _DATA:
            faults.begin()
        try:
            return self.request(ring)
        finally:
            faults.failing = False

    def control(self, ring: DeviceRing) -> int:
        """A task management function, or a question about asynchronous notification (5.6.6.2)."""
        request = ring.gather(0, _TMF_SIZE)
        kind = int.from_bytes(request[:4], "little")
        if kind == ControlType.TMF and len(request) == _TMF_SIZE and ring.writable >= 1:
            return ring.scatter(0, bytes([self._manage(TaskManagement.decode(request))]))
        notification = (ControlType.AN_QUERY, ControlType.AN_SUBSCRIBE)
        if kind in notification and len(request) >= 16 and ring.writable >= len(_AN_RESPONSE):
            return ring.scatter(0, _AN_RESPONSE)
        raise ProtocolError(
            f"control request of type {kind}, {ring.readable} readable bytes, {ring.writable} writable"
        )

    def _manage(self, task: TaskManagement) -> ResponseCode:
        try:
            number, lun = decode_lun(task.lun)
            target = self._targets[number]
        except (ProtocolError, KeyError):
            return ResponseCode.BAD_TARGET
        if task.subtype == TaskFunction.I_T_NEXUS_RESET:
            units = list(target.units.values())
        elif lun in target.units:
            units = [target.units[lun]]
        else:
            return ResponseCode.INCORRECT_LUN
        if task.subtype == TaskFunction.CLEAR_ACA or task.subtype > TaskFunction.QUERY_TASK_SET:
            return ResponseCode.FUNCTION_REJECTED
        self.settle()  # whatever is available is done, or held
        if task.subtype in _QUERIES:
            found = any(self._concerns(task, held, number, lun) for held in self._held.tasks())
            return ResponseCode.FUNCTION_SUCCEEDED if found else ResponseCode.FUNCTION_COMPLETE
        reset = task.subtype in _RESETS
        end = Response(response=ResponseCode.RESET if reset else ResponseCode.ABORTED)
        self._held.release(
            lambda held: self._concerns(task, held, number, lun), lambda ring: self._respond(ring, end)
        )
        if reset:
            for unit in units:
                unit.reset()
        return ResponseCode.FUNCTION_COMPLETE

    @staticmethod
    def _concerns(task: TaskManagement, held: Task, target: int, lun: int) -> bool:
        """Whether a function is about a command (SAM-5, 7)."""
        if task.subtype == TaskFunction.I_T_NEXUS_RESET:
            return held.target == target
        return (held.target, held.lun) == (target, lun) and (
            task.subtype not in _OF_ONE_TASK or held.tag == task.tag
        )
