"""Status, features and their names."""

import enum

from hypothesis import given, strategies as st

from virtio.wire.blk import BlkFeature
from virtio.wire.virtio import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DeviceType,
    Feature,
    Status,
    config_fields,
    feature_names,
)
from virtio.wire.virtio_scsi import ScsiFeature


def test_status_bits_are_those_of_the_specification():
    assert [(bit.name, bit.value) for bit in Status] == [
        ("ACKNOWLEDGE", 0x01),
        ("DRIVER", 0x02),
        ("DRIVER_OK", 0x04),
        ("FEATURES_OK", 0x08),
        ("SUSPEND", 0x10),
        ("DEVICE_NEEDS_RESET", 0x40),
        ("FAILED", 0x80),
    ]


def test_common_features_have_the_bits_of_the_specification():
    assert {bit.name: bit.value.bit_length() - 1 for bit in Feature} == {
        "NOTIFY_ON_EMPTY": 24,
        "ANY_LAYOUT": 27,
        "INDIRECT_DESC": 28,
        "EVENT_IDX": 29,
        "VERSION_1": 32,
        "ACCESS_PLATFORM": 33,
        "RING_PACKED": 34,
        "IN_ORDER": 35,
        "ORDER_PLATFORM": 36,
        "SR_IOV": 37,
        "NOTIFICATION_DATA": 38,
        "NOTIF_CONFIG_DATA": 39,
        "RING_RESET": 40,
        "ADMIN_VQ": 41,
        "SUSPEND": 43,
    }


def test_device_types_and_descriptor_flags_are_those_of_the_specification():
    assert (DeviceType.BLOCK, DeviceType.SCSI) == (2, 8)
    assert (DESC_NEXT, DESC_WRITE, DESC_INDIRECT) == (1, 2, 4)


def test_what_qemu_storage_daemon_offers_is_read_out_by_name():
    assert feature_names(0x175007E46, BlkFeature) == [
        "SIZE_MAX",
        "SEG_MAX",
        "BLK_SIZE",
        "FLUSH",
        "TOPOLOGY",
        "CONFIG_WCE",
        "MQ",
        "DISCARD",
        "WRITE_ZEROES",
        "NOTIFY_ON_EMPTY",
        "bit 26",  # vhost's LOG_ALL
        "INDIRECT_DESC",
        "EVENT_IDX",
        "bit 30",  # vhost-user's PROTOCOL_FEATURES
        "VERSION_1",
    ]


def test_the_same_bit_has_another_name_on_another_device():
    assert feature_names(1 << 2, BlkFeature) == ["SEG_MAX"]
    assert feature_names(1 << 2, ScsiFeature) == ["CHANGE"]


def test_a_bit_that_nobody_knows_is_numbered():
    """FEA-3."""
    assert feature_names(1 << 57 | 1 << 32, ScsiFeature) == ["VERSION_1", "bit 57"]


@given(st.integers(0, 2**128 - 1), st.sampled_from([BlkFeature, ScsiFeature]))
def test_every_set_bit_is_named_once(bits: int, device: type[enum.IntFlag]):
    assert len(set(feature_names(bits, device))) == bits.bit_count()


def test_the_fields_of_a_configuration_space_are_those_of_its_format():
    """PCI-3: each is accessed by its own width, and padding is not accessed."""
    assert config_fields("<QI?3xHBB", 8) == [(8, 8), (16, 4), (20, 1), (24, 2), (26, 1), (27, 1)]
    assert config_fields("2I2xH") == [(0, 4), (4, 4), (10, 2)]
    assert config_fields("24x") == []
