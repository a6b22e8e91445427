"""The target as a process: one front end after another, whatever the last one did."""

import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import virtio.target
from tests.target import front_end as fe
from tests.target.front_end import GUEST, FrontEnd, eventfd, state, u64
from tests.target.process import Process
from virtio.errors import RequestError, TransportError
from virtio.target.server import make_device, offers

IN, OUT = struct.pack("<IIQ", 0, 0, 0), struct.pack("<IIQ", 1, 0, 0)
OK = b"\0"


def check(path: str, extensions: int = fe.MQ | fe.CONFIG) -> None:
    """A front end is served as it should be."""
    with FrontEnd.connect(path) as front:
        front.hello(extensions=extensions)
        front.ring(0)
        assert front.request(0, [IN], [512, 1]) == (513, [bytes(512), OK])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_it_and_leaves_no_socket(start, number, busy):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    assert stat.S_ISSOCK(os.stat(target.path).st_mode)
    with FrontEnd.connect(target.path) if busy else contextlib.nullcontext() as front:
        if front:
            front.hello()
            front.number(fe.GET_FEATURES)
        assert target.end(number) == (0, b"", b"")
        assert not front or front.ended()
    assert not os.path.exists(target.path)


def test_data_outlive_a_session_and_sessions_come_one_after_another(start):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front, FrontEnd.connect(target.path) as second:
        front.hello()
        front.ring(0)
        assert front.request(0, [OUT, b"data" * 128], [1]) == (1, [OK])
        second.send(fe.GET_FEATURES)
        front.__exit__()
        assert second.receive()[0] == fe.GET_FEATURES  # once the first has left
        second.hello()
        second.ring(0)
        assert second.request(0, [IN], [512, 1])[1][0] == b"data" * 128
        front.sock = socket.socket()
        front.memfd, front.kicks, front.calls = os.dup(second.memfd), {}, {}


def test_both_sides_sleep_and_wake_each_other(start):
    """Between two processes, with EVENT_IDX: a notification lost on either side would hang it."""
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front:
        front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | fe.EVENT_IDX)
        ring = front.ring(0, size=4, base=64000)
        front.memory[0x80000:0x80010] = IN
        ring.chain([(GUEST + 0x80000, 16, 0), (GUEST + 0x90000, 513, fe.WRITE)])
        os.set_blocking(front.calls[0], True)
        for _ in range(5000):
            if ring.offer(0):
                os.eventfd_write(front.kicks[0], 1)
            while not ring.take():
                ring.want_call()
                if ring.used_index() == ring.seen:
                    os.eventfd_read(front.calls[0])


def test_a_file_is_the_disk(start, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    target = start("--dev-type=blk", f"--disk=file:{tmp_path}/disk", "--queues=2").ready()
    with FrontEnd.connect(target.path) as front:
        front.hello()
        assert front.number(fe.GET_QUEUE_NUM) == 2
        front.ring(1)
        assert front.request(1, [OUT, b"data" * 128], [1]) == (1, [OK])
    assert (tmp_path / "disk").read_bytes() == b"data" * 128 + bytes((1 << 20) - 512)


def inquiry(target: int, lun: int) -> bytes:
    return bytes([1, target, 0x40 | lun >> 8, lun & 0xFF]).ljust(19, b"\0") + b"\x12\0\0\0\x24".ljust(
        32, b"\0"
    )


def test_disks_become_scsi_targets_in_their_order(start):
    target = start("--disk=ram:1M", "--disk=5:9=ram:1M", "--disk=ram:1M", "--queues=1").ready()
    with FrontEnd.connect(target.path) as front:
        front.hello()
        assert front.number(fe.GET_QUEUE_NUM) == 3  # control, event, request
        front.ring(2)
        found = [
            front.request(2, [inquiry(*where)], [108, 36])[1] for where in ((0, 0), (5, 9), (6, 0), (1, 0))
        ]
        assert [(response[11], data[:1]) for response, data in found] == [(0, b"\0")] * 3 + [(3, b"\xee")]


# What a front end may do that it may not, once it has a ring; what is said of it.


def chain(*buffers: tuple[int, int, int]) -> object:
    def act(front: FrontEnd) -> None:
        front.rings[0].chain(buffers)
        front.rings[0].offer(0)
        os.eventfd_write(front.kicks[0], 1)

    return act


def jump(front: FrontEnd) -> None:
    struct.pack_into("<H", front.memory, front.rings[0].avail + 2, 1000)
    os.eventfd_write(front.kicks[0], 1)


def shrink(front: FrontEnd) -> None:
    os.ftruncate(front.memfd, 0)
    os.eventfd_write(front.kicks[0], 1)


def close_kick(front: FrontEnd) -> None:
    read_end, write_end = os.pipe()
    front.send(fe.SET_VRING_KICK, u64(0), [read_end])
    os.close(read_end)
    os.close(write_end)


def many_descriptors(front: FrontEnd) -> None:
    front.send(fe.SET_OWNER, b"", [front.memfd] * 100)


HOSTILE = {
    "a buffer outside memory": (chain((0x1000, 16, 0)), "ring 0: nothing is mapped at 0x1000"),
    "no header": (chain((GUEST, 1, fe.WRITE)), "block request of 0 readable bytes"),
    "an index that jumps": (jump, "ring 0: available index moved by 1000"),
    "memory that shrinks": (shrink, "killed by SIGBUS"),
    "a kick descriptor that ends": (close_kick, "kick descriptor of ring 0 has ended"),
    "too many descriptors": (many_descriptors, "9 descriptors with a message"),
    "an unknown message": (lambda front: front.send(99), "request 99"),
    "another version": (lambda front: front.send(fe.SET_OWNER, flags=2), "version 2, want 1"),
    "a huge message": (lambda front: front.sock.send(struct.pack("=III", 1, 1, 1 << 30)), "1073741824 bytes"),
    "a ring elsewhere": (
        lambda front: front.send(fe.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 0, 0, 0, 0)),
        "descriptor table 0: 1024 bytes at 0x0 are not in a memory region",
    ),
    "a ring at an odd address": (
        lambda front: front.send(fe.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, 8, 0, 0, 0)),
        "descriptor table 0 at 0x8, want a multiple of 16",
    ),
}


@pytest.fixture(scope="module")
def hardened(tmp_path_factory) -> Iterator[Process]:
    path = str(tmp_path_factory.mktemp("target") / "socket")
    target = Process("--dev-type=blk", "--disk=ram:1M", path=path).ready()
    yield target
    assert target.end() == (0, b"", b"")


@pytest.mark.parametrize(("act", "complaint"), HOSTILE.values(), ids=HOSTILE)
def test_a_front_end_that_breaks_the_rules_ends_its_own_session(hardened, act, complaint):
    with FrontEnd.connect(hardened.path) as front:
        front.hello()
        front.ring(0)
        front.number(fe.GET_FEATURES)
        act(front)
        assert front.ended()
    line = hardened.line()
    assert line.startswith("session ended: ") and complaint in line
    check(hardened.path)
    assert hardened.idle()


@pytest.mark.parametrize("said", [b"", b"\1\0\0", struct.pack("=III", 1, 1, 8) + b"half"])
def test_a_front_end_may_leave_at_any_time(hardened, said):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(hardened.path)
        sock.send(said)
    check(hardened.path)


def test_a_front_end_may_stop_reading_replies(hardened):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(hardened.path)
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(struct.pack("=III", fe.GET_FEATURES, 1, 0) * 100)
    check(hardened.path)


def test_features_can_be_left_out(start):
    without = ["EVENT_IDX", "INDIRECT_DESC", "MQ", "CONFIG", "DISCARD", "STATUS"]
    target = start("--dev-type=blk", "--disk=ram:1M", *[f"--without={name}" for name in without]).ready()
    with FrontEnd.connect(target.path) as front:
        features = front.number(fe.GET_FEATURES)
        assert features & (fe.EVENT_IDX | fe.INDIRECT_DESC | 1 << 12 | 1 << 13) == 0  # MQ, DISCARD
        assert features & 1 << 14  # WRITE_ZEROES
        assert (
            front.number(fe.GET_PROTOCOL_FEATURES) == fe.REPLY_ACK | fe.RESET | fe.MEM_SLOTS | fe.BACKEND_REQ
        )
    check(target.path, extensions=0)


def test_one_feature_left_out_takes_no_other_along():
    """The device's own bits are low ones: those of the rings, high above them, stay."""
    features, extensions = offers("blk", ["FLUSH", "CONFIG"])
    assert features == ~(1 << 9)  # FLUSH
    assert extensions == ~(1 << 9)  # CONFIG


def test_the_negotiation_itself_can_be_left_out():
    features, _ = offers("blk", ["PROTOCOL_FEATURES"])
    assert not features & fe.PROTOCOL_FEATURES
    with pytest.raises(RequestError, match="'HOTPLUG' is not the name of a blk or vhost-user feature"):
        offers("blk", ["HOTPLUG"])


def test_the_socket_of_a_dead_target_gives_way(start):
    first = start("--dev-type=blk", "--disk=ram:1M").ready()
    first.end(signal.SIGKILL)
    assert os.path.exists(first.path)
    second = start("--dev-type=blk", "--disk=ram:1M").ready()
    check(second.path)


def test_that_of_a_living_one_does_not(start):
    first = start("--dev-type=blk", "--disk=ram:1M").ready()
    second = start("--dev-type=blk", "--disk=ram:1M")
    assert "belongs to a living process" in second.line()
    assert second.process.wait(10) == 1
    check(first.path)
    assert first.end()[0] == 0


def test_what_is_no_socket_is_not_touched(start, tmp_path):
    (tmp_path / "file").write_text("precious")
    target = start("--dev-type=blk", "--disk=ram:1M", path=str(tmp_path / "file"))
    assert "exists and is not a socket" in target.line()
    assert target.process.wait(10) == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_the_socket_of_a_successor_is_left_alone(start):
    first = start("--dev-type=blk", "--disk=ram:1M").ready()
    os.unlink(first.path)
    second = start("--dev-type=blk", "--disk=ram:1M").ready()
    assert first.end()[0] == 0
    check(second.path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dev-type=blk"], "0 disks, a blk target has one"),
        (["--dev-type=blk", "--disk=ram:1M", "--disk=ram:1M"], "2 disks, a blk target has one"),
        (["--dev-type=scsi"], "no disks, a scsi target has at least one"),
        (["--disk=ram"], "want ram:SIZE or file:PATH"),
        (["--disk=file:/nonexistent"], "No such file or directory: '/nonexistent'"),
        (["--disk=ram:1M", "--queues=0"], "0 queues, want 1 to 254"),
        (["--disk=256:0=ram:1M"], "256:0 for '256:0=ram:1M', want up to 255:16383"),
        (["--disk=1:1=ram:1M", "--disk=1:1=ram:1M"], "1:1 for '1:1=ram:1M' is taken by another disk"),
        (["--disk=ram:1M", "--without=SPEED"], "'SPEED' is not the name of a scsi"),
    ],
)
def test_what_cannot_be_served_is_said(start, arguments, complaint):
    target = start(*arguments)
    assert complaint in target.line()
    assert target.process.wait(10) == 1
    assert not os.path.exists(target.path)


def test_a_path_that_is_too_long_for_a_socket_is_said(start, tmp_path):
    target = start("--disk=ram:1M", path=str(tmp_path / ("x" * 108)))
    assert "too long" in target.line()
    assert target.process.wait(10) == 1


def test_a_device_of_an_unknown_type():
    with pytest.raises(RequestError, match="device type 'tape', want scsi or blk"):
        make_device("tape", ["ram:1M"], 1)


def test_serve_is_a_disk_for_as_long_as_the_block_lasts():
    with virtio.target.serve("blk", ram="1M") as target:
        assert target.address == f"user:{target.path}"
        os.kill(target.pid, 0)
        check(target.path)
    with pytest.raises(ProcessLookupError):
        os.kill(target.pid, 0)
    assert not Path(target.path).parent.exists()


def test_serve_takes_a_path_and_leaves_what_else_is_beside_it(tmp_path):
    path = str(tmp_path / "socket")
    with virtio.target.serve(
        "scsi", "ram:1M", "3:1=ram:1M", queues=2, path=path, without=["CONFIG"]
    ) as target:
        assert target.path == path
        with FrontEnd.connect(path) as front:
            assert not front.number(fe.GET_PROTOCOL_FEATURES) & fe.CONFIG
    assert tmp_path.exists() and not os.path.exists(path)


def test_serve_says_when_there_is_nothing_to_serve(capfd):
    with pytest.raises(TransportError, match="exit status 1"), virtio.target.serve("blk", "ram:1000"):
        pass
    assert "want a multiple of 512" in capfd.readouterr().err


PARENT = """
import os, virtio.target
with virtio.target.serve("blk", ram="1M") as target:
    print(target.pid, target.path, flush=True)
    input()
"""


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_target_ends_with_the_process_that_serves_it_however_that_ends():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout
    pid, path = parent.stdout.readline().decode().split()
    with FrontEnd.connect(path) as front:  # with a session under way
        front.number(fe.GET_FEATURES)
        parent.kill()
        parent.communicate()
        assert front.ended()
    deadline = time.monotonic() + 10
    while alive(int(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not os.path.exists(path)
    os.rmdir(os.path.dirname(path))


def test_a_session_ends_with_its_target_however_that_ends(start):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front:
        front.number(fe.GET_FEATURES)
        target.end(signal.SIGKILL)
        assert front.ended()


def test_a_call_that_is_full_and_would_block_holds_up_nobody(start):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front, eventfd() as full:
        os.set_blocking(full, True)  # as it is the front end's business
        os.eventfd_write(full, 2**64 - 2)
        front.hello()
        front.ring(0)
        front.send(fe.SET_VRING_CALL, u64(0), [full])
        front.number(fe.GET_FEATURES)
        for _ in range(3):
            assert front.request(0, [IN], [512, 1])[0] == 513
    check(target.path)


def test_a_front_end_may_read_its_call_descriptor_blocking(start):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front:
        front.hello()
        os.set_blocking(front.calls.setdefault(0, os.eventfd(0)), True)
        front.ring(0)
        front.request(0, [IN], [512, 1])
        assert os.eventfd_read(front.calls[0]) == 1
        assert os.get_blocking(front.calls[0])


def test_a_kick_that_is_full_does_no_harm(start):
    target = start("--dev-type=blk", "--disk=ram:1M").ready()
    with FrontEnd.connect(target.path) as front, eventfd() as full:
        os.eventfd_write(full, 2**64 - 2)
        front.hello()
        front.ring(0)
        front.send(fe.SET_VRING_KICK, u64(0), [full])
        assert front.request(0, [IN], [512, 1])[0] == 513
        assert front.ask(fe.GET_VRING_BASE, state(0, 0)) == state(0, 1)
