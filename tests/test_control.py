"""The control thread."""

import os
import select
import threading

import pytest

from tests.leaks import open_fds
from virtio import control


def thread_count():
    return sum(thread.name == "virtio-control" for thread in threading.enumerate())


def test_a_watched_descriptor_calls_back_in_one_thread_that_ends_with_the_last_watch():
    reader, writer = os.pipe()
    called = threading.Event()
    threads = []

    def callback(events):
        threads.append(threading.current_thread().name)
        os.read(reader, 100)
        called.set()

    control.watch(reader, select.EPOLLIN, callback)
    try:
        assert thread_count() == 1
        os.write(writer, b"x")
        assert called.wait(5)
        assert threads == ["virtio-control"]
    finally:
        control.unwatch(reader)
        os.close(reader)
        os.close(writer)
    assert thread_count() == 0


def test_a_callback_may_unwatch_itself_and_the_thread_ends():
    reader, writer = os.pipe()
    done = threading.Event()

    def callback(events):
        control.unwatch(reader)
        done.set()

    control.watch(reader, select.EPOLLIN, callback)
    (thread,) = (t for t in threading.enumerate() if t.name == "virtio-control")
    os.write(writer, b"x")
    assert done.wait(5)
    thread.join(5)
    assert not thread.is_alive()
    os.close(reader)
    os.close(writer)


def test_ctrl_c_while_the_thread_starts_ends_it_quietly(monkeypatch, capfd):
    started = []

    def start(thread, real=threading.Thread.start):
        real(thread)
        started.append(thread)
        raise KeyboardInterrupt

    reader, writer = os.pipe()
    before = open_fds()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            control.watch(reader, select.EPOLLIN, lambda events: None)
    started[0].join(5)
    assert not started[0].is_alive()
    assert open_fds() == before
    assert capfd.readouterr().err == ""
    os.close(reader)
    os.close(writer)


def test_a_callback_that_fails_does_not_end_the_loop(caplog):
    pipes = [os.pipe() for _ in range(2)]
    called = threading.Event()

    def bad(events):
        control.unwatch(pipes[0][0])
        raise ValueError("a mistake")

    def good(events):
        os.read(pipes[1][0], 1)
        called.set()

    control.watch(pipes[0][0], select.EPOLLIN, bad)
    control.watch(pipes[1][0], select.EPOLLIN, good)
    os.write(pipes[0][1], b"x")
    os.write(pipes[1][1], b"x")
    assert called.wait(5)
    control.unwatch(pipes[1][0])
    assert "a mistake" in caplog.text
    for pair in pipes:
        for fd in pair:
            os.close(fd)


def test_unwatching_what_is_not_watched_does_nothing():
    control.unwatch(99999)


def test_many_watches_come_and_go_without_leaking_descriptors():
    before = open_fds()
    for _ in range(100):
        reader, writer = os.pipe()
        control.watch(reader, select.EPOLLIN, lambda events: None)
        control.unwatch(reader)
        os.close(reader)
        os.close(writer)
    assert open_fds() == before
    assert thread_count() == 0
