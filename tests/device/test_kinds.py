"""Which kind of device it is: feature bits in, a word out."""

import pytest

from virtio.device.kinds import looks_like
from virtio.wire.blk import BlkFeature
from virtio.wire.virtio import Feature
from virtio.wire.virtio_scsi import ScsiFeature


@pytest.mark.parametrize(
    "own, kind",
    [
        (BlkFeature.SEG_MAX | BlkFeature.FLUSH, "blk"),
        (BlkFeature.RO, "blk"),
        (ScsiFeature.HOTPLUG | ScsiFeature.CHANGE, "scsi"),
        (ScsiFeature.INOUT, "scsi"),
        (0, ""),
    ],
)
def test_the_bits_of_the_device_type_tell_the_kind_and_no_others_do(own, kind):
    assert looks_like(own | Feature.VERSION_1 | Feature.INDIRECT_DESC | 1 << 30) == kind
