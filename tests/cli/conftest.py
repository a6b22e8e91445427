"""Disks of the embedded target whose bytes can be seen in a file."""

import pytest

from virtio.target import serve


@pytest.fixture(scope="session")
def blk():
    """A virtio-blk disk of 4 MiB in 4096-byte blocks."""
    with serve("blk", "ram:4M,bs=4096,id=SN1") as target:
        yield target


@pytest.fixture(scope="session")
def scsi():
    """A virtio-scsi target with three disks, the last of them read-only."""
    with serve("scsi", "ram:8M,id=A", "5:3=ram:1M,bs=4096,id=B", "ram:1M,ro,id=C") as target:
        yield target


@pytest.fixture
def image(tmp_path):
    """A file of 1 MiB for a disk of the `disk` fixture."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def disk(image):
    """A virtio-blk disk of 1 MiB in 512-byte blocks."""
    with serve("blk", f"file:{image}") as target:
        yield target
