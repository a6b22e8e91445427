"""The control socket: JSON-RPC as bytes, clients that do what they like, and a target that changes."""

import contextlib
import json
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Iterator

import pytest

import virtio.target
from tests.target import front_end as fe
from tests.target.front_end import GUEST, FrontEnd
from tests.target.process import Process
from virtio.errors import RequestError, RequestTimeout, TransportError
from virtio.target.control import ControlServer, answer

MIB = 1 << 20
IN = struct.pack("<IIQ", 0, 0, 0)


def echo(method: str, parameters: object) -> object:
    """A target of which everything can be asked."""
    if method == "fail":
        raise OSError(28, "No space left on device")
    if method == "err":
        raise ZeroDivisionError("a mistake")
    return [method, parameters]


def test_a_request_and_its_answer():
    line = b'{"jsonrpc": "2.0", "method": "go", "params": {"far": 1}, "id": "x"}'
    assert answer(line, echo) == b'{"jsonrpc": "2.0", "result": ["go", {"far": 1}], "id": "x"}\n'
    assert answer(b' {"jsonrpc":"2.0","method":"go","id":null}\r', echo) == (
        b'{"jsonrpc": "2.0", "result": ["go", {}], "id": null}\n'
    )
    assert answer(b'{"jsonrpc":"2.0","method":"go"}', echo) == b""  # a notification


@pytest.mark.parametrize(
    ("line", "code", "identity"),
    [
        (b"", -32700, None),
        (b"\xff\xfe", -32700, None),
        (b'{"jsonrpc":"2.0","method":"go","id":', -32700, None),
        (b"[" * 60000, -32700, None),
        (b'{"jsonrpc":"2.0","method":"go","id":NaN}', -32700, None),
        (b'{"jsonrpc":"2.0","method":"go","id":' + b"1" * 5000 + b"}", -32700, None),
        (b"x" * 65537, -32600, None),
        (b"[]", -32600, None),
        (b"1", -32600, None),
        (b'{"method":"go","id":1}', -32600, 1),
        (b'{"jsonrpc":"1.0","method":"go","id":1}', -32600, 1),
        (b'{"jsonrpc":"2.0","id":1}', -32600, 1),
        (b'{"jsonrpc":"2.0","method":7,"id":"a"}', -32600, "a"),
        (b'{"jsonrpc":"2.0","method":"go","id":[1]}', -32600, None),
        (b'{"jsonrpc":"2.0","method":"go","id":true}', -32600, None),
        (b'{"jsonrpc":"2.0","method":"go","id":1e999}', -32600, None),
        (b'{"jsonrpc":"2.0","method":"go","more":1,"id":1}', -32600, 1),
        (b'{"jsonrpc":"2.0","method":"go","params":[1],"id":1}', -32602, 1),
        (b'{"jsonrpc":"2.0","method":"fail","id":1}', -32000, 1),
    ],
)
def test_what_is_no_request_is_answered_with_its_code(line, code, identity):
    reply = answer(line, echo)
    assert reply.endswith(b"\n") and reply.count(b"\n") == 1 and len(reply) < 600
    said = json.loads(reply)
    assert (said["jsonrpc"], said["error"]["code"], said["id"]) == ("2.0", code, identity)
    assert said["error"]["message"] and "result" not in said


def test_a_mistake_of_ours_is_told_and_shown(capfd):
    said = json.loads(answer(b'{"jsonrpc":"2.0","method":"err","id":1}', echo))
    assert said["error"] == {"code": -32603, "message": "ZeroDivisionError: a mistake"}
    assert "Traceback" in capfd.readouterr().err


def test_answers_that_are_not_read_are_not_made(tmp_path):
    made = []

    def call(method: str, parameters: object) -> object:
        made.append(method)
        return "x" * 100_000

    with ControlServer(str(tmp_path / "control"), call) as server, Client(server.path) as client:
        client.sock.sendall(b'{"jsonrpc":"2.0","method":"go","id":1}\n' * 1000)
        for _ in range(100):
            server.serve()
        assert 1 <= len(made) < 20


# A target as a process.


class Client:
    """A connection to a control socket; a context manager."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)  # with a time-out, a full backlog would be an error at once
        self.sock.settimeout(10)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def ask(self, method: str, **params: object) -> object:
        """The result, or the error as (code, message)."""
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": 7}
        self.sock.sendall(json.dumps(request).encode() + b"\n")
        reply = json.loads(self.file.readline())
        assert reply["jsonrpc"] == "2.0" and reply["id"] == 7
        return (reply["error"]["code"], reply["error"]["message"]) if "error" in reply else reply["result"]


@pytest.fixture
def control(tmp_path) -> str:
    return str(tmp_path / "control")


@pytest.fixture
def blk(start, control) -> Process:
    return start("--dev-type=blk", "--disk=ram:1M,id=one", f"--control={control}").ready()


@pytest.fixture
def scsi(start, control) -> Process:
    return start("--disk=ram:1M,id=one", f"--control={control}").ready()


def entry(target: int, lun: int, size: int, serial: str) -> dict[str, object]:
    return {
        "target": target,
        "lun": lun,
        "size": size,
        "block_size": 512,
        "read_only": False,
        "serial": serial,
    }


ONE = entry(0, 0, MIB, "one")


def test_it_is_its_owners_alone_and_goes_with_the_target(blk, control):
    assert stat.S_ISSOCK(os.stat(control).st_mode) and stat.S_IMODE(os.stat(control).st_mode) == 0o600
    with Client(control) as client:
        assert client.ask("list_disks") == [ONE]
        assert blk.end() == (0, b"", b"")
    assert not os.path.exists(control) and not os.path.exists(blk.path)


def test_what_is_at_its_path_is_not_touched(start, control, tmp_path):
    (tmp_path / "control").write_text("precious")
    target = start("--disk=ram:1M", f"--control={control}")
    assert "exists and is not a socket" in target.line()
    assert target.process.wait(10) == 1
    assert (tmp_path / "control").read_text() == "precious" and not os.path.exists(target.path)


@pytest.mark.parametrize(
    ("method", "params", "code", "said"),
    [
        ("fly", {}, -32601, "there is no method 'fly', but list_disks, add_disk"),
        ("list_disks", {"lun": 1}, -32602, "list_disks takes no 'lun'"),
        ("remove_disk", {"target": 0}, -32602, "remove_disk needs lun"),
        ("remove_disk", {"target": 256, "lun": 0}, -32602, "target is '256', want 0 to 255"),
        ("remove_disk", {"target": 0, "lun": True}, -32602, "lun is 'True'"),
        ("remove_disk", {"target": 0, "lun": "0"}, -32602, "lun is '0'"),
        ("remove_disk", {"target": 0, "lun": 1}, -32000, "there is no disk 0:1"),
        ("add_disk", {"target": 0, "lun": 1, "disk": 7}, -32602, "disk is '7'"),
        ("add_disk", {"target": 0, "lun": 1, "disk": "floppy"}, -32000, "want ram:SIZE or file:PATH"),
        ("add_disk", {"target": 0, "lun": 1, "disk": "file:/nonexistent"}, -32000, "No such file"),
        ("add_disk", {"target": 0, "lun": 1, "disk": "file:a\0b"}, -32000, "null"),
        ("add_disk", {"target": 0, "lun": 1, "disk": "file:\ud800"}, -32000, "surrogates"),
        ("add_disk", {"target": 0, "lun": 0, "disk": "ram:1M"}, -32000, "there is a disk 0:0 already"),
        ("resize_disk", {"target": 0, "lun": 0, "size": 1000}, -32000, "want a multiple of 512"),
        ("resize_disk", {"target": 0, "lun": 0, "size": 0}, -32602, "size is '0'"),
        ("unit_attention", {"target": 0, "lun": 0, "asc": 256, "ascq": 0}, -32602, "asc is '256'"),
        (
            "set_fault",
            {"target": 0, "lun": 0, "read": -1},
            -32602,
            "read is '-1', want a byte offset or null",
        ),
        ("set_fault", {"target": 0, "lun": 0, "delay": "x"}, -32602, "delay is 'x'"),
        ("set_fault", {"target": 0, "lun": 0, "hang": None}, -32602, "hang is 'None', want true or false"),
        ("set_fault", {"target": 1, "lun": 0}, -32000, "there is no disk 1:0"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_done(hardened, method, params, code, said):
    with Client(hardened) as client:
        found, message = client.ask(method, **params)
        assert found == code and said in message
        assert client.ask("list_disks") == [ONE]


def test_a_blk_target_has_one_disk_that_is_never_busy(blk, control):
    with Client(control) as client:
        assert client.ask("add_disk", target=0, lun=1, disk="ram:1M")[0] == -32601
        assert client.ask("unit_attention", asc=0, ascq=0)[0] == -32601
        assert client.ask("set_fault", busy=1) == (-32602, "set_fault takes no 'busy'")
        assert client.ask("set_fault", target=0, lun=0)[0] == -32602
        assert client.ask("resize_disk", size=2 * MIB) == entry(0, 0, 2 * MIB, "one")


# Clients that do what they like.


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("control")
    target = Process(
        "--disk=ram:1M,id=one", f"--control={folder}/control", path=str(folder / "socket")
    ).ready()
    yield target
    assert target.end() == (0, b"", b"")


@pytest.fixture
def hardened(target) -> Iterator[str]:
    """The control socket of a target that is as it was, whatever clients do."""
    control = target.path.replace("/socket", "/control")
    yield control
    with Client(control) as client:
        assert client.ask("list_disks") == [ONE]
    assert target.idle()


def test_garbage_is_answered_and_the_next_line_is_another_chance(hardened):
    with Client(hardened) as client:
        client.sock.sendall(b"garbage\n\x00\xff\n{}\n")
        codes = [json.loads(client.file.readline())["error"]["code"] for _ in range(3)]
        assert codes == [-32700, -32700, -32600]
        assert client.ask("list_disks") == [ONE]


def test_a_message_of_the_largest_size_is_taken_and_a_larger_one_ends_the_connection(hardened):
    line = b'{"jsonrpc":"2.0","method":"list_disks","id":1'
    with Client(hardened) as client:
        client.sock.sendall(line.ljust(65535) + b"}\n")
        assert json.loads(client.file.readline())["result"] == [ONE]
        with contextlib.suppress(ConnectionError):  # it may close before all is sent
            client.sock.sendall(line.ljust(100_000))
        assert json.loads(client.file.readline())["error"]["code"] == -32600
        with contextlib.suppress(ConnectionError):
            assert client.file.read() == b""


def test_a_connection_ends_though_a_session_began_meanwhile(hardened, target):
    with Client(hardened) as client, FrontEnd.connect(target.path) as front:
        front.number(fe.GET_FEATURES)
        with contextlib.suppress(ConnectionError):
            client.sock.sendall(b"x" * 100_000)
        assert client.file.readline()
        with contextlib.suppress(ConnectionError):
            assert client.file.read() == b""


def test_a_line_may_come_a_byte_at_a_time_and_several_at_once(hardened):
    line = b'{"jsonrpc":"2.0","method":"list_disks","id":1}\n'
    with Client(hardened) as client:
        for byte in line:
            client.sock.send(bytes([byte]))
        assert json.loads(client.file.readline())["result"] == [ONE]
        client.sock.sendall(line * 50)
        client.sock.shutdown(socket.SHUT_WR)  # what was asked is answered
        assert client.file.read().count(b"\n") == 50


@pytest.mark.parametrize("said", [b"", b'{"jsonrpc"', b"x" * 65536])
def test_those_who_say_half_a_line_or_nothing_stop_nobody(hardened, said):
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(Client(hardened)).sock.sendall(said)
        with Client(hardened) as client:
            assert client.ask("list_disks") == [ONE]


def cpu_seconds(process: Process) -> float:
    """What the target's own process has used of a processor."""
    with open(f"/proc/{process.process.pid}/stat") as status:
        fields = status.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime


def test_a_client_that_does_not_read_is_not_read(hardened, target):
    with Client(hardened) as rude, Client(hardened) as client:
        rude.sock.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += rude.sock.send(b'{"jsonrpc":"2.0","method":"list_disks","id":1}\n' * 100)
        assert client.ask("list_disks") == [ONE]
        assert sent < 4 * MIB
        before = cpu_seconds(target)
        time.sleep(0.3)
        assert cpu_seconds(target) - before < 0.1  # it waits for him, and does not look all the time
        rude.sock.setblocking(True)
        for _ in range(sent // 47):
            assert rude.file.readline()


def test_a_client_may_leave_at_any_time(hardened):
    for said in (b'{"jsonrpc":"2.0","method":"list_disks","id":1}\n' * 100, b"{"):
        with Client(hardened) as client:
            client.sock.sendall(said)


def test_of_too_many_clients_the_one_that_was_silent_for_longest_goes(hardened):
    with contextlib.ExitStack() as stack:
        first, *clients = [stack.enter_context(Client(hardened)) for _ in range(32)]
        for client in [first, *clients[1:], clients[0]]:
            assert client.ask("list_disks") == [ONE]
        first.ask("list_disks")
        stack.enter_context(Client(hardened)).ask("list_disks")
        assert clients[1].file.read() == b""
        for client in (first, clients[0], *clients[2:]):
            assert client.ask("list_disks") == [ONE]
        for _ in range(200):
            stack.enter_context(Client(hardened))


def test_front_ends_are_served_whatever_clients_do(hardened, target):
    with Client(hardened) as half, FrontEnd.connect(target.path) as front:
        half.sock.sendall(b"{")
        front.hello()
        front.ring(2)
        assert command(front, INQUIRY, 36)[0] == 0
        with Client(hardened) as client:
            assert client.ask("list_disks") == [ONE]


# What changes, with a front end and without.

INQUIRY = b"\x12\0\0\0\x24\0"
READ_CAPACITY = b"\x25".ljust(10, b"\0")
READ_1 = b"\x28\0\0\0\0\0\0\0\1\0"
WRITE_1 = b"\x2a\0\0\0\0\0\0\0\1\0"
HOTPLUG, CHANGE = 2, 4
BAD_TARGET = 3


def header(cdb: bytes, target: int = 0, lun: int = 0, tag: int = 0) -> bytes:
    address = bytes([1, target, 0x40 | lun >> 8, lun & 0xFF]).ljust(8, b"\0")
    return address + struct.pack("<Q", tag) + b"\0\0\0" + cdb.ljust(32, b"\0")


def command(
    front: FrontEnd, cdb: bytes, room: int = 0, data: bytes = b"", target: int = 0, lun: int = 0
) -> tuple[int, str, bytes]:
    """Response or else status, additional sense code, and data of a command on ring 2."""
    readable = [header(cdb, target, lun)] + [data] * bool(data)
    _, (answer, *rest) = front.request(2, readable, [108] + [room] * bool(room))
    return answer[11] or answer[10], answer[24:26].hex() if answer[10] else "", b"".join(rest)


@contextlib.contextmanager
def driver(path: str, features: int = HOTPLUG | CHANGE) -> Iterator[FrontEnd]:
    """A driver with four event buffers, for whom disk 0:0 is ready."""
    with FrontEnd.connect(path) as front:
        front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | features)
        for index in (0, 1, 2):
            front.ring(index)
        for head in range(4):
            front.rings[1].describe(head, GUEST + 0x70000 + 16 * head, 16, fe.WRITE)
        front.rings[1].offer(0, 1, 2, 3)
        while command(front, bytes(6))[0] == 2:
            pass
        yield front


def events(front: FrontEnd) -> list[str]:
    """What the device has told since."""
    heads = [head for head, length in front.rings[1].take() if length == 16]
    return [front.memory[0x70000 + 16 * head :][:16].hex(" ", 4) for head in heads]


def test_a_disk_comes_grows_and_goes_under_a_driver(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        assert client.ask("add_disk", target=3, lun=300, disk="ram:1M,id=two") == entry(3, 300, MIB, "two")
        assert events(front) == ["01000000 0103412c 00000000 01000000"]  # RESCAN, here before the answer
        assert command(front, bytes(6), target=3, lun=300)[1] == "2900"
        assert command(front, WRITE_1, data=b"kept" * 128, target=3, lun=300)[0] == 0
        client.ask("add_disk", target=3, lun=1, disk="ram:1M,id=three")
        assert command(front, bytes(6), target=3, lun=300)[1] == "3f0e"
        client.ask("resize_disk", target=3, lun=300, size=2 * MIB)
        assert events(front) == [
            "01000000 01034001 00000000 01000000",
            "03000000 0103412c 00000000 2a090000",
        ]
        assert command(front, bytes(6), target=3, lun=300)[1] == "2a09"
        assert command(front, READ_CAPACITY, 8, target=3, lun=300)[2] == struct.pack(">II", 4095, 512)
        client.ask("remove_disk", target=3, lun=1)
        assert events(front) == ["01000000 01034001 00000000 02000000"]
        assert command(front, bytes(6), target=3, lun=300)[1] == "3f0e"
        assert command(front, bytes(6), target=3, lun=1)[1] == "2500"
        assert client.ask("list_disks") == [ONE, entry(3, 300, 2 * MIB, "two")]
    with Client(control) as client, driver(scsi.path) as front:  # and so it is for the next
        assert [command(front, bytes(6), target=3, lun=300)[1] for _ in range(2)] == ["2900", ""]
        assert command(front, READ_1, 512, target=3, lun=300)[2] == b"kept" * 128
        assert command(front, READ_CAPACITY, 8, target=3, lun=300)[2] == struct.pack(">II", 4095, 512)
        client.ask("remove_disk", target=3, lun=300)
        assert command(front, bytes(6), target=3, lun=300)[0] == BAD_TARGET
    assert scsi.idle()


def test_what_changed_while_no_driver_was_there_is_so_for_the_next(scsi, control, tmp_path):
    (tmp_path / "disk").write_bytes(b"file" * 128 + bytes(MIB))
    with Client(control) as client:
        client.ask("add_disk", target=9, lun=0, disk=f"file:{tmp_path}/disk")
        client.ask("resize_disk", target=9, lun=0, size=512)
        client.ask("set_fault", target=0, lun=0, read=0)
        client.ask("unit_attention", target=0, lun=0, asc=0x3F, ascq=1)
    assert (tmp_path / "disk").stat().st_size == 512
    with FrontEnd.connect(scsi.path) as front:
        front.hello()
        front.ring(2)
        assert [command(front, bytes(6))[1] for _ in range(3)] == ["3f01", "2900", ""]
        assert command(front, READ_1, 512)[1] == "1100"
        assert command(front, bytes(6), target=9)[1] == "2900"
        assert command(front, READ_1, 512, target=9) == (0, "", b"file" * 128)
    with FrontEnd.connect(scsi.path) as front:  # what was told is not told again, what is so still is
        front.hello()
        front.ring(2)
        assert [command(front, bytes(6))[1] for _ in range(2)] == ["2900", ""]
        assert command(front, READ_1, 512)[1] == "1100"


def test_a_driver_without_the_features_sees_no_events(scsi, control):
    with Client(control) as client, driver(scsi.path, 0) as front:
        client.ask("add_disk", target=0, lun=1, disk="ram:1M")
        client.ask("resize_disk", target=0, lun=1, size=2 * MIB)
        client.ask("remove_disk", target=0, lun=1)
        assert events(front) == []
        assert command(front, bytes(6))[1] == "3f0e"


def test_memory_that_shrinks_under_a_session_kills_nothing(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        for size in (64 * MIB, 4096, 8 * MIB, 512, MIB):
            assert client.ask("resize_disk", target=0, lun=0, size=size)["size"] == size
            assert command(front, bytes(6))[1] == "2a09"
            assert command(front, WRITE_1, data=bytes(512))[0] == 0
            last = b"\x28\0" + (size // 512 - 1).to_bytes(4, "big") + b"\0\0\1\0"
            assert command(front, last, 512)[0] == 0
            past = b"\x28\0" + (size // 512).to_bytes(4, "big") + b"\0\0\1\0"
            assert command(front, past, 512)[1] == "2100"


def test_unit_attention_is_for_the_next_command(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        assert client.ask("unit_attention", target=0, lun=0, asc=0x2A, ascq=1) is True
        assert [command(front, bytes(6))[1] for _ in range(2)] == ["2a01", ""]


def test_faults_on_demand(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        fault = lambda **changes: client.ask("set_fault", target=0, lun=0, **changes)  # noqa: E731
        assert fault(read=511, write=0, zero=1024, flush=0) is True
        assert [command(front, READ_1, 512)[1], command(front, WRITE_1, data=bytes(512))[1]] == [
            "1100",
            "0c00",
        ]
        assert command(front, b"\x35".ljust(10, b"\0"))[1] == "0c00"  # SYNCHRONIZE CACHE
        fault(read=None)  # the others stay
        assert command(front, READ_1, 512)[0] == 0
        assert command(front, WRITE_1, data=bytes(512))[1] == "0c00"
        fault(write=None, flush=None, every=2)
        assert [command(front, READ_1, 512)[1] for _ in range(4)] == ["", "1100", "", "1100"]
        fault(every=None, busy=2)
        assert [command(front, bytes(6))[0] for _ in range(3)] == [8, 8, 0]
        fault(delay=0.2)
        before = time.monotonic()
        assert command(front, READ_1, 512)[0] == 0
        assert time.monotonic() - before >= 0.2
        fault(delay=None)


def send(front: FrontEnd, slot: int, data: bytes, ring: int, room: int) -> None:
    """Make a request available without waiting; head 2 * `slot`, answer at 0x60000 + 256 * `slot`."""
    at = 0x50000 + 0x100 * slot
    front.memory[at : at + len(data)] = data
    front.rings[ring].chain(
        [(GUEST + at, len(data), 0), (GUEST + at + 0x10000, room, fe.WRITE)], first=2 * slot
    )
    front.rings[ring].offer(2 * slot)
    os.eventfd_write(front.kicks[ring], 1)


def test_a_command_that_hangs_can_be_aborted_and_the_disk_comes_back(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        client.ask("set_fault", target=0, lun=0, hang=True)
        for slot in range(3):
            send(front, slot, header(bytes(6), tag=slot), 2, 108)
        # TMF, ABORT TASK, LUN, tag 1
        send(front, 4, struct.pack("<II8sQ", 0, 0, b"\1", 1), 0, 1)
        assert front.wait(0) == [(8, 1)]
        assert front.memory[0x60400] == 0  # FUNCTION_COMPLETE
        assert front.rings[2].take() == [(2, 108)]  # the command before it
        assert front.memory[0x60100 + 11] == 2  # ABORTED
        # TMF, LOGICAL UNIT RESET
        send(front, 5, struct.pack("<II8sQ", 0, 5, b"\1", 0), 0, 1)
        front.wait(0)
        assert front.rings[2].take() == [(0, 108), (4, 108)]
        assert front.memory[0x60000 + 11] == front.memory[0x60200 + 11] == 4  # RESET
        send(front, 0, header(bytes(6)), 2, 108)
        client.ask("set_fault", target=0, lun=0, hang=False)
        assert front.wait(2) == [(0, 108)]
        assert front.memory[0x60000 + 24] == 0x29  # the reset
        assert command(front, bytes(6))[0] == 0


def test_a_disk_that_hangs_does_so_for_the_next_driver_too(blk, control):
    with Client(control) as client:
        with FrontEnd.connect(blk.path) as front:
            front.hello()
            front.ring(0)
            client.ask("set_fault", hang=True)
            send(front, 0, IN, 0, 513)
            client.ask("list_disks")
        with FrontEnd.connect(blk.path) as front:
            front.hello()
            front.ring(0)
            send(front, 0, IN, 0, 513)
            with pytest.raises(TimeoutError):
                front.wait(0, timeout=0.1)
            client.ask("set_fault", hang=False)
            assert front.wait(0) == [(0, 513)]
    assert blk.idle()


def stopped(process: Process) -> int:
    """Stop the session of a target; its number."""
    pid = process.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        session = int(children.read())
    os.kill(session, signal.SIGSTOP)
    return session


def test_a_session_that_is_stuck_is_said_to_be_and_catches_up(scsi, control):
    with Client(control) as client, driver(scsi.path) as front:
        session = stopped(scsi)
        assert client.ask("resize_disk", target=0, lun=0, size=512) == (
            -32000,
            "the session has not done it in 2 s: it will when it can",
        )
        assert client.ask("list_disks") == [ONE]
        assert (
            client.ask("set_fault", target=0, lun=0)[1]
            == "the session is still stuck, with resize_disk to do"
        )
        os.kill(session, signal.SIGCONT)
        deadline = time.monotonic() + 10
        while client.ask("list_disks") == [ONE] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert client.ask("list_disks") == [entry(0, 0, 512, "one")]
        assert command(front, bytes(6))[1] == "2a09"
        assert client.ask("set_fault", target=0, lun=0) is True


def test_what_a_session_was_told_when_it_died_is_done_for_the_next(scsi, control):
    with Client(control) as client:
        with driver(scsi.path):
            session = stopped(scsi)
            client.ask("add_disk", target=5, lun=0, disk="ram:1M,id=five")
            os.kill(session, signal.SIGKILL)
        with driver(scsi.path) as front:
            assert command(front, bytes(6), target=5)[1] == "2900"
        assert client.ask("list_disks") == [ONE, entry(5, 0, MIB, "five")]
    assert "killed by SIGKILL" in scsi.line()


def test_a_session_that_is_stuck_when_its_front_end_leaves_is_ended_whatever_clients_ask(blk, control):
    with FrontEnd.connect(blk.path) as front:
        front.number(fe.GET_FEATURES)
        stopped(blk)
    with Client(control) as client, FrontEnd.connect(blk.path) as second:
        second.send(fe.GET_FEATURES)
        deadline = time.monotonic() + 8
        while not (answered := select.select([second.sock], [], [], 0.01)[0]) and time.monotonic() < deadline:
            client.ask("list_disks")
        assert answered
        assert "stuck when its front end left" in blk.line()


def test_a_front_end_that_cannot_be_told_ends_its_session_and_the_change_is_made(scsi, control):
    with Client(control) as client, FrontEnd.connect(scsi.path) as front:
        front.hello(fe.VERSION_1 | fe.PROTOCOL_FEATURES | HOTPLUG)
        front.ring(1)
        front.rings[1].describe(0, GUEST + 0x70000, 4, fe.WRITE)
        front.rings[1].offer(0)
        front.number(fe.GET_FEATURES)
        assert client.ask("add_disk", target=5, lun=0, disk="ram:1M,id=five") == entry(5, 0, MIB, "five")
        assert front.ended()
        assert "event buffer of 4 bytes, want 16" in scsi.line()
        assert client.ask("list_disks") == [ONE, entry(5, 0, MIB, "five")]


def test_descriptors_do_not_pile_up(scsi, control):
    with Client(control) as client, driver(scsi.path):
        for _ in range(30):
            client.ask("add_disk", target=5, lun=0, disk="ram:1M")
            client.ask("add_disk", target=5, lun=0, disk="ram:1M")  # refused
            client.ask("remove_disk", target=5, lun=0)
        pid = scsi.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            assert len(os.listdir(f"/proc/{children.read().strip()}/fd")) < 40
    assert scsi.idle()


# `serve`.


def test_served_is_controlled_by_calls():
    with virtio.target.serve("scsi", "ram:1M,id=one", control=True) as served:
        assert stat.S_IMODE(os.stat(f"{served.path}.control").st_mode) == 0o600
        assert served.control("list_disks") == [ONE]
        served.control("add_disk", target=1, lun=0, disk="ram:2M,id=two")
        assert served.control("list_disks") == [ONE, entry(1, 0, 2 * MIB, "two")]
        with pytest.raises(RequestError, match="there is no disk 4:0"):
            served.control("remove_disk", target=4, lun=0)
    with pytest.raises(TransportError):
        served.control("list_disks")


def test_served_without_a_control_socket_says_so():
    with virtio.target.serve("blk", "ram:1M") as served:
        with pytest.raises(RequestError, match="control=True"):
            served.control("list_disks")
        assert not os.path.exists(f"{served.path}.control")


def test_a_control_socket_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr("virtio.target.process._ANSWER_S", 0.1)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        served = virtio.target.process.Served("", 0, path)
        with pytest.raises(RequestTimeout, match="has not answered in 0.1 s"):
            served.control("list_disks")
