"""virtio-blk (5.2)."""

from __future__ import annotations

import dataclasses
import errno

from virtio.errors import DeviceError, ProtocolError, RequestTimeout, TransportError, VirtioError
from virtio.ring.codes import FROM_DEVICE, NBYTES, OFFSET, TO_DEVICE
from virtio.ring.layout import Layout
from virtio.ring.lease import Lease
from virtio.ring.requests import Finished
from virtio.ring.template import Patch, Template
from virtio.wire.blk import (
    ID_SIZE,
    SECTOR_SIZE,
    UNMAP,
    BlkConfig,
    BlkFeature,
    BlkStatus,
    Range,
    RequestHeader,
    RequestType,
    config_accesses,
    config_span,
    decode_id,
)
from virtio.wire.virtio import feature_names

from .base import Device, weakly
from .disk import Disk, Limits
from .kinds import DEVICE_BITS, looks_like, mistaken

_HEADER = RequestHeader.FORMAT.size
_RANGE = Range.FORMAT.size
_SHIFT = 9  # bytes to sectors
_MAX_BLOCK = 1 << 20
_MAX_BYTES = 2**63 - 1  # so that every offset is a signed 64-bit number
_MAX_SECTORS = 0xFFFFFFFF  # in a Range

_ERRORS = {
    BlkStatus.IOERR: (errno.EIO, "the device reports an I/O error (IOERR)"),
    BlkStatus.UNSUPP: (errno.EOPNOTSUPP, "the device does not support the request (UNSUPP)"),
    0xFF: (errno.EIO, "the device completed the request without writing a status"),
}


class BlkDevice(Device):
    """A virtio-blk device: one disk."""

    FEATURES = BlkFeature
    WANTED = (
        BlkFeature.SIZE_MAX
        | BlkFeature.SEG_MAX
        | BlkFeature.RO
        | BlkFeature.BLK_SIZE
        | BlkFeature.FLUSH
        | BlkFeature.TOPOLOGY
        | BlkFeature.MQ
        | BlkFeature.DISCARD
        | BlkFeature.WRITE_ZEROES
    )
    LAYOUT = Layout(
        request=_HEADER,
        payload=_RANGE,
        response=1,
        result_offset=0,
        result_mask=0xFF,
        response_first=False,
    )

    config: BlkConfig

    def _configure(self) -> None:
        try:
            config = self._read_config()
        except (TransportError, ProtocolError) as error:
            raise self._wondering(error) from error
        self.config = config
        if config.capacity == 0 and config.blk_size == 0:
            raise TransportError(errno.ENODEV, f"{self.transport.address} has no disk behind it any more")
        self.block_size = SECTOR_SIZE if config.blk_size is None else config.blk_size
        size = self.block_size
        if size % SECTOR_SIZE or size & (size - 1) or not SECTOR_SIZE <= size <= _MAX_BLOCK:
            raise ProtocolError(
                f"{self.transport.address} has blk_size {size}, want a power of two from "
                f"{SECTOR_SIZE} to {_MAX_BLOCK}"
            )
        if config.capacity * SECTOR_SIZE > _MAX_BYTES:
            raise ProtocolError(f"{self.transport.address} claims {config.capacity} sectors: too many")
        # qemu-storage-daemon offers SIZE_MAX with a size_max of 0, and means no limit.
        size_max = config.size_max or 0xFFFFFFFF
        self._limit_segments(config.seg_max or 1, size_max)
        if self.segments * self.segment_bytes < size:
            raise ProtocolError(
                f"{self.transport.address} has size_max {size_max} and seg_max {config.seg_max}: "
                f"no block of {size} bytes fits in a request"
            )
        self.num_queues = 1 if config.num_queues is None else config.num_queues

    def _read_config(self) -> BlkConfig:
        own = self.features & DEVICE_BITS
        payload = self.transport.read_config(config_span(own), config_accesses(own))
        return BlkConfig.decode(payload, own)

    def discover(self, deadline: int | None) -> list[Disk]:
        """The one disk; its serial is read from it (GET_ID), or empty where there is none."""
        try:
            self.serial = self._read_id(self.leases[0], deadline)
            return [self._disk(self.serial)]
        except (TransportError, ProtocolError, RequestTimeout) as error:
            raise self._wondering(error) from error

    def follow(self) -> None:
        self.transport.on_config_change = weakly(self.revalidate)
        super().follow()

    def revalidate(self) -> None:
        self.chores.add("resize", self._resize)

    def _wondering(self, error: VirtioError) -> VirtioError:
        """The error, and before it what is more likely where the device looks like virtio-scsi."""
        if looks_like(self.transport.offered()) != "scsi":
            return error
        words = getattr(error, "strerror", None) or str(error)  # said too: two of the bits could be ours
        return TransportError(
            errno.ENODEV, f"{mistaken(self.transport.address, 'scsi')}; as virtio-blk it fails: {words}"
        )

    def _disk(self, serial: str) -> Disk:
        config, block = self.config, self.block_size
        size = config.capacity * SECTOR_SIZE // block * block
        unmap = _whole(config.max_discard_sectors, block)
        zeroes = _whole(config.max_write_zeroes_sectors, block)
        return Disk(
            place="",
            product="VirtioBlk Disk",
            serial=serial,
            size=size,
            block_size=block,
            read_only=bool(self.features & BlkFeature.RO),
            limits=Limits(
                max_transfer=self.most_bytes // block * block,
                max_unmap=unmap,
                unmap_alignment=(config.discard_sector_alignment or 0) * SECTOR_SIZE,
                max_write_zeroes=zeroes,
            ),
            read=_transfer(RequestType.IN, FROM_DEVICE),
            write=_transfer(RequestType.OUT, TO_DEVICE),
            write_fua=None,
            flush=_plain(RequestType.FLUSH) if self.features & BlkFeature.FLUSH else None,
            unmap=_on_range(RequestType.DISCARD, 0) if unmap else None,
            write_zeroes=_on_range(RequestType.WRITE_ZEROES, 0) if zeroes else None,
            write_zeroes_unmap=_on_range(
                RequestType.WRITE_ZEROES, UNMAP if config.write_zeroes_may_unmap else 0
            )
            if zeroes
            else None,
            explain=_explain,
        )

    def _resize(self) -> None:
        """The configuration has changed: of what may change in it, the capacity matters (5.2.5.1)."""
        with self.steady():
            capacity = self._read_config().capacity
        if capacity * SECTOR_SIZE > _MAX_BYTES:
            raise ProtocolError(f"{self.transport.address} claims {capacity} sectors: too many")
        self.config = dataclasses.replace(self.config, capacity=capacity)
        self.report([self._disk(self.serial)])

    def _read_id(self, lease: Lease, deadline: int | None) -> str:
        template = Template(RequestHeader(RequestType.GET_ID, 0, 0).encode(), direction=FROM_DEVICE)
        with lease, self.pool.take(ID_SIZE) as buffer, lease.holding(buffer):
            buffer.view()[:] = bytes(ID_SIZE)
            lease.queue.submit(template, 0, ID_SIZE, buffer.offset, 0)
            lease.queue.kick()
            (finished,) = lease.gather(1, deadline)
            return decode_id(bytes(buffer.view())) if finished.result == BlkStatus.OK else ""

    def __repr__(self) -> str:
        names = ", ".join(feature_names(self.features, BlkFeature))
        return f"<BlkDevice {self.transport.address}, {len(self.leases)} queues, {names}>"


def _whole(sectors: int | None, block: int) -> int:
    """A limit of sectors as bytes in whole blocks; 0 where there is no such operation."""
    return min(sectors or 0, _MAX_SECTORS) * SECTOR_SIZE // block * block


def _transfer(kind: RequestType, direction: int) -> Template:
    return Template(
        RequestHeader(kind, 0, 0).encode(),
        direction=direction,
        patches=[Patch(OFFSET, 8, 8, shift=_SHIFT)],
    )


def _plain(kind: RequestType) -> Template:
    return Template(RequestHeader(kind, 0, 0).encode())


def _on_range(kind: RequestType, flags: int) -> Template:
    return Template(
        RequestHeader(kind, 0, 0).encode(),
        payload=Range(0, 0, flags).encode(),
        patches=[
            Patch(OFFSET, _HEADER, 8, shift=_SHIFT),
            Patch(NBYTES, _HEADER + 8, 4, shift=_SHIFT),
        ],
        unmap=kind == RequestType.DISCARD,
    )


def _explain(finished: Finished, offset: int, transfer: bool) -> DeviceError:
    code, words = _ERRORS.get(
        finished.result, (errno.EIO, f"the device answered with status {finished.result:#x}")
    )
    return DeviceError(code, words, offset=offset, status=finished.result)
