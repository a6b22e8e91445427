"""`virtio-bdev pci`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from virtio.errors import RequestError
from virtio.transport import sysfs
from virtio.transport.sysfs import UIO, USER_DRIVERS, VFIO, PciFunction
from virtio_bdev.cli.list import print_rows


class _Pci(click.ParamType[Any]):
    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return sysfs.normal(str(value).removeprefix("pci:"))
        except RequestError as error:
            self.fail(str(error), param, ctx)


@click.group()
def command() -> None:
    """Show virtio-blk and virtio-scsi devices of this machine, and who has them."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def show(as_json: bool) -> None:
    """List them: the driver, the IOMMU group and its other members, and what uses the disks.

    Those of vfio-pci and uio_pci_generic are what `Dev Pci` in a configuration file attaches.
    """
    found = sysfs.functions()
    if as_json:
        json.dump([_record(function) for function in found], sys.stdout, indent=2)
        print()
    elif found:
        rows = [["ADDRESS", "TYPE", "ID", "DRIVER", "GROUP", "DISKS", "USED"], *map(_row, found)]
        print_rows(rows)
    else:
        print("no virtio-blk or virtio-scsi device on the PCI bus of this machine", file=sys.stderr)


def _record(function: PciFunction) -> dict[str, object]:
    return {
        "address": function.address,
        "type": function.kind,
        "vendor": f"{function.vendor:04x}",
        "device": f"{function.device:04x}",
        "driver": function.driver,
        "iommu_group": function.group,
        "group_members": list(function.members),
        "disks": [disk.name for disk in function.disks()],
        "uses": function.uses(),
    }


def _row(function: PciFunction) -> list[str]:
    group = "none"
    if function.group is not None:
        group = " ".join([str(function.group), *(f"+{member}" for member in function.members)])
    return [
        function.address,
        f"virtio-{function.kind}",
        f"{function.vendor:04x}:{function.device:04x}",
        function.driver or "none",
        group,
        " ".join(disk.name for disk in function.disks()) or "-",
        ", ".join(function.uses()) or "-",
    ]


@command.command()
@click.argument("addresses", type=_Pci(), nargs=-1, required=True, metavar="ADDRESS...")
@click.option(
    "--driver",
    type=click.Choice(USER_DRIVERS),
    default=VFIO,
    show_default=True,
    help=f"{UIO} is for machines without an IOMMU: the device can write to all of their memory then.",
)
def bind(addresses: tuple[str, ...], driver: str) -> None:
    """Take devices from the kernel, for programs: until `unbind`, or the machine starts anew.

    What is in use, a mounted disk say, stays where it is.
    """
    for address in addresses:
        function = sysfs.find(address)
        if function.driver == driver:
            print(f"{address}: has {driver} already")
            continue
        _check(function, driver)
        now = function.bind(driver)
        print(f"{address}: {function.driver or 'no driver'} -> {now.driver}")
        if others := _in_the_way(now):
            print(
                f"{address}: cannot be attached before the other functions of IOMMU group {now.group} are "
                f"bound to {VFIO} too: {', '.join(others)}",
                file=sys.stderr,
            )


def _check(function: PciFunction, driver: str) -> None:
    """Raise ClickException for what would not work."""
    if not sysfs.has_driver(driver):
        raise click.ClickException(f"this kernel has no driver {driver} now: try `modprobe {driver}`")
    if driver == VFIO and function.group is None:
        raise click.ClickException(
            f"{function.address} is in no IOMMU group, as {VFIO} needs it: turn the IOMMU on (intel_iommu=on "
            f"or amd_iommu=on on the kernel's command line), or use --driver {UIO}, whose devices can write "
            "to all memory"
        )
    if driver == UIO and function.group is not None:
        raise click.ClickException(
            f"{function.address} is behind an IOMMU, where {UIO} does not work: use {VFIO}"
        )


def _in_the_way(function: PciFunction) -> list[str]:
    """The functions of its group that keep it from being used."""
    found = []
    for address in function.members:
        other = sysfs.look(address)
        if other is not None and not other.is_bridge and other.driver not in (None, VFIO):
            found.append(f"{address} ({other.driver})")
    return found


@command.command()
@click.argument("addresses", type=_Pci(), nargs=-1, required=True, metavar="ADDRESS...")
def unbind(addresses: tuple[str, ...]) -> None:
    """Give devices back to the kernel's own driver."""
    for address in addresses:
        function = sysfs.find(address)
        if function.driver not in (*USER_DRIVERS, None):
            print(f"{address}: has {function.driver}, the kernel's")
            continue
        print(f"{address}: {function.driver or 'no driver'} -> {function.restore().driver}")
