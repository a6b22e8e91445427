"""Tasks: what is refused before anything is sent."""

from array import array

import pytest

from virtio.errors import RequestError
from virtio.ring.task import Task, first_bad_offset
from virtio.ring.template import Template


@pytest.mark.parametrize(
    "offsets, want",
    [
        ([], -1),
        ([0, 512, 3584], -1),
        ([0, 100], 1),  # off the grid
        ([0, 512, 4096], 2),  # the item ends past the disk
        ([1 << 63], 0),
        ([(1 << 64) - 512], 0),  # no wrap-around
    ],
)
def test_offsets_are_checked_before_anything_is_sent(offsets, want):
    assert first_bad_offset(memoryview(array("Q", offsets)), 512, 512, 4096) == want


def test_a_task_refuses_memory_that_is_too_small():
    with pytest.raises(RequestError, match="100 bytes for 1 items of 512"):
        Task(Template(b""), memoryview(array("Q", [0])), 512, 512, user=memoryview(bytearray(100)))
    with pytest.raises(RequestError, match="64-bit"):
        Task(Template(b""), memoryview(array("I", [0])), 512, 512)
