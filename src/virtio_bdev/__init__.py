"""Block devices over virtio, with no VM and no kernel driver in the way.

with virtio_bdev.attach("user:/run/vhost.0", dev_type="blk") as controller:
    for bdev in controller.values():
        with bdev.open() as channel:
            print(bdev.name, channel.read(0, 512))
"""

from virtio.device.disk import Limits
from virtio.device.probe import Reply as ScsiReply
from virtio.errors import (
    ChannelInUse,
    ClosedError,
    DeviceError,
    NoQueueError,
    ProtocolError,
    QueueFullError,
    ReadOnlyError,
    RequestError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.ring.buffer import Buffer
from virtio_bdev.bdev import Bdev
from virtio_bdev.channel import Batch, Channel, Wait
from virtio_bdev.events import Added, Event, Events, Lost, Removed, Resized
from virtio_bdev.qos import RateLimits
from virtio_bdev.registry import Controller, DevType, Rings, attach
from virtio_bdev.stats import IoCounts, IoStats

__all__ = [
    "Added",
    "Batch",
    "Bdev",
    "Buffer",
    "Channel",
    "ChannelInUse",
    "ClosedError",
    "Controller",
    "DevType",
    "DeviceError",
    "Event",
    "Events",
    "IoCounts",
    "IoStats",
    "Limits",
    "Lost",
    "NoQueueError",
    "ProtocolError",
    "QueueFullError",
    "RateLimits",
    "ReadOnlyError",
    "Removed",
    "RequestError",
    "RequestTimeout",
    "Resized",
    "Rings",
    "ScsiReply",
    "TransportError",
    "VirtioError",
    "Wait",
    "attach",
]
