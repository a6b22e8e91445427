"""What to ask a SCSI target, in order; generators that yield commands and are sent replies.

No I/O here: who drives them may have many under way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from virtio.errors import ProtocolError
from virtio.wire import scsi
from virtio.wire.sense import Sense, SenseKey
from virtio.wire.virtio_scsi import ResponseCode

DISK = 0x00  # peripheral device type of a direct-access block device (SPC-4, 6.6.2)
REPLY_BYTES = 4096  # room for any reply asked for here: REPORT LUNS of 511 units
_ATTENTIONS = 8  # how many UNIT ATTENTIONs in a row are believed
_ABSENT = (ResponseCode.BAD_TARGET, ResponseCode.INCORRECT_LUN)


class Command(NamedTuple):
    """One command to a unit, of which at most `nbytes` of data come back."""

    lun: int
    cdb: bytes
    nbytes: int = 0


class Reply(NamedTuple):
    """What came back; `status` counts only when `response` is OK."""

    response: int
    status: int
    sense: bytes
    data: bytes

    @property
    def good(self) -> bool:
        return self.response == ResponseCode.OK and self.status == scsi.Status.GOOD


@dataclass(frozen=True, slots=True)
class Unit:
    """A logical unit that answered; `problem` says why it is no disk that can be used."""

    lun: int
    inquiry: scsi.Inquiry
    capacity: scsi.Capacity | None = None
    wide: bool = False  # takes the 16-byte commands
    mode: scsi.ModeParameters = scsi.ModeParameters()
    serial: str = ""
    limits: scsi.BlockLimits = scsi.BlockLimits()
    provisioning: scsi.LogicalBlockProvisioning = scsi.LogicalBlockProvisioning()
    problem: str = ""


T = TypeVar("T")
Conversation = Generator[Command, Reply, T]


def probe_target(max_lun: int) -> Conversation[list[Unit]]:
    """The units of one target: those that REPORT LUNS lists, or LUN 0 where it is not answered."""
    first = yield from _ask(0, scsi.inquiry(), 255)
    if first.response in _ABSENT:
        return []
    units = []
    for lun in (yield from _list_luns()):
        if lun <= max_lun:
            unit = yield from probe_unit(lun)
            if unit is not None:
                units.append(unit)
    return units


def _list_luns() -> Conversation[list[int]]:
    reply = yield from _ask(0, scsi.report_luns(REPLY_BYTES), REPLY_BYTES)
    if not reply.good:
        return [0]
    luns = []
    for address in scsi.decode_report_luns(reply.data):
        try:
            luns.append(scsi.decode_lun(address))
        except ProtocolError:
            continue  # a form of address that virtio has no place for (5.6.6.1)
    return sorted(set(luns))


def probe_unit(lun: int) -> Conversation[Unit | None]:
    """One unit: what it is, whether it is ready, how large; None if nothing is there."""
    reply = yield from _ask(lun, scsi.inquiry(), 255)
    if not reply.good or len(reply.data) < 36:
        return None
    inquiry = scsi.Inquiry.decode(reply.data)
    if inquiry.qualifier:
        return None
    if inquiry.peripheral_type != DISK:
        return Unit(lun, inquiry, problem=f"device type {inquiry.peripheral_type:#x}, not a disk")
    reply = yield from _ask(lun, scsi.test_unit_ready(), 0)
    if not reply.good:
        return Unit(lun, inquiry, problem=_describe("not ready", reply))
    capacity, wide, problem = yield from _capacity(lun)
    if problem:
        return Unit(lun, inquiry, problem=problem)
    mode = yield from _ask(lun, scsi.mode_sense_6(scsi.ALL_PAGES), 255)
    pages = yield from _ask(lun, scsi.inquiry(scsi.Page.SUPPORTED_PAGES), 255)
    supported: list[int] = _decoded(pages, scsi.decode_supported_pages, [])
    return Unit(
        lun,
        inquiry,
        capacity,
        wide,
        _decoded(mode, scsi.ModeParameters.decode_6, scsi.ModeParameters()),
        (yield from _page(lun, supported, scsi.Page.SERIAL_NUMBER, scsi.decode_serial, "")),
        (
            yield from _page(
                lun, supported, scsi.Page.BLOCK_LIMITS, scsi.BlockLimits.decode, scsi.BlockLimits()
            )
        ),
        (
            yield from _page(
                lun,
                supported,
                scsi.Page.LOGICAL_BLOCK_PROVISIONING,
                scsi.LogicalBlockProvisioning.decode,
                scsi.LogicalBlockProvisioning(),
            )
        ),
    )


def _page(
    lun: int, supported: list[int], page: scsi.Page, decode: Callable[[bytes], T], otherwise: T
) -> Conversation[T]:
    """A page of vital product data, or what to assume of a unit that does not have it."""
    if page not in supported:
        return otherwise
    reply = yield from _ask(lun, scsi.inquiry(page), 255)
    return _decoded(reply, decode, otherwise)


def _capacity(lun: int) -> Conversation[tuple[scsi.Capacity | None, bool, str]]:
    """How large, whether READ CAPACITY(16) worked, and else what is wrong."""
    reply = yield from _ask(lun, scsi.read_capacity_16(32), 32)
    wide = reply.good and len(reply.data) >= 12
    try:
        if wide:
            capacity: scsi.Capacity | None = scsi.Capacity.decode_16(reply.data)
        else:
            reply = yield from _ask(lun, scsi.read_capacity_10(), 8)
            if not reply.good:
                return None, False, _describe("no capacity", reply)
            capacity = scsi.Capacity.decode_10(reply.data)
    except ProtocolError as error:
        return None, wide, str(error)
    if capacity is None:
        return None, False, "more than 2^32 blocks, and it does not take READ CAPACITY(16)"
    if capacity.protection:
        return None, wide, f"protection information of type {capacity.protection}"
    return capacity, wide, ""


def _ask(lun: int, cdb: bytes, nbytes: int) -> Conversation[Reply]:
    """A command, again while the unit only reports what happened to it before (SAM-5, 5.14)."""
    for _ in range(_ATTENTIONS):
        reply = yield Command(lun, cdb, nbytes)
        attention = Sense.decode(reply.sense).key == SenseKey.UNIT_ATTENTION
        if reply.response != ResponseCode.OK or not (reply.status and attention):
            break
    return reply


def _decoded(reply: Reply, decode: Callable[[bytes], T], otherwise: T) -> T:
    if not reply.good:
        return otherwise
    try:
        return decode(reply.data)
    except ProtocolError:
        return otherwise


def _describe(what: str, reply: Reply) -> str:
    if reply.response != ResponseCode.OK:
        return f"{what}: virtio-scsi response {reply.response}"
    return f"{what}: {Sense.decode(reply.sense)}"
