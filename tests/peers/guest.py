"""A real Linux in QEMU, without hardware support: it boots in seconds, and runs what is installed here.

Its kernel is Debian's, unpacked and not installed; its root is this machine's file tree, read-only, over
virtiofs, so that nothing is built for it. Commands go to `guest_agent` over a serial line.

    python -m tests.peers.guest [--no-iommu] [--disk FILE]... [-- COMMAND...]
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.needs import program
from tests.peers.qmp import Monitor

HERE = Path(__file__).parents[2]
CACHE = HERE / "build" / "guest"  # what was downloaded; `make clean` takes it

_BOOT_S = 45.0  # three times what it takes on a busy machine
_MEMORY = "1G"
_MODULES = "virtio_pci virtiofs virtio_blk virtio_scsi sd_mod ext4 crc32c_generic"
_USER_MODULES = "vfio-pci vfio_iommu_type1 uio_pci_generic"
_INIT = """#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "no $module"; done
mount -t virtiofs -o ro host /host || exec echo "no root"
for each in proc sys dev; do mount --move /$each /host/$each; done
mkdir -p /host/dev/shm /host/dev/hugepages
mount -t tmpfs tmpfs /host/dev/shm; mount -t tmpfs tmpfs /host/run
export HOME=/dev/shm TMPDIR=/dev/shm PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONDONTWRITEBYTECODE=1
exec chroot /host {python} {agent} /dev/ttyS1
"""


class Result(NamedTuple):
    """How a command in the guest ended, and what it said."""

    status: int
    stdout: str
    stderr: str


class GuestError(AssertionError):
    """The guest did not do what it was told; says what its console said last."""


def kernel() -> Path:
    """An unpacked kernel, downloaded if it is not in the cache; its modules are beside it."""
    program("apt-get")
    found = sorted(CACHE.glob("tree/boot/vmlinuz-*"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            try:
                _download(folder)
            except GuestError:
                _run("apt-get", "update")
                _download(folder)
            (package,) = Path(folder).glob("*.deb")
            _run("dpkg-deb", "-x", str(package), f"{folder}/tree")
            os.rename(f"{folder}/tree", CACHE / "tree")
        found = sorted(CACHE.glob("tree/boot/vmlinuz-*"))
    return found[-1]


def _download(folder: str) -> None:
    depends = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    match = re.search(r"Depends: (linux-image-[0-9]\S+)", depends)
    if match is None:
        raise GuestError(f"no linux-image-cloud-amd64: {depends}")
    _run("apt-get", "download", match[1], cwd=folder)


def _run(*argv: str, cwd: str | Path | None = None) -> str:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise GuestError(f"{' '.join(argv)}: {done.stderr}")
    return done.stdout


def _initramfs(image: Path, folder: Path) -> Path:
    """What runs before the root is there: busybox, modules in the order of their dependencies, /init."""
    release = image.name.removeprefix("vmlinuz-")
    modules = image.parents[1] / "lib/modules" / release
    needs: dict[str, list[str]] = {}
    _run("depmod", "-b", str(image.parents[1]), release)
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for each in reversed(needs[path]):
            add(each)
        if path not in order:
            order.append(path)

    for name in f"{_MODULES} {_USER_MODULES}".split():
        if (key := name.replace("-", "_")) in by_name:  # else it is built in
            add(by_name[key])
    root = folder / "root"
    for name in ("bin", "modules", "proc", "sys", "dev", "host"):
        (root / name).mkdir(parents=True)
    shutil.copy(program("busybox"), root / "bin/busybox")
    for path in order:
        shutil.copy(modules / path, root / "modules")
    (root / "modules/order").write_text(" ".join(Path(path).name for path in order))
    agent = Path(__file__).with_name("guest_agent.py")
    (root / "init").write_text(_INIT.format(python=sys.executable, agent=agent))
    (root / "init").chmod(0o755)
    archive = folder / "initramfs"
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    with open(archive, "wb") as file:
        subprocess.run(
            [program("cpio"), "-o", "-H", "newc", "--quiet"],
            input=names.encode(),
            cwd=root,
            stdout=file,
            check=True,
        )
    return archive


class Guest:
    """A running guest with these devices (arguments of QEMU); a context manager, which ends it in any case.

    With an `iommu`, devices that are to be behind it want `iommu_platform=on`. `huge` pages of 2 MiB are set
    aside. Its memory is a shared memfd, so that vhost-user devices work.
    """

    def __init__(self, devices: Sequence[str], *, iommu: bool = True, huge: int = 0) -> None:
        qemu, image = program("qemu-system-x86_64"), kernel()
        self._undo = contextlib.ExitStack()
        self._said = bytearray()  # on its console
        self._lock = threading.Lock()
        try:
            folder = Path(self._undo.enter_context(tempfile.TemporaryDirectory(prefix="guest-")))
            archive = _initramfs(image, folder)
            for last in (False, True):  # on a busy machine a processor of its may never come to start
                attempt = self._undo.enter_context(contextlib.ExitStack())
                self._boot = attempt
                self._share(folder)
                self._start(qemu, image, archive, folder, devices, iommu, huge)
                self._agent.settimeout(_BOOT_S)
                try:
                    self._hear()
                    break
                except GuestError:
                    if last:
                        raise
                    attempt.close()
                    (folder / "fs").unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    def _share(self, folder: Path) -> None:
        daemon = subprocess.Popen(
            [program("virtiofsd"), f"--socket-path={folder}/fs", "-o", "source=/", "-o", "sandbox=chroot"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._boot.callback(_end, daemon)
        deadline = time.monotonic() + 10
        while not (folder / "fs").exists():
            assert time.monotonic() < deadline and daemon.poll() is None, "virtiofsd does not start"
            time.sleep(0.01)

    def _start(
        self,
        qemu: str,
        image: Path,
        archive: Path,
        folder: Path,
        devices: Sequence[str],
        iommu: bool,
        huge: int,
    ) -> None:
        (self._agent, agent), (console, their_console), (qmp, their_qmp) = (
            socket.socketpair() for _ in range(3)
        )
        machine = "q35,memory-backend=ram" + (",kernel-irqchip=split" if iommu else "")
        words = f"console=ttyS0 panic=-1 tsc=reliable no_timer_check loglevel=6 hugepages={huge}"
        if iommu:
            words += " intel_iommu=on"
        # One processor: with two, QEMU 7.2 died of an assertion once in some thirty runs (a register of one
        # device taken for one of another's MSI-X table, while drivers were changed).
        with agent, their_console, their_qmp:
            self._process = subprocess.Popen(
                [qemu, "-machine", machine, "-accel", "tcg,thread=multi", "-cpu", "qemu64", "-smp", "1"]
                + ["-m", _MEMORY, "-object", f"memory-backend-memfd,id=ram,size={_MEMORY},share=on"]
                + (["-device", "intel-iommu,intremap=on,caching-mode=on"] if iommu else [])
                + [
                    "-chardev",
                    f"socket,id=fs,path={folder}/fs",
                    "-device",
                    "vhost-user-fs-pci,chardev=fs,tag=host",
                ]
                + ["-nodefaults", "-display", "none", "-no-reboot"]
                + ["-chardev", f"socket,id=console,fd={their_console.fileno()}", "-serial", "chardev:console"]
                + ["-chardev", f"socket,id=agent,fd={agent.fileno()}", "-serial", "chardev:agent"]
                + ["-chardev", f"socket,id=qmp,fd={their_qmp.fileno()}", "-mon", "qmp,mode=control"]
                + ["-kernel", str(image), "-initrd", str(archive), "-append", words]
                + list(devices),
                pass_fds=[agent.fileno(), their_console.fileno(), their_qmp.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._boot.callback(_end, self._process)
        self._boot.callback(self._agent.close)
        self._lines = self._agent.makefile("rb")
        self._boot.callback(self._lines.close)
        reader = threading.Thread(target=self._listen, args=(console,), name="guest console", daemon=True)
        reader.start()
        qmp.settimeout(10)
        self._monitor = Monitor(qmp, self._fail)
        self._boot.callback(self._monitor.close)
        self._monitor.greet()

    def _listen(self, console: socket.socket) -> None:
        with console:
            while data := console.recv(4096):
                self._said += data

    def _hear(self) -> dict[str, Any]:
        """The agent's next line."""
        try:
            line = self._lines.readline()
        except OSError:  # a time-out; and afterwards the line cannot be read any more
            self._fail("does not answer")
        if not line:
            self._fail("has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self, what: str) -> NoReturn:
        said = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
            assert self._process.stderr is not None
            said = self._process.stderr.read().decode(errors="replace")
        console = self._said.decode(errors="replace")[-3000:]
        raise GuestError(f"the guest {what}: {said}\n--- the end of its console:\n{console}")

    def run(self, *argv: str, timeout: float = 60.0, check: bool = True, user: int = 0) -> Result:
        """Run a command there, as a `user` who may read what this checkout needs.

        GuestError if it fails, unless `check` says not to look.
        """
        with self._lock:
            self._agent.settimeout(timeout + 20)
            wish = {"argv": argv, "timeout": timeout, "user": user}
            self._agent.sendall(json.dumps(wish).encode() + b"\n")
            result = Result(**self._hear())
        if check and result.status:
            raise GuestError(f"{' '.join(argv)}: status {result.status}\n{result.stdout}{result.stderr}")
        return result

    def evaluate(self, expression: str) -> Any:
        """What an expression is there, in Python, with `virtio.transport.sysfs` as `sysfs`."""
        with self._lock:
            self._agent.settimeout(60)
            self._agent.sendall(json.dumps({"python": expression}).encode() + b"\n")
            result = Result(**self._hear())
        if result.status:
            raise GuestError(f"{expression}: {result.stderr}")
        return json.loads(result.stdout)

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Run a monitor command of its QEMU, and return what it returns."""
        return self._monitor.run(command, arguments)

    def console(self) -> str:
        """What it has said so far."""
        return self._said.decode(errors="replace")

    def close(self) -> None:
        """End it; idempotent."""
        self._undo.close()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait(10)
    if process.stderr is not None:
        process.stderr.close()


def blk(name: str, path: str | Path, options: str = "disable-legacy=on") -> list[str]:
    """Arguments of QEMU for a virtio-blk device on a file."""
    drive = f"if=none,id=drive-{name},file={path},format=raw,discard=unmap"
    return ["-drive", drive, "-device", f"virtio-blk-pci,id={name},drive=drive-{name},{options}"]


def scsi(name: str, paths: Sequence[str | Path], options: str = "disable-legacy=on") -> list[str]:
    """The same for a virtio-scsi controller, a target for each file."""

    def parts() -> Iterator[str]:
        yield from ("-device", f"virtio-scsi-pci,id={name},{options}")
        for target, path in enumerate(paths):
            drive = f"drive-{name}-{target}"
            yield from ("-drive", f"if=none,id={drive},file={path},format=raw,discard=unmap")
            yield from ("-device", f"scsi-hd,bus={name}.0,drive={drive},scsi-id={target},lun=0")

    return list(parts())


def main() -> None:
    """Boot a guest by hand, and run a command in it."""
    arguments, _, command = " ".join(sys.argv[1:]).partition("--  ".strip() + " ")
    words = arguments.split()
    devices: list[str] = []
    iommu = "--no-iommu" not in words
    options = "disable-legacy=on" + (",iommu_platform=on,ats=off" if iommu else "")
    for number, word in enumerate(words):
        if word == "--disk":
            devices += blk(f"disk{number}", words[number + 1], options)
    with Guest(devices, iommu=iommu, huge=64) as guest:
        result = guest.run("sh", "-c", command or "cat", timeout=600, check=False)
        print(result.stdout, end="")
        print(result.stderr, end="", file=sys.stderr)
        sys.exit(result.status)


if __name__ == "__main__":
    main()
