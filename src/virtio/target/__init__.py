"""A vhost-user target of our own: disks in memory or files, for QEMU's guests and anyone's tests."""

from virtio.target.process import Served as Served, serve as serve
from virtio.target.server import run as run

__all__ = ["Served", "run", "serve"]
