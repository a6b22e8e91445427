"""Which code is under test (installed and compiled, or src interpreted), and what was left out."""

import gc
import importlib.util
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import configuration, settings

from tests import needs, warm
from tools.preflight import apt_command

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("VIRTIO_INTERPRETED") == "1"

# Real peers, the program and its daemon are run against what users install.
COMPILED_ONLY = ["peers", "cli", "rpc", "test_docs.py", "test_benchmarks.py", "test_budget.py"]
collect_ignore = COMPILED_ONLY if INTERPRETED else []

configuration.set_hypothesis_home_dir(ROOT / "build/cache/hypothesis")
if os.environ.get("CI") != "true":  # there hypothesis has a profile of its own
    settings.register_profile("virtio", deadline=None)  # the interpreted ring is no measure of time
    settings.load_profile("virtio")


def compiled_modules() -> list[str]:
    """Every module with a .pxd beside it; `codes` and those with an underscore are twins of what is in C."""
    found = (path for path in (ROOT / "src").rglob("[!_]*.pxd") if path.stem != "codes")
    paths = (path.relative_to(ROOT / "src") for path in found)
    return sorted(".".join(path.with_suffix("").parts) for path in paths)


def pytest_configure() -> None:
    """Nothing is worth running if it is not the code that was meant."""
    # Started in the background of a shell, we and our children would ignore Ctrl-C, which some tests press.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in compiled_modules():
        spec = importlib.util.find_spec(name)
        origin = str(spec.origin) if spec else "nowhere"
        if INTERPRETED and origin != str(ROOT / "src" / name.replace(".", "/")) + ".py":
            pytest.exit(f"VIRTIO_INTERPRETED=1, but {name} is {origin}: set PYTHONPATH=src", 4)
        if not INTERPRETED and not origin.endswith(".so"):
            pytest.exit(f"{name} is {origin}, not compiled: run `make build` (setup.py has the list)", 4)

    process = importlib.import_module("virtio.target.process")
    process._start = warm.start  # type: ignore[attr-defined]


def pytest_unconfigure() -> None:
    warm.end()


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("virtio")
    how = "interpreted" if INTERPRETED else "compiled"
    return f"virtio: {how}, {spec.origin if spec else 'not installed'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(ROOT / "tests/peers"):
            item.add_marker("peer")


def pytest_collection_finish() -> None:
    """What is there now stays: no test that collects garbage has to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("spdk"):
        needs.spdk()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what was left out for a missing peer, and the one command that would bring it in."""
    left_out: Counter[str] = Counter()
    packages: set[str] = set()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason in needs.MISSING:
            left_out[f"{report.nodeid}: {reason}" if report.nodeid else reason] += 1
            packages.update(needs.MISSING[reason].split())
    if left_out:
        terminalreporter.section("left out: what they run against is not installed")
        for line, count in sorted(left_out.items()):
            terminalreporter.line(line + (f" ({count} times)" if count > 1 else ""))
    if packages:
        command = apt_command([(" ".join(sorted(packages)), "")])
        terminalreporter.line(f"to run them too: {' '.join(command)}")
