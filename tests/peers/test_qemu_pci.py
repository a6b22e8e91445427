"""QEMU's own virtio-blk-pci and virtio-scsi-pci, driven through qtest; what landed is read from the files."""

import os
import random
import threading
import time
from contextlib import contextmanager

import pytest

from tests import needs
from tests.leaks import open_fds
from tests.peers.qtest import Machine, QtestWindows
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import NoQueueError, ReadOnlyError, RequestTimeout, TransportError
from virtio.ring.lease import deadline_in
from virtio.transport.pci import Pci
from virtio.wire.pci import Common
from virtio.wire.virtio import Feature
from virtio_bdev import Controller

QEMU = needs.program("qemu-system-x86_64")

MIB = 1 << 20
SLOT = 3
DEVICES = {"blk": BlkDevice, "scsi": ScsiDevice}

VARIANTS = {
    "modern": "disable-legacy=on",
    "transitional": "disable-legacy=off",
    "event_idx=off": "disable-legacy=on,event_idx=off",
    "indirect_desc=off": "disable-legacy=on,indirect_desc=off",
    "neither": "disable-legacy=off,event_idx=off,indirect_desc=off",
    "iommu_platform": "disable-legacy=on,iommu_platform=on",
    "port notify": "disable-legacy=on,modern-pio-notify=on",
    "packed offered": "disable-legacy=on,packed=on",
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
    transport = Pci(windows or machine.windows(slot))
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
            assert not features & Feature.RING_PACKED
            bdevs = list(controller.values())
            assert len(bdevs) == 1
            assert len(controller.device.leases) == queues
            exercise(bdevs[0], path)
            exercise(bdevs[0], path, wait="event")
            exercise(bdevs[0], path, wait="poll")
    after = open_fds()
    assert after == before


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
                for at in range(50):
                    channel.read(at * 512, 512)
                gained = [after - old for after, old in zip(windows.counts, before, strict=True)]
        assert gained.pop(first + number) >= 40
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
    blocks = path.stat().st_blocks
    with Machine(QEMU, *device(kind, path)) as machine, attached(machine, kind) as controller:
        with next(iter(controller.values())).open() as channel:
            channel.unmap(MIB, MIB)
            channel.write_zeroes(0, 64 << 10)
            assert channel.read(0, 64 << 10) == bytes(64 << 10)
    assert path.read_bytes()[: 64 << 10] == bytes(64 << 10)
    assert path.stat().st_blocks <= blocks - MIB // 512


def test_units_of_several_targets_are_found_and_a_cd_rom_is_listed_but_not_attached(tmp_path):
    units = {  # target, LUN: blocks of
        (0, 0): 512,
        (0, 1): 512,
        (0, 7): 4096,
        (3, 0): 512,
        (3, 300): 512,
        (9, 2): 512,
        (255, 0): 512,
    }
    arguments = ["-device", f"virtio-scsi-pci,addr={SLOT},id=s0,num_queues=2,disable-legacy=on"]
    paths = {}
    for number, ((target, lun), block) in enumerate(units.items()):
        paths[target, lun] = image(tmp_path / f"disk{number}", (1 + number) * MIB, seed=number)
        arguments += drive(paths[target, lun], f"d{number}")
        where = f"bus=s0.0,drive=d{number},scsi-id={target},lun={lun},serial=S{number}"
        sizes = f"logical_block_size={block},physical_block_size={block}"
        arguments += ["-device", f"scsi-hd,{where},{sizes}"]
    arguments += drive(image(tmp_path / "cd"), "cd", ",media=cdrom,readonly=on")
    arguments += ["-device", "scsi-cd,bus=s0.0,drive=cd,scsi-id=5,lun=0"]
    huge = tmp_path / "huge"
    huge.touch()
    os.truncate(huge, 3 << 40)
    arguments += drive(huge, "huge")
    arguments += ["-device", "scsi-hd,bus=s0.0,drive=huge,scsi-id=6,lun=0"]
    with Machine(QEMU, *arguments) as machine, attached(machine, "scsi", queues=2) as controller:
        assert controller.device.units[5, 0].problem
        found = {bdev.disk.place: bdev for bdev in controller.values()}
        want = {f"t{target}" + (f"l{lun}" if lun else "") for target, lun in units} | {"t6"}
        assert set(found) == want
        for number, ((target, lun), path) in enumerate(paths.items()):
            bdev = found[f"t{target}" + (f"l{lun}" if lun else "")]
            assert (bdev.block_size, bdev.size) == (units[target, lun], (1 + number) * MIB)
            assert bdev.disk.serial == f"S{number}"
            exercise(bdev, path, seed=number)
        with found["t6"].open() as channel:
            assert found["t6"].size == 3 << 40
            channel.write((2 << 40) + 4096, b"beyond!!" * 64)  # past 2^32 blocks of 512
    with open(huge, "rb") as file:
        file.seek((2 << 40) + 4096)
        assert file.read(512) == b"beyond!!" * 64


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
        for index in range(driver.FIXED_QUEUES):
            driver._set_up_fixed(index)
        driver.leases[:] = [driver._set_up_requests(driver.FIXED_QUEUES)]
        assert len(driver.discover(deadline_in(5))) == 1


def test_a_resized_disk_interrupts_for_its_configuration(tmp_path):
    path = image(tmp_path / "disk")
    with Machine(QEMU, *device("blk", path)) as machine:
        windows = machine.windows(SLOT)
        with attached(machine, "blk", windows=windows) as controller:
            machine.qmp("block_resize", {"device": "d0", "size": 8 * MIB})
            deadline = time.monotonic() + 5
            while not windows.counts[0]:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            controller.device._configure()  # the register's new generation does no harm
            assert controller.device.config.capacity == 8 * MIB // 512


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
