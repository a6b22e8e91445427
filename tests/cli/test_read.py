"""`virtio-bdev read`."""

import os
import random
import signal
import subprocess

import pytest

from tests.cli.program import PROGRAM, lines_until, output, run, started, stop
from virtio.target import serve

DATA = random.Random(1).randbytes(1 << 20)


@pytest.fixture
def image(image):
    image.write_bytes(DATA)
    return image


@pytest.fixture
def arguments(disk):
    return ["read", disk.address, "--dev-type", "blk"]


def test_a_whole_disk_goes_to_stdout(arguments):
    assert output(*arguments) == DATA


@pytest.mark.parametrize(
    "options, begin, end",
    [
        (["--offset", "4k"], 4096, 1 << 20),
        (["--length", "1KiB"], 0, 1024),
        (["--offset", "512", "--length", "0.5k"], None, None),
        (["--offset", "512", "--length", "512"], 512, 1024),
        (["--offset", "1MiB"], 1 << 20, 1 << 20),
        (["--offset", "1023k", "--length", "1024b"], (1 << 20) - 1024, 1 << 20),
    ],
)
def test_a_part_is_told_by_offset_and_length(arguments, options, begin, end):
    if begin is None:
        done = run(*arguments, *options)
        assert done.returncode == 2 and b"is not a size, such as 4096, 4k, 64M or 2GiB" in done.stderr
    else:
        assert output(*arguments, *options) == DATA[begin:end]


def test_a_file_is_made_or_overwritten(arguments, tmp_path):
    for _ in range(2):
        assert output(*arguments, "-o", tmp_path / "copy") == b""
        assert (tmp_path / "copy").read_bytes() == DATA
    assert output(*arguments, "--length", "512", "-o", tmp_path / "copy") == b""
    assert (tmp_path / "copy").read_bytes() == DATA[:512]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--offset", "2M"], "--offset 2097152 is past the end of VirtioBlk0, 1048576 bytes"),
        (["--length", "2M"], "2097152 bytes at 0 do not lie within the 1048576 bytes"),
        (["--offset", "100", "--length", "512"], "not on the 512-byte grid"),
        (["--length", "100"], "not on the 512-byte grid"),
        (["--offset", "99999999999T"], "is past the end of VirtioBlk0"),
    ],
)
def test_a_wrong_range_is_refused_before_the_file_is_touched(arguments, tmp_path, options, words):
    (tmp_path / "copy").write_bytes(b"precious")
    done = run(*arguments, *options, "-o", tmp_path / "copy")
    assert done.returncode == 1 and words in done.stderr.decode() and done.stderr.count(b"\n") == 1
    assert (tmp_path / "copy").read_bytes() == b"precious"


def test_of_several_disks_one_is_named(scsi):
    done = run("read", scsi.address)
    assert done.returncode == 1
    assert b"has 3 disks: name one with --bdev (VirtioScsi0t0, VirtioScsi0t5l3, Virtio" in done.stderr
    assert output("read", scsi.address, "--bdev", "VirtioScsi0t5l3") == bytes(1 << 20)
    done = run("read", scsi.address, "--bdev", "Virtio9")
    assert done.returncode == 1 and b"has no disk Virtio9; it has: VirtioScsi0t0, " in done.stderr


def test_a_reader_that_leaves_is_no_news(arguments):
    """Broken pipe: silent, and the device is free again."""
    read, write = os.pipe()
    with subprocess.Popen([*PROGRAM, *arguments], stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        assert len(os.read(read, 1024)) == 1024
        os.close(read)
        assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == 1
    assert output(*arguments, "--length", "512") == DATA[:512]


def test_ctrl_c_ends_it_with_130_and_the_device_is_free_again(tmp_path):
    with serve("blk", "ram:64M,delay=0.2", path=str(tmp_path / "s")) as slow:
        arguments = ["read", slow.address, "--dev-type", "blk", "--queues", "1"]
        os.mkfifo(tmp_path / "fifo")
        with started(*arguments, "-o", tmp_path / "fifo") as process:
            with open(tmp_path / "fifo", "rb", buffering=0) as fifo:
                assert fifo.read(512)  # it is amid the transfer
                status, said = stop(process, signal.SIGINT)
        assert (status, said.strip()) == (130, b"")
        assert output(*arguments, "--length", "512") == bytes(512)


def test_a_terminal_is_spared_the_bytes_and_given_a_bar(arguments, tmp_path):
    ours, theirs = os.openpty()
    try:
        with subprocess.Popen([*PROGRAM, *arguments], stdout=theirs, stderr=subprocess.PIPE) as process:
            said = process.communicate(timeout=30)[1]
        assert process.returncode == 2 and b"standard output is a terminal: name a file with -o" in said
        with subprocess.Popen([*PROGRAM, *arguments, "-o", tmp_path / "copy"], stderr=theirs) as process:
            assert process.wait(30) == 0
        assert b"reading VirtioBlk0" in os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (tmp_path / "copy").read_bytes() == DATA


def test_started_programs_can_be_waited_for(disk):
    with started("list", disk.address, "--dev-type", "blk") as process:
        assert lines_until(process, b"VirtioBlk0")[0].startswith(b"NAME")
