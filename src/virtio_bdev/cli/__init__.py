"""The program `virtio-bdev`; one module for each of its commands."""

from __future__ import annotations

import errno
import importlib
import os
import sys

import click

from virtio.errors import VirtioError

_COMMANDS = {
    "list": "List the disks behind an address.",
    "read": "Copy a disk, or a part of it, to a file.",
    "write": "Copy a file to a disk.",
    "target": "Serve disks on a vhost-user socket.",
    "demo": "See it work: disks served, listed, written and verified.",
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


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="virtio-bdev")
@click.option("-v", "--verbose", is_flag=True, help="Show every vhost-user message on stderr.")
def cli(verbose: bool) -> None:
    """Drive virtio-scsi and virtio-blk devices from user space.

    ADDRESS is user:PATH, the vhost-user socket of a back end.
    """
    if verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG, format="%(message)s")


def main() -> None:
    """Run the program; its exit status is 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Who read our output has left; let nothing more be said when the stream is flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except VirtioError as error:
        sys.exit(f"virtio-bdev: {_words(error)}")
    except OSError as error:
        sys.exit(f"virtio-bdev: {error.filename or 'i/o'}: {error.strerror or error}")


def _words(error: VirtioError) -> str:
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.strerror:
        name = errno.errorcode.get(error.errno or 0)
        return error.strerror + (f" [{name}]" if name else "")
    return str(error)
