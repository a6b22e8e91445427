"""The installed package in a real Linux guest: behind an IOMMU through VFIO, and without one through uio.

And the embedded target as a device of that guest, driven by the guest's kernel, and by ourselves. One boot
with an IOMMU and one without serve all of it.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import virtio.target
from tests.needs import program
from tests.peers import in_guest
from tests.peers.guest import Guest, blk, scsi

pytestmark = pytest.mark.skipif(
    os.environ.get("VIRTIO_INTERPRETED") == "1", reason="a guest runs what is installed, once"
)

PROGRAM = str(Path(sys.executable).with_name("virtio-bdev"))
SCRIPT = in_guest.__file__
MIB = 1 << 20
PLATFORM = "disable-legacy=on,iommu_platform=on,ats=off"
WAIT_S = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images of 24 MiB, each with bytes of its own."""
    folder = tmp_path_factory.mktemp("disks")
    for name in ("b0", "b1", "s0", "s1", "s2", "t0", "p0", "p1", "l0", "target-blk", "target-scsi"):
        (folder / name).write_bytes(hashlib.sha256(name.encode()).digest() * (24 * MIB // 32))
    return folder


@pytest.fixture(scope="module")
def behind_iommu(files):
    """A guest with an IOMMU, a port for hot plug, and devices by these addresses."""
    devices = [
        *blk("b0", files / "b0", f"{PLATFORM},num-queues=2,addr=0x10,serial=guest-b0"),
        *scsi("s0", [files / "s0", files / "s1"], f"{PLATFORM},num_queues=2,addr=0x11"),
        *blk("t0", files / "t0", "disable-legacy=off,addr=0x12"),
        *("-device", "pcie-root-port,id=port0,slot=1,addr=0x18"),
        *("-device", "pcie-root-port,id=port1,slot=2,addr=0x19"),
        *blk("p0", files / "p0", f"{PLATFORM},bus=port0"),
    ]
    with Guest(devices, iommu=True, huge=16) as guest:
        yield guest


@pytest.fixture(scope="module")
def without_iommu(files):
    """A guest without, whose devices are QEMU's and the embedded target's."""
    target_files = (f"file:{files}/target-blk", f"file:{files}/target-scsi")
    with (
        virtio.target.serve("blk", target_files[0], queues=2, packed=True) as ours_blk,
        virtio.target.serve("scsi", target_files[1], queues=2) as ours_scsi,
    ):
        devices = [
            *blk("b1", files / "b1", "disable-legacy=on,num-queues=2,addr=0x10"),
            *scsi("s2", [files / "s2"], "disable-legacy=on,addr=0x11"),
            *blk("l0", files / "l0", "disable-modern=on,disable-legacy=off,addr=0x12"),
            *("-chardev", f"socket,id=ours-blk,path={ours_blk.path}"),
            *(
                "-device",
                "vhost-user-blk-pci,chardev=ours-blk,num-queues=2,addr=0x14,packed=on",
            ),
            *("-chardev", f"socket,id=ours-scsi,path={ours_scsi.path}"),
            *("-device", "vhost-user-scsi-pci,chardev=ours-scsi,num_queues=2,addr=0x15,disable-legacy=on"),
        ]
        with Guest(devices, iommu=False, huge=160) as guest:
            yield guest


def address(slot):
    return f"0000:00:{slot:02x}.0"


def fill(guest, lines, seed, user=0):
    """Attach these lines of a configuration in the guest, write 16 MiB of each disk: what was seen."""
    guest.run("sh", "-c", f"printf '[Virtio]\\n{lines}\\n' > /dev/shm/virtio.conf")
    result = guest.run(
        sys.executable, SCRIPT, "fill", "/dev/shm/virtio.conf", str(seed), timeout=120, user=user
    )
    said = json.loads(result.stdout)
    assert said["left"] == [] and said["threads"] == 1
    return said["disks"]


def digest_in_guest(guest, disk, nbytes=in_guest.NBYTES):
    command = f"dd if=/dev/{disk} bs=1M count={nbytes // MIB} iflag=direct 2>/dev/null | sha256sum"
    return guest.run("sh", "-c", command).stdout.split()[0]


def digest(path):
    return hashlib.sha256(path.read_bytes()[: in_guest.NBYTES]).hexdigest()


def listed(guest):
    """Driver, group and disks of each function, by address."""
    found = guest.evaluate(
        "[(f.address, f.driver, f.group, [disk.name for disk in f.disks()]) for f in sysfs.functions()]"
    )
    return {place: Listed(*rest) for place, *rest in found}


class Listed(NamedTuple):
    driver: str | None
    group: int | None
    disks: list[str]


def bind(guest, *addresses, driver="vfio-pci"):
    for each in addresses:
        assert guest.evaluate(f"sysfs.find({each!r}).bind({driver!r}).driver") == driver


def unbind(guest, *addresses):
    """Give them back to the kernel, and wait until it has found their disks, which may take it a while."""
    for each in addresses:
        assert guest.evaluate(f"sysfs.find({each!r}).restore().driver") == "virtio-pci"
    end = time.monotonic() + WAIT_S
    while not all(listed(guest)[each].disks for each in addresses):
        assert time.monotonic() < end, listed(guest)


def test_all_devices_bound_to_vfio_are_attached_written_and_verified(behind_iommu, files):
    guest = behind_iommu
    both = address(0x10), address(0x11)
    assert {listed(guest)[each].driver for each in both} == {"virtio-pci"}
    said = guest.run(PROGRAM, "pci", "bind", *both).stdout
    assert said == "".join(f"{each}: virtio-pci -> vfio-pci\n" for each in both)
    table = guest.run(PROGRAM, "pci", "list").stdout
    for each, function in listed(guest).items():
        assert function.driver == ("vfio-pci" if each in both else "virtio-pci")
        (line,) = [line for line in table.splitlines() if line.startswith(each)]
        assert line.split()[3:5] == [function.driver, str(function.group)]
    disks = fill(guest, "Dev Pci", 1)
    assert [each["address"] for each in disks.values()] == [
        f"pci:{both[0]}",
        f"pci:{both[1]}",
        f"pci:{both[1]}",
    ]
    assert list(disks) == ["VirtioBlk0", "VirtioScsi0t0", "VirtioScsi0t1"]
    assert disks["VirtioBlk0"]["serial"] == "guest-b0"
    for name, disk in zip(("b0", "s0", "s1"), disks.values(), strict=True):
        assert disk["size"] == 24 * MIB
        assert disk["sha256"] == digest(files / name)
        assert disk["interrupts"]["event"] > disk["interrupts"]["poll"]
    said = guest.run(PROGRAM, "pci", "unbind", *both).stdout
    assert said == "".join(f"{each}: vfio-pci -> virtio-pci\n" for each in both)
    now = listed(guest)
    kernel = [now[both[0]].disks, now[both[1]].disks]
    assert [len(each) for each in kernel] == [1, 2]
    seen = {digest_in_guest(guest, name) for each in kernel for name in each}
    assert seen == {disk["sha256"] for disk in disks.values()}


def test_whoever_may_open_the_group_needs_no_root(behind_iommu, files):
    guest = behind_iommu
    bind(guest, address(0x10))
    refused = guest.run(PROGRAM, "list", f"pci:{address(0x10)}", user=1000, check=False)
    assert refused.status == 1 and "chown 1000 /dev/vfio/" in refused.stderr
    doctor = guest.run(PROGRAM, "doctor", f"pci:{address(0x10)}", user=1000, check=False)
    assert doctor.status == 1 and "chown 1000 /dev/vfio/" in doctor.stdout
    group = listed(guest)[address(0x10)].group
    guest.run("chown", "1000", f"/dev/vfio/{group}")
    (disk,) = fill(guest, f"Dev Pci {address(0x10)} name=Mine", 2, user=1000).values()
    assert disk["sha256"] == digest(files / "b0")
    small = f"ulimit -l 4096; exec {PROGRAM} list pci:{address(0x10)}"
    refused = guest.run("sh", "-c", small, user=1000, check=False)
    assert refused.status == 1 and "ulimit -l" in refused.stderr and "4194304 bytes" in refused.stderr
    unbind(guest, address(0x10))


def test_a_mounted_disk_is_not_taken_away(behind_iommu):
    guest = behind_iommu
    (disk,) = listed(guest)[address(0x10)].disks
    guest.run("sh", "-c", f"mkfs.ext4 -q -F /dev/{disk} && mkdir -p /run/here && mount /dev/{disk} /run/here")
    refused = guest.run(PROGRAM, "pci", "bind", address(0x10), check=False)
    assert refused.status == 1 and f"{disk} is mounted at /run/here" in refused.stderr
    assert listed(guest)[address(0x10)].driver == "virtio-pci"
    guest.run("umount", "/run/here")


def test_what_has_another_driver_or_bypasses_the_iommu_is_refused(behind_iommu):
    guest = behind_iommu
    refused = guest.run(PROGRAM, "list", f"pci:{address(0x12)}", check=False)
    assert refused.status == 1 and f"virtio-bdev pci bind {address(0x12)}" in refused.stderr
    bind(guest, address(0x12))
    refused = guest.run(PROGRAM, "list", f"pci:{address(0x12)}", check=False)
    assert refused.status == 1 and "ACCESS_PLATFORM" in refused.stderr
    refused = guest.run(PROGRAM, "pci", "bind", "--driver", "uio_pci_generic", address(0x12), check=False)
    assert refused.status == 1 and "behind an IOMMU" in refused.stderr
    unbind(guest, address(0x12))


class Holder:
    """A process in the guest that holds a device, and reads from it; `said` is what it has printed."""

    def __init__(self, guest, place):
        self._guest = guest
        command = f"setsid {sys.executable} {SCRIPT} hold pci:{place} > /dev/shm/held 2>&1 &"
        guest.run("sh", "-c", f"rm -f /dev/shm/held; {command}")
        self.wait("attached")

    @property
    def said(self):
        return self._guest.run("cat", "/dev/shm/held", check=False).stdout

    def wait(self, words):
        end = time.monotonic() + WAIT_S
        while words not in (said := self.said):
            assert time.monotonic() < end, said
            time.sleep(0.2)


def test_a_killed_process_leaves_a_device_that_is_as_new(behind_iommu, files):
    guest = behind_iommu
    bind(guest, address(0x10))
    holder = Holder(guest, address(0x10))
    busy = guest.run(PROGRAM, "list", f"pci:{address(0x10)}", check=False)
    assert busy.status == 1 and "has a function of that IOMMU group" in busy.stderr
    refused = guest.run(PROGRAM, "pci", "unbind", address(0x10), check=False)
    assert refused.status == 1 and "in use: process" in refused.stderr
    guest.run("kill", "-9", holder.said.split()[1])
    (disk,) = fill(guest, f"Dev Pci {address(0x10)}", 3).values()
    assert disk["sha256"] == digest(files / "b0")
    unbind(guest, address(0x10))


def test_a_disk_is_resized_and_pulled_out_while_it_is_read(behind_iommu):
    guest = behind_iommu
    (place,) = [each for each in listed(guest) if each.startswith("0000:01:")]
    bind(guest, place)
    holder = Holder(guest, place)
    guest.qmp("block_resize", {"device": "drive-p0", "size": 32 * MIB})
    holder.wait(f"event Resized [{32 * MIB}]")
    guest.qmp("device_del", {"id": "p0"})
    holder.wait("closed")
    assert "event Lost" in holder.said and "reader done" in holder.said
    assert "after some reads: TransportError" in holder.said


def test_the_daemon_attaches_what_is_plugged_in_and_lets_go_of_what_is_pulled_out(behind_iommu, files):
    guest = behind_iommu

    def rpc(*words):
        return json.loads(guest.run(PROGRAM, "rpc", "--rpc-socket", "/dev/shm/rpc", *words).stdout)

    def wait_for(condition):
        end = time.monotonic() + WAIT_S
        while not (found := condition()):
            assert time.monotonic() < end, guest.run("cat", "/dev/shm/log").stdout
        return found

    guest.run("sh", "-c", f"setsid {PROGRAM} run --rpc-socket /dev/shm/rpc > /dev/shm/log 2>&1 &")
    wait_for(lambda: "ready" in guest.run("cat", "/dev/shm/log", check=False).stdout)
    assert rpc("bdev_virtio_blk_set_hotplug", "enable:=true") is True
    node = {"driver": "raw", "node-name": "n1", "file": {"driver": "file", "filename": str(files / "p1")}}
    guest.qmp("blockdev-add", node)
    plugged = {"driver": "virtio-blk-pci", "id": "p1", "drive": "n1", "bus": "port1", "disable-legacy": "on"}
    guest.qmp("device_add", plugged | {"iommu_platform": True, "ats": False})
    place = wait_for(lambda: [each for each in listed(guest) if each.startswith("0000:02:")])
    bind(guest, *place)
    (bdev,) = wait_for(lambda: rpc("bdev_get_bdevs"))
    assert (bdev["name"], bdev["num_blocks"]) == ("VirtioBlk0", 24 * MIB // 512)
    assert bdev["driver_specific"]["virtio"]["type"] == "pci-modern"
    assert bdev["driver_specific"]["virtio"]["pci_address"] == place[0]
    guest.qmp("device_del", {"id": "p1"})
    wait_for(lambda: not rpc("bdev_get_bdevs"))
    wait_for(lambda: place[0] not in listed(guest))
    assert "VirtioBlk0 is lost: the kernel wants" in guest.run("cat", "/dev/shm/log").stdout
    guest.run("pkill", "-f", "run --rpc-socket")


def test_without_an_iommu_it_works_through_uio_if_asked_for_by_name(without_iommu, files):
    guest = without_iommu
    three = [address(slot) for slot in (0x10, 0x11, 0x12)]
    refused = guest.run(PROGRAM, "pci", "bind", three[0], check=False)
    assert refused.status == 1 and "--driver uio_pci_generic" in refused.stderr
    bind(guest, *three, driver="uio_pci_generic")
    disks = fill(guest, "Dev Pci", 5)
    assert [disk["legacy"] for disk in disks.values()] == [False, False, True]
    for name, disk in zip(("b1", "s2", "l0"), disks.values(), strict=True):
        assert disk["sha256"] == digest(files / name)
        assert disk["interrupts"]["event"] > disk["interrupts"]["poll"]
    holder = Holder(guest, three[0])
    guest.run("kill", "-9", holder.said.split()[1])
    again = fill(guest, f"Dev Pci {three[0]}", 7)
    assert again["VirtioBlk0"]["sha256"] == digest(files / "b1")
    disks["VirtioBlk0"] = again["VirtioBlk0"]
    unbind(guest, *three)
    now = listed(guest)
    seen = {digest_in_guest(guest, name) for each in three for name in now[each].disks}
    assert seen == {disk["sha256"] for disk in disks.values()}


@pytest.mark.parametrize(("slot", "name"), [(0x14, "target-blk"), (0x15, "target-scsi")])
def test_the_guests_kernel_makes_a_file_system_on_our_target(without_iommu, files, tmp_path, slot, name):
    guest = without_iommu
    (disk,) = listed(guest)[address(slot)].disks
    bits = guest.run("sh", "-c", f"cat /sys/bus/pci/devices/{address(slot)}/virtio*/features").stdout
    assert bits[34] == ("1" if "blk" in name else "0")  # a packed ring, where that is offered
    guest.run(
        "sh",
        "-ec",
        f"mkfs.ext4 -q -F /dev/{disk}; mkdir -p /run/made; mount -o discard /dev/{disk} /run/made; "
        "cd /run/made; "
        "for i in 1 2 3 4 5 6 7 8; do head -c 500000 /dev/urandom > file$i & done; wait; sync; rm file8; "
        "sha256sum file* > sums; cp sums /dev/shm/sums; cd /; umount /run/made",
    )
    checked = subprocess.run([program("e2fsck"), "-fn", files / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    sums = guest.run("cat", "/dev/shm/sums").stdout.splitlines()
    assert len(sums) == 7
    for line in sums:
        digest_then, file = line.split()
        subprocess.run([program("debugfs"), "-R", f"dump {file} {tmp_path}/out", files / name], check=True)
        assert hashlib.sha256((tmp_path / "out").read_bytes()).hexdigest() == digest_then


def test_our_driver_drives_our_target_in_a_guest(without_iommu, files):
    guest = without_iommu
    both = [address(0x14), address(0x15)]
    bind(guest, *both, driver="uio_pci_generic")
    disks = fill(guest, f"Dev Pci {both[0]}\\nDev Pci {both[1]} queues=1", 6)
    for name, disk in zip(("target-blk", "target-scsi"), disks.values(), strict=True):
        assert disk["sha256"] == digest(files / name)
    unbind(guest, *both)
