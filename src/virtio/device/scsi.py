"""virtio-scsi (5.6): the logical units of up to 256 targets."""

from __future__ import annotations

import enum
import errno
import logging
from collections import deque

from virtio.errors import DeviceError, ProtocolError
from virtio.ring.buffer import Buffer
from virtio.ring.requests import (
    FROM_DEVICE,
    NBYTES,
    NO_DATA,
    OFFSET,
    TAG,
    TO_DEVICE,
    Finished,
    Layout,
    Patch,
    Template,
)
from virtio.wire import scsi
from virtio.wire.blk import BlkFeature
from virtio.wire.sense import Sense, SenseKey
from virtio.wire.virtio import feature_names
from virtio.wire.virtio_scsi import (
    CDB_SIZE,
    SENSE_SIZE,
    RequestHeader,
    Response,
    ResponseCode,
    ScsiConfig,
    ScsiFeature,
    encode_lun,
)

from .base import DEVICE_BITS, MAX_TRANSFER, Device
from .disk import Disk, Limits
from .probe import REPLY_BYTES, Command, Conversation, Reply, Unit, probe_target

log = logging.getLogger("virtio.scsi")

_UNMAP_BYTES = 24  # UNMAP's parameters for one range (SBC-3, 5.28)
_CDB_AT = 19  # where the command begins in a request (5.6.6.1)
_TAG = Patch(TAG, 8, 8)
_RESULT_AT = 4  # residual, status qualifier, status and response: 0 when all is well
_RESULT_MASK = 0xFFFF_0000_FFFF_FFFF  # but for the qualifier, which SPDK's target leaves unwritten
_UNWRITTEN = _RESULT_MASK
_NOT_SCSI = DEVICE_BITS & ~0xF  # those that virtio-scsi has no names for
_AT_ONCE = 32  # conversations under way during discovery
_ANY_BLOCKS = 1 << 22  # of one UNMAP or WRITE SAME, where the unit sets no limit: no long silences
_SECTOR = 512  # the unit of max_sectors

# What an answer means: the nearest errno, and whether the same request may be sent again: where nothing
# was done, or doing it twice does no harm (SAM-5, 5.3 and 5.14; virtio 5.6.6.1). All else is EIO, and final.
_BY_KEY: dict[int, tuple[int, bool]] = {
    SenseKey.NOT_READY: (errno.ENXIO, False),
    SenseKey.ILLEGAL_REQUEST: (errno.EINVAL, False),
    SenseKey.UNIT_ATTENTION: (errno.EAGAIN, True),
    SenseKey.DATA_PROTECT: (errno.EROFS, False),
    SenseKey.ABORTED_COMMAND: (errno.ECANCELED, True),
    SenseKey.MISCOMPARE: (errno.EILSEQ, False),
}
# By additional sense code: an operation that the unit does not know, a unit that is not there.
_BY_CODE = {0x20: errno.EOPNOTSUPP, 0x25: errno.ENODEV}
_BY_STATUS: dict[int, tuple[int, bool]] = {
    scsi.Status.BUSY: (errno.EBUSY, True),
    scsi.Status.TASK_SET_FULL: (errno.EBUSY, True),
    scsi.Status.RESERVATION_CONFLICT: (errno.EBUSY, False),
    scsi.Status.TASK_ABORTED: (errno.ECANCELED, False),
}
_BY_RESPONSE: dict[int, tuple[int, bool]] = {
    ResponseCode.BAD_TARGET: (errno.ENODEV, False),
    ResponseCode.INCORRECT_LUN: (errno.ENODEV, False),
    ResponseCode.BUSY: (errno.EBUSY, True),
    ResponseCode.RESET: (errno.ECANCELED, False),
    ResponseCode.ABORTED: (errno.ECANCELED, False),
}


class ScsiDevice(Device):
    """A virtio-scsi host device; its control and event queues are set up, and idle so far."""

    FEATURES = ScsiFeature
    WANTED = 0
    FIXED_QUEUES = 2  # control and event queue (5.6.2)
    LAYOUT = Layout(
        request=_CDB_AT + CDB_SIZE,
        payload=_UNMAP_BYTES,
        response=12 + SENSE_SIZE,
        result_offset=_RESULT_AT,
        result_mask=_RESULT_MASK,
        response_first=True,
    )

    config: ScsiConfig

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
            raise ProtocolError(
                f"{transport.address} has sense_size {config.sense_size} and cdb_size "
                f"{config.cdb_size} after a reset, want {SENSE_SIZE} and {CDB_SIZE}" + self._guess()
            )
        self.num_queues = config.num_queues
        self._limit_segments(1, MAX_TRANSFER)
        self.units: dict[tuple[int, int], Unit] = {}

    def _guess(self) -> str:
        """What an error may add when the features are rather those of virtio-blk."""
        offered = self.transport.offered() & DEVICE_BITS
        if not offered & _NOT_SCSI:
            return ""
        names = ", ".join(feature_names(offered, BlkFeature))
        return f"; it offers {names}: looks like virtio-blk; add --dev-type blk"

    def discover(self, deadline: int | None) -> list[Disk]:
        """Ask every target for its units, many at once; `units` has all that answered."""
        targets = range(self.config.max_target + 1)
        found = self._converse({target: probe_target(self.config.max_lun) for target in targets}, deadline)
        disks = []
        for target in targets:
            for unit in found[target]:
                self.units[target, unit.lun] = unit
                if unit.problem:
                    log.warning("target %d LUN %d: %s", target, unit.lun, unit.problem)
                elif (disk := self._disk(target, unit)) is not None:
                    disks.append(disk)
        return disks

    def _converse(
        self, conversations: dict[int, Conversation[list[Unit]]], deadline: int | None
    ) -> dict[int, list[Unit]]:
        """Drive a conversation with each target to its end; the units each ends with."""
        lease = self.leases[0]
        results: dict[int, list[Unit]] = {}
        waiting = deque(sorted(conversations))
        width = min(_AT_ONCE, lease.queue.slots)
        with lease, self.pool.take(width * REPLY_BYTES) as buffer, lease.holding(buffer):
            places = list(range(width))
            active: dict[int, tuple[int, Command]] = {}  # by place: target and its command
            while waiting or active:
                while waiting and places:
                    target, place = waiting.popleft(), places.pop()
                    command = next(conversations[target])
                    self._send(target, command, buffer, place)
                    active[place] = target, command
                lease.queue.kick()
                for finished in lease.gather(1, deadline):
                    place = finished.token
                    target, command = active.pop(place)
                    reply = _reply(finished, buffer, place, command.nbytes)
                    try:
                        command = conversations[target].send(reply)
                    except StopIteration as end:
                        results[target] = end.value
                        places.append(place)
                    else:
                        self._send(target, command, buffer, place)
                        active[place] = target, command
        return results

    def _send(self, target: int, command: Command, buffer: Buffer, place: int) -> None:
        template = _template(target, command.lun, command.cdb, FROM_DEVICE if command.nbytes else NO_DATA)
        start = place * REPLY_BYTES
        buffer.view()[start : start + command.nbytes] = bytes(command.nbytes)
        sent = self.leases[0].queue.submit(template, 0, command.nbytes, buffer.offset + start, place)
        assert sent, "as many places as slots"

    def _disk(self, target: int, unit: Unit) -> Disk | None:
        assert unit.capacity is not None
        block, blocks = unit.capacity.block_size, unit.capacity.blocks
        if block % _SECTOR or block & (block - 1) or block > MAX_TRANSFER:
            log.warning("target %d LUN %d: blocks of %d bytes", target, unit.lun, block)
            return None
        config, lun, shift = self.config, unit.lun, block.bit_length() - 1
        limit = min(MAX_TRANSFER, config.max_sectors * _SECTOR or MAX_TRANSFER)
        wide = unit.wide and blocks > 1 << 32
        if not wide:
            limit = min(limit, 0xFFFF * block)
        read, write = (scsi.read_16, scsi.write_16) if wide else (scsi.read_10, scsi.write_10)
        thin = unit.capacity.lbpme and unit.provisioning.lbpu
        max_unmap = min(unit.limits.max_unmap or _ANY_BLOCKS, _ANY_BLOCKS) if thin else 0
        reads_zeroes = unit.capacity.lbprz or unit.provisioning.lbprz
        same = unit.wide and (unit.limits.max_write_same or unit.provisioning.lbpws)
        max_same = min(unit.limits.max_write_same or _ANY_BLOCKS, _ANY_BLOCKS) if same else 0
        if unit.limits.max_transfer:
            limit = min(limit, unit.limits.max_transfer * block)
        lba, length = _CDB_AT + 2, _CDB_AT + (10 if wide else 7)
        patches = [
            _TAG,
            Patch(OFFSET, lba, 8 if wide else 4, big_endian=True, shift=shift),
            Patch(NBYTES, length, 4 if wide else 2, big_endian=True, shift=shift),
        ]
        return Disk(
            place=f"t{target}" + (f"l{lun}" if lun else ""),
            product="Virtio SCSI Disk",
            serial=unit.serial,
            size=blocks * block,
            block_size=block,
            read_only=unit.mode.write_protected,
            limits=Limits(
                max_transfer=limit // block * block,
                max_unmap=max_unmap * block,
                unmap_alignment=unit.limits.unmap_granularity * block,
                max_write_zeroes=max_same * block,
                depth=max(1, config.cmd_per_lun // len(self.leases)),
            ),
            read=_template(target, lun, read(0, 0), FROM_DEVICE, patches),
            write=_template(target, lun, write(0, 0), TO_DEVICE, patches),
            write_fua=_template(target, lun, write(0, 0, fua=True), TO_DEVICE, patches)
            if unit.mode.dpofua
            else None,
            # SPDK's target fails SYNCHRONIZE CACHE where it has said that there is no cache.
            flush=None
            if unit.mode.write_cache is False
            else _template(target, lun, scsi.synchronize_cache_10(), NO_DATA),
            unmap=_unmap(target, lun, shift) if max_unmap else None,
            write_zeroes=_write_same(target, lun, shift, False) if max_same else None,
            write_zeroes_unmap=_write_same(target, lun, shift, unit.provisioning.lbpws and reads_zeroes)
            if max_same
            else None,
            explain=_explain,
        )

    def __repr__(self) -> str:
        return f"<ScsiDevice {self.transport.address}, {len(self.leases)} request queues>"


def _template(
    target: int,
    lun: int,
    cdb: bytes,
    direction: int,
    patches: list[Patch] | tuple[Patch, ...] = (_TAG,),
) -> Template:
    header = RequestHeader(encode_lun(target, lun), 0, cdb=cdb).encode()
    return Template(header, direction=direction, patches=patches)


def _unmap(target: int, lun: int, shift: int) -> Template:
    """UNMAP of one range."""
    header = RequestHeader(encode_lun(target, lun), 0, cdb=scsi.unmap(_UNMAP_BYTES)).encode()
    first = len(header) + _UNMAP_BYTES - 16  # block, number of blocks, four reserved bytes
    return Template(
        header,
        payload=scsi.unmap_parameters([(0, 0)]),
        patches=[
            _TAG,
            Patch(OFFSET, first, 8, big_endian=True, shift=shift),
            Patch(NBYTES, first + 8, 4, big_endian=True, shift=shift),
        ],
    )


def _write_same(target: int, lun: int, shift: int, unmap: bool) -> Template:
    """WRITE SAME(16) of one block of zeros, which the caller provides."""
    cdb = scsi.write_same_16(0, 0, unmap=unmap)
    return Template(
        RequestHeader(encode_lun(target, lun), 0, cdb=cdb).encode(),
        direction=TO_DEVICE,
        data_bytes=1 << shift,
        patches=[
            _TAG,
            Patch(OFFSET, _CDB_AT + 2, 8, big_endian=True, shift=shift),
            Patch(NBYTES, _CDB_AT + 10, 4, big_endian=True, shift=shift),
        ],
    )


def _reply(finished: Finished, buffer: Buffer, place: int, nbytes: int) -> Reply:
    if finished.result == _UNWRITTEN:
        return Reply(ResponseCode.FAILURE, 0, b"", b"")
    response = Response.decode(finished.response)
    start = place * REPLY_BYTES
    came = max(0, nbytes - response.residual)
    data = bytes(buffer.view()[start : start + came])
    return Reply(response.response, response.status, response.sense, data)


def _explain(finished: Finished, offset: int, transfer: bool) -> DeviceError | None:
    """The error behind a response that is not all zero where it should be; None if it is none."""
    if finished.result == _UNWRITTEN:
        words = "the device completed the request without writing a response"
        return DeviceError(errno.EIO, words, offset=offset)
    response = Response.decode(finished.response)
    code, transient, sense = errno.EIO, False, b""
    if response.response != ResponseCode.OK:
        code, transient = _BY_RESPONSE.get(response.response, (code, transient))
        words = f"virtio-scsi response {_name(ResponseCode, response.response)}"
    elif response.status == scsi.Status.CHECK_CONDITION:
        sense = response.sense
        decoded = Sense.decode(sense)
        code, transient = _BY_KEY.get(decoded.key, (code, transient))
        code = _BY_CODE.get(decoded.asc, code)
        words = decoded.describe()
    elif response.status != scsi.Status.GOOD:
        code, transient = _BY_STATUS.get(response.status, (code, transient))
        words = f"SCSI status {_name(scsi.Status, response.status)}"
    elif not transfer:
        return None  # what SPDK's target has not counted of the parameters of an UNMAP
    else:
        words = f"the device moved {response.residual} bytes less than asked for"
    return DeviceError(code, words, offset=offset, status=response.status, sense=sense, transient=transient)


def _name(numbers: type[enum.IntEnum], value: int) -> str:
    try:
        return numbers(value).name
    except ValueError:
        return f"{value:#x}"
