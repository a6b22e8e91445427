"""Every step of attaching that can fail is made to fail: one error of ours, and nothing left behind."""

import contextlib
import errno
import mmap
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.watched import belongings
from virtio.errors import TransportError, VirtioError
from virtio.target import serve
from virtio_bdev import attach


@pytest.fixture(scope="module", params=["blk", "scsi"])
def target(request):
    with serve(request.param, "ram:1M") as served:
        yield served.address, request.param


def use(target: tuple[str, str]) -> None:
    """Attach, read, detach."""
    address, dev_type = target
    with attach(address, dev_type=dev_type, queues=2) as controller:  # type: ignore[arg-type]
        with next(iter(controller.values())).open() as channel:
            channel.read(0, 512)


def failure(target: tuple[str, str]) -> Exception | None:
    """What using the device raises."""
    try:
        use(target)
    except Exception as error:
        return error.with_traceback(None)
    return None


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    before, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (before, hard))


def test_any_number_of_descriptors_is_enough_or_an_error(target):
    use(target)
    before = belongings()
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    outcomes = []
    for limit in range(highest // 2, highest + 40):
        with limited(resource.RLIMIT_NOFILE, limit):
            error = failure(target)
        assert error is None or isinstance(error, VirtioError), (limit, repr(error))
        assert belongings() == before, (limit, error)
        outcomes.append(error)
    assert isinstance(outcomes[0], TransportError) and outcomes[0].errno == errno.EMFILE
    assert outcomes[-1] is None
    assert len({str(error) for error in outcomes}) > 4  # they do fail in different places


CALLS = [
    (os, "memfd_create", OSError(errno.EMFILE, "no memfd")),
    (os, "ftruncate", OSError(errno.ENOSPC, "no room")),
    (mmap, "mmap", OSError(errno.ENOMEM, "no memory")),
    (os, "eventfd", OSError(errno.ENFILE, "no eventfd")),
    (socket, "socket", OSError(errno.EMFILE, "no socket")),
    (socket, "socketpair", OSError(errno.EMFILE, "no socket pair")),
    (socket, "send_fds", OSError(errno.ETOOMANYREFS, "no more descriptors in flight")),
    (select, "epoll", OSError(errno.EMFILE, "no epoll")),
    (select, "poll", MemoryError()),
    (threading.Thread, "start", RuntimeError("can't start new thread")),
]


@pytest.mark.parametrize("module, name, error", CALLS, ids=[name for _, name, _ in CALLS])
def test_a_call_that_fails_is_unwound_whichever_it_is(target, monkeypatch, module, name, error):
    use(target)
    before = belongings()
    real = getattr(module, name)
    for failing in range(100):  # which of the calls fails
        calls = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, call)
            raised = failure(target)
        assert raised is None or isinstance(raised, VirtioError), (failing, repr(raised))
        assert belongings() == before, (failing, raised)
        if calls <= failing:
            break
    assert calls <= failing, "it went on for ever"
    use(target)


LITTLE_MEMORY = """
import resource, sys
from tests.cli.watched import belongings
from tests.test_unwind import failure, use

target = tuple(sys.argv[1:])
use(target)
before = belongings()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
failed = 0
for extra in range(0, 160 << 20, 4 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))
    error = failure(target)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if error is not None:
        failed += 1
        print(extra >> 20, type(error).__name__, error)
    left = belongings()
    assert left == before, (extra, error, left, before)
assert failed and error is None, (failed, error)
"""


def test_any_amount_of_memory_is_enough_or_an_error(target):
    command = [sys.executable, "-c", LITTLE_MEMORY, *target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = {line.split()[1] for line in done.stdout.splitlines()}
    assert kinds <= {"TransportError", "MemoryError"}, done.stdout


def test_no_locked_memory_is_needed(target):
    with limited(resource.RLIMIT_MEMLOCK, 0):
        use(target)
