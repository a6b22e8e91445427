"""The examples run, against the embedded target."""

import subprocess
import sys

import pytest

from tests.conftest import INTERPRETED, ROOT
from virtio.target import serve


@pytest.mark.skipif(
    INTERPRETED and sys.version_info < (3, 12),
    reason="interpreted classes have the buffer protocol from Python 3.12 on",
)
@pytest.mark.parametrize("dev_type", ["blk", "scsi"])
def test_a_disk_is_verified(dev_type):
    with serve(dev_type, "ram:16M") as target:
        run = subprocess.run(
            [sys.executable, ROOT / "examples/verify_disk.py", target.address, dev_type],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.endswith(": 0 bad blocks of 4096\n")
