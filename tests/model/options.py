"""What a back end offers, and the ways in which it can be told to misbehave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.model.wire import F, P

if TYPE_CHECKING:
    from tests.model.ring import Chain, Ring
    from tests.model.session import Reply

RING_FEATURES = F.VERSION_1 | F.PROTOCOL_FEATURES | F.INDIRECT_DESC | F.EVENT_IDX
PROTOCOL_FEATURES = (
    P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.CONFIGURE_MEM_SLOTS | P.STATUS | P.RESET_DEVICE
)


@dataclass
class Options:
    """Change any of these before a front end connects; those of the second half at any time."""

    features: int = RING_FEATURES
    """What GET_FEATURES offers beside the device's own bits."""
    protocol_features: int = PROTOCOL_FEATURES
    queue_num: int = 4
    """What GET_QUEUE_NUM reports; also the most rings that may be set up."""
    max_queue_size: int = 1024
    min_queue_size: int = 1
    max_mem_slots: int = 8

    # The conversation.
    hang_on: str = ""
    """A message that is read and never answered, nor anything after it."""
    drop_at: str = ""
    """A message on which the connection is closed."""
    replies: dict[str, Callable[[Reply], Reply | None]] = field(default_factory=dict)
    """Changes the reply, or the ack, to a message of this name; None sends nothing."""
    acks: dict[str, int] = field(default_factory=dict)
    """REPLY_ACK values other than 0."""
    fragment: bool = False
    """Replies go out a byte at a time."""
    refuse_status: int = 0
    """Bits of the device status that do not stick when written."""

    # The rings.
    polling: bool = False
    """Watch the available index instead of sleeping on the kick descriptor."""
    no_notify: bool = False
    """Set used.flags to 1; sensible with `polling` only."""
    avail_event: Callable[[Ring], int] | None = None
    """What to write to avail_event, whenever chains were taken, instead of the index to be woken
    at; sensible with `polling` only."""
    noise: bool = False
    """Fill what the driver must ignore: used.flags with EVENT_IDX, avail_event without."""
    order: Callable[[list[Chain]], list[Chain]] | None = None
    """The order in which the chains that were found together are completed."""
    hold: Callable[[Chain], bool] | None = None
    """Chains to keep until `Backend.release`."""
    complete: Callable[[Ring, Chain, int], list[tuple[int, int]]] | None = None
    """The (id, length) entries to put on the used ring for a chain and its true length."""
    skip_used: int = 0
    """How much too far the used index goes at the next completion."""
    spurious_calls: int = 0
    """Calls made beside each one that is due."""
    always_call: bool = False
    """Call at each completion, whatever the driver asked for."""
