"""PCI configuration space, from bytes: of QEMU's devices, and of hostile ones."""

import struct

import pytest
from hypothesis import example, given, strategies as st

from tests.model.pci import BAR, Cap, PciDevice
from virtio.errors import ProtocolError
from virtio.wire.pci import BARS, Bar, Common, Function, Msix, Structure, StructureKind

# QEMU 7.2's virtio-scsi-pci, transitional, once its BARs have got addresses.
QEMU_SCSI = bytes.fromhex(
    "f41a 0410 0700 1000 00 000001 00 00 00 00"  # vendor, device, command, status, revision, class, ..
    "01c00000"  # BAR 0: I/O ports
    "000000e0"  # BAR 1: 32 bits of memory
    "00000000 00000000"
    "0c4000e0 00000000"  # BAR 4: 64 bits, prefetchable
    "00000000 f41a 0800 00000000"  # subsystem
    "98 000000 00000000 00010000"  # the first capability
    "09 00 10 01 04 000000 00000000 00100000"  # 40: common, BAR 4 at 0, 4096 bytes
    "09 40 10 03 04 000000 00100000 00100000"  # 50: ISR
    "09 50 10 04 04 000000 00200000 00100000"  # 60: device
    "09 60 14 02 04 000000 00300000 00100000 04000000"  # 70: notify, multiplier 4
    "09 70 14 05 00 000000 00000000 00000000 00000000"  # 84: PCI_CFG
    "11 84 0300 01000000 01080000"  # 98: MSI-X, 4 vectors, table in BAR 1 at 0, pending in BAR 1 at 0x800
).ljust(256, b"\0")


def test_what_qemu_has_is_read_as_it_is():
    function = Function.decode(QEMU_SCSI)
    assert (function.vendor, function.device, function.revision) == (0x1AF4, 0x1004, 0)
    assert (function.subsystem_vendor, function.subsystem) == (0x1AF4, 8)
    assert (function.device_type, function.transitional) == (8, True)
    assert [bar for bar in function.bars if bar.address] == [
        Bar(0, 0xC000, True, False, False),
        Bar(1, 0xE0000000, False, False, False),
        Bar(4, 0xE0004000, False, True, True),
    ]
    assert function.structures == (
        Structure(StructureKind.PCI_CFG, 0, 0, 0, 0x84),
        Structure(StructureKind.NOTIFY, 4, 0x3000, 0x1000, 0x70, 4),
        Structure(StructureKind.DEVICE, 4, 0x2000, 0x1000, 0x60),
        Structure(StructureKind.ISR, 4, 0x1000, 0x1000, 0x50),
        Structure(StructureKind.COMMON, 4, 0, 0x1000, 0x40),
    )
    assert function.msix == Msix(0x98, 4, False, 1, 0, 1, 0x800)


@pytest.mark.parametrize(
    "device, device_type, transitional",
    [
        (0x1042, 2, False),
        (0x1048, 8, False),
        (0x1040, 0, False),
        (0x107F, 63, False),
        (0x1001, 2, True),
        (0x1004, 8, True),
        (0x1000, 1, True),
        (0x103F, None, False),
        (0x1080, None, False),
        (0x1008, None, False),
        (0x1110, None, False),
    ],
)
def test_the_device_type_is_in_the_device_id(device, device_type, transitional):
    """PCI-1."""
    function = Function.decode(PciDevice(device=device).space)
    assert (function.device_type, function.transitional) == (device_type, transitional)


def test_another_vendors_device_is_none_of_ours():
    """PCI-1."""
    function = Function.decode(PciDevice(vendor=0x8086, device=0x1042).space)
    assert (function.device_type, function.transitional) == (None, False)


@given(st.integers(0, 255), st.binary(min_size=4, max_size=4))
def test_any_revision_and_any_subsystem_will_do(revision, subsystem):
    """PCI-2."""
    space = bytearray(PciDevice(revision=revision).space)
    space[0x2C:0x30] = subsystem
    function = Function.decode(bytes(space))
    assert function.device_type == 2
    assert len(function.structures) == 5


@pytest.mark.parametrize("cfg_type", [0, 6, 7, 8, 9, 10, 255])
def test_capabilities_of_reserved_or_other_types_are_passed_over(cfg_type):
    """PCI-4, PCI-18: shared memory (8) and vendor data (9) are of no use here."""
    caps = PciDevice().default_caps()
    usual = Function.decode(PciDevice().space).structures
    more = [Cap(cfg_type, BAR, 0, 64), *caps[:2], Cap(cfg_type, BAR, 0, 64), *caps[2:]]
    found = Function.decode(PciDevice(caps=more).space).structures
    assert [s._replace(at=0) for s in found] == [s._replace(at=0) for s in usual]


def test_of_several_of_a_type_the_first_comes_first():
    """PCI-5."""
    caps = [Cap(1, 2, 0x100, 64), Cap(1, 4, 0, 64)]
    found = Function.decode(PciDevice(caps=caps).space).structures
    assert [structure.bar for structure in found] == [2, 4]


def test_a_longer_capability_is_accepted():
    """PCI-6."""
    caps = [Cap(1, 4, 0, 64, bytes(12)), Cap(2, 4, 0x400, 64, struct.pack("<I", 8) + bytes(8))]
    found = Function.decode(PciDevice(caps=caps).space).structures
    assert [(s.kind, s.length, s.multiplier) for s in found] == [(1, 64, 0), (2, 64, 8)]


@pytest.mark.parametrize("kind, size", [(1, 15), (1, 0), (2, 16), (2, 19), (5, 16)])
def test_a_capability_that_is_too_short_is_passed_over(kind, size):
    caps = [Cap(kind, 4, 0, 64, bytes(4), cap_len=size), Cap(3, 4, 0, 1)]
    assert [s.kind for s in Function.decode(PciDevice(caps=caps).space).structures] == [3]


@pytest.mark.parametrize("bar", [6, 7, 8, 255])
def test_a_capability_with_a_reserved_bar_is_passed_over(bar):
    """PCI-7."""
    caps = [Cap(1, bar, 0, 64), Cap(1, 4, 0, 64)]
    assert [s.bar for s in Function.decode(PciDevice(caps=caps).space).structures] == [4]


def test_the_bar_of_pci_cfg_is_a_register_and_may_hold_anything():
    caps = [Cap(5, 255, 0xFFFFFFFF, 0xFFFFFFFF, bytes(4))]
    assert [s.kind for s in Function.decode(PciDevice(caps=caps).space).structures] == [5]


def test_a_very_large_length_is_read_as_it_is():
    """PCI-8."""
    (found,) = Function.decode(PciDevice(caps=[Cap(1, 4, 0, 0xFFFFFFFF)]).space).structures
    assert found.length == 0xFFFFFFFF


@pytest.mark.parametrize("back_to", [0x40, 0x50])
def test_a_chain_of_capabilities_that_bites_its_tail_ends(back_to):
    space = bytearray(PciDevice(vectors=0).space)
    space[0x51] = back_to  # `next` of the second one
    assert [s.kind for s in Function.decode(bytes(space)).structures] == [1, 2]


@pytest.mark.parametrize("pointer", [0, 1, 0x04, 0x3C, 0xFF])
def test_a_pointer_that_leads_nowhere_ends_the_chain(pointer):
    space = bytearray(PciDevice().space)
    space[0x34] = pointer
    assert Function.decode(bytes(space)).structures == ()


def test_the_low_bits_of_pointers_are_reserved():
    space = bytearray(PciDevice().space)
    space[0x34] |= 3
    space[0x41] |= 1
    assert len(Function.decode(bytes(space)).structures) == 5


def test_a_function_without_a_list_of_capabilities_has_none():
    space = bytearray(PciDevice().space)
    space[0x06] &= ~0x10
    assert Function.decode(bytes(space)).structures == ()


@pytest.mark.parametrize("nbytes", [64, 65, 0x41, 0x4F, 0x50])
def test_a_capability_that_was_not_read_whole_is_passed_over(nbytes):
    """An unprivileged reader of sysfs is given 64 bytes."""
    found = Function.decode(PciDevice().space[:nbytes]).structures
    assert [s.kind for s in found] == ([1] if nbytes == 0x50 else [])


def test_reserved_kinds_of_bars_are_passed_over():
    space = bytearray(QEMU_SCSI)
    struct.pack_into(
        "<6I",
        space,
        0x10,
        0xFE000002,  # type 1: below 1 MiB, once
        0xFE000006,  # type 3
        0xFD00000C,  # 64 bits, its upper half next
        0x00000012,
        0xFC000008,  # 32 bits, prefetchable
        0xFB00000C,  # 64 bits, and nothing next
    )
    assert Function.decode(bytes(space)).bars == (
        Bar(2, 0x12FD000000, False, True, True),
        Bar(4, 0xFC000000, False, False, True),
    )


def test_an_msix_table_in_a_reserved_bar_is_none():
    space = bytearray(QEMU_SCSI)
    space[0x9C] = 6
    assert Function.decode(bytes(space)).msix is None


def test_an_msix_capability_at_the_end_is_not_read_past_it():
    space = bytearray(QEMU_SCSI)
    space[0x34] = 0xFC
    space[0xFC:0x100] = b"\x11\0\xff\x87"
    assert Function.decode(bytes(space)).msix is None


def test_the_size_and_state_of_the_msix_table_are_read():
    """PCI-20."""
    space = bytearray(QEMU_SCSI)
    space[0x9A:0x9C] = b"\xff\xbf"  # enabled, 2048 vectors, and reserved bits
    msix = Function.decode(bytes(space)).msix
    assert (msix.vectors, msix.enabled) == (2048, True)


@pytest.mark.parametrize("vendor", [0xFFFF])
def test_nobody_there_is_an_error(vendor):
    with pytest.raises(ProtocolError, match="no such device"):
        Function.decode(PciDevice(vendor=vendor).space)


@pytest.mark.parametrize("header_type", [1, 2, 0x81])
def test_a_bridge_is_no_device(header_type):
    with pytest.raises(ProtocolError, match="header type"):
        Function.decode(PciDevice(header_type=header_type).space)


def test_one_function_of_several_is_a_device():
    assert Function.decode(PciDevice(header_type=0x80).space).device_type == 2


@pytest.mark.parametrize("nbytes", [0, 63])
def test_less_than_a_header_is_an_error(nbytes):
    with pytest.raises(ProtocolError, match=f"{nbytes} bytes, want 64"):
        Function.decode(QEMU_SCSI[:nbytes])


@given(st.binary(min_size=0, max_size=300), st.integers(0, 255))
@example(b"\xff" * 256, 0)
@example(b"\x09" * 256, 0)
def test_any_bytes_are_survived(noise, start):
    """Whatever is decoded keeps to what its types promise."""
    space = bytearray(QEMU_SCSI)
    space[start : start + len(noise)] = noise
    for candidate in (bytes(space), noise):
        try:
            function = Function.decode(candidate)
        except ProtocolError:
            continue
        assert len(function.structures) <= 48
        for structure in function.structures:
            assert structure.at % 4 == 0 and 64 <= structure.at < 256
            assert structure.bar < BARS or structure.kind == StructureKind.PCI_CFG
        assert len(function.bars) <= BARS


def test_registers_lie_where_the_specification_puts_them():
    """PCI-3."""
    place = 0
    for name, register in vars(Common).items():
        if name.startswith("_") or name == "BYTES":
            continue
        for offset, width in [register] if isinstance(register[0], int) else register:
            assert offset == place and offset % width == 0, name
            place += width
    assert place == 60
