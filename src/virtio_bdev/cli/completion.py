"""`virtio-bdev completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of SHELL, for its start-up file.

    \b
    bash: eval "$(virtio-bdev completion bash)" in ~/.bashrc
    zsh:  eval "$(virtio-bdev completion zsh)" in ~/.zshrc
    fish: virtio-bdev completion fish > ~/.config/fish/completions/virtio-bdev.fish
    """
    from virtio_bdev.cli import cli

    completion = get_completion_class(shell)
    assert completion is not None
    print(completion(cli, {}, "virtio-bdev", "_VIRTIO_BDEV_COMPLETE").source())
