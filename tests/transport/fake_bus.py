"""A PCI bus as sysfs has it, in a folder."""

import os
from pathlib import Path


class FakeBus:
    """Functions and drivers below `root`; what is written there changes nothing by itself."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "sys/bus/pci"
        (self.root / "devices").mkdir(parents=True)
        (self.root / "drivers").mkdir()

    def add(self, address: str, device: int, driver: str | None = None, group: int | None = None) -> Path:
        """A function of virtio's vendor."""
        path = self.root / "devices" / address
        path.mkdir()
        for name, words in (("vendor", "0x1af4"), ("device", f"{device:#06x}"), ("class", "0x010000")):
            (path / name).write_text(words + "\n")
        (path / "driver_override").write_text("(null)\n")
        if driver is not None:
            home = self.root / "drivers" / driver
            home.mkdir(exist_ok=True)
            os.symlink(home, path / "driver")
        if group is not None:
            devices = self.root.parents[1] / f"kernel/iommu_groups/{group}/devices"
            devices.mkdir(parents=True, exist_ok=True)
            os.symlink(path, devices / address)
            os.symlink(devices.parent, path / "iommu_group")
        return path
