"""Runs the program as `virtio-bdev` would, and writes down what it left behind in its own process.

python tests/cli/watched.py REPORT USER ARGUMENT...; USER is a number to become first, or "-".
"""

import gc
import json
import os
import sys
import threading
from pathlib import Path

from virtio_bdev import registry
from virtio_bdev.cli import _COMMANDS, cli, main


def belongings() -> dict[str, list[str]]:
    """Descriptors, threads, shared memory and names in use, of which an idle program has few."""
    gc.collect()
    fds = []
    for name in os.listdir("/proc/self/fd"):
        try:
            fds.append(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # that of the listing
    return {
        "fds": sorted(fds),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "memory": [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line],
        "names": sorted(registry._names._taken),
    }


def status_of_main() -> int:
    """The exit status; the exception, whose frames hold things, is gone at the end."""
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


if __name__ == "__main__":
    report, user, *sys.argv[1:] = sys.argv[1:]
    for name in _COMMANDS:
        cli.get_command(None, name)  # type: ignore[arg-type]  # imported, as nobody may not read them
    with open(report, "w") as file:
        if user != "-":
            os.setgroups([])
            os.setgid(int(user))
            os.setuid(int(user))
        before = belongings()
        status = status_of_main()
        after = belongings()
        left = {key: sorted(set(after[key]) - set(before[key])) for key in after if after[key] != before[key]}
        json.dump(left, file)
    sys.exit(status)
