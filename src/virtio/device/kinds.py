"""Which kind of device something is by what it offers, for whoever takes it for the other."""

from __future__ import annotations

DEVICE_BITS = 0xFFFFFF  # feature bits whose meaning the device type decides (6)
_SCSI_BITS = 0xF  # those that virtio-scsi has names for; virtio-blk has most of its own above them


def looks_like(offered: int) -> str:
    """ "blk" or "scsi", or "" where no feature speaks for either."""
    own = offered & DEVICE_BITS
    if own & ~_SCSI_BITS:
        return "blk"
    return "scsi" if own else ""


def mistaken(address: str, kind: str) -> str:
    """What an error says of a device of this kind that was taken for the other."""
    other = "blk" if kind == "scsi" else "scsi"
    return (
        f"{address} is a virtio-{kind} device by what it offers, not virtio-{other}: dev_type {kind} "
        f'(`--dev-type {kind}`, `dev_type="{kind}"`, or the word {kind} in a configuration file)'
    )
