"""The socket: pipelines, batches, rude and slow clients, and who may have its path."""

import contextlib
import json
import os
import random
import signal
import socket
import stat
import time

import pytest

from tests.cli.program import lines_until, run, started, stop
from tests.rpc.conftest import exchange


def request(number, method="rpc_get_methods", **params):
    message = {"jsonrpc": "2.0", "method": method}
    if number is not None:
        message["id"] = number
    return message | ({"params": params} if params else {})


def answers(path, *messages, text=None):
    data = text if text is not None else "".join(map(json.dumps, messages)).encode()
    return [json.loads(line) for line in exchange(path, data, len(messages)).splitlines()]


def test_requests_without_anything_between_them_are_all_answered(daemon):
    found = answers(daemon, *(request(number) for number in range(100)))
    assert sorted(answer["id"] for answer in found) == list(range(100))


def test_a_batch_is_answered_as_one_and_in_order(daemon):
    (found,) = answers(daemon, [request(1), request("two", "nope"), 3, request(None), request(4)])
    assert [answer["id"] for answer in found] == [1, "two", None, 4]
    assert [answer.get("error", {}).get("code") for answer in found] == [None, -32601, -32600, None]


def test_notifications_get_no_answer(daemon):
    (found,) = answers(
        daemon, request(5), text=json.dumps(request(None)).encode() + json.dumps(request(5)).encode()
    )
    assert found["id"] == 5


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"id": 1},
        {"id": 1, "method": 3},
        {"id": [], "method": "x"},
        {"id": 1, "method": "rpc_get_methods", "jsonrpc": "1.0"},
        {"id": 1, "method": "rpc_get_methods", "more": 1},
        [],
        [[]],
    ],
)
def test_what_is_no_request_is_told_so(daemon, message):
    (found,) = answers(daemon, message)
    for one in found if isinstance(found, list) else [found]:
        assert one["error"]["code"] == -32600


def test_an_unknown_method_or_parameter_is_answered_by_what_there_is(daemon):
    (method,) = answers(daemon, request(1, "nope"))
    assert method["error"] == {"code": -32601, "message": "Method not found: rpc_get_methods lists them"}
    (parameter,) = answers(daemon, request(1, "bdev_get_bdevs", uuid="x"))
    assert parameter["error"]["code"] == -32603
    assert parameter["error"]["message"].endswith("unknown field `uuid`: it takes name, timeout")


def test_a_call_that_waits_holds_up_nobody_not_even_its_own_client(daemon):
    waiting = request(1, "bdev_get_bdevs", name="later", timeout=500)
    begun = time.monotonic()
    first, second = answers(daemon, waiting, request(2))
    assert (first["id"], second["id"]) == (2, 1)
    assert second["error"]["code"] == -110 and 0.45 < time.monotonic() - begun < 10


def test_a_client_that_reads_nothing_stops_only_itself(daemon):
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(daemon)
        rude.setblocking(False)
        data = json.dumps(request(1)).encode() * 1000
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):
                rude.send(data)
        assert answers(daemon, request(2))[0]["id"] == 2


def test_as_many_clients_as_come_are_served_or_sent_away(daemon):
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            idle = stack.enter_context(socket.socket(socket.AF_UNIX))
            idle.connect(daemon)
    assert answers(daemon, request(2))[0]["id"] == 2


def test_random_bytes_and_odd_requests_do_no_harm(daemon):
    chance = random.Random(1)
    methods = ["bdev_get_bdevs", "load_config", "bdev_virtio_attach_controller", "log_set_level", "x"]
    odd = [None, -1, 1e300, "", "\0", [], {}, [[]], {"name": None}, {"timeout": -1}, True, 1 << 70]
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        kind = chance.randrange(3)
        if kind == 0:
            text = chance.randbytes(chance.randrange(1, 200))
        elif kind == 1:
            text = json.dumps(request(1, chance.choice(methods), name=chance.choice(odd))).encode()
            text = text[: chance.randrange(len(text))] + chance.choice([b"", b"}", b"]]", b"\xff"])
        else:
            message = request(chance.choice(odd), chance.choice(methods))
            text = json.dumps(message | {"params": chance.choice(odd)}).encode()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(daemon)
            sock.settimeout(0.02)
            with contextlib.suppress(OSError):
                sock.sendall(text)
                sock.recv(65536)
    assert answers(daemon, request(2))[0]["id"] == 2


def test_only_its_user_may_connect(daemon):
    assert stat.S_IMODE(os.stat(daemon).st_mode) == 0o600


def test_a_living_daemon_keeps_its_socket_and_a_dead_one_leaves_it(tmp_path):
    path = str(tmp_path / "rpc.sock")
    with started("run", "--rpc-socket", path) as first:
        lines_until(first, b"ready")
        done = run("run", "--rpc-socket", path)
        assert done.returncode == 1 and b"belongs to a living process" in done.stderr
        assert answers(path, request(1))[0]["id"] == 1
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with started("run", "--rpc-socket", path) as second:
            lines_until(second, b"ready")
            assert answers(path, request(1))[0]["id"] == 1
            assert stop(second) == (0, b"")
    assert not os.path.exists(path)


def test_where_no_daemon_is_the_client_says_how_to_run_one(tmp_path):
    done = run("rpc", "--rpc-socket", tmp_path / "none", "rpc_get_methods")
    assert done.returncode == 1
    assert b"is the daemon (`virtio-bdev run --rpc-socket PATH`) running, with this path?" in done.stderr


def test_what_is_no_socket_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    done = run("run", "--rpc-socket", path)
    assert done.returncode == 1 and b"is not a socket" in done.stderr
    assert path.read_text() == "precious"
