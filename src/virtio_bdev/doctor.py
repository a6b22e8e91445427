"""What this machine can do for virtio storage, and the command that mends what it cannot."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from virtio.device.kinds import looks_like
from virtio.errors import VirtioError
from virtio.ring.region import HUGE_PAGE
from virtio.transport import sysfs
from virtio.transport.session import Session
from virtio.transport.sysfs import UIO, VFIO, PciFunction
from virtio.transport.vfio import CONTAINER, LEAST_POOL, may_lock
from virtio.wire.vhost_user import Request, decode_u64

State: TypeAlias = Literal["ok", "could", "no"]

_ANSWER_S = 5.0  # as `attach` waits unless it is told otherwise


class Finding(NamedTuple):
    """One thing that was looked at: "ok", "could" be better, or "no"; `mend` is a command, or advice."""

    subject: str
    state: State
    words: str
    mend: str = ""


def examine(addresses: tuple[str, ...] = (), root: Path = Path("/")) -> Iterator[Finding]:
    """Look at the machine, or only at what these addresses need. `root` is where its files are."""
    sockets = [address.removeprefix("user:") for address in addresses if address.startswith("user:")]
    wanted = [address.removeprefix("pci:") for address in addresses if address.startswith("pci:")]
    if sockets or not wanted:
        yield _descriptors()
        for path in sockets:
            yield _socket(path)
    yield _huge_pages(root)
    if sockets and not wanted:
        return
    yield _memlock()
    yield _iommu(root)
    yield from _vfio(root)
    functions = sysfs.functions(root / "sys/bus/pci")
    for address in wanted:
        if address not in [function.address for function in functions]:
            yield Finding(f"pci:{address}", "no", "there is no such virtio device", "virtio-bdev pci list")
    chosen = [function for function in functions if not wanted or function.address in wanted]
    if not functions and not wanted:
        yield Finding("PCI devices", "could", "no virtio-blk or virtio-scsi device on the PCI bus")
    for function in chosen:
        yield _function(function, root)


def _descriptors() -> Finding:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = f"{limit} file descriptors; a controller takes 10 and 2 for each queue"
    if limit < 256:
        return Finding("ulimit -n", "could", words, f"ulimit -n {most}")
    return Finding("ulimit -n", "ok", words)


def _socket(path: str) -> Finding:
    """Whether a vhost-user back end answers there. It is asked for its features, which changes nothing."""
    subject = f"user:{path}"
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return Finding(subject, "no", "is no socket")
        session = Session(path, _ANSWER_S)
    except OSError as error:
        mends = {
            errno.EAGAIN: "end the front end that is connected, if there is one",
            errno.ENOENT: "start the back end, or correct the path",
            errno.EACCES: f"chown {os.geteuid()} {path}; its folders must be open to you too",
            errno.ECONNREFUSED: f"nobody listens: start the back end (rm {path}, if that is in its way)",
            errno.ENAMETOOLONG: "a socket's path has 107 bytes at most",
        }
        code = error.errno or 0
        words = "takes no connection" if code == errno.EAGAIN else os.strerror(code)
        return Finding(subject, "no", words, mends.get(code, ""))
    with contextlib.closing(session):
        try:
            kind = looks_like(session.ask(Request.GET_FEATURES, decode_u64))
        except VirtioError as error:
            words = getattr(error, "strerror", None) or str(error)
            return Finding(subject, "no", f"does not answer as a vhost-user back end: {words}")
    by = f", virtio-{kind} by what it offers" if kind else ""
    return Finding(subject, "ok", f"a vhost-user back end{by}")


def _huge_pages(root: Path) -> Finding:
    pages = root / f"sys/kernel/mm/hugepages/hugepages-{HUGE_PAGE >> 10}kB"
    try:
        total, free = (int((pages / name).read_text()) for name in ("nr_hugepages", "free_hugepages"))
    except (OSError, ValueError):
        return Finding("huge pages", "could", f"the kernel has none of {HUGE_PAGE >> 20} MiB")
    words = f"{free} of {total} of {HUGE_PAGE >> 20} MiB are free; a controller takes up to 32 of them"
    if free < 32:
        mend = f"sysctl vm.nr_hugepages={total - free + 64}   (as root)"
        words += ", and ordinary pages where there are none; a PCI device without an IOMMU needs them"
        return Finding("huge pages", "could", words, mend)
    return Finding("huge pages", "ok", words)


def _memlock() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY or may_lock():
        return Finding("ulimit -l", "ok", "any memory may be locked for DMA")
    words = f"{limit >> 10} KiB may be locked for DMA, by all controllers of a process"
    if limit < LEAST_POOL:
        mend = f"ulimit -l {65536 + (limit >> 10)}, memlock in /etc/security/limits.conf, or LimitMEMLOCK="
        return Finding("ulimit -l", "no", f"{words}: a PCI device needs {LEAST_POOL >> 10}", mend)
    return Finding("ulimit -l", "ok", words)


def _iommu(root: Path) -> Finding:
    groups = root / "sys/kernel/iommu_groups"
    count = 0
    with contextlib.suppress(OSError):
        count = len(os.listdir(groups))
    if count:
        return Finding("IOMMU", "ok", f"on, with {count} groups")
    return Finding(
        "IOMMU",
        "no",
        f"none, or off: VFIO does not work, {UIO} does (which lets a device write to all memory)",
        "intel_iommu=on or amd_iommu=on on the kernel's command line, and VT-d or AMD-Vi in the firmware",
    )


def _vfio(root: Path) -> Iterator[Finding]:
    """The drivers, and the way into VFIO."""
    for driver in (VFIO, UIO):
        if (root / "sys/bus/pci/drivers" / driver).exists():
            yield Finding(driver, "ok", "is loaded")
        elif _has_module(driver, root):
            yield Finding(driver, "could", "is not loaded", f"modprobe {driver}   (as root)")
        else:
            yield Finding(
                driver, "no", f"this kernel ({os.uname().release}) has no such driver, nor a module of it"
            )
    container = root / CONTAINER.lstrip("/")
    if container.exists() and not os.access(container, os.R_OK | os.W_OK):
        yield Finding(CONTAINER, "no", "is not open to you", f"chmod 666 {CONTAINER}   (as root)")


def _has_module(driver: str, root: Path) -> bool:
    names = {f"{driver.replace('-', other)}.ko" for other in "-_"}
    names |= {f"{driver.replace('_', other)}.ko" for other in "-_"}
    folder = root / "lib/modules" / os.uname().release
    for index in ("modules.dep", "modules.builtin"):
        with contextlib.suppress(OSError), open(folder / index) as lines:
            for line in lines:
                path = line.partition(":")[0].strip()
                if any(os.path.basename(path).startswith(name) for name in names):
                    return True
    return False


def _function(function: PciFunction, root: Path) -> Finding:
    """Whether a device can be attached."""
    subject = f"pci:{function.address}"
    uses = ", ".join(function.uses())
    if function.driver not in (VFIO, UIO):
        has = f"virtio-{function.kind} with {function.driver or 'no driver'}"
        if uses:
            return Finding(subject, "no", f"{has}; {uses}", "end what uses it, then bind it")
        driver = VFIO if function.group is not None else UIO
        option = "" if driver == VFIO else f" --driver {driver}"
        return Finding(
            subject, "could", f"{has}, and unused", f"virtio-bdev pci bind {function.address}{option}"
        )
    words = f"virtio-{function.kind} with {function.driver}"
    if uses:
        return Finding(subject, "no", f"{words}; in use by {uses}")
    for name in function.nodes():
        node = root / "dev" / name
        if not os.access(node, os.R_OK | os.W_OK):
            return Finding(
                subject, "no", f"{words}; /dev/{name} is not open to you", f"chown {os.geteuid()} /dev/{name}"
            )
    return Finding(subject, "ok", f"{words}, ready to attach")
