"""A logical unit as a disk: which commands serve its requests, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable

from virtio.errors import DeviceError
from virtio.ring.codes import FROM_DEVICE, NBYTES, NO_DATA, OFFSET, TO_DEVICE
from virtio.ring.requests import Finished
from virtio.ring.template import Patch, Template
from virtio.wire import scsi
from virtio.wire.virtio_scsi import RequestHeader, ScsiConfig, encode_lun

from .base import MAX_TRANSFER
from .dialogue import CDB_AT, LAYOUT, TAG_PATCH, command
from .disk import Disk, Limits
from .probe import Unit
from .scsi_errors import Doubt, doubt, explain

_ANY_BLOCKS = 1 << 22  # of one UNMAP or WRITE SAME, where the unit sets no limit: no long silences
_SECTOR = 512  # the unit of max_sectors
_MOST_10 = 0xFFFF  # blocks in a command of 10 bytes


def block_size_problem(block: int, max_sectors: int) -> str:
    """Why blocks of so many bytes cannot be used; empty if they can."""
    if max_sectors and block > max_sectors * _SECTOR:
        return f"blocks of {block} bytes, and max_sectors {max_sectors} lets no request have one"
    if block % _SECTOR or block & (block - 1) or not 0 < block <= MAX_TRANSFER:
        return f"blocks of {block} bytes, want a power of two from {_SECTOR} to {MAX_TRANSFER}"
    return ""


def make_disk(
    target: int,
    unit: Unit,
    config: ScsiConfig,
    depth: int,
    most: int,
    doubted: Callable[[Doubt], None],
) -> Disk:
    """The disk that a unit without a problem is; at most `depth` requests are to be in a queue, and `most`
    bytes in a request.

    `doubted` is called when a response makes doubtful what is known of the unit.

    Commands of 16 bytes are used where a block's number may need them: that they work is known from
    READ CAPACITY(16), and not from the version that the unit claims.
    """
    assert unit.capacity is not None
    block, blocks = unit.capacity.block_size, unit.capacity.blocks
    lun, shift = unit.lun, block.bit_length() - 1
    address = encode_lun(target, lun)
    wide = blocks > 1 << 32
    limit = min(most, config.max_sectors * _SECTOR or most)
    if unit.limits.max_transfer:
        limit = min(limit, unit.limits.max_transfer * block)
    if not wide:
        limit = min(limit, _MOST_10 * block)
    read, write = (scsi.read_16, scsi.write_16) if wide else (scsi.read_10, scsi.write_10)
    extent = _extent(wide, shift)
    max_unmap = _max_unmap(unit)
    max_same, same_16 = _max_same(unit)
    deallocates = unit.provisioning.lbpws if same_16 else unit.provisioning.lbpws10
    reads_zeroes = unit.capacity.lbprz or unit.provisioning.lbprz

    def judge(finished: Finished, offset: int, transfer: bool) -> DeviceError | None:
        doubtful = doubt(finished)
        if doubtful is not Doubt.NONE:
            doubted(doubtful)
        return explain(finished, offset, transfer)

    return Disk(
        place=f"t{target}" + (f"l{lun}" if lun else ""),
        product="Virtio SCSI Disk",
        serial=unit.serial,
        identity=unit.identity,
        unique=unit.unique,
        address=address,
        flush_known=unit.mode.write_cache is not None,
        size=blocks * block,
        block_size=block,
        read_only=unit.read_only,
        limits=Limits(
            max_transfer=limit // block * block,
            max_unmap=max_unmap * block,
            unmap_alignment=unit.limits.unmap_granularity * block,
            unmap_start=unit.limits.unmap_alignment * block,
            max_write_zeroes=max_same * block,
            max_compare_and_write=min(unit.limits.max_compare_and_write * block, most // 2),
            depth=depth,
        ),
        read=command(address, read(0, 0), FROM_DEVICE, extent),
        write=command(address, write(0, 0), TO_DEVICE, extent),
        write_fua=command(address, write(0, 0, fua=True), TO_DEVICE, extent) if unit.mode.dpofua else None,
        # SPDK's target fails SYNCHRONIZE CACHE where it has said that there is no cache.
        flush=None
        if unit.mode.write_cache is False
        else command(address, scsi.synchronize_cache_10(), NO_DATA),
        unmap=_unmap(address, shift) if max_unmap else None,
        write_zeroes=_write_same(address, shift, same_16, False) if max_same else None,
        write_zeroes_unmap=_write_same(address, shift, same_16, deallocates and reads_zeroes)
        if max_same
        else None,
        explain=judge,
    )


def _max_unmap(unit: Unit) -> int:
    """Blocks of one UNMAP, in whole granules where that is possible; 0 where it is not supported."""
    assert unit.capacity is not None
    if not (unit.capacity.lbpme and unit.provisioning.lbpu):
        return 0
    most = min(unit.limits.max_unmap or _ANY_BLOCKS, _ANY_BLOCKS)
    granule = unit.limits.unmap_granularity
    return most // granule * granule if 0 < granule <= most else most


def _max_same(unit: Unit) -> tuple[int, bool]:
    """Blocks of one WRITE SAME, 0 where it is not supported; whether it is the one of 16 bytes."""
    assert unit.capacity is not None
    known = unit.limits.max_write_same
    most = min(known or _ANY_BLOCKS, _ANY_BLOCKS)
    if unit.wide and (known or unit.provisioning.lbpws):
        return most, True
    if unit.capacity.blocks <= 1 << 32 and (known or unit.provisioning.lbpws10):
        return min(most, _MOST_10), False
    return 0, False


def _extent(wide: bool, shift: int) -> list[Patch]:
    """Where a command of 16 or 10 bytes has its first block and the number of blocks."""
    return [
        Patch(OFFSET, CDB_AT + 2, 8 if wide else 4, big_endian=True, shift=shift),
        Patch(NBYTES, CDB_AT + (10 if wide else 7), 4 if wide else 2, big_endian=True, shift=shift),
    ]


def _unmap(address: bytes, shift: int) -> Template:
    """UNMAP of one range."""
    header = RequestHeader(address, 0, cdb=scsi.unmap(LAYOUT.payload)).encode()
    first = len(header) + LAYOUT.payload - 16  # block, number of blocks, four reserved bytes
    return Template(
        header,
        payload=scsi.unmap_parameters([(0, 0)]),
        patches=[
            TAG_PATCH,
            Patch(OFFSET, first, 8, big_endian=True, shift=shift),
            Patch(NBYTES, first + 8, 4, big_endian=True, shift=shift),
        ],
        unmap=True,
    )


def _write_same(address: bytes, shift: int, wide: bool, unmap: bool) -> Template:
    """WRITE SAME of one block of zeros, which the caller provides."""
    cdb = (scsi.write_same_16 if wide else scsi.write_same_10)(0, 0, unmap=unmap)
    return Template(
        RequestHeader(address, 0, cdb=cdb).encode(),
        direction=TO_DEVICE,
        data_bytes=1 << shift,
        patches=[TAG_PATCH, *_extent(wide, shift)],
    )
