"""What the documents show is run: ```console and ```python blocks, in order, in a folder of their own.

In a console block a line after "$ " is a command, with more of it after "> "; what follows is what it
prints, where "..." stands for anything. It must succeed, unless it is shown to say "virtio-bdev: ...".
Commands of make are not run. A python block whose first line is a comment with a file's name is that file.
"""

import inspect
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import fields

import virtio.target
import virtio_bdev.aio
from tests import needs
from tests.cli.program import PROGRAM
from tools import reference
from virtio_bdev.cli import _COMMANDS
from virtio_bdev.config import options_table
from virtio_bdev.rpc.methods import _METHODS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if re.search(r"^```(console|python)$", path.read_text(), re.MULTILINE)
]
PATIENCE_S = 30.0


def blocks(path: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every block."""
    yield from re.findall(r"^```(console|python)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[tuple[str, str]]:
    """Every command of a console block, and what it is shown to print."""
    found: list[tuple[str, str]] = []
    for line in block.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif line.startswith("> "):
            found[-1] = (found[-1][0] + line[2:], "")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def matches(shown: str, printed: str) -> bool:
    """Whether it is the same, but for "..." and the width of columns."""
    shown, printed = (re.sub(r" +", " ", text.strip()) for text in (shown, printed))
    return re.fullmatch(re.escape(shown).replace(r"\.\.\.", ".*"), printed, re.DOTALL) is not None


class Shell:
    """A bash in which the commands of a document are run, one after another."""

    def __init__(self, folder: Path) -> None:
        program = folder / "bin/virtio-bdev"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
        program.chmod(0o755)
        path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        self._bash = subprocess.Popen(
            ["bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PATH": path},
            start_new_session=True,
        )

    def run(self, command: str, shown: str) -> tuple[int, str]:
        """Status and output; of one in the background, as much output as is shown."""
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{command.rstrip()}\necho; echo END-OF-COMMAND $?\n".encode())
        self._bash.stdin.flush()
        text = ""
        while not (end := re.search(r"\nEND-OF-COMMAND (\d+)\n", text)):
            text += self._read(command)
        if command.rstrip().endswith("&"):
            while not matches(shown, text.replace(end[0], "")):
                text += self._read(command)
        return int(end[1]), text.replace(end[0], "")

    def _read(self, command: str) -> str:
        assert self._bash.stdout is not None
        assert select.select([self._bash.stdout], [], [], PATIENCE_S)[0], f"nothing more from {command}"
        return os.read(self._bash.stdout.fileno(), 65536).decode()

    def close(self) -> None:
        os.killpg(self._bash.pid, signal.SIGTERM)
        self._bash.communicate()


@pytest.fixture
def shell(tmp_path):
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_shown_can_be_done(document, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for language, block in blocks(document):
        if language == "python" and (file := re.match(r"# (\w+\.py)\n", block)):
            (tmp_path / file[1]).write_text(block)
            continue
        if language == "python":
            exec(compile(block, document.name, "exec"), {"__name__": "__main__"})
            continue
        for command, shown in commands(block):
            if command.startswith("make "):
                assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
                continue
            if "qemu-storage-daemon" in command:
                needs.program("qemu-storage-daemon")  # what came before has been run
            status, printed = shell.run(command, shown)
            assert matches(shown, printed), (command, shown, printed)
            assert status == 0 or "virtio-bdev: " in shown, (command, status)


def test_the_options_of_a_dev_line_are_all_in_the_document():
    assert options_table() in (ROOT / "docs/config.md").read_text()


def test_every_rpc_method_is_in_the_document_with_its_parameters():
    table = (ROOT / "docs/rpc.md").read_text().partition("| method | parameters |")[2].partition("\n\n")[0]
    shown = {
        name: parameters
        for names, parameters in re.findall(r"^\| (`.*?`) \|(.*?)\|", table, re.MULTILINE)
        for name in re.findall(r"\w+", names)
    }
    assert {name: re.findall(r"\w+", text.partition("[")[0]) for name, text in shown.items()} == {
        name: [each.name for each in fields(method.parameters) if each.required]
        for name, method in _METHODS.items()
    }
    assert {name: re.findall(r"\w+", text) for name, text in shown.items()} == {
        name: [each.name for each in fields(method.parameters)] for name, method in _METHODS.items()
    }


def test_the_reference_is_what_the_docstrings_say():
    assert reference.PAGE.read_text() == reference.page(), "make reference"


def test_every_public_name_is_in_the_reference():
    text = reference.PAGE.read_text()
    names = [*virtio_bdev.__all__, *virtio_bdev.aio.__all__, *virtio.target.__all__]
    names += ["Job", "Result", "verify"]  # of modules without a list
    assert [name for name in names if not re.search(rf"^### {name}\b", text, re.MULTILINE)] == []


def test_the_reference_has_fields_and_nothing_internal():
    text = reference.PAGE.read_text()
    assert "rw_mbytes_per_sec: int = 0  # MiB, as all of them" in text  # RateLimits
    assert "before: int" in text  # Resized
    internal = ["hold", "let_go", "put", "collect", "begin_next", "release", "zeros", "apply", "unmap_parts"]
    assert [name for name in internal if f"def {name}(" in text] == []


def test_the_signature_of_attach_is_in_the_tour():
    signature = inspect.signature(virtio_bdev.attach)
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    shown = inspect.Signature(bare)
    assert f"`attach{shown}`" in (ROOT / "docs/api.md").read_text().replace('"', "'")


def test_every_page_can_be_reached_from_the_readme():
    pages, seen = [ROOT / "README.md"], set()
    while pages:
        page = pages.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            links = re.findall(r"\]\(([\w./-]+)", page.read_text())
            pages += [(page.parent / link).resolve() for link in links]
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page not in seen] == []


def test_every_command_is_in_the_document():
    text = (ROOT / "docs/cli.md").read_text()
    assert [name for name in _COMMANDS if f"## {name}" not in text] == []
