"""The four kinds of doorbell."""

import errno
import mmap
import os
import threading

import pytest

from virtio.ring.doorbell import Doorbell


@pytest.fixture
def memory():
    """Two pages of ones, as of a BAR: its descriptor and a mapping."""
    fd = os.memfd_create("bar")
    os.write(fd, b"\xff" * 8192)
    mapped = mmap.mmap(fd, 8192)
    yield fd, mapped
    mapped.close()
    os.close(fd)


@pytest.mark.parametrize("width, stored", [(2, b"\x34\x12"), (4, b"\x34\x12\x00\x00")])
def test_a_mapped_register_is_stored_to_with_its_width(memory, width, stored):
    """PCI-21: and its neighbours keep what they have."""
    _, mapped = memory
    bell = Doorbell(memory=mapped, at=4100, value=0x1234, width=width)
    bell.ring()
    assert mapped[4096:4108] == (b"\xff" * 4 + stored).ljust(12, b"\xff")
    assert bell.failure == 0
    del bell


@pytest.mark.parametrize("width, stored", [(2, b"\x34\x12"), (4, b"\x34\x12\x00\x00")])
def test_a_register_in_a_file_is_written_in_one_piece(memory, width, stored):
    """PCI-21."""
    fd, mapped = memory
    bell = Doorbell(fd, at=4100, value=0x1234, width=width)
    bell.ring()
    assert mapped[4096:4108] == (b"\xff" * 4 + stored).ljust(12, b"\xff")
    assert bell.failure == 0


def test_a_register_at_offset_0_is_one(memory):
    fd, mapped = memory
    Doorbell(fd, at=0, value=1).ring()
    assert mapped[:4] == b"\1\0\xff\xff"
    Doorbell(memory=mapped, at=0, value=2).ring()
    assert mapped[:4] == b"\2\0\xff\xff"


def test_an_eventfd_is_signalled():
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    bell = Doorbell(fd)
    bell.ring()
    bell.ring()
    assert os.eventfd_read(fd) == 2
    os.close(fd)


def test_anything_else_is_called_and_by_any_thread():
    rung = []
    bell = Doorbell(call=lambda: rung.append(threading.current_thread().name))
    thread = threading.Thread(target=bell.ring, name="other")
    thread.start()
    thread.join()
    Doorbell().ring()  # nobody's
    assert rung == ["other"]


def test_what_goes_wrong_is_left_for_who_waits(memory):
    fd, _ = memory
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    bell = Doorbell(reader, at=0, value=1)
    bell.ring()
    assert bell.failure == errno.EBADF
    os.close(reader)


def test_a_register_in_a_full_file_is_not_there():
    fd = os.open("/dev/full", os.O_RDWR)
    bell = Doorbell(fd, at=0, value=1)
    bell.ring()
    assert bell.failure == errno.ENOSPC
    os.close(fd)


def test_the_mapping_lives_as_long_as_its_doorbell(memory):
    _, mapped = memory
    bell = Doorbell(memory=mapped, at=0, value=1)
    with pytest.raises(BufferError):
        mapped.close()
    bell.ring()


@pytest.mark.parametrize(
    "register",
    [
        {"at": 1},
        {"at": 8191},
        {"at": 8192},
        {"at": 8190, "width": 4},
        {"at": -2},
        {"at": 0, "width": 8},
        {"at": 0, "value": 0x10000},
        {"at": 0, "value": -1},
    ],
    ids=str,
)
def test_a_register_that_cannot_be_is_refused(memory, register):
    _, mapped = memory
    with pytest.raises(ValueError, match="doorbell of"):
        Doorbell(memory=mapped, **{"value": 1} | register)
    with pytest.raises(ValueError, match="cannot be written"):
        Doorbell(memory=memoryview(mapped).toreadonly(), at=0)
