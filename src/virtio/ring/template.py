"""What requests of one kind have in common: the header's bytes, and where each request differs."""

from __future__ import annotations

import itertools
from array import array
from typing import TYPE_CHECKING, NamedTuple

import cython

from virtio.ring.codes import FROM_DEVICE, NO_DATA, TO_DEVICE
from virtio.ring.stats import OTHER, READ, UNMAP, WRITE

if not cython.compiled:
    from virtio.ring._mem import null, window

if TYPE_CHECKING:
    from collections.abc import Sequence

_keys = itertools.count(1)


class Patch(NamedTuple):
    """Store `source >> shift` in `width` bytes at `offset` of the header and payload."""

    source: int
    offset: int
    width: int
    big_endian: bool = False
    shift: int = 0


class Template:
    """One operation: header bytes, an inline payload that follows them, patches, direction.

    The data is as long as the range it is for, unless `data_bytes` says how long it always is. `unmap`
    says that it is counted as one.
    """

    def __init__(
        self,
        request: bytes,
        *,
        payload: bytes = b"",
        direction: int = NO_DATA,
        data_bytes: int = 0,
        patches: Sequence[Patch] = (),
        unmap: bool = False,
    ) -> None:
        if payload and direction != NO_DATA:
            raise ValueError("a template has an inline payload or outside data, not both")
        for patch in patches:
            if not 0 <= patch.offset <= len(request) + len(payload) - patch.width:
                raise ValueError(f"{patch} is outside of {len(request) + len(payload)} bytes")
        self.key = next(_keys) & 0xFFFFFFFF
        self.direction = direction
        self.data_bytes = data_bytes
        self.request_bytes = len(request)
        self.payload_bytes = len(payload)
        self._bytes = bytes(request + payload)
        self._mem = window(self._bytes)
        self.transfer = direction != NO_DATA and not data_bytes  # its data is that of the range
        self.kind = OTHER
        if unmap:
            self.kind = UNMAP
        elif self.transfer:
            self.kind = READ if direction == FROM_DEVICE else WRITE
        self.changes = bool(payload) or direction == TO_DEVICE  # the disk
        self._patches = array("H", [field for patch in patches for field in patch])
        self._patch = window(self._patches) if patches else null()
        self._patch_count = len(patches)
