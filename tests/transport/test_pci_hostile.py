"""PCI devices that lie: whatever configuration space and registers say, it ends, with an error of ours."""

import random
import time

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tests.leaks import open_fds
from tests.model.pci import PciDevice
from tests.model.pci_legacy import LegacyDevice
from tests.transport.test_pci import ModelWindows
from tests.transport.test_pci_legacy import scsi as legacy_scsi
from virtio.device.blk import BlkDevice
from virtio.device.scsi import ScsiDevice
from virtio.errors import TransportError, VirtioError
from virtio.ring.lease import deadline_in
from virtio.transport.pci import open_pci

LONGEST_S = 3.0
TIMEOUT_S = 0.02


class LyingWindows(ModelWindows):
    """Windows on a model, whose answers are replaced: of the configuration space always by `space`,
    of registers now and then, as `chance` has it."""

    def __init__(self, device, space, seed, lies):
        super().__init__(device, line=True)
        self.name = "0000:00:1f.7"
        self.space = bytearray(device.space)
        for at, value in space.items():
            self.space[at] = value
        self._chance = random.Random(seed)
        self._lies = lies
        self.accesses = 0

    def read_config(self, offset, width):
        return int.from_bytes(self.space[offset : offset + width], "little")

    def write_config(self, offset, width, value):
        self.space[offset : offset + width] = value.to_bytes(width, "little")

    def bar_bytes(self, bar):
        return {0: 128, 4: 0x1000}.get(bar, 0)

    def read(self, bar, offset, width):
        self.accesses += 1
        assert offset >= 0 and offset + width <= self.bar_bytes(bar), "outside of its BAR"
        assert offset % width == 0 and width in (1, 2, 4)
        value = self.device.read(bar, offset, width)
        if self._chance.random() < self._lies:
            value = self._chance.choice([0, 1, 0xFFFFFFFF, self._chance.getrandbits(32), value ^ 1])
        return value & (1 << 8 * width) - 1

    def write(self, bar, offset, width, value):
        self.accesses += 1
        assert offset >= 0 and offset + width <= self.bar_bytes(bar), "outside of its BAR"
        assert offset % width == 0 and 0 <= value < 1 << 8 * width
        self.device.write(bar, offset, width, value)

    def _rearm(self):
        pass


MAKERS = {
    "blk": (lambda: PciDevice(), BlkDevice),
    "transitional": (lambda: PciDevice(device=0x1001), BlkDevice),
    "legacy": (lambda: LegacyDevice(), BlkDevice),
    "legacy scsi": (legacy_scsi, ScsiDevice),
}


def attach(maker, space, seed, lies):
    make, kind = MAKERS[maker]
    windows = LyingWindows(make(), space, seed, lies)
    before = open_fds()
    start = time.monotonic()
    try:
        with kind(open_pci(windows, TIMEOUT_S), pool_bytes=4 << 20, queues=1) as driver:
            driver.discover(deadline_in(TIMEOUT_S))
    except VirtioError:
        pass
    assert windows.closed
    assert open_fds() == before
    assert time.monotonic() - start < LONGEST_S
    assert windows.accesses < 100_000


bytes_of_the_space = st.dictionaries(st.integers(0, 255), st.integers(0, 255), max_size=12)


@pytest.mark.parametrize("maker", MAKERS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bytes_of_the_space, st.integers(0, 1 << 32), st.sampled_from([0.0, 0.01, 0.1, 1.0]))
@example({}, 1, 1.0)
@example(dict.fromkeys(range(256), 0xFF), 1, 0.0)
@example(dict.fromkeys(range(64, 256), 0x09), 1, 0.0)
@example(dict.fromkeys(range(64, 256), 0xFF), 1, 0.0)
@example({0x34: 0xFC}, 1, 0.0)
@example({at: 6 for at in range(0x44, 0x100, 0x10)}, 1, 0.0)
def test_whatever_a_device_says_it_ends_with_an_error_of_ours(maker, space, seed, lies):
    attach(maker, space, seed, lies)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("value", [0, 0xFF], ids=["zeros", "ones"])
def test_a_device_whose_registers_all_read_the_same_is_refused(maker, value):
    make, kind = MAKERS[maker]
    windows = LyingWindows(make(), {}, 1, 0.0)
    windows.read = lambda bar, offset, width: int.from_bytes(bytes([value] * width))
    with pytest.raises(VirtioError):
        kind(open_pci(windows, TIMEOUT_S), pool_bytes=4 << 20, queues=1)
    assert windows.closed


def test_windows_that_fail_are_closed():
    windows = LyingWindows(PciDevice(), {}, 1, 0.0)

    def fail(offset, width):
        raise TransportError(5, "the function is gone")

    windows.read_config = fail
    with pytest.raises(TransportError, match="is gone"):
        open_pci(windows)
    assert windows.closed
