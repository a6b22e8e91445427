"""Hot functions call nothing of the interpreter: looked up in the C that Cython made of them."""

import re
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED, ROOT

HOT = {
    "split": ["describe", "redirect", "offer", "publish", "reap", "arm", "disarm", "outstanding", "ready"],
    "slots": [
        "_run",
        "_fill",
        "_start",
        "_lay_out",
        "_move_data",
        "_describe",
        "_describe_response",
        "_iova",
        "_segment",
        "_collect",
        "_result",
        "_complete",
        "_deliver",
        "_release",
        "_start_over",
        "_next_free",
        "_take_next_free",
        "_take_cell",
        "_ready",
        "_fill_load",
    ],
    "task": ["_finish", "_count", "_first_bad"],
    "device": ["pop", "push"],
    "stats": ["count", "_bucket"],
    "load": ["offset", "begin", "complete", "enter", "record"],
    "gather": ["begin", "count", "end_epoch"],
}

pytestmark = pytest.mark.skipif(INTERPRETED, reason="it looks at the C of the compiled modules")


def source(module: str) -> str:
    """The C of a module, without comments but the mark at the end of a function's own code."""
    path: Path = ROOT / f"build/fast/c/src/virtio/ring/{module}.c"
    text = path.read_text().replace("/* function exit code */", "@@")
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)


@pytest.mark.parametrize("module, name", [(m, n) for m, names in HOT.items() for n in names])
def test_a_hot_function_calls_nothing_of_the_interpreter(module, name):
    bodies = re.findall(
        rf"^static [^\n]*__pyx_f_\w*{module}_(?:\w+_)?\d*{name}\([^;]*?\) {{\n(.*?)^}}",
        source(module),
        re.M | re.S,
    )
    assert bodies, f"no C function for {name} in {module}"
    for body in bodies:
        calls = re.findall(r"\b(_*Py\w+|__Pyx_\w+)\(", body.split("@@")[0])
        assert calls == []
