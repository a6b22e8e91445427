"""Finding PCI functions, and binding them, on a folder that looks like sysfs.

On the real one: tests/peers/test_guest.py.
"""

import os
import threading
import time

import pytest

from tests.transport.fake_bus import FakeBus
from virtio.errors import RequestError, TransportError
from virtio.transport import pci_host, sysfs


@pytest.fixture
def bus(tmp_path):
    return FakeBus(tmp_path)


def test_functions_that_are_ours_to_drive_are_found_in_order(bus):
    bus.add("0000:01:00.0", 0x1048, "virtio-pci", group=9)
    bus.add("0000:00:04.0", 0x1001)  # transitional
    bus.add("0000:00:05.0", 0x1041, "virtio-pci")  # a network device
    other = bus.add("0000:00:06.0", 0x1042, "vfio-pci", group=9)
    (other / "vendor").write_text("0x8086\n")
    found = sysfs.functions(bus.root)
    assert [(each.address, each.kind, each.driver, each.group, each.members) for each in found] == [
        ("0000:00:04.0", "blk", None, None, ()),
        ("0000:01:00.0", "scsi", "virtio-pci", 9, ("0000:00:06.0",)),
    ]


@pytest.mark.parametrize("files", [{"vendor": ""}, {"vendor": "x"}, {"class": "-"}])
def test_a_function_that_goes_while_it_is_looked_at_is_left_out(bus, files):
    path = bus.add("0000:00:04.0", 0x1042)
    for name, words in files.items():
        (path / name).write_text(words)
    assert sysfs.functions(bus.root) == []
    with pytest.raises(TransportError, match="no PCI device 0000:00:04.0 any more"):
        sysfs.find("00:04.0", bus.root)


def test_what_is_not_there_or_not_ours_is_said_with_what_is(bus):
    bus.add("0000:00:04.0", 0x1042)
    bus.add("0000:00:05.0", 0x1041)
    with pytest.raises(
        TransportError, match="no PCI device 0000:00:06.0; of virtio-blk and .*: 0000:00:04.0"
    ):
        sysfs.find("00:06.0", bus.root)
    with pytest.raises(TransportError, match="0000:00:05.0 is 1af4:1041, neither virtio-blk nor"):
        sysfs.find("0000:00:05.0", bus.root)
    with pytest.raises(RequestError, match="PCI address '../etc', want one such as"):
        sysfs.find("../etc", bus.root)


class Kernel(threading.Thread):
    """Gives a function the driver that was asked for, as soon as it is to be probed."""

    def __init__(self, bus, path, refuses=False):
        super().__init__()
        self._bus, self._path, self._refuses = bus, path, refuses
        self.start()

    def run(self):
        probe = self._bus.root / "drivers_probe"
        end = time.monotonic() + 10
        while not probe.exists() and time.monotonic() < end:
            time.sleep(0.001)
        wish = (self._path / "driver_override").read_text().strip() or "virtio-pci"
        os.unlink(self._path / "driver")
        (self._bus.root / "drivers" / wish).mkdir(exist_ok=True)
        os.symlink(self._bus.root / "drivers" / ("other" if self._refuses else wish), self._path / "driver")


def test_binding_is_by_override_and_can_be_undone(bus):
    path = bus.add("0000:00:04.0", 0x1042, "virtio-pci", group=1)
    kernel = Kernel(bus, path)
    now = sysfs.find("0000:00:04.0", bus.root).bind("vfio-pci")
    kernel.join()
    assert now.driver == "vfio-pci" and (path / "driver_override").read_text() == "vfio-pci"
    assert (bus.root / "drivers/virtio-pci/unbind").read_text() == "0000:00:04.0"
    (bus.root / "drivers_probe").unlink()
    kernel = Kernel(bus, path)
    assert now.restore().driver == "virtio-pci"
    kernel.join()
    assert (path / "driver_override").read_text() == "\n"


def test_what_the_kernel_does_not_do_is_an_error_in_time(bus, monkeypatch):
    monkeypatch.setattr(sysfs, "_WAIT_S", 0.05)
    path = bus.add("0000:00:04.0", 0x1042, "virtio-pci", group=1)
    with pytest.raises(TransportError, match="has the driver virtio-pci, not vfio-pci; the kernel's log"):
        sysfs.find("0000:00:04.0", bus.root).bind("vfio-pci")
    assert (path / "driver_override").read_text() == "\n"  # and nothing is left of the attempt


def test_a_disk_in_use_keeps_its_driver(bus, monkeypatch):
    path = bus.add("0000:00:04.0", 0x1042, "virtio-pci")
    disk = path / "virtio0/block/vdz"
    (disk / "vdz1/holders/dm-0").mkdir(parents=True)
    (disk / "vdz1/dev").write_text("253:999\n")
    function = sysfs.find("0000:00:04.0", bus.root)
    assert [each.name for each in function.disks()] == ["vdz"]
    assert function.uses() == ["vdz is part of dm-0"]
    with pytest.raises(RequestError, match="0000:00:04.0 is in use: vdz is part of dm-0"):
        function.bind("vfio-pci")
    assert not (bus.root / "drivers/virtio-pci/unbind").exists()
    with pytest.raises(
        TransportError, match="has the driver virtio-pci, and vdz is part of dm-0: `virtio-bdev"
    ):
        pci_host.connect(function, 1.0)


def test_who_has_it_open_is_named(bus, monkeypatch):
    bus.add("0000:00:04.0", 0x1042, "vfio-pci", group=3)
    function = sysfs.find("0000:00:04.0", bus.root)
    assert function.nodes() == ["vfio/3"] and function.holders() == []
    with open("/dev/null") as held:
        monkeypatch.setattr(sysfs.PciFunction, "nodes", lambda self: ["null"])
        assert any(each.startswith(f"{os.getpid()} (") for each in function.holders())
        assert held is not None
