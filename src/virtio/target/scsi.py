"""SCSI targets with direct-access logical units (SAM-5, SPC-4, SBC-3); knows no virtio.

Commands come as bytes and data as buffers, to be filled or read in place; every command is done
when `handle` returns. One module, as the commands share their checks and sense data.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from virtio.errors import ProtocolError, RequestError
from virtio.target.store import Store, join, part
from virtio.wire.scsi import (
    ALL_PAGES,
    CACHING_PAGE,
    READ_CAPACITY_16,
    BlockLimits,
    Capacity,
    Designator,
    DesignatorType,
    Inquiry,
    LogicalBlockProvisioning,
    ModeParameters,
    OpCode,
    Page,
    Sense,
    SenseKey,
    Status,
    decode_unmap_parameters,
    encode_designators,
    encode_lun,
    encode_page,
    encode_report_luns,
    encode_serial,
    encode_supported_pages,
)

Views: TypeAlias = Sequence[memoryview]

_CONTROL_PAGE = 0x0A  # a mode page (SPC-4, 7.5.8)
_CHARACTERISTICS = 0xB1  # a page of vital product data (SBC-3, 6.6.2)
_FUA, _ANCHOR, _UNMAP, _NDOB = 0x08, 0x10, 0x08, 0x01  # in the second byte of a command
_PROTECT, _BYTCHK = 0xE0, 0x06
_TRANSFER_MAX = 0xFFFF * 512  # bytes in one command: max_sectors of virtio's configuration
_ZERO_MAX = 1 << 31  # bytes in one UNMAP range or WRITE SAME
_RANGES_MAX = 256  # in one UNMAP
_CHUNK = 1 << 20  # of a WRITE SAME
_COMPARE_BLOCKS, _COMPARE_BYTES = 255, 1 << 20  # in one COMPARE AND WRITE, whose length has eight bits
_NAA_LOCAL = 0x3  # locally assigned (SPC-4, 7.8.6.6): the first four of 64 bits
_WELL_KNOWN_TYPE = 0x1E
_ATTENTIONS_MAX = 16  # that one unit keeps

_NAMES = ("VIRTIO", "bdev target", "1")
_DISK = Inquiry(0x00, 0, False, 6, *_NAMES).encode()
_NOTHING = Inquiry(0x1F, 3, False, 6, *_NAMES).encode()  # no unit, nor could there be
_WELL_KNOWN = Inquiry(_WELL_KNOWN_TYPE, 0, False, 6, *_NAMES).encode()

_ILLEGAL = SenseKey.ILLEGAL_REQUEST
_BAD_OPCODE = Sense(_ILLEGAL, 0x20, 0x00)  # INVALID COMMAND OPERATION CODE
_BAD_LBA = Sense(_ILLEGAL, 0x21, 0x00)  # LOGICAL BLOCK ADDRESS OUT OF RANGE
_BAD_FIELD = Sense(_ILLEGAL, 0x24, 0x00)  # INVALID FIELD IN CDB
_NO_UNIT = Sense(_ILLEGAL, 0x25, 0x00)  # LOGICAL UNIT NOT SUPPORTED
_BAD_PARAMETER = Sense(_ILLEGAL, 0x26, 0x00)  # INVALID FIELD IN PARAMETER LIST
_BAD_LENGTH = Sense(_ILLEGAL, 0x1A, 0x00)  # PARAMETER LIST LENGTH ERROR
_NOT_SAVED = Sense(_ILLEGAL, 0x39, 0x00)  # SAVING PARAMETERS NOT SUPPORTED
_PROTECTED = Sense(SenseKey.DATA_PROTECT, 0x27, 0x00)  # WRITE PROTECTED
_NO_SPACE = Sense(SenseKey.DATA_PROTECT, 0x27, 0x07)  # SPACE ALLOCATION FAILED WRITE PROTECT
_POWER_ON = Sense(SenseKey.UNIT_ATTENTION, 0x29, 0x00)  # POWER ON, RESET, ... OCCURRED
LUNS_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x3F, 0x0E)  # REPORTED LUNS DATA HAS CHANGED
CAPACITY_CHANGED = Sense(SenseKey.UNIT_ATTENTION, 0x2A, 0x09)  # CAPACITY DATA HAS CHANGED
_COVERED = (LUNS_CHANGED, CAPACITY_CHANGED)  # by a reset, after which all is looked at (SAM-5, 5.14)
_QUIET = (OpCode.INQUIRY, OpCode.REQUEST_SENSE)  # with REPORT LUNS: no unit attention (SAM-5, 5.14)


# Commands that touch the medium: for those that fail or are slow on purpose.
CHANGES = frozenset(
    (
        *(OpCode.WRITE_6, OpCode.WRITE_10, OpCode.WRITE_12, OpCode.WRITE_16),
        *(OpCode.UNMAP, OpCode.WRITE_SAME_10, OpCode.WRITE_SAME_16, OpCode.COMPARE_AND_WRITE),
    )
)
READS = frozenset((OpCode.READ_6, OpCode.READ_10, OpCode.READ_12, OpCode.READ_16))
FLUSHES = frozenset((OpCode.SYNCHRONIZE_CACHE_10, OpCode.SYNCHRONIZE_CACHE_16))


class Overrun(Exception):
    """The command needs more data than came with it, or has no room for its answer."""


class Reply(NamedTuple):
    """How a command ended: SAM status, sense data, and the bytes used of both buffers."""

    status: int
    sense: bytes
    taken: int
    given: int


class _Check(Exception):
    """CHECK CONDITION."""

    def __init__(self, sense: Sense) -> None:
        self.sense = sense


class Transfer:
    """The data-out and data-in buffers of one command, and how much of each was used."""

    def __init__(self, out: Views, into: Views) -> None:
        self._out, self._into = out, into
        self.taken = self.given = 0

    def source(self, nbytes: int) -> Views:
        """The first `nbytes` of what the initiator sent, in place."""
        self.taken = nbytes
        return _first(self._out, nbytes)

    def sink(self, nbytes: int) -> Views:
        """Room for `nbytes`, to be filled in place."""
        views = _first(self._into, nbytes)
        self.given = nbytes
        return views

    def take(self, nbytes: int) -> bytes:
        """A copy of the first `nbytes` of what the initiator sent, which may change it any time."""
        return b"".join(self.source(nbytes))

    def give(self, data: bytes, allocation: int) -> None:
        """Answer with as much of `data` as the command allocated room for (SPC-4, 4.2.5.6)."""
        data = data[:allocation]
        done = 0
        for view in self.sink(len(data)):
            view[:] = data[done : done + len(view)]
            done += len(view)


class LogicalUnit:
    """A disk over one store."""

    def __init__(self, store: Store) -> None:
        bare, self.faults = part(store)
        self._store = join(bare, self.faults)
        self._blocks = store.size // store.block_size
        self._attentions = [_POWER_ON]  # what the next commands are told, one each
        self._commands: dict[int, Callable[[bytes, Transfer], None]] = {
            OpCode.TEST_UNIT_READY: lambda cdb, transfer: None,
            OpCode.START_STOP_UNIT: lambda cdb, transfer: None,
            OpCode.REQUEST_SENSE: self._request_sense,
            OpCode.INQUIRY: self._inquiry,
            OpCode.MODE_SENSE_6: self._mode_sense_6,
            OpCode.MODE_SENSE_10: self._mode_sense_10,
            OpCode.READ_CAPACITY_10: self._read_capacity_10,
            OpCode.SERVICE_ACTION_IN_16: self._read_capacity_16,
            OpCode.READ_6: self._read,
            OpCode.READ_10: self._read,
            OpCode.READ_12: self._read,
            OpCode.READ_16: self._read,
            OpCode.WRITE_6: self._write,
            OpCode.WRITE_10: self._write,
            OpCode.WRITE_12: self._write,
            OpCode.WRITE_16: self._write,
            OpCode.VERIFY_10: self._verify,
            OpCode.VERIFY_16: self._verify,
            OpCode.SYNCHRONIZE_CACHE_10: self._synchronize_cache,
            OpCode.SYNCHRONIZE_CACHE_16: self._synchronize_cache,
            OpCode.UNMAP: self._unmap,
            OpCode.WRITE_SAME_10: self._write_same,
            OpCode.WRITE_SAME_16: self._write_same,
            OpCode.COMPARE_AND_WRITE: self._compare_and_write,
        }

    @property
    def store(self) -> Store:
        """Where its data are."""
        return self._store

    def reset(self) -> None:
        """A reset happened: the next command is told so, which covers what else has changed."""
        others = [one for one in self._attentions if one not in (_POWER_ON, *_COVERED)]
        self._attentions = [_POWER_ON, *others]

    def attend(self, sense: Sense) -> None:
        """One of the next commands is told so, unless there will be word of a reset."""
        if sense not in self._attentions and _POWER_ON not in self._attentions:
            self._attentions.append(sense)

    def attend_next(self, sense: Sense) -> None:
        """The very next command is told so."""
        if len(self._attentions) >= _ATTENTIONS_MAX:
            raise RequestError(f"{len(self._attentions)} unit attentions wait already")
        self._attentions.insert(0, sense)

    def settle(self, sense: Sense) -> None:
        """Nobody need be told so any more."""
        self._attentions = [one for one in self._attentions if one != sense]

    def forget(self) -> None:
        """Be as for an initiator that comes new; what is pending is another's to hear."""
        self._attentions = [_POWER_ON]
        self.faults.busy = 0

    def resize(self, size: int) -> None:
        """Be `size` bytes long, and say so."""
        self._store.resize(size)
        self._blocks = size // self._store.block_size
        self.attend(CAPACITY_CHANGED)

    def refault(self) -> None:
        """`faults` has changed."""
        self._store = join(part(self._store)[0], self.faults)

    def execute(self, cdb: bytes, transfer: Transfer) -> None:
        """Do one command; raises what ends it otherwise than GOOD."""
        if self._attentions and cdb[0] not in _QUIET:
            raise _Check(self._attentions.pop(0))
        command = self._commands.get(cdb[0])
        if command is None:
            raise _Check(_BAD_OPCODE)
        command(cdb, transfer)

    def _request_sense(self, cdb: bytes, transfer: Transfer) -> None:
        if cdb[1] & 1:  # descriptor format
            raise _Check(_BAD_FIELD)
        sense = self._attentions[0] if self._attentions else Sense(SenseKey.NO_SENSE)
        transfer.give(sense.encode_fixed(), cdb[4])
        del self._attentions[:1]  # now that there was room for it

    def _inquiry(self, cdb: bytes, transfer: Transfer) -> None:
        vital, number, allocation = cdb[1] & 1, cdb[2], int.from_bytes(cdb[3:5], "big")
        if not vital:
            if number:
                raise _Check(_BAD_FIELD)
            transfer.give(_DISK, allocation)
            return
        pages = self._pages()
        if number not in pages:
            raise _Check(_BAD_FIELD)
        transfer.give(pages[number], allocation)

    def _pages(self) -> dict[int, bytes]:
        """The vital product data (SPC-4, 7.8; SBC-3, 6.6)."""
        block_size, serial = self._store.block_size, self._store.serial
        granule = max(1, 4096 // block_size)
        names = [
            Designator(DesignatorType.T10_VENDOR_ID, 0, 2, b"VIRTIO  " + serial.encode()),
            Designator(DesignatorType.NAA, 0, 1, _naa(serial)),
        ]
        pages = {
            Page.SERIAL_NUMBER: encode_serial(serial),
            Page.DEVICE_IDENTIFICATION: encode_designators(names),
            Page.BLOCK_LIMITS: BlockLimits(
                wsnz=True,
                max_compare_and_write=_compare_most(block_size),
                max_transfer=_TRANSFER_MAX // block_size,
                max_unmap=_ZERO_MAX // block_size,
                max_unmap_descriptors=_RANGES_MAX,
                unmap_granularity=granule,
                max_write_same=_ZERO_MAX // block_size,
            ).encode(),
            _CHARACTERISTICS: encode_page(_CHARACTERISTICS, struct.pack(">H58x", 1)),  # no rotation
            Page.LOGICAL_BLOCK_PROVISIONING: LogicalBlockProvisioning(
                lbpu=True, lbpws=True, lbpws10=True, lbprz=True, type=2
            ).encode(),
        }
        return {Page.SUPPORTED_PAGES: encode_supported_pages([0, *pages]), **pages}

    def _mode_sense_6(self, cdb: bytes, transfer: Transfer) -> None:
        transfer.give(self._mode(cdb).encode_6(), cdb[4])

    def _mode_sense_10(self, cdb: bytes, transfer: Transfer) -> None:
        transfer.give(self._mode(cdb).encode_10(), int.from_bytes(cdb[7:9], "big"))

    def _mode(self, cdb: bytes) -> ModeParameters:
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        pages = {CACHING_PAGE: b"\x04" + bytes(17), _CONTROL_PAGE: bytes(10)}  # 04: write cache
        if control == 3:
            raise _Check(_NOT_SAVED)
        if control == 1:  # what of them can be changed
            pages = {number: bytes(len(body)) for number, body in pages.items()}
        if page != ALL_PAGES:
            pages = {number: body for number, body in pages.items() if number == page}
        if not pages or subpage:
            raise _Check(_BAD_FIELD)
        return ModeParameters(self._store.read_only, True, pages)

    def _capacity(self) -> Capacity:
        return Capacity(self._blocks, self._store.block_size, lbpme=True, lbprz=True)

    def _read_capacity_10(self, cdb: bytes, transfer: Transfer) -> None:
        transfer.give(self._capacity().encode_10(), 8)

    def _read_capacity_16(self, cdb: bytes, transfer: Transfer) -> None:
        if cdb[1] & 0x1F != READ_CAPACITY_16:
            raise _Check(_BAD_FIELD)
        transfer.give(self._capacity().encode_16(), int.from_bytes(cdb[10:14], "big"))

    def _read(self, cdb: bytes, transfer: Transfer) -> None:
        offset, nbytes = self._extent(cdb)
        if nbytes > _TRANSFER_MAX:
            raise _Check(_BAD_FIELD)
        into = transfer.sink(nbytes)
        try:
            self._store.read(offset, into)
        except OSError:
            transfer.given = 0
            raise _Check(self._medium(0x11, offset)) from None  # UNRECOVERED READ ERROR

    def _write(self, cdb: bytes, transfer: Transfer) -> None:
        offset, nbytes = self._extent(cdb)
        if nbytes > _TRANSFER_MAX:
            raise _Check(_BAD_FIELD)
        data = transfer.source(nbytes)
        self._change(offset, self._store.write, offset, data)
        if cdb[0] != OpCode.WRITE_6 and cdb[1] & _FUA:
            self._flush(offset)

    def _verify(self, cdb: bytes, transfer: Transfer) -> None:
        if cdb[1] & _BYTCHK:
            raise _Check(_BAD_FIELD)
        self._extent(cdb)

    def _synchronize_cache(self, cdb: bytes, transfer: Transfer) -> None:
        offset, _ = self._extent(cdb)
        self._flush(offset)

    def _unmap(self, cdb: bytes, transfer: Transfer) -> None:
        length = int.from_bytes(cdb[7:9], "big")
        if cdb[1] & 1:  # ANCHOR
            raise _Check(_BAD_FIELD)
        if length == 0:
            return
        try:
            ranges = decode_unmap_parameters(transfer.take(length))
        except ProtocolError:
            raise _Check(_BAD_LENGTH) from None
        if len(ranges) > _RANGES_MAX:
            raise _Check(_BAD_PARAMETER)
        block_size = self._store.block_size
        for first, blocks in ranges:  # all of them, before one is touched
            self._check_range(first, blocks)
            if blocks * block_size > _ZERO_MAX:
                raise _Check(_BAD_PARAMETER)
        for first, blocks in ranges:
            self._zero(first * block_size, blocks * block_size, unmap=True)

    def _write_same(self, cdb: bytes, transfer: Transfer) -> None:
        flags = cdb[1]
        none = flags & _NDOB and cdb[0] == OpCode.WRITE_SAME_16
        offset, nbytes = self._extent(cdb)
        if flags & _ANCHOR or not 0 < nbytes <= _ZERO_MAX:
            raise _Check(_BAD_FIELD)
        block = bytes(self._store.block_size) if none else transfer.take(self._store.block_size)
        if not any(block):
            self._zero(offset, nbytes, unmap=bool(flags & _UNMAP))
            return
        data = memoryview(block * (min(nbytes, _CHUNK) // len(block)))
        for at in range(offset, offset + nbytes, len(data)):
            part = data[: offset + nbytes - at]
            self._change(offset, self._store.write, at, [part])

    def _compare_and_write(self, cdb: bytes, transfer: Transfer) -> None:
        """Nothing comes between the two halves, as one command is done at a time (SBC-3, 5.2)."""
        first, blocks = int.from_bytes(cdb[2:10], "big"), cdb[13]
        if cdb[1] & _PROTECT or blocks > _compare_most(self._store.block_size):
            raise _Check(_BAD_FIELD)
        self._check_range(first, blocks)
        if self._store.read_only:
            raise _Check(_PROTECTED)
        offset, nbytes = first * self._store.block_size, blocks * self._store.block_size
        data = transfer.take(2 * nbytes)
        found = bytearray(nbytes)
        try:
            self._store.read(offset, [memoryview(found)])
        except OSError:
            raise _Check(self._medium(0x11, offset)) from None
        if found != data[:nbytes]:
            at = next(at for at in range(nbytes) if found[at] != data[at])
            raise _Check(Sense(SenseKey.MISCOMPARE, 0x1D, 0x00, at))
        self._change(offset, self._store.write, offset, [memoryview(data)[nbytes:]])
        if cdb[1] & _FUA:
            self._flush(offset)

    def _zero(self, offset: int, nbytes: int, *, unmap: bool) -> None:
        self._change(offset, lambda: self._store.zero(offset, nbytes, unmap=unmap))

    def _change(self, offset: int, change: Callable[..., None], *details: object) -> None:
        if self._store.read_only:
            raise _Check(_PROTECTED)
        try:
            change(*details)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            raise _Check(_NO_SPACE if full else self._medium(0x0C, offset)) from None  # WRITE ERROR

    def _flush(self, offset: int) -> None:
        try:
            self._store.flush()
        except OSError:
            raise _Check(self._medium(0x0C, offset)) from None

    def _medium(self, asc: int, offset: int) -> Sense:
        return Sense(SenseKey.MEDIUM_ERROR, asc, 0, offset // self._store.block_size)

    def _extent(self, cdb: bytes) -> tuple[int, int]:
        """The bytes that a command is about, which are on the disk and without protection."""
        first, blocks = _blocks(cdb)
        if cdb[0] >> 5 and cdb[1] & _PROTECT:
            raise _Check(_BAD_FIELD)
        self._check_range(first, blocks)
        return first * self._store.block_size, blocks * self._store.block_size

    def _check_range(self, first: int, blocks: int) -> None:
        if first + blocks > self._blocks:
            raise _Check(_BAD_LBA)


class Target:
    """A SCSI target device: its logical units by number."""

    def __init__(self, units: dict[int, LogicalUnit]) -> None:
        self.units = units

    def handle(self, lun: int, cdb: bytes, out: Views = (), into: Views = ()) -> Reply:
        """Do one command, with the data that came with it and the room for what goes back.

        Raises Overrun, having done nothing, if there is too little of either.
        """
        cdb = cdb.ljust(16, b"\0")
        transfer = Transfer(out, into)
        unit = self.units.get(lun)
        try:
            if cdb[0] == OpCode.REPORT_LUNS:
                self._report_luns(cdb, transfer)
            elif unit is None:
                _absent(cdb, transfer)
            else:
                unit.execute(cdb, transfer)
        except _Check as check:
            sense = check.sense.encode_fixed()
            return Reply(Status.CHECK_CONDITION, sense, transfer.taken, transfer.given)
        return Reply(Status.GOOD, b"", transfer.taken, transfer.given)

    def _report_luns(self, cdb: bytes, transfer: Transfer) -> None:
        if cdb[2] > 2:
            raise _Check(_BAD_FIELD)
        luns = sorted(self.units) if cdb[2] != 1 else []  # 1: the well-known ones, we have none
        data = encode_report_luns(encode_lun(lun) for lun in luns)
        transfer.give(data, int.from_bytes(cdb[6:10], "big"))
        for unit in self.units.values():
            unit.settle(LUNS_CHANGED)  # whoever asks need not be told (SAM-5, 5.14)


class ReportLuns:
    """The well-known logical unit that lists all units of all targets (SPC-4, 8)."""

    def __init__(self, own: bytes, units: Callable[[], Iterable[bytes]]) -> None:
        """Its address, and what finds those of the others, as the transport has them."""
        self._own, self._units = own, units

    def handle(self, lun: int, cdb: bytes, out: Views = (), into: Views = ()) -> Reply:
        """Do one command, as `Target.handle` does; there is one unit, whatever the number."""
        cdb = cdb.ljust(16, b"\0")
        transfer = Transfer(out, into)
        try:
            self._execute(cdb, transfer)
        except _Check as check:
            return Reply(Status.CHECK_CONDITION, check.sense.encode_fixed(), 0, 0)
        return Reply(Status.GOOD, b"", transfer.taken, transfer.given)

    def _execute(self, cdb: bytes, transfer: Transfer) -> None:
        if cdb[0] == OpCode.REPORT_LUNS:
            if cdb[2] > 2:
                raise _Check(_BAD_FIELD)
            luns = [self._own] if cdb[2] else []  # 0: all but the well-known, 1: those alone, 2: all
            luns += self._units() if cdb[2] != 1 else []
            transfer.give(encode_report_luns(luns), int.from_bytes(cdb[6:10], "big"))
        elif cdb[0] == OpCode.INQUIRY and not cdb[1] & 1 and not cdb[2]:
            transfer.give(_WELL_KNOWN, int.from_bytes(cdb[3:5], "big"))
        elif cdb[0] == OpCode.REQUEST_SENSE and not cdb[1] & 1:
            transfer.give(Sense(SenseKey.NO_SENSE).encode_fixed(), cdb[4])
        elif cdb[0] in (OpCode.INQUIRY, OpCode.REQUEST_SENSE):
            raise _Check(_BAD_FIELD)
        elif cdb[0] != OpCode.TEST_UNIT_READY:
            raise _Check(_BAD_OPCODE)


def _naa(serial: str) -> bytes:
    """A name in binary that nobody has assigned, of which 60 bits come from the serial number."""
    digest = hashlib.blake2s(serial.encode(), digest_size=8).digest()
    return bytes((_NAA_LOCAL << 4 | digest[0] & 0x0F,)) + digest[1:]


def _compare_most(block_size: int) -> int:
    """Blocks in one COMPARE AND WRITE."""
    return min(_COMPARE_BLOCKS, _COMPARE_BYTES // block_size)


def _absent(cdb: bytes, transfer: Transfer) -> None:
    """A logical unit that there is not (SPC-4, 6.6.2 and 6.39)."""
    if cdb[0] == OpCode.INQUIRY and not cdb[1] & 1:
        transfer.give(_NOTHING, int.from_bytes(cdb[3:5], "big"))
    elif cdb[0] == OpCode.REQUEST_SENSE:
        transfer.give(_NO_UNIT.encode_fixed(), cdb[4])
    else:
        raise _Check(_NO_UNIT)


def _blocks(cdb: bytes) -> tuple[int, int]:
    """First block and number of blocks, where the group of the operation code has them."""
    group = cdb[0] >> 5  # (SPC-4, 4.2.5.1)
    if group == 0:
        return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256
    first, blocks = _EXTENTS[group].unpack_from(cdb, 2)
    return first, blocks


_EXTENTS = {
    1: struct.Struct(">IxH"),
    2: struct.Struct(">IxH"),
    4: struct.Struct(">QI"),
    5: struct.Struct(">II"),
}


def _first(views: Views, nbytes: int) -> Views:
    """The first `nbytes` of some buffers."""
    total = sum(map(len, views))
    if total == nbytes:
        return views
    if total < nbytes:
        raise Overrun(f"{nbytes} bytes where there are {total}")
    kept = []
    for view in views:
        if not nbytes:
            break
        kept.append(view[:nbytes])
        nbytes -= len(kept[-1])
    return kept
