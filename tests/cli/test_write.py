"""`virtio-bdev write`."""

import os
import random
import signal
import subprocess

import pytest

from tests.cli.program import PROGRAM, children, eventually, output, run, started, stop

DATA = random.Random(2).randbytes(1 << 20)


@pytest.fixture
def arguments(disk):
    return ["write", disk.address, "--dev-type", "blk"]


def test_a_file_lands_where_it_is_told_to(arguments, image, tmp_path):
    (tmp_path / "data").write_bytes(DATA[:1024])
    assert output(*arguments, "-i", tmp_path / "data", "--offset", "4k") == b""
    assert image.read_bytes() == bytes(4096) + DATA[:1024] + bytes((1 << 20) - 5120)


def test_stdin_fills_the_disk(arguments, image):
    output(*arguments, stdin=DATA)
    assert image.read_bytes() == DATA


@pytest.mark.parametrize("options", [[], ["--pad", "zeros"]])
def test_nothing_is_written_as_nothing(arguments, image, options):
    output(*arguments, *options)
    assert image.read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize("source", ["file", "pipe"])
def test_padding_fills_the_last_block_and_no_more(arguments, image, tmp_path, source):
    image.write_bytes(b"\xff" * (1 << 20))
    (tmp_path / "data").write_bytes(DATA[:1000])
    if source == "file":
        output(*arguments, "--pad", "zeros", "-i", tmp_path / "data")
    else:
        output(*arguments, "--pad", "zeros", stdin=DATA[:1000])
    assert image.read_bytes() == DATA[:1000] + bytes(24) + b"\xff" * ((1 << 20) - 1024)


@pytest.mark.parametrize("source", ["file", "pipe"])
@pytest.mark.parametrize(
    "nbytes, options, words",
    [
        (1000, [], "1000 bytes are not a multiple of the 512-byte blocks of VirtioBlk0: --pad zeros"),
        (1024, ["--offset", "100"], " bytes at 100 are not on the 512-byte grid"),
        (1000, ["--offset", "100", "--pad", "zeros"], " bytes at 100 are not on the 512-byte grid"),
        ((1 << 20) + 512, [], "1049088 bytes at 0 do not lie within the 1048576 bytes"),
        (513, ["--offset", "1048064", "--pad", "zeros"], "1024 bytes at 1048064 do not lie within"),
        (512, ["--offset", "2M"], " bytes at 2097152 do not lie within"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_byte(
    arguments, image, tmp_path, source, nbytes, options, words
):
    data = (DATA * 2)[:nbytes]
    (tmp_path / "data").write_bytes(data)
    if source == "file":
        done = run(*arguments, *options, "-i", tmp_path / "data")
    else:
        done = run(*arguments, *options, stdin=data)
    assert done.returncode == 1 and words in done.stderr.decode() and done.stderr.count(b"\n") == 1
    assert image.read_bytes() == bytes(1 << 20)


def test_a_redirected_file_is_measured_from_where_it_stands(arguments, image, tmp_path):
    (tmp_path / "data").write_bytes(DATA[:1536])
    with open(tmp_path / "data", "rb", buffering=0) as file:
        file.seek(512)
        subprocess.run([*PROGRAM, *arguments], stdin=file, check=True)
    assert image.read_bytes()[:1024] == DATA[512:1536]


def test_a_pipe_that_gives_little_at_a_time_is_read_to_its_end(arguments, image):
    with subprocess.Popen([*PROGRAM, *arguments], stdin=subprocess.PIPE) as process:
        for i in range(0, 4096, 256):
            os.write(process.stdin.fileno(), DATA[i : i + 256])
    assert process.returncode == 0
    assert image.read_bytes()[:4096] == DATA[:4096]


def test_a_read_only_disk_is_named(scsi):
    done = run("write", scsi.address, "--bdev", "VirtioScsi0t6", stdin=bytes(512))
    assert (done.returncode, done.stderr) == (1, b"virtio-bdev: VirtioScsi0t6 is read-only\n")


@pytest.mark.parametrize("name, words", [("none", "No such file or directory"), ("", "Is a directory")])
def test_an_input_that_cannot_be_read_is_named(arguments, tmp_path, name, words):
    done = run(*arguments, "-i", tmp_path / name)
    assert (done.returncode, done.stderr.decode()) == (1, f"virtio-bdev: {tmp_path / name}: {words}\n")


def test_ctrl_c_ends_it_with_130_and_the_device_is_free_again(arguments, disk, image):
    with started(*arguments, stdin=subprocess.PIPE) as process:
        assert eventually(lambda: children(disk.pid))
        assert stop(process, signal.SIGINT) == (130, b"")
    assert eventually(lambda: not children(disk.pid))
    output(*arguments, stdin=DATA)
    assert image.read_bytes() == DATA
