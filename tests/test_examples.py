"""The examples run, against the embedded target."""

import subprocess
import sys

import pytest

from tests.conftest import INTERPRETED, ROOT
from virtio.target import serve

EXAMPLE = ROOT / "examples/verify_disk.py"

needs_buffers = pytest.mark.skipif(
    INTERPRETED and sys.version_info < (3, 12),
    reason="interpreted classes have the buffer protocol from Python 3.12 on",
)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_buffers
@pytest.mark.parametrize("dev_type", ["blk", "scsi"])
def test_a_disk_is_verified(dev_type):
    with serve(dev_type, "ram:16M") as target:
        ran = run(EXAMPLE, target.address, dev_type)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith(": 0 bad blocks of 4096\n")


@needs_buffers
def test_bad_blocks_are_told_and_counted(tmp_path):
    """A copy of the example writes each block to another one's place."""
    careless = tmp_path / "careless.py"
    careless.write_text(EXAMPLE.read_text().replace("pattern, batch", "pattern, reversed(batch)"))
    with serve("blk", "ram:8M") as target:
        ran = run(careless, target.address, "blk")
    assert ran.returncode == 1
    assert ran.stderr.startswith("bad block at ")
    assert ran.stdout == "VirtioBlk0: 2048 bad blocks of 2048\n"


def test_without_arguments_it_says_what_it_takes():
    ran = run(EXAMPLE)
    assert ran.returncode == 1
    assert "python verify_disk.py user:" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_an_error_is_one_line():
    ran = run(EXAMPLE, "user:/nowhere.sock", "blk")
    assert ran.returncode == 1
    assert ran.stderr.startswith("verify_disk.py: ")
    assert "there is no such socket" in ran.stderr
    assert ran.stderr.count("\n") == 1
