"""Every step of attaching that can fail is made to fail: one error of ours, and nothing left behind."""

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import resource
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.cli.watched import belongings
from virtio.errors import TransportError, VirtioError
from virtio.target import serve
from virtio_bdev import attach


@pytest.fixture(scope="module", params=["blk", "scsi"])
def target(request):
    with serve(request.param, "ram:1M") as served:
        yield served.address, request.param


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Garbage is looked for often here; what other tests have left is not looked at again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def use(target: tuple[str, str]) -> None:
    """Attach, read, detach."""
    address, dev_type = target
    with attach(address, dev_type=dev_type, queues=1) as controller:  # type: ignore[arg-type]
        with next(iter(controller.values())).open() as channel:
            channel.read(0, 512)


class Failure(NamedTuple):
    """What was raised, without the frames that an exception keeps alive."""

    kind: type[Exception]
    errno: int | None
    words: str


def failure(target: tuple[str, str]) -> Failure | None:
    """What using the device raises."""
    try:
        use(target)
    except Exception as error:
        return Failure(type(error), getattr(error, "errno", None), str(error))
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
    free = os.dup(0)
    os.close(free)
    outcomes: list[Failure | None] = []
    for limit in range(free, free + 40):
        with limited(resource.RLIMIT_NOFILE, limit):
            failed = failure(target)
        assert failed is None or issubclass(failed.kind, TransportError), (limit, failed)
        assert belongings() == before, (limit, failed)
        outcomes.append(failed)
        if failed is None:
            break
    assert outcomes[0] is not None and outcomes[0].errno == errno.EMFILE
    assert outcomes[-1] is None
    assert len({failed and failed.words for failed in outcomes}) > 4  # they do fail in different places


def no(code: int) -> Callable[[], Exception]:
    return lambda: OSError(code, os.strerror(code))


CALLS: list[tuple[Any, str, Callable[[], Exception]]] = [
    (os, "memfd_create", no(errno.EMFILE)),
    (os, "ftruncate", no(errno.ENOSPC)),
    (mmap, "mmap", no(errno.ENOMEM)),
    (fcntl, "fcntl", no(errno.EPERM)),
    (os, "eventfd", no(errno.ENFILE)),
    (socket, "socket", no(errno.EMFILE)),
    (socket, "socketpair", no(errno.EMFILE)),
    (socket, "send_fds", no(errno.ETOOMANYREFS)),
    (select, "epoll", no(errno.EMFILE)),
    (select, "poll", MemoryError),
    (threading.Thread, "start", lambda: RuntimeError("can't start new thread")),
]


class Failing:
    """Calls another function, but fails at one of the calls."""

    def __init__(self, real: Any, at: int, error: Callable[[], Exception]) -> None:
        self.real, self.at, self.error = real, at, error
        self.calls = 0

    def __get__(self, instance: object, owner: type) -> Any:
        return lambda *args, **kwargs: self(instance, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_name == "socketpair":  # which has its descriptors by then
            return self.real(*args, **kwargs)
        self.calls += 1
        if self.calls == self.at:
            raise self.error()
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("module, name, error", CALLS, ids=[name for _, name, _ in CALLS])
def test_a_call_that_fails_is_unwound_whichever_it_is(target, monkeypatch, module, name, error):
    use(target)
    before = belongings()
    for at in range(1, 1000):
        failing = Failing(getattr(module, name), at, error)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            raised = failure(target)
        assert raised is None or issubclass(raised.kind, (VirtioError, MemoryError)), (at, raised)
        assert belongings() == before, (at, raised)
        if failing.calls < at:
            return
    pytest.fail("it goes on for ever")


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
for extra in (48 << 20, 56 << 20, 256 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, resource.RLIM_INFINITY))
    error = failure(target)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if error is not None:
        failed += 1
        print(error.kind.__name__, error.words)
    left = belongings()
    assert left == before, (extra, error, left, before)
assert failed and error is None, (failed, error)
"""


def test_too_little_memory_for_the_pool_is_an_error(target):
    command = [sys.executable, "-c", LITTLE_MEMORY, *target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("TransportError [Errno 12] cannot map 64 MiB"), done.stdout


def test_no_locked_memory_is_needed(target):
    with limited(resource.RLIMIT_MEMLOCK, 0):
        use(target)
