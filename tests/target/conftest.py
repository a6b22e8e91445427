"""Fixtures for tests of targets as processes."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.target.process import Process


@pytest.fixture
def start(tmp_path) -> Iterator[object]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, path: str = str(tmp_path / "socket")) -> Process:
            target = Process(*arguments, path=path)
            stack.callback(target.process.communicate)
            stack.callback(target.process.kill)
            return target

        yield start
