"""Controllers attached to the embedded target."""

import os

import pytest

import virtio_bdev
from virtio.target import serve


@pytest.fixture(params=["blk", "scsi"])
def controller(request, tmp_path):
    """One 16 MiB disk whose bytes can be read outside, on four queues."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 16 << 20)
    with (
        serve(request.param, f"file:{image}", queues=4) as target,
        virtio_bdev.attach(target.address, dev_type=request.param, queues=4) as controller,
    ):
        controller.image = image
        yield controller


@pytest.fixture
def bdev(controller):
    return next(iter(controller.values()))


@pytest.fixture
def channel(bdev):
    with bdev.open() as channel:
        yield channel
