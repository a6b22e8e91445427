"""Who may import whom: the order of the house, read from the sources without running them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src"

# A module of `virtio` imports from its own layer and those above it; a target knows nothing of transports.
LAYERS = ["errors", "wire", "ring", "control", "transport", "device", "target"]
ALLOWED = {layer: set(LAYERS[: index + 1]) for index, layer in enumerate(LAYERS)}
ALLOWED["target"] = {"errors", "wire", "ring", "target"}

MODULES = sorted(path for suffix in ("py", "pxd") for path in SRC.rglob(f"*.{suffix}"))
VIRTIO = [path for path in MODULES if path.relative_to(SRC).parts[0] == "virtio"]
CIMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+)?cimport\s+([\w.]+)", re.MULTILINE)


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


EVERYTHING = ast.NodeTransformer()


class AtRunTime(ast.NodeTransformer):
    """Takes out what only a type checker sees."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        return node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)


def imported(path: Path, of: ast.NodeTransformer = EVERYTHING) -> Iterator[str]:
    """The full names of all that a module imports; `from a import b` counts as a.b, as b may be a module."""
    if path.suffix == ".pxd":
        yield from (origin or name for origin, name in CIMPORT.findall(path.read_text()))
        return
    package = path.relative_to(SRC).parent.parts
    for node in ast.walk(of.visit(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ids(path: Path) -> str:
    return str(path.relative_to(SRC))


@pytest.mark.parametrize("path", VIRTIO, ids=ids)
def test_a_module_imports_only_from_its_own_layer_and_those_above(path):
    layer = f"{name_of(path)}.".split(".")[1]
    if not layer:
        return  # virtio/__init__ names them all, and imports them when asked: below
    assert layer in ALLOWED, f"{ids(path)} has no place in LAYERS"
    for name in imported(path):
        top, inner = f"{name}.".split(".")[:2]
        assert top != "virtio" or inner in ALLOWED[layer], f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", VIRTIO, ids=ids)
def test_virtio_needs_the_standard_library_and_nothing_else(path):
    allowed = {*sys.stdlib_module_names, "virtio", "cython"}  # compiled, cython and libc are gone
    if path.suffix == ".pxd":
        allowed |= {"libc", "cpython"}
    assert {name.split(".")[0] for name in imported(path, AtRunTime())} <= allowed


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_asyncio_is_imported_by_the_asyncio_front_and_the_daemon_alone(path):
    if not name_of(path).startswith(("virtio_bdev.aio", "virtio_bdev.rpc.", "virtio_bdev.cli.daemon")):
        assert "asyncio" not in {name.split(".")[0] for name in imported(path, AtRunTime())}


MODEL = sorted((TESTS / "model").rglob("*.py"))


@pytest.mark.parametrize("path", MODEL, ids=lambda path: path.name)
def test_the_recording_model_knows_nothing_of_what_it_judges(path):
    assert re.findall(r"^\s*(?:from|import)\s+(virtio\w*)", path.read_text(), re.MULTILINE) == []


def test_no_source_has_a_directive_which_would_beat_the_builds():
    assert [ids(path) for path in MODULES if re.search(r"^#\s*cython:", path.read_text(), re.MULTILINE)] == []


def test_import_virtio_is_lazy():
    code = "import sys; before = set(sys.modules); import virtio; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name for name in loaded if name.startswith("virtio.")} <= {"virtio.errors"}
    assert {name.split(".")[0] for name in loaded} <= {*sys.stdlib_module_names, "virtio"}
    assert "asyncio" not in loaded
