"""What a request may cost the driver, in instructions: no noise moves them, so this guards its speed."""

import subprocess
import sys

import pytest

from tests.conftest import INTERPRETED, ROOT
from tests.needs import module, program

VALGRIND = program("valgrind")
module("numpy")

# What was measured (benchmarks/instructions.py), and a tenth more.
BUDGETS = {"split, indirect": 565, "packed, indirect": 665}

pytestmark = pytest.mark.skipif(INTERPRETED, reason="it counts what is compiled")


@pytest.mark.timeout(300)
def test_a_request_takes_no_more_instructions_than_it_did():
    counter = ROOT / "benchmarks/instructions.py"
    argv = [sys.executable, str(counter), *BUDGETS]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=True)
    for line, (layout, budget) in zip(done.stdout.splitlines(), BUDGETS.items(), strict=True):
        assert line.startswith(layout)
        taken = int(line.removeprefix(layout).split()[0])
        assert 100 < taken <= budget, line
