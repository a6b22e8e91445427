"""`virtio-bdev demo`."""

from tests.cli.program import output


def test_both_kinds_of_disks_are_verified_and_timed():
    text = output("demo").decode()
    for name in ("VirtioScsi0t0", "VirtioBlk0"):
        assert f"{name}: 64 MiB written in " in text and " random 4 KiB reads a second" in text
    assert text.count("and verified") == 2
