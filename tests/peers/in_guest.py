"""What tests/peers/test_guest.py runs in the guest, with the package as it is installed here.

in_guest.py fill CONFIG SEED    attach CONFIG, write and verify 16 MiB of each disk; prints what it saw
in_guest.py hold ADDRESS        attach, read on and on, and print a line for whatever happens
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from itertools import takewhile

import virtio_bdev
from virtio_bdev import Lost, config
from virtio_bdev.channel import Wait

NBYTES = 16 << 20
_CHUNK = 1 << 20


def fill(path: str, seed: int) -> None:
    """Half of the bytes by spinning, half by sleeping until an interrupt comes."""
    before = descriptors()
    controllers = [line.spec.attach() for line in config.load(path).lines]
    found = {}
    for controller in controllers:
        for name, bdev in controller.items():
            data = random.Random(f"{seed} {name}").randbytes(min(NBYTES, bdev.size))
            counts = {}
            ways: list[tuple[Wait, range]] = [
                ("poll", range(0, len(data), 2 * _CHUNK)),
                ("event", range(_CHUNK, len(data), 2 * _CHUNK)),
            ]
            for wait, places in ways:
                counted = interrupts()
                with bdev.open(wait=wait, timeout=30) as channel:
                    for at in places:
                        channel.write(at, data[at : at + _CHUNK])
                    channel.flush()
                    for at in places:
                        assert channel.read(at, _CHUNK) == data[at : at + _CHUNK], f"{name} at {at}"
                counts[wait] = interrupts() - counted
            found[name] = {
                "address": controller.address,
                "size": bdev.size,
                "serial": bdev.disk.serial,
                "sha256": hashlib.sha256(data).hexdigest(),
                "interrupts": counts,
                "queues": len(controller.device.leases),
                "legacy": controller.device.transport.legacy,
            }
    for controller in controllers:
        controller.close()
    controllers.clear()
    left = sorted(descriptors() - before)
    print(json.dumps({"disks": found, "left": left, "threads": threading.active_count()}))


def descriptors() -> set[str]:
    """What is open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    return found


def interrupts() -> int:
    """How many interrupts of a user's devices this machine has had."""
    total = 0
    with open("/proc/interrupts") as lines:
        for line in lines:
            if "vfio" in line or "uio_pci_generic" in line:
                of_each_processor = takewhile(str.isdigit, line.split()[1:])
                total += sum(map(int, of_each_processor))
    return total


def hold(address: str) -> None:
    """Until the device is lost: then let go of it."""
    with virtio_bdev.attach(address, timeout=10) as controller:
        stream = controller.events()
        reader = threading.Thread(target=_read, args=(controller, say))
        reader.start()
        say(f"attached {os.getpid()}")
        for event in stream:
            say(f"event {type(event).__name__} {[bdev.size for bdev in controller.values()]}")
            if isinstance(event, Lost):
                break
        reader.join(20)
        say(f"reader {'stuck' if reader.is_alive() else 'done'}")
    say("closed")


def _read(controller: virtio_bdev.Controller, say: Callable[[str], None]) -> None:
    (bdev,) = controller.values()
    reads = 0
    try:
        with bdev.open(timeout=10) as channel:
            while True:
                channel.read(reads * 4096 % bdev.size, 4096)
                reads += 1
    except virtio_bdev.VirtioError as error:
        say(f"after {'some' if reads else 'no'} reads: {type(error).__name__}: {error}")


def say(words: str) -> None:
    """One line, at once."""
    print(words, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "fill":
        fill(sys.argv[2], int(sys.argv[3]))
    else:
        hold(sys.argv[2])
