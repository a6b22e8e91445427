"""`virtio-bdev list`, and what is true of every command."""

import json
import os
import re
import subprocess

import pytest

from tests.cli.program import PROGRAM, output, run
from virtio_bdev.cli import _COMMANDS


def test_one_line_a_disk_in_the_order_of_target_and_lun(scsi):
    lines = output("list", scsi.address).decode().splitlines()
    assert lines == [
        "NAME             SIZE   BLOCK  BLOCKS  MODE  SERIAL  PRODUCT",
        "VirtioScsi0t0    8 MiB  512    16384   rw    A       Virtio SCSI Disk",
        "VirtioScsi0t5l3  1 MiB  4096   256     rw    B       Virtio SCSI Disk",
        "VirtioScsi0t6    1 MiB  512    2048    ro    C       Virtio SCSI Disk",
    ]


def test_a_virtio_blk_device_is_one_disk_under_the_name_that_it_is_given(blk):
    lines = output("list", blk.address, "--dev-type", "blk", "--name", "Fast0").decode().splitlines()
    assert lines[1:] == ["Fast0  4 MiB  4096   1024    rw    SN1     VirtioBlk Disk"]


def test_json_is_that_of_spdk(scsi):
    disks = json.loads(output("list", scsi.address, "--json"))
    assert [disk["name"] for disk in disks] == ["VirtioScsi0t0", "VirtioScsi0t5l3", "VirtioScsi0t6"]
    assert [disk["num_blocks"] * disk["block_size"] for disk in disks] == [8 << 20, 1 << 20, 1 << 20]
    assert disks[0]["driver_specific"]["virtio"]["socket"] == scsi.path


def test_v_shows_every_message_with_time_direction_and_descriptors(blk):
    arguments = ["list", blk.address, "--dev-type=blk", "--queues=1"]
    for verbose in (["-v", *arguments], [*arguments, "-v"]):  # before the command, and after it
        done = run(*verbose)
        assert done.returncode == 0 and done.stdout.startswith(b"NAME")
        lines = done.stderr.decode().splitlines()
        assert all(re.match(r" *\d+\.\d{6} [a-z-]+ +[<>] [A-Z_]+", line) for line in lines), lines
        told = "\n".join(lines)
        assert re.search(r"> GET_FEATURES\n.*< GET_FEATURES reply 0x", told)
        assert re.search(r"> ADD_MEM_REG .* fds=\[\d+\]\n", told)
        assert re.search(r"> SET_VRING_KICK index=0 need_reply fds=\[\d+\]\n", told)


def test_vv_shows_what_the_rings_do_as_well(blk):
    done = run("list", blk.address, "--dev-type=blk", "-vv")
    assert done.returncode == 0 and b"> GET_FEATURES" in done.stderr
    assert re.search(rb"\d ring +queue \d+: 1 answers are here\n", done.stderr)


@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_help_fits_a_terminal(command):
    lines = output(*command.split(), "--help").decode().splitlines()
    assert lines[0].startswith("Usage: virtio-bdev") and max(map(len, lines)) <= 80


def test_the_version_is_told():
    assert re.match(rb"virtio-bdev, version \d", output("--version"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_know_the_program(shell):
    assert b"_VIRTIO_BDEV_COMPLETE" in output("completion", shell)


def test_completion_offers_the_commands():
    variables = {"COMP_WORDS": "virtio-bdev ", "COMP_CWORD": "1", "_VIRTIO_BDEV_COMPLETE": "bash_complete"}
    done = subprocess.run(PROGRAM, env={**os.environ, **variables}, capture_output=True, check=True)
    assert {b"plain,list", b"plain,read", b"plain,run"} <= set(done.stdout.split())
