"""Random reads of 4 KiB from Python, in one of several ways: prints how many a second.

ways.py batch|blocking|asyncio|libnbd SOCKET DEPTH SECONDS
ways.py blocking SOCKET DEPTH SECONDS scsi
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from functools import partial
from typing import Literal

BLOCK, BLOCKS = 4096, 1 << 18
OFFSETS = [BLOCK * random.Random(1).randrange(BLOCKS) for _ in range(1 << 14)]


def batch(socket: str, depth: int, seconds: float) -> float:
    import virtio_bdev

    with virtio_bdev.attach(f"user:{socket}", dev_type="blk", queues=1, depth=depth) as controller:
        (bdev,) = controller.values()
        offsets = array("Q", OFFSETS[:4096])
        with bdev.open(wait="poll") as channel, controller.buffer(len(offsets) * BLOCK) as into:
            done, end = 0, time.monotonic() + seconds
            begun = time.monotonic()
            while time.monotonic() < end:
                channel.read_batch(offsets, BLOCK, into)
                done += len(offsets)
            return done / (time.monotonic() - begun)


def blocking(socket: str, depth: int, seconds: float, kind: Literal["blk", "scsi"] = "blk") -> float:
    import virtio_bdev

    with virtio_bdev.attach(f"user:{socket}", dev_type=kind, queues=1, depth=depth) as controller:
        (bdev,) = controller.values()
        offsets = [offset % bdev.size for offset in OFFSETS[:256]]
        with bdev.open(wait="poll") as channel, controller.buffer(BLOCK) as into:
            done, begun = 0, time.monotonic()
            while time.monotonic() < begun + seconds:
                for offset in offsets:
                    channel.readinto(offset, into)
                done += 256
            return done / (time.monotonic() - begun)


def in_asyncio(socket: str, depth: int, seconds: float) -> float:
    import asyncio

    from virtio_bdev import Buffer, aio

    async def worker(channel: aio.Channel, into: Buffer, number: int, end: float) -> int:
        done = 0
        while time.monotonic() < end:
            for offset in OFFSETS[number * 64 : number * 64 + 64]:
                await channel.readinto(offset, into)
            done += 64
        return done

    async def main() -> float:
        async with await aio.attach(f"user:{socket}", dev_type="blk", queues=1) as controller:
            (bdev,) = controller.values()
            async with bdev.open() as channel:
                buffers = [controller.buffer(BLOCK) for _ in range(depth)]
                begun = time.monotonic()
                workers = (worker(channel, into, n, begun + seconds) for n, into in enumerate(buffers))
                done = await asyncio.gather(*workers)
                return sum(done) / (time.monotonic() - begun)

    return asyncio.run(main())


def libnbd(socket: str, depth: int, seconds: float) -> float:
    import nbd

    handle = nbd.NBD()
    handle.set_export_name("disk")
    handle.connect_unix(socket)
    buffers = [nbd.Buffer(BLOCK) for _ in range(depth)]
    done = number = 0
    begun = time.monotonic()
    flying: list[int | None] = [None] * depth
    while time.monotonic() < begun + seconds:
        for slot in range(depth):
            if flying[slot] is None:
                flying[slot] = handle.aio_pread(buffers[slot], OFFSETS[number % len(OFFSETS)])
                number += 1
        handle.poll(-1)
        for slot in range(depth):
            cookie = flying[slot]
            if cookie is not None and handle.aio_command_completed(cookie):
                flying[slot] = None
                done += 1
    return done / (time.monotonic() - begun)


if __name__ == "__main__":
    ways = {"batch": batch, "blocking": blocking, "asyncio": in_asyncio, "libnbd": libnbd}
    if sys.argv[5:] == ["scsi"]:
        ways["blocking"] = partial(blocking, kind="scsi")
    way, socket, depth, seconds = ways[sys.argv[1]], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    if sys.argv[1] != "libnbd":  # whose server ends with its first client
        way(socket, depth, 0.2)  # a daemon adapts to what it has seen
    print(way(socket, depth, seconds))
