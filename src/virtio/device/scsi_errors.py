"""What a virtio-scsi response means: success after all, or an error, and whether to try again."""

from __future__ import annotations

import enum
import errno

from virtio.errors import DeviceError
from virtio.ring.requests import Finished
from virtio.wire import scsi
from virtio.wire.sense import Sense, SenseKey
from virtio.wire.virtio_scsi import Response, ResponseCode

from .dialogue import UNWRITTEN
from .probe import Reply

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
    scsi.Status.TASK_ABORTED: (errno.ECANCELED, True),
}
_BY_RESPONSE: dict[int, tuple[int, bool]] = {
    ResponseCode.BAD_TARGET: (errno.ENODEV, False),
    ResponseCode.INCORRECT_LUN: (errno.ENODEV, False),
    ResponseCode.BUSY: (errno.EBUSY, True),
    ResponseCode.RESET: (errno.ECANCELED, True),
    ResponseCode.ABORTED: (errno.ECANCELED, True),
}
_GONE = (ResponseCode.BAD_TARGET, ResponseCode.INCORRECT_LUN)
_NO_UNIT, _LIST_CHANGED = (0x25,), ((0x3F, 0x0E),)
_CHANGES = (0x28, 0x29, 0x2A, 0x3F)  # medium, reset, parameters, operating conditions (SPC-4, annex F)


class Doubt(enum.Enum):
    """What a response makes doubtful: nothing, what is known of the unit, or which units there are."""

    NONE = 0
    UNIT = 1
    TARGET = 2


def explain(finished: Finished, offset: int, transfer: bool) -> DeviceError | None:
    """The error behind a response that is not all zero where it should be; None if it is none."""
    if finished.result == UNWRITTEN:
        words = "the device completed the request without writing a response"
        return DeviceError(errno.EIO, words, offset=offset)
    response = Response.decode(finished.response)
    error = _error(response.response, response.status, response.sense, offset)
    recovered = Sense.decode(response.sense)
    if error is not None and recovered.key == SenseKey.RECOVERED_ERROR and not recovered.deferred:
        error = None  # the device had trouble, and has done it all the same (SPC-4, 4.5.6)
    if error is None and transfer and response.residual:
        # Where it was none, that is what SPDK's target has not counted of the parameters of an UNMAP.
        words = f"the device moved {response.residual} bytes less than asked for"
        error = DeviceError(errno.EIO, words, offset=offset, status=response.status)
    return error


def error_of(reply: Reply, offset: int) -> DeviceError | None:
    """What a reply to a command of one's own comes to; None for a good one."""
    return None if reply.good else _error(reply.response, reply.status, reply.sense, offset)


def _error(response: int, status: int, sense: bytes, offset: int) -> DeviceError | None:
    code, transient = errno.EIO, False
    if response != ResponseCode.OK:
        code, transient = _BY_RESPONSE.get(response, (code, transient))
        words, sense = f"virtio-scsi response {_name(ResponseCode, response)}", b""
    elif status == scsi.Status.CHECK_CONDITION:
        decoded = Sense.decode(sense)
        code, transient = _BY_KEY.get(decoded.key, (code, transient))
        code = _BY_CODE.get(decoded.asc, code)
        words = decoded.describe()
    elif status != scsi.Status.GOOD:
        code, transient = _BY_STATUS.get(status, (code, transient))
        words, sense = f"SCSI status {_name(scsi.Status, status)}", b""
    else:
        return None
    return DeviceError(code, words, offset=offset, status=status, sense=sense, transient=transient)


def doubt(finished: Finished) -> Doubt:
    """What has to be asked anew after such a response."""
    if finished.result == UNWRITTEN:
        return Doubt.NONE
    response = Response.decode(finished.response)
    if response.response in _GONE:
        return Doubt.TARGET
    if response.response != ResponseCode.OK or response.status != scsi.Status.CHECK_CONDITION:
        return Doubt.NONE
    sense = Sense.decode(response.sense)
    if sense.asc in _NO_UNIT or (sense.asc, sense.ascq) in _LIST_CHANGED:
        return Doubt.TARGET
    if sense.key == SenseKey.UNIT_ATTENTION and sense.asc in _CHANGES:
        return Doubt.UNIT
    return Doubt.NONE


def _name(numbers: type[enum.IntEnum], value: int) -> str:
    try:
        return numbers(value).name
    except ValueError:
        return f"{value:#x}"
