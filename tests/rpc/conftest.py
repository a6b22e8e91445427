"""A daemon in a process of its own, with SPDK's client connected to it."""

import socket

import pytest
from spdk.rpc.client import JSONRPCClient

from tests.cli.program import eventually, lines_until, started
from tests.conftest import INTERPRETED
from virtio.target import serve


@pytest.fixture(scope="module")
def blk():
    with serve("blk", ram="16M") as target:
        yield target


@pytest.fixture(scope="module")
def scsi():
    with serve("scsi", "0:0=ram:8M", "3:1=ram:8M", control=True) as target:
        yield target


@pytest.fixture
def daemon(tmp_path):
    """The path of its socket."""
    if INTERPRETED:
        pytest.skip("the daemon is the same Python in both runs: the compiled one has had it")
    path = str(tmp_path / "rpc.sock")
    with started("run", "--rpc-socket", path) as process:
        lines_until(process, b"ready")
        yield path
        assert process.poll() is None, process.stderr.read()


@pytest.fixture
def client(daemon):
    with JSONRPCClient(daemon, timeout=20) as client:
        yield client


def exchange(path, text, answers=1):
    """What comes back for bytes, up to so many lines or the end."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(text)
        received = b""
        while received.count(b"\n") < answers and (data := sock.recv(65536)):
            received += data
        return received


__all__ = ["eventually", "exchange"]
