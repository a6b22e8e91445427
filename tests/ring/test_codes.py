"""Numbers that are written twice, for Python and for C, are the same."""

import importlib
import re

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["codes", "_vring"])
def test_each_number_has_one_value_in_both_languages(name):
    module = importlib.import_module(f"virtio.ring.{name}")
    text = (ROOT / f"src/virtio/ring/{name}.pxd").read_text()
    in_c = {word: int(value, 0) for word, value in re.findall(r"^    (\w+) = (\S+)", text, re.M)}
    in_python = {word: value for word, value in vars(module).items() if isinstance(value, int)}
    assert in_c == in_python
    assert len(in_c) > 20
