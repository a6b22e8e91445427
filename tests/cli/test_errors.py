"""Bad input: for each case the exit status, the one line that is said, and that nothing is left.

build/bad-input.txt has the table when all of them have run.
"""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import virtio_bdev
from tests.conformance.driver import backend
from tests.model.session import Reply
from virtio.target import serve

WATCHED = Path(__file__).with_name("watched.py")
TABLE = Path(__file__).parents[2] / "build/bad-input.txt"
SHORT = ["--timeout", "1"]  # for a peer that will not answer
NOBODY = 65534
Setup = Callable[[Path], contextlib.AbstractContextManager[list[object]]]


@dataclass(frozen=True)
class Case:
    """What is wrong; how to make it so, which gives the arguments; the status and the line to expect."""

    what: str
    setup: Setup
    words: str  # a pattern; "" where nothing is said
    status: int = 1
    user: str = "-"
    stdin: bytes = b""


# Where there is no device.


@contextlib.contextmanager
def nothing(folder: Path) -> Iterator[list[object]]:
    yield ["list", f"user:{folder}/none"]


@contextlib.contextmanager
def nothing_at_a_long_path(folder: Path) -> Iterator[list[object]]:
    yield ["list", f"user:{folder}/{'x' * 120}"]


@contextlib.contextmanager
def a_file(folder: Path) -> Iterator[list[object]]:
    (folder / "file").write_bytes(b"")
    yield ["list", f"user:{folder}/file"]


@contextlib.contextmanager
def listening(folder: Path, kind: int = socket.SOCK_STREAM) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(f"{folder}/s")
        if kind == socket.SOCK_STREAM:
            listener.listen()
        yield listener


@contextlib.contextmanager
def a_socket_of_datagrams(folder: Path) -> Iterator[list[object]]:
    with listening(folder, socket.SOCK_DGRAM):
        yield ["list", f"user:{folder}/s"]


@contextlib.contextmanager
def a_dead_socket(folder: Path) -> Iterator[list[object]]:
    with listening(folder):
        pass
    yield ["list", f"user:{folder}/s"]


@contextlib.contextmanager
def a_private_socket(folder: Path) -> Iterator[list[object]]:
    with listening(folder):
        os.chmod(folder / "s", 0)
        yield ["list", f"user:{folder}/s"]


@contextlib.contextmanager
def a_full_backlog(folder: Path) -> Iterator[list[object]]:
    with listening(folder) as listener, contextlib.ExitStack() as stack:
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting.setblocking(False)
                waiting.connect(f"{folder}/s")
        yield ["list", f"user:{folder}/s", *SHORT]


# Where something listens that is not vhost-user.


def answering(answer: Callable[[socket.socket], object]) -> Setup:
    """A server that does this with its only connection, and keeps it until the end."""

    @contextlib.contextmanager
    def setup(folder: Path) -> Iterator[list[object]]:
        with listening(folder) as listener:
            done = threading.Event()

            def serve_one() -> None:
                with contextlib.suppress(OSError), listener.accept()[0] as connection:
                    connection.settimeout(10)
                    answer(connection)
                    done.wait(10)

            thread = threading.Thread(target=serve_one)
            thread.start()
            try:
                yield ["list", f"user:{folder}/s", *SHORT]
            finally:
                done.set()
                with contextlib.suppress(OSError):
                    listener.shutdown(socket.SHUT_RDWR)
                thread.join()

    return setup


def echo(connection: socket.socket) -> None:
    while data := connection.recv(4096):
        connection.sendall(data)


def http(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def noise(connection: socket.socket) -> None:
    connection.sendall(random.Random(1).randbytes(4096))


# Where a back end misbehaves: the recording model, told how.


def misbehaving(kind: str = "blk", *arguments: object, **options: Any) -> Setup:
    @contextlib.contextmanager
    def setup(folder: Path) -> Iterator[list[object]]:
        with backend(kind, **options) as model:
            yield [*(arguments or ["list"]), model.address, "--dev-type", kind, "--queues", 1, *SHORT]

    return setup


MESSAGES = {name: name for name in [
    "SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM",
    "GET_MAX_MEM_SLOTS", "SET_BACKEND_REQ_FD", "SET_STATUS", "SET_FEATURES", "GET_STATUS", "GET_CONFIG",
    "ADD_MEM_REG", "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL",
    "SET_VRING_KICK", "SET_VRING_ENABLE",
]}  # fmt: skip
# These have no answer: what is wrong shows at the next one.
MESSAGES |= {"SET_OWNER": "GET_FEATURES", "SET_PROTOCOL_FEATURES": "GET_QUEUE_NUM"}


def changed(**fields: Any) -> Callable[[Reply], Reply]:
    """Change fields of a reply, by a function of the old value or to another one."""

    def change(reply: Reply) -> Reply:
        for name, value in fields.items():
            setattr(reply, name, value(getattr(reply, name)) if callable(value) else value)
        return reply

    return change


def with_descriptor(reply: Reply) -> Reply:
    reply.fds.append(os.open(os.devnull, os.O_RDONLY))
    return reply


def answers() -> Iterator[Case]:
    """Every way to answer wrongly, for messages with replies of their own and for an acknowledgement."""
    for name in ("GET_FEATURES", "GET_CONFIG", "ADD_MEM_REG"):
        ways = {
            "another message": (changed(request=99), f"answered {name} badly: .*request 99"),
            "no reply flag": (changed(flags=1), f"answered {name} badly: .*{name}, flags 0x1"),
            "another version": (changed(flags=6), f"answered {name} badly: .*version"),
            "a huge size": (changed(size=1 << 31), f"answered {name} badly: .*2147483648"),
            "too few bytes": (
                changed(payload=lambda payload: payload[:-1]),
                f"answered {name} badly: .*bytes",
            ),
            "too many bytes": (
                changed(payload=lambda payload: payload + b"x"),
                f"answered {name} badly: .*bytes",
            ),
            "fewer bytes than it says": (changed(size=lambda _: 200), f"did not answer {name} in 1 s"),
            "a descriptor": (with_descriptor, f"answered {name} badly: 1 descriptors"),
        }
        for way, (change, words) in ways.items():
            yield Case(f"answers {name} with {way}", misbehaving(replies={name: change}), words)


# Where the disk or the request is the matter.


def on_disk(spec: str, *arguments: object, dev_type: str = "blk", attach_as: str | None = None) -> Setup:
    @contextlib.contextmanager
    def setup(folder: Path) -> Iterator[list[object]]:
        with serve(dev_type, *spec.split()) as target:
            command, *rest = arguments
            yield [command, target.address, "--dev-type", attach_as or dev_type, *rest]

    return setup


@contextlib.contextmanager
def taken(folder: Path) -> Iterator[list[object]]:
    with serve("blk", ram="1M") as target, virtio_bdev.attach(target.address, dev_type="blk"):
        yield ["list", target.address, "--dev-type", "blk", *SHORT]


def configured(text: str) -> Setup:
    @contextlib.contextmanager
    def setup(folder: Path) -> Iterator[list[object]]:
        (folder / "c").write_text(text.format(folder=folder))
        yield ["run", "--config", folder / "c"]

    return setup


def alone(*arguments: object) -> Setup:
    return lambda folder: contextlib.nullcontext([*arguments])


def used(ring: Any, chain: Any, length: int) -> list[tuple[int, int]]:
    return [(chain.head ^ 1, length)]


CASES = [
    Case("no socket", nothing, "/none: there is no such socket: is the back end running"),
    Case("a path that is too long", nothing_at_a_long_path, "path too long"),
    Case("not a socket", a_file, "/file: nobody listens there: .*, or it is not a socket"),
    Case("a socket of datagrams", a_socket_of_datagrams, "it is a socket of another kind, not a stream"),
    Case("a socket nobody listens on", a_dead_socket, "nobody listens there: the back end has ended"),
    Case(
        "no permission",
        a_private_socket,
        "no permission: writing to the socket and searching its folders is needed",
        user=str(NOBODY) if os.geteuid() == 0 else "-",
    ),
    Case("nobody accepts connections", a_full_backlog, "accepted no connection in 1 s"),
    Case("two programs on one socket", taken, "did not answer GET_FEATURES in 1 s: .*another front end"),
    Case("a silent server", answering(lambda connection: None), "did not answer GET_FEATURES in 1 s"),
    Case("an echo server", answering(echo), "answered GET_FEATURES badly: .*is it a vhost-user back end"),
    Case("an HTTP server", answering(http), "answered GET_FEATURES badly: "),
    Case("a server that talks nonsense", answering(noise), "answered GET_FEATURES badly: "),
    Case("a server that hangs up", answering(socket.socket.close), "closed the connection"),
    *(
        Case(f"hangs at {name}", misbehaving(hang_on=name), f"did not answer {shows} in 1 s")
        for name, shows in MESSAGES.items()
    ),
    *(
        Case(f"closes at {name}", misbehaving(drop_at=name), f"closed the connection at {shows}")
        for name, shows in MESSAGES.items()
    ),
    Case("hangs at GET_VRING_BASE, when all is done", misbehaving(hang_on="GET_VRING_BASE"), "", 0),
    Case("closes at GET_VRING_BASE, when all is done", misbehaving(drop_at="GET_VRING_BASE"), "", 0),
    Case("hangs at a request", misbehaving(hold=lambda chain: True), "has not answered 1 requests"),
    Case("offers no VERSION_1", misbehaving(features=1 << 30), "does not offer VERSION_1; it offers "),
    Case("offers nothing", misbehaving("scsi", features=0), "does not offer VERSION_1; it offers "),
    Case("offers no CONFIG", misbehaving(protocol_features=1), "no access to its configuration space"),
    Case("has no queue", misbehaving(queue_num=0), "user:.* has no request queue$"),
    Case("takes no memory", misbehaving(max_mem_slots=0), "takes no more than 0 memory regions"),
    Case("refuses SET_VRING_NUM", misbehaving(acks={"SET_VRING_NUM": 1}), "refused SET_VRING_NUM index=0 "),
    Case("refuses FEATURES_OK", misbehaving(refuse_status=8), "refuses SEG_MAX, .*though it offered all"),
    *answers(),
    Case("completes what was not asked", misbehaving(complete=used), "user:.* broke its ring: "),
    Case("completes too much", misbehaving(skip_used=9), "user:.* broke its ring: "),
    Case(
        "scsi taken for blk",
        on_disk("ram:1M", "list", dev_type="scsi", attach_as="blk"),
        "is a virtio-scsi device by .*, not virtio-blk: dev_type scsi .*; as virtio-blk it fails: ",
    ),
    Case(
        "blk taken for scsi",
        on_disk("ram:1M", "list", attach_as="scsi"),
        r"user:.* is a virtio-blk device by what it offers, .*: dev_type blk \(`--dev-type blk`, ",
    ),
    Case(
        "several disks, none named",
        on_disk("ram:1M ram:1M", "read", dev_type="scsi"),
        r"has 2 disks: name one with --bdev \(VirtioScsi0t0, VirtioScsi0t1\)",
    ),
    Case("a read off the grid", on_disk("ram:1M", "read", "--length", 100), "not on the 512-byte grid"),
    Case("a read past the end", on_disk("ram:1M", "read", "--offset", "2M"), "past the end of VirtioBlk0"),
    Case("a write off the grid", on_disk("ram:1M", "write"), "--pad zeros fills the last one up", stdin=b"x"),
    Case("a write past the end", on_disk("ram:1k", "write"), "do not lie within the 1024", stdin=bytes(4096)),
    Case("a read-only disk", on_disk("ram:1M,ro", "write"), "VirtioBlk0 is read-only", stdin=bytes(512)),
    Case("a full output disk", on_disk("ram:1M", "read", "-o", "/dev/full"), "/dev/full: No space left on"),
    Case("no input file", on_disk("ram:1M", "write", "-i", "/none"), "/none: No such file or directory"),
    Case("no folder for the output", on_disk("ram:1M", "read", "-o", "/none/x"), "/none/x: No such file"),
    Case("a bad block (blk)", on_disk("ram:1M,fail-read=4k", "read"), "VirtioBlk0: the device reports .*EIO"),
    Case("a bad block (scsi)", on_disk("ram:1M,fail-read=0", "read", dev_type="scsi"), "Scsi0t0: .*EIO"),
    Case("a flush that fails", on_disk("ram:1M,fail-flush", "write"), "VirtioBlk0: .*EIO", stdin=bytes(512)),
    Case("more queues than there are", on_disk("ram:1M", "list", "--queues", 99), "has 4 request queues; 99"),
    Case("a bad line", configured("[Virtio]\nDev Usr x\n"), "/c:2: 'Usr': want User PATH or Pci after Dev"),
    Case("a device of a file", configured("[Virtio]\nDev User {folder}/none\n"), "/c:2: cannot connect to"),
    Case("no such file", alone("run", "--config", "/none"), "/none: No such file"),
    Case("an address", alone("list", "/tmp/vhost.0"), "want user:PATH, .*; perhaps user:/tmp/vhost.0", 2),
    Case("a size", on_disk("ram:1M", "read", "--offset", "1X"), "'1X' is not a size", 2),
    Case("a type", on_disk("ram:1M", "list", attach_as="nvme"), "'nvme' is not one of 'scsi', 'blk'", 2),
    Case("a time-out", on_disk("ram:1M", "list", "--timeout", "0"), "want a number of seconds above 0", 2),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    status: int
    stderr: str
    left: object
    seconds: float

    @property
    def said(self) -> str:
        return self.stderr.splitlines()[-1] if self.stderr else ""


def outcome(case: Case, folder: Path) -> Outcome:
    """Run the program on it, in a process that says what it has left behind."""
    folder.mkdir()
    report = folder / "report"
    with case.setup(folder) as arguments:
        command = [sys.executable, WATCHED, report, case.user, *arguments]
        begun = time.monotonic()
        done = subprocess.run(
            [str(word) for word in command], input=case.stdin, capture_output=True, timeout=60
        )
        took = time.monotonic() - begun
    left = json.loads(report.read_text() or '"no report"')
    return Outcome(done.returncode, done.stderr.decode(), left, took)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What comes of the cases that were selected, several at a time: most of them only wait."""
    folder = tmp_path_factory.mktemp("bad")
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(6) as pool:
        coming = {case.what: pool.submit(outcome, case, folder / str(i)) for i, case in enumerate(cases)}
        yield coming
    if len(coming) == len(CASES):
        _write_table(folder, {what: future.result() for what, future in coming.items()})


def _write_table(folder: Path, outcomes: dict[str, Outcome]) -> None:
    lines = [f"{'CASE':50} EXIT  LEFT     LINE"]
    for what, came in outcomes.items():
        said = re.sub(r"/tmp/[^ :]*/", "/tmp/.../", came.said)
        lines.append(f"{what:50} {came.status:>4}  {came.left or 'nothing'}  {said}")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_is_one_line_and_leaves_nothing(case, outcomes):
    came = outcomes[case.what].result()
    assert (came.status, came.left) == (case.status, {}), came.stderr
    assert re.search(case.words, came.said), came.stderr
    assert came.seconds < 10
    if case.status == 1:
        assert came.stderr.count("\n") == 1 and came.said.startswith("virtio-bdev: "), came.stderr
    if case.status == 2:
        assert came.stderr.startswith("Usage: ") and came.said.startswith("Error: ")
