"""What bad results mean: bytes of a response in, an error out."""

import errno

import pytest

from virtio.device import blk, scsi_errors
from virtio.ring.requests import Finished
from virtio.wire.virtio_scsi import Response

MASK = 0xFFFF_0000_FFFF_FFFF


def sense(key, asc, ascq):
    # fixed, current | | key | information 4 | additional length | 4 | asc, ascq | 4
    return bytes([0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, 0, 0, 0])


def explain(response, transfer=True):
    encoded = response.encode()
    result = int.from_bytes(encoded[4:12], "little") & MASK
    return scsi_errors.explain(Finished(0, result, encoded), 4096, transfer)


@pytest.mark.parametrize(
    "response, code, transient, words",
    [
        (Response(status=2, sense=sense(5, 0x21, 0)), errno.EINVAL, False, "out of range"),
        (Response(status=2, sense=sense(5, 0x20, 0)), errno.EOPNOTSUPP, False, "ILLEGAL REQUEST"),
        (Response(status=2, sense=sense(5, 0x25, 0)), errno.ENODEV, False, "not supported"),
        (Response(status=2, sense=sense(6, 0x29, 0)), errno.EAGAIN, True, "UNIT ATTENTION"),
        (Response(status=2, sense=sense(7, 0x27, 0)), errno.EROFS, False, "write protected"),
        (Response(status=2, sense=sense(2, 0x3A, 0)), errno.ENXIO, False, "medium not present"),
        (Response(status=2, sense=sense(3, 0x11, 0)), errno.EIO, False, "MEDIUM ERROR"),
        (Response(status=2, sense=sense(0xB, 0, 0)), errno.ECANCELED, True, "ABORTED COMMAND"),
        (Response(status=2), errno.EIO, False, "no usable sense data"),
        (Response(status=8), errno.EBUSY, True, "SCSI status BUSY"),
        (Response(status=0x28), errno.EBUSY, True, "TASK_SET_FULL"),
        (Response(status=0x18), errno.EBUSY, False, "RESERVATION_CONFLICT"),
        (Response(status=0x77), errno.EIO, False, "SCSI status 0x77"),
        (Response(response=3), errno.ENODEV, False, "response BAD_TARGET"),
        (Response(response=12), errno.ENODEV, False, "response INCORRECT_LUN"),
        (Response(response=5), errno.EBUSY, True, "response BUSY"),
        (Response(response=4), errno.ECANCELED, True, "response RESET"),
        (Response(response=7), errno.EIO, False, "response TARGET_FAILURE"),
        (Response(response=8), errno.EIO, False, "response NEXUS_FAILURE"),
        (Response(response=99), errno.EIO, False, "response 0x63"),
        (Response(residual=512), errno.EIO, False, "moved 512 bytes less"),
    ],
)
def test_a_scsi_response_becomes_an_error_that_a_person_understands(response, code, transient, words):
    """SCS-4: a TARGET_FAILURE is final, as all that is not marked transient."""
    error = explain(response)
    assert (error.errno, error.transient, error.offset) == (code, transient, 4096)
    assert words in str(error) and error.sense == response.sense and error.status == response.status


def test_a_residual_counts_for_transfers_alone():
    """SPDK's target reports UNMAP's parameters as not transferred, and has done it."""
    assert explain(Response(residual=24), transfer=False) is None
    assert explain(Response(residual=24, status=8), transfer=False).errno == errno.EBUSY


def test_a_response_that_was_not_written_is_an_error_of_its_own():
    error = scsi_errors.explain(Finished(0, MASK, b"\xff" * 108), 0, True)
    assert error.errno == errno.EIO and "without writing a response" in str(error)


@pytest.mark.parametrize(
    "status, code, words",
    [
        (1, errno.EIO, "IOERR"),
        (2, errno.EOPNOTSUPP, "UNSUPP"),
        (3, errno.EIO, "status 0x3"),
        (0xFF, errno.EIO, "without writing a status"),
    ],
)
def test_a_blk_status_becomes_an_error(status, code, words):
    error = blk._explain(Finished(0, status, bytes([status])), 512, True)
    assert (error.errno, error.status, error.offset) == (code, status, 512) and words in str(error)
