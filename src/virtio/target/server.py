"""The target process: listens on a socket and serves one front end after another.

Each session is a process of its own, so that a front end which shrinks its memory under us
(SIGBUS), or whatever else goes wrong, ends that session and nothing more.
"""

from __future__ import annotations

import argparse
import ctypes
import enum
import errno
import os
import re
import select
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import NoReturn

from virtio.errors import RequestError, TransportError, VirtioError
from virtio.target.blk import BlkDevice
from virtio.target.scsi import LogicalUnit, Target
from virtio.target.session import EXTENSIONS, FEATURES, MAX_QUEUES, Device, Session
from virtio.target.store import parse_disk
from virtio.target.virtio_scsi import ScsiDevice
from virtio.wire.blk import BlkFeature
from virtio.wire.vhost_user import PROTOCOL_FEATURES, ProtocolFeature
from virtio.wire.virtio import Feature
from virtio.wire.virtio_scsi import ScsiFeature

DEV_TYPES = ("scsi", "blk")

_PR_SET_PDEATHSIG = 1  # prctl(2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_MS = 2000  # for a session to end when its front end has left
_WHY = {
    "SIGBUS": " (did the shared memory shrink?)",
    "SIGKILL": " (it was stuck when its front end left)",
}


def run(
    path: str,
    dev_type: str,
    disks: Sequence[str],
    queues: int = 4,
    *,
    without: Iterable[str] = (),
    lifeline: int | None = None,
) -> None:
    """Serve the disks on the socket `path` until SIGINT or SIGTERM; call from the main thread.

    Prints "ready: PATH" when front ends can connect. `disks` are as `parse_disk` has them, for
    scsi perhaps behind "TARGET:LUN="; `queues` counts request queues. `without` names features
    not to offer. When `lifeline`, a descriptor, is at its end, that ends the target too.
    """
    device = make_device(dev_type, disks, queues)
    features, extensions = offers(dev_type, without)
    device.features &= features
    features, extensions = features & FEATURES, extensions & EXTENSIONS
    listener = _listen(path)
    inode = os.stat(path).st_ino
    before = {number: signal.signal(number, signal.default_int_handler) for number in _SIGNALS}
    try:
        print(f"ready: {path}", flush=True)
        _accept(listener, device, features, extensions, lifeline)
    except KeyboardInterrupt:
        pass
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        listener.close()
        if os.path.exists(path) and os.stat(path).st_ino == inode:
            os.unlink(path)
        for number, handler in before.items():
            signal.signal(number, handler)


def make_device(dev_type: str, disks: Sequence[str], queues: int) -> Device:
    """The device that the disks make up; RequestError for one that cannot be."""
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
        if target > 255 or lun > 16383 or lun in targets.get(target, {}):
            raise RequestError(f"{target}:{lun} for {disk!r} is taken, or over 255:16383")
        store = parse_disk(disk[match.end() :] if match else disk)
        targets.setdefault(target, {})[lun] = LogicalUnit(store)
    return ScsiDevice({target: Target(luns) for target, luns in targets.items()}, queues)


def offers(dev_type: str, without: Iterable[str]) -> tuple[int, int]:
    """Masks of the feature bits and protocol feature bits that remain without those named."""
    kind: type[enum.IntFlag] = BlkFeature if dev_type == "blk" else ScsiFeature
    named = {**Feature.__members__, **kind.__members__, "PROTOCOL_FEATURES": PROTOCOL_FEATURES}
    features = extensions = ~0
    for name in without:
        feature, extension = named.get(name, 0), ProtocolFeature.__members__.get(name, 0)
        if not feature and not extension:
            raise RequestError(f"{name!r} is not the name of a {dev_type} or vhost-user feature")
        features &= ~feature
        extensions &= ~extension
    return features, extensions


def _listen(path: str) -> socket.socket:
    """Listen at `path`; the socket of a dead target gives way, nothing else does."""
    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise TransportError(f"{path} exists and is not a socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            if probe.connect_ex(path) != errno.ECONNREFUSED:  # one with a full backlog lives too
                raise TransportError(f"{path} belongs to a living process")
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        raise TransportError(f"{path}: {error.strerror or error}") from error
    return listener


def _accept(
    listener: socket.socket, device: Device, features: int, extensions: int, lifeline: int | None
) -> None:
    """Serve front ends one after another, until `lifeline` ends or for ever."""
    while _wait(listener.fileno(), lifeline):
        sock, _ = listener.accept()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if pid == 0:
            listener.close()
            _serve(sock, device, features, extensions)
        child = os.pidfd_open(pid)
        ended = False
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            ended = _wait(child, lifeline, sock.fileno())
        finally:
            os.close(child)
            os.kill(pid, signal.SIGKILL)  # of no effect on one that has ended
            _, status = os.waitpid(pid, 0)
            sock.close()
        if not ended:
            return
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            print(f"session ended: killed by {name}{_WHY.get(name, '')}", file=sys.stderr, flush=True)


def _wait(fd: int, lifeline: int | None, front_end: int | None = None) -> bool:
    """Wait until `fd` is readable, or the front end is gone for longer than a session takes to end.

    False when `lifeline` came to its end first.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if lifeline is not None:
        poll.register(lifeline, select.POLLIN)
    if front_end is not None:
        poll.register(front_end, select.POLLRDHUP)
    grace: int | None = None
    while True:
        ready = [number for number, _ in poll.poll(grace)]
        if lifeline in ready and not os.read(lifeline, 4096):
            return False
        if fd in ready or not ready:
            return True
        if front_end in ready:
            poll.unregister(front_end)
            grace = _GRACE_MS


def _serve(sock: socket.socket, device: Device, features: int, extensions: int) -> NoReturn:
    """The session's own process, from fork to exit."""
    code = 1
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Session(sock, device, features, extensions).run()
        code = 0
    except VirtioError as error:
        print(f"session ended: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


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
    parser.add_argument("--without", action="append", default=[], metavar="FEATURE", help="do not offer it")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input does")
    chosen = parser.parse_args(arguments)
    try:
        run(
            chosen.socket,
            chosen.dev_type,
            chosen.disk,
            chosen.queues,
            without=chosen.without,
            lifeline=sys.stdin.fileno() if chosen.lifeline else None,
        )
    except (VirtioError, OSError) as error:
        parser.exit(1, f"virtio.target: {error}\n")
