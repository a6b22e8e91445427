"""Task management: getting requests back that a virtio-scsi device does not answer (5.6.6.2).

A request's slot, tag and memory stay taken until the device has returned it, whatever was asked of it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from virtio.errors import RequestTimeout
from virtio.ring.layout import Layout
from virtio.ring.lease import Lease, deadline_in
from virtio.ring.template import Template
from virtio.wire.virtio_scsi import (
    RequestHeader,
    ResponseCode,
    TaskFunction,
    TaskManagement,
    decode_lun,
    encode_lun,
)

log = logging.getLogger("virtio.scsi")

CONTROL_LAYOUT = Layout(
    request=24, payload=0, response=1, result_offset=0, result_mask=0xFF, response_first=False
)
_Functions: TypeAlias = Iterator[tuple[int, bytes, int]]
_LOOK_S = 0.005  # between two looks at a queue
_DONE = (ResponseCode.FUNCTION_COMPLETE, ResponseCode.FUNCTION_SUCCEEDED)


def manage(control: Lease, function: int, address: bytes, tag: int, timeout: float) -> int:
    """Ask for one task management function: the ResponseCode, 255 if none was written.

    RequestTimeout if there is no answer in `timeout` seconds, as some targets never give one.
    """
    template = Template(TaskManagement(function, address, tag).encode())
    with control.borrow(deadline_in(timeout)):
        deadline = deadline_in(timeout)
        with control.holding():
            while not control.queue.submit(template, 0, 0, 0, 0):
                control.settle(deadline)  # only functions that were never answered have all slots
            control.queue.kick()
            (finished,) = control.gather(1, deadline)
    return finished.result


def recover(lease: Lease, control: Lease, timeout: float) -> bool:
    """Get back the orphans of a queue: abort them, then reset their units, then their targets.

    Whether it has none any more. Each answer is waited for `timeout` seconds at most, and after each
    the queue is looked at before anything else is asked for.
    """
    steps: tuple[tuple[str, Callable[[list[RequestHeader]], _Functions]], ...] = (
        ("abort", _aborts),
        ("logical unit reset", _unit_resets),
        ("target reset", _target_resets),
    )
    for step, functions in steps:
        if _settled(lease, 0.0):
            return True
        for function, address, tag in functions(_orphans(lease)):
            try:
                code = manage(control, function, address, tag, timeout)
            except RequestTimeout as error:
                log.warning("%s of %s: %s", step, address.hex(), error)
                break  # whoever does not answer one does not answer the others
            log.debug("%s of %s, tag %d: response %d", step, address.hex(), tag, code)
            if code not in _DONE:
                log.info("%s of %s was refused with response %d", step, address.hex(), code)
        if _settled(lease, timeout):
            return True
    return False


def _orphans(lease: Lease) -> list[RequestHeader]:
    return [RequestHeader.decode(header) for header in lease.queue.orphan_headers()]


def _aborts(headers: Iterable[RequestHeader]) -> _Functions:
    for header in headers:
        yield TaskFunction.ABORT_TASK, header.lun, header.tag


def _unit_resets(headers: Iterable[RequestHeader]) -> _Functions:
    for address in sorted({header.lun for header in headers}):
        yield TaskFunction.LOGICAL_UNIT_RESET, address, 0


def _target_resets(headers: Iterable[RequestHeader]) -> _Functions:
    for target in sorted({decode_lun(header.lun)[0] for header in headers}):
        yield TaskFunction.I_T_NEXUS_RESET, encode_lun(target, 0), 0


def _settled(lease: Lease, timeout: float) -> bool:
    """Whether no orphan is left, after waiting a little for those that are on their way.

    The queue's owner may use it meanwhile, and then looks himself.
    """
    end = time.monotonic() + timeout
    while lease.queue.orphans:
        with contextlib.suppress(RequestTimeout), lease.borrow(time.monotonic_ns()):
            lease.queue.look()
            lease.queue.sweep()
        if time.monotonic() >= end:
            break
        if lease.queue.orphans:
            lease.life.check()
            time.sleep(_LOOK_S)
    return lease.queue.orphans == 0
