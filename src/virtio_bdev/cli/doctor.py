"""`virtio-bdev doctor`."""

from __future__ import annotations

import json
import sys

import click

from virtio_bdev.cli.list import print_rows
from virtio_bdev.cli.options import Address
from virtio_bdev.doctor import examine

_MARKS = {"ok": "ok", "could": "--", "no": "NO"}


@click.command()
@click.argument("addresses", type=Address(), nargs=-1, metavar="[ADDRESS]...")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(addresses: tuple[str, ...], as_json: bool) -> None:
    """Look at what this machine can do, or what keeps ADDRESS from being attached, and say what mends it.

    Nothing is changed. Of each thing it says ok, -- (not there, or could be better), or NO. With an
    ADDRESS, the exit status is 1 if it cannot be attached.
    """
    found = list(examine(addresses))
    if as_json:
        json.dump([finding._asdict() for finding in found], sys.stdout, indent=2)
        print()
    else:
        print_rows([[_MARKS[finding.state], finding.subject, finding.words] for finding in found])
        if mends := [finding for finding in found if finding.mend]:
            print("\nWhat would help:")
            print_rows([[f"  {finding.subject}", finding.mend] for finding in mends])
    if any(finding.state == "no" and finding.subject in addresses for finding in found):
        sys.exit(1)
