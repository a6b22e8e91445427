"""`make bench` does not rot: a part of it is run for a moment, and no time is asserted."""

import json
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


def test_the_driver_alone_is_measured_and_recorded(tmp_path):
    said, record = bench(tmp_path, "--turns", "2", "driver")
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
