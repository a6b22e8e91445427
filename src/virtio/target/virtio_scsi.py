"""The virtio SCSI host device (5.6): framing around the commands of SCSI targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from virtio.errors import ProtocolError
from virtio.ring.device import DeviceRing
from virtio.target.scsi import Overrun, Target
from virtio.wire.virtio_scsi import (
    CDB_SIZE,
    SENSE_SIZE,
    ControlType,
    Response,
    ResponseCode,
    ScsiConfig,
    ScsiFeature,
    TaskFunction,
    TaskManagement,
    decode_lun,
)

_CDB = 19  # offset of the command in a request, behind LUN, tag, task_attr, prio and crn
_SENSE = 12  # offset of the sense data in a response
_SIZES = slice(20, 28)  # sense_size and cdb_size in the configuration space
_TMF_SIZE = 24
_AN_RESPONSE = bytes(4) + bytes([ResponseCode.OK])  # none of the events asked for (5.6.6.2)


class ScsiDevice:
    """A host device for targets by number; a control queue, an event queue, request queues."""

    # No event ever comes, but QEMU 7.2 accepts CHANGE whether it is offered or not.
    features = int(ScsiFeature.HOTPLUG | ScsiFeature.CHANGE)

    def __init__(self, targets: Mapping[int, Target], queues: int) -> None:
        self._targets = targets
        self._start = ScsiConfig(
            num_queues=queues,
            max_target=max(targets),
            max_lun=max(max(target.units) for target in targets.values()),
        ).encode()
        self.settle: Callable[[], None] = lambda: None
        self.handlers: Sequence[Callable[[DeviceRing], int] | None] = [self.control, None] + [
            self.request
        ] * queues
        self.reset()

    def reset(self) -> None:
        """Back to the sizes that a driver finds, and tell it that there was a reset."""
        self.config = self._start
        self._sense_size, self._cdb_size = SENSE_SIZE, CDB_SIZE
        self._good = Response().encode(SENSE_SIZE)
        for target in self._targets.values():
            for unit in target.units.values():
                unit.reset()

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
        try:
            number, lun = decode_lun(header[:8])
            target = self._targets[number]
        except (ProtocolError, KeyError):
            return self._respond(ring, Response(response=ResponseCode.BAD_TARGET))
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
        self.settle()  # no task is left that could be aborted, or be found
        if task.subtype in (TaskFunction.I_T_NEXUS_RESET, TaskFunction.LOGICAL_UNIT_RESET):
            for unit in units:
                unit.reset()
        return ResponseCode.FUNCTION_COMPLETE
