"""`virtio-bdev demo`."""

import signal

import pytest

from tests.cli.program import children, eventually, has_ended, output, started, stop


def test_both_kinds_of_disks_are_verified_and_timed():
    text = output("demo").decode()
    for name in ("VirtioScsi0t0", "VirtioBlk0"):
        assert f"{name}: 64 MiB written in " in text and " random 4 KiB reads a second" in text
    assert text.count("and verified") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_its_targets_end_too(number):
    with started("demo") as process:
        assert eventually(lambda: [pid for target in children(process.pid) for pid in children(target)])
        targets = children(process.pid)
        sessions = [pid for target in targets for pid in children(target)]
        status, said = stop(process, number)
    assert (status, said) == ((130, b"") if number == signal.SIGINT else (-signal.SIGKILL, b""))
    assert eventually(lambda: all(map(has_ended, [*targets, *sessions])))
