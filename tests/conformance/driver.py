"""The driver under test, by its public surface alone."""

from __future__ import annotations

import contextlib
import random
from array import array
from collections.abc import Iterator
from typing import Any

from tests.model import Backend, Blk, Scsi
from virtio.errors import VirtioError
from virtio_bdev import Channel, Controller, DevType, attach
from virtio_bdev.channel import Wait

KINDS = ("blk", "scsi")
DEPTHS = (None, 1)  # queues of 256, and of 4, beside which headers and responses are
TIMEOUT = 5.0


def device(kind: str, **changes: Any) -> Any:
    """The model's disk of one kind."""
    return Blk(**changes) if kind == "blk" else Scsi(**changes)


def backend(kind: str, **options: Any) -> Backend:
    """A back end with a disk of one kind and 1 MiB."""
    return Backend(device(kind), **options)


def connect(model: Backend, **arguments: Any) -> Controller:
    """Attach to the model."""
    kind: DevType = "blk" if isinstance(model.device, Blk) else "scsi"
    return attach(model.address, dev_type=kind, **({"timeout": TIMEOUT} | arguments))


@contextlib.contextmanager
def channel(
    model: Backend, *, timeout: float = TIMEOUT, wait: Wait = "adaptive", **arguments: Any
) -> Iterator[Channel]:
    """A channel to the first disk; afterwards all is closed and the model has seen it."""
    with connect(model, **arguments) as controller:
        bdev = next(iter(controller.values()))
        with bdev.open(timeout=timeout, wait=wait) as opened:
            yield opened
    ended(model)


def ended(model: Backend, sessions: int = 1) -> None:
    """Wait until the model has seen the end of so many connections."""
    assert model.wait_for(lambda: model.names().count("disconnect") >= sessions), "no disconnect"


def refused(model: Backend, clause: str, **arguments: Any) -> VirtioError:
    """Attaching must fail, with an error of ours; that error."""
    try:
        connect(model, **arguments).close()
    except VirtioError as error:
        ended(model)
        return error
    raise AssertionError(f"{clause}: attaching succeeded")


def fill(model: Backend, seed: int = 1) -> bytes:
    """Put random bytes on the model's disk, behind the driver's back."""
    disk = model.device.disk
    disk[:] = random.Random(seed).randbytes(len(disk))
    return bytes(disk)


def exercise(model: Backend, opened: Channel) -> None:
    """Some of everything, with the data compared on both sides."""
    content = fill(model)
    assert opened.read(0, 512) == content[:512], "data of a read"
    assert opened.read(0, len(content)) == content, "data of a long read"
    data = random.Random(2).randbytes(256 << 10)
    opened.write(64 << 10, data)
    assert model.device.disk[64 << 10 : 320 << 10] == data, "data of a long write"
    opened.write(512, data[:512])
    assert model.device.disk[512:1024] == data[:512], "data of a write"
    opened.flush()
    batch(model, opened, 100)


def batch(model: Backend, opened: Channel, count: int, seed: int = 3) -> None:
    """Read `count` sectors in one call and compare them."""
    content = bytes(model.device.disk)
    chance = random.Random(seed)
    offsets = array("Q", [512 * chance.randrange(len(content) // 512) for _ in range(count)])
    into = bytearray(512 * count)
    opened.read_batch(offsets, 512, into).raise_for_status()
    want = b"".join(content[offset : offset + 512] for offset in offsets)
    assert into == want, f"SPL-14: wrong data in a batch of {count}"
