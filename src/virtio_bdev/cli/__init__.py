"""The program `virtio-bdev`; one module for each of its commands."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from virtio.errors import VirtioError
from virtio_bdev.cli.trace import set_up, verbose_option, words

_COMMANDS = {
    "list": "List the disks behind an address.",
    "read": "Copy a disk, or a part of it, to a file.",
    "write": "Copy a file to a disk.",
    "scsi": "Send a SCSI command as it is, and show the answer.",
    "run": "Hold devices: those of a configuration file, and those that clients of its JSON-RPC attach.",
    "pci": "Show the PCI devices of this machine, and take or give them back.",
    "doctor": "Look at what this machine can do, and say what mends the rest.",
    "rpc": "Call a method of a running daemon.",
    "bench": "Measure a disk: requests a second, and how long each takes.",
    "target": "Serve disks on a vhost-user socket.",
    "demo": "See it work: disks served, listed, written and verified.",
    "completion": "Print the completion script of a shell.",
}


class _Commands(click.Group):
    """Commands by name; a module is imported when its command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"virtio_bdev.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Errors as one line. Here, since click takes any EPIPE for one of our own output."""
        try:
            return super().invoke(ctx)
        except VirtioError as error:
            raise click.ClickException(words(error)) from error
        except MemoryError as error:
            raise click.ClickException("out of memory") from error
        except KeyboardInterrupt:
            raise click.Abort from None  # which says nothing


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="virtio-bdev")
@verbose_option
def cli() -> None:
    """Drive virtio-scsi and virtio-blk devices from user space.

    ADDRESS is user:PATH, the vhost-user socket of a back end, or pci:0000:00:04.0, a PCI device of
    this machine that `virtio-bdev pci bind` has taken from its kernel driver. To begin with:

    \b
      virtio-bdev target disk.sock --disk ram:64M &
      virtio-bdev list user:disk.sock

    The exit status is 0 for success, 1 for an error, 2 for wrong usage and 130 after Ctrl-C.
    """


def main() -> None:
    """Run the program and exit with its status."""
    set_up(0)
    try:
        status = cli.main(prog_name="virtio-bdev", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status)  # None, unless a command has decided otherwise
    except click.UsageError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        sys.exit(f"virtio-bdev: {error.format_message()}")
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Who read our output has left; let nothing more be said when the stream is flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(f"virtio-bdev: {error.filename or 'standard output'}: {error.strerror or error}")
