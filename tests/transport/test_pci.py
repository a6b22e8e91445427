"""The PCI transport against a recording register model, which judges every access by its clause."""

import os
import select
import struct
import threading
import time
from array import array

import pytest

from tests.leaks import open_fds
from tests.model import pci as model
from tests.model.pci import Cap, PciDevice
from virtio import control
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import ProtocolError, RequestTimeout, TransportError
from virtio.ring import split
from virtio.ring.doorbell import Doorbell
from virtio.ring.region import Mapping, Region
from virtio.ring.template import Template
from virtio.transport.base import RingAreas, negotiate
from virtio.transport.pci import Pci
from virtio.transport.windows import Line
from virtio.wire.blk import BlkFeature, config_accesses, config_span
from virtio.wire.virtio import Feature, Status

IOVA = 0x7_0000_0000
ALL = (1 << 64) - 1
SCSI_CONFIG = struct.pack("<IIIIIIIHHI", 4, 126, 0xFFFF, 128, 16, 96, 32, 0, 255, 16383)
SCSI_FIELDS = [(at, 4, 0) for at in range(0, 28, 4)] + [(28, 2, 0), (30, 2, 0), (32, 4, 0)]


class ModelWindows:
    """Windows on the model; `vectors` bounds the interrupts, `bars` says which are within reach."""

    name = "0000:00:04.0"

    removal = None

    def __init__(self, device, *, translated=False, vectors=99, bars=(model.BAR,), mapping=None, line=False):
        self.device = device
        self.translated = translated
        self.closed = False
        self.eventfds = []
        self._vectors = vectors
        self._bars = bars
        self._mapping = mapping
        self._has_line = line
        self.rearmed = threading.Event()
        self.rearmed.set()

    def read_config(self, offset, width):
        return self.device.read_config(offset, width)

    def write_config(self, offset, width, value):
        self.device.write_config(offset, width, value)

    def bar_bytes(self, bar):
        return model.BAR_BYTES if bar in self._bars else 0

    def read(self, bar, offset, width):
        assert bar in self._bars
        return self.device.read(bar, offset, width)

    def write(self, bar, offset, width, value):
        assert bar in self._bars
        self.device.write(bar, offset, width, value)

    def doorbell(self, bar, offset, value):
        return Doorbell(call=lambda: self.write(bar, offset, 2, value))

    def region(self, nbytes):
        return Region(nbytes)

    def map(self, region):
        return self._mapping or Mapping.contiguous(IOVA)

    def line(self):
        if not self._has_line:
            return None
        self.eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return Line(self.eventfds[0], self._rearm)

    def raise_line(self, reasons):
        """As the device does: its ISR status says why."""
        assert self.rearmed.is_set()
        self.rearmed.clear()
        self.device.isr |= reasons
        os.eventfd_write(self.eventfds[0], 1)

    def _rearm(self):
        os.eventfd_read(self.eventfds[0])
        assert not self.device.isr, "it would be up again"
        self.rearmed.set()

    def interrupts(self, count):
        for _ in range(min(count, self._vectors)):
            self.eventfds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self.device.msix_enabled = bool(self.eventfds)
        return self.eventfds

    def close(self):
        for fd in self.eventfds:
            os.close(fd)
        self.eventfds = []
        self.closed = True


def bring_up(device, kind=BlkDevice, timeout=1.0, windows=None, **options):
    """A device of ours on the model; rings are large enough for it in a small pool."""
    windows = windows or ModelWindows(device)
    return kind(Pci(windows, timeout), pool_bytes=4 << 20, **options)


def scsi(**changes):
    offered = model.VERSION_1 | 1 << 28 | 1 << 29 | 0b110
    return PciDevice(
        device=0x1048, config=SCSI_CONFIG, fields=SCSI_FIELDS, offered=offered, **{"num_queues": 6} | changes
    )


def kick(lease):
    """Make a request, of which nothing becomes, and notify the device."""
    assert lease.queue.submit(Template(bytes(16)), 0, 0, 0, 0)
    lease.queue.kick()


def readable(fd, seconds=1.0):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


@pytest.fixture(autouse=True)
def nothing_left_open():
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.mark.parametrize("make", [PciDevice, scsi])
@pytest.mark.parametrize("queues", [1, 4])
def test_a_device_is_brought_up_and_taken_down_by_the_rules(make, queues):
    """INI-1 to INI-3, STA-1, PCI-3, PCI-9 to PCI-14, PCI-17, PCI-20, CFG-2: what the model judges."""
    device = make()
    kind = BlkDevice if make is PciDevice else ScsiDevice
    with bring_up(device, kind, queues=queues) as driver:
        for lease in driver.leases:
            kick(lease)
        assert device.notified == [driver.FIXED_QUEUES + index for index in range(queues)]
        enabled = [queue.enabled for queue in device.queues]
        used = driver.FIXED_QUEUES + queues + (driver.spare is not None)
        assert enabled == [index < used for index in range(device.num_queues)]
    assert device.violations == []
    assert device.written("device_status") == [0, 1, 3, 11, 15, 0], "INI-1"


def test_the_driver_reads_features_ok_back_before_it_goes_on():
    """INI-1, INI-4."""
    device = PciDevice(keeps_features_ok=False)
    with pytest.raises(TransportError, match="refuses"):
        bring_up(device)
    assert device.written("device_status") == [0, 1, 3, 11, 139, 0]
    assert device.written("queue_enable") == []
    assert device.violations == []


def test_a_device_without_version_1_is_given_up():
    """FEA-4."""
    device = PciDevice(offered=1 << 28)
    with pytest.raises(TransportError, match="does not offer VERSION_1"):
        bring_up(device)
    assert model.FAILED & device.written("device_status")[-2]
    assert device.violations == []


def test_of_all_feature_bits_only_those_that_make_sense_are_accepted():
    """FEA-1, FEA-3, FEA-5, RFB-1, RFB-3: bit 30 is vhost-user's own, and never accepted here."""
    device = PciDevice(offered=ALL, config=bytes(8) + struct.pack("<II4xI10xH24x", 1 << 20, 1, 512, 4))
    transport = Pci(ModelWindows(device))
    accepted = negotiate(transport, BlkFeature, BlkDevice.WANTED, 0)
    seen = device.accepted
    transport.close()
    rings = Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED | Feature.RING_RESET
    platform = Feature.ACCESS_PLATFORM | Feature.ORDER_PLATFORM | Feature.NOTIF_CONFIG_DATA
    assert accepted == seen == BlkDevice.WANTED | Feature.VERSION_1 | rings | platform
    assert not accepted & (1 << 30 | Feature.SR_IOV | Feature.ADMIN_VQ)
    assert device.violations == []


@pytest.mark.parametrize("offered", [True, False])
@pytest.mark.parametrize("translated", [True, False])
def test_behind_an_iommu_a_device_must_know_of_it(offered, translated):
    """RFB-2: without ACCESS_PLATFORM it would take our addresses for physical ones."""
    device = PciDevice(offered=model.VERSION_1 | (model.ACCESS_PLATFORM if offered else 0))
    windows = ModelWindows(device, translated=translated)
    if translated and not offered:
        with pytest.raises(TransportError, match="does not offer ACCESS_PLATFORM"):
            bring_up(device, windows=windows)
        assert device.written("queue_enable") == []
    else:
        with bring_up(device, windows=windows) as driver:
            assert bool(driver.features & Feature.ACCESS_PLATFORM) == offered
    assert windows.closed
    assert device.violations == []


@pytest.mark.parametrize("reads", [1, 20])
def test_a_reset_is_awaited(reads):
    """PCI-13, RST-1."""
    device = PciDevice(reset_reads=reads)
    with bring_up(device):
        pass
    assert device.violations == []
    resets = [at for at, access in enumerate(device.log) if access[:3] == (True, "device_status", 0)]
    for at in resets:
        polls = [(access.where, access.is_write) for access in device.log[at + 1 : at + 2 + reads]]
        assert polls == [("device_status", False)] * (reads + 1), "PCI-13"


def test_a_reset_that_never_ends_is_given_up():
    """PCI-13: within bounds."""
    device = PciDevice(reset_reads=10**9)
    windows = ModelWindows(device)
    start = time.monotonic()
    with pytest.raises(RequestTimeout, match="status 0 after a reset in 0.05 s"):
        bring_up(device, windows=windows, timeout=0.05)
    assert time.monotonic() - start < 1
    assert windows.closed
    assert device.violations == []


def test_registers_that_read_as_ones_are_a_device_that_is_gone():
    device = PciDevice()
    windows = ModelWindows(device)
    driver = bring_up(device, windows=windows)
    device.gone = True
    with pytest.raises(TransportError, match="is gone"):
        driver.transport.status()
    with pytest.raises(TransportError, match="is gone"):
        driver.life.check()
    start = time.monotonic()
    driver.close()
    assert time.monotonic() - start < 0.5
    assert windows.closed


def test_a_device_that_is_gone_is_not_found():
    with pytest.raises(ProtocolError, match="gone"):
        bring_up(PciDevice(gone=True))


def test_the_rings_are_where_the_device_is_told_they_are():
    """PCI-12: addresses are the device's, not ours."""
    device = PciDevice()
    with bring_up(device, queues=2) as driver:
        for index in range(2):
            desc, avail, used = (device.address(index, area) for area in ("desc", "driver", "device"))
            assert IOVA <= desc < avail < used < IOVA + driver.pool.region.size
            assert (desc % 16, avail % 2, used % 4) == (0, 0, 0), "SPL-1"
            assert device.queues[index].size == 256


def test_a_table_of_pages_is_looked_up():
    size = 4 << 20
    table = array("Q", [0x5_0000_0000 - 0x20_0000 * page for page in range(size >> 21)])
    device = PciDevice()
    with bring_up(device, queues=2, windows=ModelWindows(device, mapping=Mapping(21, table))) as driver:
        assert driver.pool.region.size == size
        assert device.address(0, "desc") == table[0], "the first piece of the pool"
        assert 0 < device.address(1, "desc") - table[0] < 1 << 21, "on the same page"


def test_a_ring_in_pieces_is_refused():
    device = PciDevice(queue_limit=1024)
    table = array("Q", [0x5_0000_0000 - 0x1000 * page for page in range(1024)])
    with pytest.raises(TransportError, match="in pieces"):
        bring_up(device, windows=ModelWindows(device, mapping=Mapping(12, table)), queue_size=1024)
    assert device.violations == []


@pytest.mark.parametrize("limit, size", [(256, 256), (1024, 256), (64, 64), (100, 64), (0xFFFF, 256)])
def test_a_queue_is_as_large_as_the_device_allows_and_a_power_of_two(limit, size):
    """PCI-11."""
    device = PciDevice(queue_limit=limit)
    with bring_up(device) as driver:
        assert driver.queue_size == size
        assert device.queues[0].size == size
    assert device.violations == []


def test_a_queue_that_is_not_there_is_an_error():
    device = PciDevice(queue_limit=0)
    with pytest.raises(TransportError, match="has no queue 0"):
        bring_up(device)
    assert device.violations == []


@pytest.mark.parametrize("multiplier, offs", [(4, None), (0, None), (2, [3, 1, 0, 2]), (256, [3, 1, 0, 2])])
def test_each_queue_is_notified_at_its_own_place(multiplier, offs):
    """PCI-21, PCI-22."""
    device = PciDevice(notify_multiplier=multiplier, notify_offs=offs)
    with bring_up(device, queues=4) as driver:
        for lease in reversed(driver.leases):
            kick(lease)
    assert device.notified == [3, 2, 1, 0]
    assert device.violations == []


def test_with_notif_config_data_that_is_what_is_written():
    """PCI-22, RFB-3."""
    device = PciDevice(offered=PciDevice.offered | model.NOTIF_CONFIG_DATA)
    with bring_up(device, queues=4) as driver:
        for lease in driver.leases:
            kick(lease)
    assert device.notified == [0, 1, 2, 3]
    assert device.violations == []


@pytest.mark.parametrize("offs", [[0x400, 0, 0, 0], [255, 256, 0, 0]])
def test_a_place_outside_of_the_notification_structure_is_refused(offs):
    device = PciDevice(notify_offs=offs)
    with pytest.raises(TransportError, match="notified at"):
        bring_up(device, queues=2)
    assert device.violations == []


@pytest.mark.parametrize("length, bits", [(56, 0), (58, model.NOTIF_CONFIG_DATA), (64, ALL)])
def test_registers_that_a_shorter_structure_lacks_are_done_without(length, bits):
    caps = PciDevice().default_caps()
    caps[0] = caps[0]._replace(length=length)
    device = PciDevice(offered=PciDevice.offered | model.NOTIF_CONFIG_DATA, caps=caps)
    with bring_up(device) as driver:
        both = model.NOTIF_CONFIG_DATA | model.RING_RESET
        assert driver.features & both == both & bits
    assert device.violations == []


# Interrupts.


def test_each_queue_has_a_vector_of_its_own():
    """PCI-20."""
    device = scsi(vectors=16)
    windows = ModelWindows(device)
    with bring_up(device, ScsiDevice, windows=windows, queues=4) as driver:
        assert [queue.vector for queue in device.queues] == [1, 2, 3, 4, 5, 6]
        assert device.written("config_msix_vector") == [0]
        assert [lease.completion_fd for lease in driver.leases] == windows.eventfds[3:7]
        assert len(windows.eventfds) == 7
    assert device.violations == []


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_where_the_table_is_small_queues_share_vector_0(vectors):
    """PCI-20, PCI-23."""
    device = PciDevice(vectors=vectors)
    windows = ModelWindows(device)
    with bring_up(device, windows=windows, queues=4) as driver:
        assert [q.vector for q in device.queues] == [i + 1 if i + 1 < vectors else 0 for i in range(4)]
        shared = [lease.completion_fd for lease in driver.leases][vectors - 1 :]
        assert not any(readable(fd, 0) for fd in shared)
        os.eventfd_write(windows.eventfds[0], 1)
        assert all(readable(fd) for fd in shared)
        own = [lease.completion_fd for lease in driver.leases][: vectors - 1]
        assert own == windows.eventfds[1:vectors]
        assert not any(readable(fd, 0) for fd in own)
    assert device.violations == []


def test_a_vector_that_the_device_refuses_is_replaced():
    """PCI-20: NO_VECTOR is read back."""
    device = PciDevice(refused_vectors=frozenset({2, 4}))
    windows = ModelWindows(device)
    with bring_up(device, windows=windows, queues=4) as driver:
        assert [queue.vector for queue in device.queues] == [1, 0, 3, 0]
        os.eventfd_write(windows.eventfds[0], 1)
        assert readable(driver.leases[1].completion_fd)
        assert readable(driver.leases[3].completion_fd)
    assert device.violations == []


@pytest.mark.parametrize(
    "options, vectors",
    [({"vectors": 0}, 99), ({"refused_vectors": frozenset(range(5))}, 99), ({}, 0)],
    ids=["no MSI-X", "all refused", "none provided"],
)
def test_without_interrupts_who_would_sleep_spins(options, vectors):
    """PCI-20."""
    device = PciDevice(**options)
    with bring_up(device, windows=ModelWindows(device, vectors=vectors), queues=2) as driver:
        assert [queue.vector for queue in device.queues] == [model.NO_VECTOR] * 4
        for lease in driver.leases:
            for _ in range(3):
                assert readable(lease.completion_fd, 0)
                os.eventfd_read(lease.completion_fd)
    assert device.violations == []


def test_where_there_is_no_msix_all_queues_share_the_line():
    """PCI-23: the ISR status says why it is up, and it is unmasked only after that."""
    device = PciDevice(vectors=0)
    windows = ModelWindows(device, line=True)
    with bring_up(device, windows=windows, queues=4) as driver:
        changed = []
        driver.transport.on_config_change = lambda: changed.append(device.generation)
        fds = [lease.completion_fd for lease in driver.leases]
        for reasons in (1, 0, 3, 2):  # 0: somebody else's, on the same line
            assert not any(readable(fd, 0) for fd in fds)
            device.generation += reasons >> 1
            windows.raise_line(reasons)
            assert windows.rearmed.wait(1)
            if reasons & 1:
                assert all(readable(fd) for fd in fds)
                for fd in fds:
                    os.eventfd_read(fd)
            assert device.isr == 0
        assert set(changed) == {1, 2}, "and maybe more than once: nobody has read it anew"
    assert device.violations == []
    assert [queue.vector for queue in device.queues] == [model.NO_VECTOR] * 4


def test_a_line_that_nobody_can_lower_is_not_asked_for():
    caps = [cap for cap in PciDevice().default_caps() if cap.cfg_type != 3]
    device = PciDevice(vectors=0, caps=caps)
    with bring_up(device, windows=ModelWindows(device, line=True)) as driver:
        assert readable(driver.leases[0].completion_fd, 0), "it is polled"
    assert device.violations == []


def test_a_device_that_goes_takes_its_line_along():
    device = PciDevice(vectors=0)
    windows = ModelWindows(device, line=True)
    with bring_up(device, windows=windows) as driver:
        device.gone = True
        windows.rearmed.clear()
        os.eventfd_write(windows.eventfds[0], 1)  # which stays up
        assert readable(driver.life.fd)
        with pytest.raises(TransportError, match="is gone: its status reads ff"):
            driver.life.check()


@pytest.mark.parametrize("status, said", [(0xFF, "is gone: its status reads ff"), (0, "reads 00")])
def test_a_device_that_goes_is_missed(status, said):
    """Nothing tells of it but its registers, which are looked at now and then."""
    device = PciDevice()
    with bring_up(device) as driver:
        device._status = status
        assert readable(driver.life.fd)
        with pytest.raises(TransportError, match=said):
            driver.life.check()


def test_a_device_that_needs_a_reset_is_given_up():
    """STA-3."""
    device = PciDevice()
    windows = ModelWindows(device)
    with bring_up(device, windows=windows) as driver:
        device._status |= model.NEEDS_RESET
        os.eventfd_write(windows.eventfds[0], 1)
        assert readable(driver.life.fd)
        with pytest.raises(TransportError, match="needs a reset"):
            driver.life.check()
    assert device.written("device_status")[-1] == 0


def test_a_configuration_interrupt_alone_changes_nothing():
    """PCI-17, PCI-23."""
    device = PciDevice()
    windows = ModelWindows(device)
    with bring_up(device, windows=windows) as driver:
        os.eventfd_write(windows.eventfds[0], 1)
        deadline = time.monotonic() + 1
        while readable(windows.eventfds[0], 0):
            assert time.monotonic() < deadline
        driver.life.check()
    assert control._loop is None or windows.eventfds == []
    assert device.violations == []


# Configuration space.


def test_the_configuration_is_of_one_moment():
    """CFG-1."""
    device = PciDevice(flips=3)
    with bring_up(device) as driver:
        assert driver.config.capacity == 32768 ^ 0xFF, "an odd number of changes, and all of the last"
    assert device.violations == []


def test_a_configuration_that_never_holds_still_is_given_up():
    """CFG-1."""
    device = PciDevice(flips=10**9)
    with pytest.raises(ProtocolError, match="changed its configuration 100 times"):
        bring_up(device)


@pytest.mark.parametrize("extra", [0, 100])
def test_a_longer_configuration_is_accepted_and_a_shorter_one_is_not(extra):
    """CFG-3."""
    device = PciDevice()
    device = PciDevice(config=device.config + bytes(extra))
    with bring_up(device) as driver:
        assert driver.config.capacity == 32768
    short = PciDevice(config=device.config[:35])
    with pytest.raises(ProtocolError, match="35 bytes of device configuration, want 36"):
        bring_up(short)
    assert device.violations == short.violations == []


def test_no_device_configuration_is_an_error_where_it_is_needed():
    caps = [cap for cap in PciDevice().default_caps() if cap.cfg_type != 4]
    with pytest.raises(TransportError, match="no device configuration"):
        bring_up(PciDevice(caps=caps))


def test_fields_are_read_by_their_widths_and_only_if_their_feature_was_accepted():
    """PCI-3, CFG-2: the model judges it."""
    for offered in (model.VERSION_1, PciDevice.offered | 1 << 6, PciDevice.offered | 0x46):
        device = PciDevice(offered=offered)
        with bring_up(device):
            pass
        reads = [access.where for access in device.log if access.where.startswith("device+")]
        own = offered & BlkDevice.WANTED
        assert len(reads) == 1 + len(config_accesses(own))  # the capacity takes two
        assert config_span(own) <= len(device.config)
        assert device.violations == []


# Capabilities.


def moved(**changes):
    """The usual capabilities, the common configuration's with changes."""
    caps = PciDevice().default_caps()
    return [caps[0]._replace(**changes), *caps[1:]]


@pytest.mark.parametrize(
    "bad",
    [
        {"bar": 2},  # nobody's
        {"bar": 6},  # reserved
        {"offset": model.BAR_BYTES},
        {"offset": model.BAR_BYTES - 8},
        {"offset": 0xFFFFFFFC, "length": 0xFFFFFFFF},
        {"offset": 2},
        {"length": 55},
        {"length": 0},
        {"cfg_type": 77},
    ],
    ids=str,
)
def test_the_first_usable_common_configuration_is_taken(bad):
    """PCI-4, PCI-5, PCI-7."""
    caps = moved(**bad)
    device = PciDevice(caps=[c for c in caps if c.cfg_type != 5])
    with pytest.raises(TransportError, match="no usable common configuration structure"):
        bring_up(device)
    good = PciDevice().default_caps()[0]
    device = PciDevice(caps=[*[c for c in caps if c.cfg_type != 5], good])
    with bring_up(device):
        pass
    assert device.violations == []


def test_the_first_of_two_is_taken():
    """PCI-5."""
    second = Cap(1, model.BAR, 0x800, 64)  # where the model has something else
    device = PciDevice(caps=[*PciDevice().default_caps(), second])
    with bring_up(device):
        pass
    assert device.violations == []


@pytest.mark.parametrize("length", [0x2000, 0xFFFFFFFF])
def test_unexpectedly_large_structures_are_handled(length):
    """PCI-8."""
    device = PciDevice(caps=[cap._replace(length=length) for cap in PciDevice().default_caps()])
    with bring_up(device):
        pass
    assert device.violations == []


def test_a_device_without_a_notification_structure_is_none_for_us():
    caps = [cap for cap in PciDevice().default_caps() if cap.cfg_type != 2]
    with pytest.raises(TransportError, match="no usable notification structure"):
        bring_up(PciDevice(caps=caps))


@pytest.mark.parametrize("device_id, hint", [(0x1001, "legacy"), (0x1042, "structure$")])
def test_a_legacy_device_is_told_from_a_broken_one(device_id, hint):
    with pytest.raises(TransportError, match=hint):
        bring_up(PciDevice(device=device_id, caps=[]))


def test_what_is_no_virtio_device_is_named():
    """PCI-1."""
    with pytest.raises(TransportError, match="8086:100e, no virtio device"):
        bring_up(PciDevice(vendor=0x8086, device=0x100E))


@pytest.mark.parametrize("device_id, kind", [(0x1001, 2), (0x1042, 2), (0x1004, 8), (0x1048, 8)])
def test_the_type_comes_from_the_device(device_id, kind):
    """PCI-1."""
    transport = Pci(ModelWindows(PciDevice(device=device_id)))
    assert transport.device_type == kind
    transport.close()


def test_without_access_to_bars_registers_are_reached_through_configuration_space():
    """PCI-9, PCI-19."""
    device = PciDevice()
    with bring_up(device, windows=ModelWindows(device, bars=())) as driver:
        kick(driver.leases[0])
        assert device.notified == [0]
    assert device.violations == []


# Queues one by one.


def test_a_queue_reset_is_awaited_and_the_queue_set_up_as_at_first():
    """PCI-15, VQR-1, VQR-2."""
    device = PciDevice(queue_reset_reads=5)
    with bring_up(device) as driver:
        first = dict(device.queues[0].set_up)
        at = device.address(0, "desc") - IOVA
        available, used, _ = split.areas(256)
        areas = RingAreas(driver._region, 256, at, at + available, at + used)
        driver.transport.reset_queue(0)
        assert not device.queues[0].enabled
        port = driver.transport.setup_queue(0, areas, 0)
        assert device.queues[0].set_up == first
        assert port.completion_fd == driver.leases[0].completion_fd
    assert device.violations == []
    assert device.written("queue_reset") == [1]


def test_a_queue_reset_that_never_ends_is_given_up():
    """PCI-15."""
    device = PciDevice(queue_reset_reads=10**9)
    with bring_up(device, timeout=0.05) as driver:
        with pytest.raises(RequestTimeout, match="reset queue 0"):
            driver.transport.reset_queue(0)
    assert device.violations == []


def test_a_larger_queue_than_the_device_has_is_refused():
    """PCI-11."""
    device = PciDevice(queue_limit=64)
    transport = Pci(ModelWindows(device))
    negotiate(transport, BlkFeature, 0, 0)
    region = transport.region(4096)
    transport.map(region)
    with pytest.raises(TransportError, match="no queue 1 of 128: its limit is 64"):
        transport.setup_queue(1, RingAreas(region, 128, 0, 4096, 8192), 0)
    with pytest.raises(ValueError, match="begins at 0"):
        transport.setup_queue(1, RingAreas(region, 64, 0, 4096, 8192), 7)
    transport.close()
    region.close()
    assert device.written("queue_enable") == []
    assert device.violations == []


def test_a_device_can_be_started_again_after_a_stop():
    """STA-2: the vectors are named anew, since a reset forgets them."""
    device = PciDevice()
    windows = ModelWindows(device)
    transport = Pci(windows)
    region = transport.region(1 << 16)
    for _ in range(2):
        negotiate(transport, BlkFeature, 0, 0)
        transport.map(region)
        transport.setup_queue(0, RingAreas(region, 64, 0, 1024, 2048), 0)
        transport.start()
        assert (device._config_vector, device.queues[0].vector) == (0, 1)
        assert transport.status() == Status(15)
        transport.stop()
        assert transport.status() == 0
    transport.close()
    transport.close()
    region.close()
    assert device.violations == []
    assert len(device.written("device_status")) == 2 * 6
