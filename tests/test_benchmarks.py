"""`make bench` does not rot: a part of it is run for a moment, and no time is asserted."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import INTERPRETED, ROOT
from tests.needs import module

module("numpy")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="it measures what is compiled")


def bench(records, *argv):
    """Run a part of it: what it said, and the record."""
    argv = [
        sys.executable,
        "benchmarks/run.py",
        "--seconds",
        "0.02",
        "--force",
        "--records",
        str(records),
        *argv,
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    (path,) = records.iterdir()
    return done.stdout, json.loads(path.read_text())


def refused(*argv):
    """What it says of something that it does not do."""
    argv = [sys.executable, "benchmarks/run.py", "--force", *argv]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode and "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_the_driver_alone_is_measured_and_recorded(tmp_path):
    said, record = bench(tmp_path, "--turns", "2", "--only", "alone, (?!instr)", "driver")
    assert record["turns"] == 2 and record["commit"] and record["cores"] >= 1
    assert all(0 <= percent < 100 for _, percent in record["interruptions"].values())
    whats = [row["what"] for row in record["rows"]]
    assert "driver alone, batch" in whats and "driver alone, blocking" in whats
    for row in record["rows"]:
        assert len(row["figures"]) == 4 and row["what"] in said
        assert all(len(values) == 2 and min(values) > 0 for values in row["figures"].values())


def test_only_the_rows_that_are_asked_for_are_measured(tmp_path):
    _, record = bench(tmp_path, "--turns", "1", "--only", "alone, b.tch$", "driver")
    assert [row["what"] for row in record["rows"]] == ["driver alone, batch"]


def test_what_is_not_there_is_left_out_and_not_the_end(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for program in ("taskset", "git"):
        os.symlink(shutil.which(program), tmp_path / "bin" / program)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # where there is no daemon
    argv = ["--turns", "1", "--only", "Python|alone, batch", "python", "driver"]
    said, record = bench(tmp_path / "records", *argv)
    assert [row["what"] for row in record["rows"]] == ["driver alone, batch"]
    assert any("qemu-storage-daemon" in what for what in record["left_out"]) and "left out: qemu" in said


def test_a_run_of_nothing_is_no_run(tmp_path):
    assert "--turns 0, want 1 or more" in refused("--turns", "0", "driver")
    only = ["--records", str(tmp_path), "--only", "no such row"]
    assert "nothing was measured" in refused("--turns", "1", "--seconds", "0.02", *only, "driver")
