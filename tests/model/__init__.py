"""A recording device model: a vhost-user back end that trusts and imports nothing of the driver.

Its structures are typed from the virtio 1.4 specification and QEMU's docs/interop/vhost-user.rst.
It serves a virtio-blk or virtio-scsi disk held in memory, records what the front end does, checks
every clause that it can see (`violations`), and misbehaves on request (`Options`).
"""

from tests.model.backend import Backend
from tests.model.blk import Blk
from tests.model.options import Options
from tests.model.ring import Chain, Ring
from tests.model.scsi import Scsi
from tests.model.session import Record, Reply

__all__ = ["Backend", "Blk", "Chain", "Options", "Record", "Reply", "Ring", "Scsi"]
