"""What a target is made of: its device, its features, its sockets; and the command line."""

from __future__ import annotations

import argparse
import enum
import re
import signal
import sys
from collections.abc import Iterable, Sequence

from virtio.errors import RequestError, VirtioError
from virtio.target.blk import BlkDevice
from virtio.target.host import SIGNALS, Host
from virtio.target.scsi import LogicalUnit, Target
from virtio.target.session import EXTENSIONS, FEATURES, MAX_QUEUES
from virtio.target.store import parse_disk
from virtio.target.virtio_scsi import ScsiDevice
from virtio.wire.blk import BlkFeature
from virtio.wire.vhost_user import PROTOCOL_FEATURES, ProtocolFeature
from virtio.wire.virtio import Feature
from virtio.wire.virtio_scsi import MAX_LUN, MAX_TARGET, ScsiFeature

DEV_TYPES = ("scsi", "blk")
LARGEST = (MAX_TARGET, MAX_LUN)


def run(
    path: str,
    dev_type: str,
    disks: Sequence[str],
    queues: int = 4,
    *,
    packed: bool = False,
    without: Iterable[str] = (),
    lifeline: int | None = None,
    control: str | None = None,
) -> None:
    """Serve the disks on the socket `path` until SIGINT or SIGTERM; call from the main thread.

    Prints "ready: PATH" when front ends can connect. `disks` are each a SPEC of docs/cli.md, for
    scsi perhaps behind "TARGET:LUN="; `queues` counts request queues. `packed` offers packed rings;
    `without` names features not to offer. When `lifeline`, a descriptor, is at its end, that ends the
    target too. `control` is the path of another socket, for JSON-RPC: see docs/cli.md.
    """
    device = make_device(dev_type, disks, queues, largest=None if control is None else LARGEST)
    features, extensions = offers(dev_type, without)
    device.features &= features
    ours = FEATURES | Feature.RING_PACKED if packed else FEATURES
    features, extensions = features & ours, extensions & EXTENSIONS
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    try:
        with Host(path, device, features, extensions, lifeline=lifeline, control=control) as host:
            try:
                print(f"ready: {path}", flush=True)
                host.run()
            finally:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_device(
    dev_type: str, disks: Sequence[str], queues: int, *, largest: tuple[int, int] | None = None
) -> ScsiDevice | BlkDevice:
    """The device that the disks make up; RequestError for one that cannot be.

    `largest` are the SCSI target and LUN that may come to be, None for those of the disks.
    """
    if dev_type not in DEV_TYPES:
        raise RequestError(f"device type {dev_type!r}, want scsi or blk")
    most = MAX_QUEUES if dev_type == "blk" else MAX_QUEUES - 2
    if not 0 < queues <= most:
        raise RequestError(f"{queues} queues, want 1 to {most}")
    if dev_type == "blk":
        if len(disks) != 1:
            raise RequestError(f"{len(disks)} disks, a blk target has one")
        return BlkDevice(parse_disk(disks[0]), queues)
    if not disks:
        raise RequestError("no disks, a scsi target has at least one")
    targets: dict[int, dict[int, LogicalUnit]] = {}
    for disk in disks:
        match = re.match(r"(\d+):(\d+)=", disk)
        target = int(match[1]) if match else max(targets, default=-1) + 1
        lun = int(match[2]) if match else 0
        if target > MAX_TARGET or lun > MAX_LUN:
            raise RequestError(f"{target}:{lun} for {disk!r}, want up to {MAX_TARGET}:{MAX_LUN}")
        if lun in targets.get(target, {}):
            raise RequestError(f"{target}:{lun} for {disk!r} is taken by another disk")
        store = parse_disk(disk[match.end() :] if match else disk)
        targets.setdefault(target, {})[lun] = LogicalUnit(store)
    return ScsiDevice({target: Target(luns) for target, luns in targets.items()}, queues, largest=largest)


def offers(dev_type: str, without: Iterable[str]) -> tuple[int, int]:
    """Masks of the feature bits and protocol feature bits that remain without those named."""
    kind: type[enum.IntFlag] = BlkFeature if dev_type == "blk" else ScsiFeature
    named = {**Feature.__members__, **kind.__members__, "PROTOCOL_FEATURES": PROTOCOL_FEATURES}
    features = extensions = ~0
    for name in without:
        feature, extension = int(named.get(name, 0)), int(ProtocolFeature.__members__.get(name, 0))
        if not feature and not extension:
            raise RequestError(f"{name!r} is not the name of a {dev_type} or vhost-user feature")
        features &= ~feature
        extensions &= ~extension
    return features, extensions


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line, for those who have the library alone."""
    parser = argparse.ArgumentParser(
        prog="virtio.target", description="A vhost-user disk for QEMU, tests and other front ends."
    )
    parser.add_argument("socket", help="path of the socket to listen on")
    parser.add_argument("--dev-type", choices=DEV_TYPES, default="scsi")
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="[T:L=]ram:SIZE|file:PATH[,ro][,bs=SIZE][,id=SERIAL]",
        help="repeat for more SCSI targets; T:L= names target and LUN",
    )
    parser.add_argument("--queues", type=int, default=4, help="request queues")
    parser.add_argument("--packed", action="store_true", help="offer packed rings")
    parser.add_argument("--without", action="append", default=[], metavar="FEATURE", help="do not offer it")
    parser.add_argument("--control", metavar="SOCKET", help="take changes by JSON-RPC on this socket")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input does")
    chosen = parser.parse_args(arguments)
    try:
        run(
            chosen.socket,
            chosen.dev_type,
            chosen.disk,
            chosen.queues,
            packed=chosen.packed,
            without=chosen.without,
            lifeline=sys.stdin.fileno() if chosen.lifeline else None,
            control=chosen.control,
        )
    except (VirtioError, OSError) as error:
        parser.exit(1, f"virtio.target: {error}\n")
