"""Compiled and interpreted rings do the same, to the byte."""

import os
import subprocess
import sys

import pytest

from tests.conftest import INTERPRETED, ROOT


@pytest.mark.skipif(INTERPRETED, reason="it needs the compiled modules, and runs the others itself")
def test_random_traffic_gives_the_same_results_and_bytes_compiled_and_interpreted():
    answers = []
    for path in (os.environ.get("PYTHONPATH", ""), str(ROOT / "src")):
        run = subprocess.run(
            [sys.executable, "-m", "tests.twins", "30"],
            env={**os.environ, "PYTHONPATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        answers.append(run.stdout.split())
    (kind, compiled), (other, interpreted) = answers
    assert (kind, other) == ("so", "py")
    assert compiled == interpreted
