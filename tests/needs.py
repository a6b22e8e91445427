"""What some tests need and a machine may lack. `program` and `module` return it, or leave the test out.

Under CI=true what is missing is a failure: a suite that passes because it left tests out proves nothing.
"""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from tools.preflight import PEERS, find

MISSING: dict[str, str] = {}  # reason -> Debian packages; the summary at the end reads it


def program(name: str) -> str:
    """The path of a program that is listed in tools/preflight.py, which also knows its package."""
    packages = {peer: packages for peer, packages, _ in PEERS}[name]
    path: str | None = find(name)
    return path or _lack(f"needs {name} (Debian: {packages})", packages)


def module(name: str) -> ModuleType:
    """A module of another project, from the `dev` extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return _lack(f"needs {name} (pip: the dev extra; {error})")


def spdk() -> Path:
    """The built SPDK tree named by SPDK_DIR; not packaged, so CI does without."""
    if "SPDK_DIR" not in os.environ:
        pytest.skip("needs SPDK_DIR, a built SPDK tree", allow_module_level=True)
    return Path(os.environ["SPDK_DIR"])


def _lack(reason: str, packages: str = "") -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and under CI=true nothing may be missing", pytrace=False)
    MISSING[reason] = packages
    pytest.skip(reason, allow_module_level=True)
