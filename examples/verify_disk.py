"""Write a pattern over a whole disk, read it back in random order, and say what is wrong.

    python verify_disk.py user:/run/disk.sock blk

Every block holds its own number, so that a lost, misplaced or torn write is told from the others.
All that the disk held is lost.
"""

import random
import struct
import sys
from array import array

import virtio_bdev
from virtio_bdev import Bdev, Channel, Controller, DevType

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


def main() -> None:
    _, address, kind = sys.argv
    dev_type: DevType = "blk" if kind == "blk" else "scsi"
    with virtio_bdev.attach(address, dev_type=dev_type) as controller:
        for bdev in controller.values():
            with bdev.open() as channel:
                bad = verify(controller, bdev, channel)
            print(f"{bdev.name}: {bad} bad blocks of {bdev.size // BLOCK}")


if __name__ == "__main__":
    main()
