"""QEMU's own virtio-blk-pci and virtio-scsi-pci, driven through qtest; what landed is read from the files."""

import os
import random
import threading
import time
from array import array
from contextlib import contextmanager

import pytest

from tests import needs
from tests.leaks import open_fds
from tests.peers.qtest import Machine, QtestWindows
from tests.space import OWN, allocated
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import NoQueueError, ReadOnlyError, RequestError, RequestTimeout, TransportError
from virtio.ring.lease import deadline_in
from virtio.transport.pci import Pci, open_pci
from virtio.wire.pci import Common
from virtio.wire.sense import Sense
from virtio.wire.virtio import Feature
from virtio.wire.virtio_scsi import ResponseCode, TaskFunction
from virtio_bdev import Added, Controller, Removed, Resized

QEMU = needs.program("qemu-system-x86_64")

MIB = 1 << 20
SLOT = 3
DEVICES = {"blk": BlkDevice, "scsi": ScsiDevice}

VARIANTS = {
    "modern": "disable-legacy=on",
    "transitional": "disable-legacy=off",
    "legacy-only": "disable-legacy=off,disable-modern=on",
    "legacy-only, event_idx=off": "disable-legacy=off,disable-modern=on,event_idx=off",
    "legacy-only, indirect_desc=off": "disable-legacy=off,disable-modern=on,indirect_desc=off",
    "event_idx=off": "disable-legacy=on,event_idx=off",
    "indirect_desc=off": "disable-legacy=on,indirect_desc=off",
    "packed": "disable-legacy=on,packed=on",
    "packed, event_idx=off": "disable-legacy=on,packed=on,event_idx=off",
    "packed, indirect_desc=off": "disable-legacy=off,packed=on,indirect_desc=off",
    "packed, neither": "disable-legacy=on,packed=on,event_idx=off,indirect_desc=off",
    "neither": "disable-legacy=off,event_idx=off,indirect_desc=off",
    "iommu_platform": "disable-legacy=on,iommu_platform=on",
    "port notify": "disable-legacy=on,modern-pio-notify=on",
    "page per vq": "disable-legacy=on,page-per-vq=on",
}


def image(path, nbytes=4 * MIB, seed=1):
    """A file of random bytes."""
    path.write_bytes(random.Random(seed).randbytes(nbytes))
    return path


def drive(path, name="d0", options=""):
    return ["-drive", f"if=none,id={name},file={path},format=raw,discard=unmap{options}"]


def device(kind, path, variant="disable-legacy=on", queues=1, disk=""):
    """The options for one disk behind one device."""
    disk = f",{disk}" if disk else ""
    if kind == "blk":
        blk = f"virtio-blk-pci,addr={SLOT},drive=d0,num-queues={queues},{variant}{disk}"
        return [*drive(path), "-device", blk]
    scsi = f"virtio-scsi-pci,addr={SLOT},id=s0,num_queues={queues},{variant}"
    return [*drive(path), "-device", scsi, "-device", f"scsi-hd,bus=s0.0,drive=d0,scsi-id=0,lun=0{disk}"]


def kinds(function):
    return pytest.mark.parametrize("kind", DEVICES)(function)


@contextmanager
def attached(machine, kind, *, slot=SLOT, windows=None, **options):
    """A controller on a device of the machine; `windows` instead of the machine's own."""
    transport = open_pci(windows or machine.windows(slot))
    with Controller(DEVICES[kind](transport, **options), kind, deadline_in(5)) as controller:
        yield controller


def exercise(bdev, path, *, at=0, nbytes=MIB, wait="adaptive", seed=2):
    """Read what is there, and write all over it; the file has it all."""
    content = bytearray(path.read_bytes())
    assert bdev.size == len(content)
    chance = random.Random(seed)
    block = bdev.block_size
    with bdev.open(wait=wait, timeout=10.0) as channel:
        assert channel.read(at, nbytes) == content[at : at + nbytes]
        for _ in range(20):
            size = block * chance.choice([1, 2, 9, 64])
            offset = at + block * chance.randrange((nbytes - size) // block)
            data = chance.randbytes(size)
            channel.write(offset, data)
            content[offset : offset + size] = data
            assert channel.read(offset, size) == data
        big = chance.randbytes(nbytes)
        channel.write(at, big)
        content[at : at + nbytes] = big
        channel.flush()
        assert path.read_bytes()[at : at + nbytes] == content[at : at + nbytes]
        assert channel.read(at, nbytes) == big


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@kinds
def test_what_is_written_is_in_the_file(tmp_path, kind, variant, queues):
    path = image(tmp_path / "disk")
    before = open_fds()
    with Machine(QEMU, *device(kind, path, VARIANTS[variant], queues)) as machine:
        assert list(machine.functions()) == [SLOT]
        with attached(machine, kind, queues=queues) as controller:
            features = controller.device.features
            assert not bool(features & Feature.EVENT_IDX) == ("event_idx=off" in VARIANTS[variant])
            assert not controller.device.indirect == ("indirect_desc=off" in VARIANTS[variant])
            assert bool(features & Feature.ACCESS_PLATFORM) == (variant == "iommu_platform")
            assert bool(features & Feature.RING_PACKED) == variant.startswith("packed")
            legacy = variant.startswith("legacy")
            assert controller.device.transport.legacy == legacy == (not features & Feature.VERSION_1)
            bdevs = list(controller.values())
            assert len(bdevs) == 1
            assert len(controller.device.leases) == queues
            exercise(bdevs[0], path)
            exercise(bdevs[0], path, wait="event")
            exercise(bdevs[0], path, wait="poll")
    after = open_fds()
    assert after == before


@pytest.mark.parametrize("shift", [12, 21])
@pytest.mark.parametrize(
    "variant", ["modern", "packed", "legacy-only", "neither", "legacy-only, indirect_desc=off"]
)
@kinds
def test_memory_in_pages_is_as_good(tmp_path, kind, variant, shift):
    """As it is without an IOMMU: a descriptor that went on past the end of a page would hit another."""
    path = image(tmp_path / "disk")
    options = VARIANTS[variant] + f",{'queue-size' if kind == 'blk' else 'virtqueue_size'}=128"
    with Machine(QEMU, *device(kind, path, options, 2)) as machine:
        windows = machine.windows(SLOT)
        windows.shift = shift
        if "legacy" in variant and shift == 12:  # a ring takes two pages
            with pytest.raises(TransportError, match="in pieces"):
                DEVICES[kind](open_pci(windows), pool_bytes=16 * MIB)
            return
        with attached(machine, kind, windows=windows, queues=2, pool_bytes=16 * MIB) as controller:
            (bdev,) = controller.values()
            exercise(bdev, path, wait="event")
            exercise(bdev, path, wait="poll")
            with bdev.open() as channel, controller.buffer(2 * MIB + 512) as buffer:
                content = path.read_bytes()
                odd = buffer.view()[100 : 100 + 2 * MIB]
                channel.readinto(MIB, odd)  # in place, wherever pages end
                assert odd == content[MIB : 3 * MIB]
                channel.write(0, odd)
                assert path.read_bytes() == content[MIB : 3 * MIB] + content[2 * MIB :]


def in_threads(bdev, path, waits):
    """Exercise a quarter of the disk in each of four threads, so on four queues, at the same time."""
    failures = []
    together = threading.Barrier(4)

    def work(number):
        try:
            with bdev.open():  # keeps this thread's queue
                together.wait(10)
                for wait in waits:
                    exercise(bdev, path, at=number * MIB, wait=wait, seed=number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@kinds
def test_four_threads_on_four_queues(tmp_path, kind):
    path = image(tmp_path / "disk")
    with (
        Machine(QEMU, *device(kind, path, queues=4)) as machine,
        attached(machine, kind, queues=4) as controller,
    ):
        in_threads(next(iter(controller.values())), path, ["event", "adaptive"])


@pytest.mark.parametrize("vectors", [0, 1, 2, 3])
@kinds
def test_with_few_interrupt_vectors_some_are_shared_and_with_none_it_spins(tmp_path, kind, vectors):
    """PCI-20."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, queues=4)) as machine:
        windows = machine.windows(SLOT)
        windows.vectors = vectors
        with attached(machine, kind, windows=windows, queues=4) as controller:
            in_threads(next(iter(controller.values())), path, ["event"])
            assert len(windows.counts) == vectors
            if vectors:
                assert sum(windows.counts) > 0


LEGACY = "disable-legacy=off,disable-modern=on"


@pytest.mark.parametrize("variant", ["disable-legacy=on", LEGACY], ids=["modern", "legacy-only"])
@kinds
def test_without_msix_all_queues_share_the_line(tmp_path, kind, variant):
    """PCI-23: INTx, and why it was up is in the ISR status."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, f"{variant},vectors=0", queues=4)) as machine:
        windows = machine.windows(SLOT)
        windows.has_line = True
        with attached(machine, kind, windows=windows, queues=4) as controller:
            (bdev,) = controller.values()
            in_threads(bdev, path, ["event"])
            assert windows.counts[0] > 0
            events = controller.events()
            machine.qmp("block_resize", {"device": "d0", "size": 8 * MIB})
            if kind == "scsi":
                with bdev.open() as channel:
                    channel.read(0, 512)
            assert events.wait(10) == Resized(bdev, 4 * MIB) and bdev.size == 8 * MIB
        assert machine.qtest.load_config(SLOT, 6, 2) & 8 == 0, "the line is down"


LIVES = ["modern", "transitional", "legacy-only", "event_idx=off", "indirect_desc=off", "packed"]


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("variant", LIVES)
@kinds
def test_the_life_of_a_device(tmp_path, kind, variant, queues):
    """BLK-5: attached, used, resized and unplugged.

    Nothing tells of an unplugged device but its registers: of ports all ones, and of memory, with
    QEMU, zeroes.
    """
    path = image(tmp_path / "disk")
    options = VARIANTS[variant] + (",id=s0" if kind == "blk" else "")
    before = open_fds()
    with Machine(QEMU, *device(kind, path, options, queues), kind="pc") as machine:
        windows = machine.windows(SLOT)
        with attached(machine, kind, windows=windows, queues=queues) as controller:
            (bdev,) = controller.values()
            events = controller.events()
            assert controller.device.transport.legacy == (variant == "legacy-only")
            first = 1 + controller.device.FIXED_QUEUES
            end = time.monotonic() + 10
            used = [0] * queues  # interrupts of each queue; who looks is sometimes faster
            while not all(used) and time.monotonic() < end:
                if queues == 4:
                    in_threads(bdev, path, ["event"])
                else:
                    exercise(bdev, path, wait="event")
                used = windows.counts[first:][:queues]
            assert len(used) == queues and all(used)
            machine.qmp("block_resize", {"device": "d0", "size": 6 * MIB})
            with bdev.open(timeout=10) as channel, bdev.open(wait="event", timeout=10) as other:
                if kind == "scsi":
                    channel.read(0, 512)  # maybe the first to be told
                assert events.wait(10) == Resized(bdev, 4 * MIB)
                channel.write(5 * MIB, b"new land" * 64)
                assert other.read(5 * MIB, 512) == b"new land" * 64
                assert path.read_bytes()[5 * MIB :][:512] == b"new land" * 64
                machine.unplug("s0", SLOT)
                start = time.monotonic()
                for one in (channel, other):
                    with pytest.raises(TransportError, match="is gone.*its status reads (ff|00)"):
                        one.read(0, 512)
                assert time.monotonic() - start < 2
            start = time.monotonic()
        assert time.monotonic() - start < 2
    assert open_fds() == before


@kinds
def test_each_queue_interrupts_by_its_own_vector(tmp_path, kind):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, queues=2)) as machine:
        windows = machine.windows(SLOT)
        with attached(machine, kind, windows=windows, queues=2) as controller:
            bdev = next(iter(controller.values()))
            first = 1 + controller.device.FIXED_QUEUES
            with bdev.open(wait="event") as channel:
                lease = channel._lease
                number = controller.device.leases.index(lease)
                before = list(windows.counts)
                end = time.monotonic() + 10
                while windows.counts[first + number] == before[first + number] and time.monotonic() < end:
                    for at in range(50):
                        channel.read(at * 512, 512)
                gained = [after - old for after, old in zip(windows.counts, before, strict=True)]
        assert gained.pop(first + number) > 0  # how many depends on who was faster
        assert not any(gained)


@kinds
def test_a_polling_channel_causes_few_interrupts(tmp_path, kind):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path)) as machine:
        windows = machine.windows(SLOT)
        with attached(machine, kind, windows=windows) as controller:
            with next(iter(controller.values())).open(wait="poll") as channel:
                before = sum(windows.counts)
                for at in range(200):
                    channel.read(at * 512, 512)
            assert sum(windows.counts) - before <= 2


@kinds
def test_a_device_is_brought_up_again_and_again(tmp_path, kind):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, queues=4)) as machine:
        for queues in (1, 4, 2):
            with attached(machine, kind, queues=queues) as controller:
                exercise(next(iter(controller.values())), path, seed=queues)
        assert machine.qmp("query-status")["running"]


@kinds
def test_more_queues_than_there_are_is_an_error_that_leaves_nothing(tmp_path, kind):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, queues=2)) as machine:
        before = open_fds()
        with pytest.raises(NoQueueError, match="2 request queues"):
            DEVICES[kind](Pci(machine.windows(SLOT)), queues=3)
        assert open_fds() == before
        with attached(machine, kind, queues=2) as controller:
            exercise(next(iter(controller.values())), path)


@pytest.mark.parametrize("size", [16, 1024])
@kinds
def test_queues_are_as_large_as_the_device_takes(tmp_path, kind, size):
    path = image(tmp_path / "disk")
    option = f"disable-legacy=on,{'queue-size' if kind == 'blk' else 'virtqueue_size'}={size}"
    with Machine(QEMU, *device(kind, path, option)) as machine:
        for wanted in (256, 1024):
            with attached(machine, kind, queue_size=wanted) as controller:
                assert controller.device.queue_size == min(size, wanted)
                exercise(next(iter(controller.values())), path)


@pytest.mark.parametrize("depth, size, in_pages", [(1, 4, 32), (5, 8, 32), (1000, 256, 256)])
@pytest.mark.parametrize("variant", ["modern", "event_idx=off", "packed", "indirect_desc=off"])
@kinds
def test_queues_for_a_depth_are_no_larger(tmp_path, kind, variant, depth, size, in_pages):
    """In pages of 4 KiB, 64 KiB are 17 pieces; with direct descriptors a depth changes nothing."""
    path = image(tmp_path / "disk")
    options = VARIANTS[variant] + f",{'queue-size' if kind == 'blk' else 'virtqueue_size'}=256"
    with Machine(QEMU, *device(kind, path, options)) as machine:
        for wanted, shift in ((size, None), (in_pages, 12)):
            windows = machine.windows(SLOT)
            windows.shift = shift or windows.shift
            pool_bytes = 64 * MIB if shift is None else 16 * MIB
            with attached(machine, kind, windows=windows, depth=depth, pool_bytes=pool_bytes) as controller:
                (bdev,) = controller.values()
                assert controller.device.queue_size == (wanted if controller.device.indirect else 256)
                for wait in ("event", "poll"):
                    exercise(bdev, path, wait=wait)
                many(bdev, path)


def many(bdev, path):
    """Write sectors at random places, in one call, and read them again."""
    content = bytearray(path.read_bytes())
    chance = random.Random(3)
    places = [512 * number for number in chance.sample(range(len(content) // 512), 200)]
    data = chance.randbytes(512 * len(places))
    for number, place in enumerate(places):
        content[place : place + 512] = data[512 * number :][:512]
    with bdev.open(timeout=10) as channel:
        channel.write_batch(array("Q", places), 512, data).raise_for_status()
        channel.flush()
        assert path.read_bytes() == content
        into = bytearray(len(data))
        channel.read_batch(array("Q", places), 512, into).raise_for_status()
        assert into == data


@kinds
def test_blocks_of_4096_bytes(tmp_path, kind):
    path = image(tmp_path / "disk")
    sizes = "logical_block_size=4096,physical_block_size=4096"
    with (
        Machine(QEMU, *device(kind, path, disk=sizes)) as machine,
        attached(machine, kind) as controller,
    ):
        bdev = next(iter(controller.values()))
        assert (bdev.block_size, bdev.size) == (4096, 4 * MIB)
        exercise(bdev, path)


@kinds
def test_a_read_only_disk_is_known_as_one(tmp_path, kind):
    path = image(tmp_path / "disk")
    arguments = device(kind, path)
    arguments[1] += ",readonly=on"
    content = path.read_bytes()
    with Machine(QEMU, *arguments) as machine, attached(machine, kind) as controller:
        bdev = next(iter(controller.values()))
        assert bdev.read_only
        with bdev.open() as channel:
            assert channel.read(0, MIB) == content[:MIB]
            with pytest.raises(ReadOnlyError):
                channel.write(0, bytes(512))
    assert path.read_bytes() == content


@kinds
def test_unmapped_blocks_are_holes_in_the_file(tmp_path, kind):
    path = image(tmp_path / "disk")
    before = allocated(path)
    with Machine(QEMU, *device(kind, path)) as machine, attached(machine, kind) as controller:
        with next(iter(controller.values())).open() as channel:
            channel.unmap(MIB, MIB)
            channel.write_zeroes(0, 64 << 10)
            assert channel.read(0, 64 << 10) == bytes(64 << 10)
    assert path.read_bytes()[: 64 << 10] == bytes(64 << 10)
    assert allocated(path) <= before - MIB + OWN


UNITS = {  # target, LUN: block size
    (0, 0): 512,
    (0, 1): 512,
    (0, 7): 4096,
    (3, 0): 512,
    (3, 300): 512,
    (4, 0): 4096,
    (9, 2): 512,
    (9, 255): 512,
    (255, 0): 512,
}


def scsi_units(tmp_path):
    """Arguments for twelve units on eight targets: those of UNITS, t2 read-only, t5 a cd-rom, t6 of 3 TiB;
    and their files by target and LUN."""
    arguments = ["-device", f"virtio-scsi-pci,addr={SLOT},id=s0,num_queues=4,disable-legacy=on"]
    paths = {}
    for number, ((target, lun), block) in enumerate(UNITS.items()):
        paths[target, lun] = image(tmp_path / f"disk{number}", (1 + number) * MIB, seed=number)
        arguments += drive(paths[target, lun], f"d{number}")
        where = f"bus=s0.0,drive=d{number},scsi-id={target},lun={lun},serial=S{number}"
        sizes = f"logical_block_size={block},physical_block_size={block}"
        arguments += ["-device", f"scsi-hd,{where},{sizes}"]
    paths[2, 0] = image(tmp_path / "fixed", seed=20)
    arguments += drive(paths[2, 0], "fixed", ",readonly=on")
    arguments += ["-device", "scsi-hd,bus=s0.0,drive=fixed,scsi-id=2,lun=0"]
    paths[5, 0] = image(tmp_path / "cd", seed=21)
    arguments += drive(paths[5, 0], "cd", ",media=cdrom,readonly=on")
    arguments += ["-device", "scsi-cd,bus=s0.0,drive=cd,scsi-id=5,lun=0"]
    paths[6, 0] = tmp_path / "huge"
    paths[6, 0].touch()
    os.truncate(paths[6, 0], 3 << 40)
    arguments += drive(paths[6, 0], "huge")
    arguments += ["-device", "scsi-hd,bus=s0.0,drive=huge,scsi-id=6,lun=0"]
    return arguments, paths


def place(target, lun):
    return f"t{target}" + (f"l{lun}" if lun else "")


def test_twelve_units_of_several_targets_are_found_and_what_is_written_is_in_their_files(tmp_path):
    """SCS-9."""
    arguments, paths = scsi_units(tmp_path)
    with Machine(QEMU, *arguments) as machine, attached(machine, "scsi", queues=2) as controller:
        found = {bdev.disk.place: bdev for bdev in controller.values()}
        assert set(found) == {place(*at) for at in paths} and len(found) == 12
        for number, (at, block) in enumerate(UNITS.items()):
            bdev = found[place(*at)]
            assert (bdev.block_size, bdev.size) == (block, (1 + number) * MIB)
            assert bdev.disk.serial == f"S{number}" and not bdev.read_only
            exercise(bdev, paths[at], seed=number)
        for fixed, block in (("t2", 512), ("t5", 2048)):
            bdev = found[fixed]
            assert (bdev.block_size, bdev.size, bdev.read_only) == (block, 4 * MIB, True)
            with bdev.open() as channel:
                assert channel.read(0, MIB) == paths[int(fixed[1:]), 0].read_bytes()[:MIB]
                with pytest.raises(ReadOnlyError):
                    channel.write(0, bytes(block))
        with found["t6"].open() as channel:
            assert found["t6"].size == 3 << 40
            channel.write((2 << 40) + 4096, b"beyond!!" * 64)  # past 2^32 blocks of 512
    with open(paths[6, 0], "rb") as file:
        file.seek((2 << 40) + 4096)
        assert file.read(512) == b"beyond!!" * 64


@pytest.mark.parametrize("vectors", [None, 0])
def test_hot_plug_resize_and_unplug_are_told_as_events(tmp_path, vectors):
    """SCS-5, SCS-8: and a removed disk fails its I/O, while the others go on."""
    path, other = image(tmp_path / "disk"), image(tmp_path / "other", 2 * MIB, seed=5)
    arguments = device("scsi", path, queues=2)
    with Machine(QEMU, *arguments) as machine:
        windows = machine.windows(SLOT)
        windows.vectors = vectors
        with attached(machine, "scsi", windows=windows, queues=1) as controller:
            (first,) = controller.values()
            events = controller.events()
            machine.qmp(
                "blockdev-add",
                {"driver": "file", "filename": str(other), "node-name": "f1", "discard": "unmap"},
            )
            machine.qmp("blockdev-add", {"driver": "raw", "file": "f1", "node-name": "n1"})
            plugged = {"driver": "scsi-hd", "bus": "s0.0", "drive": "n1", "id": "p1", "scsi-id": 7, "lun": 5}
            machine.qmp("device_add", plugged)
            added = events.wait(10)
            assert isinstance(added, Added) and added.bdev is controller["scsit7l5"]
            assert added.bdev.size == 2 * MIB
            exercise(added.bdev, other)
            with added.bdev.open(timeout=10) as channel, first.open(timeout=10) as neighbour:
                machine.qmp("block_resize", {"node-name": "n1", "size": 5 * MIB})
                assert events.wait(10) == Resized(added.bdev, 2 * MIB)
                assert added.bdev.size == 5 * MIB
                channel.write(4 * MIB, b"new land" * 64)
                assert other.read_bytes()[4 * MIB : 4 * MIB + 512] == b"new land" * 64
                machine.qmp("device_del", {"id": "p1"})
                assert events.wait(10) == Removed(added.bdev)
                with pytest.raises(TransportError, match="scsit7l5 was removed from pci"):
                    channel.read(0, 512)
                assert neighbour.read(0, 512) == path.read_bytes()[:512]
            assert list(controller) == ["scsit0"] and added.bdev.state == "lost"


def test_a_resized_disk_is_found_out_by_a_command_where_there_are_no_events(tmp_path):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device("scsi", path, queues=2)) as machine:
        transport = Pci(machine.windows(SLOT))
        transport.offered = lambda real=transport.offered: real() & ~0xF
        with Controller(ScsiDevice(transport, queues=1), "scsi", deadline_in(5)) as controller:
            (bdev,) = controller.values()
            events = controller.events()
            machine.qmp("block_resize", {"device": "d0", "size": 8 * MIB})
            with bdev.open(timeout=10) as channel:
                channel.read(0, 512)  # CAPACITY DATA HAS CHANGED, and then the data
            assert events.wait(10) == Resized(bdev, 4 * MIB)


def test_commands_pass_through_to_any_unit(tmp_path):
    arguments, paths = scsi_units(tmp_path)
    with Machine(QEMU, *arguments) as machine, attached(machine, "scsi", queues=1) as controller:
        inquiry = controller.scsi(5, 0, bytes([0x12, 0, 0, 0, 36, 0]), nbytes=36)
        assert inquiry.good and inquiry.data[0] & 0x1F == 5 and b"CD-ROM" in inquiry.data
        read = controller.scsi(3, 300, bytes([0x28, 0, 0, 0, 0, 9, 0, 0, 2, 0]), nbytes=1024)
        assert read.data == paths[3, 300].read_bytes()[9 * 512 : 11 * 512]
        data = random.Random(9).randbytes(4096)
        assert controller.scsi(0, 7, bytes([0x2A, 0, 0, 0, 0, 1, 0, 0, 1, 0]), data).good
        assert paths[0, 7].read_bytes()[4096:8192] == data
        bad = controller.scsi(0, 0, bytes([0xFF] * 6))
        assert bad.status == 2 and Sense.decode(bad.sense).asc == 0x20
        assert controller.scsi(77, 0, bytes(6)).response == ResponseCode.BAD_TARGET
        assert controller.device.manage(TaskFunction.LOGICAL_UNIT_RESET, 0, 7) == 0


def test_two_devices_of_one_machine_keep_apart(tmp_path):
    paths = [image(tmp_path / f"disk{number}", seed=number) for number in range(2)]
    arguments = device("blk", paths[0], queues=2)
    arguments += [*drive(paths[1], "d1"), "-device", "virtio-scsi-pci,addr=5,id=s1,num_queues=2"]
    arguments += ["-device", "scsi-hd,bus=s1.0,drive=d1"]
    with (
        Machine(QEMU, *arguments) as machine,
        attached(machine, "blk") as blk,
        attached(machine, "scsi", slot=5) as scsi,
    ):
        assert list(machine.functions()) == [3, 5]
        assert [blk.device.transport.device_type, scsi.device.transport.device_type] == [2, 8]
        exercise(next(iter(blk.values())), paths[0])
        exercise(next(iter(scsi.values())), paths[1])
        blk.close()
        exercise(next(iter(scsi.values())), paths[1], seed=3)


class NoBars(QtestWindows):
    """Windows of somebody who can reach configuration space alone."""

    def bar_bytes(self, bar):
        return 0

    def doorbell(self, bar, offset, value):
        raise AssertionError("there is no access to BARs")


@kinds
def test_without_access_to_bars_everything_goes_through_configuration_space(tmp_path, kind):
    """PCI-9, PCI-19."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path)) as machine:
        windows = machine.windows(SLOT)
        windows.__class__ = NoBars
        windows.vectors = 0
        with attached(machine, kind, windows=windows) as controller:
            exercise(next(iter(controller.values())), path)


@kinds
def test_a_queue_is_reset_and_set_up_again(tmp_path, kind):
    """PCI-15, VQR-1, VQR-2."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path)) as machine, attached(machine, kind) as controller:
        exercise(next(iter(controller.values())), path)
        driver = controller.device
        assert driver.features & Feature.RING_RESET
        for index in range(driver.FIXED_QUEUES + 1):
            driver.transport.reset_queue(index)
            assert driver.transport._common.read(Common.QUEUE_ENABLE) == 0
        if kind == "scsi":
            driver._events.silence()
        for index in range(driver.FIXED_QUEUES):
            driver._set_up_fixed(index)
        driver.leases[:] = [driver._set_up_requests(driver.FIXED_QUEUES)]
        assert len(driver.discover(deadline_in(5))) == 1


@pytest.mark.parametrize("vectors", [None, 1])
def test_a_resized_blk_disk_changes_its_size_under_io(tmp_path, vectors):
    """BLK-5: the interrupt of the configuration, with a vector to itself and shared with the queues."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device("blk", path)) as machine:
        windows = machine.windows(SLOT)
        windows.vectors = vectors
        with attached(machine, "blk", windows=windows) as controller:
            (bdev,) = controller.values()
            events = controller.events()
            with bdev.open(timeout=10) as channel:
                for size in (8 * MIB, 2 * MIB):
                    before = bdev.size
                    machine.qmp("block_resize", {"device": "d0", "size": size})
                    for at in range(20):
                        channel.read(at * 512, 512)
                    assert events.wait(10) == Resized(bdev, before) and bdev.size == size
                with pytest.raises(RequestError, match="do not lie within"):
                    channel.read(4 * MIB, 512)
                channel.write(2 * MIB - 512, b"last one" * 64)
            assert path.read_bytes()[-512:] == b"last one" * 64


@kinds
def test_a_reset_under_verified_load_loses_nothing(tmp_path, kind):
    """RST-1, PCI-10: by the status register, or by task management; each request completes once."""
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path, queues=2)) as machine:
        with attached(machine, kind, queues=2) as controller:
            bdev = next(iter(controller.values()))
            failures, turns, done = [], [0, 0], threading.Event()

            def work(number):
                chance = random.Random(number)
                base, content = number * MIB, bytearray(path.read_bytes()[number * MIB : (number + 1) * MIB])
                try:
                    with bdev.open(timeout=20, wait=("adaptive", "event")[number]) as channel:
                        while not done.is_set():
                            blocks = [chance.randrange(256) for _ in range(64)]
                            into = bytearray(64 * 4096)
                            offsets = array("Q", [base + 4096 * block for block in blocks])
                            channel.read_batch(offsets, 4096, into).raise_for_status()
                            for at, block in enumerate(blocks):
                                want = content[4096 * block : 4096 * (block + 1)]
                                assert into[4096 * at : 4096 * (at + 1)] == want
                            at, data = 4096 * chance.choice(blocks), chance.randbytes(4096)
                            channel.write(base + at, data)
                            content[at : at + 4096] = data
                            turns[number] += 1
                    assert path.read_bytes()[base : base + MIB] == content
                except BaseException as failure:
                    failures.append(failure)

            threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for turn in range(10):
                time.sleep(0.03)
                bdev.reset() if turn % 2 else controller.device.restart()
            done.set()
            for thread in threads:
                thread.join()
            assert failures == [] and all(turns)


@kinds
def test_an_end_of_qemu_ends_requests_and_close_does_not_wait_for_it(tmp_path, kind):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device(kind, path)) as machine, attached(machine, kind) as controller:
        with next(iter(controller.values())).open(timeout=0.5) as channel:
            channel.read(0, 512)
            machine.kill()
            with pytest.raises((RequestTimeout, TransportError)):
                channel.read(0, 512)
        start = time.monotonic()
        controller.close()
        assert time.monotonic() - start < 2


def test_another_device_of_the_vendor_is_told_from_ours(tmp_path):
    arguments = [
        "-device",
        f"virtio-rng-pci,addr={SLOT}",
        "-device",
        "virtio-blk-pci,addr=4,disable-modern=on,",
    ]
    path = image(tmp_path / "disk")
    arguments[-1] += "disable-legacy=off,drive=d0"
    with Machine(QEMU, *drive(path), *arguments) as machine:
        rng = Pci(machine.windows(SLOT))
        assert rng.device_type == 4
        rng.close()
        with pytest.raises(TransportError, match="no usable common configuration structure.*legacy"):
            Pci(machine.windows(4))
        with attached(machine, "blk", slot=4) as controller:
            exercise(next(iter(controller.values())), path)
