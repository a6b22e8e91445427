"""Attaching, names, and what is left when it fails or ends."""

import gc
import json
import os
import re
import threading
import warnings
from pathlib import Path

import pytest

import virtio_bdev
from tests.leaks import open_fds
from virtio.errors import ClosedError, NoQueueError, RequestError, TransportError, VirtioError
from virtio.target import serve

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture
def target():
    with serve("scsi", "ram:1M", "ram:2M,bs=4096", "5:3=ram:4M") as target:
        yield target


def test_scsi_disks_are_named_by_target_and_lun(target):
    with virtio_bdev.attach(target.address) as controller:
        names = {name: bdev.size for name, bdev in controller.items()}
    assert names == {
        "VirtioScsi0t0": 1 << 20,
        "VirtioScsi0t1": 2 << 20,
        "VirtioScsi0t5l3": 4 << 20,
    }


def test_names_are_the_lowest_free_or_as_asked():
    with serve("blk", ram="1M") as first, serve("blk", ram="1M") as second:
        with virtio_bdev.attach(first.address, dev_type="blk") as a:
            with virtio_bdev.attach(second.address, dev_type="blk") as b:
                assert (list(a), list(b)) == (["VirtioBlk0"], ["VirtioBlk1"])
                with pytest.raises(RequestError, match="'VirtioBlk1' is empty or taken"):
                    virtio_bdev.attach(first.address, dev_type="blk", name="VirtioBlk1")
        with virtio_bdev.attach(second.address, dev_type="blk", name="Fast") as b:
            assert list(b) == ["Fast"]
        with virtio_bdev.attach(second.address, dev_type="blk") as b:
            assert list(b) == ["VirtioBlk0"]


def test_a_disk_has_the_same_uuid_each_time_and_no_two_have_one(target):
    seen = []
    for _ in range(2):
        with virtio_bdev.attach(target.address) as controller:
            seen.append([bdev.uuid for bdev in controller.values()])
    assert seen[0] == seen[1] and len(set(seen[0])) == 3


@pytest.mark.parametrize("dev_type", ["blk", "scsi"])
def test_a_description_has_the_keys_and_types_of_spdks(dev_type):
    """Recorded from SPDK's bdev_get_bdevs."""
    (want,) = json.loads((DATA / f"spdk/bdev_get_bdevs_{dev_type}.json").read_text())
    with (
        serve(dev_type, ram="1M") as target,
        virtio_bdev.attach(target.address, dev_type=dev_type, queues=2, queue_size=64) as controller,
    ):
        (bdev,) = controller.values()
        got = json.loads(json.dumps(bdev.describe()))
    assert shape(got) == shape(want)
    assert got["driver_specific"]["virtio"] == {
        "vq_count": want["driver_specific"]["virtio"]["vq_count"],  # scsi: control and event too
        "vq_size": 64,
        "type": "user",
        "socket": target.path,
    }


def shape(value):
    """Keys and types, in order."""
    if isinstance(value, dict):
        return [(key, shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_queues_are_as_many_as_asked_or_cores_or_an_error():
    cores = len(os.sched_getaffinity(0))
    with serve("blk", ram="1M", queues=3) as target:
        for queues, least, want in [(None, None, min(3, cores)), (3, None, 3), (8, 2, 3), (1, None, 1)]:
            with virtio_bdev.attach(
                target.address, dev_type="blk", queues=queues, at_least=least
            ) as controller:
                assert len(controller.device.leases) == want
        with pytest.raises(NoQueueError, match="has 3 request queues; 4 are wanted: ask for 3 .*at_least=3"):
            virtio_bdev.attach(target.address, dev_type="blk", queues=4)
        with virtio_bdev.attach(target.address, dev_type="blk"):  # and nothing was left behind
            pass


def test_a_queue_too_many_says_how_many_there_could_be():
    with serve("blk", ram="1M", queues=3) as target:
        for queues, words in [
            (1, r"^VirtioBlk0 has 1 queue, .* or attach with up to 3 \(queues=3, --queues 3\)$"),
            (
                3,
                "^VirtioBlk0 has 3 queues, each .*: close some, as its device has no more queues$",
            ),
        ]:
            with virtio_bdev.attach(target.address, dev_type="blk", queues=queues) as controller:
                controller._free.clear()  # as if threads had them all
                with pytest.raises(NoQueueError, match=words):
                    controller["VirtioBlk0"].open()


@pytest.mark.parametrize("kind, other", [("blk", "scsi"), ("scsi", "blk")])
def test_a_device_taken_for_the_other_kind_is_said_to_be_what_it_is(kind, other):
    with serve(kind, "ram:1M") as target:
        words = (
            f"{target.address} is a virtio-{kind} device by what it offers, not virtio-{other}: "
            f'dev_type {kind} (`--dev-type {kind}`, `dev_type="{kind}"`, '
            f"or the word {kind} in a configuration file)"
        )
        with pytest.raises(VirtioError, match=re.escape(words)):
            virtio_bdev.attach(target.address, dev_type=other)
        virtio_bdev.attach(target.address, dev_type=kind).close()


def test_a_name_that_no_disk_has_is_told_with_those_that_there_are(target):
    with virtio_bdev.attach(target.address) as controller:
        with pytest.raises(KeyError, match="VirtioScsi0 has no disk 'VirtioBlk9'; it has: VirtioScsi0t0, Vi"):
            controller["VirtioBlk9"]
        assert "VirtioBlk9" not in controller and controller.get("VirtioBlk9") is None


@pytest.mark.parametrize(
    "address, more, words",
    [
        ("/tmp/x", {}, "want user:PATH"),
        ("user:", {}, "want user:PATH"),
        ("pci:0000:00:24.0", {}, "want user:PATH.*, or pci:0000:00:04.0"),
        ("pci:0000:00:04.0", {"reconnect": 1}, "only a socket can be connected to again"),
        ("user:/x", {"dev_type": "nvme"}, "want one of blk, scsi"),
        ("user:/x", {"queues": 0}, "queues 0, want 1 or more"),
        ("user:/x", {"queue_size": 100}, "queue_size 100, want a power of two"),
        ("user:/x", {"depth": 0}, "depth 0, want 1 or more"),
        ("user:/x", {"timeout": 0}, "timeout 0"),
        ("user:/x", {"name": ""}, "the name '' is empty"),
    ],
)
def test_what_is_wrong_with_a_call_is_said(address, more, words):
    with pytest.raises(RequestError, match=words):
        virtio_bdev.attach(address, **more)


def test_a_socket_that_is_not_there_is_said_and_its_name_is_free_again(tmp_path):
    for _ in range(2):
        with pytest.raises(TransportError, match="there is no such socket: is the back end running"):
            virtio_bdev.attach(f"user:{tmp_path}/none", name="Same")


def test_attach_and_close_leave_nothing_behind(target):
    with virtio_bdev.attach(target.address):
        pass
    gc.collect()
    before = open_fds(), threading.active_count()
    for _ in range(20):
        with virtio_bdev.attach(target.address) as controller:
            with controller["VirtioScsi0t0"].open() as channel:
                channel.read(0, 512)
    gc.collect()
    assert (open_fds(), threading.active_count()) == before
    assert "virtio-bdev" not in Path("/proc/self/maps").read_text()


def test_a_controller_or_channel_dropped_without_close_warns_and_is_closed(target):
    before = open_fds()
    controller = virtio_bdev.attach(target.address)
    channel = controller["VirtioScsi0t0"].open()
    with pytest.warns(ResourceWarning, match="Channel to VirtioScsi0t0.* was not closed"):
        del channel
        gc.collect()
    with pytest.warns(ResourceWarning, match="Controller VirtioScsi0 .* was not closed"):
        del controller
        gc.collect()
    assert open_fds() == before


def test_close_may_be_called_again_and_from_another_thread(target):
    controller = virtio_bdev.attach(target.address)
    thread = threading.Thread(target=controller.close)
    thread.start()
    thread.join()
    controller.close()
    with pytest.raises(ClosedError):
        controller["VirtioScsi0t0"].open()
    assert "closed" in repr(controller)


def test_closing_under_a_running_batch_tells_its_caller(target):
    from array import array

    controller = virtio_bdev.attach(target.address)
    bdev = controller["VirtioScsi0t0"]
    started, errors = threading.Event(), []

    def work():
        offsets = array("Q", [0] * 100_000)
        with bdev.open(wait="poll") as channel, warnings.catch_warnings():
            into = bytearray(512 * 100_000)
            started.set()
            try:
                while True:
                    channel.read_batch(offsets, 512, into)
            except ClosedError as error:
                errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    controller.close()
    thread.join(10)
    assert len(errors) == 1 and "was closed" in str(errors[0])


def test_reprs_answer(target):
    with virtio_bdev.attach(target.address, queues=2) as controller:
        bdev = controller["VirtioScsi0t0"]
        assert repr(bdev) == "<Bdev VirtioScsi0t0 1 MiB, 512 B blocks, online, 2 queues>"
        assert repr(controller).startswith("<Controller VirtioScsi0 at user:")


def test_a_child_of_a_fork_gets_typed_errors_and_the_parent_goes_on(target):
    with virtio_bdev.attach(target.address) as controller:
        bdev = controller["VirtioScsi0t0"]
        with bdev.open() as channel:
            channel.write(0, b"\x42" * 512)
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    channel.read(0, 512)
                except ClosedError as error:
                    code = 0 if "attach again here" in str(error) else 2
                finally:
                    channel.close()
                    controller.close()
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert channel.read(0, 512) == b"\x42" * 512
