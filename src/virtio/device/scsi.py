"""virtio-scsi (5.6): the logical units of up to 256 targets."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator

from virtio.errors import ProtocolError, RequestTimeout
from virtio.ring.doorbell import Doorbell
from virtio.ring.lease import Lease, deadline_in
from virtio.transport.base import QueuePort
from virtio.wire.virtio_scsi import (
    CDB_SIZE,
    MAX_LUN,
    MAX_TARGET,
    SENSE_SIZE,
    Event,
    EventType,
    ResponseCode,
    ScsiConfig,
    ScsiFeature,
    TaskFunction,
    decode_lun,
    encode_lun,
)

from .base import MAX_TRANSFER, Device, weakly
from .dialogue import LAYOUT, Dialogue
from .disk import Disk
from .events import EventQueue, event_queue_bytes
from .kinds import looks_like, mistaken
from .probe import Conversation, T, Unit, list_units, probe_unit
from .recovery import CONTROL_LAYOUT, manage, recover
from .scsi_disk import block_size_problem, make_disk
from .scsi_errors import Doubt

log = logging.getLogger("virtio.scsi")

_CONTROL, _EVENTS = 0, 1  # the queues before the request queues (5.6.2)
_NO_PORT = QueuePort(Doorbell(), -1)


class ScsiDevice(Device):
    """A virtio-scsi host device: its units found, followed as they come, change and go, and recovered.

    `units` has every unit that answered, by target and LUN, with what was wrong with it.
    """

    FEATURES = ScsiFeature
    WANTED = ScsiFeature.HOTPLUG | ScsiFeature.CHANGE
    FIXED_QUEUES = 2
    LAYOUT = LAYOUT

    config: ScsiConfig
    _control: Lease
    _events: EventQueue | None = None
    _event_port: QueuePort

    def _configure(self) -> None:
        transport = self.transport
        if transport.has_config:
            payload = transport.read_config(ScsiConfig.FORMAT.size, ScsiConfig.FIELDS)
            self.config = ScsiConfig.decode(payload)
        else:
            # Without MQ the number of queues is known beforehand: one for requests.
            queues = 1 if transport.max_queues is None else transport.max_queues - self.FIXED_QUEUES
            self.config = ScsiConfig(num_queues=queues)
        config = self.config
        if (config.sense_size, config.cdb_size) != (SENSE_SIZE, CDB_SIZE):
            if looks_like(transport.offered()) == "blk":
                raise ProtocolError(mistaken(transport.address, "blk"))
            raise ProtocolError(
                f"{transport.address} has sense_size {config.sense_size} and cdb_size "
                f"{config.cdb_size} after a reset, want {SENSE_SIZE} and {CDB_SIZE}"
            )
        # A unit takes so many commands over all queues: each queue needs one at least (5.6.4).
        self.num_queues = min(config.num_queues, max(1, config.cmd_per_lun))
        self._limit_segments(config.seg_max or 1, MAX_TRANSFER)
        self.units: dict[tuple[int, int], Unit] = {}
        self._disks: dict[tuple[int, int], Disk] = {}
        self._finding = threading.Lock()  # held while these two change

    # Queues.

    def _set_up_fixed(self, index: int) -> None:
        if index == _CONTROL:
            self._control = self._request_queue(index, CONTROL_LAYOUT, 1, 1)
            return
        size, nbytes = self._fitting(index), self.config.event_info_size
        memory = self.pool.take(event_queue_bytes(size, nbytes, self._form))
        self._events = EventQueue(
            memory,
            self._mapping,
            size,
            nbytes,
            self.life,
            event_idx=self._event_idx,
            form=self._form,
        )
        self._event_port = self._connect(index, size, memory)

    def _set_up_requests(self, index: int) -> Lease:
        lease = super()._set_up_requests(index)
        lease.late = weakly(self._late)
        return lease

    def _wants_spare(self, count: int) -> bool:
        known = self.transport.max_queues is not None
        return known and self.available > count and self.config.cmd_per_lun > count

    def depth_on(self, queues: int) -> int:
        """What a unit takes of all queues is shared by them: the driver's own command is one more."""
        total = self.config.cmd_per_lun - self._wants_spare(queues)
        return max(1, total // queues)

    def close(self) -> None:
        with contextlib.ExitStack() as steps:
            if self._events is not None:
                steps.callback(self._events.detach)
                self._events.silence()
            super().close()
            self._event_port = _NO_PORT  # the doorbell may be memory of the device

    # Which units there are.

    def discover(self, deadline: int | None) -> list[Disk]:
        """Ask every target for its units, many at once."""
        lease = self.spare or self.leases[0]
        with lease:
            self._find(lease, self._targets, deadline)
        return self._in_order()

    def follow(self) -> None:
        assert self._events is not None
        self._events.listen(self._event_port, weakly(self._happened))
        super().follow()

    @property
    def _targets(self) -> range:
        """Every target that there may be and that can be addressed."""
        return range(min(self.config.max_target, MAX_TARGET) + 1)

    def _in_order(self) -> list[Disk]:
        return [self._disks[at] for at in sorted(self._disks)]

    def _find(self, lease: Lease, targets: Iterable[int], deadline: int | None) -> None:
        """Make `units` and the disks of these targets what they are now."""
        max_lun = min(self.config.max_lun, MAX_LUN)
        asked = list(targets)
        lists = self._ask(lease, [(target, list_units(target, max_lun)) for target in asked], deadline)
        there = [
            (target, lun)
            for target, luns in zip(asked, lists, strict=True)
            for lun in (self._known(target) or [0] if luns is None else luns)
        ]
        units = self._ask(lease, [(target, probe_unit(lun)) for target, lun in there], deadline)
        found = {at: unit for at, unit in zip(there, units, strict=True) if unit is not None}
        for at in [at for at in self.units if at[0] in asked and at not in found]:
            self._forget(at)
        for at, unit in found.items():
            self._learn(at, unit)

    def _ask(
        self, lease: Lease, conversations: list[tuple[int, Conversation[T]]], deadline: int | None
    ) -> list[T]:
        dialogue = Dialogue[T](lease, self.pool, deadline)
        try:
            return dialogue.run(conversations)
        finally:
            if dialogue.dead:
                self._late(lease)

    def _learn(self, at: tuple[int, int], unit: Unit) -> None:
        """What is at a target and LUN now; a disk that is only not ready stays what it was."""
        before = self.units.get(at)
        target, lun = at
        problem = unit.problem
        if not problem and unit.capacity is not None:
            problem = block_size_problem(unit.capacity.block_size, self.config.max_sectors)
        same = unit.silent or (before is not None and before.inquiry == unit.inquiry)
        if problem and at in self._disks and same:
            log.warning("target %d LUN %d: %s", target, lun, problem)
            return
        self.units[at] = unit
        if problem:
            log.warning("target %d LUN %d is not attached: %s", target, lun, problem)
            self._disks.pop(at, None)
        elif unit != before or at not in self._disks:
            doubted = functools.partial(weakly(self._doubted), at)
            depth = self.depth_on(len(self.leases))
            self._disks[at] = make_disk(target, unit, self.config, depth, self.most_bytes, doubted)

    def _known(self, target: int) -> list[int]:
        return [lun for number, lun in self.units if number == target]

    def _forget(self, at: tuple[int, int]) -> None:
        self.units.pop(at, None)
        self._disks.pop(at, None)

    # What happens to them.

    def _doubted(self, at: tuple[int, int], doubt: Doubt) -> None:
        """A response has made doubtful what we know of a unit, or of its target."""
        if doubt is Doubt.UNIT:
            self.chores.add(("unit", at), functools.partial(self._revalidate, at))
        else:
            self._rescan_soon([at[0]])

    def _happened(self, event: Event | None) -> None:
        """An event of the device (5.6.6.3); those that cannot be told apart mean: look at all."""
        kind = None if event is None else event.type
        if event is None or event.missed:
            self._rescan_soon(self._targets)
            return
        if kind == EventType.NO_EVENT:
            return
        try:
            target, lun = decode_lun(event.lun)
        except ProtocolError:
            self._rescan_soon(self._targets)
            return
        if kind == EventType.PARAM_CHANGE and (target, lun) in self.units:
            at = target, lun
            self.chores.add(("unit", at), functools.partial(self._revalidate, at))
        elif target in self._targets:
            self._rescan_soon([target])

    def _rescan_soon(self, targets: Iterable[int]) -> None:
        asked = list(targets)
        key: object = asked[0] if len(asked) == 1 else None
        self.chores.add(("rescan", key), functools.partial(self.rescan, asked))

    def rescan(self, targets: Iterable[int] | None = None) -> None:
        """Look for the units of these targets, or of all, again; `report` is told."""
        asked = self._targets if targets is None else targets
        with self._own_queue() as (lease, deadline):
            self._find(lease, asked, deadline)
            self.report(self._in_order())

    def _revalidate(self, at: tuple[int, int]) -> None:
        """Ask one unit again what it is, and tell."""
        with self._own_queue() as (lease, deadline):
            (unit,) = self._ask(lease, [(at[0], probe_unit(at[1]))], deadline)
            if unit is None:
                self._forget(at)
            else:
                self._learn(at, unit)
            self.report(self._in_order())

    @contextlib.contextmanager
    def _own_queue(self) -> Iterator[tuple[Lease, int | None]]:
        """The spare queue, or that of a caller between two of his calls; and until when."""
        lease, deadline = self.spare or self.leases[0], deadline_in(self.transport.timeout)
        with self._finding, lease.borrow(deadline):
            yield lease, deadline

    # Requests that do not come back.

    def _late(self, lease: Lease) -> None:
        self.chores.add(("recover", lease.completion_fd), functools.partial(self._recover, lease))

    def _recover(self, lease: Lease) -> None:
        if not recover(lease, self._control, self.transport.timeout):
            log.error(
                "%s keeps %d requests, which no abort and no reset of units and targets has brought back: "
                "resetting the device",
                self.transport.address,
                lease.queue.orphans,
            )
            self.restart()

    def _rewind(self) -> None:
        assert self._events is not None
        self._events.silence()
        self._events.rewind()
        super()._rewind()

    def _begin_again(self, *, mapped: bool = True) -> None:
        assert self._events is not None
        super()._begin_again(mapped=mapped)
        self._events.listen(self._event_port, weakly(self._happened))

    def revalidate(self) -> None:
        self._rescan_soon(self._targets)

    def reset(self, place: str) -> None:
        """Reset the logical unit, or the device where it does not take that."""
        at = next(at for at, disk in self._disks.items() if disk.place == place)
        try:
            code = self.manage(TaskFunction.LOGICAL_UNIT_RESET, *at)
        except RequestTimeout:
            code = -1
        if code not in (ResponseCode.FUNCTION_COMPLETE, ResponseCode.FUNCTION_SUCCEEDED):
            log.info("%s does not reset %s (%d): resetting all of it", self.transport.address, place, code)
            self.restart()

    def manage(self, function: int, target: int, lun: int, tag: int = 0) -> int:
        """Ask for a task management function (a TaskFunction): the ResponseCode that came.

        RequestTimeout if none comes: some targets never answer.
        """
        return manage(self._control, function, encode_lun(target, lun), tag, self.transport.timeout)

    def __repr__(self) -> str:
        return f"<ScsiDevice {self.transport.address}, {len(self.leases)} request queues>"
