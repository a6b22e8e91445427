"""What every way to reach a device offers, and the start of every device: reset, negotiation."""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from virtio.errors import TransportError, VirtioError
from virtio.ring.format import SPLIT, RingFormat
from virtio.wire.virtio import ConfigField, Feature, Status, feature_names

if TYPE_CHECKING:
    from virtio.ring.doorbell import Doorbell
    from virtio.ring.lease import Life
    from virtio.ring.region import Mapping, Region

# Ring features that the rings here know how to honour.
RING_FEATURES = Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED
# And those that a transport may have use for, whatever the device.
TRANSPORT_FEATURES = (
    Feature.ANY_LAYOUT
    | Feature.ACCESS_PLATFORM
    | Feature.ORDER_PLATFORM
    | Feature.NOTIF_CONFIG_DATA
    | Feature.RING_RESET
)


class RingAreas(NamedTuple):
    """The areas of one ring, as offsets in a region that was mapped: each transport has its own addresses
    for them. The available ring is the driver's area, the used ring the device's (2.6).

    For a legacy device they begin at a multiple of 4096, and so does the used ring; their size is
    exactly what the device says (2.7.2).
    """

    region: Region
    size: int
    descriptor: int
    available: int
    used: int
    form: RingFormat = SPLIT


class QueuePort(NamedTuple):
    """A queue that was set up: how to kick it, and the eventfd of its completions.

    `polled`: there is no interrupt, and the eventfd is always readable.
    """

    doorbell: Doorbell
    completion_fd: int
    polled: bool = False


class Transport(Protocol):
    """A device within reach. The order of calls is that of a virtio initialization (3.1.1)."""

    address: str  # as a user wrote it: "user:/run/disk.sock"
    life: Life
    timeout: float  # seconds that bound each wait
    on_config_change: Callable[[], None]  # called in the control thread; does nothing until it is set
    allowed: int  # feature bits of rings and transport that may be accepted here
    required: int  # and those without which this transport does not work
    max_queues: int | None  # None: the transport sets no limit
    resets: bool  # whether after `renew` the device surely knows nothing of requests that it had
    has_config: bool  # whether `read_config` works
    legacy: bool  # older than version 1: no FEATURES_OK, and rings as `RingAreas` says

    def reset(self) -> None: ...
    def status(self) -> Status: ...
    def set_status(self, status: Status) -> None: ...
    def offered(self) -> int: ...
    def accept(self, features: int) -> None: ...
    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes: ...
    def largest_queue(self, index: int) -> int | None: ...  # None: it does not say; legacy: exact
    def region(self, nbytes: int) -> Region: ...  # memory that this device can be shown
    def map(self, region: Region) -> Mapping: ...
    def setup_queue(self, index: int, areas: RingAreas, base: int) -> QueuePort: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def renew(self) -> None: ...  # stop, for a new initialization of the same device
    def close(self) -> None: ...


@runtime_checkable
class Link(Transport, Protocol):
    """A transport whose other side can go away, and be connected to again."""

    gone: VirtioError | None  # why nobody is there; set before `on_gone` is called
    on_gone: Callable[[VirtioError], None]  # called in the control thread; ends `life` until it is set

    def hang_up(self) -> None: ...  # let go of the connection there is; its eventfds stay
    def reconnect(self) -> None: ...  # the same device as new, which knows no memory and no queues


def negotiate(transport: Transport, device: type[enum.IntFlag], wanted: int, needed: int) -> int:
    """Steps 1 to 6 of the initialization (3.1.1); the features that both sides now live by.

    `wanted` and `needed` are bits of the `device` type; those of rings and transport are decided
    here. TransportError if a needed one is missing or the device takes its consent back.
    """
    transport.reset()
    status = Status.ACKNOWLEDGE
    transport.set_status(status)
    status |= Status.DRIVER
    transport.set_status(status)
    offered = transport.offered()
    missing = (needed | transport.required) & ~offered
    if missing:
        transport.set_status(status | Status.FAILED)
        raise TransportError(
            errno.EOPNOTSUPP,
            f"{transport.address} does not offer {', '.join(feature_names(missing, device))}; it "
            f"offers {', '.join(feature_names(offered, device)) or 'nothing'}",
        )
    own = (RING_FEATURES | TRANSPORT_FEATURES) & transport.allowed | transport.required
    accepted = offered & (wanted | own)
    transport.accept(accepted)
    if transport.legacy:  # nobody asks it whether that will do (3.1.2)
        return accepted
    status |= Status.FEATURES_OK
    transport.set_status(status)
    if not transport.status() & Status.FEATURES_OK:
        transport.set_status(status | Status.FAILED)
        raise TransportError(
            errno.EOPNOTSUPP,
            f"{transport.address} refuses {', '.join(feature_names(accepted, device))}, though it "
            "offered all of them",
        )
    return accepted
