"""`virtio-bdev scsi`."""

import pytest

from tests.cli.program import output, run
from virtio.target import serve

INQUIRY = "12 00 00 00 24 00".split()


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 4096)
    with serve("scsi", f"2:5=file:{path}") as target:
        yield target, path


def test_data_from_the_unit_is_shown_in_hexadecimal_and_as_text(disk):
    shown = output("scsi", disk[0].address, "--lun", "2:5", "--in", 36, *INQUIRY).decode().splitlines()
    assert shown[0] == "status GOOD"
    assert shown[1] == "000000  00 00 06 12 1f 00 00 02 56 49 52 54 49 4f 20 20  |........VIRTIO  |"
    assert shown[3] == "000020  31 20 20 20                                      |1   |"


def test_data_goes_to_and_comes_from_files_raw(disk, tmp_path):
    target, path = disk
    block = tmp_path / "block"
    block.write_bytes(b"from here to the unit".ljust(512, b"."))
    write, read = "2a000000000300000100", "28000000000300000100"
    assert output("scsi", target.address, "--lun=2:5", "-i", block, write) == b"status GOOD\n"
    assert path.read_bytes()[3 * 512 : 4 * 512] == block.read_bytes()
    back = tmp_path / "back"
    assert output("scsi", target.address, "--lun=2:5", "--in=512", "-o", back, read) == b"status GOOD\n"
    assert back.read_bytes() == block.read_bytes()
    done = run("scsi", target.address, "--lun=2:5", "--in=512", "-o-", read)
    assert (done.stdout, done.stderr) == (block.read_bytes(), b"status GOOD\n")


def test_sense_is_put_into_words_and_the_exit_status_is_1(disk):
    done = run("scsi", disk[0].address, "--lun", "2:5", "ff0000000000")
    assert done.returncode == 1 and done.stderr == b""
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "status CHECK CONDITION"
    assert lines[1].startswith("sense  70 00 05") and "invalid command operation code (asc 20/00)" in lines[1]


@pytest.mark.parametrize(
    "arguments, status, words",
    [
        (["--lun=3:0", *INQUIRY], 1, "virtio-bdev: virtio-scsi response BAD TARGET"),
        (["--lun=300:0", *INQUIRY], 1, "virtio-bdev: target 300 LUN 0, there are 0 to 255 and 0 to 16383"),
        (["--lun=2", *INQUIRY], 2, "want target and LUN, such as 0:0"),
        (INQUIRY, 2, "Missing option '--lun'"),
        (["--lun=2:5", "12", "0"], 2, "'12 0': want bytes in hexadecimal"),
        (["--lun=2:5", "zz"], 2, "'zz': want bytes in hexadecimal"),
        (["--lun=2:5"], 2, "Missing argument 'CDB-HEX...'"),
        (["--lun=2:5", "12" * 33], 1, "virtio-bdev: a command of 33 bytes, want 1 to 32"),
        (["--lun=2:5", "--in=2M", *INQUIRY], 1, "0 bytes to the device and 2097152 from it"),
        (["--lun=2:5", "-i", "/dev/zero", *INQUIRY], 1, "1048577 bytes to the device and 0 from it"),
        (["--lun=2:5", "-i", "/nowhere", *INQUIRY], 1, "virtio-bdev: /nowhere: No such file or directory"),
    ],
)
def test_wrong_use_is_an_error_that_says_so(disk, arguments, status, words):
    done = run("scsi", disk[0].address, *arguments)
    assert done.returncode == status and words in done.stderr.decode() and done.stdout == b""
    assert b"Traceback" not in done.stderr


def test_a_blk_device_takes_no_scsi_commands(blk):
    done = run("scsi", blk.address, "--dev-type=blk", "--lun=0:0", *INQUIRY)
    assert done.returncode == 1
    assert (
        done.stderr == b"virtio-bdev: VirtioBlk0 is not a virtio-scsi controller: it takes no SCSI commands\n"
    )
