"""The legacy interface of PCI against a recording register model, which judges every access."""

import os
import struct
import time
from array import array

import pytest

from tests.leaks import open_fds
from tests.model import pci as modern
from tests.model.pci_legacy import ANY_LAYOUT, LegacyDevice
from tests.transport.test_pci import IOVA, ModelWindows, kick, readable
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import ProtocolError, RequestTimeout, TransportError
from virtio.ring import split
from virtio.ring.codes import FROM_DEVICE, TO_DEVICE
from virtio.ring.region import Mapping
from virtio.ring.template import Template
from virtio.transport.base import RingAreas
from virtio.transport.pci import Pci, open_pci
from virtio.transport.pci_legacy import LegacyPci
from virtio.wire.virtio import Feature

SCSI_CONFIG = struct.pack("<IIIIIIIHHI", 1, 126, 0xFFFF, 128, 16, 96, 32, 0, 255, 16383)
SCSI_FIELDS = (*((at, 4, 0) for at in range(0, 28, 4)), (28, 2, 0), (30, 2, 0), (32, 4, 0))


class LegacyWindows(ModelWindows):
    """Windows on the model, whose BAR 0 is of ports."""

    def __init__(self, device, **options):
        super().__init__(device, bars=(0,), **options)

    def bar_bytes(self, bar):
        return self.device.bar_bytes if bar in self._bars else 0


def bring_up(device, kind=BlkDevice, timeout=1.0, windows=None, **options):
    transport = open_pci(windows or LegacyWindows(device), timeout)
    assert transport.legacy
    return kind(transport, pool_bytes=4 << 20, **options)


def scsi(**changes):
    offered = ANY_LAYOUT | 1 << 28 | 0b110
    options = {"sizes": (128, 64, 256), "vectors": 4} | changes
    return LegacyDevice(device=0x1004, config=SCSI_CONFIG, fields=SCSI_FIELDS, offered=offered, **options)


@pytest.fixture(autouse=True)
def nothing_left_open():
    before = open_fds()
    yield
    assert open_fds() == before


def test_a_device_is_brought_up_and_taken_down_by_the_rules():
    """INI-1, STA-1, FEA-1, PCI-3, PCI-13, PCI-20: as far as they were rules before version 1."""
    device = LegacyDevice()
    with bring_up(device, queues=2) as driver:
        for lease in driver.leases:
            kick(lease)
        assert device.notified == [0, 1]
        assert [queue.vector for queue in device.queues] == [1, 2]
        assert driver.features == device.accepted == device.offered
        assert driver.config.capacity == 32768 and driver.num_queues == 2
    assert device.violations == []
    assert device.written("device_status") == [0, 1, 3, 7, 0], "no FEATURES_OK"


def test_each_queue_has_the_size_that_the_device_wants():
    device = scsi()
    with bring_up(device, ScsiDevice, queues=1, queue_size=32) as driver:
        assert [queue.ring.size for queue in driver._queues] == [128, 256]
        assert driver._events._ring.size == 64
    assert device.violations == []


@pytest.mark.parametrize("offered", [0, ANY_LAYOUT, (1 << 32) - 1], ids=hex)
def test_what_is_accepted_makes_sense(offered):
    """FEA-3, FEA-4: bits 24, 26 and 30 never, and there is no VERSION_1 to miss."""
    device = LegacyDevice(offered=offered & ~(1 << 13 | 1 << 14), fields=tuple(ALL_FIELDS))
    with bring_up(device, queues=1) as driver:
        assert not driver.features & ~offered
        assert not driver.features & (1 << 24 | 1 << 26 | 1 << 30)
        assert bool(driver.features & Feature.ANY_LAYOUT) == bool(offered & ANY_LAYOUT)
    assert device.violations == []


ALL_FIELDS = [(0, 8, 0), (8, 4, 2), (12, 4, 4), (20, 4, 1 << 6), (24, 1, 1 << 10), (25, 1, 1 << 10)]
ALL_FIELDS += [(26, 2, 1 << 10), (28, 4, 1 << 10), (34, 2, 1 << 12)]


def test_the_ring_is_where_a_legacy_device_looks_for_it():
    """SPL-1: the used ring begins with the next page of 4096 bytes (2.7.2)."""
    device = LegacyDevice()
    with bring_up(device, queues=2) as driver:
        for number, (lease, queue) in enumerate(zip(driver.leases, device.queues, strict=True)):
            kick(lease)
            at = queue.address * 4096 - IOVA
            assert at % 4096 == 0
            view = driver._region.view[at : at + 3 * 4096]
            available = 16 * 128
            assert struct.unpack_from("<HH", view, available)[1] == 1, "avail.idx"
            head = struct.unpack_from("<H", view, available + 4)[0]
            assert head < 128
            struct.pack_into("<HHII", view, 4096, 0, 1, head, 0)  # used: flags, idx, id, len
            assert len(lease.queue.poll()) == 1, number
    assert device.violations == []


@pytest.mark.parametrize("size, used, end", [(128, 4096, 8192), (256, 8192, 12288), (1024, 20480, 32768)])
def test_the_areas_of_a_legacy_ring(size, used, end):
    """SPL-1: vring_size by hand: 16 n + 2 (3 + n) bytes, rounded up to 4096, and 6 + 8 n, rounded up."""
    assert split.areas(size, split.LEGACY_ALIGN) == (16 * size, used, end)


@pytest.mark.parametrize("indirect", [True, False])
@pytest.mark.parametrize("template", [Template(bytes(16), direction=d) for d in (FROM_DEVICE, TO_DEVICE)])
def test_headers_and_status_bytes_have_descriptors_of_their_own(template, indirect):
    """Without ANY_LAYOUT a device wants 16 bytes, data in whole sectors, and one byte (2.7.4.3, 5.2.6)."""
    device = LegacyDevice(offered=1 << 12 | (1 << 28 if indirect else 0))
    with bring_up(device, queues=1) as driver, driver.pool.take(1024) as data:
        driver.leases[0].queue.submit(template, 0, 1024, data.offset, 0)
        at = device.queues[0].address * 4096 - IOVA
        view = driver._region.view
        if indirect:
            table, length = struct.unpack_from("<QI", view, at)
            at, count = table - IOVA, length // 16
        else:
            count = 3
        lengths = [struct.unpack_from("<QI", view, at + 16 * i)[1] for i in range(count)]
        assert lengths == [16, 1024, 1]
        driver.leases[0].queue.kick()


@pytest.mark.parametrize("vectors", [0, 1, 3])
def test_the_configuration_moves_with_the_vectors(vectors):
    """It is at 20, or after the vectors at 24 while MSI-X is on (4.1.4.10)."""
    device = LegacyDevice(vectors=vectors)
    changes = []
    with bring_up(device, queues=2) as driver:
        driver.transport.on_config_change = lambda: changes.append(time.monotonic())
        assert driver.config.capacity == 32768
        assert device.msix_enabled == bool(vectors)
        device.config = struct.pack("<Q", 7) + device.config[8:]
        assert driver._read_config().capacity == 7
        assert [queue.vector for queue in device.queues] == {
            0: [0xFFFF, 0xFFFF],
            1: [0, 0],
            3: [1, 2],
        }[vectors]
    assert device.violations == []


def test_a_vector_that_the_device_refuses_is_replaced():
    """PCI-20."""
    device = LegacyDevice(refused_vectors=frozenset({2}))
    windows = LegacyWindows(device)
    with bring_up(device, windows=windows, queues=2) as driver:
        assert [queue.vector for queue in device.queues] == [1, 0]
        os.eventfd_write(windows.eventfds[0], 1)
        assert readable(driver.leases[1].completion_fd)
    assert device.violations == []


def test_a_change_of_the_configuration_is_seen_by_looking():
    """BLK-5: there is no generation, so what was read is compared."""
    device = LegacyDevice()
    windows = LegacyWindows(device)
    with bring_up(device, windows=windows) as driver:
        changed = os.eventfd(0)
        driver.transport.on_config_change = lambda: os.eventfd_write(changed, 1)
        os.eventfd_write(windows.eventfds[0], 1)
        assert not readable(changed, 0.4), "an interrupt, and some looks, at what is as it was"
        device.config = struct.pack("<Q", 7) + device.config[8:]
        os.eventfd_write(windows.eventfds[0], 1)
        assert readable(changed)
        os.close(changed)
    assert device.violations == []


def test_the_line_says_why_it_is_up_and_is_unmasked_after_that():
    """PCI-23."""
    device = LegacyDevice(vectors=0)
    windows = LegacyWindows(device, line=True)
    with bring_up(device, windows=windows, queues=2) as driver:
        fds = [lease.completion_fd for lease in driver.leases]
        assert not any(readable(fd, 0) for fd in fds)
        windows.raise_line(1)
        assert all(readable(fd) for fd in fds)
        assert windows.rearmed.wait(1) and device.isr == 0
    assert device.violations == []


def test_a_configuration_that_never_holds_still_is_given_up():
    """CFG-1."""
    device = LegacyDevice(flips=3)
    with bring_up(device) as driver:
        assert driver.config.capacity == 32768 ^ 0xFF
    with pytest.raises(ProtocolError, match="changed its configuration 100 times"):
        bring_up(LegacyDevice(flips=10**9))


def test_a_shorter_configuration_is_refused():
    """CFG-3."""

    class Short(LegacyDevice):
        bar_bytes = 28

    with pytest.raises(ProtocolError, match="8 bytes of device configuration, want 36"):
        bring_up(Short())


def test_behind_an_iommu_it_is_refused():
    """RFB-2: it would use physical addresses past it."""
    device = LegacyDevice()
    windows = LegacyWindows(device, translated=True)
    with pytest.raises(TransportError, match=r"legacy interface alone.*IOMMU.*uio_pci_generic"):
        open_pci(windows)
    assert windows.closed and device.log == []


@pytest.mark.parametrize("size", [100, 3, 0xFFFF])
def test_a_size_that_cannot_be_is_the_devices_fault(size):
    device = LegacyDevice(sizes=(size, 128))
    with pytest.raises(ProtocolError, match=f"queue 0 of {size}, want a power of two"):
        bring_up(device)
    assert device.violations == []


def test_a_queue_that_is_not_there_is_an_error():
    with pytest.raises(TransportError, match="has no queue 0"):
        bring_up(LegacyDevice(sizes=(0,)))


def test_a_ring_of_another_size_or_form_is_refused():
    device = LegacyDevice()
    transport = open_pci(LegacyWindows(device))
    region = transport.region(1 << 20)
    transport.map(region)
    with pytest.raises(TransportError, match="no queue 0 of 64: it has 128"):
        transport.setup_queue(0, RingAreas(region, 64, 0, 1024, 4096), 0)
    with pytest.raises(ValueError, match="not those of a legacy ring"):
        transport.setup_queue(0, RingAreas(region, 128, 0, 2048, 2368), 0)
    with pytest.raises(ValueError, match="begins at 0"):
        transport.setup_queue(0, RingAreas(region, 128, 0, 2048, 4096), 5)
    device.queues[0].address = 77
    with pytest.raises(ProtocolError, match="in use before"):
        transport.setup_queue(0, RingAreas(region, 128, 0, 2048, 4096), 0)
    transport.close()
    region.close()
    assert device.written("queue_address") == []


def test_a_ring_beyond_what_the_register_holds_is_refused():
    device = LegacyDevice()
    far = Mapping.contiguous(1 << 44)
    with pytest.raises(TransportError, match="0x100000000000, want a page of 4096 below"):
        bring_up(device, windows=LegacyWindows(device, mapping=far))


def test_a_ring_in_pieces_is_refused():
    """The device knows the first page, and takes the next as what follows."""
    device = LegacyDevice()
    table = array("Q", [0x5000_0000 - 0x1000 * page for page in range(1024)])
    with pytest.raises(TransportError, match="in pieces"):
        bring_up(device, windows=LegacyWindows(device, mapping=Mapping(12, table)))
    assert device.written("queue_address") == []


def test_a_reset_is_awaited_within_bounds():
    """PCI-13, RST-1."""
    device = LegacyDevice(reset_reads=5)
    with bring_up(device):
        pass
    assert device.violations == []
    with pytest.raises(RequestTimeout, match="status 0 after a reset"):
        bring_up(LegacyDevice(reset_reads=10**9), timeout=0.05)


def test_registers_that_read_as_ones_are_a_device_that_is_gone():
    device = LegacyDevice()
    with bring_up(device) as driver:
        device.gone = True
        assert readable(driver.life.fd)
        with pytest.raises(TransportError, match="is gone: its status reads ff"):
            driver.life.check()


def test_a_device_can_be_started_again():
    device = LegacyDevice()
    with bring_up(device, queues=2) as driver:
        driver.restart()
        for lease in driver.leases:
            kick(lease)
        assert device.notified == [0, 1]
    assert device.violations == []
    assert device.written("device_status") == [0, 1, 3, 7, 0, 0, 1, 3, 7, 0]


@pytest.mark.parametrize(
    "options, bars",
    [({"ports": False}, (0,)), ({}, ()), ({"device": 0x1042}, (0,))],
    ids=["memory", "out of reach", "not transitional"],
)
def test_what_has_neither_interface_is_none_for_us(options, bars):
    device = LegacyDevice(**options)
    windows = LegacyWindows(device)
    windows._bars = bars
    with pytest.raises(TransportError, match="no usable common configuration"):
        open_pci(windows)
    assert windows.closed
    windows = LegacyWindows(device)
    windows._bars = bars
    with pytest.raises(TransportError, match="no legacy interface"):
        LegacyPci(windows)
    assert windows.closed and device.log == []


def test_a_transitional_device_is_driven_by_its_modern_interface():
    """PCI-1."""
    transport = open_pci(ModelWindows(modern.PciDevice(device=0x1001)))
    assert isinstance(transport, Pci)
    transport.close()
    transport = open_pci(LegacyWindows(LegacyDevice()))
    assert isinstance(transport, LegacyPci) and transport.device_type == 2
    transport.close()
