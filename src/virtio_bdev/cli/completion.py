"""`virtio-bdev completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of SHELL.

    For bash, in ~/.bashrc: eval "$(virtio-bdev completion bash)". For zsh likewise in ~/.zshrc. For
    fish, as a file virtio-bdev.fish in ~/.config/fish/completions.
    """
    from virtio_bdev.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None
    print(completion(cli, {}, "virtio-bdev", "_VIRTIO_BDEV_COMPLETE").source())
