"""What to ask a SCSI target, in order; generators that yield commands and are sent replies.

No I/O here: who drives them may have many under way at once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from virtio.errors import ProtocolError
from virtio.wire import scsi, virtio_scsi
from virtio.wire.sense import Sense, SenseKey
from virtio.wire.virtio_scsi import ResponseCode

REPLY_BYTES = 4096  # room for any reply asked for here, but a longer list of units
_DISK, _CD_ROM = 0x00, 0x05  # peripheral device types that are attached (SPC-4, 6.6.2)
_TYPES = {
    0x01: "a tape",
    0x03: "a processor",
    0x04: "a write-once disk",
    0x07: "an optical memory",
    0x08: "a medium changer",
    0x0C: "a storage array controller",
    0x0D: "an enclosure",
    0x0E: "a simplified disk",
    0x11: "an object store",
    0x14: "a zoned disk",
    0x1E: "a well-known logical unit",
}
_ATTENTIONS = 8  # how many UNIT ATTENTIONs in a row are believed
_ATTEMPTS, _PAUSE_S = 10, 0.1  # for a unit that is becoming ready, or busy
_MOST_LUNS = virtio_scsi.MAX_LUN + 1
_ABSENT = (ResponseCode.BAD_TARGET, ResponseCode.INCORRECT_LUN)
_BUSY = (scsi.Status.BUSY, scsi.Status.TASK_SET_FULL)


class Command(NamedTuple):
    """One command to a unit, or to the well-known one where `lun` is None; at most `nbytes` come back."""

    lun: int | None
    cdb: bytes
    nbytes: int = 0


class Pause(NamedTuple):
    """Nothing for so many seconds; what is sent then does not matter."""

    seconds: float


class Reply(NamedTuple):
    """What came back; `status` counts only when `response` is OK."""

    response: int
    status: int
    sense: bytes
    data: bytes

    @property
    def good(self) -> bool:
        return self.response == ResponseCode.OK and self.status == scsi.Status.GOOD


NO_ANSWER = Reply(-1, 0, b"", b"")


@dataclass(frozen=True, slots=True)
class Unit:
    """A logical unit that answered; `problem` says why it is no disk that can be used.

    `identity` is the same as long as the same disk is behind the unit: its best name of page 83,
    else its serial number, else nothing. `unique`: no other disk anywhere has it.
    """

    lun: int
    inquiry: scsi.Inquiry
    capacity: scsi.Capacity | None = None
    wide: bool = False  # takes the 16-byte commands
    mode: scsi.ModeParameters = scsi.ModeParameters()
    serial: str = ""
    identity: str = ""
    unique: bool = False
    rotation: int = 0  # per minute; 1 for none at all, 0 when the unit does not say
    limits: scsi.BlockLimits = scsi.BlockLimits()
    provisioning: scsi.LogicalBlockProvisioning = scsi.LogicalBlockProvisioning()
    problem: str = ""
    silent: bool = False  # it may be there, and as it was

    @property
    def read_only(self) -> bool:
        return self.mode.write_protected or self.inquiry.peripheral_type == _CD_ROM


T = TypeVar("T")
Conversation: TypeAlias = Generator[Command | Pause, Reply, T]


def list_units(target: int, max_lun: int) -> Conversation[list[int] | None]:
    """The numbers of a target's units, up to `max_lun`: none if there is no target, None if it is silent.

    REPORT LUNS to LUN 0, else to the well-known unit, else one number after another (SPC-4, 6.33).
    """
    first = yield from _ask(0, scsi.inquiry(), 255)
    if first.response in _ABSENT:
        return []
    if first is NO_ANSWER:
        return None
    reply = yield from _report_luns(0)
    if reply.good:
        luns = _numbers(reply, scsi.decode_lun)
    else:
        reply = yield from _report_luns(None)
        addresses = _numbers(reply, virtio_scsi.decode_lun) if reply.good else []
        luns = [lun for number, lun in addresses if number == target]
        if not luns:
            luns = yield from _scan(max_lun)
    return sorted({lun for lun in luns if lun <= max_lun})


def _report_luns(lun: int | None) -> Conversation[Reply]:
    """The list of units, asked for once more if there was no room for all of it."""
    reply = yield from _ask(lun, scsi.report_luns(REPLY_BYTES), REPLY_BYTES)
    if reply.good and len(reply.data) >= 8:
        nbytes = min(8 + int.from_bytes(reply.data[:4], "big"), 8 + 8 * _MOST_LUNS)
        if nbytes > REPLY_BYTES:
            reply = yield from _ask(lun, scsi.report_luns(nbytes), nbytes)
    return reply


def _numbers(reply: Reply, decode: Callable[[bytes], T]) -> list[T]:
    """The units in a list, but for forms of address that virtio has no place for (5.6.6.1)."""
    numbers = []
    addresses: list[bytes] = _decoded(reply, scsi.decode_report_luns, [])
    for address in addresses:
        try:
            numbers.append(decode(address))
        except ProtocolError:
            continue
    return numbers


def _scan(max_lun: int) -> Conversation[list[int]]:
    """LUN 0, whatever it is, and the units that follow without a gap."""
    luns = [0]
    for lun in range(1, max_lun + 1):
        reply = yield from _ask(lun, scsi.inquiry(), 255)
        if _present(reply) is None:
            break
        luns.append(lun)
    return luns


def _present(reply: Reply) -> scsi.Inquiry | None:
    """What an INQUIRY says is there, if anything is."""
    if not reply.good or len(reply.data) < 36:
        return None
    inquiry = scsi.Inquiry.decode(reply.data)
    return None if inquiry.qualifier else inquiry


def probe_unit(lun: int) -> Conversation[Unit | None]:
    """One unit: what it is, whether it is ready, how large; None if nothing is there."""
    reply = yield from _ask(lun, scsi.inquiry(), 255)
    if reply is NO_ANSWER:
        return Unit(lun, scsi.Inquiry(), problem="no answer to INQUIRY", silent=True)
    inquiry = _present(reply)
    if inquiry is None:
        return None
    kind = inquiry.peripheral_type
    if kind not in (_DISK, _CD_ROM):
        what = _TYPES.get(kind, f"a device of type {kind:#x}")
        return Unit(lun, inquiry, problem=f"{what}, not a disk")
    reply = yield from _ready(lun)
    if not reply.good:
        return Unit(lun, inquiry, problem=_describe("not ready", reply), silent=reply is NO_ANSWER)
    capacity, wide, problem = yield from _capacity(lun)
    if problem:
        return Unit(lun, inquiry, problem=problem)
    mode = yield from _mode(lun)
    pages = yield from _ask(lun, scsi.inquiry(scsi.Page.SUPPORTED_PAGES), 255)
    supported: list[int] = _decoded(pages, scsi.decode_supported_pages, [])

    def page(number: scsi.Page, decode: Callable[[bytes], T], otherwise: T) -> Conversation[T]:
        """A page of vital product data, or what to assume of a unit that does not have it."""
        if number not in supported:
            return otherwise
        reply = yield from _ask(lun, scsi.inquiry(number), 255)
        return _decoded(reply, decode, otherwise)

    serial = yield from page(scsi.Page.SERIAL_NUMBER, scsi.decode_serial, "")
    none: list[scsi.Designator] = []
    names = yield from page(scsi.Page.DEVICE_IDENTIFICATION, scsi.decode_designators, none)
    best = scsi.best_designator(names)
    return Unit(
        lun,
        inquiry,
        capacity,
        wide,
        mode,
        serial,
        identity=serial if best is None else best.describe(),
        unique=best is not None and best.unique,
        limits=(yield from page(scsi.Page.BLOCK_LIMITS, scsi.BlockLimits.decode, scsi.BlockLimits())),
        rotation=(yield from page(scsi.Page.CHARACTERISTICS, scsi.decode_rotation, 0)),
        provisioning=(
            yield from page(
                scsi.Page.LOGICAL_BLOCK_PROVISIONING,
                scsi.LogicalBlockProvisioning.decode,
                scsi.LogicalBlockProvisioning(),
            )
        ),
    )


def _ready(lun: int) -> Conversation[Reply]:
    """TEST UNIT READY, until it is: some become so by themselves, some have to be told to start."""
    started = False
    for _ in range(_ATTEMPTS):
        reply = yield from _ask(lun, scsi.test_unit_ready())
        sense = Sense.decode(reply.sense)
        not_ready = sense.key == SenseKey.NOT_READY and sense.asc == 0x04
        if reply.good or reply.response != ResponseCode.OK or not not_ready:
            break
        if sense.ascq == 0x02 and not started:  # INITIALIZING COMMAND REQUIRED
            yield from _ask(lun, scsi.start_stop_unit(True))
            started = True
        elif sense.ascq in (0x01, 0x0A):  # IN PROCESS OF BECOMING READY; STATE TRANSITION
            yield Pause(_PAUSE_S)
        else:
            break
    return reply


def _mode(lun: int) -> Conversation[scsi.ModeParameters]:
    """The mode parameters, by whichever command the unit takes."""
    for cdb, decode in (
        (scsi.mode_sense_6(scsi.ALL_PAGES), scsi.ModeParameters.decode_6),
        (scsi.mode_sense_6(scsi.CACHING_PAGE), scsi.ModeParameters.decode_6),
        (scsi.mode_sense_10(scsi.ALL_PAGES), scsi.ModeParameters.decode_10),
    ):
        reply = yield from _ask(lun, cdb, 255)
        mode = _decoded(reply, decode, None)
        if mode is not None:
            return mode
    return scsi.ModeParameters()


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


def _ask(lun: int | None, cdb: bytes, nbytes: int = 0) -> Conversation[Reply]:
    """A command, again while the unit is busy or only reports what happened to it before (SAM-5, 5.14)."""
    attentions = attempts = 0
    while True:
        reply = yield Command(lun, cdb, nbytes)
        if reply.response == ResponseCode.BUSY or (
            reply.response == ResponseCode.OK and reply.status in _BUSY
        ):
            attempts += 1
            if attempts == _ATTEMPTS:
                return reply
            yield Pause(_PAUSE_S)
        elif reply.response == ResponseCode.OK and reply.status == scsi.Status.CHECK_CONDITION:
            attentions += 1
            attention = Sense.decode(reply.sense).key == SenseKey.UNIT_ATTENTION
            if not attention or attentions == _ATTENTIONS:
                return reply
        else:
            return reply


def _decoded(reply: Reply, decode: Callable[[bytes], T], otherwise: T) -> T:
    if not reply.good:
        return otherwise
    try:
        return decode(reply.data)
    except ProtocolError:
        return otherwise


def _describe(what: str, reply: Reply) -> str:
    if reply is NO_ANSWER:
        return f"{what}: no answer"
    if reply.response != ResponseCode.OK:
        return f"{what}: virtio-scsi response {reply.response}"
    return f"{what}: {Sense.decode(reply.sense)}"
