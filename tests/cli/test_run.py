"""`virtio-bdev run`."""

import json
import os
import signal
import socket
import urllib.request

import pytest

from tests.cli.program import lines_until, output, run, started, stop
from virtio.target import serve


def config(tmp_path, text):
    path = tmp_path / "bdev.conf"
    path.write_text(text)
    return path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_attaches_all_says_so_holds_them_and_lets_go(tmp_path, scsi, blk, number):
    text = f"""
# as in the README of the original module
[Virtio]
  Dev User {scsi.path}
  Dev User {blk.path} blk name=Fast0 queues=2
"""
    with started("run", "--config", config(tmp_path, text)) as process:
        lines = lines_until(process, b"ready")
        names = [line.split()[0].decode() for line in lines]
        assert names == ["NAME", "VirtioScsi0t0", "VirtioScsi0t5l3", "VirtioScsi0t6", "Fast0", "ready"]
        done = run("list", blk.address, "--dev-type", "blk", "--timeout", "0.3")
        assert done.returncode == 1 and b"serves another front end" in done.stderr  # it is held
        assert stop(process, number) == (0, b"")
    assert output("list", blk.address, "--dev-type", "blk").startswith(b"NAME")


def test_an_error_names_the_line_and_leaves_nothing_attached(tmp_path, blk):
    path = config(tmp_path, f"[Virtio]\nDev User {blk.path} blk\nDev User {tmp_path}/none\n")
    done = run("run", "--config", path)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(f"virtio-bdev: {path}:3: cannot connect to {tmp_path}/none".encode())
    assert done.stderr.count(b"\n") == 1
    assert output("list", blk.address, "--dev-type", "blk").startswith(b"NAME")


def test_a_lost_device_is_reported_and_the_others_are_held(tmp_path, blk):
    with serve("scsi", "ram:1M") as other:
        path = config(tmp_path, f"[Virtio]\nDev User {other.path}\nDev User {blk.path} blk\n")
        with started("run", "--config", path) as process:
            lines_until(process, b"ready")
            os.kill(other.pid, signal.SIGTERM)
            line = process.stderr.readline()
            assert line.startswith(f"virtio-bdev: VirtioScsi0 is lost: the back end at {other.path}".encode())
            done = run("list", blk.address, "--dev-type", "blk", "--timeout", "0.3")
            assert b"serves another front end" in done.stderr
            assert stop(process) == (0, b"")


def test_without_any_device_left_it_fails(tmp_path):
    with serve("scsi", "ram:1M") as only:
        path = config(tmp_path, f"[Virtio]\nDev User {only.path}\n")
        with started("run", "--config", path) as process:
            lines_until(process, b"ready")
            os.kill(only.pid, signal.SIGTERM)
            said = process.communicate(timeout=30)[1].decode().splitlines()
            assert process.returncode == 1 and len(said) == 2
            assert said[1] == "virtio-bdev: every device is lost"


def test_sections_of_other_modules_are_named_and_passed_over(tmp_path, blk):
    path = config(
        tmp_path, f"[Global]\n  Comment x\n[Virtio]\nDev User {blk.path} blk\n[Malloc]\n  Number 1\n"
    )
    with started("run", "--config", path) as process:
        lines_until(process, b"ready")
        want = f"virtio-bdev: {path}: not for us, and skipped: [Global], [Malloc]\n".encode()
        assert stop(process) == (0, want)


def test_a_bad_line_is_told_before_anything_is_attached(tmp_path):
    path = config(tmp_path, f"[Virtio]\nDev User {tmp_path}/none\nDev Usr x\n")
    done = run("run", "--config", path)
    assert done.returncode == 1
    assert done.stderr.decode() == f"virtio-bdev: {path}:3: 'Usr': want User PATH or Pci after Dev\n"


@pytest.mark.parametrize("name, words", [("none", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, words):
    done = run("run", "--config", tmp_path / name)
    assert (done.returncode, done.stderr.decode()) == (1, f"virtio-bdev: {tmp_path / name}: {words}\n")


def test_a_killed_daemon_comes_back_the_same(tmp_path, scsi, blk):
    """Names and uuids are those of before, from the configuration that was saved."""
    path, saved = tmp_path / "rpc.sock", tmp_path / "saved.json"
    text = f"[Virtio]\nDev User {scsi.path} queues=2\nDev User {blk.path} blk reconnect=2.5\n"
    found = []
    for source in (config(tmp_path, text), saved):
        with started("run", "--config", source, "--rpc-socket", path) as process:
            lines_until(process, b"ready")
            found.append(json.loads(output("rpc", "--rpc-socket", path, "bdev_get_bdevs")))
            if source is not saved:
                saved.write_bytes(output("rpc", "--rpc-socket", path, "save_config"))
                before = saved.read_bytes()
            else:
                assert output("rpc", "--rpc-socket", path, "save_config") == before
            process.kill()
    assert found[0] == found[1] and len(found[0]) == 4


def test_the_service_manager_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        options = {"env": {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}}
        with started("run", "--rpc-socket", tmp_path / "rpc.sock", **options) as process:
            assert manager.recv(100) == b"READY=1"
            assert stop(process) == (0, b"")
            assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("calls", [[], [{"method": "bdev_nvme_set_hotplug"}]])
def test_a_file_of_spdks_without_a_device_is_an_error_unless_others_can_attach_some(tmp_path, calls):
    text = json.dumps({"subsystems": [{"subsystem": "bdev", "config": calls}]})
    path = config(tmp_path, text)
    done = run("run", "--config", path)
    assert (done.returncode, done.stdout) == (1, b"")
    want = f"virtio-bdev: {path}: no device, want a bdev_virtio_attach_controller"
    assert done.stderr.decode().splitlines()[-1] == want
    with started("run", "--config", path, "--rpc-socket", tmp_path / "rpc.sock") as process:
        lines_until(process, b"ready")
        assert stop(process)[0] == 0


def test_it_wants_something_to_do():
    done = run("run")
    assert done.returncode == 2 and b"want --config FILE, --rpc-socket PATH, or both" in done.stderr


def test_a_device_that_is_lost_leaves_a_daemon_with_a_socket_running(tmp_path):
    with serve("scsi", "ram:1M") as only:
        path = config(tmp_path, f"[Virtio]\nDev User {only.path}\n")
        with started("run", "--config", path, "--rpc-socket", tmp_path / "rpc.sock") as process:
            lines_until(process, b"ready")
            os.kill(only.pid, signal.SIGTERM)
            assert b"is lost" in process.stderr.readline()
            assert output("rpc", "--rpc-socket", tmp_path / "rpc.sock", "bdev_get_bdevs") == b"[]\n"
            assert stop(process) == (0, b"")


def test_prometheus_can_ask_for_metrics(tmp_path, blk):
    path = config(tmp_path, f"[Virtio]\nDev User {blk.path} blk\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with started("run", "--config", path, "--metrics", port) as process:
        lines_until(process, b"ready")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        assert 'virtio_bdev_size_bytes{bdev="VirtioBlk0"} 4.194304e+06' in lines
        assert 'virtio_bdev_requests_total{bdev="VirtioBlk0",operation="read"} 0.0' in lines
        assert stop(process) == (0, b"")


@pytest.mark.parametrize("address", ["foo", "99999"])
def test_metrics_at_what_is_no_port_are_wrong_usage(tmp_path, address):
    done = run("run", "--rpc-socket", tmp_path / "rpc.sock", "--metrics", address)
    assert done.returncode == 2
    assert f"{address!r}: want PORT or HOST:PORT, a port up to 65535" in done.stderr.decode()
    assert not (tmp_path / "rpc.sock").exists()


def test_metrics_at_what_no_host_is_called_are_an_error(tmp_path):
    done = run("run", "--rpc-socket", tmp_path / "rpc.sock", "--metrics", "..:9000")
    assert done.returncode == 1 and b"cannot serve metrics at ..:9000: " in done.stderr
    assert done.stderr.count(b"\n") == 1 and not (tmp_path / "rpc.sock").exists()


def test_metrics_at_a_port_in_use_are_an_error_that_leaves_no_rpc_socket(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("run", "--rpc-socket", tmp_path / "rpc.sock", "--metrics", port)
    said = f"virtio-bdev: cannot serve metrics at 127.0.0.1:{port}: Address already in use [EADDRINUSE]\n"
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", said)
    assert not (tmp_path / "rpc.sock").exists()
