"""A PCI function of this machine, through whichever driver has left it to us."""

from __future__ import annotations

import errno

from virtio.errors import TransportError
from virtio.transport.pci import Pci, open_pci
from virtio.transport.pci_legacy import LegacyPci
from virtio.transport.sysfs import UIO, VFIO, PciFunction
from virtio.transport.uio import UioWindows
from virtio.transport.vfio import VfioWindows


def connect(function: PciFunction, timeout: float) -> Pci | LegacyPci:
    """The device, each wait for which is bounded by `timeout` seconds.

    TransportError if it has another driver, or cannot be had; ProtocolError if it is no device for us.
    """
    function = function.again()
    if function.driver == VFIO:
        return open_pci(VfioWindows(function), timeout)
    if function.driver == UIO:
        return open_pci(UioWindows(function), timeout)
    held = "no driver" if function.driver is None else f"the driver {function.driver}"
    uses = "".join(f", and {use}" for use in function.uses())
    raise TransportError(
        errno.EBUSY,
        f"{function.address} has {held}{uses}: `virtio-bdev pci bind {function.address}` gives it to {VFIO}",
    )
