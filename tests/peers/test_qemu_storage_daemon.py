"""The driver against a vhost-user-blk device that is not ours; bytes are compared with the disk's file."""

import asyncio
import errno
import gc
import hashlib
import json
import os
import random
import re
import resource
import subprocess
import sysconfig
import tempfile
import threading
import time
import warnings
from array import array
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import virtio_bdev
from tests import needs
from tests.leaks import open_fds
from tests.peers.qsd import IN_MEMORY, StorageDaemon, faulty_nodes, file_node, readable
from tests.space import allocated, gave_back
from virtio_bdev import (
    ClosedError,
    DeviceError,
    NoQueueError,
    ReadOnlyError,
    RequestError,
    RequestTimeout,
    Resized,
    TransportError,
    aio,
)

PROGRAM = needs.program("qemu-storage-daemon")
VIRTIO_BDEV = Path(sysconfig.get_path("scripts"), "virtio-bdev")

MIB = 1 << 20
BLOCK = 4096
NEVER_SLEEPS = 100_000_000  # ns that the daemon looks at its rings before it sleeps
SLEEPS_AT_ONCE = 0
PROMPTLY = 1.0  # seconds within which a dead back end must be noticed; 0.1 is what is meant


# Disks, daemons, and the program.


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="disks-") as name:  # pytest would keep the last three runs
        yield Path(name)


@pytest.fixture
def serve():
    """Call it with --blockdev options and what else StorageDaemon takes."""
    with ExitStack() as stack:
        yield lambda *nodes, **options: stack.enter_context(StorageDaemon(PROGRAM, nodes, **options))


@pytest.fixture
def image(folder):
    """A file of 32 MiB, no two blocks of which are alike."""
    return random_file(folder / "image", 32 * MIB)


@pytest.fixture
def daemon(serve, image):
    return serve(file_node(image))


@pytest.fixture
def controller(daemon):
    with attach(daemon) as controller:
        yield controller


@pytest.fixture
def bdev(controller):
    return disk(controller)


@pytest.fixture
def channel(bdev):
    with bdev.open(timeout=10) as channel:
        yield channel


def attach(daemon, **options):
    return virtio_bdev.attach(daemon.address, dev_type="blk", **options)


def disk(controller):
    (bdev,) = controller.values()
    return bdev


def random_file(path, nbytes):
    with path.open("wb") as file:
        for left in range(nbytes, 0, -MIB):
            file.write(os.urandom(min(left, MIB)))
    return path


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_at(path, offset, nbytes):
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def virtio_bdev_program(command, daemon, *options):
    return run(VIRTIO_BDEV, command, daemon.address, "--dev-type", "blk", *map(str, options))


def done(result):
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refusal(result):
    """The one line on stderr with which the program gave up."""
    assert (result.returncode, result.stdout) == (1, ""), result
    (line,) = result.stderr.splitlines()
    return line


def rate(count, begun):
    return f"{count / (time.perf_counter() - begun):,.0f}/s"


@pytest.fixture
def figure(record_property):
    """Call it with what was measured; shown by `pytest -s`, and in a JUnit report."""

    def record(name, value):
        print(f"{name}: {value}")
        record_property(name, value)

    return record


@contextmanager
def nothing_left_behind():
    """What is opened and started inside is closed and ended afterwards."""
    before, threads = open_fds(), set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)  # one that was just told to end
    assert open_fds() == before
    assert set(threading.enumerate()) == threads


# Whole disks, by the program.


def test_an_ext4_image_is_listed_and_read_whole_and_its_files_are_in_the_copy(serve, folder):
    mkfs, debugfs = needs.program("mkfs.ext4"), needs.program("debugfs")
    files = {"hello": b"hello\n", "deep/er/random": os.urandom(3 * MIB + 17)}
    for name, content in files.items():
        path = folder / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    image, copy = folder / "image", folder / "copy"
    done(run(mkfs, "-q", "-d", folder / "tree", image, "48m"))
    daemon = serve(file_node(image))

    (listed,) = json.loads(done(virtio_bdev_program("list", daemon, "--queues", 4, "--json")))
    assert (listed["block_size"], listed["num_blocks"]) == (512, 48 * MIB // 512)
    assert listed["driver_specific"]["virtio"]["vq_count"] == 4
    assert listed["driver_specific"]["virtio"]["socket"] == daemon.path
    assert " 48 MiB " in done(virtio_bdev_program("list", daemon))
    done(virtio_bdev_program("read", daemon, "--queues", 4, "-o", copy))
    assert sha256(copy) == sha256(image)
    for name, content in files.items():
        out = folder / "out"
        assert run(debugfs, "-R", f"dump /{name} {out}", copy).returncode == 0
        assert out.read_bytes() == content


def test_a_file_of_256_mib_is_written_and_read_back(serve, folder, figure):
    image, source, copy = folder / "image", folder / "source", folder / "copy"
    image.touch()
    os.truncate(image, 256 * MIB)
    random_file(source, 256 * MIB)
    daemon = serve(file_node(image))
    for command, option, path in (("write", "-i", source), ("read", "-o", copy)):
        begun = time.perf_counter()
        done(virtio_bdev_program(command, daemon, option, path))
        figure(command, f"{256 / (time.perf_counter() - begun):.0f} MiB/s, start-up included")
        assert sha256(image) == sha256(source)
    assert sha256(copy) == sha256(source)


def test_a_part_is_written_from_a_pipe_and_read_to_stdout(daemon, image):
    before, part = image.read_bytes(), os.urandom(3 * MIB + 512)
    command = [VIRTIO_BDEV, "write", daemon.address, "--dev-type", "blk", "--offset", "1M"]
    subprocess.run(command, input=part, check=True, timeout=60)
    assert image.read_bytes() == before[:MIB] + part + before[MIB + len(part) :]
    command = [VIRTIO_BDEV, "read", daemon.address, "--dev-type", "blk", "--offset", "1M", "--length", "4M"]
    copy = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    assert copy == image.read_bytes()[MIB : 5 * MIB]


# Flush, zeroes, unmap.


@pytest.fixture
def unflushable(serve, image):
    return serve(*faulty_nodes(image, "event=flush_to_disk,iotype=flush,errno=5"))


def test_a_flush_that_fails_in_the_device_fails_here_and_writes_do_not(unflushable, image):
    data = os.urandom(MIB)
    with attach(unflushable) as controller, disk(controller).open() as channel:
        channel.write(MIB, data)
        with pytest.raises(DeviceError, match="I/O error") as failure:
            channel.flush()
        assert failure.value.errno == errno.EIO
        with pytest.raises(DeviceError):
            channel.write(0, data, fua=True)
        assert channel.read(MIB, MIB) == data
    assert bytes_at(image, MIB, MIB) == data


def test_the_program_does_not_call_written_what_could_not_be_flushed(unflushable, folder):
    source = random_file(folder / "source", MIB)
    line = refusal(virtio_bdev_program("write", unflushable, "-i", source))
    assert line.startswith("virtio-bdev: ") and "EIO" in line


def test_a_flush_that_works_returns(channel):
    channel.write(0, bytes(BLOCK))
    channel.flush()
    channel.write(0, bytes(BLOCK), fua=True)


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_are_written_where_asked_and_nowhere_else(channel, image, unmap):
    before, taken = image.read_bytes(), allocated(image)
    channel.write_zeroes(3 * MIB, 5 * MIB, unmap=unmap)
    channel.write_zeroes(512, 512, unmap=unmap)
    expected = bytearray(before)
    expected[3 * MIB : 8 * MIB] = bytes(5 * MIB)
    expected[512:1024] = bytes(512)
    assert image.read_bytes() == expected
    assert channel.read(0, 32 * MIB) == expected
    channel.flush()
    may_unmap = channel.bdev.controller.device.config.write_zeroes_may_unmap
    assert gave_back(5 * MIB if unmap and may_unmap else 0, taken, image)


def test_unmap_gives_space_back(channel, image):
    before, taken = image.read_bytes(), allocated(image)
    channel.unmap(16 * MIB, 8 * MIB)
    channel.flush()
    assert gave_back(8 * MIB, taken, image)
    after = image.read_bytes()
    assert (after[: 16 * MIB], after[24 * MIB :]) == (before[: 16 * MIB], before[24 * MIB :])


# Many at once.


def test_four_threads_on_four_queues_and_no_fifth(serve, folder, figure):
    image = random_file(folder / "image", 64 * MIB)
    before = image.read_bytes()
    share, rounds = 16 * MIB, 1500
    all_open, may_close = threading.Barrier(5), threading.Event()
    expected, failures, queues = {}, [], set()

    def exercise(bdev, number):
        chance, base = random.Random(number), number * share
        model = bytearray(before[base : base + share])
        try:
            with bdev.open(timeout=10, wait=("adaptive", "event", "event", "adaptive")[number]) as channel:
                queues.add(id(channel._lease.queue))
                all_open.wait(10)
                for _ in range(rounds):
                    offset = chance.randrange(share // BLOCK) * BLOCK
                    if chance.random() < 0.5:
                        model[offset : offset + BLOCK] = data = chance.randbytes(BLOCK)
                        channel.write(base + offset, data)
                    elif channel.read(base + offset, BLOCK) != model[offset : offset + BLOCK]:
                        raise AssertionError(f"thread {number} read something else at {base + offset}")
                expected[number] = model
                may_close.wait(10)
        except Exception as error:
            failures.append(error)

    with attach(serve(file_node(image)), queues=4) as controller:
        bdev = disk(controller)
        threads = [threading.Thread(target=exercise, args=(bdev, number)) for number in range(4)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        all_open.wait(10)
        with pytest.raises(NoQueueError, match="VirtioBlk0 has 4 queues"):
            bdev.open()
        may_close.set()
        for thread in threads:
            thread.join(60)
        figure("rate", rate(4 * rounds, begun))
        assert not failures and len(queues) == 4
        bdev.open().close()  # a queue is free again
    assert image.read_bytes() == b"".join(expected[number] for number in range(4))


def random_offsets(image, count):
    """Offsets of different blocks of a file, in no order."""
    blocks = random.sample(range(image.stat().st_size // BLOCK), count)
    return array("Q", (block * BLOCK for block in blocks))


@pytest.fixture
def big(serve, folder):
    image = random_file(folder / "image", 128 * MIB)
    with attach(serve(file_node(image))) as controller, disk(controller).open(timeout=20) as channel:
        yield controller, channel, image


def test_batches_of_random_reads_in_place_and_bounced(big, figure):
    controller, channel, image = big
    content = image.read_bytes()
    offsets = random_offsets(image, 20_000)
    expected = b"".join(content[offset : offset + BLOCK] for offset in offsets)

    into = bytearray(len(expected))
    begun = time.perf_counter()
    batch = channel.read_batch(offsets, BLOCK, into)
    figure("bounced", rate(20_000, begun))
    batch.raise_for_status()
    assert not any(batch.status) and len(batch) == 20_000
    assert into == expected

    begun = time.perf_counter()
    with controller.buffer(5_000 * BLOCK) as buffer:  # the pool is 64 MiB
        for i in range(0, 20_000, 5_000):
            channel.read_batch(offsets[i : i + 5_000], BLOCK, buffer).raise_for_status()
            with memoryview(buffer) as view:
                assert view == expected[i * BLOCK : (i + 5_000) * BLOCK]
    figure("in place", rate(20_000, begun))


@pytest.mark.parametrize("in_place", [False, True])
def test_batches_of_random_writes_in_place_and_bounced(big, in_place, figure):
    controller, channel, image = big
    expected, step = bytearray(image.read_bytes()), 10_000
    offsets, data = random_offsets(image, 20_000), os.urandom(20_000 * BLOCK)
    for i, offset in enumerate(offsets):
        expected[offset : offset + BLOCK] = data[i * BLOCK : (i + 1) * BLOCK]
    begun = time.perf_counter()
    if in_place:
        with controller.buffer(step * BLOCK) as buffer:
            for i in range(0, 20_000, step):
                with memoryview(buffer) as view:
                    view[:] = data[i * BLOCK : (i + step) * BLOCK]
                channel.write_batch(offsets[i : i + step], BLOCK, buffer).raise_for_status()
    else:
        channel.write_batch(offsets, BLOCK, data).raise_for_status()
    figure("rate", rate(20_000, begun))
    assert image.read_bytes() == expected


@pytest.mark.parametrize("in_place", [False, True])
def test_a_batch_tells_which_item_failed_and_does_the_others(serve, image, in_place):
    bad = 777 * BLOCK
    offsets = random_offsets(image, 2_000)
    if bad in offsets:
        offsets.remove(bad)
    offsets.insert(1234, bad)
    content = image.read_bytes()
    daemon = serve(*faulty_nodes(image, f"event=none,iotype=read,sector={bad // 512},errno=5"))
    with attach(daemon) as controller, disk(controller).open() as channel:
        with controller.buffer(len(offsets) * BLOCK) as buffer:
            into = buffer if in_place else bytearray(len(offsets) * BLOCK)
            batch = channel.read_batch(offsets, BLOCK, into)
            assert {i: code for i, code in enumerate(batch.status) if code} == {1234: -errno.EIO}
            with pytest.raises(DeviceError, match=f"at byte {bad}") as failure:
                batch.raise_for_status()
            assert failure.value.__notes__ == [f"item 1234 of a batch of {len(offsets)}"]
            assert (failure.value.errno, failure.value.offset) == (errno.EIO, bad)
            with memoryview(into) as view:
                for i, offset in enumerate(offsets):
                    if i != 1234:
                        assert view[i * BLOCK : (i + 1) * BLOCK] == content[offset : offset + BLOCK]
        with pytest.raises(DeviceError):
            channel.read(bad, BLOCK)
        assert channel.read(bad + BLOCK, BLOCK) == content[bad + BLOCK : bad + 2 * BLOCK]


# Ways to wait.


@pytest.mark.parametrize("poll_ns", [NEVER_SLEEPS, SLEEPS_AT_ONCE])
@pytest.mark.parametrize("wait, reads", [("adaptive", 5_000), ("poll", 5_000), ("event", 20_000)])
def test_no_completion_is_missed_however_both_sides_wait(serve, image, wait, reads, poll_ns, figure):
    content, chance = image.read_bytes(), random.Random(wait)
    daemon = serve(file_node(image), poll_ns=poll_ns)
    with attach(daemon) as controller, disk(controller).open(wait=wait, timeout=5) as channel:
        into, begun = bytearray(BLOCK), time.perf_counter()
        theirs, ours = daemon.switches(), resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        for _ in range(reads):
            offset = chance.randrange(len(content) // BLOCK) * BLOCK
            channel.readinto(offset, into)
            assert into == content[offset : offset + BLOCK]
        figure("rate", rate(reads, begun))
        theirs = daemon.switches() - theirs
        ours = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - ours
        figure("sleeps a read", f"{ours / reads:.2f} here, {theirs / reads:.2f} in the daemon's threads")
        if wait == "event":
            assert ours > reads / 10  # and was woken by the device's call


# What is refused.


@pytest.fixture
def read_only(serve, image):
    return serve(file_node(image), writable=False)


def test_a_read_only_disk_takes_no_write(read_only, image, folder):
    before = sha256(image)
    with attach(read_only) as controller, disk(controller).open() as channel:
        assert channel.bdev.read_only
        for write in (
            lambda: channel.write(0, bytes(512)),
            lambda: channel.write_zeroes(0, 512),
            lambda: channel.unmap(0, 512),
            lambda: channel.write_batch(array("Q", [0]), 512, bytes(512)),
        ):
            with pytest.raises(ReadOnlyError, match="VirtioBlk0 is read-only"):
                write()
        channel.flush()
        assert channel.read(MIB, MIB) == bytes_at(image, MIB, MIB)
    source = random_file(folder / "source", MIB)
    line = refusal(virtio_bdev_program("write", read_only, "-i", source))
    assert line == "virtio-bdev: VirtioBlk0 is read-only"
    (listed,) = json.loads(done(virtio_bdev_program("list", read_only, "--json")))
    assert not listed["supported_io_types"]["write"]
    assert sha256(image) == before


@pytest.mark.parametrize(
    "offset, nbytes, words",
    [
        (32 * MIB, 512, "512 bytes at 33554432 do not lie within the 33554432 bytes of VirtioBlk0"),
        (32 * MIB - 512, 1024, "do not lie within"),
        (1 << 63, 512, "do not lie within"),
        (1, 512, "512 bytes at 1 are not on the 512-byte grid of VirtioBlk0"),
        (512, 100, "100 bytes at .* are not on the 512-byte grid"),
    ],
)
def test_what_lies_past_the_end_or_off_the_grid_is_refused(channel, daemon, image, offset, nbytes, words):
    before = sha256(image)
    with pytest.raises(RequestError, match=words):
        channel.read(offset, nbytes)
    with pytest.raises(RequestError, match=words):
        channel.write(offset, bytes(nbytes))
    with pytest.raises(RequestError, match=words):
        channel.read_batch(array("Q", [0, offset]), nbytes, bytearray(2 * nbytes))
    assert sha256(image) == before


def test_the_program_refuses_them_in_one_line(daemon, image, folder):
    before = sha256(image)
    for options, words in (
        (("--offset", 33 * MIB), "is past the end of VirtioBlk0"),
        (("--offset", 31 * MIB, "--length", 2 * MIB), "do not lie within"),
        (("--offset", 1), "not on the 512-byte grid"),
        (("--length", 1000), "not on the 512-byte grid"),
        (("--bdev", "Other"), "VirtioBlk0"),
    ):
        assert words in refusal(virtio_bdev_program("read", daemon, *options))
    for nbytes, options, words in (
        (33 * MIB, (), "do not lie within"),
        (MIB, ("--offset", "31.5M"), "is not a size"),
        (MIB, ("--offset", 31 * MIB + 512), "do not lie within"),
        (MIB + 1, (), "not a multiple of the 512-byte blocks"),
    ):
        result = virtio_bdev_program("write", daemon, *options, "-i", random_file(folder / "source", nbytes))
        if result.returncode == 2:  # usage
            assert words in result.stderr
        else:
            assert words in refusal(result)
    assert sha256(image) == before


# A back end that dies.


@pytest.fixture
def noticed(figure):
    """Call it with when the back end was killed, and when that was noticed."""

    def record(killed, end):
        figure("noticed after", f"{(end - killed) * 1e3:.1f} ms")
        assert 0 < end - killed < PROMPTLY

    return record


@contextmanager
def doomed(daemon, **options):
    """A channel to a daemon that is killed inside; afterwards all is lost and can be closed."""
    with nothing_left_behind():
        with attach(daemon) as controller:
            bdev = disk(controller)
            with bdev.open(**options) as channel:
                yield channel
                assert bdev.state == "lost"
                for call in (lambda: channel.read(0, 512), channel.flush, bdev.open):
                    with pytest.raises(TransportError, match="closed the connection"):
                        call()


def test_a_kill_amid_blocking_reads_is_noticed(serve, noticed):
    daemon = serve(IN_MEMORY)
    under_way, moment = threading.Event(), []
    killer = threading.Thread(target=lambda: under_way.wait(10) and moment.append(daemon.kill()))
    with doomed(daemon) as channel:
        killer.start()
        with pytest.raises(TransportError, match="closed the connection"):
            for i in range(10_000_000):
                channel.read(i % 1000 * BLOCK, BLOCK)
                if i == 1000:
                    under_way.set()
        end = time.monotonic()
        killer.join()
        noticed(moment[0], end)


@pytest.mark.parametrize("wait", ["adaptive", "poll", "event"])
def test_a_kill_amid_a_batch_is_noticed(serve, wait, noticed):
    """Its loop holds no GIL and hears of the end by a word in memory."""
    daemon = serve("driver=null-co,node-name=disk,size=1073741824,read-zeroes=on,latency-ns=5000000")
    offsets = array("Q", range(0, BLOCK * 5_000, BLOCK))
    moment = []

    def kill_when_it_moves():
        deadline = time.monotonic() + 10
        while view[300 * BLOCK] and time.monotonic() < deadline:
            time.sleep(0.001)  # the device is writing to memory: there is nothing else to wait for
        moment.append(daemon.kill())

    with doomed(daemon, wait=wait, timeout=30) as channel:
        with channel.bdev.controller.buffer(len(offsets) * BLOCK) as buffer:
            with memoryview(buffer) as view:
                view[:] = b"\xff" * len(view)
                killer = threading.Thread(target=kill_when_it_moves)
                killer.start()
                with pytest.raises(TransportError, match="closed the connection") as failure:
                    channel.read_batch(offsets, BLOCK, buffer)
                end = time.monotonic()
                killer.join()
                status = failure.value.batch.status
                del failure  # its traceback has views of the controller's memory
                finished = sum(code == 0 for code in status)
                assert 0 < finished < len(status)
                assert set(status) == {0, -errno.EINPROGRESS}
                for i, code in enumerate(status):
                    if code == 0:
                        assert not any(view[i * BLOCK : i * BLOCK + 16])
    noticed(moment[0], end)


@pytest.mark.parametrize("wait", ["adaptive", "poll", "event"])
def test_a_kill_of_one_that_hangs_ends_the_read_that_waits_for_it(serve, wait, noticed):
    daemon = serve(IN_MEMORY)
    with doomed(daemon, wait=wait, timeout=30) as channel:
        channel.read(0, BLOCK)
        daemon.pause()
        moment = []
        killer = threading.Timer(0.05, lambda: moment.append(daemon.kill()))
        killer.start()
        with pytest.raises(TransportError, match="closed the connection"):
            channel.read(0, BLOCK)
        end = time.monotonic()
        killer.join()
        noticed(moment[0], end)


def test_a_kill_is_noticed_while_nothing_is_asked(serve, noticed):
    daemon = serve(IN_MEMORY)
    with doomed(daemon) as channel:
        life = channel.bdev.controller.device.life
        assert channel.bdev.state == "online"
        moment = daemon.kill()
        assert readable(life.fd)
        noticed(moment, time.monotonic())


@pytest.mark.parametrize("wait", ["adaptive", "event"])
def test_one_that_is_killed_and_started_again_costs_no_request(serve, image, wait):
    """Verified writes and reads go on across five kills; afterwards the file has what was written last."""
    daemon = serve(file_node(image))
    written, failures, rounds, stop = {}, [], [], threading.Event()

    def work():
        chance = random.Random(1)
        try:
            with attach(daemon, queues=2, reconnect=20) as controller:
                with disk(controller).open(wait=wait, timeout=30) as channel:
                    while not stop.is_set():
                        offsets = array("Q", (BLOCK * i for i in chance.sample(range(32 * MIB // BLOCK), 64)))
                        data = chance.randbytes(64 * BLOCK)
                        channel.write_batch(offsets, BLOCK, data).raise_for_status()
                        into = bytearray(64 * BLOCK)
                        channel.read_batch(offsets, BLOCK, into).raise_for_status()
                        assert into == data
                        for i, offset in enumerate(offsets):
                            written[offset] = data[i * BLOCK : i * BLOCK + BLOCK]
                        rounds.append(1)
        except BaseException as error:
            failures.append(error)

    def some_rounds():
        enough, deadline = len(rounds) + 20, time.monotonic() + 30
        while len(rounds) < enough and not failures:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(5):
            some_rounds()
            daemon.kill()
            daemon.restart()
        some_rounds()
    finally:
        stop.set()
        worker.join(60)
    assert not worker.is_alive() and failures == []
    content = image.read_bytes()
    for offset, data in written.items():
        assert content[offset : offset + BLOCK] == data


def test_a_removed_export_is_a_lost_device(serve):
    daemon = serve(IN_MEMORY, poll_ns=None)  # with a thread for the rings, QEMU 7.2 hangs here
    with doomed(daemon) as channel:
        channel.read(0, BLOCK)
        daemon.qmp("block-export-del", {"id": "export", "mode": "hard"})
        daemon.wait_for_event("BLOCK_EXPORT_DELETED")
        assert readable(channel.bdev.controller.device.life.fd)


def test_the_program_says_that_the_back_end_has_gone(serve):
    daemon = serve("driver=null-co,node-name=disk,size=1099511627776,read-zeroes=on")
    with subprocess.Popen(
        [VIRTIO_BDEV, "read", daemon.address, "--dev-type", "blk"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout.read(MIB) == bytes(MIB)
        daemon.kill()
        _, stderr = program.communicate(timeout=10)
        assert program.returncode == 1
        (line,) = stderr.decode().splitlines()
        assert line.startswith("virtio-bdev: ") and "closed the connection" in line


# A back end that hangs.


@pytest.mark.parametrize("wait", ["adaptive", "poll", "event"])
def test_a_hung_back_end_times_out_and_its_late_answers_do_no_harm(serve, image, wait):
    content = image.read_bytes()
    daemon = serve(file_node(image))
    with nothing_left_behind(), attach(daemon) as controller:
        with disk(controller).open(wait=wait, timeout=0.2) as channel:
            into = bytearray(b"\xee" * BLOCK)
            daemon.pause()
            for _ in range(3):
                begun = time.monotonic()
                with pytest.raises(RequestTimeout, match="has not answered .* in time"):
                    channel.readinto(MIB, into)
                assert 0.2 <= time.monotonic() - begun < 1
            offsets = array("Q", range(0, 1000 * BLOCK, BLOCK))
            with pytest.raises(RequestTimeout) as failure:
                channel.read_batch(offsets, BLOCK, bytearray(1000 * BLOCK))
            assert set(failure.value.batch.status) == {-errno.EINPROGRESS}
            del failure  # its traceback has views of the controller's memory
            daemon.resume()
            channel.timeout = 10
            for offset in range(0, len(content), 16 * BLOCK):  # more of them than the ring has places
                assert channel.read(offset, BLOCK) == content[offset : offset + BLOCK]
            assert into == b"\xee" * BLOCK  # no late answer was copied to memory that had been given back
            assert channel._lease.queue.orphans == 0


def test_a_write_that_timed_out_does_not_land_after_the_next_one(serve, image):
    daemon = serve(file_node(image))
    first, second = b"1" * MIB, b"2" * MIB
    with attach(daemon) as controller, disk(controller).open(timeout=0.2) as channel:
        daemon.pause()
        with pytest.raises(RequestTimeout, match="may still take effect"):
            channel.write(MIB, first)
        with pytest.raises(RequestTimeout):
            channel.write(MIB, second)  # waits for the first, in vain: it is not sent
        daemon.resume()
        channel.timeout = 10
        channel.write(MIB, second)
        channel.flush()
        assert channel.read(MIB, MIB) == second
    assert bytes_at(image, MIB, MIB) == second


def test_attaching_to_a_hung_back_end_times_out(serve):
    daemon = serve(IN_MEMORY)
    daemon.pause()
    with nothing_left_behind():
        begun = time.monotonic()
        with pytest.raises(RequestTimeout, match="it hangs, serves another front end"):
            attach(daemon, timeout=0.3)
        assert 0.3 <= time.monotonic() - begun < 1
    daemon.resume()
    with attach(daemon) as controller, disk(controller).open() as channel:
        assert channel.read(0, BLOCK) == bytes(BLOCK)


def test_closing_while_the_back_end_hangs_is_bounded(serve):
    daemon = serve(IN_MEMORY)
    with nothing_left_behind():
        with attach(daemon, timeout=0.3) as controller:
            with disk(controller).open() as channel:
                channel.read(0, BLOCK)
            daemon.pause()
            begun = time.monotonic()
        assert time.monotonic() - begun < 2


def test_a_second_front_end_is_told_why_it_waits_and_the_first_goes_on(daemon, channel, image):
    begun = time.monotonic()
    with pytest.raises(RequestTimeout, match="serves another front end"):
        attach(daemon, timeout=0.3)
    assert time.monotonic() - begun < 1
    assert "serves another front end" in refusal(virtio_bdev_program("list", daemon, "--timeout", 0.3))
    assert channel.read(MIB, MIB) == bytes_at(image, MIB, MIB)


# Shapes.


def test_a_disk_of_4096_byte_blocks_has_a_grid_of_4096(serve, image, folder):
    daemon = serve(file_node(image), block_size=4096)
    with attach(daemon) as controller, disk(controller).open() as channel:
        bdev = channel.bdev
        assert (bdev.block_size, bdev.size, bdev.blocks) == (4096, 32 * MIB, 32 * MIB // 4096)
        with pytest.raises(RequestError, match="4096-byte grid"):
            channel.read(512, 4096)
        with pytest.raises(RequestError, match="4096-byte grid"):
            channel.read(0, 512)
        data = os.urandom(3 * 4096)
        channel.write(5 * 4096, data)
        channel.write_zeroes(8 * 4096, 4096)
        channel.unmap(16 * MIB, MIB)
        assert channel.read(5 * 4096, 4 * 4096) == data + bytes(4096)
        assert bytes_at(image, 5 * 4096, 4 * 4096) == data + bytes(4096)
    (listed,) = json.loads(done(virtio_bdev_program("list", daemon, "--json")))
    assert (listed["block_size"], listed["num_blocks"]) == (4096, 32 * MIB // 4096)
    copy = folder / "copy"
    done(virtio_bdev_program("read", daemon, "-o", copy))
    assert sha256(copy) == sha256(image)


@pytest.mark.parametrize("queue_size", [4, 8, 64, 256, 1024])
@pytest.mark.parametrize("queues", [1, 2, 3, 4])
def test_queues_of_any_number_and_size_move_the_right_bytes(daemon, image, queues, queue_size):
    content = image.read_bytes()
    offsets = random_offsets(image, 3 * 1024)
    into = bytearray(len(offsets) * BLOCK)
    with attach(daemon, queues=queues, queue_size=queue_size) as controller, ExitStack() as stack:
        assert len(controller.device.leases) == queues
        bdev = disk(controller)
        channels = []

        def open_one():
            channels.append(stack.enter_context(bdev.open(timeout=10)))

        for _ in range(queues):  # a thread has one queue, so that each is opened by another thread
            thread = threading.Thread(target=open_one)
            thread.start()
            thread.join()
        for channel in channels:
            assert channel.read(MIB, 3 * MIB) == content[MIB : 4 * MIB]
            channel.read_batch(offsets, BLOCK, into).raise_for_status()
            assert into == b"".join(content[offset : offset + BLOCK] for offset in offsets)


def test_of_a_disk_with_one_queue_there_is_one_to_have(serve, image):
    daemon = serve(file_node(image), queues=1)
    with pytest.raises(NoQueueError, match="has 1 request queue; 2 are wanted"):
        attach(daemon, queues=2)
    with attach(daemon, queues=4, at_least=1) as controller:
        assert len(controller.device.leases) == 1
        with disk(controller).open() as channel:
            assert channel.read(0, MIB) == bytes_at(image, 0, MIB)
    with attach(daemon) as controller:
        assert len(controller.device.leases) == 1


# Coming and going.


def test_attaching_fifty_times_leaves_nothing_behind(daemon, image, figure):
    def once():
        with attach(daemon, queues=4) as controller, disk(controller).open() as channel:
            assert channel.read(MIB, MIB) == expected
            with controller.buffer(8 * MIB) as buffer:
                channel.readinto(0, buffer)

    expected = bytes_at(image, MIB, MIB)
    for _ in range(5):
        once()
    gc.collect()
    with nothing_left_behind():
        before, begun = resident(), time.perf_counter()
        for _ in range(50):
            once()
        figure("attached", rate(50, begun))
        gc.collect()
        figure("grew by", f"{(resident() - before) >> 10} KiB")
        assert resident() - before < 4 * MIB


def resident():
    """Bytes of this process in memory, those shared with a device included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_a_controller_that_is_dropped_unclosed_warns_and_lets_go_of_the_back_end(daemon):
    with nothing_left_behind():
        controller = attach(daemon)
        with pytest.warns(ResourceWarning, match="<Controller VirtioBlk0 .* was not closed"):
            del controller
            gc.collect()
    attach(daemon, timeout=2).close()


def test_the_child_of_a_fork_has_no_part_in_its_parents_device(serve, image):
    daemon = serve(file_node(image), poll_ns=SLEEPS_AT_ONCE)
    content = image.read_bytes()
    with attach(daemon) as controller, disk(controller).open(timeout=5) as channel:
        assert channel.read(0, BLOCK) == content[:BLOCK]
        ours, theirs = os.pipe()
        before = at_rest(daemon)
        with warnings.catch_warnings(action="ignore"):  # Python 3.12 dislikes forks of programs with threads
            child = os.fork()
        if child == 0:
            try:
                os.write(theirs, said_by_child(channel).encode())
            finally:
                os._exit(0)
        os.close(theirs)
        assert readable(ours)
        with open(ours, "rb") as pipe:
            said = pipe.read().decode()
        os.waitpid(child, 0)
        assert daemon.switches() <= before  # nothing has reached it; a worker may have ended
        assert said == "this controller belongs to the parent of process N: attach again here\n" * 5
        for offset in range(0, MIB, BLOCK):
            assert channel.read(offset, BLOCK) == content[offset : offset + BLOCK]
        channel.write(0, content[BLOCK : 2 * BLOCK])
        channel.flush()
    assert bytes_at(image, 0, BLOCK) == content[BLOCK : 2 * BLOCK]


def at_rest(daemon):
    """What `switches` says once the daemon has gone to sleep after its last answer."""
    deadline = time.monotonic() + 5
    before = -1
    while before != (now := daemon.switches()) and time.monotonic() < deadline:
        before = now
        time.sleep(0.05)
    return now


def said_by_child(channel):
    """What each call says; then everything is closed, as a child that ends in good order does."""
    said = ""
    bdev = channel.bdev
    for call in (
        lambda: channel.read(0, BLOCK),
        lambda: channel.write(0, bytes(BLOCK)),
        channel.flush,
        lambda: channel.read_batch(array("Q", [0]), BLOCK, bytearray(BLOCK)),
        bdev.open,
    ):
        try:
            call()
            said += "done\n"
        except ClosedError as error:
            said += f"{error}\n".replace(str(os.getpid()), "N")
    channel.close()
    bdev.controller.close()
    return said


# Reset, and other sizes, under load.


class Load:
    """Verified reads and writes of one part of a disk, in a thread of its own, until it is told to end."""

    def __init__(self, bdev, path, base, nbytes, wait):
        self.turns, self.failure, self._end = 0, None, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bdev, path, base, nbytes, wait))
        self._thread.start()

    def _run(self, bdev, path, base, nbytes, wait):
        chance = random.Random(base)
        content = bytearray(bytes_at(path, base, nbytes))
        try:
            with bdev.open(timeout=10, wait=wait) as channel:
                while not self._end.is_set():
                    blocks = [chance.randrange(nbytes // BLOCK) for _ in range(200)]
                    offsets = array("Q", [base + block * BLOCK for block in blocks])
                    into = bytearray(len(blocks) * BLOCK)
                    channel.read_batch(offsets, BLOCK, into).raise_for_status()
                    for number, block in enumerate(blocks):
                        got = into[number * BLOCK : (number + 1) * BLOCK]
                        assert got == content[block * BLOCK : (block + 1) * BLOCK], base + block * BLOCK
                    at, data = chance.choice(blocks) * BLOCK, chance.randbytes(BLOCK)
                    channel.write(base + at, data)
                    content[at : at + BLOCK] = data
                    self.turns += 1
                channel.flush()
            assert bytes_at(path, base, nbytes) == content
        except BaseException as failure:
            self.failure = failure

    def end(self):
        self._end.set()
        self._thread.join()
        assert self.failure is None and self.turns > 0, self.failure


def test_a_reset_under_verified_load_loses_nothing_and_repeats_nothing_to_its_caller(serve, image, figure):
    daemon = serve(file_node(image))
    with attach(daemon, queues=2) as controller:
        bdev = disk(controller)
        loads = [
            Load(bdev, image, part * 8 * MIB, 8 * MIB, wait)
            for part, wait in enumerate(("adaptive", "event"))
        ]
        begun, resets = time.monotonic(), 0
        while time.monotonic() < begun + 2 and not any(load.failure for load in loads):
            bdev.reset()
            resets += 1
            time.sleep(0.01)
        for load in loads:
            load.end()
        figure("resets in 2 s", resets)
        figure("batches of 200 verified meanwhile", sum(load.turns for load in loads))
        assert resets > 10 and bdev.state == "online"


def test_a_back_end_that_hangs_in_a_reset_is_lost_in_time(serve, image):
    daemon = serve(file_node(image))
    with attach(daemon, timeout=0.5) as controller:
        bdev = disk(controller)
        with bdev.open(timeout=10) as channel:
            channel.read(0, BLOCK)
            daemon.pause()
            begun = time.monotonic()
            with pytest.raises(TransportError, match="was reset, and does not come back"):
                bdev.reset()
            assert time.monotonic() - begun < 5
            with pytest.raises(TransportError, match="does not come back"):
                channel.read(0, BLOCK)
        daemon.resume()


def test_a_resize_is_seen_and_harms_nothing_that_is_under_way(serve, image):
    version = daemon_version()
    if version < (8, 0):
        pytest.skip(f"qemu-storage-daemon {version[0]}.{version[1]} does not tell of a resize: from 8.0 on")
    daemon = serve(file_node(image), poll_ns=None)  # with a thread for the rings, QEMU 10.0 hangs here
    with attach(daemon, queues=2) as controller:
        bdev = disk(controller)
        events = controller.events()
        load = Load(bdev, image, 0, 8 * MIB, "adaptive")
        for size in [48 * MIB, 40 * MIB, 64 * MIB] * 5:
            before = bdev.size
            daemon.qmp("block_resize", {"node-name": "disk", "size": size})
            assert events.wait(10) == Resized(bdev, before) and bdev.size == size
            with pytest.raises(RequestError, match="do not lie within"):
                bdev.check(size, BLOCK)
        load.end()


def daemon_version():
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"version (\d+)\.(\d+)", said).groups()
    return int(major), int(minor)


# asyncio.


def test_ten_thousand_awaited_reads_and_some_that_are_given_up(serve, image, figure):
    content = image.read_bytes()
    daemon = serve(file_node(image))

    async def main():
        async with await aio.attach(daemon.address, dev_type="blk", queues=1, queue_size=128) as controller:
            async with controller["VirtioBlk0"].open() as channel:

                async def one(number):
                    at = number * 7919 % (len(content) // BLOCK) * BLOCK
                    assert await channel.read(at, BLOCK) == content[at : at + BLOCK]

                begun = time.monotonic()
                await asyncio.gather(*map(one, range(10_000)))
                figure("10,000 reads awaited at once, a second", round(10_000 / (time.monotonic() - begun)))
                for turn in range(200):
                    tasks = [asyncio.create_task(one(turn * 8 + number)) for number in range(8)]
                    await asyncio.sleep(0)
                    tasks[turn % 8].cancel()
                    results = await asyncio.gather(*tasks, return_exceptions=True)
                    assert [type(result) for result in results].count(type(None)) >= 7
                async with asyncio.timeout(10):  # the last one given up may come back after all the others
                    while controller.blocking.device.leases[0].queue.in_flight:
                        await asyncio.sleep(0.001)

    asyncio.run(main())
