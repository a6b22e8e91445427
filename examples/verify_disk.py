"""Write a pattern over a whole disk, read it back in random order, and say what is wrong.

    python verify_disk.py user:/run/disk.sock blk

Every block holds its own number, so that a lost, misplaced or torn write is told from the others.
All that the disk held is lost. The exit status is 1 if a block is bad, or if there is an error.
"""

import random
import struct
import sys
from array import array

import virtio_bdev
from virtio_bdev import Bdev, Channel, Controller, DevType, VirtioError

BLOCK = 4096
AT_ONCE = 1024  # blocks of one batch


def pattern(offset: int) -> bytes:
    return struct.pack("<Q", offset) * (BLOCK // 8)


def verify(controller: Controller, bdev: Bdev, channel: Channel) -> int:
    """The number of bad blocks."""
    offsets = list(range(0, bdev.size - bdev.size % BLOCK, BLOCK))
    bad = 0
    with controller.buffer(AT_ONCE * BLOCK) as buffer:
        for shuffled in (False, True):
            if shuffled:
                random.shuffle(offsets)
            for start in range(0, len(offsets), AT_ONCE):
                batch = array("Q", offsets[start : start + AT_ONCE])
                if shuffled:
                    channel.read_batch(batch, BLOCK, buffer).raise_for_status()
                    with memoryview(buffer) as view:
                        found = [bytes(view[i * BLOCK : (i + 1) * BLOCK]) for i in range(len(batch))]
                    for offset, data in zip(batch, found, strict=True):
                        if data != pattern(offset):
                            print(f"bad block at {offset}", file=sys.stderr)
                            bad += 1
                else:
                    data = b"".join(map(pattern, batch))
                    channel.write_batch(batch, BLOCK, data).raise_for_status()
    channel.flush()
    return bad


def verify_all(address: str, dev_type: DevType) -> int:
    """The number of bad blocks of all disks."""
    total = 0
    with virtio_bdev.attach(address, dev_type=dev_type) as controller:
        for bdev in controller.values():
            with bdev.open() as channel:
                bad = verify(controller, bdev, channel)
            print(f"{bdev.name}: {bad} bad blocks of {bdev.size // BLOCK}")
            total += bad
    return total


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    _, address, kind = sys.argv
    try:
        bad = verify_all(address, "blk" if kind == "blk" else "scsi")
    except VirtioError as error:
        sys.exit(f"verify_disk.py: {error}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
