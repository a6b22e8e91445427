"""`virtio-bdev target`."""

import signal

import pytest

import virtio_bdev
from tests.cli.program import children, eventually, has_ended, lines_until, output, run, started, stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_and_leaves_nothing(tmp_path, number):
    path = tmp_path / "disk.sock"
    with started("target", path, "--disk", "ram:1M", "--disk", "3:1=ram:2M,ro") as process:
        assert lines_until(process, b"ready: ") == [f"ready: {path}\n".encode()]
        assert output("list", f"user:{path}").count(b"\n") == 3
        with virtio_bdev.attach(f"user:{path}"):
            (session,) = children(process.pid)
            assert stop(process, number) == (0, b"")
    assert not path.exists()
    assert eventually(lambda: has_ended(session))


def test_a_second_target_at_the_same_place_is_refused(tmp_path):
    path = tmp_path / "disk.sock"
    with started("target", path, "--disk", "ram:1M") as process:
        lines_until(process, b"ready: ")
        done = run("target", path, "--disk", "ram:1M")
        assert (done.returncode, done.stdout) == (1, b"") and b"belongs to a living process" in done.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        ([], "Missing option '--disk'"),
        (["--disk", "tape:1"], "want ram:SIZE or file:PATH"),
        (["--disk", "ram:1Z"], "disk 'ram:1Z': size '1Z', want a number"),
        (["--disk", "ram:1M,bs=100"], "block size 100"),
        (["--disk", "ram:1M", "--disk", "ram:1M", "--dev-type", "blk"], "2 disks, a blk target has one"),
        (["--disk", "300:0=ram:1M"], "300:0 for '300:0=ram:1M', want up to 255:16383"),
    ],
)
def test_disks_that_cannot_be_are_wrong_usage(tmp_path, options, words):
    done = run("target", tmp_path / "s", *options)
    assert done.returncode == 2 and words in done.stderr.decode() and done.stderr.startswith(b"Usage: ")


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    done = run("target", tmp_path / "s", "--disk", f"file:{tmp_path}/none")
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"/none: No such file or directory" in done.stderr
