"""The virtio block device's bytes."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from virtio.errors import ProtocolError
from virtio.wire.blk import (
    UNMAP,
    BlkConfig,
    BlkFeature,
    BlkStatus,
    Range,
    RequestHeader,
    RequestType,
    config_span,
    decode_id,
    decode_ranges,
    encode_id,
)

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)

EVERYTHING = BlkFeature(sum(BlkFeature)) & ~BlkFeature.ZONED

SPACE = bytes.fromhex(
    "0010000000000000"  # capacity: 4096 sectors
    "00000200"  # size_max: 131072
    "7e000000"  # seg_max: 126
    "0400103f"  # cylinders, heads, sectors: 4, 16, 63
    "00100000"  # blk_size: 4096
    "03010800"  # physical_block_exp, alignment_offset, min_io_size: 3, 1, 8
    "00010000"  # opt_io_size: 256
    "0100"  # writeback, unused
    "0400"  # num_queues: 4
    "ffff3f00"  # max_discard_sectors
    "01000000"  # max_discard_seg: 1
    "08000000"  # discard_sector_alignment: 8
    "00800000"  # max_write_zeroes_sectors: 32768
    "02000000"  # max_write_zeroes_seg: 2
    "01000000"  # write_zeroes_may_unmap, unused
    "00400000"  # max_secure_erase_sectors: 16384
    "03000000"  # max_secure_erase_seg: 3
    "10000000"  # secure_erase_sector_alignment: 16
)
CONFIG = BlkConfig(
    capacity=4096,
    size_max=131072,
    seg_max=126,
    cylinders=4,
    heads=16,
    sectors=63,
    blk_size=4096,
    physical_block_exp=3,
    alignment_offset=1,
    min_io_size=8,
    opt_io_size=256,
    writeback=True,
    num_queues=4,
    max_discard_sectors=0x3FFFFF,
    max_discard_seg=1,
    discard_sector_alignment=8,
    max_write_zeroes_sectors=32768,
    max_write_zeroes_seg=2,
    write_zeroes_may_unmap=True,
    max_secure_erase_sectors=16384,
    max_secure_erase_seg=3,
    secure_erase_sector_alignment=16,
)


def test_numbers_are_those_of_the_specification():
    assert {bit.name: bit.value.bit_length() - 1 for bit in BlkFeature} == {
        "SIZE_MAX": 1,
        "SEG_MAX": 2,
        "GEOMETRY": 4,
        "RO": 5,
        "BLK_SIZE": 6,
        "FLUSH": 9,
        "TOPOLOGY": 10,
        "CONFIG_WCE": 11,
        "MQ": 12,
        "DISCARD": 13,
        "WRITE_ZEROES": 14,
        "LIFETIME": 15,
        "SECURE_ERASE": 16,
        "ZONED": 17,
    }
    assert [(kind.name, kind.value) for kind in RequestType] == [
        ("IN", 0),
        ("OUT", 1),
        ("FLUSH", 4),
        ("GET_ID", 8),
        ("GET_LIFETIME", 10),
        ("DISCARD", 11),
        ("WRITE_ZEROES", 13),
        ("SECURE_ERASE", 14),
    ]
    assert [*BlkStatus] == [0, 1, 2]


def test_a_request_header_is_sixteen_bytes():
    encoded = bytes.fromhex(
        "01000000"  # type: OUT
        "00000000"  # reserved
        "0807060504030201"  # sector
    )
    assert RequestHeader(RequestType.OUT, 0, 0x0102030405060708).encode() == encoded
    assert RequestHeader.decode(encoded) == RequestHeader(1, 0, 0x0102030405060708)


def test_a_flush_has_sector_zero_unless_told_otherwise():
    """BLK-8."""
    assert RequestHeader(RequestType.FLUSH).encode() == b"\4" + bytes(15)


def test_a_range_is_sixteen_bytes():
    encoded = bytes.fromhex(
        "0010000000000000"  # sector: 4096
        "08000000"  # num_sectors
        "01000000"  # flags: unmap
    )
    assert Range(4096, 8, UNMAP).encode() == encoded
    assert decode_ranges(encoded * 2) == [Range(4096, 8, UNMAP)] * 2


def test_a_discard_does_not_set_the_unmap_flag_unless_told_to():
    """BLK-14."""
    assert Range(1, 2).encode()[12:] == bytes(4)


@pytest.mark.parametrize("size", [1, 15, 17, 24])
def test_ranges_in_a_size_that_is_no_multiple_of_sixteen_are_refused(size: int):
    """BLK-10, the device's half."""
    with pytest.raises(ProtocolError, match=rf"{size} bytes, want a multiple of 16"):
        decode_ranges(bytes(size))


def test_a_cut_off_header_is_refused_with_both_numbers():
    with pytest.raises(ProtocolError, match="RequestHeader of 15 bytes, want 16"):
        RequestHeader.decode(bytes(15))


@pytest.mark.parametrize(
    ("features", "span"),
    [
        (0, 8),  # capacity alone
        (BlkFeature.RO | BlkFeature.FLUSH | BlkFeature.LIFETIME, 8),  # these define no field
        (BlkFeature.SIZE_MAX, 12),
        (BlkFeature.SEG_MAX, 16),
        (BlkFeature.GEOMETRY, 20),
        (BlkFeature.BLK_SIZE, 24),
        (BlkFeature.TOPOLOGY, 32),
        (BlkFeature.CONFIG_WCE, 34),
        (BlkFeature.MQ, 36),
        (BlkFeature.DISCARD, 48),
        (BlkFeature.WRITE_ZEROES, 60),
        (BlkFeature.SECURE_ERASE, 72),
        (BlkFeature.ZONED, 96),
        (0x175007E46, 60),  # all that qemu-storage-daemon offers, and all that it has
        (1 << 57, 8),
    ],
)
def test_the_span_to_read_ends_where_the_last_accepted_field_does(features: int, span: int):
    """CFG-2: nothing is read for a feature that was not accepted."""
    assert config_span(features) == span


def test_every_field_is_read_from_its_place():
    assert BlkConfig.decode(SPACE, EVERYTHING) == CONFIG
    assert CONFIG.encode(EVERYTHING) == SPACE


def test_fields_of_features_that_were_not_accepted_are_none():
    """CFG-2."""
    config = BlkConfig.decode(SPACE, BlkFeature.MQ)
    assert config == BlkConfig(capacity=4096, num_queues=4)


def test_a_longer_configuration_is_accepted():
    """CFG-3."""
    assert BlkConfig.decode(SPACE + b"\xff" * 200, EVERYTHING) == CONFIG


@pytest.mark.parametrize("feature", [0, *BlkFeature])
def test_a_configuration_too_short_for_what_was_accepted_is_refused(feature: int):
    """CFG-3."""
    span = config_span(feature)
    with pytest.raises(ProtocolError, match=f"{span - 1} bytes, want {span}"):
        BlkConfig.decode(bytes(span - 1), feature)


def test_a_flag_that_is_neither_0_nor_1_is_true():
    space = bytearray(SPACE)
    space[32] = 0x80  # writeback
    assert BlkConfig.decode(bytes(space), BlkFeature.CONFIG_WCE).writeback is True


def test_what_spdk_answered_reads_as_it_was_recorded():
    lines = (Path(__file__).parent.parent / "data/spdk/vhost-user-wire-blk.txt").read_text()
    answer = next(line for line in lines.splitlines() if line.startswith("< GET_CONFIG"))
    space = bytes.fromhex(answer.partition("region=")[2])  # the record stops after 80 of 256 bytes
    config = BlkConfig.decode(space, 0x15C007646)  # the features that it offered
    assert config == BlkConfig(
        capacity=524288,
        size_max=131072,
        seg_max=126,
        blk_size=512,
        physical_block_exp=0,
        alignment_offset=0,
        min_io_size=1,
        opt_io_size=0,
        num_queues=256,
        max_discard_sectors=32768,
        max_discard_seg=1,
        discard_sector_alignment=1,
        max_write_zeroes_sectors=32768,
        max_write_zeroes_seg=1,
        write_zeroes_may_unmap=False,
    )


@given(st.integers(0, 2**20 - 1).map(lambda bits: bits & EVERYTHING), st.binary(min_size=72))
def test_what_was_read_is_written_back_the_same(features: int, space: bytes):
    config = BlkConfig.decode(space, features)
    assert len(config.encode(features)) == config_span(features)
    assert BlkConfig.decode(config.encode(features), features) == config


@given(st.binary(max_size=100), U64)
def test_no_configuration_does_worse_than_being_refused(space: bytes, features: int):
    try:
        config = BlkConfig.decode(space, features)
    except ProtocolError:
        assert len(space) < config_span(features)
    else:
        assert config.capacity == struct.unpack_from("<Q", space)[0]


@given(U32, U32, U64)
def test_headers_and_ranges_survive_the_round_trip(small: int, other: int, large: int):
    header = RequestHeader(small, other, large)
    assert RequestHeader.decode(header.encode()) == header
    assert decode_ranges(Range(large, small, other).encode()) == [Range(large, small, other)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"vhost_user_blk\0\0\0\0\0\0", "vhost_user_blk"),
        (b"12345678901234567890", "12345678901234567890"),  # no NUL when it is full
        (b"123456789012345678901", "12345678901234567890"),
        (b"disk\0rubbish", "disk"),
        (b"", ""),
        (b"\xff1\0", "\N{REPLACEMENT CHARACTER}1"),
    ],
)
def test_an_id_ends_at_its_first_nul_or_at_twenty_bytes(data: bytes, text: str):
    """BLK-11."""
    assert decode_id(data) == text


@pytest.mark.parametrize(
    ("text", "data"),
    [("ram", b"ram" + bytes(17)), ("x" * 30, b"x" * 20), ("é", b"?" + bytes(19))],
)
def test_an_id_is_sent_as_twenty_bytes_of_ascii(text: str, data: bytes):
    """BLK-11, the device's half."""
    assert encode_id(text) == data


@given(st.binary())
def test_any_id_can_be_read(data: bytes):
    assert len(decode_id(data)) <= 20
